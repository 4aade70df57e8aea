"""Operators: what a cursor pushes pieces through. Here the base and those that are Arrow work alone.

Row functions live in `row_ops`, batch functions and models in `batch_ops`; `make` builds any of them from its plan node.

Invariants: an operator's output is a function of the rows pushed, not of time or of when it was suspended; it holds no
more than it must (a batcher's rest, rows waiting for a model's batch); what it adds to or takes from the number of rows
is in its `counts` at the latest when it has finished; where bad rows are set aside, a batch that fails is cut in halves down to
the rows that fail alone, and the others go on in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct, field

from headrace.core.errors import DataError, HeadraceError
from headrace.core.expressions import passing
from headrace.core.tensors import vector_to_numpy
from headrace.plan import nodes
from headrace.worker.bad_rows import BadRows, Lost, RowError, blames_rows, failure_of
from headrace.worker.batching import Batcher, Piece, join
from headrace.worker.formats import SharedArrays
from headrace.worker.refused import Refused
from headrace.worker.results import make_batch, with_columns
from headrace.worker.user_code import Functions, explain
from headrace.worker.watch import NOBODY, Watch

TARGET_BYTES = 16 << 20  # of a block that an operator cuts by itself; as BlockLimits.target_bytes
CUT = -3  # operator number in OpTime
_COMPUTING = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError)


class Host(Struct):
    """What a worker lends its operators. models: their runners, by operator, as long as the worker lives. shared: what models
    that were given together have converted, as long as a step. gaps: columns that are null where one of such models failed.
    """

    functions: Functions
    deterministic: bool = False
    models: dict[int, Any] = field(default_factory=dict[int, Any])
    shared: SharedArrays = field(default_factory=SharedArrays)
    gaps: frozenset[str] = frozenset()


class Counts(Struct):
    """Row counts of one cursor that are not told yet."""

    expanded: int = 0
    filtered: int = 0
    cut: int = 0
    taken: int = 0

    def change(self, rows_in: int, rows_out: int) -> None:
        """An operator was given so many rows, none of them bad, and answered so many."""
        if rows_out > rows_in:
            self.expanded += rows_out - rows_in
        else:
            self.filtered += rows_in - rows_out


class Operator:
    """One node of the plan at work in one cursor. exhausted: it will let no further row pass.

    bad: where rows go that fail; None: they end the run. watch: told before user code runs. joins: what it makes leaves the
    cursor, and may do so joined (Piece.cuts) as time allows.
    """

    exhausted = False
    joins = False
    bad: BadRows | None = None
    watch: Watch = NOBODY

    def __init__(self, index: int, name: str, counts: Counts) -> None:
        self.index = index
        self.name = name
        self.counts = counts

    def push(self, piece: Piece) -> Iterator[Piece]:
        raise NotImplementedError

    def finish(self) -> Iterator[Piece]:
        return iter(())

    def told(self) -> dict[str, Any]:
        """States of accumulators, when it has finished."""
        return {}

    def lose(self, piece: Piece, lost: list[Lost]) -> None:
        """These rows of the piece failed."""
        if lost:
            assert self.bad is not None
            self.bad.add(self.index, self.name, piece, lost)


class BatchOperator(Operator):
    """An operator that works on a batch at a time. A subclass gives `_work` and `_blame`."""

    def _prepare(self, piece: Piece) -> Any:
        """What `_work` is given besides the piece. Whatever it raises ends the run."""
        return None

    def _reads(self, piece: Piece) -> Piece:
        """The piece with only the columns that the operator reads."""
        return piece

    def _work(self, piece: Piece, given: Any) -> Any:
        """What the operator makes of a batch; may raise anything."""
        raise NotImplementedError

    def _blame(self, exc: BaseException, piece: Piece) -> HeadraceError:
        raise NotImplementedError

    def _attempt(self, piece: Piece, lost: list[Lost]) -> Iterator[tuple[int, Piece, Any]]:
        """(first row, rows, what was made of them), in order: all at once, or what is left when those that fail are taken out.

        lost: those that fail, by their position in the piece. A row that has ended a worker before is run alone.
        """
        if not self.watch.doubts(self.index, piece.origin):
            self.watch.enter(self.index, self.name, piece.origin)
            yield from self._halves(piece, 0, lost)
            return
        for at in range(piece.batch.num_rows):
            row = piece.slice(at, 1)
            failure = self.watch.condemned(self.index, self.name, self._reads(row))
            if failure is None:
                yield from self._halves(row, at, lost)
            else:
                lost.append((at, failure))

    def _halves(self, piece: Piece, at: int, lost: list[Lost]) -> Iterator[tuple[int, Piece, Any]]:
        rows = piece.batch.num_rows
        given = self._prepare(piece)
        try:
            made = self._work(piece, given)
        except RowError as exc:
            if self.bad is None or not blames_rows(exc):
                raise self._blame(exc, piece) from None
            if rows == 1:
                lost.append((at, failure_of(exc, self.name)))
                return
        else:
            yield at, piece, made
            return
        half = rows // 2
        yield from self._halves(piece.slice(0, half), at, lost)
        yield from self._halves(piece.slice(half, rows - half), at + half, lost)


def rejoined(pieces: list[Piece]) -> list[Piece]:
    """One piece, if their types allow it: rows that were run apart travel together like their neighbours."""
    if len(pieces) < 2:
        return pieces
    try:
        return [join(pieces)]
    except DataError:
        return pieces


def make(op: nodes.Op, index: int, host: Host, counts: Counts, bad: BadRows | None = None, watch: Watch = NOBODY) -> Operator:
    """The operator for a plan node."""
    made = _make(op, index, host, counts)
    made.bad = bad
    made.watch = watch
    return made


def _make(op: nodes.Op, index: int, host: Host, counts: Counts) -> Operator:
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
            return EvaluateOp(op, *args, host.gaps)
        case nodes.FilterRows():
            return row_ops.FilterRowsOp(host.functions.get(index, op.fn, op.name), op.fn, *args)
        case nodes.MapRows():
            return row_ops.MapRowsOp(host.functions.get(index, op.fn, op.name), op.fn, *args, op.types)
        case nodes.FlatMap():
            return row_ops.FlatMapOp(host.functions.get(index, op.fn, op.name), op.fn, *args, op.types)
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
        self._columns = op.columns
        self._left = op.left

    def push(self, piece: Piece) -> Iterator[Piece]:
        columns = self._columns
        if self._left:
            there = frozenset(piece.batch.schema.names)
            columns = tuple(c for c in columns if c[1] in there or c[1] not in self._left)
        names, sources = [out for out, _ in columns], [source for _, source in columns]
        batch = select(piece.batch, sources, self.name)
        if names and names != sources:
            batch = batch.rename_columns(names)
        yield Piece(batch, piece.origin)


class ReshapeOp(Operator):
    """drop or rename whose columns are known only now."""

    def __init__(self, op: nodes.Reshape, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._op = op

    def push(self, piece: Piece) -> Iterator[Piece]:
        project = self._op.resolve(tuple(piece.batch.schema.names))
        yield from ProjectOp(project, self.index, self.name, self.counts).push(piece)


class FilterExprOp(BatchOperator):
    def __init__(self, op: nodes.FilterExpr, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._expression = op.expression

    def push(self, piece: Piece) -> Iterator[Piece]:
        rows = piece.batch.num_rows
        lost: list[Lost] = []
        try:
            passed = self._work(piece, None)
        except _COMPUTING as exc:
            if self.bad is None or self._fails_without_rows(piece):
                raise self._blame(exc, piece) from exc
            parts = [passed + at for at, _, passed in self._halves(piece, 0, lost)]  # no user code: nothing to watch
            passed = np.concatenate(parts) if parts else np.empty(0, np.int64)
            self.lose(piece, lost)
        self.counts.filtered += rows - len(lost) - len(passed)
        if len(passed) == rows:
            yield piece
        elif len(passed):
            yield piece.take(passed)

    def _fails_without_rows(self, piece: Piece) -> bool:
        try:
            self._work(piece.slice(0, 0), None)
        except _COMPUTING:
            return True
        return False

    def _work(self, piece: Piece, given: Any) -> np.ndarray:
        return vector_to_numpy(passing(piece.batch, self._expression))

    def _blame(self, exc: BaseException, piece: Piece) -> HeadraceError:
        return DataError(
            f"filter({self._expression}) can't be computed: {exc}",
            where=(("stage", self.name), ("rows", piece.origin.label)),
            hint="check the columns and types that the expression reads",
        )


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


class CutOp(Operator):
    """Cuts the batches of the map_batches that the next stage begins with. name: that one's, for messages."""

    def __init__(self, rows: int, name: str, counts: Counts) -> None:
        super().__init__(CUT, name, counts)
        self._batcher = Batcher(rows)

    def push(self, piece: Piece) -> Iterator[Piece]:
        return self._batcher.push(piece)

    def finish(self) -> Iterator[Piece]:
        return self._batcher.finish()


