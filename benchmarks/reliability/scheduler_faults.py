"""The production scheduler in virtual time: deaths, poison, bad rows, storage trouble, pressure, drains, dead drivers.

    PYTHONPATH=. python benchmarks/reliability/scheduler_faults.py --seeds 20000 [--record]

Each seed is a random plan on random workers, once with troubles in one session (`run_troubled` in tests/simulation) and once in
several sessions that drain or whose driver dies (`run_resumed`). The output must be that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from common import record  # noqa: E402
from tests.simulation.test_random import run_resumed, run_troubled  # noqa: E402

KINDS: dict[str, Callable[[int], None]] = {"troubled": run_troubled, "sessions": run_resumed}


def run(kind: str, first: int, count: int) -> list[str]:
    """What went wrong with these seeds."""
    bad: list[str] = []
    for seed in range(first, first + count):
        try:
            KINDS[kind](seed)
        except Exception as error:
            bad.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:200]}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    began, chunk = time.perf_counter(), 250
    with ProcessPoolExecutor(args.processes) as pool:
        parts = [pool.submit(run, kind, at, chunk) for kind in KINDS for at in range(0, args.seeds, chunk)]
        bad = [text for part in parts for text in part.result()]
    figures = {
        "seeds_of_each_kind": args.seeds,
        "kinds": list(KINDS),
        "failures": len(bad),
        "first": bad[:10],
        "wall_s": round(time.perf_counter() - began, 1),
    }
    print(figures)
    if args.record:
        record("reliability-scheduler", figures)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
