"""The schema that comes out of operators, as far as it can be told without running them.

`static_schema` knows all of it or says that it does not; `rowless_schema` is for results without rows, whose files must have
columns all the same.
"""

# pyright: basic
# (pyarrow has no type stubs)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from headrace.core.errors import PlanError
from headrace.plan.columns import makes, reads
from headrace.plan.nodes import (
    Apply,
    Evaluate,
    FilterExpr,
    FilterRows,
    FlatMap,
    Limit,
    MapBatches,
    MapRows,
    Op,
    Predict,
    Project,
    Reshape,
)


def static_schema(schema: pa.Schema, ops: Sequence[Op]) -> pa.Schema | None:
    """The schema after `ops`, or None where only running tells."""
    for op in ops:
        after = _after(schema, op)
        if after is None:
            return None
        schema = after
    return schema


def rowless_schema(schema: pa.Schema, ops: Sequence[Op]) -> pa.Schema:
    """The schema of a result of `ops` that has no rows: functions and models have told nothing. Types not known are null.

    Known are carried columns, declared ones, and names of outputs. A function that declares nothing is taken to keep the names
    of its columns: many do, and a table needs some. What a later step names was there.
    """
    for op in ops:
        schema = _with_fields(schema, ((name, pa.null()) for name in _named(op) if name not in schema.names))
        try:
            after = _after(schema, op)
        except PlanError:  # a type that a transform does not take: it is not known, or no row came to be refused
            after = None
        schema = _likely(schema, op) if after is None else after
    return schema


def _after(schema: pa.Schema, op: Op) -> pa.Schema | None:
    match op:
        case Project(columns=columns):
            return pa.schema([schema.field(old).with_name(new) for new, old in columns])
        case Apply(transform=transform):
            made = transform.schema(pa.schema([schema.field(c) for c in transform.columns_in]))
            return _with_fields(schema, [(field.name, field.type) for field in made])
        case MapRows(types=types) | FlatMap(types=types) | MapBatches(types=types) if types:
            return pa.schema(list(types))
        case Predict(types=types) if types:
            return _with_fields(schema, types)
        case FilterExpr() | Limit() | Evaluate() | FilterRows():
            return schema
        case _:
            return None


def _likely(schema: pa.Schema, op: Op) -> pa.Schema:
    if isinstance(op, Reshape):
        new = dict(op.rename)
        return pa.schema({new.get(f.name, f.name): f.type for f in schema if f.name not in op.drop})
    made = makes(op)
    return _with_fields(schema, ((name, pa.null()) for name in (schema.names if made is None else made)))


def _named(op: Op) -> list[str]:
    """The columns that must be there, as the user's words show."""
    if isinstance(op, Reshape):
        return [old for old, _ in op.rename]
    read = reads(op)
    return sorted(read) if isinstance(read, frozenset) else []


def _with_fields(schema: pa.Schema, made: Iterable[tuple[str, Any]]) -> pa.Schema:
    """The schema with these columns: in the places of those of the same name, else after the others."""
    for name, type in made:
        at = schema.get_field_index(name)
        schema = schema.append(pa.field(name, type)) if at < 0 else schema.set(at, pa.field(name, type))
    return schema
