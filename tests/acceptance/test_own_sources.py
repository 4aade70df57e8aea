"""Sources that users write: what they get wrong costs one job at most, and what is as good as right works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.api.dataset import from_source
from headrace.connectors.blocks import Piece, rechunk
from headrace.core.refs import Origin, Segment
from headrace.core.splits import Fragment, Split


class Numbers:
    """0..n-1 in splits of 10, listed as a list."""

    name = "numbers"
    remote = False

    def __init__(self, rows: int, broken: bool = False) -> None:
        self.rows, self.broken, self.columns = rows, broken, ("x",)

    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.int64()) for name in self.columns])

    def splits(self, *, per_input: bool) -> Any:
        if self.broken:
            raise OSError("the catalogue gives no answer")
        found: list[Split] = []
        for start in range(0, self.rows, 10):
            stop = min(self.rows, start + 10)
            fragment = Fragment("numbers", 8 * self.rows, "v", start, stop, stop - start, "numbers")
            found.append(Split(len(found), (fragment,), 8 * (stop - start), stop - start))
        return found

    def project(self, columns: Any) -> Numbers:
        other = copy.copy(self)
        other.columns = tuple(columns)
        return other

    def prune(self, predicate: Any) -> tuple[Numbers, bool]:
        return self, False

    def open(self, split: Split, limits: Any, on_bad: Any = None) -> Iterator[Any]:
        (f,) = split.fragments
        arrays = [pa.array(np.arange(f.start, f.stop)) for _ in self.columns]
        batch = pa.RecordBatch.from_arrays(arrays, names=list(self.columns))
        yield from rechunk(iter([Piece(batch, Origin((Segment("numbers", f.start, f.stop - f.start),)), 8.0)]), limits)

    def count(self) -> int:
        return self.rows

    def describe(self) -> str:
        return "numbers"


@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
def test_splits_may_be_a_list(tmp_path: Path, engine: Any) -> None:
    ds = from_source(Numbers(3_000))
    run = ds.map(lambda row: {"y": row["x"] + 1}).write_parquet(tmp_path / "out", engine=engine, progress="quiet")
    assert run.rows == 3_000
    assert sorted(hr.read_parquet(tmp_path / "out").to_arrow(progress="quiet")["y"].to_pylist()) == list(range(1, 3_001))


def test_a_job_whose_source_can_not_be_listed_does_not_touch_the_others(tmp_path: Path) -> None:
    sources = [Numbers(100), Numbers(100, broken=True), Numbers(100)]
    jobs = [hr.Job(from_source(source).write_parquet, str(tmp_path / f"out{i}")) for i, source in enumerate(sources)]
    with pytest.raises(hr.JobsFailed, match="1 of 3 jobs failed") as caught:
        hr.run_jobs(jobs, progress="quiet")
    assert [result.ok for result in caught.value.results] == [True, False, True]
    assert "the catalogue gives no answer" in str(caught.value.results[1].error)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_an_image_larger_than_a_value_may_be(tmp_path: Path, on_error: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"small")
    with (tmp_path / "in" / "b.jpg").open("wb") as file:
        file.truncate((1 << 31) + 5)  # sparse
    ds = hr.read_images(tmp_path / "in")
    if on_error == "fail":
        with pytest.raises(hr.DataError, match="2 GiB"):
            ds.write_parquet(tmp_path / "out", on_error=on_error, progress="quiet")
        return
    run = ds.write_parquet(tmp_path / "out", on_error=on_error, progress="quiet")
    assert (run.rows, run.tally.skipped) == (1, 1)
