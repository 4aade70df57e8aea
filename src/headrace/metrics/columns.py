"""Arrow columns to NumPy arrays, for metrics: checked, because a metric over rows silently left out is a wrong metric.

Invariant: a null, a NaN or an infinite number is a DataError that names the column and says how many.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError
from headrace.core.tensors import vector_to_numpy

_LAST_WHOLE = 1 << 53  # up to which a double holds every whole number
_DROP_HINT = "filter these rows out before evaluate, or fill them"


def values(batch: pa.RecordBatch, column: str) -> pa.Array:
    """The column without nulls, dictionaries decoded."""
    array = batch.column(column)
    if isinstance(array, pa.DictionaryArray):  # null may be one of its values, too
        array = array.dictionary_decode()
    if array.null_count:
        raise DataError(
            f"a metric reads column {column!r}, which has {array.null_count} null(s) in {len(array)} rows",
            where=(("column", column),),
            hint=_DROP_HINT,
        )
    return array


def numbers(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A column of numbers: int64, uint64, or the column's own float type. Booleans are 0 and 1, decimals floats (float64)."""
    array = values(batch, column)
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    elif pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _wrong_type(column, kind, "numbers")
    made = vector_to_numpy(array)
    if made.dtype.kind == "f":
        check_finite(made, column)
        return made
    return made if made.dtype == np.uint64 else made.astype(np.int64)


def matrix(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A tensor or list column with one vector of floats per row: (rows, length), of the column's own float type."""
    return floats(vectors(batch, column), column)


def vectors(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """The same of any numbers, which are not checked: for who reads some of the entries."""
    array = values(batch, column)
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    kind = storage.type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise _wrong_type(column, array.type, "one vector per row (a tensor or list column)")
    flat = storage.flatten()
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)) or flat.null_count:
        raise _wrong_type(column, array.type, "one vector of numbers per row, without nulls")
    width = len(flat) // len(array) if len(array) else 0
    if not pa.types.is_fixed_size_list(kind) and len(array):
        lengths = np.diff(vector_to_numpy(storage.offsets))
        if (lengths != width).any():
            raise DataError(
                f"a metric reads column {column!r}, whose vectors have {lengths.min()} to {lengths.max()} entries",
                where=(("column", column),),
                hint="every row needs one entry per class",
            )
    return vector_to_numpy(flat).reshape(len(array), width)


def floats(array: np.ndarray, column: str) -> np.ndarray:
    """Numbers of the column as floats: finite, of their own type if they are some."""
    made = array if array.dtype.kind == "f" else doubles(array, column)
    check_finite(made, column)
    return made


def doubles(array: np.ndarray, column: str) -> np.ndarray:
    """Numbers as float64, which hold whole ones up to 2**53. Raises DataError for larger ones: neighbours become equal."""
    if array.dtype.kind != "f" and array.size and (int(array.max()) > _LAST_WHOLE or int(array.min()) < -_LAST_WHOLE):
        row = int(np.argwhere((array > _LAST_WHOLE) | (array < -_LAST_WHOLE))[0][0])
        raise DataError(
            f"a metric reads column {column!r} as floats, and its whole numbers go beyond 2**53, where these run together",
            where=(("column", column), ("row", str(row))),
            hint="subtract a constant or divide them before, or cast them to float64 if that is near enough",
        )
    return array.astype(np.float64, copy=False)


def is_scalar(batch: pa.RecordBatch, column: str) -> bool:
    """Whether the column has one plain value per row (and no vector)."""
    kind = batch.column(column).type
    return not (isinstance(kind, pa.BaseExtensionType) or pa.types.is_nested(kind))


def weights(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A weight for each row: finite float64, none negative."""
    made = numbers(batch, column).astype(np.float64)
    if len(made) and made.min() < 0:
        raise DataError(
            f"the weights in column {column!r} go down to {made.min():.4g}",
            where=(("column", column), ("row", str(int(made.argmin())))),
            hint="weights must not be negative",
        )
    return made


def drop_missing(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    """The rows where the column is neither null nor NaN."""
    import pyarrow.compute as pc

    array = batch.column(column)
    kept = pc.invert(pc.is_null(array, nan_is_null=True))  # type: ignore[attr-defined]
    return batch if kept.true_count == len(kept) else batch.filter(kept)


def classes_of(batch: pa.RecordBatch, column: str, classes: int) -> np.ndarray:
    """A label column as class indexes, int64 in [0, classes)."""
    made = numbers(batch, column)
    if made.dtype == np.int64 and (not len(made) or (made.min() >= 0 and made.max() < classes)):
        return made
    whole = made.astype(np.int64)
    wrong = (whole != made) | (whole < 0) | (whole >= classes)
    if wrong.any():
        raise DataError(
            f"column {column!r} holds the label {made[wrong][0]}, which is no class index from 0 to {classes - 1}",
            where=(("column", column), ("row", str(int(np.flatnonzero(wrong)[0])))),
            hint="map labels to 0, 1, ... in the order of the model's scores",
        )
    return whole


def check_finite(array: np.ndarray, column: str) -> None:
    if np.isfinite(array).all():
        return
    bad = array.size - int(np.isfinite(array).sum())
    raise DataError(
        f"a metric reads column {column!r}, which has {bad} value(s) that are NaN or infinite in {len(array)} rows",
        where=(("column", column),),
        hint=_DROP_HINT,
    )


def checked(array: np.ndarray, what: str) -> np.ndarray:
    """The same array. Raises DataError when a computation went beyond the range of doubles."""
    if not np.isfinite(array).all():
        raise DataError(f"{what} is beyond the range of doubles", hint="scale the columns, or filter extreme rows out")
    return array


def _wrong_type(column: str, kind: pa.DataType, wanted: str) -> DataError:
    return DataError(
        f"a metric needs {wanted} in column {column!r}, which is {kind}",
        where=(("column", column),),
        hint="name another column, or convert this one with map_batches",
    )
