"""A folder of Parquet files written over time: columns that come and go, types that get wider."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors import storage
from headrace.connectors.sources.parquet import ParquetSource
from headrace.core.errors import DataError, DestinationError, InputChanged, PlanError
from headrace.core.options import BlockLimits

from .conftest import ENGINES, read_back

QUIET: dict[str, Any] = {"engine": "inline", "progress": "quiet"}


def folder_of(folder: Path, *tables: pa.Table | dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, table in enumerate(tables):
        pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), folder / f"f{i:03d}.parquet")
    return folder


def required(type: pa.DataType, values: list[Any]) -> pa.Table:
    return pa.table({"x": values}, schema=pa.schema([pa.field("x", type, nullable=False)]))


def array(values: list[Any], type: pa.DataType) -> dict[str, pa.Array]:
    return {"x": pa.array(values, type)}


WORDS = pa.array(["a", "b"]).dictionary_encode()
LISTS_OF_WORDS = pa.ListArray.from_arrays([0, 1, 2], WORDS)
INT = pa.int64()
INT32 = pa.int32()


@pytest.mark.parametrize(
    ("one", "other", "type", "values"),
    [
        ({"x": pa.nulls(1)}, {"x": ["a"]}, pa.string(), [None, "a"]),
        (array([1], INT32), array([1 << 40], INT), INT, [1, 1 << 40]),
        (array([1.5], pa.float32()), array([0.1], pa.float64()), pa.float64(), [1.5, 0.1]),
        (array([1], INT), array([0.5], pa.float64()), pa.float64(), [1.0, 0.5]),
        ({"x": WORDS}, {"x": ["c"]}, pa.string(), ["a", "b", "c"]),
        ({"x": LISTS_OF_WORDS}, {"x": [["c"]]}, pa.list_(pa.string()), [["a"], ["b"], ["c"]]),
        ({"x": ["a"]}, array(["b"], pa.large_string()), pa.large_string(), ["a", "b"]),
        ({"x": [{"a": 1}]}, {"x": [{"a": 2, "b": "y"}]}, pa.struct([("a", INT), ("b", pa.string())]), None),
        (array([[1]], pa.list_(INT32)), array([[1 << 40]], pa.list_(INT)), pa.list_(INT), [[1], [1 << 40]]),
        (
            array([[("k", 1)]], pa.map_(pa.string(), INT32)),
            array([[("k", None)]], pa.map_(pa.string(), INT)),
            pa.map_(pa.string(), INT),
            [[("k", 1)], [("k", None)]],
        ),
        (
            array([dt.time(1)], pa.time32("ms")),
            array([dt.time(2)], pa.time64("us")),
            pa.time64("us"),
            [dt.time(1), dt.time(2)],
        ),
        (required(INT, [1]), {"x": [None, 2]}, INT, [1, None, 2]),
        (
            required(pa.list_(pa.field("element", INT, nullable=False)), [[1]]),
            {"x": [[None], None]},
            pa.list_(INT),
            [[1], [None], None],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
@pytest.mark.parametrize("outputs", ["packed", "per_input"])
def test_types_that_files_have_come_together_in_any_order(
    tmp_path: Path, one: Any, other: Any, type: pa.DataType, values: list[Any] | None, outputs: Any
) -> None:
    for name, files in (("in", (one, other)), ("back", (other, one))):
        source = hr.read_parquet(folder_of(tmp_path / name, *files))
        assert source.schema().types == [type]
        source.write_parquet(tmp_path / f"{name}-out", outputs=outputs, **QUIET)
        written = [pq.read_table(p) for p in sorted((tmp_path / f"{name}-out").glob("*.parquet"))]
        assert all(t.schema.equals(written[0].schema) for t in written)
        got = pa.concat_tables(written)
        got.validate(full=True)
        if values is not None and name == "in":
            assert got["x"].to_pylist() == values


def test_whole_numbers_and_decimals_come_together(tmp_path: Path) -> None:
    whole, places = {"x": pa.array([2**63 - 1, 1])}, array([Decimal("1.25")], pa.decimal128(5, 2))
    table = hr.read_parquet(folder_of(tmp_path, whole, places)).to_arrow(**QUIET)
    assert table["x"].to_pylist() == [2**63 - 1, 1, Decimal("1.25")]


def test_columns_that_come_and_go_are_null_elsewhere(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", {"x": [1], "y": ["a"]}, {"z": [0.5], "x": [2]}, {"w": [True]})
    source = hr.read_parquet(data)
    assert source.schema().names == ["x", "y", "z", "w"]
    assert source.to_arrow(**QUIET).to_pylist() == [
        {"x": 1, "y": "a", "z": None, "w": None},
        {"x": 2, "y": None, "z": 0.5, "w": None},
        {"x": None, "y": None, "z": None, "w": True},
    ]
    assert source.select("z").to_arrow(**QUIET)["z"].to_pylist() == [None, 0.5, None]
    assert source.filter(pc.field("y") == "a").count(**QUIET) == 1


def test_what_a_function_left_null_in_one_file_is_read_again(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", {"x": [1, 2]}, {"x": [3, 4]})

    def judged(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "error": ["too large" if x > 2 else None for x in batch["x"]]}

    hr.read_parquet(data).map_batches(judged).write_parquet(tmp_path / "out", outputs="per_input", **QUIET)
    again = hr.read_parquet(tmp_path / "out").to_arrow(**QUIET)
    assert again["error"].to_pylist() == [None, None, "too large", "too large"]


def test_types_with_nothing_in_common_name_both_files(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", {"x": [1]}, {"x": [2]}, {"x": ["a"]})
    with pytest.raises(PlanError, match=r"'x'.*int64 in .*f000\.parquet, string in .*f002\.parquet") as caught:
        hr.read_parquet(data).write_parquet(tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
    assert "schema=" in caught.value.hint
    as_text = hr.read_parquet(data, schema=pa.schema([("x", pa.string())]))
    assert as_text.to_arrow(**QUIET)["x"].to_pylist() == ["1", "2", "a"]


def test_types_of_a_column_that_nobody_reads_do_not_matter(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", {"k": [1], **array([1], pa.date32())}, {"k": [2], "x": ["a"]}, {"k": [3], "x": [True]})
    source = hr.read_parquet(data)
    assert source.schema().types == [INT, pa.date32()]
    for narrow in (hr.read_parquet(data, columns=["k"]), source.select("k"), source.drop("x")):
        assert narrow.to_arrow(**QUIET).to_pylist() == [{"k": 1}, {"k": 2}, {"k": 3}]
    assert source.count(**QUIET) == 3
    for reading in (source, source.select("x"), source.filter(pc.field("x").is_valid()).select("k"), source.drop("k")):
        with pytest.raises(PlanError, match=r"'x'.*date32\[day\] in .*f000\.parquet, string in .*f001\.parquet"):
            reading.to_arrow(**QUIET)
    with pytest.raises(PlanError, match="types that don't go together"):
        next(ParquetSource(data).open(next(ParquetSource(data).splits(per_input=False)), BlockLimits()))


FAR = dt.datetime(9999, 12, 31)
US, NS = pa.timestamp("us"), pa.timestamp("ns")


@pytest.mark.parametrize(
    ("one", "other", "type", "values"),
    [
        (array([(1 << 63) + 1], pa.uint64()), array([5], INT), pa.uint64(), [(1 << 63) + 1, 5]),
        (array([-5], INT32), array([1 << 40], pa.uint64()), INT, [-5, 1 << 40]),
        (array([FAR], US), array([1000], NS), US, [FAR, dt.datetime(1970, 1, 1, 0, 0, 0, 1)]),
        (array([FAR], pa.timestamp("ms")), array([1000], NS), US, [FAR, dt.datetime(1970, 1, 1, 0, 0, 0, 1)]),
        (array([[FAR]], pa.list_(US)), array([[1000]], pa.list_(NS)), pa.list_(US), None),
        (array([{"a": FAR}], pa.struct([("a", US)])), array([{"a": 0}], pa.struct([("a", NS)])), pa.struct([("a", US)]), None),
        (array([1], NS), array([1], US), NS, None),
        (
            array([0], pa.timestamp("us", "UTC")),
            array([1], pa.timestamp("us", "Europe/Berlin")),
            pa.timestamp("us", "UTC"),
            None,
        ),
        (array([0], pa.timestamp("ms", "UTC")), array([1], pa.timestamp("us", "Asia/Tokyo")), pa.timestamp("us", "UTC"), None),
    ],
)
def test_what_the_first_file_has_can_be_read_beside_any_other(
    tmp_path: Path, one: Any, other: Any, type: pa.DataType, values: list[Any] | None
) -> None:
    read = hr.read_parquet(folder_of(tmp_path / "in", one, other)).to_arrow(**QUIET)["x"]
    assert read.type == type
    assert len(read) == 2
    if values is not None:
        assert read.to_pylist() == values


def test_a_value_that_the_first_type_has_no_room_for_is_told(tmp_path: Path) -> None:
    for n, tables in enumerate([(array([1], pa.uint64()), array([-1], INT)), (array([1], US), array([1], NS))]):
        with pytest.raises(DataError, match=r"does not fit(.|\n)*f001\.parquet"):
            hr.read_parquet(folder_of(tmp_path / str(n), *tables)).to_arrow(**QUIET)


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ({"y": [1]}, r"'x' \(int32\) is missing"),
        ({"x": [1 << 40]}, "'x' of type int64 does not fit int32"),
        ({"x": ["a"]}, "'x' has type string here, int32 was expected"),
    ],
)
def test_a_file_that_was_not_looked_at_is_told_with_the_way_out(tmp_path: Path, odd: dict[str, Any], text: str) -> None:
    tables: list[dict[str, Any]] = [array([n], INT32) for n in range(40)]
    data = folder_of(tmp_path / "in", *tables[:1], odd, *tables[2:])
    with pytest.raises(DataError, match=text) as caught:
        hr.read_parquet(data).to_arrow(**QUIET)
    assert "f001.parquet" in str(caught.value)
    assert "schema=" in str(caught.value)


def test_the_last_file_is_looked_at(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", *[array([n], INT32) for n in range(40)], array([1 << 40], INT))
    assert hr.read_parquet(data).to_arrow(**QUIET)["x"].to_pylist() == [*range(40), 1 << 40]


def test_fields_that_nobody_promised_are_not_left_out_of_a_struct(tmp_path: Path) -> None:
    plain = [{"x": [{"a": 1}]}] * 40
    data = folder_of(tmp_path / "in", *plain[:1], {"x": [{"a": 1, "b": 2}]}, *plain[2:])
    with pytest.raises(DataError, match="struct<a: int64, b: int64> here, struct<a: int64> was expected"):
        hr.read_parquet(data).to_arrow(**QUIET)


@pytest.mark.parametrize("engine", ENGINES)
def test_columns_of_files_that_were_not_looked_at_are_left_out_with_a_word(tmp_path: Path, engine: str) -> None:
    if engine == "ray":
        pytest.skip("the same worker as in processes")
    plain: list[dict[str, Any]] = [{"x": [n], "w": [n]} for n in range(40)]
    odd = [{"x": [n], "w": [n], "y": [n], "z": [n]} for n in (1, 3)]
    data = folder_of(tmp_path / "in", plain[0], odd[0], plain[2], odd[1], *plain[4:])
    options: Any = {**QUIET, "engine": engine, "cpus": 2}
    source = hr.read_parquet(data)
    for again in ("out", "again"):
        run = source.write_parquet(tmp_path / again, outputs="per_input", **options)
        (note,) = [note for note in run.notes if "left out" in note]
        assert "columns y, z of" in note
        assert "f001.parquet" in note or "f003.parquet" in note
        assert "schema=" in note
    assert run.rows == 40
    for chosen in (source.select("x"), hr.read_parquet(data, schema=pa.schema([("x", INT)]))):
        run = chosen.write_parquet(tmp_path / "chosen", fresh=True, **options)
        assert not [note for note in run.notes if "left out" in note]


def test_nulls_of_files_that_were_not_looked_at(tmp_path: Path) -> None:
    sure: list[Any] = [required(INT, [n]) for n in range(40)]
    data = folder_of(tmp_path / "in", *sure[:1], {"x": [None]}, *sure[2:])
    hr.read_parquet(data).write_parquet(tmp_path / "out", **QUIET)
    assert read_back(tmp_path / "out")["x"].null_count == 1


def test_a_schema_says_what_is_read(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", array([1], INT32) | {"y": ["a"]}, {"x": [1 << 40]}, {"z": [1]})
    schema = pa.schema([pa.field("x", INT, nullable=False), ("new", pa.list_(pa.string()))])
    source = hr.read_parquet(data, schema=schema)
    assert source.schema().names == ["x", "new"]
    got = source.to_arrow(**QUIET)
    assert got.to_pylist() == [{"x": 1, "new": None}, {"x": 1 << 40, "new": None}, {"x": None, "new": None}]
    with pytest.raises(DataError, match="'x' of type int64 does not fit int32") as caught:
        hr.read_parquet(data, schema=pa.schema([("x", INT32)])).to_arrow(**QUIET)
    assert "f001.parquet" in str(caught.value)
    for wrong in ({"x": INT}, pa.schema([("x", INT), ("x", INT)])):
        with pytest.raises(PlanError, match="schema"):
            hr.read_parquet(data, schema=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "type"), [(1e300, pa.float32()), ("a", INT), ([1], INT), (1 << 40, INT32)])
def test_a_value_that_the_schema_has_no_room_for_is_told(tmp_path: Path, value: Any, type: pa.DataType) -> None:
    source = hr.read_parquet(folder_of(tmp_path / "in", {"x": [value]}), schema=pa.schema([("x", type)]))
    with pytest.raises(DataError, match=r"'x' of type .* does not fit") as caught:
        source.to_arrow(**QUIET)
    assert "f000.parquet" in str(caught.value)


def test_a_column_that_is_there_twice_is_not_taken_for_missing(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pytest.raises(DataError, match="'x'"):
        hr.read_parquet(folder_of(tmp_path / "in", twice), schema=pa.schema([("x", INT)])).to_arrow(**QUIET)


def test_tensors_of_several_shapes_become_ragged(tmp_path: Path) -> None:
    tensors = [pa.FixedShapeTensorArray.from_numpy_ndarray(np.full((2, n), n, np.float32)) for n in (3, 4)]
    source = hr.read_parquet(folder_of(tmp_path / "in", *({"x": t} for t in tensors)))
    rows = [x for batch in source.iter_batches(**QUIET) for x in batch["x"]]
    assert [np.asarray(x).tolist() for x in rows] == [[3.0] * 3] * 2 + [[4.0] * 4] * 2


def test_a_schema_is_part_of_what_a_run_means_and_files_of_the_same_types_are_not(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "in", array([1], INT32), array([2], INT32))
    wide = pa.schema([("x", INT)])
    hr.read_parquet(data, schema=wide).write_parquet(tmp_path / "out", **QUIET)
    assert hr.read_parquet(data, schema=wide).write_parquet(tmp_path / "out", **QUIET).already_done
    with pytest.raises(DestinationError, match="schema"):
        hr.read_parquet(data).write_parquet(tmp_path / "out", **QUIET)
    hr.read_parquet(data).write_parquet(tmp_path / "plain", **QUIET)
    folder_of(data, array([1], INT32), array([2], INT32), array([3], INT32))
    with pytest.raises(InputChanged):  # not another plan
        hr.read_parquet(data).write_parquet(tmp_path / "plain", **QUIET)


def test_a_filter_skips_no_row_group_by_values_that_are_cast(tmp_path: Path) -> None:
    """0.1 as float32 is more than 0.1."""
    data = folder_of(tmp_path / "in", array([0.1] * 3, pa.float32()), array([0.0], pa.float64()))
    assert hr.read_parquet(data).filter(pc.field("x") > 0.1).count(**QUIET) == 3
    texts = hr.read_parquet(folder_of(tmp_path / "texts", {"x": [9, 10]}), schema=pa.schema([("x", pa.string())]))
    assert texts.filter(pc.field("x") < "5").count(**QUIET) == 1


def large(rows: int, **columns: pa.Array) -> pa.Table:
    """With row groups that are worth copying."""
    noise = np.random.default_rng(0).integers(0, 256, rows * 250, np.uint8).tobytes()
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(250), rows, [None, pa.py_buffer(noise)])
    return pa.table({"noise": fixed, **columns})


@pytest.mark.parametrize("wide_first", [True, False])
def test_chunks_of_another_type_are_not_copied(tmp_path: Path, wide_first: bool) -> None:
    rows = 6000
    numbers = np.arange(rows)
    narrow = large(rows, x=pa.array(numbers, INT32), s=pa.array([{"a": 1}] * rows))
    wide = large(rows, x=pa.array(numbers + (1 << 40)), s=pa.array([{"a": 1, "b": 2}] * rows), new=pa.array(numbers))
    data = folder_of(tmp_path / "in", *((wide, narrow) if wide_first else (narrow, wide)))
    assert (data / "f000.parquet").stat().st_size > storage.WHOLE_LOCAL_BYTES
    source = hr.read_parquet(data)
    hr.read_parquet(data).map_batches(lambda b: {"y": b["x"] + 1, **b}).write_parquet(
        tmp_path / "out", outputs="per_input", **QUIET
    )
    source.write_parquet(tmp_path / "plain", outputs="per_input", **QUIET)
    for out in (tmp_path / "out", tmp_path / "plain"):
        written = [pq.read_table(p) for p in sorted(out.glob("*.parquet"))]
        assert len(written) == 2
        assert written[0].schema.equals(written[1].schema)
        got = pa.concat_tables(written)
        got.validate(full=True)
        expected = source.to_arrow(**QUIET)
        assert got.select(expected.schema.names).equals(expected)
