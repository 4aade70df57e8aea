"""Declared columns: types that are kept, and drift that is named by row and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr

from .conftest import read_back


def items(rows: int = 100) -> hr.Dataset:
    return hr.from_arrow(pa.table({"x": np.arange(rows)}))


def drifting(row: dict[str, Any]) -> dict[str, Any]:
    return {"y": "oops" if row["x"] == 63 else row["x"] if row["x"] % 2 else None}


def test_types_are_as_declared_whatever_comes(tmp_path: Path, engine: str, quiet: dict[str, Any]) -> None:
    def odd(row: dict[str, Any]) -> dict[str, Any]:
        return {"b": [1, 2], "a": None if row["x"] < 50 else row["x"]}

    ds = items().map(odd, schema={"a": "float32", "b": pa.list_(pa.int16())})
    assert ds.schema() == pa.schema([("a", pa.float32()), ("b", pa.list_(pa.int16()))])
    ds.write_parquet(str(tmp_path / "out"), **quiet)
    back = read_back(tmp_path / "out")
    assert back.schema.remove_metadata() == ds.schema()
    assert back["a"].to_pylist() == [None] * 50 + [float(i) for i in range(50, 100)]


@pytest.mark.parametrize("verb", ["map", "flat_map", "map_batches", "predict"])
def test_drift_is_named(tmp_path: Path, engine: str, quiet: dict[str, Any], verb: str) -> None:
    def batch(columns: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"y": [str(v) if v == 63 else int(v) for v in columns["x"]] if 63 in columns["x"] else columns["x"]}

    def texts(columns: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"y": columns["x"].astype(np.float64) + (columns["x"] == 63) * 0.5}

    ds = {
        "map": lambda: items().map(drifting, schema={"y": pa.int64()}),
        "flat_map": lambda: items().flat_map(lambda row: [drifting(row)], schema={"y": pa.int64()}),
        "map_batches": lambda: items().map_batches(texts, schema={"y": "int64"}, batch_size=10),
        "predict": lambda: items().predict(texts, input=["x"], output={"y": "int64"}),
    }[verb]()
    with pytest.raises(hr.UserCodeError) as caught:
        ds.write_parquet(str(tmp_path / "out"), **quiet)
    text = str(caught.value)
    assert "'y'" in text
    if verb in ("map_batches", "predict"):
        assert "63.5" in text
    if verb == "predict":
        assert any(label == "row" and value.startswith("63 of") for label, value in caught.value.where)
    run = ds.write_parquet(str(tmp_path / "out2"), on_error="skip", **quiet)
    kept = read_back(tmp_path / "out2")
    assert kept["y"].type == pa.int64()
    assert run.tally.skipped == 1
    assert run.rows == 99


def test_all_columns_must_be_declared(tmp_path: Path, quiet: dict[str, Any]) -> None:
    more = items().map(lambda row: {"y": 1, "z": 2}, schema={"y": "int64"})
    with pytest.raises(hr.UserCodeError, match="'z', which was not declared"):
        more.take(**quiet)
    less = items().map(lambda row: {"z": 2}, schema={"y": "int64", "z": "int64"})
    with pytest.raises(hr.UserCodeError, match="'y' was declared"):
        less.take(**quiet)


def test_columns_behind_a_declaration_are_known(quiet: dict[str, Any]) -> None:
    ds = items().map(lambda row: {"y": 1}, schema={"y": "int64"})
    with pytest.raises(hr.PlanError, match="'zz'"):
        ds.select("zz").take(**quiet)
    assert ds.rename({"y": "w"}).take(1, **quiet) == [{"w": 1}]


def test_tensors_and_declared_outputs_of_models(tmp_path: Path, quiet: dict[str, Any]) -> None:
    def embed(columns: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"v": np.zeros((len(columns["x"]), 3)), "p": columns["x"] / 2}

    tensor = pa.fixed_shape_tensor(pa.float32(), (3,))
    ds = items().predict(embed, input=["x"], output={"p": np.float32, "v": tensor})
    ds.write_parquet(str(tmp_path / "out"), **quiet)
    back = read_back(tmp_path / "out")
    assert back["p"].type == pa.float32()
    assert back["v"].type == tensor
    wrong = items().predict(embed, input=["x"], output={"p": "float32", "v": pa.fixed_shape_tensor(pa.float32(), (4,))})
    with pytest.raises(hr.UserCodeError, match="'v', which was declared"):
        wrong.take(**quiet)


def test_a_type_that_is_none() -> None:
    with pytest.raises(hr.PlanError, match="no type"):
        items().map(dict, schema={"y": "floaty"})
