"""What user code returned, made into Arrow columns. The way there is `formats`.

Accepted: dicts of arrays, lists, tensors, Arrow arrays or pandas series; Arrow tables and batches; pandas frames. Rows:
dicts of Python values, NumPy scalars and arrays.

Invariants: an array that the user's code may still write to is copied; a fresh one is taken as it is. A column that keeps
its name and its kind (integer, text, timestamp, ...) in row functions keeps its type, and one whose values all come back as
they were is the input's. Whatever does not fit raises
`Refused`, which the operators turn into a UserCodeError that says where.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.extras import is_instance
from headrace.core.process import end_if_forked
from headrace.core.schemas import decode
from headrace.core.tensors import is_tensor, numpy_to_array
from headrace.worker.declared import NOTHING, Declared
from headrace.worker.formats import Given
from headrace.worker.python_values import described, kept, ragged, torch_to_numpy, values_column
from headrace.worker.refused import Refused

ACCEPTED = "a dict of arrays, an Arrow table or a pandas frame"


def make_batch(columns: Mapping[str, pa.Array], rows: int) -> pa.RecordBatch:
    """A batch of these columns, which may be none: the number of rows is kept all the same."""
    if columns:
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return pa.RecordBatch.from_struct_array(pa.Array.from_buffers(pa.struct([]), rows, [None]))


def with_columns(batch: pa.RecordBatch, made: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` with the columns of `made`: in the place of those of the same name, else after the others."""
    for field, column in zip(made.schema, made.columns, strict=True):
        index = batch.schema.get_field_index(field.name)
        batch = batch.append_column(field, column) if index < 0 else batch.set_column(index, field, column)
    return batch


# --- who else holds a result -----------------------------------------------------------------------------------------
# A model may answer with a buffer that it will write to again. References tell: a fresh result has exactly as many as
# the same code sees on a value that nobody else holds.


