"""Arrow to the formats of user code and back: values, types, and which memory is shared."""

from __future__ import annotations

import datetime
import decimal
import math
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import headrace as hr
from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import (
    is_ragged,
    numpy_to_array,
    ragged_to_array,
    ragged_to_numpy,
    ragged_type,
    tensor_to_numpy,
)
from headrace.worker import python_values
from headrace.worker.casting import cast_batch, concat
from headrace.worker.formats import Given, NumpyReader, read_rows, to_format, to_pandas, to_rows, to_torch
from headrace.worker.refused import Refused
from headrace.worker.results import batch_of, call, column_of, rows_batch, values_column

NOTHING = Given(pa.schema([]))
TWO_HOURS = datetime.timezone(datetime.timedelta(hours=2))


def arrays(**columns):
    return NumpyReader().read(pa.record_batch(columns))[0]


def back(**columns):
    return batch_of(columns, NOTHING, False)


# --- to NumPy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u4", "i8", "f2", "f4", "f8", "M8[us]", "m8[ns]"])
def test_numbers_are_views_at_any_offset(dtype):
    column = pa.array(np.arange(10).astype(dtype))
    for part in (column, column.slice(3, 4), column.slice(10)):
        (value,) = arrays(x=part).values()
        assert value.dtype == np.dtype(dtype)
        assert value.tolist() == np.arange(10).astype(dtype)[part.offset : part.offset + len(part)].tolist()
        assert not value.flags.writeable
    assert arrays(x=column)["x"].ctypes.data == column.buffers()[1].address


def test_what_has_nulls_or_is_no_number():
    out = arrays(
        i=pa.array([1, None]),
        b=pa.array([True, None]),
        t=pa.array([datetime.datetime(2024, 1, 1), None], pa.timestamp("us", "UTC")),
        s=pa.array(["a", None]),
        raw=pa.array([b"a", None]),
        d=pa.array([decimal.Decimal("1.5"), None]),
        o=pa.array([{"k": 1}, None]),
        cat=pa.array(["u", "u"]).dictionary_encode(),
        null=pa.nulls(2),
    )
    assert out["i"].dtype == np.float64
    assert np.isnan(out["i"][1])
    assert np.isnat(out["t"][1])
    rest = {k: v.tolist() for k, v in out.items() if k not in ("i", "t")}
    assert rest == {
        "b": [True, None],
        "s": ["a", None],
        "raw": [b"a", None],
        "d": [decimal.Decimal("1.5"), None],
        "o": [{"k": 1}, None],
        "cat": ["u", "u"],
        "null": [None, None],
    }


def test_bools_are_unpacked_at_any_offset():
    column = pa.array([k % 3 == 0 for k in range(30)])
    for start in (0, 1, 8, 13, 30):
        assert arrays(b=column.slice(start))["b"].tolist() == column.slice(start).to_pylist()


def test_lists_are_arrays_a_row_and_fixed_lists_a_matrix():
    out = arrays(v=pa.array([[1, 2], [3], None]), f=pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float64(), 2)))
    assert [None if r is None else r.tolist() for r in out["v"]] == [[1, 2], [3], None]
    assert out["f"].shape == (3, 2)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3), (4, 0), (0, 5), (4, 1)])
@pytest.mark.parametrize("dtype", ["u1", "f4", "?"])
def test_tensors_there_and_back(shape, dtype):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    column = numpy_to_array(values)
    assert np.array_equal(arrays(t=column)["t"], values)
    assert arrays(t=column)["t"].dtype == values.dtype
    assert np.array_equal(arrays(t=column.slice(1, 2))["t"], values[1:3])
    if values.size and dtype != "?":
        assert arrays(t=column)["t"].ctypes.data == values.ctypes.data


def test_tensors_that_are_not_contiguous_or_native():
    values = np.arange(24).reshape(2, 3, 4)
    for odd in (values.transpose(0, 2, 1), values[:, ::2], values.astype(">i4"), values[::-1]):
        assert np.array_equal(tensor_to_numpy(numpy_to_array(odd)), odd)


