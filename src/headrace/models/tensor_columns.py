"""Which columns deep-learning models take, and their texts. Nothing of one library lives here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from headrace.core.tensors import is_tensor, numpy_dtype


def makes_tensor(type: pa.DataType) -> bool:
    """Numbers and bools, fixed-shape tensors and fixed-size lists: columns that are a tensor of one row for each row."""
    if is_tensor(type):
        return True
    if pa.types.is_fixed_size_list(type):
        return numpy_dtype(type.value_type) is not None
    return pa.types.is_boolean(type) or pa.types.is_integer(type) or pa.types.is_floating(type)


def is_text(type: pa.DataType) -> bool:
    """Texts, as they are or in a dictionary."""
    if pa.types.is_dictionary(type):
        return is_text(type.value_type)
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def text_columns(batch: Any, columns: Sequence[str]) -> list[list[str]]:
    """The texts of each column: of an Arrow table, or of a bare column. Raises ValueError for a missing text."""
    if hasattr(batch, "column_names"):
        names = list(columns) or batch.column_names
        given = {name: batch.column(name) for name in names}
    else:
        given = {columns[0] if columns else "text": batch}
    for name, column in given.items():
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} missing text(s)")
    return [column.to_pylist() for column in given.values()]
