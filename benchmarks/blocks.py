"""Blocks of 40 MB from one worker process to another, and what a step costs the driver.

    python benchmarks/blocks.py [--seconds 4] [--mb 40]

The substrate alone, with bodies that do nothing else: the producer puts a prepared array (one copy into its arena), the
consumer maps it and reads one value per page. Memory is touched first; only then is time taken. CPU of the driver is
that of its whole process, which has one thread. To reach: 3 GB/s, 0.3 ms of driver CPU a step with the scheduler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from common import record

from headrace.contracts.substrate import BlockStore
from headrace.core.refs import BlockRef, Origin, Segment
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.steps import Advance, PartsFreed, Step, StepDone, StepFailed, Timing
from headrace.substrates.processes.pool import ProcessesSubstrate

MAKE, READ = 0, 1
AHEAD = 3  # blocks made and not yet freed: one being written, one under way, one being read
PAGE_VALUES = 4096 // 4


class BlocksBody:
    """MAKE puts a prepared float32 array of credit_bytes; READ sums one value per page of its input."""

    def __init__(self, program: Any, spec: WorkerSpec, store: BlockStore) -> None:
        self._store = store
        self._batch: pa.RecordBatch | None = None

    def run(self, step: Step) -> StepDone | StepFailed:
        start, cpu = time.perf_counter(), time.process_time()
        outputs: tuple[BlockRef, ...] = ()
        if step.stage == MAKE and isinstance(step, Advance):
            if self._batch is None or self._batch.nbytes != step.credit_bytes:
                self._batch = pa.record_batch({"x": np.ones(step.credit_bytes // 4, np.float32)})
            part = self._store.put(self._batch)
            outputs = (BlockRef(self._batch.num_rows, (part,), Origin((Segment("a.parquet", 0, self._batch.num_rows),))),)
        for block in step.inputs:
            for part in block.parts:
                values = self._store.get(part).column(0).to_numpy()
                if values[::PAGE_VALUES].sum() != len(values[::PAGE_VALUES]):
                    raise ValueError("a block arrived with other values")
        timing = Timing(start, time.perf_counter() - start, time.process_time() - cpu)
        return StepDone(step.id, step.worker, outputs, finished=True, timing=timing)

    def discard(self, cursor: int) -> None:
        return

    def close(self) -> None:
        self._batch = None


@dataclass(frozen=True)
class Measured:
    blocks: int
    wall_s: float
    driver_cpu_s: float

    def gb_per_s(self, block_bytes: int) -> float:
        return self.blocks * block_bytes / self.wall_s / 1e9

    @property
    def driver_ms_per_step(self) -> float:
        return self.driver_cpu_s / (2 * self.blocks) * 1e3  # a block is made in one step and read in another


class Flow:
    """Keeps AHEAD blocks between worker 0, which makes them, and worker 1, which reads them."""

    def __init__(self, substrate: ProcessesSubstrate, block_bytes: int) -> None:
        self._substrate = substrate
        self._bytes = block_bytes
        self._made: dict[int, BlockRef] = {}  # by the step that reads it
        self._room = AHEAD
        self._steps = 0
        self._ready: deque[BlockRef] = deque()
        self._done = 0

    def run(self, seconds: float) -> Measured:
        start, cpu, first = time.perf_counter(), time.process_time(), self._done
        while time.perf_counter() - start < seconds:
            self._turn()
        return Measured(self._done - first, time.perf_counter() - start, time.process_time() - cpu)

    def _turn(self) -> None:
        while self._room:
            self._room -= 1
            self._submit(0, MAKE)
        for event in self._substrate.wait(60.0):
            if isinstance(event, StepFailed):
                raise event.error
            if isinstance(event, PartsFreed):
                self._room += len(event.parts)
            elif isinstance(event, StepDone) and event.outputs:
                self._made[self._submit(1, READ, event.outputs)] = event.outputs[0]
            elif isinstance(event, StepDone):
                self._substrate.release(self._made.pop(event.step).parts)
                self._done += 1

    def _submit(self, worker: int, stage: int, inputs: tuple[BlockRef, ...] = ()) -> int:
        self._steps += 1
        step = Advance(
            self._steps, worker, stage, self._steps, 0, 0, inputs=inputs, end=True, credit_bytes=self._bytes, credit_s=1.0
        )
        self._substrate.submit(step)
        return self._steps


def measure(block_bytes: int, seconds: float) -> Measured:
    """One run of the substrate alone."""
    substrate = ProcessesSubstrate(body_factory=BlocksBody)
    try:
        substrate.start(None, [WorkerSpec(0, CPU_POOL, "cpu"), WorkerSpec(1, CPU_POOL, "cpu")])
        flow = Flow(substrate, block_bytes)
        flow.run(0.5)
        return flow.run(seconds)
    finally:
        substrate.stop()


def time_to_up(runs: int) -> float:
    """Median seconds from start() until two workers are up."""
    took: list[float] = []
    for _ in range(runs):
        substrate = ProcessesSubstrate(body_factory=BlocksBody)
        start = time.perf_counter()
        try:
            substrate.start(None, [WorkerSpec(0, CPU_POOL, "cpu"), WorkerSpec(1, CPU_POOL, "cpu")])
            up = 0
            while up < 2:
                up += len(substrate.wait(60.0))
            took.append(time.perf_counter() - start)
        finally:
            substrate.stop()
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--mb", type=int, default=40)
    args = parser.parse_args()
    large, small = measure(args.mb * 1_000_000, args.seconds), measure(8_000, args.seconds)
    record(
        "blocks",
        {
            "two_workers_up_s": round(time_to_up(5), 3),
            f"blocks_of_{args.mb}_mb": {
                "gb_per_s": round(large.gb_per_s(args.mb * 1_000_000), 2),
                "blocks": large.blocks,
                "driver_cpu_ms_per_step": round(large.driver_ms_per_step, 3),
            },
            "blocks_of_8_kb": {
                "steps_per_s": round(2 * small.blocks / small.wall_s),
                "driver_cpu_ms_per_step": round(small.driver_ms_per_step, 3),
            },
        },
    )


if __name__ == "__main__":
    main()
