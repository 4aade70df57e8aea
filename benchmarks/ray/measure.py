"""A local cluster, memory of everything in it, outputs that are the same whatever their order, and the machine's own limit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import workloads as w

_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass
class Cluster:
    """One node. address: for ray.init. pids: of its daemons, whose descendants are its workers."""

    address: str
    pids: set[int]


@contextlib.contextmanager
def cluster(cpus: int, store_bytes: int) -> Iterator[Cluster]:
    """A fresh one each time: Ray Data leaves an actor behind, and the object store keeps what it ever touched."""
    import psutil
    from ray.cluster_utils import Cluster as RayCluster

    folder = tempfile.mkdtemp(prefix="ray-")
    os.environ["RAY_TMPDIR"] = folder  # else it would be the cluster that others on this machine find
    # Ray starts workers at niceness 15: drivers, and whatever else runs here, would go before them.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (that is its name)
    before = {p.pid for p in psutil.Process().children()}
    head = {"num_cpus": cpus, "resources": {"sim": 1}, "object_store_memory": store_bytes, "include_dashboard": False}
    made = RayCluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        daemons = {p.pid for p in psutil.Process().children()} - before
        _wait_for_idle_workers(cpus)
        yield Cluster(made.address, daemons)
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_idle_workers(cpus: int) -> None:
    """Ray starts a worker for each CPU ahead of any driver."""
    import psutil

    until = time.monotonic() + 5
    while time.monotonic() < until:
        idle = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                idle += " ".join(process.cmdline()).startswith("ray::IDLE")
        if idle >= cpus:
            return
        time.sleep(0.1)


@dataclass
class Memory:
    """Peaks in bytes. work: driver and workers without the object store. store: shared memory, once. both: of their sum.
    daemons: raylet, gcs, agents, monitors, without the store. samples: (s, work, store).
    """

    work: int = 0
    store: int = 0
    both: int = 0
    daemons: int = 0
    cost_s: float = 0.0
    samples: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])
    by_name: dict[str, int] = field(default_factory=dict[str, int])


@contextlib.contextmanager
def watching(of: Cluster, driver: int, every_s: float = 0.2) -> Iterator[Memory]:
    """Sample the driver and the cluster until the block is left."""
    found = Memory()
    done = threading.Event()

    def watch() -> None:
        started = time.monotonic()
        while not done.wait(every_s):
            at = time.thread_time()
            _sample(found, of, driver, time.monotonic() - started)
            found.cost_s += time.thread_time() - at

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _sample(found: Memory, of: Cluster, driver: int, at_s: float) -> None:
    import psutil

    work = store = daemons = 0
    names: dict[str, int] = {}
    todo = [psutil.Process()]
    with contextlib.suppress(psutil.Error):
        todo = psutil.Process().children(recursive=True)
    for process in todo:
        with contextlib.suppress(psutil.Error, OSError):
            name = (process.cmdline() or [""])[0] if process.pid != driver else "driver"
            own, shared = _proportional(process.pid)
            store += shared
            if process.pid in of.pids or name in _AGENTS or not (name == "driver" or name.startswith("ray::")):
                daemons += own
            else:
                work += own
                names[name] = names.get(name, 0) + own
    if work + store > found.both:
        found.by_name = names
    found.work, found.store = max(found.work, work), max(found.store, store)
    found.both, found.daemons = max(found.both, work + store), max(found.daemons, daemons)
    found.samples.append((round(at_s, 2), work, store))


def _proportional(pid: int) -> tuple[int, int]:
    """(anonymous and file-backed, shared memory) of a process, in bytes; pages that several share are divided among them."""
    sizes = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) << 10
    return sizes["Pss_Anon"] + sizes["Pss_File"], sizes["Pss_Shmem"]


# -- notes of calls


def first_answer(log: Path, stage: str) -> float:
    """When a stage's first call ended."""
    return min(end for calls in _notes(log, stage) for _, end, _ in calls)


def _notes(log: Path, stage: str) -> list[list[tuple[float, ...]]]:
    """(start, end, rows) of the calls of each process."""
    texts = [path.read_text() for path in log.glob(f"{stage}-*")]
    return [[tuple(map(float, line.split())) for line in text.splitlines()] for text in texts]


# -- outputs


def digest(folder: Path) -> tuple[int, str]:
    """(rows, digest of all values) of a dataset, by id: order, files and chunks don't matter."""
    paths = sorted(p for p in folder.rglob("*.parquet") if not {"_headrace"} & set(p.relative_to(folder).parts))
    table = pa.dataset.dataset([str(p) for p in paths], format="parquet").to_table()
    table = table.take(pc.sort_indices(table["id"])).combine_chunks()
    hashed = hashlib.sha256()
    for name in sorted(table.column_names):
        hashed.update(name.encode())
        column = table[name]
        _add(hashed, column.chunk(0) if column.num_chunks else pa.array([], column.type))
    return table.num_rows, hashed.hexdigest()[:16]


def _add(hashed: Any, array: pa.Array) -> None:
    kind = array.type
    hashed.update(np.asarray(array.is_null().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        for i in range(kind.num_fields):
            hashed.update(kind.field(i).name.encode())
            _add(hashed, array.field(i))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hashed.update(pc.list_value_length(array).cast(pa.int64()).fill_null(-1).to_numpy().tobytes())
        _add(hashed, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        hashed.update(pc.binary_length(array).cast(pa.int64()).fill_null(-1).to_numpy().tobytes())
        hashed.update(b"".join(v for v in array.cast(pa.large_binary()).to_pylist() if v is not None))
    elif pa.types.is_timestamp(kind):
        hashed.update(array.cast(pa.int64()).fill_null(0).to_numpy().tobytes())
    else:
        hashed.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())


# -- the machine


_START: Any = None


def _begin(start: Any) -> None:
    global _START
    _START = start


def _work(workload: str, paths: list[Path], out: Path, model: str) -> tuple[float, float, int]:
    pa.set_cpu_count(1)
    scorer = w.Scorer(model, str(out / "log")) if workload == "tabular" else None
    w.bare(workload, paths[0], out, scorer)
    _START.wait()
    begun = time.time()
    rows = sum(w.bare(workload, path, out, scorer) for path in paths)
    return begun, time.time(), rows


def limit(workload: str, data: Path, out: Path, cpus: int) -> float:
    """Rows per second of `cpus` processes that do the CPU work and nothing else, each on its share of the files."""
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted((data / "in").glob("*.parquet"))
    context = get_context("spawn")
    start = context.Barrier(cpus)
    with ProcessPoolExecutor(cpus, mp_context=context, initializer=_begin, initargs=(start,)) as pool:
        shares = [paths[i::cpus] for i in range(cpus)]
        told = list(pool.map(_work, [workload] * cpus, shares, [out] * cpus, [str(data / "model.ubj")] * cpus))
    return sum(rows for _, _, rows in told) / (max(end for _, end, _ in told) - min(begun for begun, _, _ in told))


def free_cores() -> int:
    return len(os.sched_getaffinity(0))
