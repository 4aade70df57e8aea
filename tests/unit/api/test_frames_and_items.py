"""Rows given in Python, and pandas frames with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import headrace as hr

QUIET: dict[str, Any] = {"engine": "inline", "progress": "quiet"}


def test_a_key_that_the_first_row_lacks() -> None:
    rows = [{"id": 1}, {"id": 2, "label": "cat"}]
    assert hr.from_items(rows).to_arrow(**QUIET).to_pylist() == [{"id": 1, "label": None}, {"id": 2, "label": "cat"}]
    assert hr.from_items([{}, {}]).count() == 2
    assert hr.from_items([]).count() == 0


def test_items_make_columns_as_rows_of_map_do() -> None:
    rows: list[dict[str, Any]] = [
        {"image": np.zeros((2, 3), np.float32), "boxes": [{"at": [i]}] * i, "k": None} for i in range(2)
    ]
    table = hr.from_items(rows).to_arrow(**QUIET)
    assert table.schema.equals(hr.range(2).map(lambda row: rows[row["id"]]).to_arrow(**QUIET).schema)
    assert table["boxes"].to_pylist() == [[], [{"at": [1]}]]
    assert table.schema.field("image").type.shape == [2, 3]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"a": 1}, {"a": "x"}], "column 'a', whose values don't make a column"),
        ([{"a": "\ud83d"}], "column 'a'"),
        ([{1: 2}], "column 1"),
        ([{"a": 1}, 3], "a row of type int"),
    ],
)
def test_items_that_make_no_rows(rows: Any, said: str) -> None:
    with pytest.raises(hr.PlanError, match=said):
        hr.from_items(rows)


@pytest.fixture
def indexed(tmp_path: Path) -> hr.Dataset:
    """Two rows that pandas wrote, `user` as the index; nullable whole numbers."""
    frame = pd.DataFrame({"user": ["u7", "u9"], "x": pd.array([1, None], "Int64")}).set_index("user")
    frame.to_parquet(tmp_path / "frame.parquet")
    return hr.read_parquet(tmp_path / "frame.parquet")


def test_an_index_in_a_file_is_a_column(indexed: hr.Dataset) -> None:
    same = indexed.map_batches(lambda frame: frame.assign(y=frame["user"] + "!"), batch_format="pandas").to_arrow(**QUIET)
    assert same.to_pydict() == {"x": [1, None], "user": ["u7", "u9"], "y": ["u7!", "u9!"]}
    frame = indexed.to_pandas(**QUIET)
    assert list(frame.columns) == ["x", "user"]
    assert str(frame["x"].dtype) == "Int64"
    assert list(indexed.limit(0).to_pandas(**QUIET).columns) == ["x", "user"]


def test_a_named_index_of_an_answer_is_a_column(indexed: hr.Dataset) -> None:
    for made in (lambda f: f.groupby("user").sum(), lambda f: f.set_index("user"), lambda f: f.set_index(["user", f.index])):
        table = indexed.map_batches(made, batch_format="pandas").to_arrow(**QUIET)
        assert table["user"].to_pylist() == ["u7", "u9"]
        assert set(table.schema.names) == {"user", "x"}
    plain = indexed.map_batches(lambda f: f.iloc[::-1], batch_format="pandas").to_arrow(**QUIET)
    assert plain.schema.names == ["x", "user"]


def test_from_pandas_keeps_levels_that_have_a_name() -> None:
    frame = pd.DataFrame({"x": [1, 2]}, index=pd.Index([5, 6], name="k"))
    assert hr.from_pandas(frame).to_arrow(**QUIET).to_pydict() == {"k": [5, 6], "x": [1, 2]}
    assert hr.from_pandas(frame.rename_axis(None)).to_arrow(**QUIET) == pa.table({"x": [1, 2]})
