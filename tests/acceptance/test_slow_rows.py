"""Rows that are much work: a kill costs the splits that are open, and those are small."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.api import session
from headrace.commit.records import Released, decode
from headrace.core.errors import UserCodeError
from headrace.core.splits import Division
from headrace.runtime import division

from .conftest import outputs, read_back, table

Options = dict[str, Any]
ROWS = 200


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """One row group of ROWS rows: a split of its own, if rows were quick."""
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table(0, ROWS), folder / "f.parquet")
    return folder


def counting(calls: Path, until: Path) -> Any:
    """A model that notes the rows that it is asked for, and fails at row 150 as long as the marker is there."""
    notes, marker = str(calls), str(until)

    def model(batch: dict[str, np.ndarray]) -> np.ndarray:
        if 150 in batch["id"] and os.path.exists(marker):
            raise ValueError("not now")
        with open(notes, "a") as file:
            file.writelines(f"{i}\n" for i in batch["id"])
        return batch["x"] * 2

    return model


@pytest.mark.on_ray
def test_what_is_settled_of_a_file_is_not_done_again(
    one_file: Path, tmp_path: Path, quiet: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def choose(*_: object) -> Division:
        asked.append(_)
        return Division((one_file / "f.parquet").stat().st_size // 10, by_rows=True)

    monkeypatch.setattr(session, "choose_division", choose)
    calls, marker = tmp_path / "calls", tmp_path / "marker"
    ds = hr.read_parquet(one_file).predict(counting(calls, marker), input=["id", "x"], output="y", batch_size=5)
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", **quiet)
    kept = read_back(tmp_path / "out")["id"].to_pylist() if outputs(tmp_path / "out") else []
    marker.unlink()
    calls.unlink(missing_ok=True)
    run = ds.write_parquet(tmp_path / "out", **quiet)
    again = {int(line) for line in calls.read_text().split()}
    assert len(kept) >= 100
    assert again.isdisjoint(kept)
    assert len(asked) == 1, "the log says what splits are"
    expected = table(0, ROWS).append_column("y", pa.array(np.arange(ROWS) * 1.0))
    assert read_back(tmp_path / "out").equals(expected)
    assert run.rows == ROWS
    assert len(outputs(tmp_path / "out")) > 7
    finished = ds.write_parquet(tmp_path / "out", **quiet)
    assert finished.rows == ROWS
    assert len(asked) == 1


def test_slow_rows_are_found_out(one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "USUAL_S", 0.2)
    monkeypatch.setattr(division, "LEAST_S", 0.1)

    def slow(x: np.ndarray) -> np.ndarray:
        time.sleep(0.005 * len(x))
        return x * 2

    ds = hr.read_parquet(one_file).predict(slow, input="x", output="y")
    run = ds.write_parquet(tmp_path / "out", progress="quiet")
    assert len(outputs(tmp_path / "out")) > 3
    assert read_back(tmp_path / "out")["y"].to_pylist() == [float(i) for i in range(ROWS)]
    assert "rows are much work" in str(run)
    whole = ds.write_parquet(tmp_path / "each", progress="quiet", outputs="per_input")
    assert outputs(tmp_path / "each") == ["f.parquet"]
    assert "rows are much work" not in str(whole)


def test_a_row_of_a_divided_file_is_found_again(one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "choose_division", lambda *_: Division(100, by_rows=True))
    ds = hr.read_parquet(one_file).filter(lambda row: row["id"] % 3 == 0)
    ds.write_parquet(tmp_path / "out", progress="quiet")
    assert len(outputs(tmp_path / "out")) > 10
    rows = read_back(tmp_path / "out")["id"].to_pylist()
    for at in (0, 20, len(rows) - 1):
        told = str(hr.why(tmp_path / "out", row=at))
        assert f"row {rows[at]} " in told or f"rows {rows[at]}" in told or f"row {rows[at]}\n" in told, told


def test_a_session_that_ends_while_it_divides_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one need not wait to see whether it lives."""
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "a.parquet")
    ds = hr.read_parquet(str(tmp_path / "a.parquet"))
    out = tmp_path / "out"

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("headrace.api.session.choose_division", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ds.write_parquet(str(out), engine="threads", progress="quiet")
    logged = sorted((out / "_headrace").glob("run-*/log/*"))
    last = decode(logged[-1].parents[1].name, len(logged) - 1, logged[-1].read_bytes())
    assert last.records == (Released(),)
    ds.write_parquet(str(out), engine="threads", progress="quiet")
    assert pq.read_table(out)["x"].to_pylist() == [1, 2, 3]
