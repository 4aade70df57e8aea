"""Torch modules that can't be copied: worker threads share one, and call it one at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()  # by module
_CLAIMS = threading.Lock()


class Guarded:
    """Calls a module while no other thread of this process does. inside: what calls are made in."""

    def __init__(self, module: Any, inside: Callable[[], AbstractContextManager[Any]]) -> None:
        self._module = module
        with _CLAIMS:
            self._lock = _LOCKS.setdefault(module, threading.RLock())
        self._inside = inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock, self._inside():
            return self._module(*args, **kwargs)