def call(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    """(what fn returned, whether somebody else still holds it)."""
    result = fn(*args, **kwargs)
    end_if_forked()
    shared = sys.getrefcount(result) > _FRESH_RESULT
    return result, shared


def _value_references(values: Mapping[Any, Any]) -> list[int]:
    return [sys.getrefcount(v) for v in values.values()]


def _base_references(values: np.ndarray) -> int:
    return sys.getrefcount(values.base)


def _fresh_result() -> int:
    result = dict()  # noqa: C408 - a call, as in `call`
    return sys.getrefcount(result)


_FRESH_RESULT = _fresh_result()
_FRESH_VALUE = _value_references({"": np.empty(1)})[0]
_FRESH_BASE = _base_references(np.empty(4).reshape(2, 2))


def _stable(value: Any, shared: bool) -> Any:
    """The value, or a copy of it if other code may still write to its memory."""
    if not isinstance(value, np.ndarray) or value.dtype.hasobject or not value.flags.writeable:
        return value  # everything else is copied on its way, or immutable
    base = value.base
    if base is not None:
        shared = shared or not isinstance(base, np.ndarray) or base.base is not None
        shared = shared or _base_references(value) > _FRESH_BASE + 1  # `base` is one more
    return value.copy() if shared else value


def _own(column: pa.Array, given: Given) -> pa.Array:
    """The column, or a copy of it if it may be a view of an array that other code writes to (`pa.array(buffer)`).

    Arrow does not tell such memory from its own, so that all that is neither immutable nor of the input is copied.
    """
    if pa.types.is_boolean(column.type) or _is_text(column.type):
        return column  # never made without a copy
    views = [b.address for b in column.buffers() if b is not None and b.is_mutable]
    if not views or given.holds(views):
        return column
    return pa.concat_arrays([column, column.slice(0, 0)])  # of one array alone it would be that array


def _is_text(t: pa.DataType) -> bool:
    return pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_binary(t) or pa.types.is_large_binary(t)


def _unique(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) < len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise Refused(f"returned more than one column {twice!r}", "give each column a name of its own")
    return names


# --- batches ---------------------------------------------------------------------------------------------------------


def columns_of(result: Any, given: Given, shared: bool) -> dict[str, pa.Array]:
    """The named columns of a batch that user code returned. shared: it may still write to it. Raises Refused."""
    if isinstance(result, (pa.RecordBatch, pa.Table)):
        names = _unique(result.schema.names)
        return {name: _own(_one(column), given) for name, column in zip(names, result.columns, strict=True)}
    if isinstance(result, Mapping):
        return _dict_columns(result, given, shared)
    if is_instance(result, "pandas", "DataFrame"):
        result = with_index(result)
        names = _unique([str(name) for name in result.columns])
        return {n: _series(result.iloc[:, i], given.type_of(n), shared) for i, n in enumerate(names)}
    if result is None:
        raise Refused("returned None", f"return {ACCEPTED}; is a return statement missing?")
    raise Refused(f"returned {described(result)}", f"return {ACCEPTED}")


def with_index(frame: Any) -> Any:
    """A pandas frame whose named index levels are columns, as `set_index` and `groupby` make levels of columns."""
    named = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return frame.reset_index(level=named) if named else frame


def batch_of(result: Any, given: Given, shared: bool, declared: Declared = NOTHING) -> pa.RecordBatch:
    """A batch of any number of rows. Raises Refused."""
    columns = columns_of(result, given, shared)
    lengths = {len(c) for c in columns.values()}
    if len(lengths) > 1:
        listed = ", ".join(f"{name!r}: {len(c)}" for name, c in columns.items())
        raise Refused(f"returned columns of different lengths ({listed})", "every column needs one value a row")
    rows = lengths.pop() if lengths else getattr(result, "num_rows", 0)
    return declared.apply(make_batch(columns, rows))


def _dict_columns(result: Mapping[Any, Any], given: Given, shared: bool) -> dict[str, pa.Array]:
    references = _value_references(result)
    out: dict[str, pa.Array] = {}
    for (name, value), count in zip(result.items(), references, strict=True):
        if not isinstance(name, str):
            raise Refused(f"returned a dict with key {name!r}", "column names must be strings")
        out[name] = named_column(name, value, given, shared or count > _FRESH_VALUE)
    return out


def named_column(name: str, value: Any, given: Given, shared: bool) -> pa.Array:
    """The column that one array, list or tensor makes. shared: user code may still write to it. Raises Refused."""
    column = given.column_of(value)
    if column is not None:
        return column
    try:
        value = _stable(value, shared)
        made = column_of(value, None if _is_plain(value) else given.type_of(name))
        return _own(made, given) if isinstance(value, (pa.Array, pa.ChunkedArray)) else made
    except Refused as exc:
        raise Refused(f"returned column {name!r}, {exc}", exc.hint) from exc.__cause__


def _is_plain(value: Any) -> bool:
    """An array whose dtype says all about the column's type."""
    return isinstance(value, np.ndarray) and value.dtype.kind != "O"


def column_of(value: Any, hint: pa.DataType | None = None) -> pa.Array:
    """A column of one value a row. hint: the type to keep if it is of the same kind. Raises Refused."""
    if is_instance(value, "numpy.ma", "MaskedArray"):
        return _masked(value, hint)
    if isinstance(value, np.ndarray):
        if not _is_plain(value):
            return _array_column(value, hint)
        try:
            return numpy_to_array(value)
        except TypeError as exc:
            raise Refused(f"which is {described(value)}: {exc}", "convert it, for example with .astype()") from exc
    if is_instance(value, "torch", "Tensor"):
        return column_of(torch_to_numpy(value), hint)
    if isinstance(value, (pa.Array, pa.ChunkedArray)):
        return _one(value)
    if isinstance(value, (list, tuple)):
        return values_column(value, hint)
    if is_instance(value, "pandas", "Series") or is_instance(value, "pandas", "Index"):
        return _series(value, hint, True)
    if hasattr(value, "__array__") and not np.isscalar(value):
        return column_of(np.array(value), hint)
    raise Refused(f"which is {described(value)}", "give an array or a list with one value a row")


def _masked(values: np.ma.MaskedArray[Any, Any], hint: pa.DataType | None) -> pa.Array:
    """A column with nulls for what is masked."""
    import pyarrow.compute as pc

    made = column_of(np.asarray(values.data), hint)
    mask = np.ma.getmaskarray(values)
    if not mask.any():
        return made
    if values.ndim != 1:
        raise Refused(f"which is {described(values)} with masked values", "a tensor has no missing values: fill them")
    return pc.if_else(pa.array(mask), pa.scalar(None, made.type), made)  # type: ignore[attr-defined]


def _array_column(values: np.ndarray, hint: pa.DataType | None) -> pa.Array:
    """A column of an object array: the user's own choice of one Python object a row."""
    if values.ndim != 1:
        return values_column(list(values), hint)
    present = next((v for v in values if v is not None), None)
    if isinstance(present, np.ndarray) and present.ndim and not (hint is not None and is_tensor(hint)):
        return ragged(list(values), hint)
    return values_column(values.tolist(), hint)


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    column = decode(column)
    if isinstance(column, pa.Array):
        return column
    chunk = column.combine_chunks()
    if isinstance(chunk, pa.ChunkedArray):
        return chunk.chunk(0) if chunk.num_chunks else pa.nulls(0, chunk.type)
    return chunk


def _series(series: Any, hint: pa.DataType | None, shared: bool) -> pa.Array:
    """shared: whoever holds the frame may write to it in place."""
    if series.dtype == object:
        return _array_column(_without_nan(series), hint)
    made = pa.Array.from_pandas(series.copy() if shared else series)
    return _one(made) if isinstance(made, pa.ChunkedArray) else kept(made, hint)


def _without_nan(series: Any) -> np.ndarray:
    """pandas writes a missing object as None or NaN; here it is None."""
    values = series.to_numpy(dtype=object, copy=True)
    values[[isinstance(v, float) and v != v for v in values]] = None
    return values


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_batch(rows: Sequence[Mapping[str, Any]], given: Given, declared: Declared = NOTHING) -> pa.RecordBatch:
    """A batch of rows; a key that some rows lack is null there. Raises Refused."""
    names = list(rows[0]) if rows else []
    lists = _uniform(rows, names)
    if lists is None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        lists = [[row.get(name) for row in rows] for name in names]
    columns: dict[str, pa.Array] = {}
    for name, values in zip(names, lists, strict=True):
        if not isinstance(name, str):
            raise Refused(f"returned a row with key {name!r}", "column names must be strings")
        if not name.isascii():
            _encodable(name)
        columns[name] = _rows_column(name, values, given, declared.type_of(name))
    return declared.apply(make_batch(columns, len(rows)))


def _uniform(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[Any]] | None:
    """The values by name, of dicts that have just these keys; None of other rows."""
    if any(kind is not dict for kind in set(map(type, rows))) or any(count != len(names) for count in set(map(len, rows))):
        return None
    try:
        return [list(map(operator.itemgetter(name), rows)) for name in names]
    except KeyError:
        return None


def _encodable(name: str) -> None:
    """Refuse half a surrogate pair, as `json.loads` makes of a text that was cut."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"returned a row with key {name!r}", "column names must be valid Unicode") from None


def _rows_column(name: str, values: list[Any], given: Given, declared: pa.DataType | None) -> pa.Array:
    """One column of rows: the input's own where all values of it were given back. Raises Refused."""
    before = given.type_of(name)
    mine = declared is None or (before is not None and declared.equals(before))
    column = given.given_back(name, values) if mine else None
    if column is not None:
        return column
    try:
        made = values_column(values, declared or before)
    except Refused as exc:
        column = given.given_back(name, values, compare=True) if mine else None
        if column is not None:
            return column
        raise Refused(f"returned column {name!r}, {exc}", exc.hint) from exc.__cause__
    if mine and before is not None and not made.type.equals(before):
        column = given.given_back(name, values, compare=True)
    return made if column is None else column


def fitting_rows(
    rows: Sequence[Mapping[str, Any]], given: Given, declared: Declared = NOTHING
) -> tuple[pa.RecordBatch | None, dict[int, Refused]]:
    """(a batch of all rows that go together, why each of the others does not). None: there is no such row.

    Rows that are refused alone, and then those whose types are not the most frequent ones'.
    """
    try:
        return (rows_batch(rows, given, declared), {}) if rows else (None, {})
    except Refused:
        pass
    refused: dict[int, Refused] = {}
    alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, row in enumerate(rows):
        try:
            schema = rows_batch([row], given.at([i]), declared).schema
        except Refused as exc:
            refused[i] = exc
        else:
            alike.setdefault(tuple((f.name, str(f.type)) for f in schema), []).append(i)
    kept: list[int] = []
    for group in sorted(alike.values(), key=lambda g: (-len(g), g[0])):
        kept = _admitted(rows, given, declared, kept, group, refused)
    return (rows_batch([rows[i] for i in kept], given.at(kept), declared) if kept else None), refused


def _admitted(
    rows: Sequence[Mapping[str, Any]],
    given: Given,
    declared: Declared,
    kept: list[int],
    group: list[int],
    refused: dict[int, Refused],
) -> list[int]:
    """`kept` and those of `group` that go together with them."""
    both = sorted(kept + group)
    try:
        rows_batch([rows[i] for i in both], given.at(both), declared)
        return both
    except Refused as exc:
        if len(group) == 1:
            refused[group[0]] = exc
            return kept
    half = len(group) // 2
    kept = _admitted(rows, given, declared, kept, group[:half], refused)
    return _admitted(rows, given, declared, kept, group[half:], refused)
