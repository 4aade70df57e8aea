"""Every source, through the conformance kit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from headrace.connectors import packing
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.images import BinarySource, ImageSource
from headrace.connectors.sources.json import JsonSource
from headrace.connectors.sources.memory import ArrowSource, RangeSource
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.sources.text import TextSource
from headrace.core.options import BlockLimits
from headrace.testing.check_source import check_source


@pytest.fixture(scope="module", autouse=True)
def arrow_signal_pipe() -> None:
    """Arrow's CSV reader opens a pipe for Ctrl-C at its first use and keeps it for the life of the process."""
    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))


def table(start: int, rows: int) -> pa.Table:
    ids = range(start, start + rows)
    return pa.table({"id": pa.array(ids, pa.int64()), "name": [f"name {i}" for i in ids], "x": [i / 7 for i in ids]})


def rich(start: int, rows: int) -> pa.Table:
    ids = range(start, start + rows)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(
        pc.cast(pa.array(range(rows * 6)), pa.float32()).to_numpy().reshape(rows, 2, 3)
    )
    nested = pa.array([{"a": i, "b": [i, i + 1]} for i in ids])
    return table(start, rows).append_column("tensor", tensor).append_column("nested", nested)


@pytest.mark.parametrize("make", [table, rich])
def test_parquet(tmp_path: Path, make) -> None:
    for n in range(4):
        pq.write_table(make(n * 300, 300), tmp_path / f"f{n}.parquet", row_group_size=128)

    def locate(uri: str, row: int) -> dict:
        return pq.read_table(uri).slice(row, 1).to_pylist()[0]

    source = ParquetSource(tmp_path)
    got = check_source(source, rows=1200, predicate=(pc.field("id") > 250) & (pc.field("name") != "name 700"), locate=locate)
    assert got["id"].to_pylist() == list(range(1200))
    assert source.count() == 1200


def test_parquet_divided_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "DIVIDE_OVER_BYTES", 4000)
    monkeypatch.setattr(packing, "DIVIDE_BYTES", 8000)
    pq.write_table(table(0, 5000), tmp_path / "a.parquet", row_group_size=100)
    source = ParquetSource(tmp_path / "a.parquet")
    splits = list(source.splits(per_input=False))
    assert len(splits) > 3
    assert max(s.rows or 0 for s in splits) < 2 * min(s.rows or 0 for s in splits) + 200
    check_source(source, rows=5000, predicate=pc.field("id") == 4321)


def test_csv(tmp_path: Path) -> None:
    for n in range(3):
        pyarrow.csv.write_csv(table(n * 100, 100), tmp_path / f"f{n}.csv")
    (tmp_path / "f3.csv.gz").write_bytes(gzip.compress((tmp_path / "f2.csv").read_bytes()))
    got = check_source(CsvSource(tmp_path), rows=400)
    assert got.schema.field("id").type == pa.int64()


def test_csv_with_newlines_in_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines"\n2,one\n')
    got = check_source(CsvSource(tmp_path, newlines_in_values=True), rows=2)
    assert got["text"].to_pylist() == ["two\nlines", "one"]


def test_json(tmp_path: Path) -> None:
    for n in range(3):
        rows = [{"id": i, "tags": ["a", "b"][: i % 3], "deep": {"x": i / 2}} for i in range(n * 50, n * 50 + 50)]
        (tmp_path / f"f{n}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    got = check_source(JsonSource(tmp_path), rows=150)
    assert got["id"].to_pylist() == list(range(150))


def test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n\nvier ä\nlast".encode())
    (tmp_path / "b.txt").write_text("\n\n")
    got = check_source(TextSource(tmp_path), rows=7)
    assert got["text"].to_pylist() == ["one", "two", "", "vier ä", "last", "", ""]


@pytest.mark.parametrize(("kind", "rows"), [(CsvSource, 2000), (JsonSource, 2000), (TextSource, 2000)])
def test_lines_divided_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind, rows: int) -> None:
    monkeypatch.setattr(packing, "DIVIDE_OVER_BYTES", 1000)
    monkeypatch.setattr(packing, "DIVIDE_BYTES", 97)
    suffix = kind.extensions[0]
    if kind is CsvSource:
        pyarrow.csv.write_csv(table(0, rows), tmp_path / f"a{suffix}")
    else:
        (tmp_path / f"a{suffix}").write_text("".join(f'{{"id": {i}}}\n' for i in range(rows)))
    source = kind(tmp_path)
    splits = list(source.splits(per_input=False))
    assert len(splits) > 100
    got = pa.Table.from_batches([b for s in splits for b, _ in source.open(s, BlockLimits())], source.schema())
    assert got.num_rows == rows
    if kind is not TextSource:
        assert got["id"].to_pylist() == list(range(rows))


@pytest.mark.parametrize("kind", [ImageSource, BinarySource])
def test_images(tmp_path: Path, kind) -> None:
    (tmp_path / "sub").mkdir()
    for n in range(5):
        (tmp_path / "sub" / f"{n}.jpg").write_bytes(bytes([n]) * (n + 1))
    got = check_source(kind(tmp_path), rows=5)
    assert got["bytes"].to_pylist()[2] == b"\x02\x02\x02"
    assert got["path"][0].as_py().endswith("sub/0.jpg")


def test_arrow() -> None:
    t = pa.concat_tables([rich(0, 70), rich(70, 30)])
    assert check_source(ArrowSource(t), rows=100).equals(t)


def test_arrow_without_rows() -> None:
    assert list(ArrowSource(table(0, 0)).splits(per_input=False)) == []


def test_range() -> None:
    got = check_source(RangeSource(1000), rows=1000)
    assert got["id"].to_pylist() == list(range(1000))
