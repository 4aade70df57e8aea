"""Several models in one pass, guards on what they make, and conditions that end a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr

from .conftest import read_back

Batch = dict[str, np.ndarray]


def double(batch: Batch) -> np.ndarray:
    return batch["x"] * 2


def no_sevens(batch: Batch) -> np.ndarray:
    if (batch["x"] % 100 == 7).any():
        raise ValueError("seven")
    return np.where(batch["x"] % 50 == 0, np.nan, batch["x"] + 1)


class Unloadable:
    def __init__(self) -> None:
        raise RuntimeError("no weights")

    def __call__(self, batch: Batch) -> np.ndarray:
        return batch["x"]


def table(rows: int = 1000) -> hr.Dataset:
    return hr.from_arrow(pa.table({"id": np.arange(rows), "x": np.arange(float(rows))}))


@pytest.mark.parametrize("device", ["auto", "sim"])
def test_each_model_adds_its_columns(tmp_path: Path, engine: str, quiet: dict[str, Any], device: str) -> None:
    def both(batch: Batch) -> dict[str, np.ndarray]:
        return {"a": batch["x"] - 1, "b": batch["x"] - 2}

    models = {"two": double, "pair": both}
    ds = table().predict(models, input=["x"], output={"pair": ["a", "b"]}, device=device)
    run = ds.evaluate(m=hr.metrics.Mean("two")).write_parquet(str(tmp_path / "out"), **quiet)
    back = read_back(tmp_path / "out")
    assert back.schema.names == ["id", "x", "two", "a", "b"]
    assert back["two"].to_pylist() == [2.0 * i for i in range(1000)]
    assert back["b"].to_pylist() == [i - 2.0 for i in range(1000)]
    assert run.metrics == {"m": 999.0}
    assert run.guards == {}


def test_models_on_different_devices_and_inputs(tmp_path: Path, engine: str, quiet: dict[str, Any]) -> None:
    seen: list[list[str]] = []

    def names(batch: Batch) -> np.ndarray:
        seen.append(sorted(batch))
        return np.array([len(batch)] * len(batch["x"]))

    ds = table().predict({"two": double, "n": names}, input={"two": ["x"]}, device={"two": "sim"})
    ds.write_parquet(str(tmp_path / "out"), **quiet)
    back = read_back(tmp_path / "out")
    assert back["two"].to_pylist() == [2.0 * i for i in range(1000)]
    assert set(back["n"].to_pylist()) == {2}  # all columns that there were before, and not what the other model says


@pytest.mark.parametrize("device", ["auto", "sim"])
@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_a_failing_model_leaves_the_others_results(
    tmp_path: Path, engine: str, quiet: dict[str, Any], device: str, on_error: str
) -> None:
    ds = table().predict({"two": double, "odd": no_sevens, "none": Unloadable}, input=["x"], device=device)
    run = ds.write_parquet(str(tmp_path / "out"), on_error=on_error, **quiet)
    back = read_back(tmp_path / "out")
    assert back["id"].to_pylist() == list(range(1000))
    assert back["two"].to_pylist() == [2.0 * i for i in range(1000)]
    assert [i for i, v in enumerate(back["odd"].to_pylist()) if v is None] == list(range(7, 1000, 100))
    assert back["none"].null_count == 1000
    odd, none = run.guards["predict(odd)"], run.guards["predict(none)"]
    assert (odd["failed"], odd["why"], odd["nan"]) == (10, "ValueError: seven", {"odd": 20})
    assert none["failed"] == 1000
    assert "no weights" in none["why"]
    assert run.tally.written == 1000
    assert not run.tally.bad
    again = ds.write_parquet(str(tmp_path / "out"), on_error=on_error, **quiet)
    assert again.already_done
    assert again.guards == run.guards


def test_a_failing_model_ends_a_run_that_fails(tmp_path: Path, quiet: dict[str, Any]) -> None:
    ds = table().predict({"two": double, "odd": no_sevens}, input=["x"])
    with pytest.raises(hr.UserCodeError, match="seven"):
        ds.write_parquet(str(tmp_path / "out"), **quiet)


def test_guards_are_in_the_manifest_and_the_report(tmp_path: Path, engine: str, quiet: dict[str, Any]) -> None:
    def bad(batch: Batch) -> np.ndarray:
        out = np.stack([batch["x"], batch["x"]], axis=1).astype(np.float32)
        out[batch["x"] == 3] = [np.nan, np.inf]
        return out

    run = table().predict(bad, input=["x"], output="v").write_parquet(str(tmp_path / "out"), **quiet)
    assert run.guards == {"predict(bad)": {"nan": {"v": 1}, "infinite": {"v": 1}}}
    assert "NaN: 1 in v" in str(run)
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["guards"] == run.guards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "y"}, "share one output"),
        ({"output": {"a": "y", "b": "y"}}, "both write column 'y'"),
        ({"input": {"c": ["x"]}}, "no model here"),
        ({"input": {"a": ["x"], "b": ["a"]}}, "of the same predict writes"),
    ],
)
def test_what_can_not_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(hr.PlanError, match=message):
        table().predict({"a": double, "b": double}, **options)


def test_a_broken_model_stops_early(tmp_path: Path, engine: str, quiet: dict[str, Any]) -> None:
    files = tmp_path / "in"
    files.mkdir()
    for i in range(40):
        pa.parquet.write_table(pa.table({"x": np.full(500, float(i))}), files / f"{i:02d}.parquet")
    ds = hr.read_parquet(str(files)).predict(double, input=["x"], output="y")
    out = str(tmp_path / "out")
    with pytest.raises(hr.StopConditionMet, match=r"evaluate\(m\) is") as caught:
        ds.evaluate(m=hr.metrics.Mean("y"), stop_if={"m": lambda v: v > 5}).write_parquet(out, outputs="per_input", **quiet)
    assert ("metric", "m") in caught.value.where
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    run = ds.evaluate(m=hr.metrics.Mean("y"), stop_if={"m": lambda v: v > 50}).write_parquet(out, outputs="per_input", **quiet)
    assert run.metrics == {"m": 39.0}
    assert run.rows == 20_000


def test_the_end_is_judged_too(tmp_path: Path, quiet: dict[str, Any]) -> None:
    ds = table(10).evaluate(m=hr.metrics.Mean("x"), stop_if={"m": lambda v: v > 1})  # fewer rows than stop_after_rows
    with pytest.raises(hr.StopConditionMet):
        ds.write_parquet(str(tmp_path / "out"), **quiet)
    with pytest.raises(hr.StopConditionMet):
        ds.write_parquet(str(tmp_path / "out"), **quiet)


def test_a_condition_that_can_not_be_computed(tmp_path: Path, quiet: dict[str, Any]) -> None:
    ds = table(10).evaluate(m=hr.metrics.Mean("x"), stop_if={"m": lambda v: v["auc"] > 1})
    with pytest.raises(hr.UserCodeError, match="TypeError"):
        ds.write_parquet(str(tmp_path / "out"), **quiet)


def detect(batch: Batch) -> dict[str, list[list[int]]]:
    """Corners of bright squares: as many as the image's number says."""
    return {"boxes": [[5 * k for k in range(int(n))] for n in batch["n"]]}


