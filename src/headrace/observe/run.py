"""Run: what an action returns, and RunRecorder, the observer that collects it from the events.

Invariants: memory depends on the number of stages, operators and workers (those that died, too), never on splits or steps;
nothing is estimated but `what_if`, which says how.

Definitions:
- busy_s of a worker is the time its steps ran, as measured in the worker; a pool's busy share is that, summed, over
  (workers x wall time).
- The bottleneck is the busiest of all limits: the pools, and the stages that ran in fewer workers than their pool has.
  Its busy share says how near the run came to that limit: at 100% nothing else can have slowed it down.
- With one more worker of the bottleneck the run would take  wall - T + T',  where T = max over limits of work / workers,
  and T' is the same with that one more: what is not covered by T (start-up, gaps) stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from headrace.core.events import (
    BlocksSpilled,
    ClusterSampled,
    MemorySampled,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitRetried,
    SplitSettled,
    StepFinished,
    WorkerGone,
    WorkerReplaced,
)
from headrace.core.guards import split_guards
from headrace.core.receipts import OutputFile, Tally

MOST_NOTES = 20  # of what happened on the way, in the report
OP_NAMES = {-1: "read", -2: "write", -3: "cut batches"}  # where core.steps.OpTime has no plan node to name


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator of a stage, summed over steps and workers. rows_per_s: of one worker that does nothing else."""

    op: int
    name: str
    wall_s: float
    rows_in: int
    rows_out: int

    @property
    def rows_per_s(self) -> float:
        return max(self.rows_in, self.rows_out) / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage, summed over steps and workers. rows, bytes: what left it. workers: how many ran it.

    cpu_s below busy_s means waiting: for storage, for a device, or for the interpreter lock.
    """

    id: int
    name: str
    pool: str
    workers: int
    steps: int
    busy_s: float
    cpu_s: float
    rows: int
    bytes: int
    operators: tuple[OperatorTime, ...] = ()

    @property
    def rows_per_s(self) -> float:
        """Of one worker that does nothing else."""
        return self.rows / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PoolTime:
    """busy: share of the run's wall time that its workers were running steps."""

    name: str
    workers: int
    busy_s: float
    cpu_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """kind: a pool, or a stage that ran in fewer workers than its pool has. share: how near the run came to this limit.

    stage, operator: where most of its time went. what_if_s: estimated wall time with one more worker.
    """

    kind: Literal["pool", "stage"]
    name: str
    workers: int
    share: float
    stage: str
    operator: str
    operator_share: float
    what_if_s: float


