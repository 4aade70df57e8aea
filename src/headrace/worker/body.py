"""The worker's body: runs steps over a program, the same on every substrate.

It owns the cursors under way, the user's functions and models of this worker, and nothing else: blocks belong to the
store, decisions to the scheduler.

Invariants: `run` answers every step with StepDone or StepFailed and never raises for what user code, data or storage did
(only Ctrl-C in the main thread passes); a step that failed leaves no cursor behind, and the body is fit for the next step;
errors name stage, split and rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from headrace.contracts.substrate import BlockStore
from headrace.core.errors import HeadraceError, InternalError, UserCodeError
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance, Apply, StepDone, StepFailed, Timing
from headrace.plan.nodes import Evaluate, Predict
from headrace.worker.batching import Piece, join_origins
from headrace.worker.cursor import READ, WRITE, BlockOutput, Clock, Cursor, SinkOutput, read_block, read_error, slices
from headrace.worker.models import join_columns, model_runner
from headrace.worker.operators import Counts, EvaluateOp, Host, make, select
from headrace.worker.program import Program
from headrace.worker.readahead import read_ahead
from headrace.worker.results import with_columns
from headrace.worker.user_code import Functions, internal_error


class WorkerBody:
    """One worker's share of a run. Used by one thread at a time."""

    def __init__(self, program: Program, spec: WorkerSpec, store: BlockStore) -> None:
        self._program = program
        self._spec = spec
        self._store = store
        self._stages = {stage.id: stage for stage in program.stages}
        self._cursors: dict[int, Cursor] = {}
        self._functions = Functions(spec.device)
        self._host = Host(self._functions, program.deterministic)

    def run(self, step: Advance | Apply) -> StepDone | StepFailed:
        """Do a step. Never raises for what user code, data or storage did."""
        start, cpu = time.perf_counter(), time.thread_time()
        clock = Clock()
        stage = self._stages[step.stage]
        try:
            done = self._advance(stage, step, clock) if isinstance(step, Advance) else self._apply(stage, step, clock)
        except HeadraceError as error:
            return self._failed(stage, step, error)
        except KeyboardInterrupt:
            if isinstance(step, Advance):
                self.discard(step.cursor)
            raise
        except Exception as exc:
            return self._failed(stage, step, internal_error(exc, f"stage {stage.name}"))
        timing = Timing(start, time.perf_counter() - start, time.thread_time() - cpu, clock.times())
        return replace(done, timing=timing)

    def discard(self, cursor: int) -> None:
        """Close a cursor whose split is cancelled, and abort what it wrote."""
        found = self._cursors.pop(cursor, None)
        if found is not None:
            found.abort()

    def close(self) -> None:
        """Abort all cursors and close models and functions. Idempotent."""
        for cursor in list(self._cursors):
            self.discard(cursor)
        for runner in self._host.models.values():
            runner.close()
        self._host.models.clear()
        self._functions.close()

    # --- cursors -----------------------------------------------------------------------------------------------------

    def _advance(self, stage: Stage, step: Advance, clock: Clock) -> StepDone:
        cursor = self._cursors.get(step.cursor)
        if cursor is None:
            cursor = self._cursors[step.cursor] = self._open(stage, step)
        progress = cursor.advance(step, clock)
        if progress.finished:
            del self._cursors[step.cursor]
        return StepDone(
            step=step.id,
            worker=step.worker,
            outputs=tuple(progress.outputs),
            finished=progress.finished,
            more=progress.more,
            receipt=progress.receipt,
            tally=progress.tally,
            metrics=progress.metrics,
            taken=progress.taken,
        )

    def _open(self, stage: Stage, step: Advance) -> Cursor:
        program = self._program
        counts = Counts()
        operators = [make(program.ops[i], i, self._host, counts) for i in range(stage.first, stage.stop)]
        feed = self._feed(_split_of(step, stage)) if stage.order is Order.SOURCE else None
        return Cursor(
            operators,
            counts,
            self._output(stage, step),
            self._store,
            feed,
            step.split.label if step.split is not None else f"split {step.split_index}",
        )

    def _output(self, stage: Stage, step: Advance) -> BlockOutput | SinkOutput:
        if stage.end is not End.SINK:
            return BlockOutput(self._store, stage.transient, stage.end is End.DELIVER)
        sink = self._program.sink
        if sink is None:
            raise InternalError(f"stage {stage.name} ends in a sink, but the program has none")
        return SinkOutput(sink.open(_split_of(step, stage), step.attempt), self._program.out_schema)

    def _feed(self, split: Split) -> Iterator[Piece]:
        source = self._program.source
        try:
            blocks = source.open(split, self._program.limits)
        except Exception as exc:
            raise read_error(exc) from exc
        if source.remote:
            blocks = read_ahead(blocks)
        try:
            for batch, origin in blocks:
                yield Piece(batch, origin)
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()

    # --- models ------------------------------------------------------------------------------------------------------

    def _apply(self, stage: Stage, step: Apply, clock: Clock) -> StepDone:
        began = time.perf_counter()
        inputs = [read_block(self._store, block, stage.columns_in) for block in step.inputs]
        rows = sum(block.rows for block in step.inputs)
        clock.add(READ, time.perf_counter() - began, rows, rows)
        made = self._predict(stage, step, inputs, clock)
        metrics = self._evaluate(stage, step, inputs, made, clock)
        began = time.perf_counter()
        outputs = tuple(
            BlockRef(block.rows, (self._store.put(part),), block.origin) for block, part in zip(step.inputs, made, strict=True)
        )
        clock.add(WRITE, time.perf_counter() - began, rows, rows)
        tally = Tally(written=rows) if stage.end is End.DELIVER else Tally()
        return StepDone(step.id, step.worker, outputs, finished=True, tally=tally, metrics=metrics)

    def _predict(self, stage: Stage, step: Apply, inputs: list[pa.RecordBatch], clock: Clock) -> list[pa.RecordBatch]:
        index = stage.first
        op = self._program.ops[index]
        if not isinstance(op, Predict):
            raise InternalError(f"stage {stage.name} is a model stage, but does not start with predict")
        began = time.perf_counter()
        runner = model_runner(op, index, self._host)
        pieces: list[Piece] = []
        owners: list[int] = []  # the block that each piece belongs to
        for i, (block, batch) in enumerate(zip(step.inputs, inputs, strict=True)):
            whole = Piece(select(batch, op.inputs or batch.schema.names, op.name), block.origin)
            # Which pieces share a block depends on when a step ended, and the model's batches must not.
            parts = list(slices(whole, block.cuts if self._program.deterministic else ()))
            pieces += parts
            owners += [i] * len(parts)
        answers: list[list[pa.RecordBatch]] = [[] for _ in inputs]
        for k, answer in runner.run([p.batch for p in pieces], [p.origin for p in pieces]):
            answers[owners[k]].append(answer)
        if not all(answers):
            raise InternalError(f"{op.name} was given a block without rows")
        made = [join_columns(a, op.name, block.origin) for a, block in zip(answers, step.inputs, strict=True)]
        rows = sum(batch.num_rows for batch in made)
        clock.add(index, time.perf_counter() - began, rows, rows)
        return made

    def _evaluate(
        self, stage: Stage, step: Apply, inputs: list[pa.RecordBatch], made: list[pa.RecordBatch], clock: Clock
    ) -> dict[str, object]:
        """Metrics that follow the model in its stage."""
        metrics: dict[str, object] = {}
        for index in range(stage.first + 1, stage.stop):
            op = self._program.ops[index]
            if not isinstance(op, Evaluate):
                raise InternalError(f"stage {stage.name} holds {op.name} after its model")
            began = time.perf_counter()
            evaluate = EvaluateOp(op, index, op.name, Counts())
            for block, batch, answer in zip(step.inputs, inputs, made, strict=True):
                evaluate.update(with_columns(batch, answer), block.origin)
            metrics.update(evaluate.states)
            rows = sum(batch.num_rows for batch in inputs)
            clock.add(index, time.perf_counter() - began, rows, rows)
        return metrics

    # --- failure -----------------------------------------------------------------------------------------------------

    def _failed(self, stage: Stage, step: Advance | Apply, error: HeadraceError) -> StepFailed:
        where = [("stage", stage.name)]
        if isinstance(step, Advance):
            cursor = self._cursors.pop(step.cursor, None)
            label = f"split {step.split_index}" if step.split is None else step.split.label
            if cursor is not None:
                label = cursor.label
                cursor.abort()
            where.append(("split", label))
        else:
            splits = sorted({index for index, _ in step.owners})
            where.append(("split", ", ".join(map(str, splits))))
            if isinstance(error, UserCodeError) and step.inputs:
                where.append(("rows", f"among {join_origins([b.origin for b in step.inputs]).label}"))
        return StepFailed(step.id, step.worker, error.at(*where))


def _split_of(step: Advance, stage: Stage) -> Split:
    if step.split is None:
        raise InternalError(f"stage {stage.name} was begun without its split")
    return step.split
