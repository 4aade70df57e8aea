"""Tensors in Arrow columns: NumPy arrays to columns and back, without a copy where the memory allows it.

Tensors of one shape are `arrow.fixed_shape_tensor` columns. Tensors that differ in shape are `headrace.ragged_tensor`
columns: an extension type over struct{data: large_list<T>, shape: list<int32>}, so that any Arrow or Parquet reader can
still read them. Importing this module registers that type.

Invariants: what comes out of a column is a read-only view of its memory where the layout allows; a NumPy array that goes
in is aliased, not copied, if it is contiguous: the caller must not write to it afterwards. `pa.array` is avoided on the
numeric paths because its first call imports pandas.
"""

# pyright: basic
from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

RAGGED_NAME = "headrace.ragged_tensor"

_ARROW_OF: dict[Any, pa.DataType] = {
    np.dtype(np.int8): pa.int8(),
    np.dtype(np.int16): pa.int16(),
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.int64): pa.int64(),
    np.dtype(np.uint8): pa.uint8(),
    np.dtype(np.uint16): pa.uint16(),
    np.dtype(np.uint32): pa.uint32(),
    np.dtype(np.uint64): pa.uint64(),
    np.dtype(np.float16): pa.float16(),
    np.dtype(np.float32): pa.float32(),
    np.dtype(np.float64): pa.float64(),
}
_NUMPY_OF: dict[int, Any] = {arrow.id: dtype for dtype, arrow in _ARROW_OF.items()}  # hashing a DataType formats it: slow
_BOOL = pa.bool_().id
_MOST_TEXT = (1 << 31) - 1  # bytes in a column of strings, whose offsets are int32


class RaggedTensorType(pa.ExtensionType):
    """Tensors of one element type and any shape, a row each. value_type: numeric or bool."""

    def __init__(self, value_type: pa.DataType) -> None:
        self.value_type = value_type
        storage = pa.struct([("data", pa.large_list(value_type)), ("shape", pa.list_(pa.int32()))])
        super().__init__(storage, RAGGED_NAME)

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> RaggedTensorType:
        return cls(storage_type.field("data").type.value_type)

    def __reduce__(self) -> Any:
        return ragged_type, (self.value_type,)


def _register() -> None:
    try:
        pa.register_extension_type(RaggedTensorType(pa.uint8()))
    except pa.ArrowKeyError:  # the module was imported anew in a process that knows the type
        pa.unregister_extension_type(RAGGED_NAME)
        pa.register_extension_type(RaggedTensorType(pa.uint8()))


_register()


def ragged_type(value_type: pa.DataType) -> RaggedTensorType:
    """The column type of tensors that differ in shape."""
    return RaggedTensorType(value_type)


def is_ragged(type: pa.DataType) -> bool:
    return isinstance(type, RaggedTensorType)


def is_tensor(type: pa.DataType) -> bool:
    """Whether it is a fixed-shape tensor type."""
    return isinstance(type, pa.FixedShapeTensorType)


def numpy_dtype(type: pa.DataType) -> Any:
    """The dtype whose memory layout is that of a null-free column of `type`, or None: nothing to convert between them."""
    found = _NUMPY_OF.get(type.id)
    if found is None and isinstance(type, pa.TimestampType):
        return np.dtype(f"M8[{type.unit}]")
    if found is None and isinstance(type, pa.DurationType):
        return np.dtype(f"m8[{type.unit}]")
    return found


def arrow_type(dtype: Any) -> pa.DataType | None:
    """The element type of a column made from arrays of `dtype`, None if it takes more than reinterpreting the memory."""
    return _ARROW_OF.get(dtype)


def numpy_to_array(values: np.ndarray[Any, Any]) -> pa.Array:
    """A column of `len(values)` rows; one row is `values[i]`. More than one dimension makes a fixed-shape tensor column.

    Zero-copy for contiguous numbers. Raises TypeError for a dtype that has no column type.
    """
    if values.ndim == 0:
        raise TypeError("a single number is no column: one value a row is needed")
    if values.ndim == 1:
        return _vector(values)
    rows, shape = values.shape[0], values.shape[1:]
    size = int(np.prod(shape))
    flat = _vector(values.reshape(rows * size))  # copies once if the memory is not contiguous
    storage = pa.FixedSizeListArray.from_buffers(pa.list_(flat.type, size), rows, [None], children=[flat])
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, shape), storage)