def crops(row: dict[str, Any]) -> list[dict[str, Any]]:
    image = row["image"]
    return [{"id": row["id"], "at": at, "crop": image[at : at + 5, at : at + 5]} for at in row["boxes"]]


def classify(crop: np.ndarray) -> np.ndarray:
    return crop.reshape(len(crop), -1).max(axis=1)


@pytest.mark.parametrize("device", ["auto", "sim"])
def test_detector_crops_and_classifier(tmp_path: Path, engine: str, quiet: dict[str, Any], device: str) -> None:
    images = np.zeros((40, 20, 20), dtype=np.uint8)
    for i in range(40):
        for k in range(4):
            images[i, 5 * k : 5 * k + 5, 5 * k : 5 * k + 5] = 10 * k + i % 10
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    ds = hr.from_arrow(pa.table({"id": np.arange(40), "n": np.arange(40) % 5 % 4, "image": tensor}))
    ds = ds.predict(detect, input=["n"], output="boxes", device=device).flat_map(crops)
    ds = ds.predict(classify, input="crop", output="class", device=device).drop("crop")
    run = ds.evaluate(n=hr.metrics.Count()).write_parquet(str(tmp_path / "out"), **quiet)
    wanted = [{"id": i, "at": 5 * k, "class": 10 * k + i % 10} for i in range(40) for k in range(i % 5 % 4)]
    assert read_back(tmp_path / "out").to_pylist() == wanted
    assert run.metrics["n"] == len(wanted)


def test_tensors_of_booleans(tmp_path: Path, quiet: dict[str, Any]) -> None:
    ds = table(10).predict(lambda b: np.stack([b["x"] > 5, b["x"] > 7], axis=1), input=["x"], output="over")
    ds.write_parquet(str(tmp_path / "out"), **quiet)
    rows = hr.read_parquet(str(tmp_path / "out")).take(10, **quiet)
    assert [row["over"].tolist() for row in rows] == [[i > 5, i > 7] for i in range(10)]
