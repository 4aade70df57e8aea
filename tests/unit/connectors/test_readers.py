"""Readers: broken and changed input, drifting schemas, blocks over files."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from headrace.connectors import packing, storage
from headrace.connectors.sources import lines
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.json import JsonSource
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.sources.text import TextSource
from headrace.contracts.source import BadRange
from headrace.core.errors import DataError, InputChanged, PlanError
from headrace.core.options import BlockLimits
from headrace.testing.check_source import read_all


def write(path: Path, **columns) -> None:
    pq.write_table(pa.table(columns), path)


def test_small_files_share_a_block(tmp_path: Path) -> None:
    for n in range(20):
        write(tmp_path / f"{n:02d}.parquet", x=[n] * 5)
    source = ParquetSource(tmp_path)
    (split,) = source.splits(per_input=False)
    ((batch, origin),) = source.open(split, BlockLimits())
    assert batch.num_rows == 100
    assert origin.locate(7) == (str(tmp_path / "01.parquet"), 2)


def test_repeated_wide_values_do_not_swell_a_block(tmp_path: Path) -> None:
    photos = [bytes([i]) * 20_000 for i in range(5)]
    write(tmp_path / "a.parquet", photo=[photos[i % 5] for i in range(2000)])
    source = ParquetSource(tmp_path)
    limits = BlockLimits(target_bytes=1 << 20)
    sizes = [b.nbytes for s in source.splits(per_input=False) for b, _ in source.open(s, limits)]
    assert max(sizes) <= 1.1 * limits.target_bytes


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
def test_the_disk_is_asked_for_the_next_row_group_while_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({name: np.random.default_rng(0).random(900_000) for name in ("x", "unread")})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300_000, use_dictionary=False)
    asked: list[range] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, advice: asked.append(range(at, at + size)))
    source = ParquetSource(tmp_path / "a.parquet", columns=("x",))
    chunks = [pq.read_metadata(tmp_path / "a.parquet").row_group(g).column(0) for g in range(3)]
    begins = [chunk.data_page_offset for chunk in chunks]
    seen: list[tuple[int, set[int]]] = []  # rows so far, row groups that were asked for by then
    rows = 0
    for split in source.splits(per_input=False):
        for batch, _ in source.open(split, BlockLimits(max_rows=50_000)):
            rows += batch.num_rows
            seen.append((rows, {g for g, at in enumerate(begins) if any(at in r for r in asked)}))
    assert rows == 900_000
    assert [groups for at, groups in seen if at in (50_000, 300_000, 600_000, 900_000)] == [set(), {1}, {1, 2}, {1, 2}]
    assert sum(map(len, asked)) == sum(chunk.total_compressed_size for chunk in chunks[1:])


def block_bytes(path: Path, limits: BlockLimits) -> list[int]:
    source = ParquetSource(path)
    return [b.nbytes for s in source.splits(per_input=False) for b, _ in source.open(s, limits)]


def lists_of_ones(rows: int) -> pa.Array:
    return pa.array([np.ones(1000, np.int64)] * rows)


def repeated_texts(rows: int) -> pa.Array:
    return pa.array(["word " * 2000] * rows)


@pytest.mark.parametrize("column", [lists_of_ones, repeated_texts])
@pytest.mark.parametrize("group_rows", [4000, 200])
def test_repeated_values_do_not_swell_a_block(tmp_path: Path, column: Callable[[int], pa.Array], group_rows: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": column(4000)}), path, row_group_size=group_rows)
    sizes = block_bytes(path, BlockLimits(target_bytes=1 << 20))
    assert max(sizes) <= 1.1 * (1 << 20)
    assert len(sizes) < 60, "and they are no smaller than need be"


def test_rows_sorted_by_size_do_not_swell_the_last_block(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, x=[b"short"] * 3750 + [random.Random(i).randbytes(20_000) for i in range(250)])
    source = ParquetSource(path)
    (split,) = source.splits(per_input=False)
    blocks = list(source.open(split, BlockLimits(target_bytes=1 << 20)))
    assert max(batch.nbytes for batch, _ in blocks) <= 1 << 20
    assert len(blocks) < 30
    assert [o.segments[0].row for _, o in blocks] == [0, *np.cumsum([b.num_rows for b, _ in blocks])[:-1]]
    assert pa.Table.from_batches([b for b, _ in blocks]) == pq.read_table(path)


def test_large_values_are_not_decoded_for_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow writes a dictionary of the first ones."""
    path = tmp_path / "a.parquet"
    write(path, photo=[random.Random(i).randbytes(20_000) for i in range(1000)])
    begun: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def spy(file: pq.ParquetFile, **given: Any) -> Iterator[pa.RecordBatch]:
        begun.append(given["batch_size"])
        return iter_batches(file, **given)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    sizes = block_bytes(path, BlockLimits(target_bytes=1 << 20))
    assert begun == [52]
    assert sorted(sizes)[1] > 0.9 * (1 << 20), "blocks but the last are of the size that was asked for"


