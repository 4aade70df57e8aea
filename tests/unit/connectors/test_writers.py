"""Writers: types, encodings, row groups, names, refusals."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.files import FileSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.errors import DataError, DestinationError, PlanError
from headrace.core.splits import Fragment, Split

SPLIT = Split(0, (Fragment("/in/a.parquet", 1, "v", name="a.parquet"),), 1)


def written(sink: FileSink, *batches: pa.RecordBatch) -> Path:
    sink = sink.prepare(None)
    writer = sink.open(SPLIT, 0)
    for batch in batches:
        writer.write(batch)
    receipt = writer.close()
    sink.finish({}, batches[0].schema)
    return Path(sink.path, receipt.outputs[0].name)


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


def test_json_of_a_slice(tmp_path: Path) -> None:
    batch = pa.record_batch({"x": range(10), "s": [str(i) for i in range(10)]}).slice(3, 4)
    lines = written(JsonSink(tmp_path), batch).read_text().splitlines()
    assert [json.loads(line) for line in lines] == batch.to_pylist()


@pytest.mark.parametrize("column", [tensors(1), pa.array([[1]]), pa.array([b"x"])])
def test_csv_refuses_what_it_can_not_hold(tmp_path: Path, column: pa.Array) -> None:
    batch = pa.record_batch({"odd": column})
    with pytest.raises(PlanError, match="'odd'"):
        CsvSink(tmp_path).prepare(batch.schema)
    with pytest.raises(DataError, match="'odd'"):
        CsvSink(tmp_path).prepare(None).open(SPLIT, 0).write(batch)


def test_destination_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="is a file"):
        ParquetSink(tmp_path / "file").prepare(None)
    with pytest.raises(DestinationError, match="can't write"):
        ParquetSink(tmp_path / "file" / "below").prepare(None)
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
    path = written(ParquetSink(tmp_path, fresh=True), batch)
    assert {p.name for p in tmp_path.iterdir()} == keep | {path.name, "_SUCCESS", "_manifest.json"}


def test_manifest_holds_summary_and_schema(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path).prepare(None)
    sink.finish({"rows": 0, "at": datetime.date(2026, 1, 2)}, pa.schema([("x", pa.int64())]))
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["rows"] == 0
    assert manifest["schema"] == "x: int64"


def test_per_input_swaps_the_extension(tmp_path: Path) -> None:
    sink = JsonSink(tmp_path, outputs="per_input").prepare(None)
    named = {"a/b.csv.gz": "a/b.jsonl", "x.parquet": "x.jsonl", "plain": "plain.jsonl", "v1.2/k.jpg": "v1.2/k.jsonl"}
    for name, wanted in named.items():
        assert sink.output_name(Split(0, (Fragment("u", 1, "v", name=name),), 1)) == wanted