def texts_to_array(values: Sequence[str], large: bool = False) -> pa.Array:
    """A column of strings, or large ones. (`pa.array` imports pandas wherever it is installed, which takes 0.2 s.)

    Raises UnicodeEncodeError for half a surrogate pair, OverflowError for more than a column of strings holds (2 GiB).
    """
    plain = all(map(str.isascii, values))
    encoded = values if plain else [value.encode() for value in values]
    sizes = np.fromiter(map(len, encoded), np.int64, len(values))
    if not large and sizes.sum() > _MOST_TEXT:
        raise OverflowError(f"{sizes.sum():,} bytes of text are more than a column of strings holds")
    data = "".join(values).encode() if plain else b"".join(encoded)  # pyright: ignore[reportArgumentType]
    ends = np.zeros(len(values) + 1, np.int64 if large else np.int32)
    np.cumsum(sizes, out=ends[1:])
    kind = pa.large_string() if large else pa.string()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def text_scalar(value: str) -> pa.Scalar:
    """A large_string. (As `pa.scalar`, which imports pandas, too.)"""
    return texts_to_array([value], large=True)[0]


def _vector(values: np.ndarray[Any, Any]) -> pa.Array:
    kind = _ARROW_OF.get(values.dtype)
    if kind is not None:
        if not values.flags.c_contiguous:
            values = np.ascontiguousarray(values)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
    dtype = values.dtype
    if dtype.kind == "b":
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    if dtype.kind in "iuf" and not dtype.isnative:
        return _vector(values.astype(dtype.newbyteorder("=")))
    if dtype.kind == "T":  # NumPy's variable-width strings
        return pa.array(values.astype(object), type=pa.string())
    if dtype.kind in "fcV" or dtype.hasobject:
        raise TypeError(f"arrays of {dtype} have no column type")
    if dtype.kind == "U" and "pandas" not in sys.modules:
        with contextlib.suppress(OverflowError, UnicodeEncodeError):
            return texts_to_array(values.tolist())
    try:
        values = np.ascontiguousarray(values)
        return pa.array(values.tolist() if dtype.kind in "SU" and _has_inner_nul(values) else values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeError) as exc:
        raise TypeError(f"arrays of {dtype} have no column type: {exc}") from exc


def _has_inner_nul(values: np.ndarray[Any, Any]) -> bool:
    """Whether some text has a NUL with another character behind it: Arrow would cut it there."""
    characters = values.view(np.uint8 if values.dtype.kind == "S" else np.uint32)
    return np.count_nonzero(characters) != np.char.str_len(values).sum()


def tensor_to_numpy(column: pa.Array) -> np.ndarray[Any, Any]:
    """A fixed-shape tensor column as an array (rows, *shape): a read-only view, or object rows where there are nulls."""
    type = column.type
    storage = column.storage
    if column.null_count:
        whole = column.drop_null()
        out = np.empty(len(column), dtype=object)
        out[np.flatnonzero(vector_to_numpy(column.is_valid()))] = _rows(tensor_to_numpy(whole))
        return out
    if type.permutation is not None and list(type.permutation) != list(range(len(type.shape))):
        return column.to_numpy_ndarray()
    return fixed_list_to_numpy(storage).reshape((len(column), *type.shape))


def fixed_list_to_numpy(storage: pa.Array) -> np.ndarray[Any, Any]:
    """A null-free fixed-size list column of numbers as (rows, size): a read-only view where the layout allows."""
    size = storage.type.list_size
    values = storage.values.slice(storage.offset * size, len(storage) * size)
    return vector_to_numpy(values).reshape((len(storage), size))


def vector_to_numpy(column: pa.Array) -> np.ndarray[Any, Any]:
    """A null-free column of numbers, times or bools: a read-only view, except bools, which are unpacked."""
    rows = len(column)
    if column.type.id == _BOOL and not column.null_count:
        if rows == 0:
            return np.empty(0, dtype=np.bool_)
        bits = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset >> 3 :]
        start = column.offset & 7
        return np.unpackbits(bits, count=start + rows, bitorder="little")[start:].view(np.bool_)
    dtype = numpy_dtype(column.type)
    if dtype is None or column.null_count:
        return column.to_numpy(zero_copy_only=False)
    if rows == 0:
        return np.empty(0, dtype=dtype)
    view = np.frombuffer(column.buffers()[1], dtype, rows, column.offset * dtype.itemsize)
    view.flags.writeable = False
    return view


def ragged_to_array(rows: Sequence[np.ndarray[Any, Any] | None], value_type: pa.DataType | None = None) -> pa.Array:
    """A ragged tensor column of these arrays. value_type: None takes the rows' common dtype. Copies the data once."""
    present = [np.asarray(r) for r in rows if r is not None]
    if value_type is None:
        dtype = np.result_type(*(r.dtype for r in present)) if present else np.dtype(np.float64)
    else:
        dtype = np.dtype(np.bool_) if value_type == pa.bool_() else _NUMPY_OF[value_type.id]
    flat = np.concatenate([r.reshape(-1) for r in present]) if present else np.empty(0, dtype)
    data = _vector(flat.astype(dtype, copy=False))
    made = iter(present)
    shapes = [next(made).shape if r is not None else () for r in rows]
    sizes = [int(np.prod(s)) if r is not None else 0 for r, s in zip(rows, shapes, strict=True)]
    dims = np.array([d for s in shapes for d in s], dtype=np.int32)
    offsets = _vector(_offsets(sizes, np.int64))
    shape_offsets = _vector(_offsets([len(s) for s in shapes], np.int32))
    validity = None if len(present) == len(rows) else np.array([r is not None for r in rows])
    mask = None if validity is None else _vector(~validity)
    storage = pa.StructArray.from_arrays(
        [pa.LargeListArray.from_arrays(offsets, data), pa.ListArray.from_arrays(shape_offsets, _vector(dims))],
        fields=list(ragged_type(data.type).storage_type),
        mask=mask,
    )
    return pa.ExtensionArray.from_storage(ragged_type(data.type), storage)


