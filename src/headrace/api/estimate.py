"""From the steps of a rehearsal to what the whole run would take. Pure but for `Steps`, an observer that collects them.

Each worker's first step of a stage holds imports, the construction of models and warming up; it says nothing of rows, and what
it takes beyond a warm step's time is start-up. Of functions and models that are called with batches the warm steps tell two
numbers: seconds a call and seconds a row (rehearsed splits come in two sizes), since the whole run has larger batches than a
rehearsal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev

from msgspec import Struct

from headrace.api.sampling import Sample
from headrace.core.events import MemorySampled, RunEvent, RunStarted, StepFinished, StepStarted
from headrace.core.options import BlockLimits
from headrace.core.resources import CPU_POOL
from headrace.core.stages import Stage
from headrace.core.steps import OpTime
from headrace.observe.rehearsal import OperatorCost, StageCost
from headrace.plan.nodes import (
    AUTO_BATCH_ROWS,
    Evaluate,
    FilterExpr,
    FilterRows,
    FlatMap,
    MapBatches,
    MapRows,
    Op,
    Predict,
    Project,
)
from headrace.plan.physical import MODEL_ROWS
from headrace.worker.cursor import READ, WRITE

QUICK_S = 0.3
LEAST_ERROR = 0.1  # of an estimate, relative: machines are not steadier than that
MOST_ERROR = 0.7
SAVING_ERROR = 0.25  # relative, of what larger batches than the rehearsed ones are thought to save
BLOCK_ROWS = 4096  # that operators take in one go; blocks of a run mostly have more rows
GROUP_BYTES = 32 << 20  # a row group being written, see connectors/sinks/parquet


class _Step(Struct, frozen=True):
    worker: int
    stage: int
    first: bool
    idle_s: float  # of the step, outside of operators
    ops: tuple[OpTime, ...]


class Steps:
    """The observer. boot_s: until the first worker began. base_bytes, peak_bytes: anonymous memory at the start and at most."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.bytes: dict[int, list[int]] = {}  # stage -> [bytes, rows] that left it
        self.boot_s = 0.0
        self.base_bytes = 0
        self.peak_bytes = 0
        self._started_s = 0.0
        self._begun: set[tuple[int, int]] = set()

    def on_event(self, event: RunEvent) -> None:
        match event:
            case RunStarted():
                self._started_s = event.at_s
            case StepStarted() if not self._begun and not self.steps and not self.boot_s:
                self.boot_s = event.at_s - self._started_s
            case StepFinished() if event.timing.ops:
                key = (event.worker, event.stage)
                idle_s = max(0.0, event.timing.wall_s - sum(op.wall_s for op in event.timing.ops))
                self.steps.append(_Step(event.worker, event.stage, key not in self._begun, idle_s, event.timing.ops))
                self._begun.add(key)
                left = self.bytes.setdefault(event.stage, [0, 0])
                left[0] += event.bytes
                left[1] += event.rows if event.bytes else 0
            case MemorySampled():
                self.base_bytes = self.base_bytes or event.rss_bytes
                self.peak_bytes = max(self.peak_bytes, event.rss_bytes)
            case _:
                pass

    def close(self) -> None:
        """Nothing to restore."""


class Cost(Struct, frozen=True):
    """Of one operator in one stage. error: relative standard error. startup_s: what a worker's first step took beyond. rows:
    that came in. warm: there were steps after the first ones.
    """

    s_per_row: float
    error: float = 0.0
    startup_s: float = 0.0
    rows: int = 0
    warm: bool = True


Times = Sequence[tuple[bool, float, int]]  # of an operator's steps: whether a worker's first, seconds, rows in


