"""Input that can't be read in part: what is bad is told, what is good is read, and nothing twice."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from headrace.connectors import packing, storage
from headrace.connectors.sources import csv, sifting
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.images import BinarySource
from headrace.connectors.sources.json import JsonSource
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.sources.text import TextSource
from headrace.contracts.source import BadRange, Source
from headrace.core.errors import DataError, InputChanged
from headrace.core.options import BlockLimits
from headrace.testing.check_source import read_all


def read(source: Source, limits: BlockLimits | None = None) -> tuple[list[tuple[str, int, dict[str, Any]]], list[BadRange]]:
    """((file name, row in it, the row) of all that is good, what is bad)."""
    rows: list[tuple[str, int, dict[str, Any]]] = []
    bad: list[BadRange] = []
    for split in source.splits(per_input=False):
        for batch, origin in source.open(split, limits or BlockLimits(), bad.append):
            for i, row in enumerate(batch.to_pylist()):
                at = origin.locate(i)
                assert at is not None, "a row of unknown origin"
                rows.append((Path(at[0]).name, at[1], row))
    return rows, bad


def damage(path: Path, group: int, column: int = 0, skip: int = 0) -> None:
    """Zero the data of a column chunk, from `skip` of its bytes on."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    data = bytearray(path.read_bytes())
    data[start + int(size * skip / 100) : start + size] = bytes(size - int(size * skip / 100))
    path.write_bytes(data)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_a_broken_row_group_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(900))}), path, row_group_size=300, compression="zstd", use_dictionary=False)
    damage(path, 1)
    rows, bad = read(ParquetSource(path))
    assert [r["x"] for _, _, r in rows] == [*range(300), *range(600, 900)]
    assert [at for _, at, _ in rows] == [*range(300), *range(600, 900)]
    assert [(b.uri, b.row, b.rows) for b in bad] == [(str(path), 300, 300)]
    assert "row group: 1" in str(bad[0].error)
    assert str(path) in str(bad[0].error)


def test_what_came_before_a_broken_page_is_given_once_and_is_not_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = random.Random(1).choices(range(1 << 60), k=20_000)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "data_page_size": 4096}
    pq.write_table(pa.table({"x": values}), path, row_group_size=10_000, **options)
    damage(path, 0, skip=50)
    rows, bad = read(ParquetSource(path), BlockLimits(max_rows=1000))
    (group,) = bad
    assert 0 < group.row < 10_000
    assert group.row + group.rows == 10_000
    places = [at for _, at, _ in rows]
    assert places == [*range(group.row), *range(10_000, 20_000)]
    assert [r["x"] for _, _, r in rows] == [values[at] for at in places]


def test_files_that_are_no_parquet_are_passed_over(tmp_path: Path) -> None:
    for name in "abc":
        pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    (tmp_path / "d.parquet").write_bytes(b"")
    rows, bad = read(ParquetSource(tmp_path))
    assert [name for name, _, _ in rows] == ["a.parquet"] * 3 + ["c.parquet"] * 3
    assert [(Path(b.uri).name, b.row, b.rows) for b in bad] == [("b.parquet", -1, 0), ("d.parquet", -1, 0)]
    with pytest.raises(DataError, match=r"b\.parquet"):
        read_all(ParquetSource(tmp_path))


def test_a_large_broken_file_does_not_end_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "DIVIDE_OVER_BYTES", 100)
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(bytes(1000))
    rows, bad = read(ParquetSource(tmp_path))
    assert (len(rows), [b.rows for b in bad]) == (3, [0])


