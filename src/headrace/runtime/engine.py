"""Which substrate runs a plan: threads unless a short probe shows that its Python code holds the interpreter lock.

The probe runs the first rows through the CPU operators while a second thread keeps asking for the interpreter: the share of
times it is kept waiting is the share of the time in which two such threads would not run at once. Output never depends on
the answer; user functions may be called once more on the first rows, as after any retry.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from headrace.core.errors import PlanError
from headrace.core.options import Engine
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Stage
from headrace.plan.nodes import FilterRows, FlatMap, MapBatches, MapRows, Op, Predict
from headrace.worker.program import Program

PROBE_S = 0.03  # enough for about 40 samples of the interpreter lock, too short to be felt
PROBE_MAX_S = 0.25  # a probe whose last run took this long is not repeated on more rows
LATE_S = 0.001  # asking for a free interpreter takes about 0.1 ms; one that is held gives way after 5 ms
HELD_SHARE = 0.35  # above this, two threads do the work of less than 1.5
WORTH_S = 1.0  # starting processes costs about half a second: not for less work than this


@dataclass(frozen=True, slots=True)
class Probe:
    """held: share of the time in which the interpreter lock was held. rows, wall_s, bytes: of the sample that was run."""

    held: float
    rows: int
    wall_s: float
    bytes: int


def choose_engine(asked: Engine, program: Program, cores: int) -> tuple[str, str]:
    """(engine, why in words). Raises PlanError for processes where there are none."""
    if asked == "processes" and sys.platform != "linux":
        raise PlanError("processes need Linux (memfd)", hint='use engine="threads"')
    if asked != "auto":
        return asked, "asked for"
    ops = _cpu_ops(program)
    named = [op.name for op in program.ops[:ops] if isinstance(op, FilterRows | MapRows | FlatMap | MapBatches | Predict)]
    if not named:
        return "threads", "nothing on the CPUs holds the interpreter lock"
    if sys.platform != "linux":
        return "threads", "processes need Linux"
    if cores == 1:
        return "threads", "one core"
    probe = _probe(program, ops)
    if probe is None:
        return "threads", "too little input to need more"
    share = f"{', '.join(named)} held the interpreter lock {probe.held:.0%} of {probe.wall_s * 1e3:.0f} ms"
    if probe.held < HELD_SHARE:
        return "threads", share
    total_s = _expected_s(program, probe)
    if total_s < WORTH_S:
        return "threads", f"{share}, but all the work is about {total_s:.1f} s"
    if not _ships(program):
        return "threads", f"{share}, but the plan can't be sent to processes (it does not pickle)"
    return "processes", share


def _cpu_ops(program: Program) -> int:
    """How many operators from the start run on CPUs."""
    stops = [s.first for s in program.stages if s.pool != CPU_POOL]
    return min(stops, default=len(program.ops))


def _probe(program: Program, ops: int) -> Probe | None:
    """Run growing samples until one takes PROBE_S. None when the input ends before."""
    split, block = _first_block(program)
    if split is None or block is None:
        return None
    rows, last = 1, None
    while True:
        sample = block.slice(0, rows)
        last = _measure(program.ops[:ops], program, split, sample)
        if last is None or last.wall_s >= PROBE_S or rows >= block.num_rows:
            return last
        if last.wall_s * 8 > PROBE_MAX_S:
            rows *= 2
        else:
            rows *= 8


def _first_block(program: Program) -> tuple[Split | None, Any]:
    for split in program.source.splits(per_input=False):
        blocks = program.source.open(split, program.limits)
        try:
            for block, _ in blocks:
                if block.num_rows:
                    return split, block
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()
        return None, None
    return None, None


def _measure(ops: tuple[Op, ...], program: Program, split: Split, sample: Any) -> Probe | None:
    """Run the operators once over the sample, and watch the interpreter lock. None when they raise: the run itself will say."""
    from headrace.core.steps import Advance, StepFailed
    from headrace.substrates.inline import LocalStore
    from headrace.worker.body import WorkerBody

    stage = Stage(0, "probe", CPU_POOL, Order.SOURCE, End.DELIVER, 0, len(ops))
    source: Any = _Sample(program.source, sample)
    trial = replace(program, source=source, ops=ops, stages=(stage,), sink=None)
    body = WorkerBody(trial, WorkerSpec(0, CPU_POOL, "cpu"), LocalStore(0, itertools.count().__next__))
    step = Advance(0, 0, 0, 1, split.index, 1, split=split, end=True, credit_bytes=1 << 62, credit_s=1e9)
    try:
        answer, held, wall_s = _watch(lambda: body.run(step))
    finally:
        body.close()
    if isinstance(answer, StepFailed):
        return None
    return Probe(held, sample.num_rows, wall_s, sample.nbytes)


def _watch(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(the call's answer, share of samples in which the interpreter was held, seconds)."""
    done = threading.Event()
    asked = [0, 0]

    def sample() -> None:
        while not done.is_set():
            before = time.perf_counter()
            time.sleep(0.0002)
            asked[0] += 1
            asked[1] += time.perf_counter() - before > 0.0002 + LATE_S

    watcher = threading.Thread(target=sample, name="headrace-probe", daemon=True)
    watcher.start()
    started = time.perf_counter()
    try:
        answer = call()
    finally:
        wall_s = time.perf_counter() - started
        done.set()
        watcher.join()
    return answer, asked[1] / max(1, asked[0]), wall_s


class _Sample:
    """A source of one block."""

    name = "sample"
    remote = False

    def __init__(self, source: Any, block: Any) -> None:
        self._source = source
        self._block = block

    def schema(self) -> Any:
        return self._source.schema()

    def open(self, split: Split, limits: Any) -> Any:
        from headrace.core.refs import Origin

        yield self._block, Origin((), exact=False)


def _expected_s(program: Program, probe: Probe) -> float:
    """Seconds of CPU work in all, by the bytes of the first splits; unknown beyond them counts as much."""
    seen = rows = 0
    for i, split in enumerate(program.source.splits(per_input=False)):
        seen += split.bytes
        rows += split.rows or 0
        if i >= 64:
            return float("inf")
    by_bytes = probe.wall_s * seen / max(1, probe.bytes)
    by_rows = probe.wall_s * rows / max(1, probe.rows)
    return max(by_bytes, by_rows)


def _ships(program: Program) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(program)
    except Exception:
        return False
    return True
