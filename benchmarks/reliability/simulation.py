"""The commit protocol in simulated worlds: drivers that die, pause, compete and lose answers, on disks that forget.

    python benchmarks/reliability/simulation.py [--seeds 100000] [--bug-seeds 2000] [--jobs 2]

Every seed is a world (tests/simulation/commit/world.py) that runs the production protocol, ledger and committer to the end,
with all that readers may rely on checked after each step. Reported: seeds, violations (to reach: none), what the worlds went
through, and for each planted bug the seed that caught it first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import record  # noqa: E402
from tests.simulation.commit.bugs import BUGS, plant  # noqa: E402
from tests.simulation.commit.world import run_seed  # noqa: E402

SHARD = 500


def run_shard(seeds: Sequence[int]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    broken: list[str] = []
    for seed in seeds:
        try:
            world = run_seed(seed)
        except AssertionError as problem:
            broken.append(str(problem).splitlines()[0])
            continue
        counts["drivers"] += len(world.sessions)
        for line in world.story:
            what = line.partition(" ")[2]
            counts["opened" if what.startswith("opened") else what.removeprefix("stopped: ")] += 1
    return counts, broken


def first_caught(name: str, seeds: int) -> int | None:
    with plant(name):
        for seed in range(seeds):
            try:
                run_seed(seed)
            except AssertionError:
                return seed
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--bug-seeds", type=int, default=2_000)
    parser.add_argument("--jobs", type=int, default=2)
    wanted = parser.parse_args()
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    broken: list[str] = []
    shards = [range(first, min(first + SHARD, wanted.seeds)) for first in range(0, wanted.seeds, SHARD)]
    with ProcessPoolExecutor(wanted.jobs) as pool:
        for more, bad in pool.map(run_shard, shards):
            counts += more
            broken += bad
    wall_s = time.perf_counter() - started
    bugs = {name: first_caught(name, wanted.bug_seeds) for name in BUGS}
    events = ("opened", "done", "killed", "power cut", "another driver has taken over this run")
    events += ("another driver is at work on this run", "no space left")
    figures: dict[str, Any] = {
        "seeds": wanted.seeds,
        "violations": len(broken),
        "first_violations": broken[:10],
        "wall_s": round(wall_s, 1),
        "drivers": counts["drivers"],
        "events": {name: counts[name] for name in events},
        "bugs_caught_at_seed": bugs,
    }
    record("reliability-simulation", figures)
    return 1 if broken or None in bugs.values() else 0


if __name__ == "__main__":
    sys.exit(main())