def test_a_value_that_does_not_fit_is_a_bad_row_and_a_missing_column_is_not(tmp_path: Path) -> None:
    for n in range(40):  # more than are looked at: the second file is not
        pq.write_table(pa.table({"x": pa.array([n], pa.int32())}), tmp_path / f"{n:02d}.parquet")
    pq.write_table(pa.table({"x": pa.array([3, 1 << 40, 5])}), tmp_path / "01.parquet")
    rows, bad = read(ParquetSource(tmp_path))
    assert [r["x"] for _, _, r in rows] == [0, 3, 5, *range(2, 40)]
    assert [(Path(b.uri).name, b.row, b.rows) for b in bad] == [("01.parquet", 1, 1)]
    pq.write_table(pa.table({"y": [1]}), tmp_path / "01.parquet")
    with pytest.raises(DataError, match=r"'x' \(int32\) is missing"):
        read(ParquetSource(tmp_path))


def test_rows_that_a_filter_keeps_know_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(1000)), "y": list(range(1000))}), path, row_group_size=100)
    source, exact = ParquetSource(path).project(("y",)).prune(pc.field("x") - pc.field("x") / 7 * 7 == 3)
    assert exact
    rows, bad = read(source)
    assert [(at, r["y"]) for _, at, r in rows] == [(x, x) for x in range(3, 1000, 7)]
    assert bad == []


@pytest.mark.parametrize("whole", [True, False])
def test_an_object_that_changed_or_vanished_is_not_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(storage, "WHOLE_LOCAL_BYTES", 0)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    source = ParquetSource(path)
    (split,) = source.splits(per_input=False)
    source.schema()
    bad: list[BadRange] = []
    path.write_bytes(b"something else altogether")
    with pytest.raises(InputChanged):
        list(source.open(split, BlockLimits(), bad.append))
    path.unlink()
    with pytest.raises(InputChanged):
        list(source.open(split, BlockLimits(), bad.append))
    assert bad == []


# --- lines -----------------------------------------------------------------------------------------------------------


def lines_of(kind: str) -> Iterator[tuple[bytes, bool]]:
    """(line, is it good); the value is the line's number among those that are rows."""
    number = 0
    broken = {
        "json": [b'{"x": "text"}', b"{no json", b'{"x": 1, "more": 2}', b'{"x": 1, "s": "\xff"}'],
        "csv": [b"text,a", b"1,2,3", b"1", b"7,caf\xe9"],
        "text": [b"caf\xe9", b"\xff\xfe"],
    }[kind]
    generator = random.Random(7)
    for _ in range(500):
        pick = generator.random()
        if pick < 0.1 and kind != "text":
            yield b"", True  # no row
        elif pick < 0.2:
            yield generator.choice(broken), False
            number += 1
        else:
            good = {"json": json.dumps({"x": number, "s": "a"}), "csv": f"{number},a", "text": str(number)}[kind]
            yield good.encode(), True
            number += 1


@pytest.mark.parametrize("kind", ["json", "csv", "text"])
@pytest.mark.parametrize("limits", [BlockLimits(), BlockLimits(target_bytes=1 << 14)])
def test_bad_lines_are_found_one_by_one(tmp_path: Path, kind: str, limits: BlockLimits) -> None:
    head = {"json": b'{"x": 0, "s": "first"}\n', "csv": b"x,s\n", "text": b""}[kind]
    first = int(kind == "json")
    lines = list(lines_of(kind))
    path = tmp_path / {"json": "a.jsonl", "csv": "a.csv", "text": "a.txt"}[kind]
    path.write_bytes(head + b"\n".join(line for line, _ in lines) + b"\n")
    clean = tmp_path / "0.csv"  # what the columns are is found in the first file
    clean.write_bytes(b"x,s\n0,a\n")
    sources: dict[str, Source] = {
        "json": JsonSource(path, schema=pa.schema([("x", pa.int64()), ("s", pa.string())])),
        "csv": CsvSource([clean, path]),
        "text": TextSource(path),
    }
    source = sources[kind]
    rows, bad = read(source, limits)
    rows = [(name, at, row) for name, at, row in rows if name == path.name]
    place = 0 + first
    good: list[int] = []
    wrong: list[tuple[int, int]] = []
    offset = len(head)
    for line, ok in lines:
        if line or kind == "text":
            if ok:
                good.append(place)
            else:
                wrong.append((place, offset))
            place += 1
        offset += len(line) + 1
    value = "text" if kind == "text" else "x"
    assert [at for _, at, _ in rows][first:] == good
    assert [int(row[value]) for _, _, row in rows][first:] == [at - first for at in good]
    assert [(b.row, b.rows, dict(b.error.where)["offset"]) for b in bad] == [(at, 1, str(o)) for at, o in wrong]
    with pytest.raises(DataError, match=path.name):
        read_all(source, limits=limits)


