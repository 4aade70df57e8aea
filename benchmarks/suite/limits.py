"""What the machine itself can do: the workload's work without any engine, a core at a time; copying memory; writing to disk.

`python -m suite.limits <job file> <seconds>` prints what one core does, pinned to it by the caller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite.contract import Job, Loaded, Model, Pipeline
from suite.peers.steps import apply, arrow_of, files_of, without

COPIED, WRITTEN = 256 << 20, 256 << 20
READ, WRITE, LOAD = "(read)", "(write)", "(load)"


@dataclass(frozen=True)
class Limits:
    """cpu_s: stage -> CPU seconds for the whole input on a core that does nothing else; together_s: the same when all cores do
    it at once. device_s: of the busiest device. rows: of the input. start_s: of a process that imports what the work needs,
    loads its models and computes a first batch.
    """

    rows: int
    cpu_s: Mapping[str, float]
    together_s: Mapping[str, float]
    device_s: float
    start_s: float
    memcpy_gb_per_s: float
    disk_gb_per_s: float

    def ideal_s(self, cores: int, *, io_counts: bool, start_s: float | None = None, together: bool = False) -> float:
        """Wall time of an engine that costs nothing: a start (start_s: as agreed, not as measured), then all cores busy with
        the work, or the device. io_counts: reading and writing, as pyarrow does it by default, is work.
        """
        of = self.together_s if together else self.cpu_s
        work = sum(s for stage, s in of.items() if io_counts or stage not in (READ, WRITE))
        return max(work / cores, self.device_s) + (self.start_s if start_s is None else start_s)


def measure(job: Job, cores: Sequence[int], env: Mapping[str, str], seconds: float) -> Limits:
    """Raises RuntimeError with what the measuring process said."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "job")
        job.write(path)
        alone = _run(path, cores[:1], env, seconds)[0]
        together = _run(path, cores, env, seconds) if len(cores) > 1 else [alone]
    mean = {stage: sum(one["cpu_s"][stage] for one in together) / len(together) for stage in alone["cpu_s"]}
    return Limits(
        alone["rows"],
        alone["cpu_s"],
        mean,
        alone["device_s"],
        alone["start_s"],
        alone["memcpy_gb_per_s"],
        alone["disk_gb_per_s"],
    )


def _run(path: Path, cores: Sequence[int], env: Mapping[str, str], seconds: float) -> list[dict[str, Any]]:
    argv = [sys.executable, "-m", "suite.limits", str(path), str(seconds)]
    started = [
        subprocess.Popen(
            argv,
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda core=core: os.sched_setaffinity(0, [core]),
        )
        for core in cores
    ]
    said = [process.communicate() for process in started]
    for process, (_, error) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"the machine's limits can't be measured:\n{error[-2000:]}")
    return [json.loads(out) for out, _ in said]


# -- in the measuring process


def main() -> None:
    job, seconds = Job.read(sys.argv[1]), float(sys.argv[2])
    pipelines = [_local(pipeline, job.data) for pipeline in job.pipelines]
    rows = sum(_rows(pipeline) for pipeline in pipelines)
    spent: dict[str, float] = {}
    done, ratio = 0, {model.name: 1.0 for model in pipelines[0].models}
    models = _warm(pipelines[0], ratio)
    start_s = time.time() - _process_began()
    with tempfile.TemporaryDirectory() as scratch:
        until = time.process_time() + seconds
        for i, pipeline in enumerate(pipelines):
            done += _sample(pipeline, models if i == 0 else None, Path(scratch), until, spent, ratio)
            if time.process_time() > until:
                break
        memcpy, disk = _memcpy(), _disk(Path(scratch))
    if len(pipelines) > 1 and LOAD in spent:  # the first one's was a part of the start
        spent[LOAD] *= len(pipelines) / (len(pipelines) - 1)
    busy = [rows * ratio[m.name] / (m.rate * m.devices) for m in pipelines[0].models if m.rate]
    told = {
        "rows": rows,
        "cpu_s": {stage: s / done * rows for stage, s in spent.items()},
        "device_s": max(busy, default=0.0),
        "start_s": start_s,
        "memcpy_gb_per_s": memcpy,
        "disk_gb_per_s": disk,
    }
    print(json.dumps(told))


