"""Columns that folders tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors import hive
from headrace.connectors.sources import parquet
from headrace.core.errors import DataError

NULL = hive.NULL
INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six files of two rows; year 2023, 2024 or null, and two cities."""
    top = tmp_path / "in"
    for year in ("2023", "2024", NULL):
        for city in ("d%C3%A9", "x=y"):
            folder = top / f"year={year}" / f"city={city}"
            folder.mkdir(parents=True)
            pq.write_table(pa.table({"x": [1, 2]}), folder / "part.parquet")
    return top


def rows(dataset: hr.Dataset) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in dataset.to_arrow(**INLINE).to_pylist()]


def test_what_a_name_tells() -> None:
    assert hive.told("year=2020/m%20n=a%2Fb/part.parquet") == {"year": "2020", "m n": "a/b"}
    assert hive.told(f"a/x={NULL}/=3/y=/z=1=2/f=1.parquet") == {"x": None, "y": "", "z": "1=2"}
    assert hive.told("plain/part.parquet") == {}


@pytest.mark.parametrize(
    ("values", "type"),
    [
        (["1", "-20", "003"], pa.int64()),
        (["1", NULL], pa.int64()),
        (["1", "1.5"], pa.string()),
        (["", "1"], pa.string()),
        (["9" * 19], pa.string()),
        (["2020-01-01"], pa.string()),
    ],
)
def test_types(values: list[str], type: pa.DataType) -> None:
    assert hive.fields(f"k={value}/f" for value in values) == [pa.field("k", type)]


def test_columns_behind_the_files_own(table: Path) -> None:
    dataset = hr.read_parquet(table, hive_partitioning=True)
    assert dataset.schema() == pa.schema({"x": pa.int64(), "year": pa.int64(), "city": pa.string()})
    expected = [(x, year, city) for year in (2023, 2024, None) for city in ("d\u00e9", "x=y") for x in (1, 2)]
    assert rows(dataset) == expected
    assert rows(dataset.select(["city"])) == [(city,) for _, _, city in expected]
    assert dataset.count() == 12
    globbed = hr.read_parquet(f"{table}/year=202*/**/*.parquet", hive_partitioning=True)
    assert rows(globbed) == expected[:8]
    assert hr.read_parquet(table / "year=2023", hive_partitioning=True).schema().names == ["x", "city"]


def test_a_filter_leaves_files_unread(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    group_pieces = parquet.ParquetSource._group_pieces

    def counted(self: Any, reader: Any, *args: Any, **more: Any) -> Any:
        read.append(reader.uri)
        return group_pieces(self, reader, *args, **more)

    monkeypatch.setattr(parquet.ParquetSource, "_group_pieces", counted)
    monkeypatch.setattr(parquet.ParquetSource, "_together", lambda *_: None)
    dataset = hr.read_parquet(table, hive_partitioning=True)
    x, year, city = (pc.field(name) for name in ("x", "year", "city"))
    for predicate, files, expected in [
        (year == 2023, 2, 4),
        ((year == 2024) & (x > 1), 2, 2),
        ((city == "x=y") | (year == 2023), 4, 8),
        (year.is_null(), 2, 4),
        (year.is_null() & (x > 7), 0, 0),
        (~(year == 2023), 2, 4),
    ]:
        read.clear()
        assert len(rows(dataset.filter(predicate))) == expected
        assert len(set(read)) == files


def test_a_files_own_column_goes_before(tmp_path: Path) -> None:
    for k in (1, 2):
        (tmp_path / f"k={k}").mkdir()
    pq.write_table(pa.table({"k": [7], "x": [1]}), tmp_path / "k=1" / "a.parquet")
    pq.write_table(pa.table({"x": [2]}), tmp_path / "k=2" / "b.parquet")
    pq.write_table(pa.table({"x": [3]}), tmp_path / "c.parquet")
    assert rows(hr.read_parquet(tmp_path, hive_partitioning=True)) == [(3, None), (1, 7), (2, 2)]


def test_types_that_the_user_names(table: Path) -> None:
    named = pa.schema({"year": pa.string(), "x": pa.int8()})
    assert rows(hr.read_parquet(table, schema=named, hive_partitioning=True))[3:5] == [("2023", 2), ("2024", 1)]
    with pytest.raises(DataError, match=r"of a folder.s name, column 'city' .* does not fit int64"):
        rows(hr.read_parquet(table, schema=pa.schema({"city": pa.int64()}), hive_partitioning=True))


def test_a_value_of_another_kind_behind_those_looked_at(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "FOLDERS_LOOKED_AT", 2)
    (table / "year=later").mkdir()
    pq.write_table(pa.table({"x": [1]}), table / "year=later" / "part.parquet")
    with pytest.raises(DataError, match=r"'year' .* does not fit int64") as caught:
        rows(hr.read_parquet(table, hive_partitioning=True))
    assert "year=later" in str(caught.value)


@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
def test_they_are_written_beside_columns_that_are_copied(tmp_path: Path, engine: Any) -> None:
    wide = pa.table({f"c{i}": range(i, i + 60_000) for i in range(8)})
    for k in (1, 2):
        (tmp_path / f"in/k={k}").mkdir(parents=True)
        pq.write_table(wide, tmp_path / f"in/k={k}/a.parquet")
    dataset = hr.read_parquet(tmp_path / "in", hive_partitioning=True).map_batches(lambda b: {**b, "y": b["c0"] + b["k"]})
    run = dataset.write_parquet(tmp_path / "out", engine=engine, progress="quiet")
    assert any("copied encoded" in note for note in run.notes)
    out = pq.read_table(tmp_path / "out")
    assert out.select(wide.schema.names).equals(pa.concat_tables([wide, wide]))
    assert out["k"].to_pylist() == [1] * 60_000 + [2] * 60_000
    assert out["y"].to_pylist() == [*range(1, 60_001), *range(2, 60_002)]


def test_the_report_says_that_folders_tell_columns(table: Path, tmp_path: Path) -> None:
    run = hr.read_parquet(table).write_parquet(tmp_path / "out", **INLINE)
    (note,) = [note for note in run.notes if "hive_partitioning" in note]
    assert "year, city" in note
    asked = hr.read_parquet(table, hive_partitioning=True).write_parquet(tmp_path / "asked", **INLINE)
    assert not [note for note in asked.notes if "hive_partitioning" in note]
