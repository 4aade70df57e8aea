"""Quick pickling for the frozen dataclasses that travel between driver and workers with every step.

Python's own way for slotted dataclasses looks up their fields at each load (about 10 us an object, ten objects a step); this
one calls the constructor with the values, by position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def travels(cls: type[T]) -> type[T]:
    """Decorate a dataclass all of whose fields are constructor parameters."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    get: Callable[[Any], Any] = attrgetter(*names)
    single = len(names) == 1

    def reduce(self: Any) -> tuple[type[T], tuple[Any, ...]]:
        values = get(self)
        return cls, ((values,) if single else values)

    cls.__reduce__ = reduce  # type: ignore[method-assign]
    return cls
