"""Batch functions and models as operators of a cursor.

Invariants: map_batches' batches are cut from the first row of the cursor on (a cursor of one block is given whole batches);
predict hands a model its input columns alone, and carries the others along without touching them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from headrace.core.errors import HeadraceError
from headrace.core.guards import guard_name
from headrace.core.refs import Origin
from headrace.plan import nodes
from headrace.worker.bad_rows import Lost, RowError
from headrace.worker.batching import Batcher, Piece
from headrace.worker.declared import Declared
from headrace.worker.formats import Given, NumpyReader, to_format
from headrace.worker.guard import OutputGuard
from headrace.worker.joining import Joining
from headrace.worker.model_answers import ModelRunner
from headrace.worker.models import model_runner
from headrace.worker.operators import TARGET_BYTES, BatchOperator, Counts, Host, Operator, rejoined, select
from headrace.worker.results import batch_of, with_columns
from headrace.worker.torch_inputs import TorchReader
from headrace.worker.user_code import TorchModule, explain

HELD_BYTES = 64 << 20  # of rows that wait for a model whose batch size is "auto": columns that are carried count too


class MapBatchesOp(BatchOperator):
    """map_batches. What a generator yields leaves as it comes, except where bad rows are set aside or a batch is under
    suspicion: there the results of a call are held until it has ended, because a later failure takes them back.
    """

    def __init__(self, fn: Callable[..., Any], op: nodes.MapBatches, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._fn = fn
        self._args = op.fn.args
        self._kwargs = op.fn.kwargs
        self._format: nodes.BatchFormat = "torch" if isinstance(fn, TorchModule) else op.batch_format
        self._batcher = Batcher(op.batch_rows) if op.batch_rows is not None else None
        self._reader = NumpyReader()
        self._tensors = TorchReader(self._reader, uploads=getattr(fn, "uploads", False))
        self._declared = Declared(op.types)
        self._casts = bool(op.types)

    def push(self, piece: Piece) -> Iterator[Piece]:
        if self._batcher is not None:
            for batch in self._batcher.push(piece):
                yield from self._call(batch)
            return
        joining: Joining | None = None
        if piece.batch.num_rows > nodes.AUTO_BATCH_ROWS and self._format == "numpy":
            piece = Piece(piece.batch, piece.origin, piece.batch)
            self._reader.ahead(piece.whole)
            if self.joins and piece.origin.exact and self.bad is None and not self._casts:
                joining = Joining(piece)
        for batch in _cut(piece, nodes.AUTO_BATCH_ROWS):
            yield from self._call(batch, joining)
        self._reader.ahead(None)
        if joining is not None:
            yield from joining.take()

    def finish(self) -> Iterator[Piece]:
        for batch in () if self._batcher is None else self._batcher.finish():
            yield from self._call(batch)

    def _call(self, piece: Piece, joining: Joining | None = None) -> Iterator[Piece]:
        """joining: takes the answer, if it can, and gives it out later."""
        suspected = self.watch.doubts(self.index, piece.origin)
        if self.bad is not None or suspected:
            if joining is not None:
                yield from joining.take()
            yield from self._call_held(piece, suspected)
            return
        self.watch.enter(self.index, self.name, piece.origin)
        for batch, kept in self._results(piece, joining):
            if joining is not None:
                yield from joining.take()
            yield Piece(batch, self._origin(piece, kept))
        if joining is not None and (joining.due or not joining.ends_with(piece)):
            yield from joining.take()

    def _call_held(self, piece: Piece, suspected: bool) -> Iterator[Piece]:
        lost: list[Lost] = []
        made: list[Piece] = []
        for _, part, batches in self._attempt(piece, lost):
            self.counts.change(part.batch.num_rows, sum(b.num_rows for b in batches))
            made += [Piece(b, part.origin.inexact()) for b in batches]
        self.lose(piece, lost)
        yield from rejoined(made) if suspected else made

    def _origin(self, piece: Piece, kept: tuple[str, ...]) -> Origin:
        """The function may have dropped, added or reordered rows, but for columns that it gave back."""
        if kept and piece.origin.exact:
            return Origin(piece.origin.segments, exact=False, kept=kept)
        return piece.origin.inexact()

    def _results(self, piece: Piece, joining: Joining | None) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
        """The batches that the function makes of one, a generator's one by one, as it yields them; and which columns it gave
        back as they were. Nothing when `joining` has taken the answer, either.
        """
        batch, given = self._prepare(piece)
        kept: tuple[str, ...] = ()
        try:
            result, shared = self._tensors.call(self._fn, (batch, *self._args), self._kwargs, given)
            if joining is not None and joining.add(piece, given, result):
                return
            many = hasattr(result, "__next__")
            made = None if many else batch_of(result, given, shared, self._declared)
            if not (many or self._casts):
                kept = given.unchanged(result)
        except RowError as exc:
            raise self._blame(exc, piece) from None
        rows = 0
        while many:
            try:
                item, shared = self._tensors.call(next, (result, result), {}, given)
                if item is result:  # next's default: the generator has ended
                    break
                made = batch_of(item, given, shared, self._declared)
            except RowError as exc:
                raise self._blame(exc, piece) from None
            rows += made.num_rows
            yield made, ()
        if not many and made is not None:
            rows = made.num_rows
            yield made, kept
        self.counts.change(piece.batch.num_rows, rows)

    def _prepare(self, piece: Piece) -> tuple[Any, Given]:
        if self._format == "numpy":
            return self._reader.read(piece.batch, piece.whole, piece.at)
        if self._format == "torch":
            return self._tensors.read(piece.batch)
        return to_format(piece.batch, self._format, self._reader)

    def _work(self, piece: Piece, given: tuple[Any, Given]) -> list[pa.RecordBatch]:
        """All batches that the function makes of one."""
        batch, source = given
        result, shared = self._tensors.call(self._fn, (batch, *self._args), self._kwargs, source)
        if not hasattr(result, "__next__"):
            return [batch_of(result, source, shared, self._declared)]
        made: list[pa.RecordBatch] = []
        while True:
            item, shared = self._tensors.call(next, (result, result), {}, source)
            if item is result:
                return made
            made.append(batch_of(item, source, shared, self._declared))

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
        self._held_rows = self._held_bytes = 0
        self._per_piece = host.deterministic
        self._guard = OutputGuard()
        self._wrong = self._guard.zero()

    def told(self) -> dict[str, Any]:
        return {guard_name(self.index): self._wrong} if self._wrong else {}

    def push(self, piece: Piece) -> Iterator[Piece]:
        self._held.append(piece)
        self._held_rows += piece.batch.num_rows
        self._held_bytes += piece.batch.nbytes
        large = self._op.batch_rows is None and self._held_bytes >= HELD_BYTES
        if self._per_piece or large or self._held_rows >= self._runner.wanted_rows:
            yield from self.finish()

    def finish(self) -> Iterator[Piece]:
        held, self._held = self._held, []
        self._held_rows = self._held_bytes = 0
        if not held:
            return
        inputs = [select(p.batch, self._op.inputs or p.batch.schema.names, self.name) for p in held]
        outputs = self._runner.run(inputs, [p.origin for p in held], part_bytes=TARGET_BYTES, watch=self.watch)
        starts = [0] * len(held)
        for answer in outputs:
            piece, start = held[answer.input], starts[answer.input]
            starts[answer.input] += answer.rows
            part = piece if answer.rows == piece.batch.num_rows else piece.slice(start, answer.rows)
            self._guard.fail(self._wrong, answer.failed, answer.why)
            self.lose(part, answer.lost)
            left = part.without([at for at, _ in answer.lost])
            if left is not None and answer.made is not None:
                self._guard.update(self._wrong, answer.made)
                yield Piece(with_columns(left.batch, answer.made), left.origin)
