"""Operators: what a cursor pushes pieces through. Here the base and those that are Arrow work alone.

Row functions live in `row_ops`, batch functions and models in `batch_ops`; `make` builds any of them from its plan node.

Invariants: an operator's output is a function of the rows pushed, not of time or of when it was suspended; it holds no
more than it must (a batcher's rest, rows waiting for a model's batch); what it adds to or takes from the number of rows
is in its `counts` at the latest when it has finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from headrace.core.errors import DataError
from headrace.core.expressions import passing
from headrace.core.refs import Origin
from headrace.plan import nodes
from headrace.worker.batching import Piece
from headrace.worker.results import make_batch, with_columns
from headrace.worker.user_code import Functions, explain

TARGET_BYTES = 16 << 20  # of a block that an operator cuts by itself; as BlockLimits.target_bytes


@dataclass(slots=True)
class Host:
    """What a worker lends its operators. models: their runners, by operator, as long as the worker lives."""

    functions: Functions
    deterministic: bool = False
    models: dict[int, Any] = field(default_factory=dict[int, Any])


@dataclass(slots=True)
class Counts:
    """Row counts of one cursor that are not told yet."""

    expanded: int = 0
    filtered: int = 0
    cut: int = 0
    taken: int = 0

    def change(self, rows_in: int, rows_out: int) -> None:
        """An operator was given so many rows and answered so many."""
        if rows_out > rows_in:
            self.expanded += rows_out - rows_in
        else:
            self.filtered += rows_in - rows_out


class Operator:
    """One node of the plan at work in one cursor. exhausted: it will let no further row pass."""

    exhausted = False

    def __init__(self, index: int, name: str, counts: Counts) -> None:
        self.index = index
        self.name = name
        self.counts = counts

    def push(self, piece: Piece) -> Iterator[Piece]:
        raise NotImplementedError

    def finish(self) -> Iterator[Piece]:
        return iter(())


def make(op: nodes.Op, index: int, host: Host, counts: Counts) -> Operator:
    """The operator for a plan node."""
    from headrace.worker import batch_ops, row_ops

    args = (index, op.name, counts)
    match op:  # every member of nodes.Op
        case nodes.Project():
            return ProjectOp(op, *args)
        case nodes.Reshape():
            return ReshapeOp(op, *args)
        case nodes.FilterExpr():
            return FilterExprOp(op, *args)
        case nodes.Limit():
            return LimitOp(op, *args)
        case nodes.Apply():
            return ApplyOp(op, *args)
        case nodes.Evaluate():
            return EvaluateOp(op, *args)
        case nodes.FilterRows():
            return row_ops.FilterRowsOp(host.functions.get(index, op.fn, op.name), op.fn, *args)
        case nodes.MapRows():
            return row_ops.MapRowsOp(host.functions.get(index, op.fn, op.name), op.fn, *args)
        case nodes.FlatMap():
            return row_ops.FlatMapOp(host.functions.get(index, op.fn, op.name), op.fn, *args)
        case nodes.MapBatches():
            return batch_ops.MapBatchesOp(host.functions.get(index, op.fn, op.name), op, *args)
        case nodes.Predict():
            return batch_ops.PredictOp(op, host, *args)


def select(batch: pa.RecordBatch, names: Sequence[str], op: str) -> pa.RecordBatch:
    """The columns `names` of the batch, without touching the others. Raises DataError for one that is not there."""
    schema = batch.schema
    for name in names:
        if schema.get_field_index(name) < 0:
            raise DataError(
                f"{op} needs column {name!r}, which is not there; the columns are {schema.names}",
                where=(("stage", op), ("column", name)),
                hint="check the column names of the step before",
            )
    return batch.select(list(names)) if names else make_batch({}, batch.num_rows)


class ProjectOp(Operator):
    """select, drop, rename."""

    def __init__(self, op: nodes.Project, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._sources = [source for _, source in op.columns]
        self._names = [out for out, _ in op.columns]

    def push(self, piece: Piece) -> Iterator[Piece]:
        batch = select(piece.batch, self._sources, self.name)
        if self._names and self._names != self._sources:
            batch = batch.rename_columns(self._names)
        yield Piece(batch, piece.origin)


class ReshapeOp(Operator):
    """drop or rename whose columns are known only now."""

    def __init__(self, op: nodes.Reshape, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._op = op

    def push(self, piece: Piece) -> Iterator[Piece]:
        project = self._op.resolve(tuple(piece.batch.schema.names))
        yield from ProjectOp(project, self.index, self.name, self.counts).push(piece)


class FilterExprOp(Operator):
    def __init__(self, op: nodes.FilterExpr, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._expression = op.expression

    def push(self, piece: Piece) -> Iterator[Piece]:
        rows = piece.batch.num_rows
        try:
            kept = passing(piece.batch, self._expression)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError) as exc:
            raise DataError(
                f"filter({self._expression}) can't be computed: {exc}",
                where=(("stage", self.name), ("rows", piece.origin.label)),
                hint="check the columns and types that the expression reads",
            ) from exc
        self.counts.filtered += rows - len(kept)
        yield piece if len(kept) == rows else Piece(piece.batch.take(kept), piece.origin.inexact())


class LimitOp(Operator):
    """Lets `left` rows pass. The scheduler sets `left` where several splits share a limit."""

    def __init__(self, op: nodes.Limit, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self.allow(op.rows)

    def allow(self, rows: int) -> None:
        self._left = rows
        self.exhausted = rows <= 0

    def push(self, piece: Piece) -> Iterator[Piece]:
        rows = piece.batch.num_rows
        taken = min(rows, self._left)
        self.allow(self._left - taken)
        self.counts.cut += rows - taken
        self.counts.taken += taken
        if taken:
            yield piece if taken == rows else piece.slice(0, taken)


class ApplyOp(Operator):
    """A transform of Headrace's own, a few rows at a time so that what it makes stays near the target."""

    def __init__(self, op: nodes.Apply, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._transform = op.transform
        row_bytes = op.transform.row_bytes
        self._rows = max(1, TARGET_BYTES // max(1, row_bytes)) if row_bytes else None

    def push(self, piece: Piece) -> Iterator[Piece]:
        rows = piece.batch.num_rows
        step = min(self._rows or rows, rows)
        for start in range(0, rows, step or 1):
            part = piece if step == rows else piece.slice(start, min(step, rows - start))
            given = select(part.batch, self._transform.columns_in, self.name)
            try:
                made = self._transform.apply(given)
            except Exception as exc:
                raise explain(exc, self.name, part.origin, columns=self._transform.columns_in) from None
            yield Piece(with_columns(part.batch, made), part.origin)


class EvaluateOp(Operator):
    """Adds every row to the accumulators' states."""

    def __init__(self, op: nodes.Evaluate, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._accumulators = op.accumulators
        self.states: dict[str, Any] = {key: a.zero() for key, a in op.accumulators.items()}

    def push(self, piece: Piece) -> Iterator[Piece]:
        self.update(piece.batch, piece.origin)
        yield piece

    def update(self, batch: pa.RecordBatch, origin: Origin) -> None:
        for key, accumulator in self._accumulators.items():
            given = select(batch, accumulator.columns, f"evaluate({key})")
            try:
                self.states[key] = accumulator.update(self.states[key], given)
            except Exception as exc:
                raise explain(exc, f"evaluate({key})", origin, columns=accumulator.columns) from None
