"""Dataset.check: what a rehearsal finds, that it writes nothing, and that it takes no more rows than asked for."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import PlanError

Options = dict[str, Any]


class Add:
    """A model that counts its rows."""

    seen: ClassVar[Counter[str]] = Counter()

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        Add.seen["rows"] += len(batch["x"])
        return batch["x"] + 1.0


class Missing:
    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin is not there")

    def __call__(self, batch: Any) -> Any:
        return batch


class Sleeps:
    """A simulated model: every call waits."""

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        threading.Event().wait(0.01)
        return batch * 2


def odd_fails(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] % 50 == 7:
        raise ValueError(f"bad id {row['id']}")
    return row


def dies(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 999:
        os._exit(3)
    return row


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_all_is_well_and_nothing_is_written(
    data: Path, tmp_path: Path, quiet: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    ds = hr.read_parquet(data).predict(Add, input=["id", "x"], output="y").evaluate(mean=hr.metrics.Mean("y"))
    report = ds.check(rows=100, splits=5, price_per_hour=3.6, **quiet)
    assert tree(tmp_path) == before
    assert report.ok
    assert not report.failures
    assert (report.rows_sampled, report.splits_sampled, report.inputs) == (100, 5, 5)
    assert report.rows_expected == 200
    assert report.schema is not None
    assert report.schema.names == ["id", "x", "name", "label", "nested", "when", "y"]
    assert report.rows_out == 200
    assert report.output_bytes
    assert report.expected_s is not None
    assert report.cost == pytest.approx(report.expected_s / 1000)
    assert report.expected_low_s is not None
    assert report.expected_high_s is not None
    assert report.expected_low_s <= report.expected_s <= report.expected_high_s
    assert report.memory_bytes
    assert list(report.metrics) == ["mean"]
    text = str(report)
    assert "ready to run" in text
    assert "nothing was written" in text
    assert report._repr_html_().startswith("<pre>")
    assert json.loads(json.dumps(report.to_dict()))["schema"]["y"] == "double"


def test_failing_rows_are_named(data: Path, quiet: Options) -> None:
    report = hr.read_parquet(data).map(odd_fails).check(rows=200, splits=5, **quiet)
    assert not report.ok
    assert report.rows_failed == 4
    found = {(f.stage, Path(f.uri).name, f.row, f.error) for f in report.failures}
    assert found == {("map(odd_fails)", f"f{i // 40}.parquet", i % 40, f"ValueError: bad id {i}") for i in (7, 57, 107, 157)}
    assert all("on_error" in f.next for f in report.failures)
    assert "4 rows of 200 sampled failed" in str(report)
    assert "row 7 of" in str(report)


def test_a_model_that_cant_be_constructed(quiet: Options) -> None:
    report = hr.range(1000).predict(Missing, input="id").check(**quiet)
    assert not report.ok
    (failure,) = report.failures
    assert "weights.bin is not there" in failure.error
    assert failure.stage == "predict(Missing)"
    assert failure.next
    assert report.expected_s is None


def test_one_of_several_models_that_cant_be_constructed() -> None:
    models = {"good": lambda ids: ids + 1, "bad": Missing}
    report = hr.range(1000).predict(models, input="id").check(rows=100, splits=4, engine="threads")
    assert not report.ok
    assert report.rows_failed == 100
    assert "weights.bin is not there" in report.failures[0].error
    assert "bad" in report.failures[0].stage


def test_a_metric_that_cant_read_its_column() -> None:
    ds = hr.range(1000).map(lambda row: {"a": row["id"]}).evaluate(mean=hr.metrics.Mean("score"))
    report = ds.check(engine="threads")
    assert not report.ok
    assert "'score'" in report.failures[0].error
    assert "mean" in report.failures[0].stage


def test_types_that_drift_between_places() -> None:
    def drifting(row: dict[str, Any]) -> dict[str, Any]:
        i = row["id"]
        return {"number": 1 if i < 300 else 2.5 if i < 700 else None, "kind": "a" if i < 500 else 3}

    report = hr.range(1000).map(drifting).check(rows=100, splits=5, engine="threads")
    (failure,) = [f for f in report.failures if f.stage == "schema"]
    assert "'kind' is string in" in failure.error
    assert "int64 in" in failure.error
    (warning,) = report.warnings
    assert "'number' is int64 in" in warning
    assert "double in" in warning
    assert "null in" in warning
    assert "from row" in warning


def test_broken_input_is_a_failure(tmp_path: Path) -> None:
    for i in range(4):
        pq.write_table(pa.table({"id": np.arange(100)}), tmp_path / f"{i}.parquet")
    (tmp_path / "2.parquet").write_bytes(b"PAR1 and no more")
    report = hr.read_parquet(tmp_path).check(rows=100, splits=4)
    assert not report.ok
    assert [Path(f.uri).name for f in report.failures] == ["2.parquet"]
    assert report.failures[0].stage == "read"
    assert report.rows_sampled >= 75


def test_only_broken_input_and_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    report = hr.read_parquet(tmp_path).check()
    assert not report.ok
    assert Path(report.failures[0].uri).name == "a.parquet"
    assert "a.parquet" in str(report)
    empty = tmp_path / "empty"
    empty.mkdir()
    report = hr.read_parquet(empty).check()
    assert not report.ok
    assert "nothing to read" in report.failures[0].error


def test_the_first_file_is_broken_where_an_engine_is_to_be_chosen(tmp_path: Path) -> None:
    for i in range(1, 4):
        pq.write_table(pa.table({"id": np.arange(100)}), tmp_path / f"{i}.parquet")
    (tmp_path / "0.parquet").write_bytes(b"PAR1 and no more")
    report = hr.read_parquet(tmp_path).map(lambda row: row).check(rows=100, splits=4)
    assert [Path(f.uri).name for f in report.failures] == ["0.parquet"]
    assert report.rows_sampled == 100


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")
def test_a_row_that_kills_its_worker() -> None:
    report = hr.range(1000).map(dies).check(rows=100, splits=4, engine="processes")
    (failure,) = report.failures
    assert (failure.stage, failure.row, report.rows_failed) == ("map(dies)", 999, 1)
    assert "exit code 3" in failure.error


def test_no_rows() -> None:
    report = hr.range(0).map(odd_fails).check()
    assert report.ok
    assert report.rows_expected == 0
    assert "no row to rehearse" in str(report)


def test_a_plan_that_cant_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="'nope'"):
        hr.range(10).select("nope").check()
    for wrong in ({"rows": 0}, {"splits": True}, {"price_per_hour": -1}, {"engine": "steam"}):
        with pytest.raises(PlanError):
            hr.range(10).check(**wrong)


def test_rows_bound_what_a_model_is_given(data: Path) -> None:
    Add.seen.clear()
    report = hr.read_parquet(data).predict(Add, input=["x"], output="y").check(rows=30, splits=4, engine="inline")
    assert report.rows_sampled == 30
    assert Add.seen["rows"] == 30


def test_the_bottleneck_is_named() -> None:
    ds = hr.range(1_000_000).map_batches(lambda b: b).predict(Sleeps, input="id", output="p", device="sim", batch_size=50)
    report = ds.check(rows=400, splits=4, engine="threads")
    assert report.ok
    assert report.bottleneck.startswith("predict(Sleeps)")
    assert report.workers["sim"] == 1
    assert report.expected_s is not None
    assert report.expected_s >= 100  # a million rows in batches of 50 and 10 ms each are 200 s
    (stage,) = [s for s in report.stages if s.pool == "sim"]
    assert stage.work_s == max(s.work_s / s.workers for s in report.stages)


def test_filters_flat_maps_and_limits_count() -> None:
    ds = hr.range(100_000).filter(pc.less(pc.field("id"), 50_000)).flat_map(lambda row: [row, row, row])
    report = ds.check(rows=800, engine="threads")
    assert report.rows_expected == 100_000
    assert report.rows_out == pytest.approx(150_000, rel=0.01)
    limited = ds.limit(600).check(rows=800, engine="threads")
    assert limited.rows_out == 600
    assert any("limit" in note for note in limited.notes)


def test_stop_conditions_end_no_rehearsal() -> None:
    ds = hr.range(1000).evaluate(rows=hr.metrics.Count(), stop_if={"rows": lambda n: n > 0}, stop_after_rows=0)
    report = ds.check(rows=100, engine="threads")
    assert report.ok
    assert "stop_if['rows']" in report.warnings[0]
    assert report.metrics["rows"] == 100


def test_nan_of_a_model_is_a_warning() -> None:
    report = hr.range(100).predict(lambda ids: ids * np.nan, input="id", output="p").check(rows=50, engine="threads")
    assert report.ok
    assert any("NaN" in warning for warning in report.warnings)


def test_csv_and_json(tmp_path: Path) -> None:
    lines = [f"{i},{i * 2}" for i in range(500)]
    (tmp_path / "a.csv").write_text("a,b\n" + "\n".join(lines) + "\n1,2,3\n")
    report = hr.read_csv(tmp_path / "a.csv").check(rows=100, splits=4)
    assert [(f.stage, f.row) for f in report.failures] == [("read", 500)]
    assert report.splits_sampled == 4
    assert report.rows_expected == 501
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"a": i}) for i in range(500)))
    report = hr.read_json(tmp_path / "a.jsonl").map(lambda row: {"b": row["a"]}).check(rows=100)
    assert report.ok
    assert report.schema == pa.schema([("b", pa.int64())])


def test_images(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(30):
        Image.fromarray(np.full((40 + i, 50, 3), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "17.png").write_bytes(b"no image")
    ds = hr.read_images(tmp_path).apply(hr.images.decode("bytes"))
    report = ds.check(rows=30, splits=3)
    assert report.rows_expected == 30
    assert [Path(f.uri).name for f in report.failures] == ["17.png"]
    assert "decode" in report.failures[0].stage


def test_a_long_listing_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.connectors import storage

    table = pa.table({"id": np.arange(10)})
    first = tmp_path / "000000.parquet"
    pq.write_table(table, first)
    for i in range(1, 3000):
        (tmp_path / f"{i:06}.parquet").hardlink_to(first)
    opened: set[str] = set()
    real = storage.open_reader

    def counting(uri: str, *args: Any, **kwargs: Any) -> Any:
        opened.add(Path(uri).name)
        return real(uri, *args, **kwargs)

    monkeypatch.setattr(storage, "open_reader", counting)
    report = hr.read_parquet(tmp_path).check(rows=200, splits=8)
    assert report.ok
    assert report.inputs == 3000
    assert report.rows_expected == 30_000
    assert not report.rows_exact
    assert 8 <= len(opened) <= 40
    assert {"000000.parquet", "002999.parquet"} <= opened
