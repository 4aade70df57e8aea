"""Schemas that differ from block to block, brought together: columns that come later, nulls that get a type, whole numbers that
become floats.

Invariants: `unify` is associative, and does not depend on how rows were cut into blocks as long as no types conflict; columns
stand in the order in which they first appear; `bring` changes no value.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from headrace.core.tensors import is_ragged, is_tensor, promoted, tensors_brought, tensors_meet


class Conflict(Exception):
    """Column `name` has types that have nothing in common."""

    def __init__(self, name: str, first: pa.DataType, then: pa.DataType) -> None:
        super().__init__(name)
        self.name = name
        self.first = first
        self.then = then


def unify(a: pa.Schema, b: pa.Schema) -> pa.Schema:
    """The schema that rows of both fit into. Raises Conflict."""
    if a.equals(b):
        return a
    fields: list[pa.Field] = []
    for field in a:
        index = b.get_field_index(field.name)
        if index < 0:
            fields.append(field.with_nullable(True))
            continue
        other = b.field(index)
        type = common(field.type, other.type)
        if type is None:
            raise Conflict(field.name, field.type, other.type)
        fields.append(pa.field(field.name, type, field.nullable or other.nullable))
    fields += [field.with_nullable(True) for field in b if a.get_field_index(field.name) < 0]
    return pa.schema(fields)


def common(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The narrowest type that values of both fit into; None when they are of different kinds."""
    if a.equals(b) or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if isinstance(a, pa.BaseExtensionType) or isinstance(b, pa.BaseExtensionType):
        return tensors_meet(a, b)
    if pa.types.is_dictionary(a) != pa.types.is_dictionary(b):
        plain = [t.value_type if pa.types.is_dictionary(t) else t for t in (a, b)]
        return common(plain[0], plain[1])
    if any(kind(a) != kind(b) for kind in (pa.types.is_temporal, _is_bytes)) or ({a, b} & _FLOATS and _has_decimal(a, b)):
        return None
    a, b = _with_room(a, b), _with_room(b, a)
    both = promoted(a, b)
    if both is None:
        plain = [_plain(t) for t in (a, b)]
        return None if plain == [a, b] else common(plain[0], plain[1])
    return both


_DIGITS = {8: 3, 16: 5, 32: 10, 64: 19}  # of whole numbers of so many bits; of uint64 one more