def test_small_row_groups_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": range(3000), "y": range(3000)}), path, row_group_size=10)
    read: list[list[int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def spy(file: pq.ParquetFile, **given: Any) -> Iterator[pa.RecordBatch]:
        read.append(given["row_groups"])
        return iter_batches(file, **given)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert read_all(ParquetSource(path, ["y"]))["y"].to_pylist() == list(range(3000))
    assert [len(groups) for groups in read] == [102, 102, 96]
    read.clear()
    source, _ = ParquetSource(path, ["y"]).prune((pc.field("x") < 25) | (pc.field("x") == 1999))
    (split,) = source.splits(per_input=False)
    places = [o.locate(i) for b, o in source.open(split, BlockLimits()) for i in range(b.num_rows)]
    assert read == [[0, 1, 2], [199]], "groups without a row that passes are not read"
    assert places == [(str(path), i) for i in (*range(25), 1999)]


@pytest.mark.parametrize("value", ["x" * 100_000, [0] * 12_000, {"list": ["x" * 100_000]}], ids=["text", "list", "nested"])
def test_small_row_groups_of_repeated_large_values_are_not_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [value] * 800, "y": range(800)}), path, row_group_size=100)
    assert sum(pq.read_metadata(path).row_group(g).total_byte_size for g in range(8)) < 1 << 20
    held: list[int] = []
    iter_batches = pq.ParquetFile.iter_batches

    def spy(file: pq.ParquetFile, **given: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(file, **given):
            held.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert read_all(ParquetSource(path)).num_rows == 800
    assert max(held) < 16 << 20
    held.clear()
    assert read_all(ParquetSource(path, ["y"]))["y"].to_pylist() == list(range(800))
    assert len(held) == 1, "columns that nobody reads do not matter"


def test_empty_row_groups_between_others(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int64())])
    for name, sizes in {"a": [0, 0, 3, 0, 2, 0], "b": [0, 0]}.items():
        with pq.ParquetWriter(tmp_path / f"{name}.parquet", schema) as writer:
            for rows in sizes:
                writer.write_table(pa.table({"x": range(rows)}, schema=schema))
        assert pq.read_metadata(tmp_path / f"{name}.parquet").num_row_groups == len(sizes)
    assert read_all(ParquetSource(tmp_path))["x"].to_pylist() == [0, 1, 2, 0, 1]


def test_nested_columns_are_told_apart_from_names_with_dots(tmp_path: Path) -> None:
    rows = 300
    table = pa.table(
        {
            "a": pa.array([{"b": i, "c": [{"d": str(i)}]} for i in range(rows)]),
            "a.b": ["dotted"] * rows,
            "m": pa.array([[("k", i)] for i in range(rows)], pa.map_(pa.string(), pa.int64())),
            "t": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((rows, 2, 3), np.uint8)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for names in (["a"], ["a.b"], ["m", "a.b"], ["t", "a"]):
        assert read_all(ParquetSource(tmp_path, names)) == table.select(names)


def test_types_that_fit_are_cast(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=pa.array([1], pa.int64()), s=pa.array(["a"], pa.large_string()))
    write(tmp_path / "b.parquet", s=pa.array(["b"]).dictionary_encode(), x=pa.array([2], pa.int32()))
    write(tmp_path / "c.parquet", x=pa.nulls(1), s=pa.array(["c"]), extra=[1])
    got = read_all(ParquetSource(tmp_path))
    rows = [(1, "a", None), (2, "b", None), (None, "c", 1)]
    assert got.to_pylist() == [{"x": x, "s": s, "extra": extra} for x, s, extra in rows]


def test_not_parquet_and_truncated(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match="not a readable Parquet") as caught:
        ParquetSource(tmp_path).schema()
    assert "a.parquet" in str(caught.value)


def test_damaged_pages_name_the_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(10_000))}), path, row_group_size=5000, compression="zstd")
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(DataError, match="row group: 1"):
        read_all(ParquetSource(path))


