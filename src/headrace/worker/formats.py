"""Batches as user code sees them: Arrow to NumPy, pandas, torch, Arrow tables, and rows of Python values.

The way back is `results`. What NumPy users get, by column type:

| column | array |
|---|---|
| numbers, timestamps, durations without nulls | a read-only view of the column's memory |
| fixed-shape tensors, fixed-size lists of numbers | a read-only view (rows, *shape) |
| bools | unpacked, bool |
| integers with nulls | float64, NaN for null; floats likewise; timestamps NaT; bools become objects |
| strings, binary, decimals, dates and times with nulls, structs | objects (str, bytes, Decimal, dict), None for null |
| lists, ragged tensors | objects, one array a row |
| what Python has no exact value for (`python_values`) | objects, the Arrow scalar |

Invariants: arrays handed out are read-only, because other code may be reading the same memory; nothing is converted for
a column that was not asked for; no optional library is imported unless its format is used.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import itertools
import json
import operator
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.tensors import (
    fixed_list_to_numpy,
    is_ragged,
    is_tensor,
    numpy_dtype,
    numpy_to_array,
    ragged_to_numpy,
    tensor_to_numpy,
    vector_to_numpy,
)
from headrace.plan.nodes import BatchFormat
from headrace.worker.python_values import UNSHOWN, python_values

# dtype if its memory can be looked at as it is, and the item size; conversion; may be answered by identity
_How = tuple[Any, int, Callable[[pa.Array], np.ndarray], bool]

ROW_CHUNK = 1024  # rows turned into Python objects at a time
ROW_CHUNK_BYTES = 16 << 20
SHARED_BYTES = 64 << 20  # of columns that are held for other models
# Making an object of a text takes 50 ns with the interpreter lock; numbering it 15 ns without, finding it another 10 with.
REPEATED_ROWS = 2048
REPEATED_SHARE = 0.9  # distinct texts in so many rows: some 10,000 in all then, where they come in any order


class Given:
    """What user code was given: its arrays, and the columns that they came from.

    An array that comes back as it was given is answered by its column, without conversion and with its very type.
    batch: what it was all made of.
    """

    __slots__ = ("_addresses", "_batch", "_immutable", "_places", "_values", "schema")

    def __init__(
        self,
        schema: pa.Schema,
        values: Sequence[np.ndarray] = (),
        immutable: Sequence[bool] = (),
        batch: pa.RecordBatch | None = None,
    ) -> None:
        """values: the batch's columns, in their order. immutable: may a value be answered by its column?"""
        self.schema = schema
        self._batch = batch
        self._addresses: frozenset[int] | None = None
        self._values = values  # kept, so that no other array can have the id of one of them
        self._immutable = immutable
        self._places: dict[int, int] | None = None

    def column_of(self, value: Any) -> pa.Array | None:
        place = self._place(value)
        if place is None or self._batch is None:
            return None
        column = self._batch.column(place)
        return column if self._immutable[place] or _holds_the_same(value, column) else None

    def place_of(self, value: Any) -> int | None:
        """The place of the column whose array this is, if nobody can have changed it."""
        place = self._place(value)
        return place if place is not None and self._immutable[place] else None

    def is_at(self, place: int, value: Any) -> bool:
        """Is this the array of that column?"""
        return self._values[place] is value

    def _place(self, value: Any) -> int | None:
        if self._places is None:
            self._places = {id(v): i for i, v in enumerate(self._values)}
        return self._places.get(id(value))

    def unchanged(self, result: Any) -> tuple[str, ...]:
        """The columns that came back as they were given, by the same name."""
        if not isinstance(result, dict) or not self._values:
            return ()
        given = zip(self.schema.names, self._values, self._immutable, strict=True)
        return tuple(name for name, value, immutable in given if immutable and result.get(name) is value)

    def given_back(self, name: str, values: Sequence[Any], *, compare: bool = False) -> pa.Array | None:
        """The column `name`, if these values of rows are its own, each in its place. compare: even if they could be changed
        inside, when a look shows that they were not.
        """
        return None

    def at(self, rows: Sequence[int]) -> Given:
        """What values of rows are of which only these are looked at."""
        return self

    def holds(self, addresses: Sequence[int]) -> bool:
        """Whether the input's own buffers begin at these addresses, all of them."""
        if self._addresses is None:
            columns = () if self._batch is None else self._batch.columns
            self._addresses = frozenset(b.address for c in columns for b in c.buffers() if b is not None)
        return self._addresses.issuperset(addresses)

    def type_of(self, name: str) -> pa.DataType | None:
        """The type that column `name` had, if there was one of that name."""
        index = self.schema.get_field_index(name)
        return None if index < 0 else self.schema.field(index).type


