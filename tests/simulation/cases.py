"""What is simulated: a case (plan, works, splits, machine), and the rows that must come out of it. Seeded random cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from msgspec import Struct, field
from msgspec.structs import replace

from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.splits import Fragment, Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.scheduler.messages import Limits, SchedulerPlan
from headrace.substrates.simulated import Rows, SimulatedProgram, Work, source_rows

DEVICE = "sim"


class Case(Struct, frozen=True):
    """One simulated run. listing_s, consumer_s: the longest that a listing and the consumer take.

    pressure_s: about how often the node's memory level changes, 0 for never. drain_s: when the run is asked to drain, None for
    never. crash: the event after which the driver dies, None for never. settled: what earlier sessions settled, by split, with
    the rows that passed each limit.
    """

    plan: SchedulerPlan
    program: SimulatedProgram
    splits: tuple[Split, ...]
    workers: tuple[WorkerSpec, ...]
    limits: Limits
    listing_s: float = 0.0
    consumer_s: float = 0.0
    pressure_s: float = 0.0
    drain_s: float | None = None
    crash: int | None = None
    settled: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict[int, tuple[tuple[int, int], ...]])
    seed: int = 0

    @property
    def delivers(self) -> bool:
        return any(s.end is End.DELIVER for s in self.plan.stages)


def expected(case: Case) -> dict[int, list[int]]:
    """Split index -> the rows that must come out, in order; splits behind the one that a limit is reached in are absent."""
    left = {s.id: s.limit for s in case.plan.stages if s.limit is not None}
    found: dict[int, list[int]] = {}
    for split in case.splits:
        if any(n == 0 for n in left.values()):
            break
        rows: Rows = source_rows(split)
        for stage_id in case.plan.routes[-1].stages:
            if stage_id in left:
                rows = rows[: left[stage_id]]
                left[stage_id] -= len(rows)
            rows = case.program.works[stage_id].good(rows)
            if not case.plan.stages[stage_id].model:
                rows = case.program.works[stage_id].of(rows)
        found[split.index] = list(rows)
    return found


def make_splits(rows: Sequence[int]) -> tuple[Split, ...]:
    return tuple(Split(i, (Fragment(f"f{i}", 10 * n, "v"),), 10 * n + 1, n) for i, n in enumerate(rows))


def make_workers(cpus: int, devices: int) -> tuple[WorkerSpec, ...]:
    pools = [CPU_POOL] * cpus + [DEVICE] * devices
    return tuple(WorkerSpec(i, pool, f"{pool}:{i}") for i, pool in enumerate(pools))


def on_nodes(workers: tuple[WorkerSpec, ...], nodes: int) -> tuple[WorkerSpec, ...]:
    """The workers, on so many machines; 0: on one that has no name."""
    return tuple(replace(w, node=f"node{i % nodes}") for i, w in enumerate(workers)) if nodes else workers


class Table(Struct):
    """Builds a stage table link by link."""

    stages: list[Stage] = field(default_factory=list[Stage])
    works: dict[int, Work] = field(default_factory=dict[int, Work])

    def add(
        self,
        order: Order,
        work: Work | None = None,
        *,
        end: End = End.NEXT,
        pool: str = CPU_POOL,
        model: bool = False,
        limit: int | None = None,
        max_workers: int | None = None,
        batch_rows: int = 256,
        transient: tuple[str, ...] = (),
        keep: tuple[str, ...] | None = None,
    ) -> int:
        i = len(self.stages)
        name = f"{order.value}{i}"
        self.stages.append(
            Stage(
                i,
                name,
                pool,
                order,
                end,
                i,
                i + 1,
                model=model,
                keep=keep,
                transient=transient,
                max_workers=max_workers,
                limit=limit,
                batch_rows=batch_rows,
            )
        )
        self.works[i] = work or Work()
        return i

    def plan(self, pools: Mapping[str, int], *routes: tuple[int, ...]) -> SchedulerPlan:
        used = routes or (tuple(range(len(self.stages))),)
        return SchedulerPlan(tuple(self.stages), tuple(Route(f"r{i}", r) for i, r in enumerate(used)), dict(pools))


def random_case(seed: int) -> Case:
    """A case of any kind that the planner can make, and then some: everything that may differ is drawn from the seed."""
    rnd = Random(seed)
    cpus = rnd.choice((1, 1, 2, 2, 3, 4, 8, 16))
    devices = rnd.choice((1, 1, 2, 4))
    splits = make_splits(_split_rows(rnd))
    total = sum(s.rows or 0 for s in splits)
    kind = rnd.randrange(10)
    if kind < 2:
        plan = _fused(rnd, cpus)
    elif kind == 2:
        plan = _video(rnd, cpus, devices)
        splits = make_splits([min(s.rows or 0, 3) for s in splits[:4]])
    else:
        plan = _chain(rnd, cpus, devices, total)
    schedule, works = plan
    if min(work.block_rows for work in works.values()) == 1:  # as many events as rows: keep it quick
        splits = make_splits([min(s.rows or 0, 8) for s in splits])
    block = rnd.choice((1, 50, 100, 400))
    limits = Limits(
        budget_bytes=rnd.choice((1, 300, 2_000, 20_000, 1 << 30, 1 << 30)),
        block_bytes=block,
        credit_bytes=rnd.choice((1, block, 4 * block)),
        deliver_blocks=rnd.choice((1, 2, 4)),
    )
    program = SimulatedProgram(
        schedule.stages,
        works,
        seed=seed,
        jitter=rnd.choice((0.0, 0.5, 1.0)),
        start_s=rnd.choice((0.0, 0.01, 1.0)),
        free_s=rnd.choice((0.0, 0.001, 0.1)),
    )
    workers = on_nodes(make_workers(cpus, schedule.pools.get(DEVICE, 0)), Random(seed + 3).choice((0, 0, 1, 2, 4)))
    return Case(
        schedule,
        program,
        splits,
        workers,
        limits,
        listing_s=rnd.choice((0.0, 0.01, 0.5)),
        consumer_s=rnd.choice((0.0, 0.001, 0.3)),
        seed=seed,
    )


def small_case(seed: int) -> Case:
    """One to eight splits of a few rows into a sink, for one to three workers of a pool: rows fail, and some kill."""
    rnd = Random(seed)
    cpus, devices = rnd.choice((1, 2, 2, 3)), rnd.choice((1, 2))
    splits = make_splits([rnd.choice((0, 1, 3, 6, 6)) for _ in range(rnd.choice((1, 2, 3, 4, 5, 8)))])
    total = sum(s.rows or 0 for s in splits)
    limited = rnd.random() < 0.4
    plan, works = _fused(rnd, cpus) if rnd.random() < 0.2 else _chain(rnd, cpus, devices, total)
    while any(s.end is End.DELIVER for s in plan.stages) or (limited and all(s.limit is None for s in plan.stages)):
        plan, works = _chain(rnd, cpus, devices, total)
    works = {stage: replace(work, block_rows=rnd.choice((2, 3, 6))) for stage, work in works.items()}
    same = [(1, 2)] if len(plan.routes) > 1 else [(stage,) for stage in works]  # a row's way must not matter
    for stages in same:
        if rnd.random() < 0.3:
            bad = rnd.choice((2, 3, 5))
            works |= {stage: replace(works[stage], bad=bad) for stage in stages}
    rows = [row for split in splits for row in source_rows(split)]
    if rows and rnd.random() < 0.15:
        poison = frozenset({rnd.choice(rows)})
        works |= {stage: replace(works[stage], poison=poison) for stage in rnd.choice(same)}
    block = rnd.choice((1, 50, 400))
    limits = Limits(
        budget_bytes=rnd.choice((300, 2_000, 1 << 30)),
        block_bytes=block,
        credit_bytes=rnd.choice((1, block, 4 * block)),
        fail_on_bad_rows=False,
    )
    program = SimulatedProgram(plan.stages, works, seed=seed, jitter=rnd.choice((0.0, 1.0)), start_s=rnd.choice((0.0, 0.01)))
    workers = make_workers(cpus, plan.pools.get(DEVICE, 0))
    return Case(plan, program, splits, workers, limits, listing_s=rnd.choice((0.0, 0.01, 0.1)), seed=seed)


def _split_rows(rnd: Random) -> list[int]:
    count = rnd.choice((0, 1, 1, 2, 3, 5, 8, 12, 12, 25))
    most = rnd.choice((1, 10, 40, 100))
    empty = rnd.choice((0.0, 0.1, 0.5))
    return [0 if rnd.random() < empty else rnd.choice((rnd.randint(0, most), most)) for _ in range(count)]


def _work(rnd: Random, *, expands: bool = True) -> Work:
    return Work(
        step_s=rnd.choice((0.0, 1e-4, 1e-2)),
        row_s=rnd.choice((0.0, 1e-5, 1e-3)),
        block_rows=rnd.choice((1, 4, 10, 25)),
        row_bytes=rnd.choice((1, 10)),
        expand=rnd.choice((1, 1, 1, 3)) if expands else 1,
        drop=rnd.choice((0, 0, 0, 2, 3)),
        step_blocks=rnd.choice((1, 2, 1 << 30)),
    )


def _fused(rnd: Random, cpus: int) -> tuple[SchedulerPlan, dict[int, Work]]:
    """Everything in one stage; with a second route, reading apart from computing."""
    table = Table()
    work = _work(rnd)
    if rnd.random() < 0.4:
        table.add(Order.SOURCE, work, end=End.SINK)
        return table.plan({CPU_POOL: cpus}), table.works
    read = table.add(Order.SOURCE, Work(block_rows=rnd.choice((1, 5))))
    compute = table.add(Order.FREE, work)
    fused = table.add(Order.SOURCE, work, end=End.SINK)
    write = table.add(Order.SPLIT, Work(step_blocks=rnd.choice((1, 1 << 30))), end=End.SINK)
    return table.plan({CPU_POOL: cpus}, (fused,), (read, compute, write)), table.works


def _video(rnd: Random, cpus: int, devices: int) -> tuple[SchedulerPlan, dict[int, Work]]:
    """Each row becomes 300, which feed two models."""
    table = Table()
    table.add(Order.SOURCE, Work(block_rows=1))
    table.add(Order.FREE, Work(block_rows=rnd.choice((20, 50)), expand=300), transient=("frame",))
    for last in (False, True):
        table.add(
            Order.FREE,
            Work(step_s=1e-3, row_bytes=1),
            pool=DEVICE,
            model=True,
            batch_rows=rnd.choice((1, 32, 256)),
            keep=None if not last and rnd.random() < 0.3 else ("id",),
        )
    _finish(rnd, table)
    return table.plan({CPU_POOL: cpus, DEVICE: devices}), table.works


def _chain(rnd: Random, cpus: int, devices: int, total: int) -> tuple[SchedulerPlan, dict[int, Work]]:
    table = Table()
    table.add(Order.SOURCE, _work(rnd))
    expands = 1
    for _ in range(rnd.choice((1, 1, 2, 3, 4))):
        link = rnd.choice(("free", "model", "model", "split", "limit"))
        cap = rnd.choice((None, None, 1, 2))
        if link == "free":
            table.add(Order.FREE, _work(rnd, expands=expands < 2), max_workers=cap)
            expands += table.works[len(table.stages) - 1].expand > 1
        elif link == "split":
            table.add(Order.SPLIT, _work(rnd, expands=False), max_workers=cap)
        elif link == "limit":
            rows = rnd.choice((0, 1, 10, rnd.randint(0, total + 1), rnd.randint(0, total + 1), total, total + 5))
            table.add(Order.GLOBAL, _work(rnd, expands=False), limit=rows)
        else:
            pool = rnd.choice((DEVICE, DEVICE, CPU_POOL))
            table.add(
                Order.FREE,
                Work(step_s=rnd.choice((1e-4, 1e-2)), row_bytes=1),
                pool=pool,
                model=True,
                max_workers=cap,
                batch_rows=rnd.choice((1, 16, 256)),
                keep=rnd.choice((None, ("id",))),
            )
    _finish(rnd, table)
    pools = {CPU_POOL: cpus}
    if any(s.pool == DEVICE for s in table.stages):
        pools[DEVICE] = devices
    return table.plan(pools), table.works


def _finish(rnd: Random, table: Table) -> None:
    """Give the chain its end: a consumer, the last sequence itself as the sink, or a sink of its own."""
    last = table.stages[-1]
    if rnd.random() < 0.4:
        ends = End.DELIVER
    elif last.order in (Order.SPLIT, Order.GLOBAL) and rnd.random() < 0.5:
        ends = End.SINK
    else:
        table.add(Order.SPLIT, Work(step_blocks=rnd.choice((1, 1 << 30))), end=End.SINK)
        return
    table.stages[-1] = Stage(**{name: getattr(last, name) for name in Stage.__struct_fields__ if name != "end"}, end=ends)