@pytest.mark.parametrize("whole", [True, False])
def test_changed_input_is_told_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    if not whole:
        monkeypatch.setattr(storage, "WHOLE_LOCAL_BYTES", 0)
    path = tmp_path / "a.parquet"
    write(path, x=list(range(100)))
    source = ParquetSource(path)
    (split,) = source.splits(per_input=False)
    reading = source.open(split, BlockLimits(max_rows=10))
    next(reading)
    os.utime(path, ns=(1, 1))
    if whole:  # what was read at once is the planned version, whatever comes after
        assert sum(b.num_rows for b, _ in reading) > 0
    else:
        with pytest.raises(InputChanged, match=r"a\.parquet"):
            list(reading)
    with pytest.raises(InputChanged):
        list(source.open(split, BlockLimits()))
    path.unlink()
    with pytest.raises(InputChanged):
        list(source.open(split, BlockLimits()))


def test_a_filter_that_can_not_work_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=[1])
    for bad in (pc.field("nope") > 1, pc.field("x") == "text"):
        with pytest.raises(PlanError, match="filter"):
            ParquetSource(tmp_path).prune(bad)
    with pytest.raises(PlanError, match="nope"):
        ParquetSource(tmp_path).project(("nope",))


def test_filter_skips_row_groups_and_where_no_row_passes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(1000), "y": ["k"] * 1000}), tmp_path / "a.parquet", row_group_size=100)
    source, exact = ParquetSource(tmp_path).project(("y",)).prune(pc.field("x") == 250)
    assert exact
    (split,) = source.splits(per_input=False)
    ((batch, origin),) = source.open(split, BlockLimits())
    assert batch.to_pylist() == [{"y": "k"}]
    assert origin.locate(0) == (str(tmp_path / "a.parquet"), 250)
    nothing, _ = source.prune(pc.field("x") < 0)
    assert read_all(nothing).num_rows == 0


def test_json_drift_names_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"x": "text"}\n')
    with pytest.raises(DataError) as caught:
        read_all(JsonSource(tmp_path))
    assert "b.jsonl" in str(caught.value)
    assert "offset: 0" in str(caught.value)
    assert "column 'x' has type string here, int64 was expected" in str(caught.value)
    (tmp_path / "b.jsonl").write_text('{"x": 2, "new": 1}\n')
    with pytest.raises(DataError, match="new"):
        read_all(JsonSource(tmp_path))
    fixed = JsonSource(tmp_path, schema=pa.schema([("x", pa.int64()), ("new", pa.int64())]))
    assert read_all(fixed).to_pylist() == [{"x": 1, "new": None}, {"x": 2, "new": 1}]


def test_csv_matches_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfx,y\n1,a\n")
    (tmp_path / "b.csv").write_text("y,x\nb,2\n")
    assert read_all(CsvSource(tmp_path)).to_pylist() == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    (tmp_path / "c.csv").write_text("y,x\nb,text\n")
    with pytest.raises(DataError, match=r"c\.csv"):
        read_all(CsvSource(tmp_path))
    (tmp_path / "c.csv").write_text("y\nb\n")
    with pytest.raises(DataError, match="'x' is missing"):
        read_all(CsvSource(tmp_path))