@pytest.mark.parametrize("kind", ["csv", "csv without a header", "jsonl"])
@pytest.mark.parametrize("fault", ["cut off", "of another type"])
def test_a_bad_line_costs_no_more_than_two_calls_of_the_parser(
    tmp_path: Path, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(i: int) -> str:
        x = "oops" if i % 10 == 7 and i > 100 and fault == "of another type" else i
        text = json.dumps({"x": x, "text": f"no {i}"}) if kind == "jsonl" else f"{x},no {i}"
        return text[:3] if i % 10 == 7 and i > 100 and fault == "cut off" else text

    module = "json" if kind == "jsonl" else "csv"
    path = tmp_path / f"a.{module}"
    path.write_text("\n".join([*(["x,text"] if kind == "csv" else []), *map(line, range(1000))]) + "\n")
    parse = getattr(importlib.import_module(f"pyarrow.{module}"), f"read_{module}")
    calls: list[None] = []

    def counted(*args: Any, **options: Any) -> pa.Table:
        calls.append(None)
        return parse(*args, **options)

    source = {
        "jsonl": lambda: JsonSource(path, schema=pa.schema({"x": pa.int64(), "text": pa.string()})),
        "csv": lambda: CsvSource(path, column_types={"x": pa.int64()}),
        "csv without a header": lambda: CsvSource(path, column_names=["x", "text"], column_types={"x": pa.int64()}),
    }[kind]()
    assert source.schema().names == ["x", "text"]
    monkeypatch.setattr(f"pyarrow.{module}.read_{module}", counted)
    rows, bad = read(source)
    good = [i for i in range(1000) if i % 10 != 7 or i <= 100]
    assert [row for _, _, row in rows] == [{"x": i, "text": f"no {i}"} for i in good]
    assert [at for _, at, _ in rows] == good
    assert [b.row for b in bad] == [i for i in range(1000) if i not in good]
    assert len(calls) < 2 * len(bad) + 50, len(calls)


def outcome(source: Source, limits: BlockLimits | None = None) -> tuple[Any, ...]:
    rows, bad = read(source, limits)
    return rows, [(b.row, b.rows, str(b.error)) for b in bad]


JSON_LINES = [b'{"a": 1}', b'{"a": 2}{"a": 3}', b'{"a": "}{"}', b'{"b":"null {}"}', b"", b"{", b"}", b" "]
JSON_LINES += [
    b'{"a": null}',
    b'{"a":3',
    b'}{"a":5',
    b"null",
    b' null{"a":6}',
    b'\xef\xbb\xbf{"a":7}',
    b'"a":8}',
    b"\x0b",
    b'{"a": true}',
]
CSV_LINES = [
    b"1,a",
    b'2,"b"',
    b'3,"c',
    b'4,d"',
    b"5",
    b"",
    b"x,g",
    b"8,h,i",
    b" ",
    b"9\r10,k",
    b"\r",
    b'"11"l,m',
    b",",
    b'12,n""',
]
CSV_LINES += [b'13,"o""p"', b'14,"q"\r15,r', b"16,s\r", b"\xef\xbb\xbf17,t", b"18,\xff", b'"19","u"', b'20,"v"w"', b"\t"]


@pytest.mark.parametrize("guess", ["as it is", "none", "all", "at random"])
@pytest.mark.parametrize("kinds", [3, 6, 20])
def test_the_guess_which_lines_are_bad_changes_nothing_but_time(
    tmp_path: Path, guess: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines with two rows, without any, with an open quote."""
    rng = random.Random(f"{guess} {kinds}")

    def doubtful(line: bytes) -> bool:
        return guess == "all" or (guess == "at random" and rng.random() < 0.3)

    if guess != "as it is":
        monkeypatch.setattr("headrace.connectors.sources.json._doubtful", lambda *_: doubtful)
        monkeypatch.setattr("headrace.connectors.sources.csv._doubtful", lambda *_: doubtful)
    (tmp_path / "clean.csv").write_bytes(b"a,b\n1,a\n")
    (tmp_path / "clean.tsv").write_bytes(b"a\tb\n1\ta\n")
    for n in range(12):
        picks = [rng.sample(some, min(kinds, len(some))) for some in (JSON_LINES, CSV_LINES)]
        objects, values = ([rng.choice(pick) for _ in range(rng.randrange(1, 60))] for pick in picks)
        (tmp_path / f"{n}.jsonl").write_bytes(b"\n".join(objects))
        (tmp_path / f"{n}.csv").write_bytes(b"\n".join([b"a,b", *values]))
        (tmp_path / f"{n}.tsv").write_bytes(b"\n".join([b"a\tb", *values]).replace(b",", b"\t"))
        sources = [
            JsonSource(tmp_path / f"{n}.jsonl", schema=pa.schema({"a": pa.int64()})),
            JsonSource(tmp_path / f"{n}.jsonl", schema=pa.schema({"a": pa.int64()})).project(("a",)),
            CsvSource([tmp_path / "clean.csv", tmp_path / f"{n}.csv"], column_types={"a": pa.int64()}),
            CsvSource([tmp_path / "clean.tsv", tmp_path / f"{n}.tsv"], column_types={"a": pa.string()}),
        ]
        for source in sources:
            by_guess = outcome(source)
            with monkeypatch.context() as patch:
                patch.setattr(sifting, "WORTH_A_BAD_LINE", 0)
                assert by_guess == outcome(source)


@pytest.mark.parametrize(
    ("name", "text", "bad", "good"),
    [
        ("a.tsv", b"a\tb\nbad\n\t\nq\tr\n", [0], [(1, {"a": "", "b": ""}), (2, {"a": "q", "b": "r"})]),
        ("a.csv", b"a\nx\n1,2\n \ny\n", [1], [(0, {"a": "x"}), (2, {"a": " "}), (3, {"a": "y"})]),
        (
            "b.csv",
            b'a,b\n1,"a"\r2,b\n3,"c\nx,y,z\n4,d"\n',
            [2, 3],
            [(0, {"a": 1, "b": "a"}), (1, {"a": 2, "b": "b"}), (4, {"a": 4, "b": 'd"'})],
        ),
        (
            "a.jsonl",
            b'{"a":1}{"a":2}\n' * 4 + b'{"a":3\n{"a":9}\n}\n',
            [8, 10],
            [*((i, {"a": 1 + i % 2}) for i in range(8)), (9, {"a": 9})],
        ),
    ],
)
def test_rows_of_lines_that_do_not_adjoin(
    tmp_path: Path, name: str, text: bytes, bad: list[int], good: list[tuple[int, dict[str, Any]]]
) -> None:
    (tmp_path / name).write_bytes(text)
    rows, found = read((JsonSource if name.endswith(".jsonl") else CsvSource)(tmp_path / name))
    assert [b.row for b in found] == bad
    assert [(at, row) for _, at, row in rows] == good


@pytest.mark.parametrize("null", [b"null", b" null", b"\t null\r", b"nullnull", b"nullx", b"null1"])
def test_a_line_that_is_null_is_bad_wherever_it_is(tmp_path: Path, null: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(null + b'\n{"a": 1}\n' + null + b'\n{"a": 2}\n')
    rows, bad = read(JsonSource(tmp_path, schema=pa.schema({"a": pa.int64()})))
    assert [(at, row["a"]) for _, at, row in rows] == [(1, 1), (3, 2)]
    assert [b.row for b in bad] == [0, 2]


def test_few_bad_lines_are_found_without_a_look_at_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sifting, "WORTH_A_BAD_LINE", 10)
    monkeypatch.setattr("headrace.connectors.sources.json._doubtful", lambda *_: lambda line: pytest.fail("a guess"))
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"x"\n' if i in (30, 70) else f'{{"x": {i}}}\n' for i in range(100)))
    rows, bad = read(JsonSource(path))
    assert ([b.row for b in bad], len(rows)) == ([30, 70], 98)


def test_a_compressed_file_that_is_cut_off(tmp_path: Path) -> None:
    text = "".join(f'{{"x": {random.Random(i).random()}}}\n' for i in range(100_000)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-100_000])
    rows, bad = read(JsonSource(path, schema=pa.schema([("x", pa.float64())])), BlockLimits(target_bytes=1 << 20))
    assert 0 < len(rows) < 100_000
    assert [(b.uri, b.row, b.rows) for b in bad] == [(str(path), len(rows), 0)]
    assert "offset" in dict(bad[0].error.where)


def test_a_csv_without_a_column_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("x,z\n1,2\n")
    with pytest.raises(DataError, match="'y' is missing"):
        read(CsvSource(tmp_path))


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.99])
def test_rows_before_a_fault_are_kept_with_newlines_in_values(
    tmp_path: Path, packed: Callable[[bytes], bytes], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv, "LONG_LINE_BYTES", 1)  # in many reads
    lines = [b'%d,"x""\ny%d"\n' % (k, k) for k in range(100_000)]
    whole = packed(b"a,b\n" + b"".join(lines))
    name = "a.csv.gz" if packed is gzip.compress else "a.csv.bz2"
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "b.csv").write_bytes(b'a,b\n7,"q\nr"\n')
    rows, ranges = read(CsvSource(tmp_path, newlines_in_values=True))
    kept = [row for name, _, row in rows[:-1]]
    assert kept == [{"a": k, "b": f'x"\ny{k}'} for k in range(len(kept))]
    assert rows[-1] == ("b.csv", 0, {"a": 7, "b": "q\nr"})
    assert [(Path(r.uri).name, r.error.message.partition(":")[0]) for r in ranges] == [(name, "can't read on")]
    if packed is gzip.compress and share > 0.1:
        assert len(kept) > 0.95 * share * len(lines)


@pytest.mark.parametrize(
    "line",
    [b'%d,5" wide\n', b'%d,"' + b"long\n" * 800_000 + b'"\n', b'%d,"two\nlines"\n', b"%d,plain\n"],
    ids=["odd", "long", "two", "plain"],
)
def test_compressed_files_with_newlines_in_values_read_as_plain_ones(tmp_path: Path, line: bytes) -> None:
    plain = b"a,b\n" + b"".join(line % k for k in range(7 if len(line) > 100 else 200_001))
    for end in (0, 1):  # with a newline behind the last line, and without
        (tmp_path / "a.csv").write_bytes(plain[: len(plain) - end])
        (tmp_path / "b.csv.gz").write_bytes(gzip.compress(plain[: len(plain) - end], 1))
        one, other = (read_all(CsvSource(tmp_path / name, newlines_in_values=True)) for name in ("a.csv", "b.csv.gz"))
        assert one.equals(other)


def test_where_lines_can_not_be_told_a_fault_keeps_none_of_doubt(tmp_path: Path) -> None:
    plain = b"a,b\n" + b"".join(b'%d,5" wide\n' % k for k in range(400_001))
    packed = gzip.compress(plain)
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    rows, ranges = read(CsvSource(tmp_path, newlines_in_values=True))
    assert all(row["b"] == '5" wide' for _, _, row in rows)
    assert len(ranges) == 1


def test_after_a_bad_row_with_newlines_in_values_the_rest_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x,y\n1,"two\nlines"\n')
    (tmp_path / "b.csv").write_text("x,y\n1,2,3\n4,5\n")
    rows, bad = read(CsvSource(tmp_path, newlines_in_values=True))
    assert len(rows) == 1
    assert [(Path(b.uri).name, b.rows) for b in bad] == [("b.csv", 0)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_can_not_be_read_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.connectors.sources import images

    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())

    def refuse(uri: str, size: int, version: str) -> Any:
        if uri.endswith("b"):
            raise PermissionError("not yours")
        return opened(uri, size, version)

    opened = storage.open_reader
    monkeypatch.setattr(images.storage, "open_reader", refuse)
    rows, bad = read(BinarySource(tmp_path))
    assert [row["bytes"] for _, _, row in rows] == [b"a", b"c"]
    assert [(Path(b.uri).name, b.row, b.rows) for b in bad] == [("b", 0, 1)]
    assert "not yours" in str(bad[0].error)


# --- the schema when the first object is broken ----------------------------------------------------------------------


def test_the_schema_is_that_of_the_first_object_that_can_be_read(tmp_path: Path) -> None:
    for name, data in (("a", b"no parquet"), ("b", b""), ("c", None)):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data) if data is not None else pq.write_table(pa.table({"x": [1, 2]}), path)
    source = ParquetSource(tmp_path)
    assert source.schema().names == ["x"]
    rows, bad = read(source)
    assert [name for name, _, _ in rows] == ["c.parquet"] * 2
    assert [Path(b.uri).name for b in bad] == ["a.parquet", "b.parquet"]
    with pytest.raises(DataError, match=r"a\.parquet"):
        read_all(source)


def test_with_no_object_that_can_be_read_the_first_error_counts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        ParquetSource(tmp_path).schema()


def test_storage_trouble_is_no_reason_to_look_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        pq.write_table(pa.table({"x": [1, 2]}), tmp_path / f"{name}.parquet")
    source = ParquetSource(tmp_path)
    opened = storage.open_reader

    def gone(uri: str, size: int, version: str, **options: Any) -> Any:
        if uri.endswith("a.parquet"):
            raise storage.changed(uri)
        return opened(uri, size, version, **options)

    monkeypatch.setattr(storage, "open_reader", gone)
    with pytest.raises(InputChanged):
        source.schema()


def test_json_types_come_from_the_lines_that_can_be_parsed(tmp_path: Path) -> None:
    lines = [f'{{"id": {i}, "x": {i}.5}}' for i in range(50)]
    lines[3] = '{"id": 3, "x": '
    lines[0] = "no json"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = JsonSource(tmp_path)
    assert source.schema() == pa.schema([("id", pa.int64()), ("x", pa.float64())])
    rows, bad = read(source)
    assert [r["id"] for _, _, r in rows] == [1, 2, *range(4, 50)]
    assert [b.row for b in bad] == [0, 3]
    with pytest.raises(DataError, match="JSON"):
        read_all(source)


def test_json_types_that_contradict_each_other_are_those_of_most(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "x": i if i % 2 else i + 0.5, "tags": {"a": 1}}) for i in range(50)]
    lines[4] = json.dumps({"id": "four", "more": 1})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = JsonSource(tmp_path)
    assert source.schema().field("id").type == pa.int64()
    assert source.schema().field("x").type == pa.float64()
    rows, bad = read(source)
    assert [r["id"] for _, _, r in rows] == [*range(4), *range(5, 50)]
    assert [b.row for b in bad] == [4]


def test_csv_types_come_from_the_rows_that_have_all_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4,5\n6,7\n")
    source = CsvSource(tmp_path)
    assert source.schema() == pa.schema([("x", pa.int64()), ("y", pa.int64())])
    rows, bad = read(source)
    assert [r["x"] for _, _, r in rows] == [1, 6]
    assert [b.row for b in bad] == [1]
    with pytest.raises(DataError, match="Expected 2 columns"):
        read_all(source)
