"""The driver of a large cluster: 1,000 nodes of 64 CPU workers and 10,000,000 splits in virtual time.

    python benchmarks/scale.py [--splits 10000000] [--nodes 1000] [--route fused|device] [--log none|run|resume]
                               [--timeout-s 600]

What is measured is production code: the Driver with Scheduler, Committer (thread and all), lister, step watch, and what every
run has for observers. What is not: the substrate, whose workers answer by a virtual clock, and which hands answers over in
batches, as they have become due. Steps last as long as 2,000 of them a second ask for.

--route fused: a split is one step. device: read (2 steps) > model > write, with 8 devices on each of 100 nodes.
--log run: every split has a receipt with one file, and a run log whose objects are counted and dropped; then the run is
finished as by a sink of files, whose manifest is counted and dropped, too. none: as for a sink that keeps nothing. resume: no
run; a log that settles all splits is made up while it is read, and opened as a later session does: files that are still staged
are looked for, and whether the others are there.

Reported: microseconds of CPU time per step, of the driver's process without the substrate's share (to reach: under 250, so that
2,000 steps a second take less than half of a core), and resident memory beyond that after the imports, from time to time (to
reach: flat, and under 1 GB at 10 million splits; what is settled lies in a temporary file, some 70 bytes a split).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import resource
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

import pyarrow as pa
from common import record

from headrace.commit.names import log_folder, log_name, plan_name
from headrace.commit.records import Claim, Listed, Settled, encode
from headrace.commit.records import Segment as LogSegment
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.events import RunEvent, RunStarted, SplitSettled
from headrace.core.receipts import LineageRun, OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef, Origin, PartRef, Segment
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.splits import Fragment, Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.core.steps import Advance, Apply, Discard, OpTime, PartsFreed, Step, StepDone, SubstrateEvent, Timing, WorkerUp
from headrace.observe.live import Live
from headrace.observe.run import RunRecorder
from headrace.runtime.committer import Committer
from headrace.runtime.driver import Driver
from headrace.runtime.governor import Governor
from headrace.runtime.ledger import OpenedRun, open_run, this_process
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import Limits, SchedulerPlan

STEPS_PER_S = 2_000
BATCH_S = 0.005  # virtual time that one `wait` covers: what has become due while the driver was at work
CPUS, DEVICES, DEVICE_NODES = 64, 8, 100
ROWS, BLOCKS = 3_000, 2  # of a split
BLOCK_BYTES = 4 << 20
POINTS = 20  # samples of memory over the run


class DroppingStore:
    """A RunStore that counts what it is given and keeps only what must be read again: the plan."""

    root = "memory"
    conditional = True

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        self.manifest_bytes = 0
        self.peak_rss_bytes = 0  # while the manifest was made
        self._kept: dict[str, bytes] = {}

    def create(self, name: str, data: bytes) -> bool:
        self.objects += 1
        self.bytes += len(data)
        if name.endswith("plan.json"):
            self._kept.setdefault(name, data)
        return True

    def read(self, name: str) -> bytes | None:
        return self._kept.get(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        return iter([self._kept[name]] if name in self._kept else ())

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Heartbeats, and the marker of success."""

    def write_pieces(self, name: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """The manifest."""
        del name
        for piece in pieces():
            self.manifest_bytes += len(piece)
            self.peak_rss_bytes = max(self.peak_rss_bytes, _rss_bytes())

    def names(self, folder: str) -> Iterator[str]:
        return (name for name in sorted(self._kept) if name.startswith(folder))

    def remove(self, name: str) -> None:
        """Nothing is there."""

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        del files
        return ()

    def publish(self, files: Sequence[OutputFile], replace: Collection[str] = ()) -> None:
        """Nothing is there."""

    def remove_all(self, names: Iterable[str]) -> None:
        """Nothing is there."""


class LoggedStore(DroppingStore):
    """A run that settled so many splits and was left; all but the last files are published. Its log is made as it is read."""

    RUN = "run-00000"
    GROUP, CHUNK = 1_000, 10_000  # splits in a segment, and in a chunk of the listing
    STAGED = 1_000

    def __init__(self, splits: int) -> None:
        super().__init__()
        self._splits = splits
        self._listed = -(-splits // self.CHUNK)
        self._segments = 1 + self._listed + -(-splits // self.GROUP)

    def read(self, name: str) -> bytes | None:
        head, _, number = name.removesuffix(".json").rpartition("/")
        return self._segment(int(number)) if head == log_folder(self.RUN) else super().read(name)

    def names(self, folder: str) -> Iterator[str]:
        if folder == log_folder(self.RUN):
            return (log_name(self.RUN, i) for i in range(self._segments))
        if folder.endswith("staging"):
            return (_file(split, 0, 0).staged for split in range(self._splits - self.STAGED, self._splits))
        if not folder:
            return (_file(split, 0, 0).name for split in range(self._splits - self.STAGED))
        return iter([plan_name(self.RUN)])

    def _segment(self, index: int) -> bytes | None:
        if index >= self._segments:
            return None
        if index == 0:
            return encode(LogSegment(0, 1, "nonce", (Claim(1, "nonce", "elsewhere", 1, 0.0, 0.0),)))
        if index <= self._listed:
            first = (index - 1) * self.CHUNK
            count = min(self.CHUNK, self._splits - first)
            listed = Listed(first, count, "0" * 64, index == self._listed)
            return encode(LogSegment(index, 1, "nonce", (listed,)))
        first = (index - 1 - self._listed) * self.GROUP
        settled = range(first, min(first + self.GROUP, self._splits))
        tally = Tally(rows_in=ROWS, written=ROWS)
        records = tuple(Settled(i, f"{i:016x}", 0, tally, (_file(i, 0, 0),), ROWS) for i in settled)
        return encode(LogSegment(index, 1, "nonce", records))


class ScaleSubstrate:
    """Workers that answer by a virtual clock. cpu_s: what this costs itself, to be left out."""

    name = "scale"

    def __init__(self, stages: Sequence[Stage], step_s: dict[int, float], receipts: bool) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0
        self.steps = 0
        self.first_s = 0.0  # of the process, when the last worker came up
        self._stages = stages
        self._step_s = step_s
        self._receipts = receipts
        self._random = Random(1)
        self._agenda: list[tuple[float, int, Any]] = []
        self._free: dict[int, float] = {}  # worker -> when its last step ends
        self._node: dict[int, str] = {}
        self._tie = 0
        self._part = 0
        self._read: dict[int, int] = {}  # cursor -> blocks made
        self._written: dict[int, int] = {}  # cursor -> rows written
        self._freed: list[int] = []
        self._digest = hashlib.sha256(b"").hexdigest()

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        del program
        for spec in workers:
            self._node[spec.id] = spec.node
            self._later(self._random.random() * 10.0, WorkerUp(spec.id, spec.pool, spec.node))

    def add_worker(self, worker: WorkerSpec) -> None:
        raise AssertionError("nothing is lost here")

    def submit(self, step: Step | Discard) -> None:
        began = time.thread_time()
        assert not isinstance(step, Discard)
        self.steps += 1
        begin_s = max(self.now_s, self._free.get(step.worker, 0.0))
        seconds = self._step_s[step.stage] * (0.5 + self._random.random())
        self._free[step.worker] = end_s = begin_s + seconds
        self._later(end_s, (step, seconds))
        self.cpu_s += time.thread_time() - began

    def release(self, parts: Sequence[PartRef]) -> None:
        self._freed.extend(part.id for part in parts)

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        del timeout_s
        began = time.thread_time()
        out: list[SubstrateEvent] = []
        if self._freed:
            out.append(PartsFreed(tuple(self._freed)))
            self._freed.clear()
        if self._agenda:
            until_s = self._agenda[0][0] + BATCH_S
            while self._agenda and self._agenda[0][0] <= until_s:
                self.now_s, _, item = heappop(self._agenda)
                out.append(item if isinstance(item, WorkerUp) else self._answer(*item))
        elif not out:
            time.sleep(0.001)  # the listing is at work
        self.cpu_s += time.thread_time() - began
        return out

    def wake(self) -> None:
        """`wait` never blocks for long."""

    def fetch(self, block: BlockRef) -> Any:
        raise AssertionError("nothing is delivered here")

    def kill(self, worker: int, reason: str) -> bool:
        raise AssertionError(f"worker {worker}: {reason}")

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        raise AssertionError("memory is not scarce here")

    def memory_bytes(self) -> int:
        return 0

    def stop(self) -> tuple[()]:
        self._agenda.clear()
        return ()

    # ---------------------------------------------------------------- workers

    def _later(self, at_s: float, item: Any) -> None:
        self._tie += 1
        heappush(self._agenda, (at_s, self._tie, item))

    def _answer(self, step: Step, seconds: float) -> StepDone:
        stage = self._stages[step.stage]
        timing = Timing(self.now_s, seconds, seconds, (OpTime(-1, seconds, ROWS, ROWS), OpTime(0, seconds, ROWS, ROWS)))
        if isinstance(step, Apply):
            outputs = tuple(BlockRef(b.rows, (self._put(step.worker, 4 * b.rows, "answer"),)) for b in step.inputs)
            return StepDone(step.id, step.worker, outputs, timing=timing)
        if stage.order is Order.SOURCE and stage.end is not End.SINK:
            made = self._read.pop(step.cursor, 0) + 1
            rows = ROWS // BLOCKS
            origin = Origin((Segment(f"s3://bucket/data/part-{step.split_index:08d}.parquet", (made - 1) * rows, rows),))
            block = BlockRef(rows, (self._put(step.worker, BLOCK_BYTES, "image"),), origin)
            if made < BLOCKS:
                self._read[step.cursor] = made
            done = made == BLOCKS
            return StepDone(step.id, step.worker, (block,), done, not done, tally=Tally(rows_in=rows), timing=timing)
        written = ROWS if stage.order is Order.SOURCE else sum(block.rows for block in step.inputs)
        tally = Tally(rows_in=ROWS if stage.order is Order.SOURCE else 0, written=written)
        receipt = None
        if step.end:
            receipt = self._receipt(step)
        return StepDone(step.id, step.worker, finished=step.end, receipt=receipt, tally=tally, timing=timing)

    def _put(self, worker: int, size: int, column: str) -> PartRef:
        self._part += 1
        return PartRef(self._part, worker, size, (column,), None, self._node[worker])

    def _receipt(self, step: Advance) -> Receipt:
        split, attempt = step.split_index, step.attempt
        if not self._receipts:
            return Receipt(split, "", attempt, rows=ROWS)
        file = _file(split, step.worker, attempt)
        source = LineageRun(0, ROWS, f"s3://bucket/data/part-{split:08d}.parquet", 0, ROWS)
        return Receipt(split, "", attempt, (file,), ROWS, (source,), (("label", "string"), ("score", "float")))


def _file(split: int, worker: int, attempt: int) -> OutputFile:
    staged = f"_headrace/run-00000/staging/1/{worker}-140000000000000/{split:06d}-{attempt}.parquet"
    # No two files are alike, and digests can't be packed.
    digest = hashlib.sha256(split.to_bytes(8, "little")).hexdigest()
    return OutputFile(f"part-00000-{split:06d}.parquet", ROWS, 1_000_000 + split % 1000, digest, staged)


class Shown(Live):
    """What progress draws from."""

    def close(self) -> None:
        """Nothing is held."""


class Gauge:
    """An observer that notes memory as splits are settled."""

    def __init__(self, splits: int, floor: int) -> None:
        self._every = max(1, splits // POINTS)
        self._floor = floor
        self._settled = 0
        self.points: list[tuple[int, float]] = []

    def on_event(self, event: RunEvent) -> None:
        if isinstance(event, SplitSettled):
            self._settled += 1
            if self._settled % self._every == 0:
                self.points.append((self._settled, round((_rss_bytes() - self._floor) / 1e6, 1)))
                print(*self.points[-1], "MB", flush=True)

    def close(self) -> None:
        """Nothing is held."""


def _listing(splits: int) -> Iterator[Split]:
    for i in range(splits):
        name = f"part-{i:08d}.parquet"
        yield Split(i, (Fragment(f"s3://bucket/data/{name}", 64 << 20, f'"{i:032x}"', 0, -1, ROWS, name),), 64 << 20, ROWS)


def _plan(route: str, nodes: int) -> tuple[SchedulerPlan, tuple[WorkerSpec, ...], dict[int, float]]:
    """The plan, the workers, and seconds per step of each stage."""
    cpus = [WorkerSpec(i, CPU_POOL, CPU_POOL, f"node{i // CPUS}") for i in range(nodes * CPUS)]
    if route == "fused":
        read_write = Stage(0, "read > map > write", CPU_POOL, Order.SOURCE, End.SINK, 0, 1)
        read = Stage(1, "read", CPU_POOL, Order.SOURCE, End.NEXT, 0, 0)
        work = Stage(2, "map", CPU_POOL, Order.FREE, End.NEXT, 0, 1)
        write = Stage(3, "write", CPU_POOL, Order.SPLIT, End.SINK, 1, 1)
        routes = (Route("fused", (0,)), Route("spread", (1, 2, 3)))
        step_s = len(cpus) / STEPS_PER_S
        plan = SchedulerPlan((read_write, read, work, write), routes, {CPU_POOL: len(cpus)})
        return plan, tuple(cpus), {0: step_s, 1: step_s / 4, 2: step_s / 4, 3: step_s / 4}
    many = max(1, nodes // (1_000 // DEVICE_NODES)) * DEVICES
    devices = [WorkerSpec(len(cpus) + i, "cuda", f"cuda:{i % DEVICES}", f"node{i // DEVICES}") for i in range(many)]
    stages = (
        Stage(0, "read", CPU_POOL, Order.SOURCE, End.NEXT, 0, 0, transient=("image",)),
        Stage(1, "model", "cuda", Order.FREE, End.NEXT, 0, 1, model=True, columns_in=("image",), keep=(), batch_rows=256),
        Stage(2, "write", CPU_POOL, Order.SPLIT, End.SINK, 1, 1),
    )
    # Of five steps in which a split is read, run and written, two read, and two are the devices' (a block in each).
    step_s = {0: 0.4 * len(cpus) / STEPS_PER_S, 1: 2.2 * many / STEPS_PER_S, 2: 0.4 * len(cpus) / STEPS_PER_S}
    pools = {CPU_POOL: len(cpus), "cuda": many}
    return SchedulerPlan(stages, (Route("only", (0, 1, 2)),), pools), (*cpus, *devices), step_s


def run(route: str, splits: int, nodes: int, log: str, timeout_s: float | None) -> dict[str, Any]:
    """One run to its end."""
    gc.collect()
    floor = _rss_bytes()
    plan, workers, step_s = _plan(route, nodes)
    opened = _opened(DroppingStore()) if log == "run" else None
    substrate = ScaleSubstrate(plan.stages, step_s, opened is not None)
    gauge = Gauge(splits, floor)
    budget = 2 * sum(plan.pools.values()) * BLOCK_BYTES
    driver = Driver(
        scheduler=Scheduler(plan, Limits(budget_bytes=budget, credit_bytes=BLOCK_BYTES)),
        substrate=substrate,
        program=None,
        workers=workers,
        splits=_listing(splits),
        committer=Committer({}, opened),
        observers=[RunRecorder(), Shown(), gauge],
        started=RunStarted(time.perf_counter(), "scale", "scale", dict(plan.pools), {}, {}, budget),
        timeout_s=timeout_s,
        governor=Governor(1 << 40),
    )
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    driver.run()
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    ended = _finish(driver.committer, opened, floor) if opened is not None else {}
    driver.committer.close(released=True)
    assert driver.committer.splits == splits
    driver_s = cpu_s - substrate.cpu_s
    figures: dict[str, Any] = {
        "splits": splits,
        "nodes": nodes,
        "workers": len(workers),
        "steps": substrate.steps,
        "driver_cpu_us_per_step": round(driver_s / substrate.steps * 1e6, 1),
        "share_of_a_core_at_2000_steps_per_s": round(driver_s / substrate.steps * STEPS_PER_S, 3),
        "wall_s": round(wall_s, 1),
        "virtual_s": round(substrate.now_s, 1),
        "rss_mb_beyond_imports": {str(n): mb for n, mb in gauge.points},
        "peak_rss_mb_beyond_imports": max(mb for _, mb in gauge.points),
    }
    if opened is not None:
        store = opened.store
        assert isinstance(store, DroppingStore)
        figures |= {"log_objects": store.objects, "log_mb": round(store.bytes / 1e6, 1), **ended}
    return figures


def _finish(committer: Committer, opened: OpenedRun, floor: int) -> dict[str, Any]:
    """The end of a run with outputs: what a sink of files does when nothing is staged any more."""
    store = opened.store
    assert isinstance(store, DroppingStore)
    began_cpu_s = time.process_time()
    summary = {"tally": {"written": committer.tally.written}}
    committer.finish(summary)
    sink = ParquetSink("/nowhere").bind(opened.run, opened.epoch, None)
    sink._opened = store  # pyright: ignore[reportAttributeAccessIssue]
    sink.finish(committer.files, summary, pa.schema([("label", pa.string()), ("score", pa.float32())]))
    return {
        "end_cpu_s": round(time.process_time() - began_cpu_s, 1),
        "end_rss_mb_beyond_imports": round((store.peak_rss_bytes - floor) / 1e6, 1),
        "manifest_mb": round(store.manifest_bytes / 1e6, 1),
    }


def resume(splits: int) -> dict[str, Any]:
    """A run with that many settled splits is opened by another driver."""
    gc.collect()
    floor = _rss_bytes()
    store = LoggedStore(splits)
    first = _opened(DroppingStore()).store
    store.create(plan_name(store.RUN), first.read(plan_name(store.RUN)) or b"")
    began_cpu_s = time.process_time()
    opened = _opened(store)
    assert (len(opened.state.settled), len(opened.unpublished)) == (splits, store.STAGED)
    return {
        "splits": splits,
        "cpu_s": round(time.process_time() - began_cpu_s, 1),
        "rss_mb_beyond_imports": round((_rss_bytes() - floor) / 1e6, 1),
        "process_peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


def _opened(store: DroppingStore) -> OpenedRun:
    return open_run(
        store,
        {"what": "a benchmark"},
        fresh=False,
        take_over=True,
        identity=this_process(),
        differences=lambda old, new: [] if old == new else ["all"],
    )


def _rss_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--splits", type=int, default=10_000_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--route", choices=("fused", "device"), default="fused")
    parser.add_argument("--log", choices=("none", "run", "resume"), default="run")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--name", default="", help="record the figures under this name; none: print them only")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, instead")
    options = parser.parse_args()
    arguments = (options.route, options.splits, options.nodes, options.log, options.timeout_s)
    if options.profile:
        import cProfile

        cProfile.runctx("run(*arguments)", {"run": run, "arguments": arguments}, {}, sort="tottime")
        return
    resumed = options.log == "resume"
    figures = {"resume": resume(options.splits)} if resumed else {f"{options.route}, log: {options.log}": run(*arguments)}
    if options.name:
        record(options.name, figures)
    else:
        print(figures)


if __name__ == "__main__":
    main()
