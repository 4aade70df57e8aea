"""One split and several workers: batches of n rows are cut in sequence and computed in any order, and are the same ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr

from .conftest import read_back

Options = dict[str, Any]
Batch = dict[str, np.ndarray]
Steps = Callable[[hr.Dataset], hr.Dataset]
ROWS = 4000


def odd(row: dict[str, Any]) -> bool:
    return row["id"] % 2 == 1


def same(batch: Batch) -> Batch:
    return batch


BEFORE: dict[str, tuple[Steps, np.ndarray]] = {
    "filter": (lambda ds: ds.filter(odd), np.arange(1, ROWS, 2)),
    "flat_map": (lambda ds: ds.flat_map(lambda row: [row] * 2), np.repeat(np.arange(ROWS), 2)),
    "other batches": (lambda ds: ds.map_batches(same, batch_size=64), np.arange(ROWS)),
}


@pytest.fixture
def one(tmp_path: Path) -> str:
    """One file of one row group."""
    pq.write_table(pa.table({"id": np.arange(ROWS)}), tmp_path / "in.parquet")
    return str(tmp_path / "in.parquet")


def described(batch: Batch) -> Batch:
    """Of each row, which batch it came in: its first id and its rows."""
    ids = batch["id"]
    return {"id": ids, "first": np.full(len(ids), ids[0]), "rows": np.full(len(ids), len(ids))}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_batches_are_cut_from_the_start_of_the_split(
    one: str, tmp_path: Path, quiet: Options, before: str, deterministic: bool
) -> None:
    steps, ids = BEFORE[before]
    ds = steps(hr.read_parquet(one)).map_batches(described, batch_size=150).predict(lambda x: -x, input="id", output="p")
    run = ds.write_parquet(tmp_path / "out", deterministic=deterministic, **quiet)
    back = read_back(tmp_path / "out")
    assert run.rows == len(ids)
    assert back["id"].to_pylist() == ids.tolist()
    assert back["p"].to_pylist() == (-ids).tolist()
    starts = np.arange(len(ids)) // 150 * 150
    assert back["first"].to_pylist() == ids[starts].tolist()
    assert back["rows"].to_pylist() == np.minimum(150, len(ids) - starts).tolist()


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_one_split_keeps_two_workers_busy(one: str, tmp_path: Path, before: str, delivered: bool) -> None:
    lock = threading.Lock()
    together: list[int] = []  # of each batch, how many there are at work as it begins
    at_work = 0

    def slow(batch: Batch) -> Batch:
        nonlocal at_work
        with lock:
            at_work += 1
            together.append(at_work)
        time.sleep(0.002)
        with lock:
            at_work -= 1
        return batch

    steps, ids = BEFORE[before]
    ds = steps(hr.read_parquet(one)).map_batches(slow, batch_size=100)
    quiet: Options = {"engine": "threads", "cpus": 2, "progress": "quiet"}
    if delivered:
        assert sum(len(b["id"]) for b in ds.iter_batches(batch_size=500, **quiet)) == len(ids)
    else:
        assert ds.write_parquet(tmp_path / "out", **quiet).rows == len(ids)
    assert max(together) == 2


def test_bad_rows_are_told_the_same_whoever_computes(one: str, tmp_path: Path, quiet: Options) -> None:
    def picky(batch: Batch) -> Batch:
        if (batch["id"] % 1001 == 0).any():
            raise ValueError("no multiples of 1001")
        return batch

    ds = hr.read_parquet(one).filter(odd).map_batches(picky, batch_size=64)
    run = ds.write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert (run.rows, run.tally.quarantined, run.tally.filtered) == (ROWS // 2 - 2, 2, ROWS // 2)
    found = pa.concat_tables([pq.read_table(f) for f in (tmp_path / "out" / "_headrace").rglob("quarantine/*.parquet")])
    assert sorted(found["id"].to_pylist()) == [1001, 3003]