def _holds_the_same(values: np.ndarray, column: pa.Array) -> bool:
    """Objects that may have been changed in place. (Making a column of them would import pandas, which takes 0.1 s.)"""
    try:
        if _only_lists(column.type):
            return all(map(_is_same, values, _converter(column.type)(column)))
        shown = python_values(column)
        return values.tolist() == shown or all(map(_is_same, values, shown))  # to the latter, NaN is NaN
    except Exception:  # of arrays, or of what the user's code put there
        return False


class NumpyReader:
    """Turns batches of one operator into arrays; remembers how for the last schema seen. shared: what others have converted."""

    def __init__(self, shared: SharedArrays | None = None) -> None:
        self._shared = shared
        self._schema: pa.Schema | None = None
        self._names: list[str] = []
        self._how: list[_How] = []
        self._immutable: list[bool] = []
        self._whole: pa.RecordBatch | None = None
        self._ready: list[np.ndarray | None] = []

    def ahead(self, whole: pa.RecordBatch | None) -> None:
        """The batches to come are slices of these rows: their columns are looked at once. None: no more of them."""
        self._whole = whole
        self._ready = []
        if whole is not None:
            self._learn(whole.schema)
            self._ready = [_whole_column(column, how) for column, how in zip(whole.columns, self._how, strict=True)]

    def read(
        self, batch: pa.RecordBatch, whole: pa.RecordBatch | None = None, at: int = 0
    ) -> tuple[dict[str, np.ndarray], Given]:
        """whole: what the batch is a slice of, from row `at` on; only if it is what was announced does that matter."""
        self._learn(batch.schema)
        rows = batch.num_rows
        ready = self._ready if whole is not None and whole is self._whole else ()
        values: list[np.ndarray] = []
        for i, how in enumerate(self._how):
            known = ready[i] if ready else None
            values.append(self._converted(batch.column(i), how) if known is None else known[at : at + rows])
        return dict(zip(self._names, values, strict=True)), Given(batch.schema, values, self._immutable, batch)

    def _learn(self, schema: pa.Schema) -> None:
        if self._schema is None or not schema.equals(self._schema):
            self._schema = schema
            self._names = schema.names
            self._how = [_how(field) for field in schema]
            self._immutable = [how[3] for how in self._how]

    def _converted(self, column: pa.Array, how: _How) -> np.ndarray:
        value = _look(column, how)
        if value is None:
            found = None if self._shared is None else self._shared.find(column)
            value = how[2](column) if found is None else found
        value.setflags(write=False)
        return value


def _look(column: pa.Array, how: _How) -> np.ndarray | None:
    """Numbers without nulls, where they lie."""
    dtype, width, _, _ = how
    if dtype is None or not len(column) or column.null_count:
        return None
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * width)


def _whole_column(column: pa.Array, how: _How) -> np.ndarray | None:
    """A column whose slices are slices of this array, which takes little memory of its own. None: it is better converted
    slice by slice.
    """
    value = _look(column, how)
    if value is None:
        if not _is_text(column.type) or len(column) < REPEATED_ROWS:
            return None
        if len(column.slice(0, REPEATED_ROWS).unique()) > REPEATED_SHARE * REPEATED_ROWS:
            return None
        value = _few_texts(column)
    value.setflags(write=False)
    return value


def _few_texts(column: pa.Array) -> np.ndarray:
    """Strings or bytes as an object array, in which equal ones are one object."""
    encoded: Any = column.dictionary_encode()
    codes = encoded.indices.fill_null(-1) if encoded.null_count else encoded.indices
    texts = np.empty(len(encoded.dictionary) + 1, dtype=object)  # the last one is None
    texts[:-1] = python_values(encoded.dictionary)
    return texts.take(vector_to_numpy(codes))


