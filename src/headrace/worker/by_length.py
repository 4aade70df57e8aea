"""Rows of like lengths into one batch: models pad what they are given together, and each row then costs what the longest does.

Pure. Invariant: a window's rows each go into one batch, and come back in the order in which they came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from headrace.core.tensors import numpy_to_array, vector_to_numpy
from headrace.worker.bad_rows import Lost
from headrace.worker.batching import Piece

WINDOW_BATCHES = 8  # in a window: MiniLM's texts in batches of 8 take 33% less time then; with 128 batches 35%
WINDOW_S = 2.0  # that a window takes at most, as it seems: its answers come at its end, and in the end all wait for the last
ANSWER_BYTES = 32 << 20  # that a window holds at most, as it seems: in order they are copied, and nobody else counts them
SLOW_ROW_S = 50e-6  # that a row takes, before rows are sorted at all: sorting takes 1 µs


def window_rows(wanted: int, row_s: float, answer_row_bytes: float) -> int:
    """Rows worth gathering for batches of `wanted` rows: at least those of one batch. row_s: seconds that a row takes."""
    in_time = int(WINDOW_S / max(row_s, 1e-9))
    return max(wanted, min(WINDOW_BATCHES * wanted, in_time, int(ANSWER_BYTES / max(answer_row_bytes, 1e-9))))


def have_lengths(schema: pa.Schema) -> bool:
    return any(_measure(t) is not None for t in schema.types)


class Window:
    """Consecutive rows on their way through a model in batches of like lengths, the longest first."""

    def __init__(self, piece: Piece) -> None:
        self.rows = piece.batch.num_rows
        self._piece = piece
        self._order = np.argsort(-_lengths(piece.batch), kind="stable")
        self._begun = 0
        self._batches: list[np.ndarray] = []  # places of the rows of each batch, ascending
        self._made: list[tuple[pa.RecordBatch | None, Sequence[Lost]]] = []  # of the first batches

    @property
    def left(self) -> int:
        """Rows that are in no batch yet."""
        return self.rows - self._begun

    def next(self, rows: int) -> Piece:
        """So many of the rows left, as a batch."""
        at = np.sort(self._order[self._begun : self._begun + rows])
        self._begun += len(at)
        self._batches.append(at)
        return self._piece if len(at) == self.rows else self._piece.take(at)

    def add(self, made: pa.RecordBatch | None, lost: Sequence[Lost]) -> bool:
        """The answer to the next batch, in the order of the batches. Returns whether that was the last."""
        self._made.append((made, lost))
        return not self.left and len(self._made) == len(self._batches)

    def answer(self, join: Callable[[Sequence[pa.RecordBatch]], pa.RecordBatch]) -> tuple[pa.RecordBatch | None, list[Lost]]:
        """(the answers to the rows that did not fail, those that failed): by their place in the window. Called once."""
        if len(self._batches) == 1:
            made, lost = self._made[0]
            return made, list(lost)
        kept: list[np.ndarray] = []
        failed: list[Lost] = []
        for at, (_, lost) in zip(self._batches, self._made, strict=True):
            kept.append(np.delete(at, [i for i, _ in lost]))
            failed += [(int(at[i]), failure) for i, failure in lost]
        failed.sort(key=lambda one: one[0])
        answers = [made for made, _ in self._made if made is not None]
        if not answers:
            return None, failed
        joined = join(answers)
        answers.clear()
        self._made.clear()  # there are two copies at a time, not three
        return joined.take(numpy_to_array(np.argsort(np.concatenate(kept), kind="stable"))), failed


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    """Of each row: the bytes of its texts, the items of its lists."""
    import pyarrow.compute as pc  # 20 ms

    total = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        measure = _measure(column.type)
        if measure is not None:
            total += vector_to_numpy(pc.call_function(measure, [column]).fill_null(0))
    return total


def _measure(type: pa.DataType) -> str | None:
    """Arrow's function for it; None for types of which each row is as long."""
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return "binary_length"
    return "list_value_length" if pa.types.is_list(type) or pa.types.is_large_list(type) else None
