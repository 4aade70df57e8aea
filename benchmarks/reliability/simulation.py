"""Simulated worlds: drivers that die, pause, compete and lose answers, on disks that forget, and workers that die.

    python benchmarks/reliability/simulation.py [--seeds 100000] [--share 0.5] [--bug-seeds 2000] [--processes 2]

Every seed is a world that runs to the end, with all that readers may rely on checked after each step. Of two kinds, `share`
of them of the second:
  commit      the production protocol, ledger and committer under a plain model of workers (tests/simulation/commit/world.py)
  scheduled   the production driver and scheduler as well, over simulated workers (tests/simulation/commit/scheduled.py)
Reported for each kind: seeds, violations (to reach: none), what the worlds went through, and for each planted bug the seed
that caught it first. Seeds count from 0 in each kind; a seed is the same world anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import record  # noqa: E402
from tests.simulation.commit.bugs import BUGS, plant  # noqa: E402
from tests.simulation.commit.scheduled import ScheduledWorld, run_scheduled  # noqa: E402
from tests.simulation.commit.scheduled_bugs import SCHEDULED_BUGS, plant_scheduled  # noqa: E402
from tests.simulation.commit.world import World, run_seed  # noqa: E402

SHARD = 250
STOPPED = "stopped: "
TAKEN_OVER = "another driver has taken over this run"


@dataclass(frozen=True)
class Kind:
    """How a world of this kind is run, and what may be planted in it."""

    run: Callable[[int], World]
    bugs: Sequence[str]
    plant: Callable[[str], AbstractContextManager[None]]


KINDS = {
    "commit": Kind(run_seed, tuple(BUGS), plant),
    "scheduled": Kind(run_scheduled, tuple(SCHEDULED_BUGS), plant_scheduled),
}


def run_shard(kind: str, seeds: Sequence[int]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for seed in seeds:
        try:
            world = KINDS[kind].run(seed)
        except Exception as problem:
            broken.append(f"{kind} {seed}: {str(problem).partition(chr(10))[0]}")
            continue
        counts["drivers"] += len(world.sessions)
        if isinstance(world, ScheduledWorld):
            counts += world.counts
            counts["worlds with a limit"] += world.limited
            counts["worlds with rows set aside"] += bool(world.aside)
        counts += Counter(map(_what, world.story))
    return counts, broken


def _what(line: str) -> str:
    """What a line of a world's story tells, without its numbers."""
    what = line.partition(" ")[2]
    if what.startswith("opened"):
        return "opened"
    what = what.removeprefix(STOPPED)
    if what.startswith("worker "):
        return "given up: a split's workers keep dying"
    return {"killed": "drivers killed", TAKEN_OVER: "takeovers", "power cut": "drivers lost in power cuts"}.get(what, what)


def first_caught(kind: str, name: str, seeds: int) -> int | None:
    with KINDS[kind].plant(name):
        for seed in range(seeds):
            try:
                KINDS[kind].run(seed)
            except AssertionError:
                return seed
    return None


def run_kind(kind: str, seeds: int, bug_seeds: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    broken: list[str] = []
    shards = [range(first, min(first + SHARD, seeds)) for first in range(0, seeds, SHARD)]
    for more, bad in pool.map(run_shard, repeat(kind), shards):
        counts += more
        broken += bad
    wall_s = time.perf_counter() - started
    names = KINDS[kind].bugs
    caught = dict(zip(names, pool.map(first_caught, repeat(kind), names, repeat(bug_seeds)), strict=True))
    return {
        "seeds": seeds,
        "violations": len(broken),
        "first_violations": broken[:10],
        "wall_s": round(wall_s, 1),
        "counts": dict(counts.most_common()),
        "bugs_caught_at_seed": caught,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100_000, help="of both kinds together")
    parser.add_argument("--share", type=float, default=0.5, help="of the seeds that run whole drivers")
    parser.add_argument("--bug-seeds", type=int, default=2_000)
    parser.add_argument("--processes", "--jobs", type=int, default=2)
    wanted = parser.parse_args()
    scheduled = round(wanted.seeds * wanted.share)
    seeds = {"commit": wanted.seeds - scheduled, "scheduled": scheduled}
    with ProcessPoolExecutor(wanted.processes) as pool:
        kinds = {kind: run_kind(kind, n, wanted.bug_seeds, pool) for kind, n in seeds.items() if n}
    violations = sum(found["violations"] for found in kinds.values())
    missed = [name for found in kinds.values() for name, seed in found["bugs_caught_at_seed"].items() if seed is None]
    figures = {"seeds": wanted.seeds, "violations": violations, "bugs_missed": missed, "kinds": kinds}
    record("reliability-simulation", figures)
    return 1 if violations or missed else 0


if __name__ == "__main__":
    sys.exit(main())