def test_the_last_line_needs_no_newline_to_tell_types(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2.5")
    assert CsvSource(tmp_path / "a.csv").schema().types == [pa.int64(), pa.float64()]
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,n/k")
    assert read_all(CsvSource(tmp_path / "a.csv")).to_pydict() == {"x": [1, 3], "y": ["2", "n/k"]}
    (tmp_path / "a.json").write_text('{"x": 1}\n{"x": 0.5}')
    assert read_all(JsonSource(tmp_path / "a.json")).to_pydict() == {"x": [1.0, 0.5]}
    (tmp_path / "a.json").write_text('{"x": 1}\n{"x": ')
    assert JsonSource(tmp_path / "a.json").schema().types == [pa.int64()]


RETURNS = {
    "alone": b"id,a\r" + b"".join(b"%d,x%d\r" % (i, i) for i in range(300)),
    "no last one": b"id,a\r" + b"\r".join(b"%d,x%d" % (i, i) for i in range(300)),
    "then newlines": b"id,a\r0,x0\r1,x1\n" + b"".join(b"%d,x%d\n" % (i, i) for i in range(2, 300)),
    "then both": b"id,a\r0,x0\r" + b"".join(b"%d,x%d\r\n" % (i, i) for i in range(1, 300)),
    "in the header": b"id,a\r" + b"".join(b"%d,x%d\n" % (i, i) for i in range(300)),
    "in the header, then both": b"id,a\r" + b"".join(b"%d,x%d\r\n" % (i, i) for i in range(300)),
    "in the rows": b"id,a\n" + b"".join(b"%d,x%d\r" % (i, i) for i in range(300)),
    "both": b"id,a\r\n" + b"".join(b"%d,x%d\r\n" % (i, i) for i in range(300)),
}


@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize("divided", [1 << 20, 97])
@pytest.mark.parametrize("kind", RETURNS)
def test_csv_lines_may_end_with_a_carriage_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, divided: int, newlines: bool
) -> None:
    monkeypatch.setattr(packing, "DIVIDE_BYTES", divided)
    (tmp_path / "a.csv").write_bytes(RETURNS[kind])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(RETURNS[kind]))
    source = CsvSource(tmp_path, newlines_in_values=newlines)
    assert read_all(source).to_pylist() == 2 * [{"id": i, "a": f"x{i}"} for i in range(300)]
    body = RETURNS[kind][5 if kind == "both" else 4 :].lstrip(b"\r\n")
    (tmp_path / "c.csv").write_bytes(body)
    source = CsvSource(tmp_path / "c.csv", column_names=["id", "a"], newlines_in_values=newlines)
    assert read_all(source).to_pylist() == [{"id": i, "a": f"x{i}"} for i in range(300)]


def test_a_header_that_ends_with_a_carriage_return_does_not_make_one_line_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "INFER_BYTES", 1000)
    (tmp_path / "a.csv").write_bytes(RETURNS["in the header"])
    source = CsvSource(tmp_path)
    assert source.schema().types == [pa.int64(), pa.string()]
    assert read_all(source)["id"].to_pylist() == list(range(300))


def test_a_header_that_ends_with_a_carriage_return_before_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.csv").write_bytes(b"id,a\n0,x\n")
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,a\r0,x,zz\n" + b"".join(b"%d,x%d\n" % (i, i) for i in range(1, 600)))
    monkeypatch.setattr(packing, "DIVIDE_BYTES", 1000)
    source = CsvSource(tmp_path)
    assert source.schema().names == ["id", "a"]
    bad: list[BadRange] = []
    stored = storage.stat(str(path))
    assert stored is not None
    fragments = source.divide(stored)
    pieces = [piece for f in fragments for piece in source._pieces(f, BlockLimits(), bad.append)]  # pyright: ignore[reportPrivateUsage]
    assert len(fragments) > 4
    assert [i for piece in pieces for i in piece.batch["id"].to_pylist()] == list(range(1, 600))
    assert [b.row for b in bad] == [0]


@pytest.mark.parametrize("before", [100, 5_000, 60_000, 70_000])
@pytest.mark.parametrize("behind", [5, 50_000, 70_000])
def test_what_ends_lines_does_not_depend_on_how_much_is_read(before: int, behind: int) -> None:
    source = CsvSource("a.csv")
    text = b'id,a\r0,"' + b"y" * before + b"\n" + b"y" * behind + b'"\n' + b"".join(b"%d,x\n" % i for i in range(20_000))
    found: set[tuple[bytes, bytes]] = set()
    for size in (1000, 4 << 10, 64 << 10, 100_000, 1 << 20):
        line_end = source._line_end("a.csv")  # pyright: ignore[reportPrivateUsage]
        assert any(line_end.seen(text[:n], all_of_it=n >= len(text)) for n in range(size, len(text) + size, size))
        found.add((line_end.first, line_end.byte))
    assert found == {(b"\r", b"\n" if before + behind < 65_000 else b"\r")}


