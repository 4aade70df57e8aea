"""Arrow filter expressions: what they read, and which rows they keep.

pyarrow neither tells an expression's columns nor filters every type (a tensor column fails where no row passes), so
expressions are only ever applied to plain columns and a row index.
"""

# pyright: basic
# (pyarrow has no type stubs)

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.tensors import numpy_to_array

_INDEX = "__headrace_row"


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """No rows of any schema, extension types included."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def passing(batch: pa.RecordBatch, expression: Any) -> pa.Array:
    """int64 indexes of the rows for which the expression is true. Raises pyarrow's errors."""
    plain = [i for i, field in enumerate(batch.schema) if not isinstance(field.type, pa.BaseExtensionType)]
    arrays = [*(batch.column(i) for i in plain), numpy_to_array(np.arange(batch.num_rows))]
    names = [*(batch.schema.names[i] for i in plain), _INDEX]
    return pa.RecordBatch.from_arrays(arrays, names=names).filter(expression).column(len(plain))


def columns_of(expression: Any, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that an expression reads, found by taking each away. Raises pyarrow's errors when it does not fit."""
    empty = empty_batch(schema)
    passing(empty, expression)
    read: list[str] = []
    for name in schema.names:
        try:
            passing(empty.select([n for n in schema.names if n != name]), expression)
        except pa.ArrowException:
            read.append(name)
    return tuple(read)
