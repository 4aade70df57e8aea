"""Values that functions give back unchanged come out as they went in, of any type, even those that Python can't hold."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import UserCodeError
from headrace.worker.formats import NumpyReader

QUIET: dict[str, Any] = {"engine": "inline", "progress": "quiet", "fresh": True}
MAP = pa.map_(pa.string(), pa.int32())
NOON_AND_1_NS = 43_200_000_000_001
YEAR_10000 = 253_402_300_800_000_000
NOT_UTF8 = pa.array([b"\xff", b"a", None]).view(pa.string())

EVERY: dict[str, pa.Array] = {
    "int16": pa.array([1, None, 3], pa.int16()),
    "float16": pa.array([1.5, None, 2], pa.float16()),
    "float32": pa.array([0.1, None, 2], pa.float32()),
    "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal(2)], pa.decimal128(10, 2)),
    "large string": pa.array(["a", None, "b"], pa.large_string()),
    "dictionary": pa.array(["a", None, "a"]).dictionary_encode(),
    "fixed bytes": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "not utf-8": NOT_UTF8,
    "timestamp": pa.array([1_700_000_000_123_456_789, None, 1], pa.timestamp("ns")),
    "zoned": pa.array([1_700_000_000_123_456_789, None, 1], pa.timestamp("ns", "Europe/Berlin")),
    "far timestamp": pa.array([YEAR_10000, None, 1], pa.timestamp("us")),
    "far date": pa.array([10**7, None, 1], pa.date32()),
    "duration": pa.array([1_000_000_001, None, 1], pa.duration("ns")),
    "time": pa.array([NOON_AND_1_NS, None, 1000], pa.time64("ns")),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int16())),
    "floats": pa.array([[0.1, None], None, []], pa.list_(pa.float32())),
    "fixed list": pa.array([[0.1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)),
    "timestamps": pa.array([[1_700_000_000_123_456_789], None, [1]], pa.list_(pa.timestamp("ns"))),
    "times": pa.array([[NOON_AND_1_NS, 1000], None, [1000]], pa.list_(pa.time64("ns"))),
    "lists": pa.array([[[2**60 + 1], [None]], None, [None, []]], pa.list_(pa.list_(pa.int64()))),
    "fixed lists": pa.array([[[2**60 + 1, None]], None, []], pa.list_(pa.list_(pa.int64(), 2))),
    "struct": pa.array(
        [{"t": 1, "f": 0.1}, None, {"t": None, "f": 2}], pa.struct([("t", pa.duration("ns")), ("f", pa.float32())])
    ),
    "map": pa.array([[("a", 1)], None, []], MAP),
    "map in struct": pa.array([{"m": [("a", 1)]}, None, {"m": None}], pa.struct([("m", MAP)])),
    "map in list": pa.array([[[("a", 1)], None], None, []], pa.list_(MAP)),
}

Run = Callable[..., pa.Table]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """What a verb with a function makes of these columns."""

    def write(columns: dict[str, pa.Array], verb: str, fn: Any, **options: Any) -> pa.Table:
        pq.write_table(pa.table(columns), tmp_path / "in.parquet")
        ds = getattr(hr.read_parquet(tmp_path / "in.parquet"), verb)(fn)
        ds.write_parquet(tmp_path / "out", **QUIET, **options)
        return pq.read_table(tmp_path / "out")

    return write


def more(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "y": 1}


def twice(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row, {**row}]


def same(made: pa.Table, given: pa.Array, name: str = "x") -> bool:
    column = made[name].combine_chunks()
    return column.type.equals(given.type) and column.equals(given)


@pytest.mark.parametrize("kind", EVERY)
def test_rows_given_back(run: Run, kind: str) -> None:
    column = EVERY[kind]
    assert same(run({"x": column}, "map", more), column)
    assert same(run({"x": column}, "flat_map", twice), column.take(pa.array([0, 0, 1, 1, 2, 2])))
    assert same(run({"x": column}, "map", more, on_error="quarantine"), column)


@pytest.mark.parametrize("kind", EVERY)
def test_rows_among_others_that_change(run: Run, kind: str) -> None:
    column = EVERY[kind]
    made = run({"i": pa.array([0, 1, 2]), "x": column}, "map", lambda r: {"x": None if r["i"] == 2 else r["x"]})
    assert same(made, pa.concat_arrays([column.slice(0, 2), pa.nulls(1, column.type)]))


@pytest.mark.parametrize("kind", ["timestamp", "duration", "time", "timestamps", "far timestamp"])
def test_rows_under_another_name(run: Run, kind: str) -> None:
    column = EVERY[kind]
    made = run({"x": column}, "map", lambda r: {"y": r["x"]})
    assert same(made, column, "y")


@pytest.mark.parametrize("kind", [k for k in EVERY if k != "float16"])
@pytest.mark.parametrize("batch_format", ["numpy", "pandas"])
def test_columns_that_a_function_of_batches_does_not_touch(tmp_path: Path, kind: str, batch_format: Any) -> None:
    pq.write_table(pa.table({"n": [1, 2, 3], "x": EVERY[kind]}), tmp_path / "in.parquet")
    ds = hr.read_parquet(tmp_path / "in.parquet")
    ds.map_batches(lambda b: {"n": b["n"]}, batch_format=batch_format).write_parquet(tmp_path / "out", **QUIET)
    assert pq.read_table(tmp_path / "out").to_pydict() == {"n": [1, 2, 3]}


@pytest.mark.parametrize("kind", EVERY)
def test_batches_given_back(run: Run, kind: str) -> None:
    column = EVERY[kind]
    assert same(run({"x": column}, "map_batches", lambda b: b), column)
    assert same(run({"x": column}, "map_batches", lambda b: {**b, "y": b["x"]}), column, "y")


def test_lists_with_nulls_in_some_batches() -> None:
    column = pa.array([[[1]]] * 2000 + [[[2**60 + 1], [None]]], pa.list_(pa.list_(pa.int64())))
    ds = hr.from_arrow(pa.table({"x": column})).map_batches(lambda b: {**b, "y": b["x"]}, batch_size=1000)
    assert same(ds.to_arrow(progress="quiet"), column)


@pytest.mark.parametrize("kind", ["map", "map in struct", "map in list", "time", "times", "far date", "not utf-8"])
def test_copied_arrays(run: Run, kind: str) -> None:
    column = EVERY[kind]
    assert same(run({"x": column}, "map_batches", lambda b: {"x": b["x"].copy()}), column)


def test_values_changed_in_place_are_seen(run: Run) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        row["m"]["m"].append(("b", 2))
        row["l"].append(7)
        return row

    made = run({"l": pa.array([[1]], pa.list_(pa.int16())), "m": EVERY["map in struct"].slice(0, 1)}, "map", change)
    assert made.to_pydict() == {"l": [[1, 7]], "m": [{"m": [("a", 1), ("b", 2)]}]}
    assert made["l"].type.equals(pa.list_(pa.int16()))


def test_lists_changed_in_place_are_seen(run: Run) -> None:
    def change(batch: dict[str, Any]) -> dict[str, Any]:
        batch["x"][0][0][0] = "c"
        return batch

    made = run({"x": pa.array([[["a", None]], [["b"]]])}, "map_batches", change)
    assert made["x"].to_pylist() == [[["c", None]], [["c"]]]


def test_kinds_that_change_inside_a_map(run: Run) -> None:
    made = run({"x": EVERY["map in struct"]}, "map", lambda r: {"x": {"m": [("k", 0.5)]}})
    assert made["x"].to_pylist() == [{"m": [("k", 0.5)]}] * 3


FAR = {"x": EVERY["far timestamp"], "i": pa.array([1, 2, 3])}


def year(row: dict[str, Any]) -> dict[str, Any]:
    return {"i": row["i"], "year": row["x"] and row["x"].year}


def test_what_python_can_not_hold_fails_where_it_is_looked_at(run: Run) -> None:
    with pytest.raises(UserCodeError, match=r"TimestampScalar.*has no attribute 'year'") as caught:
        run(FAR, "map", year)
    assert dict(caught.value.where)["row"].startswith("0 of ")


def test_what_python_can_not_hold_is_set_aside(run: Run, tmp_path: Path) -> None:
    assert run(FAR, "map", year, on_error="quarantine")["i"].to_pylist() == [2, 3]
    (aside,) = (tmp_path / "out" / "_headrace").rglob("quarantine/*.parquet")
    assert pq.read_table(aside)["i"].to_pylist() == [1]


def test_times_of_day_are_what_python_can_hold(run: Run) -> None:
    made = run({"x": EVERY["time"]}, "map", lambda r: {"kind": type(r["x"]).__name__})
    assert made["kind"].to_pylist() == ["Time64Scalar", "NoneType", "time"]
    made = run({"x": EVERY["time"].slice(2)}, "map", lambda r: {"x": datetime.time(1, 2, 3, 4)})
    assert same(made, pa.array([datetime.time(1, 2, 3, 4)], pa.time64("ns")))


def test_the_form_of_lists_depends_on_their_own_rows() -> None:
    rows = {"l": pa.array([[1, None], [2, 3], [4, 5]]), "f": pa.array([[1, None], [2, 3], [4, 5]], pa.list_(pa.int64(), 2))}
    found = list(hr.from_arrow(pa.table(rows)).limit(3).iter_batches(batch_size=1, engine="inline", progress="quiet"))
    assert [b["f"].dtype.kind for b in found] == ["O", "i", "i"]
    assert [b["l"][0].dtype.kind for b in found] == ["f", "i", "i"]
    assert [b["l"][0].tolist() for b in found[1:]] == [[2, 3], [4, 5]]


def test_lists_of_no_rows() -> None:
    """Other writers leave their offsets out."""
    empty = pa.ListArray.from_buffers(pa.list_(pa.int64()), 0, [None, None], children=[pa.array([], pa.int64())])
    values, _ = NumpyReader().read(pa.record_batch({"l": empty, "f": pa.array([], pa.list_(pa.int64(), 2))}))
    assert [v.shape for v in values.values()] == [(0,), (0, 2)]


VIEWS: dict[str, pa.Array] = {
    "text": pa.array(["a", None, "a long text that is not in the view"], pa.string_view()),
    "bytes": pa.array([b"a", None, b""], pa.binary_view()),
    "list": pa.array([["a"], None, []], pa.list_(pa.string_view())),
    "struct": pa.array([{"t": "a"}, None, {"t": None}], pa.struct([("t", pa.string_view())])),
    "map": pa.array([[("a", b"b")], None, []], pa.map_(pa.string_view(), pa.binary_view())),
    "run ends": pc.run_end_encode(pa.array(["a", "a", None])),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("whence", ["table", "file", "function"])
def test_columns_of_views_are_like_any_other(tmp_path: Path, kind: str, whence: str) -> None:
    table = pa.table({"i": [1, 2, 3], "x": VIEWS[kind]})
    ds = hr.from_arrow(table)
    if whence == "file":
        if kind == "run ends":
            pytest.skip("Parquet has none")
        pq.write_table(table, tmp_path / "in.parquet")
        ds = hr.read_parquet(tmp_path / "in.parquet")
    elif whence == "function":
        ds = hr.range(3).map_batches(lambda b: table.slice(b["id"][0], len(b["id"])), batch_format="numpy")
    shown = VIEWS[kind].to_pylist()
    quiet = {"engine": "inline", "progress": "quiet"}
    assert ds.filter(lambda row: row["i"] > 1).to_arrow(**quiet)["x"].to_pylist() == shown[1:]
    assert ds.filter(pc.field("i") > 1).to_arrow(**quiet)["x"].to_pylist() == shown[1:]
    assert ds.flat_map(lambda row: [row, row]).to_arrow(**quiet)["x"].to_pylist() == [v for v in shown for _ in (1, 2)]
    if kind in ("text", "run ends"):
        ds.filter(~pc.field("x").is_null()).evaluate(mean=hr.metrics.Mean("i", by="x")).run(**quiet)
