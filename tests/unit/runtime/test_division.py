"""What splits are divided to, by what is known of a row's time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import headrace as hr
from headrace.api.planning import lay_out
from headrace.connectors.packing import PACK_BYTES
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.options import RunOptions
from headrace.plan.columns import ALL
from headrace.plan.nodes import Write
from headrace.runtime.division import DEVICE_ROW_S, GUESSED_BYTES, LEAST_S, MOST_SPLITS, STREAM_ROW_S, USUAL_S, choose_division
from headrace.runtime.engine import Sampled
from headrace.worker.program import Program

ROWS = 10_000


def add_one(x: np.ndarray) -> np.ndarray:
    return x + 1


class Answers:
    """A model that answers row by row."""

    async def stream(self, rows: Any) -> Any:
        async for row in rows:
            yield row


@pytest.fixture
def data(tmp_path: Path) -> hr.Dataset:
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(ROWS)}), tmp_path / "a.parquet")
    return hr.read_parquet(tmp_path / "a.parquet")


def program(ds: hr.Dataset, tmp_path: Path, *, per_input: bool = False, **options: Any) -> Program:
    sink = ParquetSink(str(tmp_path / "out"), outputs="per_input" if per_input else "packed")
    plan = replace(ds._plan, write=Write(sink))  # pyright: ignore[reportPrivateUsage]
    return lay_out(plan, RunOptions(**options), ALL).program


def sampled(program: Program, row_s: float, rows: float = ROWS) -> Sampled:
    return Sampled(len(program.ops), row_s, 8.0, row_s * rows)


def split_s(program: Program, row_s: float, found: Any) -> float:
    """Work in the largest split."""
    source: Any = program.source
    splits = source.divided(found).splits(per_input=False)
    return max(split.rows or 0 for split in splits) * row_s


def test_quick_rows_leave_splits_as_they_are(data: hr.Dataset, tmp_path: Path) -> None:
    p = program(data.predict(add_one, input="x"), tmp_path)
    assert choose_division(p, sampled(p, USUAL_S / ROWS * 0.9)) is None
    assert choose_division(p, None) is None, "untried, and few rows"
    assert choose_division(program(data, tmp_path), sampled(p, 0.0)) is None


@pytest.mark.parametrize("row_s", [0.005, 0.05, 1.0])
def test_slow_rows_make_splits_of_some_seconds(data: hr.Dataset, tmp_path: Path, row_s: float) -> None:
    p = program(data.predict(add_one, input="x"), tmp_path)
    found = choose_division(p, sampled(p, row_s))
    assert found is not None
    assert found.by_rows
    aim = max(LEAST_S, row_s * ROWS / MOST_SPLITS)
    assert aim / 2 <= split_s(p, row_s, found) <= 2 * aim


def test_rows_that_take_minutes_are_not_divided_to_nothing(data: hr.Dataset, tmp_path: Path) -> None:
    p = program(data.predict(add_one, input="x"), tmp_path)
    found = choose_division(p, sampled(p, 3_600.0))
    assert found is not None
    assert split_s(p, 1.0, found) >= 8


def test_what_must_stay_as_it_is(data: hr.Dataset, tmp_path: Path) -> None:
    ds = data.predict(add_one, input="x")
    for p in (program(ds, tmp_path, per_input=True), program(ds, tmp_path, deterministic=True)):
        assert choose_division(p, sampled(p, 1.0)) is None


def test_models_that_answer_row_by_row_are_taken_for_slow(data: hr.Dataset, tmp_path: Path) -> None:
    p = program(data.predict(Answers(), input="x"), tmp_path)
    found = choose_division(p, None)
    assert found is not None
    assert found.by_rows
    assert LEAST_S / 2 <= split_s(p, STREAM_ROW_S, found) <= 2 * LEAST_S


def test_devices_are_taken_for_quicker(data: hr.Dataset, tmp_path: Path) -> None:
    p = program(data.predict(add_one, input="x", device="sim"), tmp_path)
    assert choose_division(p, Sampled(0, 0.0, 0.0, 0.0)) is None
    for rows, much in ((int(4 * USUAL_S / DEVICE_ROW_S), False), (2_000_000, True)):
        many = program(hr.range(rows).predict(add_one, input="id", device="sim"), tmp_path)
        found = choose_division(many, Sampled(0, 0.0, 0.0, 0.0))
        assert (found is not None) == much, "few bytes stay together, where a guess is all that is known"
        if found is not None:
            assert not found.by_rows
            assert found.split_bytes >= GUESSED_BYTES


@pytest.mark.parametrize("told", [math.nan, math.inf, -1.0, 1e-300, 0.0])
def test_a_source_that_tells_no_size_of_rows(
    data: hr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: float
) -> None:
    """What a sample told is taken."""
    p = program(data.predict(add_one, input="x"), tmp_path)
    row_s = 10.0 / ROWS * 10
    monkeypatch.setattr(type(p.source), "row_bytes", lambda _: told)
    found = choose_division(p, sampled(p, row_s))
    assert found is not None
    assert LEAST_S / 4 <= split_s(p, row_s, found) <= 4 * LEAST_S


def test_of_a_listing_without_end_splits_are_small(data: hr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = program(data.predict(add_one, input="x"), tmp_path)
    monkeypatch.setattr("headrace.runtime.division.LOOK_AHEAD", 0)
    row_bytes = p.source.row_bytes()  # type: ignore[attr-defined]
    row_s = 2 * USUAL_S / (PACK_BYTES / row_bytes)
    found = choose_division(p, Sampled(1, row_s, 8.0, math.inf))
    assert found is not None
    assert LEAST_S / 2 <= found.split_bytes / row_bytes * row_s <= 2 * LEAST_S


def test_splits_are_never_larger_than_usual(data: hr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so much work that a share of it is more than a split of the usual size, that one stays."""
    p = program(data.predict(add_one, input="x"), tmp_path)
    row_bytes = p.source.row_bytes()  # type: ignore[attr-defined]
    for size, much in ((400 * PACK_BYTES, True), (4 * PACK_BYTES, False)):
        monkeypatch.setattr("headrace.runtime.division._least_bytes", lambda _, size=size: size)
        found = choose_division(p, Sampled(1, 1.5 * USUAL_S / (PACK_BYTES / row_bytes), 8.0, math.inf))
        assert (found is None) == much


def test_of_very_many_inputs_splits_are_not_the_smallest(
    data: hr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many more there are, what was seen is enough work for larger ones."""
    p = program(data.predict(add_one, input="x"), tmp_path)
    monkeypatch.setattr("headrace.runtime.division.LOOK_AHEAD", 0)
    row_s = 100 * LEAST_S * MOST_SPLITS / (PACK_BYTES / p.source.row_bytes())  # type: ignore[attr-defined]
    found = choose_division(p, Sampled(1, row_s, 8.0, math.inf))
    assert found is not None
    assert found.split_bytes / p.source.row_bytes() * row_s > 10 * LEAST_S  # type: ignore[attr-defined]
