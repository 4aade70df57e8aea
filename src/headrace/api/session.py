"""Session: wires the concrete parts (source, scheduler, substrate, sink, observers) and runs a plan. The only place that knows
them all.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from headrace.api.placing import reach
from headrace.api.planning import (
    Prepared,
    choose,
    for_action,
    known_schema,
    lay_out,
    parse_options,
    prepare,
    schema_without_rows,
    with_division,
)
from headrace.api.reproduce import reproduce
from headrace.commit.records import DamagedLog
from headrace.connectors import environment
from headrace.connectors.storage import is_remote
from headrace.contracts.accumulator import Accumulator
from headrace.contracts.observer import Observer
from headrace.contracts.sink import Sink
from headrace.core.errors import HeadraceError, InputChanged, InternalError, PlanError
from headrace.core.events import RunStarted
from headrace.core.frames import with_room
from headrace.core.guards import guard_name
from headrace.core.options import ActionOptions, RunOptions
from headrace.core.splits import Division
from headrace.plan.columns import ALL, Columns
from headrace.plan.fingerprint import fingerprint
from headrace.plan.fingerprint.compare import differences
from headrace.plan.nodes import Evaluate, Op, Plan, Predict, Write
from headrace.runtime.committer import Committer, beating
from headrace.runtime.division import choose_division
from headrace.runtime.driver import Driver
from headrace.runtime.engine import may_want_processes
from headrace.runtime.ledger import (
    OpenedRun,
    OutputGone,
    check_latest,
    check_presence,
    compare_listing,
    leave,
    mark_complete,
    open_run,
    successor,
    this_process,
)
from headrace.runtime.machine import usable_cores
from headrace.runtime.signals import ending_at_once, handling_signals
from headrace.runtime.stop_rules import StopRule
from headrace.runtime.stream import stream_blocks
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import Limits, SchedulerPlan
from headrace.worker.guard import OutputGuard

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.contracts.run_store import RunStore
    from headrace.contracts.substrate import Substrate
    from headrace.observe.run import Run
    from headrace.substrates.processes.forks import ForkServer

# On Ray putting a block, and the calls for a step, take milliseconds of several processes: blocks for a model are joined, up to
# so much, and a step may run for longer. (16 MiB and a quarter of a second cost 2.5% more of two cores, with images of 150 kB.)
JOIN_BYTES = 32 << 20
JOIN_SHARE = 1 / 16  # of the budget, at most
SLICE_S = 0.5


def _substrate(prepared: Prepared, must_see: str | None, refs: bool, server: ForkServer | None) -> Substrate:
    """must_see: a file of the run's destination, where that is a path of this machine. refs, server: see make_driver."""
    engine = prepared.engine
    if engine == "ray":
        from headrace.substrates.ray.pool import RaySubstrate

        follows = prepared.options.memory_bytes is None
        return RaySubstrate(shapes=prepared.cluster, must_see=must_see, delivers_refs=refs, budget_follows=follows)
    if engine == "inline":
        from headrace.substrates.inline import InlineSubstrate

        return InlineSubstrate()
    if engine == "threads":
        from headrace.substrates.threads import ThreadsSubstrate

        return ThreadsSubstrate(cores=prepared.machine.cores)
    from headrace.substrates.processes.pool import ProcessesSubstrate

    return ProcessesSubstrate(cores=prepared.machine.cores, server=server)


