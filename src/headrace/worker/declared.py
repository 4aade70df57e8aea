"""Declared columns: what user code promised to return, and what it returns brought to that.

Invariant: a cast changes no value beyond the rounding of a float to a narrower one. What does not fit is Refused, with the
column, the value and its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from headrace.core.schemas import cast
from headrace.core.tensors import is_tensor
from headrace.worker.casting import widens
from headrace.worker.refused import Refused

_t = pa.types
_FAILURES = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)
_SHOWN_CHARS = 80


class Declared:
    """columns: (name, type), in the order in which they leave."""

    def __init__(self, columns: Sequence[tuple[str, pa.DataType]]) -> None:
        self._columns = tuple(columns)
        self._types = dict(columns)
        self._schema = pa.schema(list(columns))

    def type_of(self, name: str) -> pa.DataType | None:
        return self._types.get(name)

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with the declared columns, in their types and order. Raises Refused."""
        if not self._columns or batch.schema.equals(self._schema):
            return batch
        there = batch.schema.names
        missing = [name for name in self._types if name not in there]
        if missing:
            raise Refused(
                f"returned columns {there}, but {missing[0]!r} was declared", "return every declared column, None where empty"
            )
        more = [name for name in there if name not in self._types]
        if more:
            raise Refused(f"returned column {more[0]!r}, which was not declared", "declare it, or leave it out")
        columns = [_cast(batch.column(name), name, type) for name, type in self._columns]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


NOTHING = Declared(())


def _cast(column: pa.Array, name: str, type: pa.DataType) -> pa.Array:
    if column.type.equals(type):
        return column
    problem = f"{column.type} is no kind of {type}"
    if _fits(column.type, type):
        try:
            return _converted(column, type)
        except _FAILURES as exc:
            problem = str(exc).partition("\n")[0]
    row = _first_failing(column, type)
    value = repr(column[row].as_py()) if row < len(column) else ""
    value = value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "..."
    raise Refused(
        f"returned {value} in row {row} of column {name!r}, which was declared as {type}: {problem}",
        "convert it in the function, or declare another type",
        row=row,
    )


def _fits(a: pa.DataType, b: pa.DataType) -> bool:
    """May values of type `a` become type `b`, if they fit?"""
    if widens(a, b) or (_is_number(a) and _is_number(b)):
        return True
    if is_tensor(a) or is_tensor(b):
        return _is_vector(a) and _is_vector(b) and _fits(_item(a), _item(b)) and _shapes_fit(_shape_of(a), _shape_of(b))
    return _is_list(a) and _is_list(b) and _fits(a.value_type, b.value_type)


def _converted(column: pa.Array, type: pa.DataType) -> pa.Array:
    if not (is_tensor(column.type) or is_tensor(type)) or _t.is_null(column.type) or not _is_vector(type):
        return cast(column, type)
    storage = column.storage if is_tensor(column.type) else column
    if not is_tensor(type):
        return storage.cast(type)
    return pa.ExtensionArray.from_storage(type, storage.cast(type.storage_type))


def _first_failing(column: pa.Array, type: pa.DataType) -> int:
    """The first row that can't be cast; the first that is not null when none can."""
    if not _fits(column.type, type):
        return next((i for i in range(len(column)) if column[i].is_valid), 0)
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _converted(column.slice(low, middle - low), type)
            low = middle
        except _FAILURES:
            high = middle
    return low


def _is_number(type: pa.DataType) -> bool:
    return _t.is_integer(type) or _t.is_floating(type)


def _is_list(type: pa.DataType) -> bool:
    return _t.is_list(type) or _t.is_large_list(type) or _t.is_fixed_size_list(type)


def _is_vector(type: pa.DataType) -> bool:
    return is_tensor(type) or (not isinstance(type, pa.BaseExtensionType) and _is_list(type))


def _item(type: pa.DataType) -> pa.DataType:
    return type.value_type


def _shapes_fit(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is None or (len(a) == 1 if b is None else a == b)


def _shape_of(type: pa.DataType) -> tuple[int, ...] | None:
    """None: of a list, known row by row; a list may be a tensor of one dimension."""
    return tuple(type.shape) if is_tensor(type) else None
