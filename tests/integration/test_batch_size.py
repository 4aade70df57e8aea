"""Batch sizes through the public verbs: how large batches become, memory that runs out, threads of workers."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import UserCodeError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))


class Tiny:
    """A device with room for so many rows, and none for the rows of `never`; notes sizes in a file, a line a call."""

    def __init__(self, room: int, notes: str, never: tuple[int, ...] = (), later: int = 1 << 30) -> None:
        self.room, self.notes, self.never, self.later, self.calls = room, notes, never, later, 0

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        self.calls += 1
        with open(self.notes, "a") as notes:
            notes.write(f"{len(ids)}\n")
        if len(ids) > (self.room if self.calls < 10 else min(self.room, self.later)) or np.isin(ids, self.never).any():
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return ids * 3


def _predicted(tmp_path: Path, engine: Any, rows: int = 20_000, on_error: Any = "fail", **device: Any) -> tuple[list[int], Any]:
    notes = tmp_path / "notes"
    ds = hr.range(rows).predict(Tiny, input="id", output="p", device="sim", constructor_kwargs={"notes": str(notes), **device})
    run = ds.write_parquet(str(tmp_path / "out"), engine=engine, progress="quiet", on_error=on_error)
    table = pq.read_table(tmp_path / "out", columns=["id", "p"])
    assert table.column("p").to_pylist() == [3 * i for i in table.column("id").to_pylist()]
    assert len(table) + run.tally.skipped == rows
    return [int(line) for line in notes.read_text().split()], run


@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
def test_a_device_that_is_too_small_loses_no_row(tmp_path: Path, engine: str) -> None:
    sizes, _ = _predicted(tmp_path, engine, room=100)
    failed = [n for n in sizes if n > 100]
    assert failed, "it found the limit by running into it"
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(failed))


def test_a_device_that_becomes_smaller_during_the_run(tmp_path: Path) -> None:
    sizes, _ = _predicted(tmp_path, "threads", room=5000, later=30)
    assert max(sizes[-20:]) <= 30


def test_the_first_batch_is_already_too_large(tmp_path: Path) -> None:
    sizes, _ = _predicted(tmp_path, "threads", rows=500, room=1)
    assert sizes[0] > 1
    assert sizes[-1] == 1


def test_a_row_that_does_not_fit_alone_is_set_aside(tmp_path: Path) -> None:
    _, run = _predicted(tmp_path, "threads", room=64, never=(1234,), on_error="skip")
    assert run.tally.skipped == 1


def test_or_ends_the_run_with_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="out of memory") as caught:
        _predicted(tmp_path, "threads", room=64, never=(1234,))
    assert "single row does not fit" in (caught.value.hint or "")


class Overhead:
    """Clock and work of its own: a call costs as much as 5,000 rows."""

    def __init__(self, notes: str) -> None:
        self.notes = notes

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        import time

        with open(self.notes, "a") as notes:
            notes.write(f"{len(ids)}\n")
        time.sleep(0.005 + 1e-6 * len(ids))
        return ids


def test_batches_may_grow_beyond_what_a_step_was_planned_to_hold(tmp_path: Path) -> None:
    """Blocks of 200 rows: a batch of thousands takes what the scheduler gathers because the worker asked for it."""
    notes = tmp_path / "notes"
    ds = (
        hr.range(100_000)
        .map_batches(dict, batch_size=200)
        .predict(Overhead, input="id", output="p", device="sim", constructor_args=[str(notes)])
    )
    out = ds.to_arrow(engine="threads", progress="quiet")
    assert out.column("p").to_pylist() == list(range(100_000))
    assert max(int(line) for line in notes.read_text().split()) > 1000


def test_fixed_sizes_are_kept(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    ds = hr.range(5000).predict(Overhead, input="id", output="p", device="sim", batch_size=64, constructor_args=[str(notes)])
    ds.run(engine="threads", progress="quiet")
    sizes = [int(line) for line in notes.read_text().split()]
    assert max(sizes) == 64
    assert sum(sizes) == 5000


class Threads:
    """What a worker's native libraries are told."""

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return np.full(len(ids), int(os.environ["OMP_NUM_THREADS"]) * 1000 + int(os.environ["NUMEXPR_MAX_THREADS"]))


def test_each_worker_process_has_its_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NUMEXPR_MAX_THREADS", "7")
    ds = (
        hr.range(100)
        .predict(Threads, input="id", output="cpu", device="cpu")
        .predict(Threads, input="id", output="device", device="sim")
    )
    row = ds.to_arrow(engine="processes", progress="quiet").to_pylist()[0]
    assert row["cpu"] == 1007, "one thread a core; what the user has set stays"
    assert row["device"] == min(4, len(os.sched_getaffinity(0))) * 1000 + 7