def make_driver(
    prepared: Prepared,
    observers: Sequence[Observer],
    committer: Committer,
    *,
    deliver: Callable[[Any], None] | None = None,
    opened: OpenedRun | None = None,
    refs: bool = False,
    server: ForkServer | None = None,
) -> Driver:
    """opened: the run whose log the committer writes, None when nothing is kept. refs: on a cluster, deliver references.
    server: for worker processes, begun before the engine was chosen.
    """
    physical, options = prepared.physical, prepared.options
    plan = prepared.written
    private = "" if opened is None else f"{opened.store.root}/_headrace/{opened.run}"
    local = opened is not None and not is_remote(private)
    must_see = f"{opened.store.root}/_headrace" if opened is not None and local else None
    pools: dict[str, int] = {}
    for worker in prepared.workers:
        pools[worker.pool] = pools.get(worker.pool, 0) + 1
    on_ray = prepared.engine == "ray"
    limits = Limits(
        budget_bytes=prepared.budget_bytes,
        fail_on_bad_rows=options.on_error == "fail",
        frail_blocks=on_ray,
        read_next=prepared.engine in ("inline", "threads") and prepared.program.source.remote,
        bulk=options.execution == "bulk",
        max_bad_rows=options.max_bad_rows,
        max_bad_fraction=options.max_bad_fraction,
        settled_before=committer.tally,
    )
    if on_ray:
        limits = replace(limits, join_bytes=int(min(JOIN_BYTES, JOIN_SHARE * prepared.budget_bytes)), slice_s=SLICE_S)
    sink = prepared.program.sink
    started = RunStarted(
        at_s=time.perf_counter(),
        name=f"{plan.read.name} > {plan.write.sink.name}" if plan.write is not None else "",
        engine=prepared.engine,
        pools=pools,
        stages={s.id: (s.name, s.pool) for s in physical.stages},
        ops={i: op.name for i, op in enumerate(prepared.program.ops)},
        budget_bytes=prepared.budget_bytes,
        notes=(*(opened.notes if opened is not None else ()), *prepared.notes),
        settled=committer.splits,
        tally=committer.tally,
        run="" if opened is None else opened.run,
        sessions=1 if opened is None else opened.epoch,
        quarantine=f"{private}/quarantine" if private else "",
        shared=_shared(prepared.program.ops),
    )
    return Driver(
        scheduler=Scheduler(SchedulerPlan(physical.stages, physical.routes, pools), limits),
        substrate=_substrate(prepared, must_see, refs, server),
        program=prepared.program,
        workers=prepared.workers,
        splits=iter(prepared.program.source.splits(per_input=sink is not None and sink.per_input)),
        committer=committer,
        observers=observers,
        started=started,
        deliver=deliver,
        timeout_s=options.timeout,
        crash_dir=f"{private}/crashes" if local else None,
        stop_rules=_stop_rules(prepared.program.ops),
    )


