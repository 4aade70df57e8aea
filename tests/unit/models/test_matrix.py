"""Columns as matrices and frames, and which of them are a model's features."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import numpy_to_array
from headrace.models.matrix import Features, Selection, codes, is_number, is_vector, to_frame, to_matrix

NAN = float("nan")


def matrix(*columns: pa.Array, dtype: str = "float64") -> list[list[float]]:
    return to_matrix(columns, dtype).tolist()


def same(found: np.ndarray, expected: list[list[float]]) -> None:
    np.testing.assert_array_equal(found, np.array(expected))


def test_numbers_of_all_kinds_in_the_order_given() -> None:
    columns = [
        pa.array([1, 2], pa.int8()),
        pa.array([0.5, 1.5], pa.float32()),
        pa.array([True, False]),
        pa.array([Decimal("1.25"), Decimal("-3.50")]),
        pa.array([7, 9]).dictionary_encode(),
        pa.array([2**53, 3], pa.uint64()),
    ]
    assert matrix(*columns) == [[1, 0.5, 1, 1.25, 7, 2.0**53], [2, 1.5, 0, -3.5, 9, 3]]
    assert to_matrix(columns, "float32").flags.c_contiguous


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3]),
        pa.array([1.0, None, 3.0], pa.float32()),
        pa.array([Decimal(1), None, Decimal(3)]),
        pa.array([1, None, 3]).dictionary_encode(),
        pa.array([9.0, 1.0, None, 3.0, 9.0])[1:4],
    ],
)
def test_nulls_are_nan(column: pa.Array) -> None:
    same(to_matrix([column, pa.array([4, 5, 6])], "float32"), [[1, 4], [NAN, 5], [3, 6]])
    same(to_matrix([column]), [[1], [NAN], [3]])


def test_booleans_with_nulls_and_columns_of_nulls() -> None:
    same(to_matrix([pa.array([True, None, False]), pa.nulls(3)]), [[1, NAN], [NAN, NAN], [0, NAN]])


def test_a_column_that_has_the_layout_is_not_copied() -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    column = numpy_to_array(values)
    assert np.shares_memory(to_matrix([column], "float32"), values)
    assert to_matrix([column[2:]], "float32").tolist() == values[2:].tolist()
    assert not to_matrix([column], "float32").flags.writeable
    vector = numpy_to_array(np.arange(3.0))
    assert np.shares_memory(to_matrix([vector]), np.frombuffer(vector.buffers()[1]))


def test_tensors_of_more_dimensions_are_row_major() -> None:
    images = np.arange(24).reshape(2, 3, 4)
    assert to_matrix([numpy_to_array(images)]).tolist() == images.reshape(2, 12).tolist()


@pytest.mark.parametrize("type", [pa.list_(pa.float64()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 2)])
def test_lists_are_the_matrix(type: pa.DataType) -> None:
    column = pa.array([[9, 9], [1, 2], [3, None], None, [5, 6]], type)[1:]
    same(to_matrix([column]), [[1, 2], [3, NAN], [NAN, NAN], [5, 6]])


def test_lists_that_differ_in_length_are_refused() -> None:
    with pytest.raises(DataError, match="'v' differ in length: from 1 to 2"):
        to_matrix([pa.array([[1.0], [1.0, 2.0]])], names=["v"])


def test_nulls_have_no_place_among_integers() -> None:
    with pytest.raises(DataError, match="nulls in column 'b'"):
        to_matrix([pa.array([1, 2]), pa.array([1, None])], "int64", ["a", "b"])
    assert to_matrix([pa.array([2**62 + 1])], "int64")[0, 0] == 2**62 + 1


def test_the_common_dtype_loses_nothing() -> None:
    single = pa.array([0.5], pa.float32())
    assert to_matrix([single, single]).dtype == np.float32
    assert to_matrix([single, pa.array([1])]).dtype == np.float64
    assert to_matrix([numpy_to_array(np.zeros((1, 2), np.float32))]).dtype == np.float32


def test_what_a_float32_can_not_hold_is_infinite() -> None:
    assert to_matrix([pa.array([1e300]), pa.array([1])], "float32")[0, 0] == np.inf


def test_no_rows() -> None:
    assert to_matrix([pa.array([], pa.float64()), pa.array([], pa.bool_())]).shape == (0, 2)


def test_timestamps_and_texts_are_no_numbers() -> None:
    for type in (pa.timestamp("us"), pa.string(), pa.date32(), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.int8())):
        assert not is_number(type)
    assert not is_vector(pa.list_(pa.string()))


SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.float64()), ("t", pa.string()), ("v", pa.list_(pa.float32(), 3))])


def test_features_are_found_by_name_in_the_models_order() -> None:
    features = Features(("b", "a"))
    assert features.columns("M", SCHEMA, ("a", "b")) == ("b", "a")
    assert features.columns("M", SCHEMA, ()) == ("b", "a")
    assert Features(None, 2).columns("M", SCHEMA, ("a", "b")) == ("a", "b")
    assert Features(None, 3).columns("M", SCHEMA, ("v",)) == ("v",)


@pytest.mark.parametrize(
    ("features", "inputs", "match"),
    [
        (Features(("a", "z")), (), "'z', which is not there"),
        (Features(("a", "z")), ("a",), "trained with 'z', which the input lacks"),
        (Features(("a",)), ("a", "b"), "does not know the feature 'b'"),
        (Features(None, 3), ("a", "b"), "trained with 3 features, and the input has 2"),
        (Features(None, 4), ("v",), "trained with 4 features, and a row of 'v' .* has 3"),
        (Features(None, 2), ("a", "t"), "can't use the column 't' of type string"),
        (Features(None, 2), ("a", "v"), "can't use the column 'v'"),
    ],
)
def test_features_that_do_not_fit_are_refused(features: Features, inputs: tuple[str, ...], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        features.columns("M", SCHEMA, inputs)


def test_a_selection_looks_again_when_the_schema_changes() -> None:
    select = Selection(("a",), lambda schema: Features(None, 1).columns("M", schema, ("a",)))
    columns, names = select(pa.table({"a": [1, 2], "b": [3, 4]}))
    assert (columns[0].to_pylist(), names) == ([1, 2], ("a",))
    assert select(pa.array([5]))[0][0].to_pylist() == [5]
    with pytest.raises(DataError, match="'a' of type string"):
        select(pa.table({"a": ["x"]}))


def test_codes_are_the_models_whatever_the_batch_numbers() -> None:
    known = pa.array(["x", "y"])
    texts = pa.array(["y", "new", None, "x"], pa.large_string())
    for column in (texts, texts.dictionary_encode(), pa.array(["y", "new", None, "x"]).dictionary_encode()):
        assert codes(column, known).to_pylist() == [1, None, None, 0]
    assert codes(pa.array([7.0, 5.0]), pa.array([5, 7])).to_pylist() == [1, 0]
    with pytest.raises(DataError, match="are no categories of type int64"):
        codes(pa.array([0.5]), pa.array([5, 7]))


def test_a_frame_is_what_pandas_would_read() -> None:
    columns = [
        pa.array([1, None]),
        pa.array(["x", None]),
        pa.array([Decimal("0.5"), None]),
        pa.array(["k", "k"]).dictionary_encode(),
    ]
    frame = to_frame(columns, ["i", "s", "d", "c"])
    assert [str(frame[c].dtype) for c in ("i", "d", "c")] == ["float64", "float64", "category"]
    assert frame["s"].isna().tolist() == [False, True]
