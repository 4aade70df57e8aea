"""Files whose columns come late: what is read back is what was written."""

from __future__ import annotations

import datetime
import decimal
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from headrace.connectors.sinks import csv as csv_sink
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.files import FileSink
from headrace.connectors.sinks.json import JsonSink, encode_lines
from headrace.connectors.sinks.parquet import ParquetEncoder, ParquetSink
from headrace.core.errors import DataError, InternalError
from headrace.core.schemas import bring, unify
from headrace.core.splits import Fragment, Split
from headrace.testing.check_sink import Session

SPLIT = Split(0, (Fragment("/in/a", 1, "v", name="a"),), 1)
SINKS: list[type[FileSink]] = [CsvSink, JsonSink, ParquetSink]

TEXTS = [None, "", "a", 'q"q', '"', '""', "\n", "a\r\nb", "\r", ",", 'x,\n"y"\n,', "null", "NaN", " ", "ü", "\\", "'"]
DAY = datetime.date(2026, 1, 2)
FLAT: list[tuple[pa.DataType, list[Any]]] = [
    (pa.string(), TEXTS),
    (pa.large_string(), TEXTS),
    (pa.dictionary(pa.int8(), pa.string()), TEXTS),
    (pa.int64(), [None, 0, -1, 2**53, 7]),
    (pa.uint8(), [None, 0, 255]),
    (pa.float64(), [None, 0.1, 1e300, -5e-324, 3.0]),
    (pa.float32(), [None, 0.5, 3.0]),
    (pa.bool_(), [None, True, False]),
    (pa.date32(), [None, DAY, datetime.date(1, 1, 1)]),
    (pa.timestamp("s"), [None, datetime.datetime(1990, 5, 6, 7, 8, 9)]),
    (pa.timestamp("ns"), [None, np.datetime64("2020-01-01T00:00:00.123456789")]),
    (pa.time64("us"), [None, datetime.time(1, 2, 3, 4)]),
    (pa.decimal128(12, 3), [None, decimal.Decimal("-1.100")]),
    (pa.null(), [None]),
]
NESTED: list[tuple[pa.DataType, list[Any]]] = [
    (pa.list_(pa.string()), [None, [], ["a", None, ""]]),
    (pa.struct([("a", pa.int32()), ("b", pa.string())]), [None, {"a": 1, "b": None}, {"a": None, "b": ""}]),
    (pa.map_(pa.string(), pa.int8()), [None, [], [("k", 1)]]),
    (pa.binary(), [None, b"", b"\x00\xff\n"]),
]
WIDER = {pa.int64(): pa.float64(), pa.timestamp("s"): pa.timestamp("ns"), pa.null(): pa.string(), pa.float32(): pa.float64()}


def random_batches(rng: np.random.Generator, kinds: list[tuple[pa.DataType, list[Any]]]) -> list[pa.RecordBatch]:
    """Of columns that come and go, and now and then become of a wider type."""
    values: dict[pa.DataType, list[Any]] = dict(kinds)
    types: dict[str, pa.DataType] = {}
    batches: list[pa.RecordBatch] = []
    for _ in range(int(rng.integers(2, 7))):
        for name, type in types.items():
            if type in WIDER and rng.random() < 0.2:
                types[name] = WIDER[type]
        for _ in range(int(rng.integers(0 if batches else 1, 3))):
            types[f'c"{len(types)},\n'] = kinds[rng.integers(len(kinds))][0]
        rows = int(rng.choice([0, 1, 2, 60]))
        chosen = [name for i, name in enumerate(types) if i == 0 or rng.random() < 0.8]
        columns = [
            pa.array([values[types[n]][rng.integers(len(values[types[n]]))] for _ in range(rows)], types[n]) for n in chosen
        ]
        batches.append(pa.RecordBatch.from_arrays(columns, names=chosen))
    return batches


def written(sink: FileSink, batches: list[pa.RecordBatch]) -> Path:
    session = Session(sink, schema=None)
    (name,) = session.write(SPLIT, batches)
    session.finish()
    assert not [p for p in Path(sink.path).rglob("*") if ".narrow" in p.name]
    return Path(sink.path, name)


def whole(batches: list[pa.RecordBatch]) -> pa.Table:
    schema = batches[0].schema
    for batch in batches[1:]:
        schema = unify(schema, batch.schema)
    return pa.Table.from_batches([bring(batch, schema) for batch in batches])


def read_csv(path: Path, schema: pa.Schema) -> pa.Table:
    types = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema}
    single = len(schema) == 1  # whose nulls are in quotes
    return pc.read_csv(
        path,
        read_options=pc.ReadOptions(block_size=64 << 20),
        parse_options=pc.ParseOptions(newlines_in_values=True, ignore_empty_lines=single),
        convert_options=pc.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=single
        ),
    )