class SharedArrays:
    """Columns as arrays, for models that read the same rows; those alone whose conversion costs something, and whose values
    nobody can change: texts, bytes, booleans, plain values with nulls.

    Found by where a column's memory lies, which is held: `clear` it when the rows are done with. Of many, the newest are kept.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[Any, ...], tuple[pa.Array, np.ndarray]] = OrderedDict()
        self._bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Convert the columns that are not there yet."""
        for column in batch.columns:
            if not _is_shareable(column) or self.find(column) is not None:
                continue
            values = _converter(column.type)(column)
            values.setflags(write=False)
            replaced = self._found.pop(_memory_of(column), None)
            self._bytes -= 0 if replaced is None else replaced[0].nbytes
            self._found[_memory_of(column)] = column, values
            self._bytes += column.nbytes
            while self._bytes > SHARED_BYTES and len(self._found) > 1:
                _, (old, _) = self._found.popitem(last=False)
                self._bytes -= old.nbytes

    def find(self, column: pa.Array) -> np.ndarray | None:
        """The rows of this column; None when no column that holds them was converted."""
        kept = self._found.get(_memory_of(column)) if self._found else None
        if kept is None or (bool(column.null_count) != bool(kept[0].null_count) and not _is_text(column.type)):
            return None  # without nulls the array is of another dtype
        start = column.offset - kept[0].offset
        return kept[1][start : start + len(column)] if 0 <= start <= len(kept[0]) - len(column) else None

    def clear(self) -> None:
        self._found.clear()
        self._bytes = 0


def _memory_of(column: pa.Array) -> tuple[Any, ...]:
    return column.type, *(None if b is None else b.address for b in column.buffers())


def _is_shareable(column: pa.Array) -> bool:
    type = column.type
    if pa.types.is_nested(type) or pa.types.is_dictionary(type) or isinstance(type, pa.BaseExtensionType):
        return False
    return bool(column.null_count) or numpy_dtype(type) is None


def _how(field: pa.Field) -> _How:
    dtype = numpy_dtype(field.type)
    immutable = not _has_dicts(field.type)  # a dict inside the array may be changed without the array being another
    return dtype, 0 if dtype is None else dtype.itemsize, _converter(field.type), immutable


def _has_dicts(type: pa.DataType) -> bool:
    if is_tensor(type) or is_ragged(type):
        return False
    if pa.types.is_struct(type) or pa.types.is_map(type) or pa.types.is_union(type):
        return True
    if isinstance(type, pa.BaseExtensionType):
        return _has_dicts(type.storage_type)
    if pa.types.is_nested(type):
        return any(_has_dicts(type.field(i).type) or pa.types.is_nested(type.field(i).type) for i in range(type.num_fields))
    return False


def _converter(type: pa.DataType) -> Callable[[pa.Array], np.ndarray]:
    if is_tensor(type):
        return tensor_to_numpy
    if is_ragged(type):
        return ragged_to_numpy
    if isinstance(type, pa.FixedSizeListType) and numpy_dtype(type.value_type) is not None:
        return lambda c: _plain(c) if c.null_count or _own_values(c).null_count else fixed_list_to_numpy(c)
    if isinstance(type, pa.BaseExtensionType):
        inner = _converter(type.storage_type)
        return lambda c: inner(c.storage)
    if pa.types.is_boolean(type) or numpy_dtype(type) is not None:
        return vector_to_numpy
    if (pa.types.is_list(type) or pa.types.is_large_list(type)) and _only_lists(type):
        return _lists
    if _is_text(type):
        return _texts
    return _objects if _has_dicts(type) and not _only_lists(type) else _plain


def _is_text(type: pa.DataType) -> bool:
    t = pa.types
    return t.is_string(type) or t.is_large_string(type) or t.is_binary(type) or t.is_large_binary(type)


_PANDAS_PAYS = 8 << 20  # texts; pyarrow's to_numpy first imports pandas (0.2 s), and then takes 70 ns each where this takes 95
_texts_read = 0


def _texts(column: pa.Array) -> np.ndarray:
    """Strings or bytes as an object array; without importing pandas for a few."""
    global _texts_read
    _texts_read += len(column)
    if "pandas" in sys.modules or _texts_read > _PANDAS_PAYS:
        return _plain(column)
    return _objects(column)


def _only_lists(type: pa.DataType) -> bool:
    """Lists of lists, however deep, of plain values."""
    while pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        type = type.value_type
    return not _has_dicts(type)


def _objects(column: pa.Array) -> np.ndarray:
    """Python values, as of structs and maps. (to_numpy makes floats of the integers in them where a value is missing.)"""
    return np.fromiter(python_values(column), dtype=object, count=len(column))