@pytest.mark.parametrize("values", [[b"a\0b", b"", b"\0\0c"], ["a\0b", "ü", "\0"], [b"abc"], ["abc", "d"], [b"", b""]])
def test_texts_with_nul_in_them(values):
    for array in (np.array(values), np.array(values * 2)[::2], np.array(values).reshape(-1, 1)):
        rows = arrays(t=numpy_to_array(array))["t"].tolist() if array.ndim == 1 else numpy_to_array(array).storage.to_pylist()
        assert rows == array.tolist()
    lists = [np.array(values), np.array(values * 2)]
    assert column_of(lists).to_pylist() == [array.tolist() for array in lists]


def test_tensors_with_nulls():
    column = pa.concat_arrays([numpy_to_array(np.ones((1, 2))), pa.nulls(1, pa.fixed_shape_tensor(pa.float64(), (2,)))])
    first, second = arrays(t=column)["t"]
    assert first.tolist() == [1.0, 1.0]
    assert second is None


def test_ragged_tensors_there_and_back():
    rows = [np.zeros((2, 3), np.float32), None, np.ones((1, 2), np.float32), np.zeros((0, 4), np.float32)]
    column = ragged_to_array(rows)
    assert column.type == ragged_type(pa.float32())
    for part in (column, column.slice(1), column.slice(2, 1), column.take(pa.array([0, 1, 2, 3])).slice(1)):
        want = rows[len(rows) - len(part) :] if len(part) != 1 else rows[2:3]
        got = ragged_to_numpy(part)
        assert [None if r is None else (r.shape, r.tolist()) for r in got] == [
            None if r is None else (r.shape, r.tolist()) for r in want
        ]
    assert not ragged_to_numpy(column)[0].flags.writeable


