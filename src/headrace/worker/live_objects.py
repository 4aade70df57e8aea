"""Live objects that users give as functions: each worker thread beyond the first has a copy of its own, as processes do.

Their state within a call (`self.x = ...`) would be another thread's otherwise. Invariants: the first worker has the object
itself, one worker at a time in this process; copies are made between its calls; what can't be copied is called by one thread
at a time.
Objects that are kept one batch ahead are not held back so: they are shared where they can't be copied.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

_PLAIN = (FunctionType, BuiltinFunctionType, type, type(functools.cache(print)))


class _Original:
    """An object that a user gave. owner: a token of the workers' functions that have it."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.lock = threading.RLock()
        self.owner: object | None = None


_ORIGINALS: weakref.WeakValueDictionary[int, _Original] = weakref.WeakValueDictionary()  # by subject, in use
_CLAIMS = threading.Lock()


class LiveObjects:
    """Of one worker, used by its thread."""

    def __init__(self) -> None:
        self._token = object()
        self._originals: dict[int, _Original] = {}
        self._copies: dict[int, Any] = {}

    def own(self, target: Any) -> Any:
        """What this worker is to call for it."""
        subject = target.__self__ if isinstance(target, MethodType) else target
        if isinstance(target, _PLAIN) or isinstance(subject, type | ModuleType) or hasattr(subject, "stream"):
            return target
        original = self._claim(subject)
        ahead = hasattr(target, "submit")
        if original.owner is not self._token:
            found = self._copy(original)
            if found is not None:
                return MethodType(target.__func__, found) if isinstance(target, MethodType) else found
        return target if ahead else Guarded(target, original.lock)

    def guarded(self, target: Any, inside: Callable[[], AbstractContextManager[Any]]) -> Guarded:
        """One that can't be copied. inside: what calls are made in."""
        return Guarded(target, self._claim(target).lock, inside)

    def release(self) -> None:
        """They are no longer called here."""
        with _CLAIMS:
            for original in self._originals.values():
                if original.owner is self._token:
                    original.owner = None
        self._originals.clear()
        self._copies.clear()

    def _claim(self, subject: Any) -> _Original:
        with _CLAIMS:
            original = _ORIGINALS.get(id(subject))
            if original is None:
                original = _ORIGINALS[id(subject)] = _Original(subject)
            if original.owner is None:
                original.owner = self._token
        self._originals[id(subject)] = original
        return original

    def _copy(self, original: _Original) -> Any:
        """A copy, the same for all uses in this worker. None: there is none."""
        from headrace.core.own_copy import own_copy

        at = id(original.subject)
        if at not in self._copies:
            try:
                with original.lock:
                    self._copies[at] = own_copy(original.subject)
            except Exception:
                self._copies[at] = None
        return self._copies[at]


class Guarded:
    """Calls an object while no other thread does."""

    def __init__(
        self, target: Any, lock: AbstractContextManager[Any], inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """inside: what calls are made in."""
        self._target = target
        self._lock = lock
        self._inside = inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock, self._inside():
            made = self._target(*args, **kwargs)
        return self._each(made) if isinstance(made, GeneratorType) else made

    def _each(self, made: Generator[Any, None, None]) -> Generator[Any, None, None]:
        with closing(made):
            while True:
                with self._lock:
                    items = _next(made)
                if not items:
                    return
                yield items.pop()  # held by nobody then


def _next(made: Generator[Any, None, None]) -> list[Any]:
    """The next one, if there is one."""
    try:
        return [next(made)]
    except StopIteration:
        return []