def test_a_carriage_return_in_a_value_ends_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    monkeypatch.setattr(packing, "DIVIDE_BYTES", 7)
    path.write_bytes(b'\xef\xbb\xbf"i""\r,d",5" a\n1,"x\ry"\n2,z\n')
    assert read_all(CsvSource(path)).to_pylist() == [{'i"\r,d': 1, '5" a': "x\ry"}, {'i"\r,d': 2, '5" a': "z"}]
    path.write_bytes(b'id,a\r1,"x\ny"\r2,z\r')
    assert read_all(CsvSource(path)).to_pylist() == [{"id": 1, "a": "x\ny"}, {"id": 2, "a": "z"}]
    path.write_bytes(b'id,a\r1,"x\ry"\r2,z\r')
    with pytest.raises(DataError, match="goes on behind the end of its line") as raised:
        read_all(CsvSource(path))
    assert ("line", "2") in raised.value.where
    assert read_all(CsvSource(path, newlines_in_values=True))["a"].to_pylist() == ["x\ry", "z"]


@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_csv_that_is_not_utf8_names_the_file(tmp_path: Path, encoding: str, newlines: bool) -> None:
    path = tmp_path / "b.csv"
    path.write_bytes("id,caf\xe9\n1,x\n".encode(encoding))
    (tmp_path / "a.csv").write_text("id,caf\xe9\n1,x\n", encoding="utf-8")
    for paths in (path, tmp_path):
        with pytest.raises(DataError, match="UTF") as raised:
            read_all(CsvSource(paths, newlines_in_values=newlines))
        assert ("file", str(path)) in raised.value.where
        assert "convert the file to UTF-8" in str(raised.value)
    path.write_bytes("1,x\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        CsvSource(path, column_names=["a", "b"], newlines_in_values=newlines).schema()


def test_a_csv_number_that_is_not_whole_is_told_the_type_that_fits(tmp_path: Path) -> None:
    for text, kind in (("1.5", "float64"), ("x", "string")):
        (tmp_path / "a.csv").write_text("x\n1\n")
        (tmp_path / "b.csv").write_text(f"x\n{text}\n")
        with pytest.raises(DataError, match=rf"pa\.{kind}\(\)"):
            read_all(CsvSource(tmp_path))


def test_csv_options(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1\t\n2\t\n")
    source = CsvSource(tmp_path, column_names=["a", "b"], column_types={"a": pa.string()})
    assert source.schema() == pa.schema([("a", pa.string()), ("b", pa.string())])
    assert read_all(source)["a"].to_pylist() == ["1", "2"]


def test_json_rows_may_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n\n{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n" * 50_000)
    source = JsonSource(tmp_path)
    assert source.schema().names == []
    assert read_all(source).num_rows == 50_002
    assert read_all(source.project(())).num_rows == 50_002
    (tmp_path / "b.jsonl").write_text('{}\n{"x": 1}\n')
    with pytest.raises(DataError, match="'x' is unknown") as raised:
        read_all(source)
    assert ("line", "2") in raised.value.where


@pytest.mark.parametrize("rows", [1, 100, 60_000])
@pytest.mark.parametrize("array", [False, True])
def test_json_over_several_lines_is_refused_whatever_its_size(tmp_path: Path, rows: int, array: bool) -> None:
    objects = [{"id": i, "name": f"row {i}", "nested": {"x": [i, 0.5], "y": None}} for i in range(rows)]
    path = tmp_path / "b.json"
    path.write_text(json.dumps(objects, indent=1) if array else "\n".join(json.dumps(o, indent=1) for o in objects))
    begun = time.perf_counter()
    with pytest.raises(DataError, match="not complete at the end of its line") as raised:
        JsonSource(path).schema()
    assert "one JSON object a line" in str(raised.value)
    (tmp_path / "a.json").write_text(json.dumps(objects[0]) + "\n\n \n")
    with pytest.raises(DataError, match="not complete at the end of its line") as raised:
        read_all(JsonSource(tmp_path))
    assert ("line", "1") in raised.value.where
    assert ("file", str(path)) in raised.value.where
    assert time.perf_counter() - begun < 20


def test_empty_and_wrong_text_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    for source in (CsvSource(tmp_path), JsonSource(tmp_path)):
        with pytest.raises(DataError, match="empty"):
            source.schema()
    with pytest.raises(DataError, match="UTF-8"):
        read_all(TextSource(tmp_path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("rows", [100, 50_000])
def test_rows_before_the_fault_of_a_compressed_file_are_kept(tmp_path: Path, suffix: str, rows: int) -> None:
    rng = random.Random(0)
    plain = "".join(f'{{"id":{i},"r":"{rng.randbytes(6).hex()}"}}\n' for i in range(rows)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[suffix]) as file:
        for at in range(0, len(plain), 1000):
            file.write(plain[at : at + 1000])
            if suffix == ".zst":
                file.flush()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    given = bytearray()
    with pa.CompressedInputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[suffix]) as stream, suppress(OSError):
        while data := stream.read(1):
            given += data
    bad: list[BadRange] = []
    source = JsonSource(path)
    (split,) = source.splits(per_input=False)
    ids = [i for b, _ in source.open(split, BlockLimits(), bad.append) for i in b["id"].to_pylist()]
    assert ids == list(range(given.count(b"\n")))
    assert [b.row for b in bad] == [len(ids)]
    assert len(ids) > rows // 2
    with pytest.raises(DataError, match="can't read on"):
        read_all(source)


@pytest.mark.parametrize(
    ("kind", "hint"), [("gzip", r"\.gz"), ("bz2", r"\.bz2"), ("zstd", r"\.zst"), ("xz", "unpack"), ("zip", "unpack")]
)
@pytest.mark.parametrize("source", [CsvSource, JsonSource, TextSource])
def test_compressed_data_is_called_by_its_name(tmp_path: Path, source: Any, kind: str, hint: str) -> None:
    plain = b'{"a":1}\n'
    path = tmp_path / f"a{source.extensions[0]}"
    if kind == "xz":
        path.write_bytes(lzma.compress(plain))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", plain)
    else:
        with pa.CompressedOutputStream(str(path), kind) as file:
            file.write(plain)
    with pytest.raises(DataError, match=f"this is {kind} data(?s:.*){hint}"):
        read_all(source(path))
    packed = tmp_path / f"b{source.extensions[0]}.gz"
    packed.write_bytes(plain)
    with pytest.raises(DataError, match="no gzip data"):
        read_all(source(packed))


def test_a_long_line_takes_few_times_its_size(tmp_path: Path) -> None:
    size = 8 << 20
    (tmp_path / "a.txt").write_bytes(b"a" * size + b"\r\nb\n")
    tracemalloc.start()
    try:
        rows = read_all(TextSource(tmp_path))["text"].to_pylist()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(row) for row in rows] == [size, 1]
    assert peak < 6 * size


def test_a_line_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, step = 1 << 20, 4 << 10
    (tmp_path / "a.txt").write_bytes(b"a" * size + b"\nb\n")
    searched = 0

    class Read(bytes):
        def rfind(self, *args: Any) -> int:
            nonlocal searched
            searched += len(self)
            return super().rfind(*args)

        def __radd__(self, other: bytes) -> Read:
            return Read(other + bytes(self))

    real = lines._read
    monkeypatch.setattr(lines, "_read", lambda *args: Read(real(*args)))
    (split,) = TextSource(tmp_path).splits(per_input=False)
    chunks = list(lines.line_chunks(split.fragments[0], step))
    assert b"".join(chunk for _, chunk in chunks) == b"a" * size + b"\nb\n"
    assert 0 < searched <= 2 * size


def test_a_line_that_arrow_has_no_room_for_is_bad_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_BYTES", 1000)
    bad: list[BadRange] = []
    for source, text in ((TextSource, "{}"), (CsvSource, "{}"), (JsonSource, '{{"x":"{}"}}')):
        path = tmp_path / f"a{source.extensions[0]}"
        rows = [text.format(value) for value in ("x", "y", "z" * 2000, "v")]
        path.write_text("\n".join(rows) + "\n")
        read = TextSource(path) if source is TextSource else source(path)
        with pytest.raises(DataError, match="2 GiB"):
            read_all(read)
        bad.clear()
        blocks = [b for s in read.splits(per_input=False) for b, _ in read.open(s, BlockLimits(), bad.append)]
        assert sum(b.num_rows for b in blocks) == (2 if source is CsvSource else 3)
        assert [b.rows for b in bad] == [1]


def test_long_lines_and_small_chunks(tmp_path: Path) -> None:
    rows = [{"s": "x" * (i * 1000)} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = JsonSource(tmp_path)
    (split,) = source.splits(per_input=False)
    blocks = [b for b, _ in source.open(split, BlockLimits(target_bytes=1 << 16))]
    assert len(blocks) > 100
    assert pa.Table.from_batches(blocks).to_pylist() == rows