def _shared(ops: Sequence[Op]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """The models that were given together, and where the first of them is."""
    groups: dict[int, list[int]] = {}
    for i, op in enumerate(ops):
        if isinstance(op, Predict) and op.group is not None:
            groups.setdefault(op.group, []).append(i)
    labels = {i: op.label for i, op in enumerate(ops) if isinstance(op, Predict)}
    return tuple((tuple(labels[i] for i in members), members[0]) for members in groups.values() if len(members) > 1)


def _stop_rules(ops: Sequence[Op]) -> dict[str, StopRule]:
    return {
        name: StopRule(op.accumulators[name], condition, op.stop_after_rows)
        for op in ops
        if isinstance(op, Evaluate)
        for name, condition in op.stop_if.items()
    }


@ending_at_once()
def write(plan: Plan, sink: Sink, options: ActionOptions, at_end: Columns = ALL) -> Run:
    """Run a plan into a sink, or go on with what an earlier session of the same run left undone.

    Raises what the run raises; whatever was settled until then stays settled, and the same call goes on from there.
    """
    parsed, plan = parse_options(options), for_action(plan)
    schema = known_schema(plan)
    _refuse_own_output(plan, sink)
    sink.check(schema)
    written = replace(plan, write=Write(sink))
    sample = environment.poison_row()
    if sample is not None:
        reproduce_row(written, sample, options, at_end)
        raise SystemExit(0)
    with reach(parsed):
        return _write(written, sink, schema, parsed, at_end)


def _write(written: Plan, sink: Sink, schema: pa.Schema | None, parsed: RunOptions, at_end: Columns) -> Run:
    store = sink.store()
    if store is None:
        return _run_unlogged(written, parsed, at_end)
    with contextlib.ExitStack() as prepared:
        server = _fork_server(written, sink, parsed)
        if server is not None:
            prepared.callback(server.close)
        return _write_logged(written, sink, store, schema, parsed, at_end, server)


def _fork_server(plan: Plan, sink: Sink, options: RunOptions) -> ForkServer | None:
    """Worker processes may well be wanted: what they import is imported while the run is prepared, on another core."""
    cores = usable_cores()
    workers = options.cpus or cores
    if not may_want_processes(options.engine, plan.read.source, sink, workers):
        return None
    from headrace.substrates.processes.forks import ForkServer, imported

    return ForkServer.begin(max(1, cores // workers), imported())


def _write_logged(
    written: Plan,
    sink: Sink,
    store: RunStore,
    schema: pa.Schema | None,
    parsed: RunOptions,
    at_end: Columns,
    server: ForkServer | None,
) -> Run:
    # Before the user's functions are tried: what they change is no part of what they mean.
    meaning = fingerprint(written, settings={"on_error": parsed.on_error, "deterministic": parsed.deterministic})
    laid_out = lay_out(written, parsed, at_end)  # all that can be refused is refused before the destination is touched

    def opened_run(instead_of: str = "") -> OpenedRun:
        return open_run(
            store,
            meaning,
            fresh=sink.fresh,
            take_over=parsed.take_over,
            identity=this_process(),
            differences=differences,
            sleep=_Waiting(parsed.progress != "quiet"),
            instead_of=instead_of,
        )

    opened = opened_run()
    try:
        return _run_opened(laid_out, sink, opened, schema, server)
    except (InputChanged, DamagedLog, OutputGone):
        if not sink.fresh or (opened.epoch == 1 and not opened.finished):
            raise
    return _run_opened(laid_out, sink, opened_run(instead_of=opened.run), schema, server)


def _run_opened(laid_out: Prepared, sink: Sink, opened: OpenedRun, schema: pa.Schema | None, server: ForkServer | None) -> Run:
    bound = sink.bind(opened.run, opened.epoch, schema)
    if opened.finished:
        return _finished_before(laid_out, bound, opened, schema)
    try:
        ready = _ready(laid_out, opened)
        if server is not None and ready.engine != "processes":
            server.close()
        return _run_logged(replace(ready, program=replace(ready.program, sink=bound)), bound, opened, schema, server)
    finally:
        laid_out.program.ahead.close()
        laid_out.program.tried.close()


def _division(ready: Prepared, opened: OpenedRun) -> Division | None:
    """The run's, where a session before has listed something or divided it; else what suits the plan."""
    state = opened.state
    if state.division is not None or state.listed or state.listing_done:
        return state.division
    return choose_division(ready.program, ready.sampled)


def _ready(laid_out: Prepared, opened: OpenedRun) -> Prepared:
    """With an engine, and splits that suit. Only now, with this session in the log: trying the functions may end the process,
    and the next session must know.
    """
    try:
        with beating(opened):
            ready = _chosen(laid_out, opened) if laid_out.engine == "auto" else laid_out
            return with_division(ready, _division(ready, opened))
    except BaseException:
        leave(opened)
        raise


def _chosen(laid_out: Prepared, opened: OpenedRun) -> Prepared:
    ready = choose(laid_out, after_crash=opened.after_crash)
    if opened.epoch > 1:  # what was read to choose may be of a split that is settled, which nobody opens
        ready.program.ahead.close()
    if opened.after_crash and laid_out.options.progress != "quiet":
        print(f"headrace: {ready.notes[len(laid_out.notes)]}", file=sys.stderr, flush=True)
    return ready


def reproduce_row(plan: Plan, path: str, options: ActionOptions, at_end: Columns = ALL) -> str:
    """Run the operator that a kept row killed on that row alone, in this process."""
    parsed = replace(parse_options(options), engine="inline", timeout=None)  # by name, so that nothing is probed
    return reproduce(prepare(plan, parsed, at_end).physical.plan, path, deterministic=parsed.deterministic)


def _run_unlogged(plan: Plan, options: RunOptions, at_end: Columns) -> Run:
    """A run that keeps nothing: nothing to resume."""
    from headrace.observe.progress import make_observers
    from headrace.observe.run import RunRecorder

    if options.on_error == "quarantine":
        raise _no_place_for_bad_rows()
    ready = prepare(plan, options, at_end)
    recorder = RunRecorder()
    committer = Committer(accumulators_of(ready))
    driver = make_driver(ready, [recorder, *make_observers(options.progress)], committer)
    try:
        with handling_signals(driver, resumable=False):
            with_room(driver.run)
    except BaseException as error:
        raise plain(error) from error.__cause__
    return recorder.run()


def _run_logged(
    ready: Prepared, sink: Sink, opened: OpenedRun, schema: pa.Schema | None, server: ForkServer | None = None
) -> Run:
    """A session of a run that may have had others before."""
    from headrace.observe.progress import make_observers
    from headrace.observe.run import RunRecorder

    committer = Committer(accumulators_of(ready), opened)
    committer.divide(ready.division)
    recorder = RunRecorder()
    driver = make_driver(ready, [recorder, *make_observers(ready.options.progress)], committer, opened=opened, server=server)
    done = False
    try:
        with handling_signals(driver):
            with_room(driver.run)
            run = recorder.run()
            summary = run.to_dict()
            committer.finish(summary)
            _show(ready, sink, opened, committer, summary, schema)
            done = True
    except HeadraceError as error:
        committer.close(released=True)
        raise plain(successor(opened) or error) from error.__cause__
    except BaseException as error:
        raise plain(error) from error.__cause__
    finally:
        committer.close(released=True)
        if not done and committer.certain:  # a later session knows what the log holds, and removes the rest
            sink.release()
    return run


def _show(
    ready: Prepared,
    sink: Sink,
    opened: OpenedRun,
    committer: Committer,
    summary: Mapping[str, Any],
    schema: pa.Schema | None,
) -> None:
    """What is left to do when the log is complete; harmless to do again."""
    check_latest(opened)
    if schema is None and not any(f.rows for f in committer.files if f.kind == "output"):
        schema = schema_without_rows(ready.written)
    sink.finish(committer.files, {**summary, "sessions": opened.epoch}, schema)
    mark_complete(opened)


def _finished_before(ready: Prepared, sink: Sink, opened: OpenedRun, schema: pa.Schema | None) -> Run:
    """The run is finished: there is nothing to do, unless the last session died before all was shown."""
    from headrace.observe.run import finished_before

    source = with_division(ready, opened.state.division).program.source
    compare_listing(opened, source.splits(per_input=sink.per_input))
    committer = Committer(accumulators_of(ready), opened)
    assert opened.state.finished is not None
    summary = opened.state.finished
    check_presence(opened, committer.files)
    if not opened.complete:
        _show(ready, sink, opened, committer, summary, schema)
    run = finished_before(
        summary,
        committer.results(),
        opened.run,
        committer.tally,
        committer.splits,
        committer.files,
        {i: op.name for i, op in enumerate(ready.program.ops)},
    )
    if ready.options.progress != "quiet":
        print(f"headrace: {run.name}: nothing to do: finished before ({run.rows:,} rows)", file=sys.stderr)
    return run


class _Waiting:
    """Sleeps, and says at the first time what for."""

    def __init__(self, says: bool) -> None:
        self._says = says

    def __call__(self, seconds: float) -> None:
        if self._says:
            self._says = False
            text = "waiting half a minute at most to see whether an earlier driver, or the storage, is still alive"
            print(f"headrace: {text}", file=sys.stderr, flush=True)
        time.sleep(seconds)


def _no_place_for_bad_rows() -> PlanError:
    return PlanError(
        'on_error="quarantine" needs a destination to set rows aside in', hint='write the rows, or use on_error="skip"'
    )


def accumulators_of(ready: Prepared) -> dict[str, Accumulator]:
    """The user's, by name, and a guard of each model's outputs."""
    found: dict[str, Accumulator] = {}
    for i, op in enumerate(ready.program.ops):
        if isinstance(op, Evaluate):
            found |= op.accumulators
        elif isinstance(op, Predict):
            found[guard_name(i)] = OutputGuard()
    return found


def _refuse_own_output(plan: Plan, sink: Sink) -> None:
    """Raise PlanError if a second run would read what this one writes (or this one, while it goes on listing)."""
    covers: Callable[[str], bool] | None = getattr(plan.read.source, "covers", None)
    output: str | None = getattr(sink, "typical_output", None)
    if covers is not None and output is not None and covers(output):
        raise PlanError(
            "the destination lies inside the input: its files would be read as input, too",
            where=(("input", plan.read.source.describe()), ("output", output)),
            hint='write beside the input directory, or read by a pattern that leaves the outputs out, such as "data/*.parquet"',
        )


def plain(error: BaseException) -> BaseException:
    """The error as its reader wants it: without the frames of the engine that carried it here."""
    told = isinstance(error, HeadraceError | KeyboardInterrupt) and not isinstance(error, InternalError)
    return error.with_traceback(None) if told else error


def stream(plan: Plan, options: ActionOptions, *, refs: bool = False) -> Iterator[Any]:
    """Record batches of a plan without a sink, in order. refs: on a cluster, ingest.RefBlock instead."""
    from headrace.observe.progress import make_observers

    parsed = parse_options(options)
    if parsed.on_error == "quarantine":
        raise _no_place_for_bad_rows()
    with contextlib.ExitStack() as reached:
        reached.enter_context(reach(parsed))
        ready = prepare(for_action(plan), parsed)
        observers = make_observers(parsed.progress)

        def driver(deliver: Callable[[Any], None]) -> Driver:
            return make_driver(ready, observers, Committer(accumulators_of(ready)), deliver=deliver, refs=refs)

        blocks = stream_blocks(driver, inline=ready.engine == "inline")
        return _while_reached(blocks, reached.pop_all()) if ready.engine == "ray" else blocks


def _while_reached(blocks: Iterator[Any], reached: contextlib.ExitStack) -> Iterator[Any]:
    with reached, contextlib.closing(blocks):  # type: ignore[type-var]
        yield from blocks