def test_ragged_columns_survive_arrow_streams():
    batch = pa.record_batch({"r": ragged_to_array([np.zeros((2, 1)), np.ones((1, 1))])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    read = pa.ipc.open_stream(sink.getvalue()).read_next_batch()
    assert read.schema == batch.schema
    assert [r.shape for r in ragged_to_numpy(read.column(0))] == [(2, 1), (1, 1)]


# --- from user code --------------------------------------------------------------------------------------------------


def test_columns_that_come_back_are_answered_by_themselves():
    batch = pa.record_batch(
        {"t": pa.array([1], pa.timestamp("us", "UTC")), "s": pa.array([None], pa.string()), "l": pa.array([[None]])}
    )
    given_arrays, given = NumpyReader().read(batch)
    made = batch_of({"renamed": given_arrays["t"], **given_arrays}, given, False)
    assert [f.type for f in made.schema] == [batch.schema.field(n).type for n in ("t", "t", "s", "l")]


def test_dicts_in_a_column_may_be_changed():
    batch = pa.record_batch({"o": pa.array([{"k": 1}])})
    values, given = NumpyReader().read(batch)
    values["o"][0]["k"] = 5
    assert batch_of(values, given, False).column("o").to_pylist() == [{"k": 5}]


def test_dicts_that_nobody_changed_keep_their_column():
    batch = pa.record_batch({"o": pa.array([{"k": 1}, None], pa.struct([("k", pa.int8())]))})
    values, given = NumpyReader().read(batch)
    column = given.column_of(values["o"])
    assert column is not None
    assert column.equals(batch.column("o"))
    values["o"][0]["k"] = 5
    assert given.column_of(values["o"]) is None


def test_results_of_all_kinds():
    made = back(
        ints=[1, 2],
        scalars=[np.float32(1), np.float32(2)],
        text=np.array(["a", "b"]),
        objects=np.array(["a", None], dtype=object),
        days=np.array(["2024-01-01", "NaT"], "M8[D]"),
        arrow=pa.chunked_array([[1], [2]]),
        stacked=[np.zeros((2, 2)), np.ones((2, 2))],
        vectors=[np.arange(2), np.arange(3)],
        ragged=[np.zeros((1, 2)), np.zeros((2, 2))],
        mixed=[b"x", None],
    )
    assert made.column("days").to_pylist() == [datetime.date(2024, 1, 1), None]
    assert made.column("scalars").type == pa.float32()
    assert tensor_to_numpy(made.column("stacked")).shape == (2, 2, 2)
    assert made.column("vectors").to_pylist() == [[0, 1], [0, 1, 2]]
    assert is_ragged(made.column("ragged").type)


def test_an_object_array_of_tensors_is_always_ragged():
    values = np.empty(1, dtype=object)
    values[0] = np.zeros((2, 2))
    assert is_ragged(column_of(values).type)


def test_batches_without_rows_or_columns():
    assert back().num_rows == 0
    assert back(x=np.empty((0, 3), np.float32)).schema.field("x").type == pa.fixed_shape_tensor(pa.float32(), (3,))
    assert batch_of(pa.table({"x": pa.array([], pa.int8())}), NOTHING, False).schema == pa.schema([("x", pa.int8())])


@pytest.mark.parametrize("value", [np.zeros(2, "V4"), np.float64(1), {1: 2}, [1, "a"], [object()]])
def test_values_that_make_no_column(value):
    with pytest.raises(Refused):
        back(x=value)


@pytest.mark.parametrize(("a", "b"), [(datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 5)), (b"a", "b"), ("b", b"a")])
def test_kinds_that_arrow_would_mix(a, b):
    for values in ([a, b], [[a], [b, None]], [{"k": a, "n": 1}, None, {"k": b}]):
        with pytest.raises(Refused, match="whose values are some"):
            column_of(values)
        with pytest.raises(PlanError, match="column 'x', whose values are some"):
            hr.from_items([{"x": value} for value in values])
    for values in ([a, None], [[a], None], [{"k": a}, None]):
        assert column_of(values).to_pylist() == values


def test_rows_keep_hints_for_nulls_only_where_there_are_no_values():
    given = Given(pa.schema([("x", pa.int16()), ("y", pa.string())]))
    made = rows_batch([{"x": 70_000, "y": None}], given)
    assert made.schema.types == [pa.int64(), pa.string()]
    assert values_column([]).type == pa.null()


def test_call_tells_whether_a_result_is_still_held():
    kept = np.zeros(1)
    assert call(lambda: np.zeros(1), (), {})[1] is False
    assert call(lambda: kept, (), {})[1] is True


# --- pandas and torch ------------------------------------------------------------------------------------------------


def test_pandas_with_tensors():
    pytest.importorskip("pandas")
    batch = pa.record_batch({"x": [1, 2], "t": numpy_to_array(np.arange(4).reshape(2, 2)), "s": ["a", None]})
    frame = to_pandas(batch)
    assert frame["t"][1].tolist() == [2, 3]
    made = batch_of(frame, Given(batch.schema), False)
    assert made.column("s").to_pylist() == ["a", None]
    assert tensor_to_numpy(made.column("t")).tolist() == [[0, 1], [2, 3]]


def test_torch_shares_memory_and_leaves_what_it_has_no_type_for():
    torch = pytest.importorskip("torch")
    batch = pa.record_batch({"x": np.arange(3.0), "s": ["a", "b", "c"]})
    tensors, _ = to_format(batch, "torch", NumpyReader())
    assert tensors["x"].data_ptr() == batch.column("x").buffers()[1].address
    assert isinstance(tensors["s"], np.ndarray)
    assert to_torch(np.empty((0, 3), np.float32)).shape == (0, 3)
    made = back(x=torch.ones(2, 3, requires_grad=True), b=torch.zeros(2, dtype=torch.bfloat16))
    assert tensor_to_numpy(made.column("x")).shape == (2, 3)
    assert made.column("b").type == pa.float32()


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_python_values():
    batch = pa.record_batch({"b": [b"x"], "o": [{"k": [1]}], "r": ragged_to_array([np.zeros((1, 2))])})
    (row,) = to_rows(batch)
    assert row["b"] == b"x"
    assert row["o"] == {"k": [1]}
    assert row["r"].shape == (1, 2)


PLAIN = {
    "whole": st.integers(-(1 << 63), (1 << 63) - 1),
    "floats": st.floats(),
    "texts": st.text(st.characters(codec="utf-8")),
    "booleans": st.booleans(),
}
PLAIN["lists"] = st.one_of([st.lists(st.none() | kind, max_size=3) for kind in PLAIN.values()])
PLAIN["lists of whole numbers"] = st.lists(PLAIN["whole"], max_size=3)
PLAIN["dicts"] = st.fixed_dictionaries(
    {}, optional={"a": PLAIN["texts"], "b": PLAIN["floats"], "ä": PLAIN["lists of whole numbers"]}
)
PLAIN["lists of dicts"] = st.lists(st.none() | PLAIN["dicts"], max_size=3)


@pytest.mark.parametrize("kind", PLAIN)
@given(data=st.data())
def test_columns_of_one_kind_are_those_of_arrow(kind, data):
    values = data.draw(st.lists(PLAIN[kind] | st.none() if data.draw(st.booleans()) else PLAIN[kind]))
    try:
        expected = pa.array(values)
    except pa.ArrowException:  # lists of unlike values
        reject()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "pandas", raising=False)  # where it is there, texts are Arrow's own
        made = values_column(values)
    made.validate(full=True)
    assert made.type == expected.type
    assert made.null_count == expected.null_count
    assert list(map(repr, made.to_pylist())) == list(map(repr, expected.to_pylist()))  # NaN, -0.0