class ApplyOp(BatchOperator):
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
            lost: list[Lost] = []
            made = [Piece(with_columns(p.batch, m), p.origin) for _, p, m in self._attempt(part, lost)]
            self.lose(part, lost)
            yield from rejoined(made)

    def _reads(self, piece: Piece) -> Piece:
        return Piece(select(piece.batch, self._transform.columns_in, self.name), piece.origin)

    def _prepare(self, piece: Piece) -> pa.RecordBatch:
        return self._reads(piece).batch

    def _work(self, piece: Piece, given: pa.RecordBatch) -> pa.RecordBatch:
        made = self._transform.apply(given)
        if made.num_rows != piece.batch.num_rows:
            raise Refused(f"was given {piece.batch.num_rows} rows and returned {made.num_rows} rows")
        return made

    def _blame(self, exc: BaseException, piece: Piece) -> HeadraceError:
        return explain(exc, self.name, piece.origin, columns=self._transform.columns_in)


class EvaluateOp(BatchOperator):
    """Adds every row to the accumulators' states. Where bad rows are set aside, a batch counts in all of them or in none.

    gaps: columns that are null where one of several models failed on a row. Such rows are left out of what reads them (the
    guard of the model counts them), so that they stay in what others say.
    """

    def __init__(self, op: nodes.Evaluate, index: int, name: str, counts: Counts, gaps: frozenset[str] = frozenset()) -> None:
        super().__init__(index, name, counts)
        self._gaps = gaps
        self._accumulators = op.accumulators
        self._key = ""  # the accumulator at work, for messages
        self.states: dict[str, Any] = {key: self._zero(key) for key in op.accumulators}

    def told(self) -> dict[str, Any]:
        return self.states

    def push(self, piece: Piece) -> Iterator[Piece]:
        lost = self.update(piece)
        self.lose(piece, lost)
        left = piece.without([at for at, _ in lost])
        if left is not None:
            yield left

    def update(self, piece: Piece) -> list[Lost]:
        """Add the rows; those that failed, which are in no state. Raises HeadraceError when states can't be merged."""
        lost: list[Lost] = []
        for _, part, fresh in self._attempt(piece, lost):
            if self.bad is not None:
                self._merge(fresh, part)
        return lost

    def _reads(self, piece: Piece) -> Piece:
        names = list(dict.fromkeys(n for a in self._accumulators.values() for n in a.columns))
        return Piece(select(piece.batch, names, self.name), piece.origin)

    def _prepare(self, piece: Piece) -> dict[str, pa.RecordBatch]:
        return {key: select(piece.batch, a.columns, f"evaluate({key})") for key, a in self._accumulators.items()}

    def _work(self, piece: Piece, given: dict[str, pa.RecordBatch]) -> dict[str, Any]:
        """The states of these rows alone; where a failure ends the run, those of all rows."""
        states = self.states if self.bad is None else {}
        for key, accumulator in self._accumulators.items():
            self._key = key
            if self.bad is None:
                states[key] = accumulator.update(states[key], given[key])
                continue
            states[key] = accumulator.zero()
            batch = _without_gaps(given[key], self._gaps)
            if batch.num_rows:
                states[key] = accumulator.update(states[key], batch)
        return states

    def _merge(self, fresh: dict[str, Any], piece: Piece) -> None:
        """Add states of rows that every accumulator took: what fails now is the fault of no row."""
        for key, accumulator in self._accumulators.items():
            self._key = key
            try:
                self.states[key] = accumulator.merge(self.states[key], fresh[key])
            except RowError as exc:
                raise self._blame(exc, piece, "merging states") from None

    def _zero(self, key: str) -> Any:
        try:
            return self._accumulators[key].zero()
        except Exception as exc:
            raise explain(exc, f"evaluate({key})", doing="making the state of no rows") from None

    def _blame(self, exc: BaseException, piece: Piece, doing: str = "") -> HeadraceError:
        columns = self._accumulators[self._key].columns
        return explain(exc, f"evaluate({self._key})", piece.origin, columns=columns, doing=doing)


def _without_gaps(batch: pa.RecordBatch, gaps: frozenset[str]) -> pa.RecordBatch:
    """The rows where none of these columns is null."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count and name in gaps:
            batch = batch.filter(batch.column(name).is_valid())
    return batch