@dataclass(frozen=True)
class Run:
    """One execution of a plan, as measured. Print it for a report; `to_dict` for JSON.

    rows: written, or delivered to the consumer. splits: settled. Both, the tally and the metrics are of the whole run; times,
    stages, memory, files and rates are of this session of it.
    first_output_s: from the start to the first row written or delivered, None when there was none. peak_rss_bytes: anonymous
    memory of driver and workers, sampled. spilled_bytes: blocks that went to disk, for want of memory or with
    execution="bulk"; what Ray spills by itself is not in it.
    run_id: the run's name in its destination, "" when nothing is kept. sessions: how many have worked on it, with this one.
    resumed_splits, resumed_rows: done before this session. retries: splits that were started again. workers_lost: that died,
    hung, or went with their node. quarantine: where rows that failed (tally.quarantined) are set aside, "" when they are not.
    finished: False for a run that was stopped, or failed. already_done: an earlier call had finished it, this one did nothing.
    nodes: of a cluster, the most that there were at a time; 0 on one machine.
    guards: what is wrong with outputs of models, {operator: {"nan": {column: values}, "infinite": {column: values}, "failed":
    rows of one of several models that have nulls, "why": one of their failures}}; {} when nothing is.
    """

    name: str
    engine: str
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    splits: int = 0
    wall_s: float = 0.0
    first_output_s: float | None = None
    stages: tuple[StageTime, ...] = ()
    pools: tuple[PoolTime, ...] = ()
    bottleneck: Bottleneck | None = None
    peak_in_flight_bytes: int = 0
    peak_rss_bytes: int = 0
    spilled_bytes: int = 0
    budget_bytes: int = 0
    output_files: int = 0
    output_bytes: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    error: str = ""
    run_id: str = ""
    sessions: int = 1
    resumed_splits: int = 0
    resumed_rows: int = 0
    retries: int = 0
    workers_lost: int = 0
    quarantine: str = ""
    finished: bool = True
    already_done: bool = False
    guards: Mapping[str, Any] = field(default_factory=dict[str, Any])
    nodes: int = 0

    @property
    def rows_per_s(self) -> float:
        """Of this session."""
        return (self.rows - self.resumed_rows) / self.wall_s if self.wall_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: plain numbers, strings, lists and dicts; NaN and infinities as None.

        What an undisturbed run has nothing to say of (retries, sessions, ...) is left out.
        """
        out: dict[str, Any] = plain(self)
        for name, usual in _USUAL.items():
            if out[name] == usual:
                del out[name]
        out["rows_per_s"] = plain(self.rows_per_s)
        return out

    def __str__(self) -> str:
        from headrace.observe.report import text

        return text(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def finished_before(
    summary: Mapping[str, Any],
    metrics: Mapping[str, Any],
    run: str,
    tally: Tally,
    splits: int,
    files: Sequence[OutputFile],
    ops: Mapping[int, str],
) -> Run:
    """The Run of a call that finds its run finished. summary: what the session that finished it recorded. metrics: the results
    of all accumulators.
    """

    def text(name: str) -> str:
        value = summary.get(name)
        return value if isinstance(value, str) else ""

    output_files = output_bytes = 0
    for file in files:  # once: it may be millions, made as they are asked for
        if file.kind == "output":
            output_files += 1
            output_bytes += file.bytes
    metrics, guards = split_guards(metrics, ops)
    return Run(
        name=text("name"),
        engine=text("engine"),
        rows=tally.written,
        tally=tally,
        splits=splits,
        output_files=output_files,
        output_bytes=output_bytes,
        metrics=metrics,
        guards=guards,
        run_id=run,
        resumed_splits=splits,
        resumed_rows=tally.written,
        quarantine=text("quarantine"),
        already_done=True,
    )


_READ = -1  # in OpTime
_USUAL: dict[str, Any] = {
    "run_id": "",
    "sessions": 1,
    "resumed_splits": 0,
    "resumed_rows": 0,
    "retries": 0,
    "workers_lost": 0,
    "quarantine": "",
    "finished": True,
    "already_done": False,
    "guards": {},
    "nodes": 0,
    "spilled_bytes": 0,
}


@dataclass(slots=True)
class _StageSum:
    steps: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    rows: int = 0
    bytes: int = 0
    workers: set[int] = field(default_factory=set[int])
    ops: dict[int, list[float]] = field(default_factory=dict[int, list[float]])  # op -> [wall_s, rows in, rows out]


class RunRecorder:
    """An observer. `run()` may be called at any time; after RunFinished it is final."""

    def __init__(self) -> None:
        self._started: RunStarted | None = None
        self._finished: RunFinished | None = None
        self._last_s = 0.0
        self._first_output_s: float | None = None
        self._tally = Tally()
        self._splits = 0
        self._retries = 0
        self._lost: set[int] = set()
        self._place: dict[int, int] = {}  # worker that replaced another -> the first one in its place
        self._notes: list[str] = []
        self._files = 0
        self._file_bytes = 0
        self._peak_in_flight = 0
        self._spilled = 0
        self._peak_rss = 0
        self._nodes = 0
        self._most_budget = 0
        self._most: dict[str, int] = {}  # pool -> the most workers at a time, where they come and go
        self._stages: dict[int, _StageSum] = {}
        self._stage_pool: dict[int, str] = {}
        self._pools: dict[str, list[float]] = {}  # pool -> [busy_s, cpu_s]

    def on_event(self, event: RunEvent) -> None:
        self._last_s = max(self._last_s, event.at_s)
        match event:
            case StepFinished():
                self._step(event)
            case SplitSettled():
                self._splits += 1
                if event.receipt is not None:
                    self._files += len(event.receipt.outputs)
                    self._file_bytes += sum(o.bytes for o in event.receipt.outputs)
                    if event.receipt.rows:
                        self._output_at(event.at_s)
            case MemorySampled():
                self._peak_in_flight = max(self._peak_in_flight, event.in_flight_bytes)
                self._peak_rss = max(self._peak_rss, event.rss_bytes)
            case ClusterSampled():
                self._nodes = max(self._nodes, event.nodes)
                self._most_budget = max(self._most_budget, event.budget_bytes)
                for pool, workers in event.workers.items():
                    self._most[pool] = max(self._most.get(pool, 0), workers)
            case SplitRetried():
                self._retries += 1
            case WorkerReplaced() if event.replaces is not None:
                self._place[event.worker] = self._place.get(event.replaces, event.replaces)
            case WorkerGone():
                self._lost.add(event.worker)
            case BlocksSpilled():
                self._spilled += event.bytes
            case Noted():
                if len(self._notes) < MOST_NOTES:
                    self._notes.append(event.text.partition("\n")[0])
            case RunStarted():
                self._started = event
                self._tally = event.tally
            case RunFinished():
                self._finished = event
                self._tally = event.tally

    def close(self) -> None:
        """Nothing to restore."""

    def run(self) -> Run:
        started = self._started or RunStarted(self._last_s, "", "", {}, {}, {}, 0)
        end_s = self._finished.at_s if self._finished else self._last_s
        wall_s = max(0.0, end_s - started.at_s)
        stages = tuple(self._stage_time(started, id) for id in sorted(self._stages))
        most = {name: max(workers, self._most.get(name, 0)) for name, workers in started.pools.items()}
        pools = tuple(self._pool_time(name, workers, wall_s) for name, workers in most.items())
        metrics, guards = split_guards(self._finished.metrics if self._finished else {}, started.ops)
        return Run(
            name=started.name,
            engine=started.engine,
            rows=self._tally.written,
            tally=self._tally,
            splits=started.settled + self._splits,
            wall_s=wall_s,
            first_output_s=None if self._first_output_s is None else self._first_output_s - started.at_s,
            stages=stages,
            pools=pools,
            bottleneck=find_bottleneck(pools, stages, wall_s),
            peak_in_flight_bytes=self._peak_in_flight,
            peak_rss_bytes=self._peak_rss,
            spilled_bytes=self._spilled,
            budget_bytes=max(started.budget_bytes, self._most_budget),
            output_files=self._files,
            output_bytes=self._file_bytes,
            metrics=metrics,
            guards=guards,
            notes=(*started.notes, *self._notes, *_savings(started, stages)),
            error=self._finished.error if self._finished else "",
            run_id=started.run,
            sessions=started.sessions,
            resumed_splits=started.settled,
            resumed_rows=started.tally.written,
            retries=self._retries,
            workers_lost=len(self._lost),
            quarantine=started.quarantine,
            nodes=self._nodes,
            finished=self._finished is not None and not self._finished.error,
        )

    def _step(self, event: StepFinished) -> None:
        timing = event.timing
        stage = self._stages.setdefault(event.stage, _StageSum())
        stage.steps += 1
        stage.busy_s += timing.wall_s
        stage.cpu_s += timing.cpu_s
        stage.rows += event.rows
        stage.bytes += event.bytes
        stage.workers.add(self._place.get(event.worker, event.worker))
        self._stage_pool.setdefault(event.stage, event.pool)
        for op in timing.ops:
            total = stage.ops.setdefault(op.op, [0.0, 0, 0])
            total[0] += op.wall_s
            total[1] += op.rows_in
            total[2] += op.rows_out
        pool = self._pools.setdefault(event.pool, [0.0, 0.0])
        pool[0] += timing.wall_s
        pool[1] += timing.cpu_s
        self._tally += event.tally
        if event.tally.written:
            self._output_at(event.at_s)

    def _output_at(self, at_s: float) -> None:
        if self._first_output_s is None:
            self._first_output_s = at_s

    def _stage_time(self, started: RunStarted, id: int) -> StageTime:
        total = self._stages[id]
        name, pool = started.stages.get(id, (f"stage {id}", self._stage_pool[id]))
        order = sorted(total.ops, key=lambda op: (op < -1, op))  # reading, the plan's operators, cutting, writing
        operators = tuple(
            OperatorTime(op, started.ops.get(op) or OP_NAMES.get(op, f"operator {op}"), wall_s, int(rows_in), int(rows_out))
            for op in order
            for wall_s, rows_in, rows_out in [total.ops[op]]
        )
        return StageTime(
            id, name, pool, len(total.workers), total.steps, total.busy_s, total.cpu_s, total.rows, total.bytes, operators
        )

    def _pool_time(self, name: str, workers: int, wall_s: float) -> PoolTime:
        busy_s, cpu_s = self._pools.get(name, (0.0, 0.0))
        return PoolTime(name, workers, busy_s, cpu_s, _share(busy_s, workers, wall_s))


def _savings(started: RunStarted, stages: tuple[StageTime, ...]) -> Iterator[str]:
    """What several models in one pass have saved: all that came before them would have been done once for each."""
    for names, first in started.shared:
        before_s = sum(op.wall_s for stage in stages for op in stage.operators if 0 <= op.op < first)
        before_s += max((op.wall_s for stage in stages for op in stage.operators if op.op == _READ), default=0.0)
        saved_s = (len(names) - 1) * before_s
        if saved_s >= 0.05:
            listed = ", ".join(names)
            once = f"what comes before them was done once, {saved_s:.1f} s of work less"
            yield f"{len(names)} models in one pass ({listed}): {once}"


@dataclass(frozen=True, slots=True)
class _Limit:
    kind: Literal["pool", "stage"]
    name: str
    workers: int
    busy_s: float
    stages: tuple[StageTime, ...]

    @property
    def least_s(self) -> float:
        """The run can't be quicker than this."""
        return self.busy_s / max(1, self.workers)


