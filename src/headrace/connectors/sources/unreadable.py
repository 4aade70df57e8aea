"""Input that can't be read: whether it is the data's own fault, and finding the rows of a batch that are to blame.

Invariant: what storage or a changed object is to blame for is never taken for bad data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from headrace.contracts.source import BadRange, OnBad
from headrace.core.errors import DataError, InputChanged, StorageRefused

T = TypeVar("T")


class Mismatch(DataError):
    """An object lacks a column that was promised: no row is to blame."""


_NOT_BAD = (InputChanged, Mismatch, StorageRefused)


def is_bad(error: DataError) -> bool:
    """Is it the data's own fault?"""
    missing = isinstance(error.__cause__, FileNotFoundError)  # it was there when it was listed
    return not missing and not isinstance(error, _NOT_BAD)


def reported(on_bad: OnBad | None, uri: str, row: int, rows: int, error: DataError) -> None:
    """Tell of a range that can't be read, so that reading may go on; raises `error` where nobody wants to be told.

    row: -1 when unknown.
    """
    if on_bad is None or not is_bad(error):
        raise error
    on_bad(BadRange(uri, row, rows, error))


def halves(start: int, stop: int, read: Callable[[int, int], T], bad: Callable[[int, DataError], None]) -> Iterator[T]:
    """read(start, stop), or where that raises DataError what is left of it, in order, without the single rows that fail."""
    try:
        made = read(start, stop)
    except _NOT_BAD:
        raise
    except DataError as error:
        if stop - start == 1:
            bad(start, error)
            return
    else:
        yield made
        return
    middle = (start + stop) // 2
    yield from halves(start, middle, read, bad)
    yield from halves(middle, stop, read, bad)
