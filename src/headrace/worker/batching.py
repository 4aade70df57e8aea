"""Pieces of rows, and batches of n rows cut from them.

Invariant: what `Batcher` cuts depends on the rows alone, never on how they were cut into blocks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
from msgspec import Struct

from headrace.core.origins import chosen, join_origins
from headrace.core.refs import Origin
from headrace.core.tensors import numpy_to_array
from headrace.worker.casting import concat


class Piece(Struct):
    """Rows on their way through a cursor. whole: rows that these are a slice of, from row `at` on: neighbours that are slices
    of the same are joined without a copy.
    cuts: rows of each of the pieces that were joined to this one on its way out of a cursor; () for one. No operator sees such.
    """

    batch: pa.RecordBatch
    origin: Origin
    whole: pa.RecordBatch | None = None
    at: int = 0
    cuts: tuple[int, ...] = ()

    def slice(self, start: int, rows: int) -> Piece:
        return Piece(self.batch.slice(start, rows), self.origin.slice(start, rows), self.whole, self.at + start)

    def origins(self) -> Iterator[tuple[Origin, int]]:
        """(origin, rows) of each of the pieces that were joined to this one. Those lay one behind the other in the input."""
        if not self.cuts:
            yield self.origin, self.batch.num_rows
            return
        whole, at = Origin(self.origin.segments), 0
        for rows in self.cuts:
            yield Origin(whole.slice(at, rows).segments, exact=False, kept=self.origin.kept), rows
            at += rows

    def take(self, rows: np.ndarray) -> Piece:
        """These rows, copied. rows: ascending, at least one."""
        return Piece(self.batch.take(numpy_to_array(rows)), chosen(self.origin, rows))

    def without(self, lost: Collection[int]) -> Piece | None:
        """All but these rows; None when none is left."""
        if not lost:
            return self
        kept = np.delete(np.arange(self.batch.num_rows), list(lost))
        return self.take(kept) if len(kept) else None


def join(pieces: Sequence[Piece]) -> Piece:
    """One piece of all rows; copies unless there is only one, or they are neighbours in one whole."""
    if len(pieces) == 1:
        return pieces[0]
    origin = join_origins([p.origin for p in pieces])
    whole, at = pieces[0].whole, pieces[0].at
    if whole is not None and _neighbours(pieces):
        return Piece(whole.slice(at, sum(p.batch.num_rows for p in pieces)), origin, whole, at)
    return Piece(concat([p.batch for p in pieces], origin.label), origin)


def _neighbours(pieces: Sequence[Piece]) -> bool:
    return all(b.whole is a.whole and b.at == a.at + a.batch.num_rows for a, b in itertools.pairwise(pieces))


class Batcher:
    """Cuts batches of exactly `rows` rows from the pieces pushed; the rest comes with `finish`."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: deque[Piece] = deque()
        self._held_rows = 0
        self._start = 0  # rows of the first piece that are given already

    def push(self, piece: Piece) -> Iterator[Piece]:
        self._held.append(piece)
        self._held_rows += piece.batch.num_rows
        while self._held_rows >= self.rows:
            yield self._cut(self.rows)

    def finish(self) -> Iterator[Piece]:
        if self._held_rows:
            yield self._cut(self._held_rows)

    def _cut(self, rows: int) -> Piece:
        self._held_rows -= rows
        taken: list[Piece] = []
        while rows:
            piece = self._held[0]
            start, left = self._start, piece.batch.num_rows - self._start
            n = min(rows, left)
            taken.append(piece if n == piece.batch.num_rows else piece.slice(start, n))
            if n == left:
                self._held.popleft()
                self._start = 0
            else:
                self._start += n
            rows -= n
        return join(taken)