def _plain(column: pa.Array) -> np.ndarray:
    try:
        return column.to_numpy(zero_copy_only=False)
    except UNSHOWN:
        values = (_read_only(v) if isinstance(v, list) else v for v in python_values(column))
        return np.fromiter(values, dtype=object, count=len(column))


def _read_only(values: list[Any]) -> np.ndarray:
    row = np.fromiter(values, dtype=object, count=len(values))
    row.flags.writeable = False
    return row


def _own_values(column: pa.Array) -> pa.Array:
    """The values in these rows of a list column, of which there is one at least; those under nulls are among them."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        return column.values.slice(column.offset * size, len(column) * size)
    start, end = (column.offsets[i].as_py() for i in (0, len(column)))
    return column.values.slice(start, end - start)


def _lists(column: pa.Array) -> np.ndarray:
    """Lists as read-only arrays: those of numbers as views of the column's memory."""
    if not len(column):  # it may have no offsets
        return np.empty(0, dtype=object)
    dtype = numpy_dtype(column.type.value_type)
    if dtype is not None and dtype.kind in "iuf" and not (values := _own_values(column)).null_count:
        flat, offsets = vector_to_numpy(values), vector_to_numpy(column.offsets)
        offsets = (offsets - offsets[0]).tolist()
        flat.setflags(write=False)
        there = itertools.repeat(True) if not column.null_count else vector_to_numpy(column.is_valid()).tolist()
        rows = (flat[a:b] if here else None for (a, b), here in zip(itertools.pairwise(offsets), there, strict=False))
        return np.fromiter(rows, dtype=object, count=len(column))
    out = _plain(column)
    for row in out:
        if isinstance(row, np.ndarray):
            row.flags.writeable = False  # or a change inside would be lost when the column comes back as it was given
    return out


# --- formats ---------------------------------------------------------------------------------------------------------


def to_format(batch: pa.RecordBatch, format: BatchFormat, reader: NumpyReader) -> tuple[Any, Given]:
    """The batch in a user's format, and what it was made of."""
    if format == "numpy":
        return reader.read(batch)
    if format == "torch":
        arrays, given = reader.read(batch)
        return {name: to_torch(value) for name, value in arrays.items()}, given
    given = Given(batch.schema, batch=batch)
    if format == "pyarrow":
        return pa.Table.from_batches([batch]), given
    return to_pandas(batch), given


class _Writable:
    """Tells NumPy that memory may be written, because torch has no read-only tensors and warns of read-only arrays."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, values: np.ndarray) -> None:
        self.owner = values
        self.__array_interface__ = {**values.__array_interface__, "data": (values.ctypes.data, False)}


def writable_view(values: Any) -> Any:
    """The same memory without the read-only flag, for those who know that it is nobody else's."""
    if isinstance(values, np.ndarray) and not values.flags.writeable and values.size and not values.dtype.hasobject:
        return np.asarray(_Writable(values))
    return values


def to_torch(values: np.ndarray) -> Any:
    """A tensor over the same memory, which is not to be written to: see `torch_inputs`. Arrays without a torch type stay."""
    import torch

    if values.dtype.kind not in "biuf" or not values.dtype.isnative:
        return values
    if values.size == 0:
        return torch.from_numpy(values.copy())
    return torch.from_numpy(np.asarray(_Writable(values)))


def to_pandas(batch: pa.RecordBatch) -> Any:
    """A frame; tensor columns hold an array a row. All columns are columns, also one that was a frame's index when pandas wrote
    it to a file.
    """
    import pandas as pd

    batch = batch.replace_schema_metadata(_without_index(tuple((batch.schema.metadata or {}).items())))
    special = [i for i, field in enumerate(batch.schema) if is_tensor(field.type) or is_ragged(field.type)]
    if not special:
        try:
            return batch.to_pandas()
        except UNSHOWN:  # a value of some column
            pass
    columns: dict[str, Any] = {}
    for i, (name, column) in enumerate(zip(batch.schema.names, batch.columns, strict=True)):
        columns[name] = pd.Series(_tensor_rows(column), dtype=object) if i in special else _pandas_column(column)
    return pd.DataFrame(columns)


@functools.lru_cache(maxsize=16)
def _without_index(metadata: tuple[tuple[bytes, bytes], ...]) -> dict[bytes, bytes]:
    """A schema's metadata; what pandas says in it of types is kept."""
    out = dict(metadata)
    if b"pandas" in out:
        try:
            said = json.loads(out[b"pandas"])
            out[b"pandas"] = json.dumps({**said, "index_columns": []}).encode()
        except (ValueError, TypeError):
            del out[b"pandas"]
    return out


