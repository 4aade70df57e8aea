"""Writers: types, encodings, row groups, names, refusals."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from headrace.api.verify import verify
from headrace.connectors.run_store import LocalRunStore
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.files import FileSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.json import JsonSource
from headrace.core.errors import DataError, DestinationError, PlanError
from headrace.core.splits import Fragment, Split
from headrace.testing.check_sink import SCHEMA, Session, a_batch, a_split
from headrace.testing.check_source import read_all

SPLIT = Split(0, (Fragment("/in/a.parquet", 1, "v", name="a.parquet"),), 1)


def written(sink: FileSink, *batches: pa.RecordBatch) -> Path:
    session = Session(sink, schema=None)
    (name,) = session.write(SPLIT, batches)
    session.schema = batches[0].schema
    session.finish()
    return Path(sink.path, name)


def tensors(rows: int) -> pa.FixedShapeTensorArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(rows * 4, dtype=np.uint8).reshape(rows, 2, 2))


def test_parquet_keeps_every_type(tmp_path: Path) -> None:
    batch = pa.record_batch(
        {
            "tensor": tensors(3),
            "nested": pa.array([{"a": [1], "b": "x"}, None, {"a": [], "b": None}]),
            "when": pa.array([datetime.datetime(2026, 1, 2)] * 3, pa.timestamp("us", "UTC")),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        }
    )
    assert pq.read_table(written(ParquetSink(tmp_path), batch)).to_batches()[0].equals(batch)


def test_parquet_encodings_follow_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 4096
    batch = pa.record_batch(
        {
            "label": [f"class {i % 10}" for i in range(n)],
            "x": rng.random(n),
            "image": [rng.bytes(2000) for _ in range(n)],
            "deep": pa.array([{"v": [i]} for i in range(n)]),
        }
    )
    path = written(ParquetSink(tmp_path), batch)
    group = pq.read_metadata(path).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["label"].has_dictionary_page
    assert not columns["x"].has_dictionary_page
    assert columns["image"].compression == "UNCOMPRESSED"
    assert columns["x"].compression == columns["deep.v.list.element"].compression == "ZSTD"
    assert pq.read_table(path).to_batches()[0].equals(batch)


def test_parquet_row_groups_are_bounded(tmp_path: Path) -> None:
    image = os.urandom(1 << 20)
    batch = pa.record_batch({"image": [image] * 80})
    metadata = pq.read_metadata(written(ParquetSink(tmp_path), batch, batch.slice(0, 5)))
    assert metadata.num_rows == 85
    assert max(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)) <= 33 << 20


def test_json_values(tmp_path: Path) -> None:
    batch = pa.record_batch(
        {
            "i": pa.array([1, None], pa.int8()),
            "f": [float("nan"), 0.5],
            "ok": [True, None],
            "s": ['quote " and \\ and \n', "ä"],
            'odd "name"': ["plain", None],
            "t": tensors(2),
            "when": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5), None], pa.timestamp("ms")),
            "day": [datetime.date(2026, 1, 2), None],
            "raw": [b"\x00\xff", None],
            "deep": [{"a": [1.5, float("inf")], "d": datetime.date(2026, 1, 2)}, None],
        }
    ).slice(0)
    first, second = [json.loads(line) for line in written(JsonSink(tmp_path), batch).read_text().splitlines()]
    assert first == {
        "i": 1,
        "f": None,
        "ok": True,
        "s": 'quote " and \\ and \n',
        'odd "name"': "plain",
        "t": [[0, 1], [2, 3]],
        "when": "2026-01-02T03:04:05.000",
        "day": "2026-01-02",
        "raw": "AP8=",
        "deep": {"a": [1.5, None], "d": "2026-01-02"},
    }
    assert second["f"] == 0.5
    assert second["s"] == "ä"
    assert second["deep"] is None


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_json_floats_read_back_as_floats(tmp_path: Path, kind: pa.DataType) -> None:
    values = [0.0, 1.0, -3.0, None, 2.0**15, 0.25, 0.0]
    batch = pa.record_batch({"x": pa.array(values, pa.float64()).cast(kind)})
    for i, whole in enumerate((batch, batch.slice(0, 5), batch.slice(6))):
        path = written(JsonSink(tmp_path / str(i)), whole)
        table = read_all(JsonSource(path))
        assert table.schema.types == [pa.float64()]
        assert table["x"].to_pylist() == whole["x"].to_pylist()
    large = pa.record_batch({"x": [1e20, -1e300, -0.0, 123456789.0, float("inf")]})
    texts = ["1e+20", "-1e+300", "-0.0", "123456789.0", "null"]
    assert written(JsonSink(tmp_path / "large"), large).read_text().split() == [f'{{"x":{text}}}' for text in texts]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("others", [0, 1])
def test_csv_floats_read_back_as_floats(tmp_path: Path, kind: pa.DataType, others: int) -> None:
    values = [0.0, 1.0, -3.0, None, 2.0**15, 0.25, 0.0]
    columns = {"x": pa.array(values, pa.float64()).cast(kind), "s": pa.array(["a", None, '"', "", ",", "\n", "b"])}
    batch = pa.record_batch(dict(list(columns.items())[: 1 + others]))
    for i, whole in enumerate((batch.slice(0, 3), batch, batch.slice(4, 1), batch.slice(6))):
        path = written(CsvSink(tmp_path / str(i)), whole)
        table = read_all(CsvSource(path, newlines_in_values=True))
        assert table.schema.field("x").type == pa.float64()
        assert table["x"].to_pylist() == whole["x"].to_pylist()
    large = pa.record_batch({"x": [1e20, -1e300, -0.0, 12345.0, float("inf"), float("nan"), None]})
    texts = ['"x"', "1e+20", "-1e+300", "-0.0", "12345.0", "inf", "nan", '""']
    assert written(CsvSink(tmp_path / "large"), large).read_text().split("\n")[:-2] == texts[:-1]


def test_csv_is_the_same_text_with_and_without_whole_floats(tmp_path: Path) -> None:
    others = pa.record_batch(
        {
            "s": ['a,"b"', None, ""],
            "t": pa.array([datetime.datetime(2026, 1, 2)] * 3, pa.timestamp("us", "UTC")),
            "b": [True, None, False],
            "n": pa.nulls(3),
            "d": pa.array([1, None, 2]).cast(pa.decimal128(20, 1)),
            "h": [0.5, None, float("inf")],
        }
    )
    plain = written(CsvSink(tmp_path / "a"), others.append_column("x", pa.array([0.5, None, 0.25])))
    joined = written(CsvSink(tmp_path / "b"), others.append_column("x", pa.array([5.0, None, 0.25])))
    assert joined.read_text() == plain.read_text().replace("0.5\n", "5.0\n")


def test_json_of_a_slice(tmp_path: Path) -> None:
    batch = pa.record_batch({"x": range(10), "s": [str(i) for i in range(10)]}).slice(3, 4)
    lines = written(JsonSink(tmp_path), batch).read_text().splitlines()
    assert [json.loads(line) for line in lines] == batch.to_pylist()


@pytest.mark.parametrize("column", [tensors(1), pa.array([[1]]), pa.array([b"x"])])
def test_csv_refuses_what_it_can_not_hold(tmp_path: Path, column: pa.Array) -> None:
    batch = pa.record_batch({"odd": column})
    with pytest.raises(PlanError, match="'odd'"):
        CsvSink(tmp_path).check(batch.schema)
    with pytest.raises(DataError, match="'odd'"):
        CsvSink(tmp_path).bind("run-00000", 1, None).open(SPLIT, 0).write(batch)


@pytest.mark.parametrize("many", [1, 400_000])  # in memory, and as rows come
@pytest.mark.parametrize(
    "values",
    [
        pa.array([None, 1, None, None, 2]),
        pa.array([0.5, None, -0.0]),
        pa.array([None, datetime.datetime(2026, 1, 2)], pa.timestamp("us")),
        pa.nulls(3),
    ],
    ids=lambda v: str(v.type),
)
def test_nulls_of_a_single_csv_column_are_rows(tmp_path: Path, values: pa.Array, many: int) -> None:
    batch = pa.record_batch({"x": pa.concat_arrays([values] * many)})
    found = pacsv.read_csv(written(CsvSink(tmp_path), batch)).column("x")
    assert found.is_null().to_pylist() == batch.column("x").is_null().to_pylist()


def test_null_texts_of_a_single_csv_column_are_rows(tmp_path: Path) -> None:
    batch = pa.record_batch({"x": pa.array([None, "a", "", "two\n\nlines", None])})
    options = pacsv.ParseOptions(newlines_in_values=True)
    found = pacsv.read_csv(written(CsvSink(tmp_path), batch), parse_options=options).column("x")
    assert found.to_pylist() == ["", "a", "", "two\n\nlines", ""]


@pytest.mark.parametrize("kind", ["plain", "in a list", "in a struct"])
@pytest.mark.parametrize("sink", [ParquetSink, CsvSink])
def test_intervals_are_refused_where_they_can_not_be_held(tmp_path: Path, sink: type[FileSink], kind: str) -> None:
    interval = pa.month_day_nano_interval()
    types = {"plain": interval, "in a list": pa.list_(interval), "in a struct": pa.struct([("i", interval)])}
    batch = pa.record_batch({"id": [1], "i": pa.nulls(1, types[kind])})
    with pytest.raises(PlanError, match="can't hold column 'i'") as before:
        sink(tmp_path / "out").check(batch.schema)
    with pytest.raises(DataError, match="can't hold column 'i'") as meanwhile:
        written(sink(tmp_path / "out"), batch)
    for raised in (before, meanwhile):
        assert ("column", "i") in raised.value.where
        assert raised.value.hint == "drop('i'), or write JSON lines"


def test_json_holds_intervals(tmp_path: Path) -> None:
    batch = pa.record_batch({"i": pa.array([(1, 2, 3), None], pa.month_day_nano_interval())})
    JsonSink(tmp_path / "out").check(batch.schema)
    text = written(JsonSink(tmp_path / "out"), batch).read_text()
    assert [json.loads(line) for line in text.splitlines()] == [{"i": [1, 2, 3]}, {"i": None}]


def test_destination_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="is a file"):
        ParquetSink(tmp_path / "file").check(None)
    with pytest.raises(DestinationError, match="can't write"):
        ParquetSink(tmp_path / "file" / "below").check(None)
    with pytest.raises(PlanError, match="outputs"):
        ParquetSink(tmp_path, outputs="other")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="scheme"):
        ParquetSink("gs://bucket/x")


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    keep = {"notes.txt", "part-00.parquet", "part-00-000001.txt", "data.parquet"}
    for name in keep:
        (tmp_path / name).write_text("mine")
    batch = pa.record_batch({"x": [1]})
    written(ParquetSink(tmp_path), batch)
    session = Session(ParquetSink(tmp_path, fresh=True), 1, holds=True)
    (name,) = session.write(SPLIT, [batch])
    session.finish()
    assert {p.name for p in tmp_path.iterdir()} == keep | {name, "_SUCCESS", "_manifest.json", "_headrace"}
    assert {(tmp_path / name).read_text() for name in keep} == {"mine"}


def test_manifest_holds_summary_and_schema(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path).bind("run-00000", 1, None)
    summary = {"rows": 7, "at": datetime.date(2026, 1, 2), "metrics": {"loss": float("nan")}}
    sink.finish([], summary, pa.schema([("x", pa.int64())]))
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["rows"] == 0, "what the files hold goes before what the summary says"
    assert manifest["schema"] == "x: int64"
    assert manifest["at"] == "2026-01-02"
    assert manifest["metrics"] == {"loss": None}
    assert [f["name"] for f in manifest["files"]] == ["part-00-000000.parquet"]
    assert (manifest["version"], manifest["run"], manifest["generation"]) == (1, "run-00000", 0)


def test_per_input_swaps_the_extension(tmp_path: Path) -> None:
    sink = JsonSink(tmp_path, outputs="per_input").bind("run-00000", 1, None)
    named = {"a/b.csv.gz": "a/b.jsonl", "x.parquet": "x.jsonl", "plain": "plain.jsonl", "v1.2/k.jpg": "v1.2/k.jsonl"}
    for name, wanted in named.items():
        assert sink.output_name(Split(0, (Fragment("u", 1, "v", name=name),), 1)) == wanted


@pytest.mark.parametrize("sink", [ParquetSink, CsvSink, JsonSink])
@pytest.mark.parametrize("rows", [0, 10, 300_000])
def test_receipts_name_what_was_written(tmp_path: Path, sink: type[FileSink], rows: int) -> None:
    """Small files are hashed in memory, large ones while they are written or afterwards."""
    bound = sink(tmp_path).bind("run-00000", 1, None)
    writer = bound.open(SPLIT, 0)
    for start in range(0, max(rows, 1), 30_000):
        n = min(30_000, rows - start)
        writer.write(pa.record_batch({"x": np.arange(start, start + n), "s": [f"row {i}" for i in range(n)]}))
    (output,) = writer.close().outputs
    data = (tmp_path / output.staged).read_bytes()
    assert (output.bytes, output.digest) == (len(data), hashlib.sha256(data).hexdigest())
    assert output.rows == rows


def test_a_file_that_is_full_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: len(data) // 2])  # as a disk with some room left does

    real = os.write
    writer = JsonSink(tmp_path).bind("run-00000", 1, None).open(SPLIT, 0)
    writer.write(pa.record_batch({"x": range(1000)}))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DestinationError, match="the disk is full") as caught:
        writer.close()
    assert "run the same command again" in caught.value.hint
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def _dying(real: Any, calls: int, *, after: bool) -> Any:
    """A method that works so many times, and then dies before or after its effect."""
    left = [calls]

    def call(*args: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return real(*args, **named)
        if after:
            real(*args, **named)
        raise KeyboardInterrupt

    return call


@pytest.mark.parametrize("stop", ["publish", "write", "write_pieces", "remove_all", "remove"])
@pytest.mark.parametrize("outputs", ["packed", "per_input"])
def test_finish_is_redone_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str, outputs: Literal["packed", "per_input"]
) -> None:
    """A crash before or in the middle of each step; the next session calls finish again."""
    names = ["a.parquet", "b.parquet"]
    real = getattr(LocalRunStore, stop)
    for crash in range(8):
        root = tmp_path / str(crash)
        first = Session(ParquetSink(root, outputs=outputs))
        for i, name in enumerate([*names, "c.parquet"]):
            first.write(a_split(i, name), [a_batch(i * 10, 5)])
        first.finish()
        fresh = Session(ParquetSink(root, outputs=outputs, fresh=True), 1, holds=True)
        for i, name in enumerate(names):
            fresh.write(a_split(i, name), [a_batch(100 + i * 10, 5)])
        died: list[int] = []
        monkeypatch.setattr(LocalRunStore, stop, _dying(real, crash // 2, after=bool(crash % 2)))
        try:
            fresh.finish()
        except KeyboardInterrupt:
            died.append(crash)
        monkeypatch.setattr(LocalRunStore, stop, real)
        assert died or crash // 2 > 0, "the first call is always reached"
        again = ParquetSink(root, outputs=outputs, fresh=True).bind("run-00001", 2, SCHEMA)
        again.finish(fresh.files, {"tally": {"rows_in": 10, "written": 10}}, SCHEMA)
        assert pq.read_table(root).column("id").to_pylist() == [*range(100, 105), *range(110, 115)]
        assert (root / "_SUCCESS").exists()
        assert not list(root.glob("_headrace/*/staging/**/*.parquet"))
        assert verify(root).problems == ()


def test_a_run_given_up_is_replaced(tmp_path: Path) -> None:
    """Its outputs are in no manifest; its log names them."""
    given_up = Session(JsonSink(tmp_path, outputs="per_input"))
    for i in range(3):
        given_up.write(a_split(i), [a_batch(i, 1)])
    fresh = Session(JsonSink(tmp_path, outputs="per_input", fresh=True), 1, holds=True)
    fresh.write(a_split(1), [a_batch(50, 1)])
    (tmp_path / "mine.jsonl").write_text("{}\n")
    fresh.finish()
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["in1.jsonl", "mine.jsonl"]
    assert json.loads((tmp_path / "in1.jsonl").read_text())["id"] == 50


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "in1.jsonl").write_text("mine")
    session = Session(JsonSink(tmp_path, outputs="per_input"))
    with pytest.raises(DestinationError, match="is taken"):
        session.write(a_split(1), [a_batch(50, 1)])
    with pytest.raises(DestinationError, match="is taken"):
        session.finish()
    assert (tmp_path / "in1.jsonl").read_text() == "mine"
    assert not (tmp_path / "_SUCCESS").exists()


@pytest.mark.parametrize("given_up", [True, False])
def test_nothing_is_left_of_files_that_could_not_be_widened(tmp_path: Path, given_up: bool) -> None:
    """A whole number that no float holds is followed by floats; or the split is given up first."""
    writer = ParquetSink(tmp_path).bind("run-00000", 1, None).open(SPLIT, 0)
    writer.write(pa.record_batch({"v": [2**60 + 1]}))
    writer.write(pa.record_batch({"v": [0.5]}))
    assert [p for p in tmp_path.rglob("*") if ".narrow" in p.name]
    if given_up:
        writer.abort()
    else:
        with pytest.raises(DataError, match="earlier rows don't fit"):
            writer.close()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_without_rows_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    class Careless(ParquetSink):
        def _holds(self, field: pa.Field) -> bool:
            return True

    session = Session(Careless(tmp_path), schema=pa.schema([("meta", pa.struct([]))]))
    with pytest.raises(DataError, match=r"can't be written as parquet: .*'meta'"):
        session.finish()