@pytest.fixture(params=[1 << 20, 7])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_sink, "JOIN_BYTES", request.param)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.usefixtures("block_bytes")
def test_csv_reads_back(tmp_path: Path, seed: int) -> None:
    batches = random_batches(np.random.default_rng(seed), FLAT)
    expected = whole(batches)
    back = read_csv(written(CsvSink(tmp_path), batches), expected.schema)
    assert back.column_names == expected.column_names
    rows = expected.to_pylist()
    if expected.num_columns == 1:
        rows = [{name: value if value != "" else None for name, value in row.items()} for row in rows]
    assert back.to_pylist() == rows


@pytest.mark.parametrize("seed", range(40))
def test_parquet_reads_back(tmp_path: Path, seed: int) -> None:
    batches = random_batches(np.random.default_rng(seed), FLAT + NESTED)
    expected = whole(batches)
    back = pq.read_table(written(ParquetSink(tmp_path), batches))
    assert back.column_names == expected.column_names
    assert back.to_pylist() == expected.to_pylist()


@pytest.mark.parametrize("seed", range(20))
def test_json_reads_back(tmp_path: Path, seed: int) -> None:
    kinds = [(t, v) for t, v in FLAT + NESTED if not pa.types.is_temporal(t)]  # whose text is that of their unit
    batches = random_batches(np.random.default_rng(seed), kinds)
    expected = whole(batches).combine_chunks()
    back = [json.loads(line) for line in written(JsonSink(tmp_path), batches).read_text().splitlines()]
    at_once = [json.loads(line) for line in bytes(encode_lines(expected.to_batches()[0])).splitlines()] if len(expected) else []
    assert [{name: row.get(name) for name in expected.column_names} for row in back] == at_once


@pytest.mark.parametrize("kind", SINKS)
def test_rows_without_any_column(tmp_path: Path, kind: type[FileSink]) -> None:
    batches = [pa.record_batch([pa.nulls(3)], names=["_"]).select([]), pa.record_batch({"a": [1], "b": ["x"]})]
    path = written(kind(tmp_path), batches)
    if kind is JsonSink:
        back = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row.get("a"), row.get("b")) for row in back] == [(None, None)] * 3 + [(1, "x")]
        return
    back = pq.read_table(path) if kind is ParquetSink else read_csv(path, batches[1].schema)
    assert back.to_pylist() == [{"a": None, "b": None}] * 3 + [{"a": 1, "b": "x"}]


def test_rows_larger_than_what_is_held_at_once(tmp_path: Path) -> None:
    wide = 'x"\n' * 1_000_000
    batches = [pa.record_batch({"a": [wide, None, "y"]}), pa.record_batch({"a": ["z"], "b": [1]})]
    back = read_csv(written(CsvSink(tmp_path), batches), whole(batches).schema)
    assert back.to_pylist() == whole(batches).to_pylist()


def test_a_year_that_no_reader_takes(tmp_path: Path) -> None:
    batches = [pa.record_batch({"a": pa.array([4_000_000], pa.date32())}), pa.record_batch({"a": [DAY], "b": [1]})]
    assert written(CsvSink(tmp_path), batches).read_text() == '"a","b"\n12921-08-18,\n2026-01-02,1\n'


@pytest.mark.parametrize("kind", [CsvSink, ParquetSink])
def test_rows_that_are_lost_on_the_way_are_an_error(
    tmp_path: Path, kind: type[FileSink], monkeypatch: pytest.MonkeyPatch
) -> None:
    join = kind._join

    def lossy(self: Any, parts: Any, path: str, schema: pa.Schema) -> Any:
        rows, done = join(self, parts, path, schema)
        return rows - 1, done

    monkeypatch.setattr(kind, "_join", lossy)
    with pytest.raises(InternalError, match="2 rows were written, and joining their files gave 1"):
        written(kind(tmp_path), [pa.record_batch({"a": [1]}), pa.record_batch({"b": [1]})])
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("late", [True, False])
def test_a_file_that_cannot_be_closed_leaves_nothing(tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(ParquetSink(tmp_path), schema=None)
    writer = session.sink.open(SPLIT, 0)
    writer.write(pa.record_batch({"a": [1]}))
    if late:
        writer.write(pa.record_batch({"b": [1]}))

    def refuse(self: Any) -> None:
        raise pa.ArrowInvalid("refused")

    monkeypatch.setattr(ParquetEncoder, "close", refuse)
    with pytest.raises(DataError, match="can't be written as parquet: refused"):
        writer.close()
    assert not leftovers(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return [
        name for _, _, names in os.walk(folder) for name in names if name.endswith((".csv", ".parquet")) or "narrow" in name
    ]