def ragged_to_numpy(column: pa.Array) -> np.ndarray[Any, Any]:
    """An object array of arrays, each a read-only view of the column's memory; None where the row is null."""
    storage = column.storage
    data, shapes = storage.field("data"), storage.field("shape")  # unlike flatten(), these ignore the struct's nulls
    values = vector_to_numpy(data.values)
    values.flags.writeable = False  # bools are unpacked, but their rows are to be like the others
    starts = np.frombuffer(data.buffers()[1], np.int64)[data.offset : data.offset + len(data) + 1].tolist()
    dims = vector_to_numpy(shapes.values).tolist()
    bounds = np.frombuffer(shapes.buffers()[1], np.int32)[shapes.offset : shapes.offset + len(shapes) + 1].tolist()
    valid = None if not storage.null_count else vector_to_numpy(storage.is_valid())
    out = np.empty(len(column), dtype=object)
    for i in range(len(column)):
        if valid is None or valid[i]:
            out[i] = values[starts[i] : starts[i + 1]].reshape(dims[bounds[i] : bounds[i + 1]])
    return out


def tensors_meet(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type of a column that holds tensors of both types, of which at least one is a tensor type; None if there is none.
    Vectors that differ in length are lists, other tensors that differ in shape are ragged ones; their numbers are as
    `promoted` says.
    """
    kinds = [_tensor_kind(t) for t in (a, b)]
    value = None if None in kinds else promoted(a.value_type, b.value_type)
    if value is None:
        return None
    a, b = _with_elements(a, value), _with_elements(b, value)
    if a.equals(b) or is_ragged(a):
        return a
    if is_ragged(b) or "tensor" in kinds:
        return ragged_type(a.value_type)
    return next((t for t in (a, b) if pa.types.is_list(t)), pa.list_(a.value_type))


def promoted(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that Arrow brings both to: of numbers a wider one, floats where one is; None if there is none."""
    if a.equals(b):
        return a
    try:
        both = pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    return both.field(0).type


def _with_elements(type: pa.DataType, value: pa.DataType) -> pa.DataType:
    """The same type of tensors or lists, but of elements of type `value`."""
    if type.value_type.equals(value):
        return type
    if is_ragged(type):
        return ragged_type(value)
    if is_tensor(type):
        return pa.fixed_shape_tensor(value, type.shape, dim_names=type.dim_names, permutation=type.permutation)
    return pa.list_(value)


def _tensor_kind(type: pa.DataType) -> str | None:
    if is_ragged(type) or (is_tensor(type) and len(type.shape) != 1):
        return "tensor"
    if is_tensor(type):
        return "vector"
    return "list" if pa.types.is_list(type) and (type.value_type.id in _NUMPY_OF or type.value_type.id == _BOOL) else None


def tensors_brought(column: pa.Array, type: pa.DataType) -> pa.Array:
    """The column as a type that `tensors_meet` found for its own. Raises ArrowInvalid for a list with a null in it, and for a
    number that has no equal among the wider ones.
    """
    wide = _with_elements(column.type, type.value_type)
    if isinstance(wide, pa.BaseExtensionType):
        column = pa.ExtensionArray.from_storage(wide, column.storage.cast(wide.storage_type))
    else:
        column = column.cast(wide)
    if wide.equals(type):
        return column
    if is_tensor(column.type):
        return fixed_to_ragged(column) if is_ragged(type) else column.storage.cast(type)
    vectors = [values.values for values in column]
    if any(vector is not None and vector.null_count for vector in vectors):
        raise pa.ArrowInvalid("a list that holds nulls is no tensor")
    return ragged_to_array([None if vector is None else vector_to_numpy(vector) for vector in vectors], type.value_type)


def fixed_to_ragged(column: pa.Array) -> pa.Array:
    """The same tensors as a ragged column, for columns whose shapes turn out to differ from block to block."""
    return ragged_to_array(list(tensor_to_numpy(column)), column.type.value_type)


def _offsets(sizes: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    out = np.zeros(len(sizes) + 1, dtype=dtype)
    np.cumsum(np.asarray(sizes, dtype=dtype), out=out[1:])
    return out


def _rows(tensors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The tensors as an object array, a row each."""
    out = np.empty(len(tensors), dtype=object)
    for i, tensor in enumerate(tensors):
        out[i] = tensor
    return out
