"""Batches: cutting blocks into batches of n rows, and finding out how many rows suit a model.

Invariant: what `Batcher` cuts depends on the rows alone, never on how they were cut into blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrace.core.origins import chosen, join_origins
from headrace.core.refs import Origin
from headrace.core.tensors import numpy_to_array
from headrace.worker.casting import concat

FIRST_ROWS = 32  # small enough to answer at once, large enough to say something about speed
MAX_ROWS = 4096  # beyond this no model tried gains, and latency and memory only grow
MAX_INPUT_BYTES = 256 << 20
FIXED_ROWS = 256  # deterministic runs: the size must not depend on timing
GAIN = 1.05  # less is noise
SAMPLES = 2  # the first batch of a size pays for warm-up (kernels chosen, memory grown)


@dataclass(slots=True)
class Piece:
    """Rows on their way through a cursor."""

    batch: pa.RecordBatch
    origin: Origin

    def slice(self, start: int, rows: int) -> Piece:
        return Piece(self.batch.slice(start, rows), self.origin.slice(start, rows))

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
    """One piece of all rows; copies unless there is only one."""
    if len(pieces) == 1:
        return pieces[0]
    origin = join_origins([p.origin for p in pieces])
    return Piece(concat([p.batch for p in pieces], origin.label), origin)


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


class BatchTuner:
    """How many rows a model gets at a time: doubles while that makes it faster, and remembers the best.

    Only whole batches count. `fixed` sizes only ever shrink, when memory runs out.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.rows = fixed or FIRST_ROWS
        self._settled = fixed is not None
        self._most = fixed or MAX_ROWS
        self._best = (0.0, self.rows)  # rows per second, at this many rows
        self._samples: list[float] = []

    def fit(self, row_bytes: float) -> int:
        """Rows for the next batch, given the size of a row of input."""
        if self._settled:
            return self.rows
        return max(1, min(self.rows, int(MAX_INPUT_BYTES / max(row_bytes, 1.0))))

    def record(self, rows: int, seconds: float) -> None:
        """A batch of `rows` rows took this long."""
        if self._settled or rows != self.rows:
            return
        self._samples.append(rows / max(seconds, 1e-9))
        if len(self._samples) < SAMPLES:
            return
        rate = max(self._samples)
        self._samples.clear()
        best, best_rows = self._best
        if rate > best * GAIN and rows * 2 <= self._most:
            self._best = (rate, rows)
            self.rows = rows * 2
        else:
            self.rows = rows if rate > best * GAIN else best_rows
            self._settled = True

    def shrink(self, rows: int) -> bool:
        """Memory ran out with this many rows. False when there is nothing left to halve."""
        if rows <= 1:
            return False
        self.rows = self._most = max(1, rows // 2)
        self._settled = True
        return True


def is_out_of_memory(exc: BaseException) -> bool:
    """By name, so that torch need not be imported; a device's error is a RuntimeError of its own type."""
    return isinstance(exc, MemoryError) or type(exc).__name__ in ("OutOfMemoryError", "XlaRuntimeOutOfMemory")
