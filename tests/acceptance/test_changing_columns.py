"""Functions whose columns or types change from row to row, undeclared: nothing is dropped, however rows are cut into blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.files import Part
from headrace.connectors.sinks.parquet import ParquetSink

from .conftest import read_back

FILES = {"parquet": "write_parquet", "csv": "write_csv", "json": "write_json"}


def written(folder: Path, kind: str) -> list[dict[str, Any]]:
    (file,) = sorted(folder.glob(f"*.{'jsonl' if kind == 'json' else kind}"))
    if kind == "json":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return (pq.read_table(file) if kind == "parquet" else pc.read_csv(file)).to_pylist()


@pytest.mark.parametrize("kind", sorted(FILES))
@pytest.mark.parametrize("first", [5, 1023, 1500, 3999])
def test_a_column_that_comes_later(tmp_path: Path, engine: str, quiet: dict[str, Any], kind: str, first: int) -> None:
    def late(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "t": f"a,{row['id']}\n" if row["id"] % 3 else None} | ({"z": 1} if row["id"] >= first else {})

    run = getattr(hr.range(4000).map(late), FILES[kind])(str(tmp_path / "out"), **quiet)
    assert run.rows == 4000
    if kind == "csv":
        (file,) = (tmp_path / "out").glob("*.csv")
        back = pc.read_csv(file, parse_options=pc.ParseOptions(newlines_in_values=True)).to_pylist()
    else:
        back = written(tmp_path / "out", kind)
    assert [row["id"] for row in back] == list(range(4000))
    assert [row.get("z") for row in back] == [1 if i >= first else None for i in range(4000)]
    texts = [f"a,{i}\n" if i % 3 else None for i in range(4000)]
    assert [row["t"] or None for row in back] == texts


def test_whole_numbers_that_become_floats_in_a_large_file(tmp_path: Path, quiet: dict[str, Any]) -> None:
    def halves(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = batch["id"]
        wide = np.random.default_rng(int(ids[0])).random((len(ids), 50))
        return {"id": ids, "y": ids / 2 if ids[-1] >= 90_000 else ids, "wide": wide}

    hr.range(100_000).map_batches(halves, batch_size=1000).write_parquet(str(tmp_path / "out"), **quiet)
    back = read_back(tmp_path / "out")
    assert back["y"].type == pa.float64()
    assert back["y"].to_pylist() == [float(i) if i < 90_000 else i / 2 for i in range(100_000)]
    assert back["id"].to_pylist() == list(range(100_000))
    first = np.asarray(back["wide"].combine_chunks().storage.values[:50] if back["wide"].num_chunks else [])
    assert np.array_equal(first, np.random.default_rng(0).random((1000, 50))[0])
    assert not [p for p in (tmp_path / "out").rglob("*") if ".narrow" in p.name]


def test_types_of_answers_that_widen(engine: str) -> None:
    def price(ids: np.ndarray) -> list[Decimal]:
        return [Decimal(int(i)) / 100 for i in ids]

    def at(ids: np.ndarray) -> np.ndarray:
        return ids.astype("M8[s]" if ids[0] == 0 else "M8[ms]")

    ds = hr.range(30_000).predict(price, input="id", output="price").predict(at, input="id", output="at", batch_size=500)
    table = ds.to_arrow(engine=engine, progress="quiet")
    assert table["price"].to_pylist() == [Decimal(i) / 100 for i in range(30_000)]
    assert table.schema.field("at").type == pa.timestamp("ms")


@pytest.mark.parametrize("rows", [1000, 1025, 9000])
@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_rows_of_another_type_are_bad_rows_wherever_blocks_are_cut(
    tmp_path: Path, engine: str, quiet: dict[str, Any], rows: int, on_error: str
) -> None:
    ds = hr.range(rows).map(lambda row: {"v": "s" if row["id"] == rows - 1 else row["id"]})
    run = ds.write_parquet(str(tmp_path / "out"), on_error=on_error, **quiet)
    assert run.tally.bad == 1
    assert read_back(tmp_path / "out")["v"].to_pylist() == list(range(rows - 1))
    with pytest.raises(hr.HeadraceError, match="'v'"):
        ds.write_parquet(str(tmp_path / "failing"), **quiet)


def test_files_that_differ_are_told(tmp_path: Path, quiet: dict[str, Any]) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        pq.write_table(pa.table({"x": np.full(10, i)}), tmp_path / "in" / f"{i}.parquet")
    ds = hr.read_parquet(str(tmp_path / "in")).map(lambda row: {"v": row["x"] if row["x"] == 0 else str(row["x"])})
    run = ds.write_parquet(str(tmp_path / "out"), outputs="per_input", **quiet)
    (note,) = [note for note in run.notes if "differ" in note]
    assert "'v'" in note
    assert "int64" in note
    assert "string" in note


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_many_late_columns_write_each_row_twice(
    tmp_path: Path, quiet: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    for sink in (ParquetSink, CsvSink):
        original = sink._join

        def counted(self: Any, parts: Sequence[Part], path: str, schema: pa.Schema, original: Any = original) -> Any:
            read.extend(part.rows for part in parts)
            return original(self, parts, path, schema)

        monkeypatch.setattr(sink, "_join", counted)

    def sparse(row: dict[str, Any]) -> dict[str, Any]:
        key, place = divmod(row["id"], 1024)
        return {"id": row["id"]} | ({f"k{key}": 1} if place == 7 else {})

    options = {**quiet, "engine": "inline"}
    getattr(hr.range(20 * 1024).map(sparse), FILES[kind])(str(tmp_path / "out"), **options)
    assert sum(read) == 20 * 1024
    back = written(tmp_path / "out", kind)
    assert [row["id"] for row in back] == list(range(20 * 1024))
    assert [(k, i) for i, row in enumerate(back) for k in row if k != "id" and row[k]] == [
        (f"k{k}", k * 1024 + 7) for k in range(20)
    ]
    assert not [p for p in (tmp_path / "out").rglob("*") if ".narrow" in p.name]