def _with_room(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """`a`, with decimals for whole numbers where `b` has decimals. (Arrow's promotion gives them a digit too few.)"""
    if pa.types.is_integer(a) and pa.types.is_decimal(b):
        return pa.decimal128(_DIGITS[a.bit_width] + pa.types.is_uint64(a), 0)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        others = {field.name: field.type for field in b}
        return _rebuilt(a, lambda f: f.with_type(_with_room(f.type, others[f.name])) if f.name in others else f)
    inside = _inside(a), _inside(b)
    if not inside[0] or len(inside[0]) != len(inside[1]):
        return a
    types = map(_with_room, *inside)
    return _rebuilt(a, lambda f: f.with_type(next(types)))


def _inside(type: pa.DataType) -> list[pa.DataType]:
    """The types of what is in a list or a map."""
    t = pa.types
    if t.is_map(type):
        return [type.key_type, type.item_type]
    return [type.value_type] if t.is_list(type) or t.is_large_list(type) or t.is_fixed_size_list(type) else []


_ENCODED = {pa.string_view().id, pa.binary_view().id, pa.run_end_encoded(pa.int32(), pa.null()).id}


def is_encoded(type: pa.DataType) -> bool:
    """Whether it is, or holds, a view of texts or bytes, or is run-end encoded: Arrow can't filter such columns, and more."""
    if type.id in _ENCODED:
        return True
    if pa.types.is_dictionary(type):
        return type.value_type.id in _ENCODED
    if isinstance(type, pa.BaseExtensionType):
        return False
    return any(is_encoded(type.field(i).type) for i in range(type.num_fields))


def decoded(type: pa.DataType, *, large: bool = False) -> pa.DataType:
    """The type that `decode` brings columns to. large: with room for more than 2 GB in a column."""
    t = pa.types
    if not is_encoded(type):
        return type
    if t.is_run_end_encoded(type):
        return decoded(type.value_type, large=large)
    if t.is_string_view(type):
        return pa.large_string() if large else pa.string()
    if t.is_binary_view(type):
        return pa.large_binary() if large else pa.binary()
    if t.is_dictionary(type):
        return pa.dictionary(type.index_type, decoded(type.value_type, large=large), type.ordered)
    return _rebuilt(type, lambda f: f if t.is_run_end_encoded(f.type) else f.with_type(decoded(f.type, large=large)))


def decode(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The same values without views and run ends, but for the latter inside of other types."""
    if not is_encoded(column.type):
        return column
    import pyarrow.compute as pc

    if pa.types.is_run_end_encoded(column.type):
        return decode(pc.run_end_decode(column))  # type: ignore[attr-defined]
    try:
        return column.cast(decoded(column.type))
    except (pa.ArrowInvalid, pa.ArrowCapacityError):
        return column.cast(decoded(column.type, large=True))


def decoded_schema(schema: pa.Schema) -> pa.Schema:
    if not any(is_encoded(field.type) for field in schema):
        return schema
    return pa.schema([field.with_type(decoded(field.type)) for field in schema], schema.metadata)


def nullable(schema: pa.Schema) -> pa.Schema:
    """The same columns, which may hold nulls, and so may what is nested in them. Keys of maps never may."""
    return pa.schema([_nullable(field) for field in schema])


def _nullable(field: pa.Field) -> pa.Field:
    return field.with_type(_rebuilt(field.type, _nullable)).with_nullable(True)


def _plain(type: pa.DataType) -> pa.DataType:
    """The same without dictionaries inside."""
    if pa.types.is_dictionary(type):
        return _plain(type.value_type)
    return _rebuilt(type, lambda field: field.with_type(_plain(field.type)))


def _rebuilt(type: pa.DataType, change: Callable[[pa.Field], pa.Field]) -> pa.DataType:
    """The type with its children changed."""
    t = pa.types
    if isinstance(type, pa.BaseExtensionType):
        return type
    if t.is_struct(type):
        return pa.struct([change(type.field(i)) for i in range(type.num_fields)])
    if t.is_list(type):
        return pa.list_(change(type.value_field))
    if t.is_large_list(type):
        return pa.large_list(change(type.value_field))
    if t.is_fixed_size_list(type):
        return pa.list_(change(type.value_field), type.list_size)
    if t.is_map(type):
        return pa.map_(change(type.key_field).with_nullable(False), change(type.item_field), keys_sorted=type.keys_sorted)
    return type


_FLOATS = {pa.float16(), pa.float32(), pa.float64()}


def _has_decimal(*types: pa.DataType) -> bool:
    return any(map(pa.types.is_decimal, types))


def _is_bytes(type: pa.DataType) -> bool:
    t = pa.types
    return t.is_binary(type) or t.is_large_binary(type) or t.is_fixed_size_binary(type) or t.is_binary_view(type)


def bring(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in a schema that `unify` made of its own and others. Raises ArrowInvalid for a value that does not fit."""
    if batch.schema.equals(schema):
        return batch
    if len(schema) == 0:
        return batch.select([])
    columns: list[pa.Array] = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        column = pa.nulls(batch.num_rows) if index < 0 else batch.column(index)
        columns.append(cast(column, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def cast(column: pa.Array, type: pa.DataType) -> pa.Array:
    """The column as `type`. Raises ArrowInvalid or ArrowNotImplementedError for a value that does not fit."""
    if column.type.equals(type):
        return column
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), type)
    if takes_tensors(column.type, type):
        return tensors_brought(column, type)
    return column.cast(type)


def takes_tensors(a: pa.DataType, b: pa.DataType) -> bool:
    """Are tensors of type `a` brought to those of `b` by `tensors_brought`?"""
    if a.equals(b) or not (is_tensor(a) or is_ragged(b)):
        return False
    met = tensors_meet(a, b)
    return met is not None and met.equals(b)
