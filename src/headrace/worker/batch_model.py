"""Running a row-wise model that is a function of a batch, over the rows at hand.

Batches may span the inputs; the answers are scattered back, so that input i gets exactly its own rows. Out of memory
halves the batch and tries again: rows are independent, so their answers do not change. Where bad rows are set aside (a tolerant
watch), so does any other failure, down to the rows that fail alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa

from headrace.contracts.model import ModelAdapter
from headrace.core.refs import Origin
from headrace.plan.nodes import BatchFormat, Predict
from headrace.worker.bad_rows import Lost, RowError, blames_rows, failure_of
from headrace.worker.batching import Piece, join
from headrace.worker.formats import NumpyReader, to_format
from headrace.worker.model_answers import Answer, ModelRunner, blame, join_columns, name_outputs
from headrace.worker.operators import Host
from headrace.worker.results import call
from headrace.worker.tuning import FIXED_ROWS, BatchTuner, is_out_of_memory
from headrace.worker.user_code import TorchModule
from headrace.worker.watch import NOBODY, Watch


class BatchRunner(ModelRunner):
    """A model that is a function of a batch."""

    def __init__(self, model: Any, op: Predict, index: int, host: Host) -> None:
        self._model = model
        self._op = op
        self._index = index
        self._format: BatchFormat = op.batch_format
        if isinstance(model, TorchModule):
            self._format = "torch"
        elif isinstance(op.model.target, ModelAdapter):
            self._format = cast(BatchFormat, op.model.target.batch_format)
        self._reader = NumpyReader()
        self._deterministic = host.deterministic
        self._tuner = BatchTuner(op.batch_rows or (FIXED_ROWS if host.deterministic else None))

    @property
    def wanted_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._tuner.rows

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
    ) -> Iterator[Answer]:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        groups = [[i] for i in range(len(pieces))] if self._deterministic else [list(range(len(pieces)))]
        for group in groups:
            yield from self._run_group(pieces, group, part_bytes, watch)

    def _run_group(
        self, pieces: Sequence[Piece], group: Sequence[int], part_bytes: int | None, watch: Watch
    ) -> Iterator[Answer]:
        """One batch after the other over the rows of these pieces, put together again by piece."""
        parts = _Parts(pieces, part_bytes, self._op.name)
        queue = [(i, 0) for i in group if pieces[i].batch.num_rows]
        queue.reverse()  # the next rows are at the end
        total = sum(pieces[i].batch.num_rows for i in group)
        row_bytes = sum(pieces[i].batch.nbytes for i in group) / max(1, total)
        while queue:
            span: list[tuple[int, Piece]] = []
            rows = self._tuner.fit(row_bytes)
            while queue and rows:
                i, start = queue.pop()
                piece = pieces[i]
                n = min(rows, piece.batch.num_rows - start)
                whole = n == piece.batch.num_rows
                span.append((i, piece if whole else piece.slice(start, n)))
                rows -= n
                if start + n < piece.batch.num_rows:
                    queue.append((i, start + n))
            done = self._predict(join([p for _, p in span]), watch)
            if len(span) == 1:
                yield from parts.add(span[0][0], done)
                continue
            start = 0
            for i, part in span:
                yield from parts.add(i, done.slice(start, part.batch.num_rows))
                start += part.batch.num_rows

    def _predict(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch; row by row if a worker has died on it before."""
        if not watch.doubts(self._index, piece.origin):
            watch.enter(self._index, self._op.name, piece.origin)
            return self._halves(piece, watch)
        outcomes: list[_Outcome] = []
        for at in range(piece.batch.num_rows):
            row = piece.slice(at, 1)
            failure = watch.condemned(self._index, self._op.name, row)
            outcomes.append(self._halves(row, watch) if failure is None else _Outcome(1, None, [(0, failure)]))
        return _joined(outcomes, self._op.name, piece.origin)

    def _halves(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch. Out of memory, or with rows that fail: in halves."""
        rows = piece.batch.num_rows
        batch, given = to_format(piece.batch, self._format, self._reader)
        argument = batch
        if self._op.single:
            name = self._op.inputs[0]
            argument = batch[name] if self._format != "pyarrow" else piece.batch.column(name)
        began = time.perf_counter()
        try:
            result, shared = call(self._model, (argument, *self._op.model.args), self._op.model.kwargs)
            made = name_outputs(self._op, result, rows, given, shared)
        except RowError as exc:
            memory = is_out_of_memory(exc)
            if not self._may_halve(exc, memory, rows, watch):
                raise blame(exc, self._op, piece) from None
            if rows == 1:
                return _Outcome(1, None, [(0, failure_of(exc, self._op.name))])
        else:
            self._tuner.record(rows, time.perf_counter() - began)
            return _Outcome(rows, made)
        if memory:
            _free_device_memory()
        half = rows // 2
        outcomes = [self._halves(piece.slice(0, half), watch), self._halves(piece.slice(half, rows - half), watch)]
        return _joined(outcomes, self._op.name, piece.origin)

    def _may_halve(self, exc: BaseException, memory: bool, rows: int, watch: Watch) -> bool:
        """Or set the row aside, if it is one."""
        if memory and rows > 1:
            return not self._deterministic and self._tuner.shrink(rows)
        return watch.tolerant and blames_rows(exc)


@dataclass(slots=True)
class _Outcome:
    """What became of consecutive rows. made: the answers to all but the lost ones; None when there are none."""

    rows: int
    made: pa.RecordBatch | None
    lost: list[Lost] = field(default_factory=list[Lost])

    def slice(self, start: int, rows: int) -> _Outcome:
        if not self.lost or self.made is None:
            lost = [(at - start, f) for at, f in self.lost if start <= at < start + rows]
            return _Outcome(rows, None if self.made is None else self.made.slice(start, rows), lost)
        before = sum(at < start for at, _ in self.lost)
        lost = [(at - start, f) for at, f in self.lost if start <= at < start + rows]
        left = rows - len(lost)
        return _Outcome(rows, self.made.slice(start - before, left) if left else None, lost)


def _joined(outcomes: Sequence[_Outcome], op: str, origin: Origin) -> _Outcome:
    """Consecutive outcomes as one."""
    if len(outcomes) == 1:
        return outcomes[0]
    made = [o.made for o in outcomes if o.made is not None]
    lost: list[Lost] = []
    rows = 0
    for outcome in outcomes:
        lost += [(rows + at, failure) for at, failure in outcome.lost]
        rows += outcome.rows
    return _Outcome(rows, join_columns(made, op, origin) if made else None, lost)


class _Parts:
    """Puts the answers to slices of an input together."""

    def __init__(self, pieces: Sequence[Piece], part_bytes: int | None, op: str) -> None:
        self._pieces = pieces
        self._part_bytes = part_bytes
        self._op = op
        self._held: dict[int, list[_Outcome]] = {}
        self._bytes = 0
        self._done: dict[int, int] = {}

    def add(self, i: int, outcome: _Outcome) -> Iterator[Answer]:
        held = self._held.setdefault(i, [])
        held.append(outcome)
        done = self._done[i] = self._done.get(i, 0) + outcome.rows
        self._bytes += 0 if outcome.made is None else outcome.made.nbytes
        complete = done == self._pieces[i].batch.num_rows
        if complete or (self._part_bytes is not None and self._bytes >= self._part_bytes):
            del self._held[i]
            self._bytes = 0
            whole = _joined(held, self._op, self._pieces[i].origin)
            yield Answer(i, whole.rows, whole.made, whole.lost)


def _free_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available():
        torch.cuda.empty_cache()
