"""The worker's body: runs steps over a program, the same on every substrate.

It owns the cursors under way, the steps of streaming models that were begun, the user's functions and models of this worker,
and nothing else: blocks belong to the store, decisions to the scheduler.

Invariants: `run` answers every step with StepDone or StepFailed and never raises for what user code, data or storage did
(only Ctrl-C in the main thread passes); a step that failed leaves no cursor behind, and the body is fit for the next step;
errors name stage, split and rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from headrace.contracts.sink import CarryingSink
from headrace.contracts.source import BadRange, RemarkingSource
from headrace.contracts.substrate import BlockStore
from headrace.core.errors import HeadraceError, InternalError, UserCodeError
from headrace.core.origins import join_origins
from headrace.core.resources import WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance, Apply, StepDone, StepFailed, Timing
from headrace.plan.nodes import FilterRows, FlatMap, MapBatches, MapRows, Predict
from headrace.worker.bad_rows import BadRows
from headrace.worker.batching import Piece
from headrace.worker.blocks import BlockOutput
from headrace.worker.cursor import Clock, Cursor, Progress, read_error
from headrace.worker.model_step import ModelStep
from headrace.worker.operators import Counts, CutOp, Host, make
from headrace.worker.program import Program
from headrace.worker.readahead import Begun, begin_reading
from headrace.worker.sink_output import SinkOutput
from headrace.worker.threads import fair_threads
from headrace.worker.user_code import Functions, internal_error
from headrace.worker.watch import Watch


class WorkerBody:
    """One worker's share of a run. Used by one thread at a time."""

    def __init__(self, program: Program, spec: WorkerSpec, store: BlockStore) -> None:
        self._program = program
        self._spec = spec
        self._store = store
        self._stages = {stage.id: stage for stage in program.stages}
        sink = program.sink
        self._carrying = sink if program.carried is not None and isinstance(sink, CarryingSink) else None
        source = program.source
        self._take_remarks = source.take_remarks if isinstance(source, RemarkingSource) else _no_remarks
        self._cursors: dict[int, Cursor] = {}
        self._functions = program.tried.take() or Functions(
            spec.device,
            threads=fair_threads(spec.pool),
            deterministic=program.deterministic,
            crumb=store.crumb,
            loads=program.tried.loads,
        )
        groups = (op for op in program.ops if isinstance(op, Predict) and op.group is not None)
        self._host = Host(self._functions, program.deterministic, gaps=frozenset(name for op in groups for name in op.output))
        self._next: tuple[Split, ...] = ()  # to be opened soon, as told last
        self._begun: dict[int, _Begun] = {}  # by step
        self._last_begun_s = 0.0  # when the last of those was answered

    def warm(self, over: Callable[[], bool]) -> None:
        """Construct the functions and models of this worker's stages when it is their turn. over: see Functions.warm."""
        since_s = time.monotonic()
        for stage in self._stages.values():
            if stage.pool != self._spec.pool:
                continue
            for index in range(stage.first, stage.stop):
                op = self._program.ops[index]
                if isinstance(op, FilterRows | MapRows | FlatMap | MapBatches):
                    self._functions.warm(index, op.fn, op.name, (), over, since_s)
                elif isinstance(op, Predict):
                    self._functions.warm(index, op.model, op.name, op.inputs, over, since_s)

    def begin(self, step: Advance | Apply, ready: Callable[[], None]) -> bool:
        """Start a step that goes on beside others. `ready` is called once, from any thread, when `run` would not wait for it.

        False: the step is an ordinary one. Whatever goes wrong is answered by `run`.
        """
        stage = self._stages[step.stage]
        if not stage.stream or isinstance(step, Advance):
            return False
        clock = Clock()
        begun = _Begun(ModelStep(self._program, self._host, self._store, stage, step, clock, self._bad_rows), clock)
        try:
            if not begun.work.begin(ready):
                return False
        except HeadraceError as error:
            begun.error = error
            ready()
        except Exception as exc:
            begun.error = internal_error(exc, f"stage {stage.name}")
            ready()
        self._begun[step.id] = begun
        return True

    def run(self, step: Advance | Apply) -> StepDone | StepFailed:
        """Do a step. Never raises for what user code, data or storage did."""
        start, cpu = time.perf_counter(), time.thread_time()
        clock = Clock()
        stage = self._stages[step.stage]
        begun = self._begun.pop(step.id, None)
        if begun is not None:  # steps that overlap share the time, so that it adds up to the time in which there were any
            start, clock = max(begun.began_s, self._last_begun_s), begun.clock
        done = progress = None
        try:
            if begun is not None:
                done = begun.result()
            elif isinstance(step, Advance):
                progress = self._advance(stage, step, clock)
            else:
                done = self._apply(stage, step, clock)
        except HeadraceError as error:
            return self._failed(stage, step, error)
        except KeyboardInterrupt:
            if isinstance(step, Advance):
                self.discard(step.cursor)
            raise
        except Exception as exc:
            return self._failed(stage, step, internal_error(exc, f"stage {stage.name}"))
        finally:
            self._host.shared.clear()
            if begun is not None:
                self._last_begun_s = time.perf_counter()
            if self._store.crumb is not None and not self._begun:
                self._store.crumb.clear()
        timing = Timing(start, time.perf_counter() - start, time.thread_time() - cpu, clock.times())
        if progress is not None:
            return _told(step, progress, timing, self._take_remarks())
        assert done is not None
        return replace(done, timing=timing)

    def discard(self, cursor: int) -> None:
        """Close a cursor whose split is cancelled, and abort what it wrote."""
        found = self._cursors.pop(cursor, None)
        if found is not None:
            found.abort()

    def close(self) -> None:
        """Abort all cursors and close models and functions. Idempotent."""
        self.leave().close()

    def leave(self) -> Functions:
        """Close all but the functions, which another body of this thread and place may go on with. Idempotent."""
        for cursor in list(self._cursors):
            self.discard(cursor)
        self._program.ahead.close()
        for runner in self._host.models.values():
            runner.close()
        self._begun.clear()
        self._host.models.clear()
        return self._functions

    # --- cursors -----------------------------------------------------------------------------------------------------

    def _advance(self, stage: Stage, step: Advance, clock: Clock) -> Progress:
        if stage.order is Order.SOURCE:
            self._next = step.next
        cursor = self._cursors.get(step.cursor)
        if cursor is None:
            cursor = self._cursors[step.cursor] = self._open(stage, step)
        progress = cursor.advance(step, clock)
        if progress.finished:
            del self._cursors[step.cursor]
        return progress

    def _apply(self, stage: Stage, step: Apply, clock: Clock) -> StepDone:
        return ModelStep(self._program, self._host, self._store, stage, step, clock, self._bad_rows).run()

    def _bad_rows(self, split_index: int, attempt: int) -> BadRows | None:
        """Where the bad rows of a split go; None: they end the run."""
        program = self._program
        if program.on_error == "fail":
            return None
        return BadRows(program.on_error == "quarantine", program.sink, split_index, attempt)

    def _open(self, stage: Stage, step: Advance) -> Cursor:
        program = self._program
        counts = Counts()
        bad = self._bad_rows(step.split_index, step.attempt)
        watch = Watch(self._store.crumb, step.suspects, bad is not None)
        operators = [make(program.ops[i], i, self._host, counts, bad, watch) for i in range(stage.first, stage.stop)]
        if operators:
            operators[-1].joins = not program.deterministic
        if stage.cut_rows is not None:
            operators.append(CutOp(stage.cut_rows, program.ops[stage.stop].name, counts))
        feed = self._feed(_split_of(step, stage), bad) if stage.order is Order.SOURCE else None
        return Cursor(
            operators,
            counts,
            self._output(stage, step),
            self._store,
            feed,
            step.split.label if step.split is not None else f"split {step.split_index}",
            bad,
        )

    def _output(self, stage: Stage, step: Advance) -> BlockOutput | SinkOutput:
        if stage.end is not End.SINK:
            return BlockOutput(self._store, stage.transient, stage.end is End.DELIVER, stage.feeds)
        sink = self._program.sink
        if sink is None:
            raise InternalError(f"stage {stage.name} ends in a sink, but the program has none")
        split, carried = _split_of(step, stage), self._program.carried
        if carried is not None and self._carrying is not None:
            writer = self._carrying.open_carrying(split, step.attempt, carried, self._program.source)
            return SinkOutput(writer, None, writer)
        return SinkOutput(sink.open(split, step.attempt), self._program.out_schema)

    def _feed(self, split: Split, bad: BadRows | None) -> Iterator[Piece]:
        program = self._program
        blocks: Any
        try:
            if program.source.remote:
                blocks, told = program.ahead.take(split, program.limits) or self._begin(split)
                try:
                    told.hand_to(_no_bad if bad is None else bad.found.append, self._begin_next)
                except BaseException:
                    blocks.close()
                    raise
            elif bad is None:
                blocks = program.source.open(split, program.limits)
            else:
                blocks = program.source.open(split, program.limits, bad.found.append)
        except Exception as exc:
            raise read_error(exc) from exc
        try:
            for batch, origin in blocks:
                yield Piece(batch, origin)
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()

    def _begin(self, split: Split) -> Begun:
        program = self._program
        return begin_reading(program.source, split, program.limits, fails=program.on_error == "fail")

    def _begin_next(self) -> None:
        self._program.ahead.begin(self._next, self._program.limits, self._begin)

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


class _Begun(Struct):
    """A step under way beside others. error: it could not begin."""

    work: ModelStep
    clock: Clock
    began_s: float = field(default_factory=time.perf_counter)
    error: HeadraceError | None = None

    def result(self) -> StepDone:
        if self.error is not None:
            raise self.error
        return self.work.run()


def _told(step: Advance | Apply, progress: Progress, timing: Timing, remarks: tuple[tuple[str, str], ...]) -> StepDone:
    """The answer to an Advance."""
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
        timing=timing,
        aside=progress.aside,
        unreadable=progress.unreadable,
        remarks=remarks,
    )


def _no_remarks() -> tuple[tuple[str, str], ...]:
    return ()


def _no_bad(bad: BadRange) -> None:
    """Where the first range that can't be read ends the run, none is told."""
    raise InternalError("a bad range was told, and passed over") from bad.error


def _split_of(step: Advance, stage: Stage) -> Split:
    if step.split is None:
        raise InternalError(f"stage {stage.name} was begun without its split")
    return step.split
