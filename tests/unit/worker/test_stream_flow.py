"""Rows of a streaming model stay in flight across steps, blocks and splits."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr

ENGINES = ["inline", "threads", "processes"]
ROWS = 1600


@pytest.fixture
def files(tmp_path: Path) -> str:
    """16 files of 100 rows."""
    source = tmp_path / "in"
    source.mkdir()
    for i in range(16):
        pq.write_table(pa.table({"x": np.arange(100) + i * 100}), source / f"{i:02}.parquet")
    return str(source)


class Patient:
    """Each eighth row is answered once `later` rows came after it, or all of them: whoever waits for whole steps never gets
    on. Splits may come in any order, and by several calls, so one replica counts them all.
    """

    def __init__(self, later: int, concurrency: int = 64) -> None:
        self.later = later
        self.concurrency = concurrency
        self.came = 0
        self.news: asyncio.Condition | None = None

    async def stream(self, rows: Any) -> Any:
        answers: asyncio.Queue[Any] = asyncio.Queue()
        news = self.news = self.news or asyncio.Condition()

        async def one(key: int, x: int) -> None:
            mine = self.came = self.came + 1
            async with news:
                news.notify_all()
                if x % 8 == 0:
                    await news.wait_for(lambda: self.came >= min(mine + self.later, ROWS))
            await answers.put((key, {"y": x * 2}))

        async def take() -> None:
            async with asyncio.TaskGroup() as group:
                async for key, row in rows:
                    group.create_task(one(key, row["x"]))
            await answers.put(None)

        taking = asyncio.create_task(take())
        while (answer := await answers.get()) is not None:
            yield answer
        await taking


def written(ds: Any, out: Path, engine: str, **options: Any) -> pa.Table:
    ds.write_parquet(str(out), engine=engine, progress="quiet", cpus=2, **options)
    return pq.read_table(str(out))


def doubled(table: pa.Table) -> bool:
    return table["x"].to_pylist() == list(range(ROWS)) and table["y"].to_pylist() == [2 * x for x in range(ROWS)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_takes_long_holds_nobody_back(files: str, tmp_path: Path, engine: Any) -> None:
    ds = hr.read_parquet(files).predict(Patient(150), input=["x"], output="y", replicas=1)
    assert doubled(written(ds, tmp_path / "out", engine))


@pytest.mark.parametrize("engine", ["inline", "threads"])
def test_rows_that_are_delivered_flow_too(files: str, engine: Any) -> None:
    ds = hr.read_parquet(files).predict(Patient(60), input=["x"], output="y", replicas=1)
    assert [r["y"] for r in ds.take(ROWS, engine=engine, progress="quiet")] == [2 * x for x in range(ROWS)]


class Gatherer:
    """Answers in batches of 7, and the rest when its input ends: what it is given must end now and then."""

    def __init__(self) -> None:
        self.calls = 0

    async def stream(self, rows: Any) -> Any:
        self.calls += 1
        held = []
        async for item in rows:
            held.append(item)
            if len(held) == 7:
                for key, row in held:
                    yield key, {"y": row["x"] * 2}
                held = []
        for key, row in held:
            yield key, {"y": row["x"] * 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_gathers_rows_gets_on(files: str, tmp_path: Path, engine: Any) -> None:
    assert doubled(written(hr.read_parquet(files).predict(Gatherer, input=["x"], output="y"), tmp_path / "out", engine))


def test_little_memory_is_enough(files: str, tmp_path: Path) -> None:
    ds = hr.read_parquet(files).predict(Gatherer, input=["x"], output="y")
    assert doubled(written(ds, tmp_path / "out", "threads", memory_bytes=2 << 20))


class Moody:
    """Some rows fail, and one breaks the stream for all that are under way."""

    async def stream(self, rows: Any) -> Any:
        async for key, row in rows:
            if row["x"] == 777:
                raise RuntimeError("broken")
            yield key, ValueError("no") if row["x"] % 100 == 3 else {"y": row["x"] * 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_fail_alone_across_steps(files: str, tmp_path: Path, engine: Any) -> None:
    ds = hr.read_parquet(files).predict(Moody(), input=["x"], output="y")
    found = written(ds, tmp_path / "out", engine, on_error="quarantine")
    bad = {777, *range(3, ROWS, 100)}
    assert found["x"].to_pylist() == [x for x in range(ROWS) if x not in bad]
    aside = pa.concat_tables(pq.read_table(p) for p in (tmp_path / "out").rglob("*quarantine*/**/*.parquet"))
    assert set(aside["x"].to_pylist()) == bad
    with pytest.raises(hr.UserCodeError, match=r"ValueError: no|broken"):
        written(ds, tmp_path / "other", engine)


class Fatal:
    """Ends its process at one row, once: a file tells that it did."""

    def __init__(self, file: str, times: int) -> None:
        self.file = file
        self.times = times

    async def stream(self, rows: Any) -> Any:
        async for key, row in rows:
            if row["x"] == 1234:
                with open(self.file, "a") as f:
                    f.write("x")
                if os.path.getsize(self.file) <= self.times:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield key, {"y": row["x"] * 2}


def test_a_worker_that_dies_loses_and_doubles_nothing(files: str, tmp_path: Path) -> None:
    ds = hr.read_parquet(files).predict(Fatal(str(tmp_path / "died"), 1), input=["x"], output="y")
    assert doubled(written(ds, tmp_path / "out", "processes"))
    assert os.path.getsize(tmp_path / "died") == 2


def test_the_row_that_kills_is_found(files: str, tmp_path: Path) -> None:
    ds = hr.read_parquet(files).predict(Fatal(str(tmp_path / "died"), 99), input=["x"], output="y")
    found = written(ds, tmp_path / "out", "processes", on_error="quarantine")
    assert found["x"].to_pylist() == [x for x in range(ROWS) if x != 1234]
    assert os.path.getsize(tmp_path / "died") == 3


class Stuck:
    """Never answers one row."""

    async def stream(self, rows: Any) -> Any:
        stuck = False
        async for key, row in rows:
            if row["x"] == 5:
                stuck = True
            else:
                yield key, {"y": row["x"] * 2}
        if stuck:
            await asyncio.sleep(3600)


def test_a_stuck_row_ends_by_the_timeout(files: str, tmp_path: Path) -> None:
    ds = hr.read_parquet(files).predict(Stuck(), input=["x"], output="y")
    found = written(ds, tmp_path / "out", "processes", timeout=1.5, on_error="quarantine")
    assert found["x"].to_pylist() == [x for x in range(ROWS) if x != 5]


class Two:
    """A metric and a second model follow."""

    async def stream(self, rows: Any) -> Any:
        async for key, row in rows:
            yield key, {"z": row["y"] + 1}


@pytest.mark.parametrize("engine", ENGINES)
def test_one_stream_after_another(files: str, tmp_path: Path, engine: Any) -> None:
    patient = Patient(100)
    ds = hr.read_parquet(files).predict(patient, input=["x"], output="y", replicas=1).predict(Two, input=["y"], output="z")
    found = written(ds, tmp_path / "out", engine)
    assert doubled(found)
    assert found["z"].to_pylist() == [2 * x + 1 for x in range(ROWS)]


def test_replicas_have_workers_of_their_own(files: str, tmp_path: Path) -> None:
    ds = hr.read_parquet(files).predict(Gatherer, input=["x"], output="y", replicas=2)
    assert doubled(written(ds, tmp_path / "out", "threads"))
