"""The types that rows of Parquet files come in: what some footers agree on, or what the user named. And the way there.

What must not live here: reading files. Invariants: `unified` depends on the schemas and their order alone; unless the user
named the type, no cast of `conform` loses anything, and no nested field is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from msgspec import Struct

from headrace.connectors.blocks import goes_into
from headrace.connectors.sources.unreadable import Mismatch
from headrace.core.errors import DataError, PlanError
from headrace.core.schemas import cast, common, nullable, takes_tensors

Where = tuple[tuple[str, str], ...]

HINT = "read_parquet(..., schema=) says which columns and types all files are brought to"


def named(schema: pa.Schema) -> pa.Schema:
    """What the user named, in a form that rows can have. Raises PlanError."""
    if not isinstance(schema, pa.Schema):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"schema is a {type(schema).__name__}", hint="use a pyarrow.Schema")
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise PlanError(f"schema has two columns {twice[0]!r}", hint="name each column once")
    return nullable(schema.remove_metadata())


class Unified(Struct, frozen=True):
    """What rows of some files fit into. optional: columns that some of them lack. conflicts: columns whose types don't go
    together, and a text that says so; the schema has the first type of each.
    """

    schema: pa.Schema
    optional: frozenset[str]
    conflicts: dict[str, str]


def unified(found: Sequence[tuple[str, pa.Schema]], *, all_there: bool) -> Unified:
    """The schema that rows of these files fit into. Columns stand in the order in which they first appear. A column that may
    not hold nulls stays so only where all files of the input are there and say the same.
    """
    schema = found[0][1]
    conflicts: dict[str, str] = {}
    differing = [(uri, other) for uri, other in found[1:] if not other.equals(schema)]
    for uri, other in differing:
        schema, apart = _both(schema, other)
        conflicts |= {name: _conflict(name, uri, other, found) for name in apart if name not in conflicts}
    if not differing and all_there:
        return Unified(schema, frozenset(), conflicts)
    there = [frozenset(other.names) for _, other in found]
    optional = frozenset(name for name in schema.names if any(name not in names for names in there))
    return Unified(nullable(schema), optional, conflicts)


def refused(name: str, conflict: str) -> PlanError:
    """For an action that reads a column of `Unified.conflicts`."""
    return PlanError(conflict, where=(("column", name),), hint=HINT)


def _both(schema: pa.Schema, other: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """(what rows of both fit into, nulls apart; the columns that don't go together: they have the type that they had). What
    the first file says of a column beside its type stays: blocks that need no cast have it.
    """
    fields, apart = list(schema), list[str]()
    for field in other:
        at = schema.get_field_index(field.name)
        if at < 0:
            if field.name not in schema.names:  # twice there: whoever reads it is told
                fields.append(field)
            continue
        type = _meeting(fields[at].type, field.type)
        if type is None:
            apart.append(field.name)
        else:
            fields[at] = fields[at].with_type(type)
    return pa.schema(fields), apart


def _meeting(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that values of both are brought to; None when they have nothing in common. It is the wider one, unless that
    lacks values that `a` has: then it is `a`, if it may be, so that what can be read without `b` can be read with it.
    """
    t = pa.types
    if t.is_timestamp(a) and t.is_timestamp(b) and (a.tz is None) == (b.tz is None):
        return pa.timestamp(_unit(a.unit, b.unit), a.tz)
    type = common(a, b)
    if (type is None or not _holds(type, a)) and goes_into(b, a):
        return a
    if type is None or not all(goes_into(side, type) or takes_tensors(side, type) for side in (a, b)):
        return None
    return type


def _unit(a: str, b: str) -> str:
    """The finer one. Nanoseconds, which end in 2262, only where `a` has them."""
    units = ("s", "ms", "us", "ns")
    return max(a, b if b != "ns" else "us", key=units.index)


def _holds(wide: pa.DataType, a: pa.DataType) -> bool:
    """Has the wider type room for all values of `a`?"""
    t = pa.types
    if t.is_uint64(a):
        return not t.is_signed_integer(wide)
    if t.is_timestamp(a) or t.is_duration(a):
        return a.unit == "ns" or wide.unit != "ns"
    if t.is_dictionary(a) or isinstance(a, pa.BaseExtensionType) or a.num_fields > wide.num_fields:
        return True
    if t.is_map(a):
        return _holds(wide.key_type, a.key_type) and _holds(wide.item_type, a.item_type)
    return all(_holds(wide.field(i).type, a.field(i).type) for i in range(a.num_fields))


def _conflict(name: str, uri: str, other: pa.Schema, found: Sequence[tuple[str, pa.Schema]]) -> str:
    """Column `name` of the file has nothing in common with what a file before it has."""
    type = other.field(name).type
    before = [(file, schema.field(name).type) for file, schema in found if name in schema.names and file != uri]
    file, first = next(((f, t) for f, t in before if _meeting(t, type) is None), before[0])
    return f"column {name!r} has types that don't go together: {first} in {file}, {type} in {uri}"


def conform(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    where: Where,
    optional: frozenset[str] = frozenset(),
    *,
    by_user: bool = False,
    known: Mapping[str, pa.Scalar] | None = None,
) -> pa.RecordBatch:
    """The batch with the columns and types of `schema`, matched by name. optional: columns that may be missing, and are null
    then. known: values that a missing column has in all rows, of the schema's type. by_user: the user named the types, and any
    safe cast will do.

    Raises DataError for a column that is missing, or whose type or values do not go in.
    """
    if batch.schema.equals(schema):
        return batch
    if len(schema) == 0:
        return batch.select([])
    arrays: list[pa.Array] = []
    for f in schema:
        i = batch.schema.get_field_index(f.name)
        if i >= 0:
            arrays.append(_cast(batch.column(i), f, where, by_user))
        elif f.name in batch.schema.names or not ((known and f.name in known) or f.name in optional):  # twice is not missing
            there = ", ".join(batch.schema.names[:20])
            text = f"column {f.name!r} ({f.type}) is missing here (there are: {there})"
            raise Mismatch(text, where=(*where, ("column", f.name)), hint=f"{HINT}; what a file lacks is null then")
        elif known and f.name in known:
            arrays.append(pa.repeat(known[f.name], batch.num_rows))
        else:
            arrays.append(pa.nulls(batch.num_rows, f.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def constant(text: str | None, f: pa.Field, where: Where) -> pa.Scalar:
    """A folder's value as one of the field's type. Raises DataError."""
    if text is None:
        return pa.scalar(None, f.type)
    try:
        return _cast(pa.array([text]), f, where, True)[0]
    except DataError as e:
        raise DataError(f"of a folder's name, {e.message}", where=e.where, hint=HINT) from None


def _cast(array: pa.Array, f: pa.Field, where: Where, by_user: bool) -> pa.Array:
    if not by_user and not goes_into(array.type, f.type) and not takes_tensors(array.type, f.type):
        text = f"column {f.name!r} has type {array.type} here, {f.type} was expected"
        raise DataError(text, where=(*where, ("column", f.name)), hint=HINT)
    try:
        out = cast(array, f.type)
        if by_user and pa.types.is_floating(f.type) and _has_new_infinity(array, out):
            raise pa.ArrowInvalid("a number is out of range")
        return out
    except (pa.ArrowException, ValueError) as e:
        text = f"column {f.name!r} of type {array.type} does not fit {f.type}: {e}"
        raise DataError(text, where=(*where, ("column", f.name)), hint=HINT) from e


def _has_new_infinity(array: pa.Array, cast: pa.Array) -> bool:
    """Of casts to narrower floats, which Arrow takes for safe."""
    if not pa.types.is_floating(array.type) or cast.type.bit_width >= array.type.bit_width:
        return False
    import pyarrow.compute

    compute: Any = pyarrow.compute
    return compute.sum(compute.is_inf(cast)).as_py() != compute.sum(compute.is_inf(array)).as_py()
