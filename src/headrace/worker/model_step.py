"""A model stage over blocks of any splits: what the body does for an `Apply`.

A block that lost no row gets a new part, zipped beside the old ones by whoever holds it. One that lost rows is answered as a
whole block: the columns that later stages need, with the model's beside them.

Invariants: what is told of an owner (bad rows, metrics, rows written) never mixes with another's; outputs are in the order of
the inputs, one each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct, field

from headrace.contracts.substrate import BlockStore
from headrace.core.errors import InternalError
from headrace.core.guards import guard_name
from headrace.core.receipts import NO_ROWS, Tally
from headrace.core.refs import BlockRef
from headrace.core.stages import End, Stage
from headrace.core.steps import Apply, Share, StepDone
from headrace.core.tensors import numpy_to_array
from headrace.models.torch_device import sharing
from headrace.plan.nodes import Evaluate, Predict
from headrace.worker.bad_rows import BadRows, Lost
from headrace.worker.batching import Piece, join
from headrace.worker.blocks import pack, put_part, read_block, read_piece, slices
from headrace.worker.cursor import READ, WRITE, Clock
from headrace.worker.guard import OutputGuard
from headrace.worker.model_answers import join_columns
from headrace.worker.models import model_runner
from headrace.worker.operators import Counts, EvaluateOp, Host, select
from headrace.worker.program import Program
from headrace.worker.results import with_columns
from headrace.worker.watch import Watch

Owner = tuple[int, int]  # split index, attempt
JOINED_BYTES = 256 << 20  # of the input of a step of several models: as tuning.MAX_INPUT_BYTES


class _Input(Struct):
    """A block on its way through the step. piece: the model's columns. left: positions of the rows that did not fail, None for
    all. made: the model's columns of those; None when there are none.
    """

    block: BlockRef
    owner: Owner
    piece: Piece
    made: pa.RecordBatch | None = None
    left: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.block.rows if self.left is None else len(self.left)

    def drop(self, lost: list[Lost]) -> None:
        """Rows, by their position among those left, failed."""
        if lost:
            left = np.arange(self.block.rows) if self.left is None else self.left
            self.left = np.delete(left, [at for at, _ in lost])


class _Told(Struct):
    """What there is to say of one owner."""

    bad: BadRows | None
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    written: int = 0


class ModelStep:
    """One Apply. make_bad: where an owner's bad rows go, None when they end the run."""

    def __init__(
        self,
        program: Program,
        host: Host,
        store: BlockStore,
        stage: Stage,
        step: Apply,
        clock: Clock,
        make_bad: Callable[[int, int], BadRows | None],
    ) -> None:
        self._program = program
        self._host = host
        self._store = store
        self._stage = stage
        self._step = step
        self._clock = clock
        self._told = {owner: _Told(make_bad(*owner)) for owner in dict.fromkeys(step.owners)}
        self._watch = Watch(store.crumb, step.suspects, program.on_error != "fail")

    def begin(self, ready: Callable[[], None]) -> bool:
        """Give the model its rows now, if it works on those of several steps at once: see ModelRunner.begin.

        Raises HeadraceError.
        """
        op = self._program.ops[self._stage.first]
        if not isinstance(op, Predict):
            return False
        pieces, _ = self._pieces(op, self._inputs())
        runner = model_runner(op, self._stage.first, self._host)
        return runner.begin([p.batch for p in pieces], [p.origin for p in pieces], self._watch, ready)

    def run(self) -> StepDone:
        """Raises HeadraceError."""
        began = time.perf_counter()
        inputs = self._inputs()
        rows = sum(i.rows for i in inputs)
        self._clock.add(READ, time.perf_counter() - began, rows, rows)
        models = [i for i in range(self._stage.first, self._stage.stop) if isinstance(self._program.ops[i], Predict)]
        whole = self._joined(inputs) if len(models) > 1 else None
        with sharing() as copies:
            for index in range(self._stage.first, self._stage.stop):
                copies.keeps = bool(models) and index < models[-1]  # of what others will read
                if index in models:
                    self._predict(index, inputs, whole)
                else:
                    self._evaluate(index, inputs)
        began = time.perf_counter()
        outputs = tuple(self._output(i) for i in inputs)
        rows = sum(block.rows for block in outputs)
        self._clock.add(WRITE, time.perf_counter() - began, rows, rows)
        whole = frozenset(k for k, i in enumerate(inputs) if i.left is not None)
        return StepDone(
            self._step.id,
            self._step.worker,
            outputs,
            finished=True,
            shares=self._shares(inputs),
            whole=whole,
            wanted_rows=self._wanted_rows(),
        )

    def _wanted_rows(self) -> int:
        runners = (self._host.models.get(index) for index in range(self._stage.first, self._stage.stop))
        return max((runner.step_rows for runner in runners if runner is not None), default=0)

    def _inputs(self) -> list[_Input]:
        return [
            _Input(block, owner, read_piece(self._store, block, self._stage.columns_in))
            for block, owner in zip(self._step.inputs, self._step.owners, strict=True)
        ]

    def _joined(self, inputs: list[_Input]) -> pa.RecordBatch | None:
        """All rows of the step side by side, so that models whose batches span blocks share what is copied to a device. None
        where batches keep to their blocks, or where that would take much memory.
        """
        pieces = [i.piece for i in inputs]
        alike = all(p.batch.schema.equals(pieces[0].batch.schema) for p in pieces)
        if self._program.deterministic or not alike or sum(p.batch.nbytes for p in pieces) > JOINED_BYTES:
            return None
        whole = join(pieces).batch
        at = 0
        for each in inputs:
            each.piece = Piece(whole.slice(at, each.block.rows), each.piece.origin)
            at += each.block.rows
        return whole

    def _pieces(self, op: Predict, inputs: list[_Input]) -> tuple[list[Piece], list[int]]:
        """What the model is given, and the input that each piece belongs to."""
        pieces: list[Piece] = []
        owners: list[int] = []
        for i, each in enumerate(inputs):
            whole = Piece(select(each.piece.batch, op.inputs or each.piece.batch.schema.names, op.name), each.piece.origin)
            # Which pieces share a block depends on when a step ended, and the model's batches must not.
            parts = list(slices(whole, each.block.cuts if self._program.deterministic else ()))
            pieces += parts
            owners += [i] * len(parts)
        return pieces, owners

    # --- operators ---------------------------------------------------------------------------------------------------

    def _predict(self, index: int, inputs: list[_Input], whole: pa.RecordBatch | None) -> None:
        op = self._program.ops[index]
        if not isinstance(op, Predict) or any(i.left is not None for i in inputs):  # only models of a group share a stage
            raise InternalError(f"stage {self._stage.name} can't run {op.name} here")
        began = time.perf_counter()
        runner = model_runner(op, index, self._host)
        pieces, owners = self._pieces(op, inputs)
        answers: list[list[pa.RecordBatch]] = [[] for _ in inputs]
        lost: list[list[Lost]] = [[] for _ in inputs]
        seen = [0] * len(inputs)
        guard = OutputGuard()
        if whole is not None:
            whole = select(whole, op.inputs or whole.schema.names, op.name)
        for answer in runner.run([p.batch for p in pieces], [p.origin for p in pieces], watch=self._watch, whole=whole):
            i = owners[answer.input]
            lost[i] += [(seen[i] + at, failure) for at, failure in answer.lost]
            seen[i] += answer.rows
            wrong = self._told[inputs[i].owner].metrics.setdefault(guard_name(index), guard.zero())
            guard.fail(wrong, answer.failed, answer.why)
            if answer.made is not None:
                guard.update(wrong, answer.made)
                answers[i].append(answer.made)
        if not all(seen):
            raise InternalError(f"{op.name} was given a block without rows")
        for i, each in enumerate(inputs):
            self._lose(each, index, op.name, lost[i])
            made = join_columns(answers[i], op.name, each.block.origin) if answers[i] else None
            each.made = with_columns(each.made, made) if each.made is not None and made is not None else made
        rows = sum(seen)
        self._clock.add(index, time.perf_counter() - began, rows, sum(i.rows for i in inputs))

    def _evaluate(self, index: int, inputs: list[_Input]) -> None:
        """Metrics that follow the model in its stage."""
        op = self._program.ops[index]
        if not isinstance(op, Evaluate):
            raise InternalError(f"stage {self._stage.name} holds {op.name} after its model")
        began = time.perf_counter()
        rows = sum(i.rows for i in inputs)
        operators: dict[Owner, EvaluateOp] = {}
        for each in inputs:
            evaluate = operators.get(each.owner)
            if evaluate is None:
                evaluate = operators[each.owner] = EvaluateOp(op, index, op.name, Counts(), self._host.gaps)
                evaluate.bad, evaluate.watch = self._told[each.owner].bad, self._watch
            if each.made is not None:
                piece = each.piece if each.left is None else each.piece.take(each.left)
                lost = evaluate.update(Piece(with_columns(piece.batch, each.made), piece.origin))
                self._lose(each, index, op.name, lost)
        for owner, evaluate in operators.items():
            self._told[owner].metrics.update(evaluate.told())
        self._clock.add(index, time.perf_counter() - began, rows, sum(i.rows for i in inputs))

    def _lose(self, each: _Input, index: int, name: str, lost: list[Lost]) -> None:
        """Rows, by their position among those left, failed in operator `index`."""
        if not lost:
            return
        bad = self._told[each.owner].bad
        assert bad is not None
        piece = read_piece(self._store, each.block)  # all that entered the operator, not only what the model reads
        if each.left is not None:
            piece = piece.take(each.left)
        if each.made is not None:
            piece = Piece(with_columns(piece.batch, each.made), piece.origin)
        bad.add(index, name, piece, lost)
        each.drop(lost)
        if each.made is not None:
            kept = np.delete(np.arange(each.made.num_rows), [at for at, _ in lost])
            each.made = each.made.take(numpy_to_array(kept)) if len(kept) else None

    # --- the answer --------------------------------------------------------------------------------------------------

    def _output(self, each: _Input) -> BlockRef:
        """The new part, or the whole block when rows are missing."""
        if each.left is None:
            assert each.made is not None
            delivers = self._stage.end is End.DELIVER
            part = put_part(self._store, each.made, None if delivers else each.piece.origin.index)
            return BlockRef(each.block.rows, (part,), each.block.origin)
        if each.made is None:
            return BlockRef(0, ())
        packed = pack(self._whole(each))
        positions = None if self._stage.end is End.DELIVER else packed.positions
        origin = packed.origin if positions is packed.positions else packed.origin.inexact()
        return BlockRef(each.rows, (put_part(self._store, packed.batch, positions),), origin, packed.cuts)

    def _whole(self, each: _Input) -> list[Piece]:
        """What is left of each of the pieces that travelled together."""
        assert each.left is not None
        assert each.made is not None
        block = each.block
        names = [name for part in block.parts for name in part.columns]
        keep = self._stage.keep
        batch = read_block(self._store, block, None if keep is None else [n for n in dict.fromkeys(names) if n in keep])
        out: list[Piece] = []
        start = done = 0
        for piece in slices(Piece(batch, each.piece.origin), block.cuts):
            rows = piece.batch.num_rows
            left = each.left[(each.left >= start) & (each.left < start + rows)] - start
            if len(left):
                kept = piece.take(left) if len(left) < rows else piece
                made = each.made.slice(done, len(left))
                out.append(Piece(with_columns(kept.batch, made) if kept.batch.num_columns else made, kept.origin))
            start += rows
            done += len(left)
        return out

    def _shares(self, inputs: list[_Input]) -> tuple[Share, ...]:
        if self._stage.end is End.DELIVER:
            for each in inputs:
                self._told[each.owner].written += each.rows
        shares: list[Share] = []
        for (split, attempt), told in self._told.items():
            tally = Tally(written=told.written)
            files = ()
            if told.bad is not None:
                told.bad.finish()
                files = told.bad.take_files()
                tally = tally + told.bad.take_tally()
            metrics = {name: state for name, state in told.metrics.items() if state}
            if tally != NO_ROWS or metrics or files:
                shares.append(Share(split, attempt, tally, metrics, files))
        return tuple(shares)