def find_bottleneck(pools: tuple[PoolTime, ...], stages: tuple[StageTime, ...], wall_s: float) -> Bottleneck | None:
    """The limit that the run came nearest to, by the model in this module's docstring; None when nothing ran."""
    limits = [_Limit("pool", p.name, p.workers, p.busy_s, tuple(s for s in stages if s.pool == p.name)) for p in pools]
    size = {p.name: p.workers for p in pools}
    # A stage counts by itself only where it left workers of its pool out: few splits, or few replicas of a model.
    limits += [_Limit("stage", s.name, s.workers, s.busy_s, (s,)) for s in stages if s.workers < size.get(s.pool, 0)]
    nearest = max(limits, key=lambda limit: limit.least_s, default=None)  # the pool first where both are as near
    if nearest is None or nearest.busy_s <= 0 or wall_s <= 0:
        return None
    relieved_s = max(limit.busy_s / (limit.workers + 1) if limit is nearest else limit.least_s for limit in limits)
    operators: dict[str, float] = {}
    for stage in nearest.stages:
        for op in stage.operators or (OperatorTime(-3, stage.name, stage.busy_s, 0, 0),):
            operators[op.name] = operators.get(op.name, 0.0) + op.wall_s
    operator = max(operators, key=lambda name: operators[name])
    return Bottleneck(
        kind=nearest.kind,
        name=nearest.name,
        workers=nearest.workers,
        share=_share(nearest.busy_s, nearest.workers, wall_s),
        stage=max(nearest.stages, key=lambda s: s.busy_s).name,
        operator=operator,
        operator_share=min(1.0, operators[operator] / nearest.busy_s),
        what_if_s=max(0.0, wall_s - nearest.least_s + min(nearest.least_s, relieved_s)),
    )


def _share(busy_s: float, workers: int, wall_s: float) -> float:
    return min(1.0, busy_s / (wall_s * max(1, workers))) if wall_s > 0 else 0.0


def plain(value: Any) -> Any:
    """A value as JSON has it; NaN and what is infinite as None."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
