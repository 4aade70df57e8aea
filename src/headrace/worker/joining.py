"""Answers of a batch function joined again: of neighbouring batches that were cut from one block, those alike become one piece.

An Arrow column for each column of each batch costs more than most functions on 1,024 rows, and holds the interpreter lock. Here
what came back as it was given is the block's own column, and plain arrays are put one behind the other.

Invariants: the rows and types are those that `results.batch_of` would have made of each answer; what is held of an answer is a
copy, as the function may write to it again; Piece.cuts tells the batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from headrace.core.refs import Origin
from headrace.core.tensors import arrow_type, numpy_to_array
from headrace.worker.batching import Piece
from headrace.worker.formats import Given
from headrace.worker.results import make_batch

MOST_BYTES = 16 << 20  # of arrays that wait; as BlockLimits.target_bytes
NARROW_ROW_BYTES = 256  # of an array: the copy of a wider one costs more than a column
MOST_S = 0.02  # then nothing waits for another call: steps are to end in time, and whoever follows wants something to do

_Array = np.ndarray[Any, Any]
_Layout = int | tuple[Any, tuple[int, ...]]  # the place of a column of the block, or dtype and shape of a row


class Joining:
    """The answers to the batches of one block, whose rows are where they were in the input."""

    def __init__(self, block: Piece) -> None:
        self._block = block
        self._start = 0  # of the rows that wait, in the block
        self._rows = 0
        self._cuts: list[int] = []
        self._layout: dict[str, _Layout] = {}
        self._arrays: dict[str, list[_Array]] = {}
        self._bytes = 0
        self._began_s = 0.0

    def add(self, batch: Piece, given: Given, answer: Any) -> bool:
        """False: it is not like those that wait, or of a kind that is not joined. Then nothing has changed."""
        if type(answer) is not dict or not answer:
            return False
        rows = batch.batch.num_rows
        if not self._cuts:
            layout = _layout(answer, given, rows)
            if layout is None:
                return False
            self._layout, self._start, self._began_s = layout, batch.at, time.perf_counter()
            self._arrays = {name: [] for name, how in layout.items() if not isinstance(how, int)}
        elif batch.at != self._start + self._rows or not self._fits(answer, given, rows):
            return False
        for name, arrays in self._arrays.items():
            arrays.append(answer[name].copy())
            self._bytes += arrays[-1].nbytes
        self._cuts.append(rows)
        self._rows += rows
        return True

    def _fits(self, answer: dict[Any, Any], given: Given, rows: int) -> bool:
        if len(answer) != len(self._layout):
            return False
        for (name, value), (wanted, how) in zip(answer.items(), self._layout.items(), strict=True):
            if name != wanted:
                return False
            if isinstance(how, int):
                if not given.is_at(how, value):
                    return False
            elif _shape(value, rows) != how or given.place_of(value) is not None:
                return False
        return True

    def ends_with(self, batch: Piece) -> bool:
        """Is the answer to this batch the last one that waits?"""
        return bool(self._cuts) and batch.at + batch.batch.num_rows == self._start + self._rows

    @property
    def due(self) -> bool:
        """Has enough waited, or for long enough?"""
        return self._bytes >= MOST_BYTES or time.perf_counter() - self._began_s >= MOST_S

    def take(self) -> Iterator[Piece]:
        """What waits, as one piece at most."""
        if not self._cuts:
            return
        columns = self._block.batch.slice(self._start, self._rows)
        made = {
            name: columns.column(how) if isinstance(how, int) else numpy_to_array(_one(self._arrays[name]))
            for name, how in self._layout.items()
        }
        kept = tuple(name for place, name in enumerate(columns.schema.names) if self._layout.get(name) == place)
        segments = self._block.origin.slice(self._start, self._rows).segments
        cuts = tuple(self._cuts) if len(self._cuts) > 1 else ()
        piece = Piece(make_batch(made, self._rows), Origin(segments, exact=False, kept=kept), cuts=cuts)
        self._rows = self._bytes = 0
        self._cuts, self._arrays = [], {}
        yield piece


def _layout(answer: dict[Any, Any], given: Given, rows: int) -> dict[str, _Layout] | None:
    """How the columns of an answer are joined; None if one of them can't be."""
    found: dict[str, _Layout] = {}
    for name, value in answer.items():
        how = given.place_of(value)
        if how is None:
            how = _shape(value, rows)
        if how is None or not isinstance(name, str):
            return None
        found[name] = how
    return found


def _shape(value: Any, rows: int) -> tuple[Any, tuple[int, ...]] | None:
    """Of a plain, narrow array with a value for each row."""
    if type(value) is not np.ndarray or value.ndim == 0 or len(value) != rows or value.nbytes > NARROW_ROW_BYTES * rows:
        return None
    dtype = value.dtype
    return (dtype, value.shape[1:]) if dtype.kind == "b" or arrow_type(dtype) is not None else None


def _one(arrays: list[_Array]) -> _Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
