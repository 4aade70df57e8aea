"""Casting: when two column types are the same kind of thing, and how a block is brought to the schema that was promised.

Invariant: a cast never changes a value. What can't be cast safely is a DataError that names column, types and place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pyarrow as pa

from headrace.core.errors import DataError, SchemaConflict
from headrace.core.schemas import Conflict, bring, cast, takes_tensors, unify
from headrace.core.tensors import is_ragged, is_tensor

_t = pa.types


def widens(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether values of type `a` may become type `b`: the same kind of value, though maybe not every single one fits."""
    if a.equals(b) or _t.is_null(a):
        return True
    if is_tensor(a) or is_ragged(b):
        return takes_tensors(a, b)
    if isinstance(a, pa.BaseExtensionType) or isinstance(b, pa.BaseExtensionType):
        return False
    if _t.is_dictionary(a):
        return widens(a.value_type, b.value_type if _t.is_dictionary(b) else b)
    if _t.is_struct(a) and _t.is_struct(b):
        names = [f.name for f in a]
        return names == [f.name for f in b] and all(widens(x.type, y.type) for x, y in zip(a, b, strict=True))
    if _is_list(a) and _is_list(b):
        return widens(a.value_type, b.value_type)
    if _t.is_integer(a):
        return _t.is_integer(b) or _t.is_floating(b)
    if _t.is_floating(a):
        return _t.is_floating(b) and b.bit_width >= a.bit_width
    if _t.is_timestamp(a) and _t.is_timestamp(b):
        return (a.tz is None) == (b.tz is None)
    return any(same(a) and same(b) for same in (_is_text, _is_binary, _t.is_decimal, _t.is_date, _t.is_time, _t.is_duration))


def has_null_type(type: pa.DataType) -> bool:
    """Whether only Nones or empty lists have been seen where values of some type belong."""
    if isinstance(type, pa.BaseExtensionType):
        return False
    return _t.is_null(type) or (_t.is_nested(type) and any(has_null_type(type.field(i).type) for i in range(type.num_fields)))


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema, place: str) -> pa.RecordBatch:
    """The batch with the columns of `schema`, in its order. place: the rows, for messages."""
    if batch.schema.equals(schema):
        return batch
    names = batch.schema.names
    if set(names) != set(schema.names) or len(names) != len(schema.names):
        raise DataError(
            f"a block has columns {names}, but the output was begun with {schema.names}",
            where=(("rows", place),),
            hint="make the functions of the pipeline return the same columns for every batch",
        )
    columns = [_cast_column(batch.column(field.name), field, place) for field in schema]
    if not columns:
        return batch
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast_column(column: pa.Array, field: pa.Field, place: str) -> pa.Array:
    problem = ""
    if widens(column.type, field.type):
        try:
            return cast(column, field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
            problem = f": {exc}"
    raise DataError(
        f"column {field.name!r} is {column.type} here, but the output has {field.type}{problem}",
        where=(("column", field.name), ("rows", place)),
        hint="convert the column to one type in the pipeline, for example with .astype() in map_batches",
    )


def concat(batches: Sequence[pa.RecordBatch], place: str) -> pa.RecordBatch:
    """One batch of all rows; copies unless there is only one. Types that drift from batch to batch are brought together."""
    return batches[0] if len(batches) == 1 else pa.concat_batches(alike(batches, place))


def alike(batches: Sequence[pa.RecordBatch], place: str) -> Sequence[pa.RecordBatch]:
    """The batches in the schema that the rows of all fit into. Raises DataError."""
    schema = batches[0].schema
    if all(b.schema.equals(schema) for b in batches[1:]):
        return batches
    try:
        schema = functools.reduce(unify, [b.schema for b in batches])
        return [bring(b, schema) for b in batches]
    except Conflict as conflict:
        raise drift(conflict, ("rows", place)) from None
    except pa.ArrowInvalid as exc:
        raise DataError(f"blocks can't be brought together: {exc}", where=(("rows", place),), hint=DRIFT_HINT) from None


DRIFT_HINT = "return one type for every row; declare it (schema=, output={name: type}) to have it checked row by row"


def drift(conflict: Conflict, *where: tuple[str, str]) -> SchemaConflict:
    """The error for columns whose type changes from block to block."""
    return SchemaConflict(
        f"column {conflict.name!r} is {conflict.then} here, but {conflict.first} before",
        where=(("column", conflict.name), *where),
        hint=DRIFT_HINT,
    )


def _is_list(type: pa.DataType) -> bool:
    return _t.is_list(type) or _t.is_large_list(type) or _t.is_fixed_size_list(type)


def _is_text(type: pa.DataType) -> bool:
    return _t.is_string(type) or _t.is_large_string(type) or _t.is_string_view(type)


def _is_binary(type: pa.DataType) -> bool:
    return _t.is_binary(type) or _t.is_large_binary(type) or _t.is_binary_view(type) or _t.is_fixed_size_binary(type)
