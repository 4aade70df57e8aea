"""The scheduler alone, at the size of a large cluster: 1,000 workers and 1,000,000 splits in virtual time.

    python benchmarks/scheduler.py [--splits 1000000] [--workers 1000] [--profile]

Two plans: everything fused in one stage (a split takes three steps), and read -> model -> sink, where 100 devices are fed by
900 CPU workers. The listing is lazy. Reported: steps per second of time spent in `handle` alone (to reach: 20,000), steps per
second of the whole simulation, and resident memory after a tenth of the splits and at the end (to reach: flat).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from common import record

from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import (
    Drop,
    Finish,
    Limits,
    ListSplits,
    Release,
    SchedulerPlan,
    Settle,
    SplitsListed,
    Start,
    Submit,
)
from headrace.substrates.simulated import SimulatedProgram, SimulatedSubstrate, Work

SPLIT_ROWS = 3_000
BLOCK_ROWS = 1_000
STRETCH = 1.38  # what the simulation's jitter adds on average: one step in fifty takes twenty times as long


def fused(workers: int) -> tuple[SchedulerPlan, dict[int, Work]]:
    """One stage; the time slice ends after every block."""
    stages = (Stage(0, "read > work > write", CPU_POOL, Order.SOURCE, End.SINK, 0, 1),)
    works = {0: Work(step_s=0.01, row_s=1e-4, block_rows=BLOCK_ROWS, step_blocks=1)}
    return SchedulerPlan(stages, (Route("fused", (0,)),), {CPU_POOL: workers}), works


def three_stages(workers: int) -> tuple[SchedulerPlan, dict[int, Work]]:
    """Read -> model -> sink; CPUs and devices about equally loaded."""
    devices = max(1, workers // 10)
    stages = (
        Stage(0, "read", CPU_POOL, Order.SOURCE, End.NEXT, 0, 0),
        Stage(1, "model", "sim", Order.FREE, End.NEXT, 0, 1, model=True, batch_rows=256),
        Stage(2, "write", CPU_POOL, Order.SPLIT, End.SINK, 1, 1),
    )
    works = {
        0: Work(step_s=0.01, row_s=1e-4, block_rows=BLOCK_ROWS, row_bytes=1_000),
        1: Work(step_s=0.001, row_s=1.2e-5, row_bytes=4),
        2: Work(step_s=0.002, row_s=2e-6),
    }
    pools = {CPU_POOL: workers - devices, "sim": devices}
    return SchedulerPlan(stages, (Route("only", (0, 1, 2)),), pools), works


def run(plan: SchedulerPlan, works: dict[int, Work], splits: int) -> dict[str, float]:
    """One run to its end."""
    scheduler = Scheduler(plan, Limits(budget_bytes=64 << 30, credit_bytes=1 << 19))
    substrate = SimulatedSubstrate()
    program = SimulatedProgram(plan.stages, works, jitter=0.3, record=False)
    names = [pool for pool, count in plan.pools.items() for _ in range(count)]
    listing = _listing(splits)
    handle_s, steps, settled, finished = 0.0, 0, 0, False
    rss = {}
    clock = time.perf_counter
    events: list[Any] = [Start()]
    gc.collect()
    began = clock()
    substrate.start(program, [WorkerSpec(i, pool, pool) for i, pool in enumerate(names)])
    while not finished:
        for event in events:
            before = clock()
            commands = scheduler.handle(event)
            handle_s += clock() - before
            for command in commands:
                match command:
                    case Submit(step):
                        steps += 1
                        substrate.submit(step)
                    case Release(parts):
                        substrate.release(parts)
                    case ListSplits(count):
                        found = tuple(islice(listing, count))
                        substrate.later(0.0, SplitsListed(found, len(found) < count))
                    case Settle():
                        settled += 1
                        if settled == splits // 10:
                            rss["early"] = _rss_bytes()
                    case Finish():
                        finished = True
                    case Drop():
                        raise AssertionError("nothing is cancelled here")
                    case _:
                        raise AssertionError(command)
        events = substrate.wait(0.0)
    wall_s = clock() - began
    assert settled == splits
    busy_s = sum(_step_s(works, plan, name) for name in plan.pools) * splits
    return {
        "splits": splits,
        "workers": len(names),
        "steps": steps,
        "scheduler_us_per_step": round(handle_s / steps * 1e6, 1),
        "scheduler_steps_per_s": round(steps / handle_s),
        "simulation_steps_per_s": round(steps / wall_s),
        "virtual_s": round(substrate.now_s, 1),
        "virtual_s_ideal": round(busy_s, 1),
        "rss_mb_at_tenth": round(rss["early"] / 1e6, 1),
        "rss_mb_at_end": round(_rss_bytes() / 1e6, 1),
    }


def _step_s(works: dict[int, Work], plan: SchedulerPlan, pool: str) -> float:
    """Seconds per split that the pool needs with all its workers always busy; 0.0 unless it is the slower pool."""
    blocks = SPLIT_ROWS / BLOCK_ROWS
    needs = dict.fromkeys(plan.pools, 0.0)
    for stage in plan.stages:
        work = works[stage.id]
        needs[stage.pool] += STRETCH * (blocks * work.step_s + SPLIT_ROWS * work.row_s) / plan.pools[stage.pool]
    return needs[pool] if needs[pool] == max(needs.values()) else 0.0


def _listing(splits: int) -> Iterator[Split]:
    return (Split(i, (), 1 << 20, SPLIT_ROWS) for i in range(splits))


def _rss_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--profile", action="store_true", help="print where the time of a run of 20,000 splits goes")
    options = parser.parse_args()
    plans = {"fused": fused, "read > model > write": three_stages}
    if options.profile:
        import cProfile

        for make in plans.values():
            cProfile.runctx("run(*make(n), 20_000)", {"run": run, "make": make, "n": options.workers}, {}, sort="tottime")
        return
    record("scheduler", {name: run(*make(options.workers), options.splits) for name, make in plans.items()})


if __name__ == "__main__":
    main()
