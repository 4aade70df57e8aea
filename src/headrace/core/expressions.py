"""Arrow filter expressions: what they read, and which rows they keep.

pyarrow does not tell an expression's columns and does not filter every type (a tensor column fails where no row passes), and
its plans cost time by the column: 26 ms for 500. So an expression is only ever applied to the plain columns that its text
names, and a row index. That text holds every name; literals in it may be cut short.
"""

# pyright: basic
# (pyarrow has no type stubs)

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.tensors import numpy_to_array

_INDEX = "__headrace_row"

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_BY_NUMBER = re.compile(r"(?<![\w.])FieldPath\(\d|FieldRef\.Nested\(FieldRef\.FieldPath\(")


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """No rows of any schema, extension types included."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def passing(batch: pa.RecordBatch, expression: Any) -> pa.Array:
    """int64 indexes of the rows for which the expression is true. Raises pyarrow's errors."""
    plain = (f.name for f in batch.schema if not isinstance(f.type, pa.BaseExtensionType))
    names = _named(expression, plain)
    arrays = [*batch.select(names).columns, numpy_to_array(np.arange(batch.num_rows))]
    return pa.RecordBatch.from_arrays(arrays, names=[*names, _INDEX]).filter(expression).column(len(names))


def columns_of(expression: Any, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that an expression reads. Raises pyarrow's errors when it does not fit."""
    passing(empty_batch(schema), expression)
    named = _named(expression, schema.names)
    fields = [schema.field(name) for name in named]
    return tuple(name for i, name in enumerate(named) if not _fits(expression, [*fields[:i], *fields[i + 1 :]]))


def _named(expression: Any, names: Iterable[str]) -> list[str]:
    """The names that occur in an expression: of the columns that it reads, and perhaps of others. Raises ArrowInvalid for a
    column that is given by its number, which depends on what else is read.
    """
    names, text = list(names), str(expression)
    told = _QUOTED.sub("", text)
    for name in filter(_BY_NUMBER.search, names):  # a column whose name looks like a number's text
        told = told.replace(name, "")
    if _BY_NUMBER.search(told):
        raise pa.ArrowInvalid("it gives a column by its number; columns are told apart by name")
    return [name for name in names if name in text]


def _fits(expression: Any, fields: list[pa.Field]) -> bool:
    """Can it be bound to these columns? Nothing is computed."""
    from headrace.core.arrow_dataset import ds

    try:
        ds.Scanner.from_batches([], schema=pa.schema(fields), filter=expression, columns=[])
    except pa.ArrowException:
        return False
    return True
