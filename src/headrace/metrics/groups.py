"""Rows by group: batches split by the values of some columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError
from headrace.core.tensors import numpy_to_array, vector_to_numpy
from headrace.metrics.columns import values


def split_by_group(batch: pa.RecordBatch, by: tuple[str, ...]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """(key, its rows in their order). A key is the JSON text of a list with a text for each column of `by`."""
    codes = np.zeros(batch.num_rows, np.int64)
    columns: list[tuple[np.ndarray, list[str]]] = []
    for column in by:
        found, each = encoded(batch, column)
        floating = pa.types.is_floating(values(batch, column).type)
        columns.append((found, [_text(float(value) if floating else value) for value in each]))
        codes = codes * len(each) + found
        # Codes stay below rows * values: renumbering keeps products of many columns in range.
        _, codes = np.unique(codes, return_inverse=True)
    groups, first, sizes = np.unique(codes, return_index=True, return_counts=True)
    texts = ([each[code] for code in found[first].tolist()] for found, each in columns)
    keys = [json.dumps(row, ensure_ascii=False) for row in zip(*texts, strict=True)]
    if len(groups) == 1:
        yield keys[0], batch
        return
    ordered = batch.take(numpy_to_array(np.argsort(codes, kind="stable")))
    start = 0
    for key, size in zip(keys, sizes.tolist(), strict=True):
        yield key, ordered.slice(start, size)
        start += size


def encoded(batch: pa.RecordBatch, column: str) -> tuple[np.ndarray, list[Any]]:
    """A column of classes or groups: int64 codes by row, and the value of each code.

    Texts, whole numbers, booleans, dates and times; floats where they are whole numbers. Raises DataError for others.
    """
    array = values(batch, column)
    kind = array.type
    if pa.types.is_floating(kind):
        array = _whole(array, column)
    elif pa.types.is_decimal(kind) and kind.bit_width < 128:  # of which Arrow makes no dictionaries
        array = array.cast(pa.decimal128(kind.precision, kind.scale))
    elif pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType) or pa.types.is_binary(kind):
        raise DataError(
            f"column {column!r} is {kind}: it can't name classes or groups",
            where=(("column", column),),
            hint="use texts, whole numbers, booleans or dates",
        )
    table = array.dictionary_encode()
    return vector_to_numpy(table.indices).astype(np.int64), table.dictionary.to_pylist()


def _whole(array: pa.Array, column: str) -> pa.Array:
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError(
            f"column {column!r} holds numbers that are no whole numbers: they can't name classes or groups",
            where=(("column", column),),
            hint="make classes of them first, for example with map_batches",
        ) from None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