def _pandas_column(column: pa.Array) -> Any:
    import pandas as pd

    try:
        return column.to_pandas()
    except UNSHOWN:
        return pd.Series(python_values(column), dtype=object)


# --- rows ------------------------------------------------------------------------------------------------------------


def row_chunks(batch: pa.RecordBatch) -> int:
    """How many rows of this batch to hold as Python objects at a time."""
    fit = batch.num_rows * ROW_CHUNK_BYTES // max(1, batch.nbytes)
    return max(1, min(ROW_CHUNK, fit))


def to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dicts of Python values; tensors as arrays."""
    return read_rows(batch)[0]


def read_rows(batch: pa.RecordBatch) -> tuple[list[dict[str, Any]], Given]:
    """The rows, and what tells which of their values a function has given back."""
    names = batch.schema.names
    values = [_row_values(column) for column in batch.columns]
    if not names:
        return [{} for _ in range(batch.num_rows)], Given(batch.schema)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    return rows, GivenRows(batch, values)


class GivenRows(Given):
    """What a row function was given: columns, and the Python values that they were shown as.

    Identity tells that a value came back as it was given; of one that can be changed inside, a comparison.
    """

    __slots__ = ("_rows", "_shown")

    def __init__(self, batch: pa.RecordBatch, shown: Sequence[Sequence[Any]], rows: Sequence[int] | None = None) -> None:
        """rows: which of them the values to come are of. None: all."""
        super().__init__(batch.schema, batch=batch)
        self._shown = shown
        self._rows = rows

    def at(self, rows: Sequence[int]) -> GivenRows:
        assert self._batch is not None
        chosen = rows if self._rows is None else [self._rows[i] for i in rows]
        return GivenRows(self._batch, self._shown, chosen)

    def given_back(self, name: str, values: Sequence[Any], *, compare: bool = False) -> pa.Array | None:
        index = self.schema.get_field_index(name)
        if index < 0 or self._batch is None:
            return None
        shown, column = self._shown[index], self._batch.column(index)
        if len(shown if self._rows is None else self._rows) != len(values):
            return None
        own = shown if self._rows is None else map(shown.__getitem__, self._rows)
        if not all(map(operator.is_, values, own)):
            return None
        if not (_are_frozen(values, column.type) or (compare and _are_still(shown, column))):
            return None
        return column if self._rows is None else column.take(numpy_to_array(np.asarray(self._rows, np.int64)))


_FROZEN = frozenset((type(None), bool, int, float, str, bytes, decimal.Decimal, datetime.date, datetime.datetime, uuid.UUID))
_FROZEN |= {datetime.time, datetime.timedelta}


def _are_frozen(values: Sequence[Any], type: pa.DataType) -> bool:
    """Are these values of the column such as nobody can change?"""
    if pa.types.is_dictionary(type) or pa.types.is_run_end_encoded(type):
        type = type.value_type
    plain = not (isinstance(type, pa.BaseExtensionType) or pa.types.is_nested(type))
    return plain or all(map(_is_frozen, values))


def _is_frozen(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return not value.flags.writeable and not value.dtype.hasobject
    return value.__class__ in _FROZEN or isinstance(value, pa.Scalar)


def _are_still(shown: Sequence[Any], column: pa.Array) -> bool:
    """Have the column's values not been changed since they were shown?"""
    try:
        return all(map(_is_same, shown, _row_values(column)))
    except Exception:  # of what the user's code put there
        return False


def _is_same(a: Any, b: Any) -> bool:
    """The same value of the same type, all the way down: 1 is not True, 0.0 not -0.0, and NaN is NaN."""
    if a.__class__ is not b.__class__:
        return False
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return all(map(_is_same, a.tolist(), b.tolist())) if a.dtype.hasobject else a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(value, b[key]) for key, value in a.items())
    if isinstance(a, str | bytes | int | pa.Scalar | None):
        return bool(a == b)
    return repr(a) == repr(b)  # which tells time zones, signs of zero and decimals' places apart as well


def _row_values(column: pa.Array) -> Sequence[Any]:
    type = column.type
    return _tensor_rows(column) if is_tensor(type) or is_ragged(type) else python_values(column)


def _tensor_rows(column: pa.Array) -> list[Any]:
    tensors = tensor_to_numpy(column) if is_tensor(column.type) else ragged_to_numpy(column)
    return list(tensors)