def operator_cost(times: Times, batch_rows: int | None) -> Cost:
    """batch_rows: of a call in the whole run; None: what a call costs does not matter."""
    rows = sum(n for *_, n in times)
    warm = [(s, n) for first, s, n in times if not first]
    if not sum(n for _, n in warm):  # nothing but first steps: their time is work, for want of better
        rate = sum(s for _, s, _ in times) / rows if rows else 0.0
        return Cost(rate, MOST_ERROR, 0.0, rows, not rows)
    mean = sum(s for s, _ in warm) / sum(n for _, n in warm)
    call_s, row_s = _fit(warm, batch_rows) if batch_rows else (0.0, mean)
    startup_s = max((s - call_s * _calls(n, batch_rows) - row_s * n for first, s, n in times if first), default=0.0)
    per_row = row_s + call_s / (batch_rows or 1)
    saved = max(0.0, 1 - per_row / mean) if mean > 0 else 0.0
    error = math.hypot(_spread([s / n for s, n in warm if n]), SAVING_ERROR * saved)
    return Cost(per_row, error, max(0.0, startup_s), rows)


def _calls(rows: int, batch_rows: int | None) -> int:
    return -(-rows // (batch_rows or 1))


def _fit(warm: Sequence[tuple[float, int]], batch_rows: int) -> tuple[float, float]:
    """(seconds of a call, seconds of a row), neither negative: least squares of relative errors. All is put on the rows where
    the steps' sizes don't tell these apart.
    """
    points = [(_calls(n, batch_rows) / s, n / s) for s, n in warm if n and s > 0]
    mean = sum(s for s, _ in warm) / sum(n for _, n in warm)
    if len(points) < len(warm):  # a step only went on with a batch: sizes don't tell
        return 0.0, mean
    cc, cn, nn = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    c, n = sum(p[0] for p in points), sum(p[1] for p in points)
    det = cc * nn - cn * cn
    if det <= 1e-3 * cc * nn:
        return 0.0, mean
    call_s, row_s = (c * nn - n * cn) / det, (n * cc - c * cn) / det
    if row_s < 0:
        return c / cc, 0.0
    return (call_s, row_s) if call_s >= 0 else (0.0, n / nn)


def _spread(rates: Sequence[float]) -> float:
    """Relative standard error of their mean."""
    if len(rates) < 2 or fmean(rates) <= 0:
        return 0.3
    return pstdev(rates) / fmean(rates) / (len(rates) - 1) ** 0.5


class Estimate(Struct, frozen=True):
    """Of the whole run. expected_s and its range are None when nothing was measured."""

    stages: tuple[StageCost, ...]
    bottleneck: str
    startup_s: float
    expected_s: float | None
    low_s: float | None
    high_s: float | None
    memory_bytes: int
    rows_out: int | None
    warm: bool


class Output(Struct, frozen=True):
    """Of the rehearsed rows: how many came out, their Arrow size, and what one more costs in a Parquet file."""

    rows: int = 0
    arrow_bytes: int = 0
    row_bytes: float = 0.0
    row_s: float = 0.0


class Situation(Struct, frozen=True):
    """What the run has. workers: of each pool. limits: rows of each Limit, by operator. trial_workers: that were rehearsed
    with.

    remote: reading goes on beside computing. processes: each worker has memory of its own.
    """

    ops: Sequence[Op]
    stages: Sequence[Stage]
    route: Sequence[int]
    workers: Mapping[str, int]
    trial_workers: int
    limits: Mapping[int, int]
    block: BlockLimits
    budget_bytes: int
    remote: bool
    processes: bool


def estimate(steps: Steps, sample: Sample, output: Output, run: Situation) -> Estimate:
    """See the module's docstring and observe/rehearsal."""
    factor = _factor(steps, sample, run)
    times: dict[tuple[int, int], list[tuple[bool, float, int]]] = {}
    for step in steps.steps:
        for op in step.ops:
            times.setdefault((step.stage, op.op), []).append((step.first, op.wall_s, op.rows_in))
    stages: list[StageCost] = []
    costs: dict[tuple[int, str], Cost] = {}
    for id in run.route:
        stage = run.stages[id]
        operators = _operators(id, times, sample, output, run, factor, costs)
        stages.append(_stage(stage, operators, steps, output, run))
    measured = bool(times) and sample.rows_expected is not None
    limit = _nearest(stages, run)
    startup_s = max((s.startup_s for s in stages), default=0.0) + steps.boot_s
    memory = _memory(steps, sample, output, run)
    rows_out = None if sample.rows_expected is None or not sample.rows else round(output.rows * factor)
    if not measured or limit is None:
        return Estimate(tuple(stages), "", startup_s, None, None, None, memory, rows_out, False)
    name, group, work_s = limit
    low, high = _range(group, costs, work_s, sample, run)
    return Estimate(
        tuple(stages),
        name,
        startup_s,
        startup_s + work_s,
        startup_s + low,
        startup_s + high,
        memory,
        rows_out,
        all(c.warm for c in costs.values()),
    )


def _factor(steps: Steps, sample: Sample, run: Situation) -> float:
    """How many rows of the whole run each rehearsed one stands for; fewer where a limit ends the run earlier."""
    if not sample.rows or sample.rows_expected is None:
        return 0.0
    factor = sample.rows_expected / sample.rows
    for op, limit in run.limits.items():
        came = sum(t.rows_in for s in steps.steps for t in s.ops if t.op == op)
        if came * factor > limit:
            factor = limit / came
    return factor


def _batch_rows(op: Op) -> int | None:
    if isinstance(op, Predict):
        return op.batch_rows or MODEL_ROWS
    if isinstance(op, MapBatches):
        return op.batch_rows or AUTO_BATCH_ROWS
    if isinstance(op, MapRows | FlatMap | FilterRows):  # rows are made of a block, and a block of rows
        return AUTO_BATCH_ROWS
    return BLOCK_ROWS if isinstance(op, FilterExpr | Project | Evaluate) else None


def _operators(
    id: int,
    times: Mapping[tuple[int, int], Times],
    sample: Sample,
    output: Output,
    run: Situation,
    factor: float,
    costs: dict[tuple[int, str], Cost],
) -> tuple[OperatorCost, ...]:
    """Of a stage, in the order in which rows pass: reading by the sample's own measure, writing by the trial of encoding."""
    out: list[OperatorCost] = []
    first, last = id == run.route[0], id == run.route[-1]
    stage = run.stages[id]
    for op in (READ, *range(stage.first, stage.stop), WRITE):
        if op == READ and first:
            cost = Cost(sample.read_s_per_row, sample.read_error, 0.0, sample.rows)
        elif op == WRITE and last:
            cost = Cost(output.row_s, 0.0, 0.0, output.rows)
        else:
            cost = operator_cost(times.get((id, op), ()), _batch_rows(run.ops[op]) if op >= 0 else BLOCK_ROWS)
        name = {READ: "read" if first else "take blocks", WRITE: "write" if last else "hand on"}.get(op) or run.ops[op].name
        made = OperatorCost(name, cost.s_per_row, cost.rows * factor, cost.startup_s if op >= 0 else 0.0)
        if op >= 0 or made.s_per_row > 0:
            out.append(made)
            costs[id, name] = cost
    return tuple(out)


def _stage(stage: Stage, operators: tuple[OperatorCost, ...], steps: Steps, output: Output, run: Situation) -> StageCost:
    workers = run.workers.get(stage.pool, 1)
    workers = workers if stage.max_workers is None else min(workers, stage.max_workers)
    came = operators[0].rows if operators else 0.0
    size, rows = steps.bytes.get(stage.id, (0, 0))
    if stage.id == run.route[-1]:
        size, rows = output.arrow_bytes, output.rows
    return StageCost(
        stage_name(stage),
        stage.pool,
        workers,
        sum(op.work_s for op in operators) / came if came else sum(op.s_per_row for op in operators),
        size / rows if rows else 0.0,
        sum(op.startup_s for op in operators) + _construction_s(stage.id, steps),
        operators,
    )


def stage_name(stage: Stage) -> str:
    """Without the sink, which is the rehearsal's own."""
    return "write" if stage.name == "write_check" else stage.name.removesuffix(" > write_check")


def _construction_s(stage: int, steps: Steps) -> float:
    """What a worker's first step of a stage takes outside of operators, beyond the later ones: functions are made there."""
    first = [s.idle_s for s in steps.steps if s.stage == stage and s.first]
    later = [s.idle_s for s in steps.steps if s.stage == stage and not s.first]
    return max(0.0, max(first, default=0.0) - (median(later) if later else 0.0))


def _pool_s(stages: Sequence[StageCost], workers: int, remote: bool) -> float:
    """Of a pool: its work over its workers. Reading from remote storage goes on beside computing in the same worker."""
    read_s = sum(op.work_s for s in stages for op in s.operators if op.name == "read")
    work_s = sum(s.work_s for s in stages)
    return (max(read_s, work_s - read_s) if remote else work_s) / max(1, workers)


def _nearest(stages: Sequence[StageCost], run: Situation) -> tuple[str, list[StageCost], float] | None:
    """(in words, its stages, seconds) of the pool, or the stage with few workers, that takes longest."""
    limits: list[tuple[float, int, str, list[StageCost]]] = []
    for pool, workers in run.workers.items():
        own = [s for s in stages if s.pool == pool]
        if own:
            limits.append((_pool_s(own, workers, run.remote), workers, pool, own))
        limits += [(_pool_s([s], s.workers, run.remote), s.workers, pool, [s]) for s in own if s.workers < workers]
    if not limits or max(limits)[0] <= 0:
        return None
    seconds, workers, pool, own = max(limits, key=lambda limit: limit[0])
    operators = [op for s in own for op in s.operators]
    slowest = max(operators, key=lambda op: op.work_s)
    share = slowest.work_s / max(1e-12, sum(op.work_s for op in operators))
    return f"{slowest.name}, {share:.0%} of the work of the {pool} workers ({workers})", own, seconds


def _range(
    own: Sequence[StageCost], costs: Mapping[tuple[int, str], Cost], work_s: float, sample: Sample, run: Situation
) -> tuple[float, float]:
    """Two standard errors around, and QUICK_S, which a machine's moods can cost."""
    total = sum(op.work_s for s in own for op in s.operators)
    error = 0.0
    by_name = {stage_name(run.stages[id]): id for id in run.route}
    for stage in own:
        for op in stage.operators:
            cost = costs[by_name[stage.name], op.name]
            share = op.work_s / total if total else 0.0
            error += (share * cost.error) ** 2
    error = min(MOST_ERROR, max(LEAST_ERROR, 2 * (error + sample.rows_error**2) ** 0.5))
    return max(0.0, work_s * (1 - error) - QUICK_S), work_s * (1 + error) + QUICK_S


def _memory(steps: Steps, sample: Sample, output: Output, run: Situation) -> int:
    """Driver and libraries as they were; what each worker added; for each worker a block that is read, what is made of it, and
    a row group being written.
    """
    workers = sum(run.workers.values())
    grown = max(0, steps.peak_bytes - steps.base_bytes)
    if run.processes:
        grown = grown * workers // max(1, run.trial_workers)
    read_bytes = sum(p.arrow_bytes for p in sample.places)
    row_bytes = read_bytes / max(1, sum(p.rows for p in sample.places))
    rows = min(run.block.max_rows, run.block.target_bytes / max(1.0, row_bytes))
    if sample.rows_expected is not None:
        rows = min(rows, sample.rows_expected)
    out_row_bytes = output.arrow_bytes / output.rows if output.rows else 0.0
    block = min(rows * row_bytes, run.block.target_bytes) + rows * out_row_bytes
    cpu = run.workers.get(CPU_POOL, 1)
    writing = min(GROUP_BYTES, (sample.rows_expected or rows) / cpu * out_row_bytes)
    return int(steps.base_bytes + grown + min(run.budget_bytes, cpu * block) + cpu * writing)
