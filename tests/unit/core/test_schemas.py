from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.schemas import Conflict, bring, common, unify
from headrace.core.tensors import numpy_to_array, ragged_to_array, ragged_to_numpy, ragged_type

TYPES = [
    pa.int8(), pa.int64(), pa.uint32(), pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.binary(), pa.bool_(),
    pa.date32(), pa.timestamp("us"), pa.decimal128(10, 2), pa.list_(pa.int64()), pa.list_(pa.float64()), pa.list_(pa.null()),
    pa.struct([("a", pa.int64())]), pa.dictionary(pa.int32(), pa.string()), pa.null(),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), list(itertools.product(TYPES, TYPES)))
def test_common_types_do_not_depend_on_the_order(a: pa.DataType, b: pa.DataType) -> None:
    assert common(a, b) == common(b, a)
    if common(a, b) is not None:
        assert common(common(a, b), a) == common(a, b)


def test_kinds_are_not_mixed() -> None:
    for a, b in ((pa.int64(), pa.string()), (pa.string(), pa.binary()), (pa.int64(), pa.bool_()), (pa.date32(), pa.int32())):
        assert common(a, b) is None
    assert common(pa.decimal128(10, 2), pa.float64()) is None


@pytest.mark.parametrize(
    ("whole", "digits"), [(pa.int8(), 5), (pa.int32(), 12), (pa.uint32(), 12), (pa.int64(), 21), (pa.uint64(), 22)]
)
def test_whole_numbers_fit_into_decimals(whole: pa.DataType, digits: int) -> None:
    some, wide = pa.decimal128(5, 2), pa.decimal128(digits, 2)
    assert common(whole, some) == common(some, whole) == wide
    assert common(pa.large_list(whole), pa.list_(some)) == pa.large_list(wide)
    assert common(pa.map_(pa.int8(), some), pa.map_(pa.int8(), whole)) == pa.map_(pa.int8(), wide)
    struct = pa.struct([("x", pa.int8()), ("d", some)])
    assert common(struct, pa.struct([("d", whole)])).field("d").type == wide
    assert bring(pa.record_batch({"x": pa.array([1], whole)}), pa.schema([("x", wide)])).to_pydict() == {"x": [1]}


def test_columns_stand_where_they_first_appear() -> None:
    a, b = pa.schema([("x", pa.int64()), ("y", pa.null())]), pa.schema([("y", pa.string()), ("z", pa.bool_())])
    assert unify(a, b) == pa.schema([("x", pa.int64()), ("y", pa.string()), ("z", pa.bool_())])
    with pytest.raises(Conflict) as caught:
        unify(a, pa.schema([("x", pa.string())]))
    assert caught.value.name == "x"


def test_what_is_missing_is_null() -> None:
    batch = pa.record_batch({"x": pa.array([1, 2])})
    wide = pa.schema([("x", pa.float64()), ("z", pa.list_(pa.string()))])
    assert bring(batch, wide).to_pylist() == [{"x": 1.0, "z": None}, {"x": 2.0, "z": None}]
    with pytest.raises(pa.ArrowInvalid):
        bring(pa.record_batch({"x": pa.array([(1 << 53) + 1])}), wide)


def test_tensors_of_two_shapes_are_ragged() -> None:
    a = pa.record_batch({"v": numpy_to_array(np.zeros((2, 3)))})
    b = pa.record_batch({"v": numpy_to_array(np.ones((1, 2, 2)))})
    both = unify(a.schema, b.schema)
    assert both.field("v").type == ragged_type(pa.float64())
    assert bring(a, both).num_rows == 2


def test_tensors_of_whole_numbers_become_floats() -> None:
    whole, floats = np.array([[1, 2], [3, 4]]), np.array([[1.5, 2.0]])
    ragged = ragged_to_array([np.ones((1, 2), np.int8), np.ones((2, 2), np.int8)])
    for column, then, becomes in (
        (numpy_to_array(whole), numpy_to_array(floats), pa.fixed_shape_tensor(pa.float64(), (2,))),
        (numpy_to_array(whole), pa.array([[0.5]]), pa.list_(pa.float64())),
        (numpy_to_array(whole[:, None]), ragged_to_array([floats]), ragged_type(pa.float64())),
        (ragged, ragged_to_array([floats.astype(np.float32)]), ragged_type(pa.float32())),
        (pa.array([[1, 2], [3, 4]]), ragged_to_array([floats]), ragged_type(pa.float64())),
    ):
        assert common(column.type, then.type) == common(then.type, column.type) == becomes
        batch = pa.record_batch({"v": column}).slice(1)
        assert bring(batch, pa.schema([("v", becomes)])).num_rows == 1
    assert bring(batch, pa.schema([("v", becomes)])).column("v").storage.to_pylist() == [{"data": [3.0, 4.0], "shape": [2]}]
    with pytest.raises(pa.ArrowInvalid):
        bring(pa.record_batch({"v": numpy_to_array(whole + (1 << 53))}), pa.schema([("v", numpy_to_array(floats).type)]))
    assert common(numpy_to_array(whole).type, numpy_to_array(whole == 1).type) is None


def test_vectors_are_lists_and_all_others_ragged_whatever_comes_first() -> None:
    columns = [
        numpy_to_array(np.ones((2, 3))),
        numpy_to_array(np.ones((1, 0))),
        pa.array([[1.0], None, []]),
        numpy_to_array(np.ones((1, 2, 2))),
        ragged_to_array([np.ones((1, 2)), None]),
        pa.nulls(1),
    ]
    for a, b, c in itertools.product((pa.schema([("v", column.type)]) for column in columns), repeat=3):
        assert unify(unify(a, b), c) == unify(a, unify(b, c))
    vectors, tensors = pa.schema([("v", pa.list_(pa.float64()))]), pa.schema([("v", ragged_type(pa.float64()))])
    assert unify(unify(*(pa.schema([("v", column.type)]) for column in columns[:2])), vectors) == vectors
    for column in columns[:3]:
        assert bring(pa.record_batch({"v": column}), vectors).column(0).to_pylist() == column.to_pylist()
        rows = ragged_to_numpy(bring(pa.record_batch({"v": column}), tensors).column(0))
        assert [None if row is None else row.tolist() for row in rows] == column.to_pylist()
    with pytest.raises(pa.ArrowInvalid, match="nulls"):
        bring(pa.record_batch({"v": pa.array([[1.0, None]])}), tensors)