def test_many_plain_values_are_made_by_arrow(monkeypatch):
    """Quicker than here, once it has imported pandas."""
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    monkeypatch.setattr(python_values, "_made_here", python_values._PANDAS_PAYS + 1)
    monkeypatch.setattr(python_values, "texts_to_array", None)
    assert values_column(["a", None]).to_pylist() == ["a", None]


def test_half_a_surrogate_in_an_array_is_told_as_one_among_rows():
    with pytest.raises(Refused):
        column_of(np.array(["\ud83d"]), None)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, "\ud800"])
def test_what_no_column_holds_is_refused_among_plain_values_too(value, monkeypatch):
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    with pytest.raises(Refused):
        values_column([value, None])


# --- casting ---------------------------------------------------------------------------------------------------------


def test_tensors_of_several_shapes_become_ragged():
    batches = [pa.record_batch({"t": numpy_to_array(np.zeros((1, k, 2)))}) for k in (1, 2, 3)]
    made = concat(batches, "here")
    assert [r.shape for r in ragged_to_numpy(made.column("t"))] == [(1, 2), (2, 2), (3, 2)]


def test_types_with_nothing_in_common():
    with pytest.raises(DataError, match="column 'x'"):
        concat([pa.record_batch({"x": [1]}), pa.record_batch({"x": ["a"]})], "here")
    batch = pa.record_batch({"y": [1], "x": [2]})
    assert cast_batch(batch, pa.schema([("x", pa.int8()), ("y", pa.int64())]), "here").to_pydict() == {"x": [2], "y": [1]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (True, 1),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
        (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime.datetime(2026, 1, 1, 2, tzinfo=TWO_HOURS)),
        ([1], [True]),
        ({"a": 1.0}, {"a": 1}),
    ],
)
def test_a_value_changed_in_place_to_an_equal_one_is_not_given_back(before: Any, after: Any) -> None:
    for column, change in (
        (pa.array([[before], None]), lambda shown: shown[0].__setitem__(0, after)),
        (pa.array([{"x": before}, None]), lambda shown: shown[0].__setitem__("x", after)),
    ):
        rows, given = read_rows(pa.record_batch({"v": column}))
        shown = [row["v"] for row in rows]
        assert given.given_back("v", shown, compare=True) is not None
        change(shown)
        assert given.given_back("v", shown, compare=True) is None


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[math.nan, 1.0], None]),
        pa.array([{"x": -0.0}, {"x": math.nan}]),
        pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1.0, math.nan], [0.0, 2.0]])),
        pa.array([[np.datetime64("2020-01-01T00:00:00.123456789")]]),
    ],
)
def test_values_that_nobody_changed_are_given_back(column: pa.Array) -> None:
    rows, given = read_rows(pa.record_batch({"v": column}))
    assert given.given_back("v", [row["v"] for row in rows], compare=True) is not None


def test_rows_changed_in_place_to_equal_values_of_another_type() -> None:
    def count(row: dict[str, Any]) -> dict[str, Any]:
        row["v"][0] = int(row["v"][0])
        return row

    made = hr.from_arrow(pa.table({"v": [[True], [False]]})).map(count).to_arrow(engine="inline", progress="quiet")
    assert made["v"].type == pa.list_(pa.int64())
    assert made["v"].to_pylist() == [[1], [0]]
