"""Session: wires the concrete parts (source, scheduler, substrate, sink, observers) and runs a plan. The only place that knows
them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.api.planning import Prepared, parse_options, prepare, resolve, static_schema
from headrace.contracts.observer import Observer
from headrace.contracts.sink import Sink
from headrace.core.errors import HeadraceError, InternalError, PlanError
from headrace.core.events import RunStarted
from headrace.core.options import ActionOptions
from headrace.plan.columns import ALL, Columns
from headrace.plan.nodes import Evaluate, Plan, Write
from headrace.runtime.committer import Committer
from headrace.runtime.driver import Driver
from headrace.runtime.stream import stream_blocks
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import Limits, SchedulerPlan

if TYPE_CHECKING:
    from headrace.contracts.substrate import Substrate
    from headrace.observe.run import Run


def _substrate(engine: str) -> Substrate:
    if engine == "inline":
        from headrace.substrates.inline import InlineSubstrate

        return InlineSubstrate()
    if engine == "threads":
        from headrace.substrates.threads import ThreadsSubstrate

        return ThreadsSubstrate()
    from headrace.substrates.processes.pool import ProcessesSubstrate

    return ProcessesSubstrate()


def _driver(
    prepared: Prepared,
    observers: Sequence[Observer],
    deliver: Callable[[Any], None] | None = None,
    name: str = "",
) -> Driver:
    physical = prepared.physical
    pools: dict[str, int] = {}
    for worker in prepared.workers:
        pools[worker.pool] = pools.get(worker.pool, 0) + 1
    accumulators = {n: a for op in prepared.program.ops if isinstance(op, Evaluate) for n, a in op.accumulators.items()}
    scheduler = Scheduler(SchedulerPlan(physical.stages, physical.routes, pools), Limits(budget_bytes=prepared.budget_bytes))
    sink = prepared.program.sink
    started = RunStarted(
        at_s=time.perf_counter(),
        name=name,
        engine=prepared.engine,
        pools=pools,
        stages={s.id: (s.name, s.pool) for s in physical.stages},
        ops={i: op.name for i, op in enumerate(prepared.program.ops)},
        budget_bytes=prepared.budget_bytes,
        notes=prepared.notes,
    )
    return Driver(
        scheduler=scheduler,
        substrate=_substrate(prepared.engine),
        program=prepared.program,
        workers=prepared.workers,
        splits=prepared.program.source.splits(per_input=sink is not None and sink.per_input),
        committer=Committer(accumulators),
        observers=observers,
        started=started,
        deliver=deliver,
    )


def write(plan: Plan, sink: Sink, options: ActionOptions, at_end: Columns = ALL) -> Run:
    """Run a plan into a sink."""
    from headrace.observe.progress import make_observers
    from headrace.observe.run import RunRecorder

    parsed = parse_options(options)
    schema = static_schema(plan.read.source.schema(), resolve(plan).ops)
    _refuse_own_output(plan, sink)
    sink = sink.prepare(schema)
    try:
        ready = prepare(replace(plan, write=Write(sink)), parsed, at_end)
        recorder = RunRecorder()
        observers = [recorder, *make_observers(parsed.progress)]
        driver = _driver(ready, observers, name=f"{plan.read.name} > {sink.name}")
        driver.run()
        run = recorder.run()
        files = [{"name": f.name, "rows": f.rows, "bytes": f.bytes, "digest": f.digest} for f in driver.committer.files]
        sink.finish({**run.to_dict(), "files": files}, schema)
    except BaseException as error:
        sink.abandon()
        raise plain(error) from error.__cause__
    return run


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
    return error.with_traceback(None) if isinstance(error, HeadraceError) and not isinstance(error, InternalError) else error


def stream(plan: Plan, options: ActionOptions) -> Iterator[Any]:
    """Record batches of a plan without a sink, in order."""
    from headrace.observe.progress import make_observers

    parsed = parse_options(options)
    ready = prepare(plan, parsed)
    observers = make_observers(parsed.progress)
    return stream_blocks(lambda deliver: _driver(ready, observers, deliver), inline=ready.engine == "inline")
