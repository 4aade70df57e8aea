"""How often models are loaded, where, and who waits for it."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import UserCodeError

made: list[Any] = []


@pytest.fixture(autouse=True)
def none_made() -> None:
    made.clear()


class Bound:
    """As a model that belongs to its thread."""

    load_s = 0.0

    def __init__(self) -> None:
        time.sleep(self.load_s)
        self._lines = sqlite3.connect(":memory:")
        self.thread, self.calls, self.closed = threading.current_thread(), 0, 0
        made.append(self)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        return x * self._lines.execute("select 2").fetchone()[0]

    def close(self) -> None:
        self._lines.close()
        self.closed += 1


class Slow(Bound):
    load_s = 2.0


class Busy(Bound):
    """Whose work is worth several workers."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        time.sleep(0.002 * len(x) / 100)
        return super().__call__(x)


def files(folder: Path, rows: int) -> Path:
    folder.mkdir()
    for i in range(16):
        ids = np.arange(i * rows, (i + 1) * rows)
        pq.write_table(pa.table({"id": ids, "x": ids * 0.5}), folder / f"{i:02d}.parquet")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return files(tmp_path / "in", 4000)


def check(out: Path, rows: int) -> None:
    found = pq.ParquetDataset(out).read()
    assert found["id"].to_pylist() == list(range(rows))
    assert np.array_equal(found["y"], found["x"].to_numpy() * 2)


def test_what_was_tried_is_not_loaded_again(data: Path, tmp_path: Path) -> None:
    hr.read_parquet(data).predict(Bound, input="x", output="y").write_parquet(tmp_path / "out", cpus=1, progress="quiet")
    check(tmp_path / "out", 64_000)
    assert [(m.closed, m.calls > 1) for m in made] == [(1, True)]
    assert made[0].thread is not threading.current_thread()


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_every_worker_has_its_own_in_its_own_thread(data: Path, tmp_path: Path, engine: Any) -> None:
    class Here(Busy):
        """Can't be sent to processes, so that only threads are left, whatever a trial tells."""

        lock = threading.Lock()

    ds = hr.read_parquet(data).predict(Here, input="x", output="y", batch_size=100, device="cpu")
    run = ds.write_parquet(tmp_path / "out", cpus=3, engine=engine, progress="quiet")
    check(tmp_path / "out", 64_000)
    assert run.engine == "threads"
    assert 1 <= len(made) <= 4  # those of models that wait are no CPU worker's, and tried once more
    assert len({id(m.thread) for m in made}) == len(made)
    assert all(m.closed == 1 for m in made)


def test_little_work_does_not_wait_for_a_second_load(tmp_path: Path) -> None:
    data = files(tmp_path / "in", 40_000)
    run = hr.read_parquet(data).predict(Slow, input="x", output="y").write_parquet(tmp_path / "out", progress="quiet")
    check(tmp_path / "out", 640_000)
    assert len(made) == 1
    assert any("one worker ends before another one has loaded" in note for note in run.notes), run.notes


class Once:
    """Lets a row pass that it has not seen."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, row: dict[str, Any]) -> bool:
        new = row["id"] not in self.seen
        self.seen.add(row["id"])
        return new


def test_a_function_with_a_state_begins_the_run_without_a_trial_behind_it(data: Path, tmp_path: Path) -> None:
    run = hr.read_parquet(data).filter(Once).write_parquet(tmp_path / "out", cpus=1, progress="quiet")
    assert run.rows == 64_000


def test_a_deterministic_run_begins_with_fresh_models(data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(Bound, input="x", output="y")
    ds.write_parquet(tmp_path / "out", cpus=1, deterministic=True, progress="quiet")
    check(tmp_path / "out", 64_000)
    assert [m.closed for m in made] == [1, 1]


def test_a_stream_leaves_nothing_behind(data: Path) -> None:
    ds = hr.read_parquet(data).predict(Bound, input="x", output="y")
    batches = ds.iter_batches(batch_size=1000, cpus=2, progress="quiet")
    next(batches)
    batches.close()
    assert made
    assert all(m.closed == 1 for m in made)


def test_an_interrupt_does_not_wait_for_what_is_tried(data: Path, tmp_path: Path) -> None:
    gate, ended = threading.Event(), threading.Event()

    def hangs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        gate.wait()
        ended.set()
        return batch

    with pytest.raises(KeyboardInterrupt):
        hr.read_parquet(data).map_batches(hangs).write_parquet(tmp_path / "out", progress="quiet")
    gate.set()
    assert ended.wait(30)
    run = hr.read_parquet(data).map_batches(lambda b: {**b, "y": b["x"] * 2}).write_parquet(tmp_path / "out2", progress="quiet")
    assert run.rows == 64_000


class Failing(Bound):
    def __init__(self) -> None:
        super().__init__()
        raise ValueError("no such model")


def test_a_load_that_fails_ends_the_run(data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(Failing, input="x", output="y", device="cpu")
    with pytest.raises(UserCodeError, match="no such model"):
        ds.write_parquet(tmp_path / "out", cpus=2, progress="quiet")