def _process_began() -> float:
    """As time.time()."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    now = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (now - ticks / os.sysconf("SC_CLK_TCK"))


def _local(pipeline: Pipeline, data: str) -> Pipeline:
    return replace(pipeline, source=f"{data}/in") if "://" in pipeline.source else pipeline


def _rows(pipeline: Pipeline) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in files_of(pipeline.source))


def _warm(pipeline: Pipeline, ratio: dict[str, float]) -> dict[str, Loaded]:
    """Load the models, and compute a batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    models = {m.name: m.load(1) for m in pipeline.models if not m.rate}
    with pq.ParquetFile(files_of(pipeline.source)[0]) as file:
        batch = next(file.iter_batches(pipeline.steps[0].rows, use_threads=False))
    _batch(pipeline, pa.Table.from_batches([batch]), models, {}, ratio)
    return models


def _sample(
    pipeline: Pipeline,
    models: Mapping[str, Loaded] | None,
    scratch: Path,
    until: float,
    spent: dict[str, float],
    ratio: dict[str, float],
) -> int:
    """Work through the input until the time is up. Adds to spent: stage -> s; returns the rows that it was for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    clock = _Clock()
    if models is None:
        models = {m.name: m.load(1) for m in pipeline.models if not m.rate}
        spent[LOAD] = spent.get(LOAD, 0.0) + clock.lap()
    size, rows = pipeline.steps[0].rows, 0
    for path, group in _groups(pipeline):
        clock.lap()
        with pq.ParquetFile(path) as file:
            whole = file.read_row_group(group, use_threads=False)
        reading = clock.lap()
        made: list[Any] = []
        for at in range(0, whole.num_rows, size):
            made.append(_batch(pipeline, whole.slice(at, size), models, spent, ratio))
            if time.process_time() > until:
                break
        taken = min(len(made) * size, whole.num_rows)
        clock.lap()
        pq.write_table(pa.concat_tables(made), scratch / "sample.parquet")
        spent[WRITE] = spent.get(WRITE, 0.0) + clock.lap()
        spent[READ] = spent.get(READ, 0.0) + reading * taken / whole.num_rows
        rows += taken
        if time.process_time() > until:
            break
    return rows


def _groups(pipeline: Pipeline) -> Iterator[tuple[str, int]]:
    import pyarrow.parquet as pq

    for path in files_of(pipeline.source):
        for group in range(pq.read_metadata(path).num_row_groups):
            yield path, group


class _Clock:
    """CPU time of the process between laps, in seconds."""

    def __init__(self) -> None:
        self._at = time.process_time()

    def lap(self) -> float:
        before, self._at = self._at, time.process_time()
        return self._at - before


def _batch(
    pipeline: Pipeline, table: Any, models: Mapping[str, Loaded], spent: dict[str, float], ratio: dict[str, float]
) -> Any:
    import numpy as np

    given, clock = table.num_rows, _Clock()
    for step in pipeline.steps:
        if isinstance(step, Model):
            ratio[step.name] = table.num_rows / given
        if isinstance(step, Model) and step.rate:  # its device's time is known
            table = without(table, step.drops)
            ((name, column),) = step.writes.items()
            table = table.append_column(name, arrow_of(np.zeros((table.num_rows, *column.shape), column.dtype), column))
            clock.lap()
        else:
            table = apply(step, table, models)
            spent[step.name] = spent.get(step.name, 0.0) + clock.lap()
    return table


def _memcpy() -> float:
    import numpy as np

    one, other = np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    begun = time.perf_counter()
    np.copyto(other, one)
    return COPIED / (time.perf_counter() - begun) / 1e9


def _disk(folder: Path) -> float:
    """Written and durable."""
    data = os.urandom(1 << 20)
    begun = time.perf_counter()
    with open(folder / "written", "wb") as file:
        for _ in range(WRITTEN >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN / (time.perf_counter() - begun) / 1e9


if __name__ == "__main__":
    main()
