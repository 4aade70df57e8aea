"""Batch functions and models as operators of a cursor.

Invariants: map_batches' batches are cut from the first row of the cursor on; predict hands a model its input columns
alone, and carries the others along without touching them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from headrace.core.errors import HeadraceError
from headrace.plan import nodes
from headrace.worker.batching import Batcher, Piece
from headrace.worker.formats import NumpyReader, to_format
from headrace.worker.models import ModelRunner, model_runner
from headrace.worker.operators import TARGET_BYTES, Counts, Host, Operator, select
from headrace.worker.results import batch_of, call, with_columns
from headrace.worker.user_code import TorchModule, explain


class MapBatchesOp(Operator):
    def __init__(self, fn: Callable[..., Any], op: nodes.MapBatches, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._fn = fn
        self._args = op.fn.args
        self._kwargs = op.fn.kwargs
        self._format: nodes.BatchFormat = "torch" if isinstance(fn, TorchModule) else op.batch_format
        self._batcher = Batcher(op.batch_rows) if op.batch_rows is not None else None
        self._reader = NumpyReader()

    def push(self, piece: Piece) -> Iterator[Piece]:
        for batch in _cut(piece, nodes.AUTO_BATCH_ROWS) if self._batcher is None else self._batcher.push(piece):
            yield from self._call(batch)

    def finish(self) -> Iterator[Piece]:
        for batch in () if self._batcher is None else self._batcher.finish():
            yield from self._call(batch)

    def _call(self, piece: Piece) -> Iterator[Piece]:
        origin = piece.origin.inexact()  # the function may drop, add or reorder rows
        made = 0
        for batch in self._results(piece):
            made += batch.num_rows
            yield Piece(batch, origin)
        self.counts.change(piece.batch.num_rows, made)

    def _results(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The batches that the function makes of one; a generator's one by one, as it yields them."""
        batch, given = to_format(piece.batch, self._format, self._reader)
        try:
            result, shared = call(self._fn, (batch, *self._args), self._kwargs)
            many = hasattr(result, "__next__")
            made = None if many else batch_of(result, given, shared)
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            raise self._blame(exc, piece) from None
        while many:
            try:
                item, shared = call(next, (result, result), {})
                if item is result:  # next's default: the generator has ended
                    return
                made = batch_of(item, given, shared)
            except (Exception, KeyboardInterrupt, SystemExit) as exc:
                raise self._blame(exc, piece) from None
            yield made
        if made is not None:
            yield made

    def _blame(self, exc: BaseException, piece: Piece) -> HeadraceError:
        return explain(exc, self.name, piece.origin, columns=piece.batch.schema.names)


def _cut(piece: Piece, rows: int) -> Iterator[Piece]:
    """The piece in slices of at most so many rows."""
    total = piece.batch.num_rows
    if total <= rows:
        yield piece
        return
    for start in range(0, total, rows):
        yield piece.slice(start, min(rows, total - start))


class PredictOp(Operator):
    """A model among other operators. Rows wait until they fill a batch, and leave in the pieces in which they came."""

    def __init__(self, op: nodes.Predict, host: Host, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._op = op
        self._runner: ModelRunner = model_runner(op, index, host)
        self._held: list[Piece] = []
        self._held_rows = 0
        self._per_piece = host.deterministic

    def push(self, piece: Piece) -> Iterator[Piece]:
        self._held.append(piece)
        self._held_rows += piece.batch.num_rows
        if self._per_piece or self._held_rows >= self._runner.wanted_rows:
            yield from self.finish()

    def finish(self) -> Iterator[Piece]:
        held, self._held, self._held_rows = self._held, [], 0
        if not held:
            return
        inputs = [select(p.batch, self._op.inputs or p.batch.schema.names, self.name) for p in held]
        outputs = self._runner.run(inputs, [p.origin for p in held], part_bytes=TARGET_BYTES)
        starts = [0] * len(held)
        for i, made in outputs:
            piece, start = held[i], starts[i]
            starts[i] += made.num_rows
            part = piece if made.num_rows == piece.batch.num_rows else piece.slice(start, made.num_rows)
            yield Piece(with_columns(part.batch, made), part.origin)
