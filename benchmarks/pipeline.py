"""The whole engine on real processes, by public verbs: blocks of 40 MB between two stages, and driver CPU a step.

    python benchmarks/pipeline.py [--blocks 300] [--splits 5000]

Blocks: a CPU stage gives one prepared 40 MB array a row range, a model in a worker of its own (device "sim") maps it and
reads a value per page; start-up included in the wall. Steps: tiny splits, each a step or two; CPU of the driver's thread from
the first to the last step, start-up excluded. To reach: 3 GB/s and 0.3 ms.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import record

import headrace as hr

BLOCK_VALUES = 10_000_000  # float32: 40 MB
PAGE_VALUES = 1024


class Make:
    """One row in, 100 rows of 400 kB out: 40 MB."""

    def __init__(self) -> None:
        self.rows = np.ones((100, BLOCK_VALUES // 100), np.float32)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"x": self.rows}


class Read:
    def __call__(self, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1)[:, ::PAGE_VALUES]
        return flat.sum(axis=1)


def blocks(count: int) -> dict[str, Any]:
    def run(n: int) -> tuple[float, Any]:
        started = time.perf_counter()
        ds = hr.range(n).map_batches(Make, batch_size=1).predict(Read, input="x", output="sum", device="sim", batch_size=100)
        run = ds.drop("x").run(engine="processes", progress="quiet")
        assert run.rows == n * 100
        return time.perf_counter() - started, run

    run(8)
    short, long = run(count // 4)[0], run(count)[0]
    gigabytes = BLOCK_VALUES * 4 / 1e9
    return {
        "gb_per_s_with_start_up": round(count * gigabytes / long, 2),
        "gb_per_s_sustained": round((count - count // 4) * gigabytes / (long - short), 2),
    }


def steps(splits: int) -> dict[str, Any]:
    from headrace.runtime.driver import Driver

    seen: list[tuple[float, int]] = []
    original = Driver._note_done

    def note(self: Driver, event: Any) -> None:
        seen[1:] = [(time.thread_time(), event.step)]
        original(self, event)

    table = hr.range(splits * 20).to_arrow(progress="quiet")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(splits):
            pq.write_table(table.slice(i * 20, 20), Path(folder, f"{i:06d}.parquet"))
        Driver._note_done = note  # type: ignore[method-assign]
        try:
            run = (
                hr.read_parquet(folder)
                .map_batches(lambda b: b)
                .write_parquet(folder + "-out", outputs="per_input", engine="processes", progress="quiet")
            )
        finally:
            Driver._note_done = original  # type: ignore[method-assign]
        shutil.rmtree(folder + "-out")
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    cost_ms = (last_s - first_s) / (last - first) * 1e3
    return {"steps": last - first, "driver_cpu_ms_per_step": round(cost_ms, 3), "rows": run.rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=300)
    parser.add_argument("--splits", type=int, default=5000)
    options = parser.parse_args()
    record("pipeline", {"blocks of 40 MB": blocks(options.blocks), "steps": steps(options.splits)})


if __name__ == "__main__":
    main()
