"""Columns as lists of Python values, and lists of Python values as columns.

Invariants: no value is cut on its way, in either direction. One that Python has no exact type for (a time of day not on a whole
microsecond, a date after the year 9999, a text that is no UTF-8) is shown as its Arrow scalar: it passes through functions that
do not look at it, and fails in those that do.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.extras import is_instance
from headrace.core.schemas import cast
from headrace.core.tensors import (
    arrow_type,
    is_ragged,
    numpy_to_array,
    promoted,
    ragged_to_array,
    texts_to_array,
    vector_to_numpy,
)
from headrace.worker.casting import widens
from headrace.worker.refused import Refused

_t = pa.types
_CUT = frozenset((np.float16, np.longdouble))
_DAYS = np.dtype("M8[D]")
_PLAIN = {int: np.dtype(np.int64), float: np.dtype(np.float64), bool: np.dtype(np.bool_)}
_PANDAS_PAYS = 2 << 20  # values, and 64 bytes of text count for one
_made_here = 0  # in this process
_MOST_ITEMS = (1 << 31) - 1  # of all lists of a column, whose offsets are int32
UNSHOWN = (pa.ArrowException, OverflowError, ValueError)  # what Arrow raises for a value that it can't convert
_UNMADE = (ValueError, TypeError, pa.ArrowNotImplementedError, OverflowError)  # UnicodeEncodeError: of half a surrogate pair


# --- from columns ----------------------------------------------------------------------------------------------------


def python_values(column: pa.Array) -> list[Any]:
    """The values of a column, None for null; as Arrow scalars those that Python can't hold."""
    try:
        values = column.to_pylist()
    except UNSHOWN:
        values = [_python_value(scalar) for scalar in column]
    return _with_nanoseconds(values, column) if _contains(column.type, _is_time_ns) else values


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UNSHOWN:
        return scalar


def _with_nanoseconds(values: list[Any], column: pa.Array) -> list[Any]:
    """With the times of day that Arrow has cut to microseconds as they are."""
    try:
        made = pa.array(values, column.type)
    except _UNMADE:
        return list(column)
    if made.equals(column):
        return values
    exact = (made.slice(i, 1).equals(column.slice(i, 1)) for i in range(len(column)))
    return [value if same else scalar for value, scalar, same in zip(values, column, exact, strict=True)]


def _is_time_ns(type: pa.DataType) -> bool:
    return _t.is_time64(type) and type.unit == "ns"


def _contains(type: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    if isinstance(type, pa.BaseExtensionType):
        return _contains(type.storage_type, test)
    if _t.is_dictionary(type) or _t.is_run_end_encoded(type):
        return _contains(type.value_type, test)
    if _t.is_nested(type):
        return any(_contains(type.field(i).type, test) for i in range(type.num_fields))
    return test(type)


# --- to columns ------------------------------------------------------------------------------------------------------


def values_column(values: Sequence[Any], hint: pa.DataType | None = None) -> pa.Array:
    """A column of Python values, NumPy scalars, arrays or tensors. hint: kept if the values are of its kind."""
    present = next((v for v in values if v is not None), None)
    if present is None:
        return pa.nulls(len(values), hint)
    if is_instance(present, "torch", "Tensor"):
        values = [v if v is None else torch_to_numpy(v) for v in values]
        present = next(v for v in values if v is not None)
    if isinstance(present, np.ndarray) and present.ndim:
        return _tensors(values, hint)
    try:
        return kept(_made(values, hint), hint)
    except _UNMADE as exc:
        scalars = [isinstance(v, pa.Scalar) for v in values]
        if any(scalars) and not all(scalars):
            return _with_scalars(values, np.array(scalars), hint)
        raise Refused(f"whose values don't make a column: {exc}", "give values of one type, or None") from exc


def _made(values: Sequence[Any], hint: pa.DataType | None) -> pa.Array:
    """Of the type that the values tell; that of maps, whose pairs do not tell it, is the hint's."""
    if hint is not None and _t.is_nested(hint) and _contains_map(hint):
        made = _nested(values, hint)
        if made is not None:
            return made
    made = _plain(values)
    if made is not None:
        return made
    made = _inferred(values)
    if _t.is_date(made.type) and "pandas" in sys.modules:  # Arrow takes NaT for the year 1
        import pandas as pd

        if any(v is pd.NaT for v in values):
            return _made([None if v is pd.NaT else v for v in values], hint)
    if _contains(made.type, _t.is_integer) and not _CUT.isdisjoint(_kinds(values)):
        made = pa.array([_as_floats(v) for v in values])
    check_kinds(values, made.type)
    if "pandas" in sys.modules and _contains(made.type, _is_clock) and _have_nanoseconds(values):
        return pa.array(values, _in_nanoseconds(made.type))
    return made


def _plain(values: Sequence[Any], levels: int = 5) -> pa.Array | None:
    """What Arrow makes of values of one of Python's own kinds, of lists of such and of dicts; None of others, and once pandas
    is there: Arrow's first call imports it wherever it is installed, 0.2 s in each process, but is quicker then than this.
    levels: of nesting, at most. (A list that holds itself has no end.)
    """
    global _made_here
    if "pandas" in sys.modules or _made_here > _PANDAS_PAYS:
        return None
    _made_here += len(values)
    kinds = set(map(type, values))
    nulls = type(None) in kinds
    kinds.discard(type(None))
    kind = kinds.pop() if len(kinds) == 1 else object
    dtype = _PLAIN.get(kind)
    if dtype is None and (kind is not str) and (kind not in _NESTED or not levels):
        return None
    there = np.fromiter((v is not None for v in values), np.bool_, len(values)) if nulls else None
    if there is not None:
        values = [v if v is not None else kind() for v in values]
    try:
        if dtype is not None:
            made = numpy_to_array(np.fromiter(values, dtype, len(values)))
        else:
            make = texts_to_array if kind is str else functools.partial(_NESTED[kind], levels=levels - 1)
            made = make(values)
            if kind is str and made is not None:
                _made_here += made.nbytes >> 6
    except (OverflowError, UnicodeEncodeError):
        return None
    return made if made is None or there is None else _where(there, made)


def _plain_lists(values: Sequence[list[Any]], levels: int) -> pa.Array | None:
    items = list(itertools.chain.from_iterable(values))
    made = _plain_or_null(items, levels)
    if made is None or len(items) > _MOST_ITEMS:
        return None
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), out=ends[1:])
    return pa.Array.from_buffers(pa.list_(made.type), len(values), [None, pa.py_buffer(ends)], children=[made])


def _plain_dicts(values: Sequence[dict[Any, Any]], levels: int) -> pa.Array | None:
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    if not names or set(map(type, names)) != {str}:
        return None
    made: list[pa.Array] = []
    for name in names:
        child = _plain_or_null([v.get(name) for v in values], levels)
        if child is None:
            return None
        made.append(child)
    fields = [pa.field(name, child.type) for name, child in zip(names, made, strict=True)]
    return pa.Array.from_buffers(pa.struct(fields), len(values), [None], children=made)


def _plain_or_null(values: list[Any], levels: int) -> pa.Array | None:
    return pa.nulls(len(values)) if all(v is None for v in values) else _plain(values, levels)


_NESTED: dict[type, Callable[..., pa.Array | None]] = {list: _plain_lists, dict: _plain_dicts}


def _where(there: np.ndarray, made: pa.Array) -> pa.Array:
    """The array, null elsewhere."""
    bits = pa.py_buffer(np.packbits(there, bitorder="little"))
    children = [made.values] if _t.is_list(made.type) else [made.field(i) for i in range(made.type.num_fields)]
    buffers = made.buffers()[1 : made.type.num_buffers]
    return pa.Array.from_buffers(made.type, len(made), [bits, *buffers], children=children)


def _inferred(values: Sequence[Any]) -> pa.Array:
    """Days of NumPy are dates; Arrow makes them of an array of such, but not of scalars."""
    try:
        return pa.array(values)
    except TypeError:
        if {v.dtype for v in values if isinstance(v, np.datetime64)} != {_DAYS}:
            raise
        return pa.array([v.item() if isinstance(v, np.datetime64) else v for v in values])


def _kinds(values: Iterable[Any]) -> set[type]:
    """The types of the values, however deep. Arrow cuts floats of `_CUT` to integers among such."""
    values = list(values)
    kinds = set(map(type, values))
    if kinds.isdisjoint((dict, list, tuple)):
        return kinds
    inner = (v.values() if isinstance(v, dict) else v for v in values if isinstance(v, (dict, list, tuple)))
    return kinds | _kinds(itertools.chain.from_iterable(inner))


def _as_floats(value: Any) -> Any:
    if type(value) in _CUT:
        return float(value)
    if isinstance(value, dict):
        return {key: _as_floats(v) for key, v in value.items()}
    return [_as_floats(v) for v in value] if isinstance(value, (list, tuple)) else value


def _may_change(type: pa.DataType) -> bool:
    return _t.is_date(type) or _t.is_timestamp(type) or _t.is_binary(type)


def check_kinds(values: Iterable[Any], type: pa.DataType) -> None:
    """type: what Arrow inferred. It makes dates of datetimes behind a date, and bytes of texts beside bytes, and shifts times
    with a zone among those without, and the other way round. Raises Refused.
    """
    if not _contains(type, _may_change):
        return
    if _t.is_struct(type):
        rows = [v for v in values if isinstance(v, dict)]
        for field in type:
            check_kinds((row.get(field.name) for row in rows), field.type)
    elif _is_list(type):
        check_kinds(itertools.chain.from_iterable(v for v in values if v is not None), type.value_type)
    elif _t.is_timestamp(type):
        zoned = {v.tzinfo is not None for v in values if isinstance(v, datetime.datetime) and v == v}  # NaT is neither
        if len(zoned) > 1:
            raise Refused("whose times are some with a time zone and some without", "give times of one kind, or None")
    elif _may_change(type):
        other = datetime.datetime if _t.is_date(type) else str
        if any(issubclass(kind, other) for kind in set(map(operator.attrgetter("__class__"), values))):
            what = "dates and some datetimes" if _t.is_date(type) else "bytes and some texts"
            raise Refused(f"whose values are some {what}", "give values of one type, or None")


def _with_scalars(values: Sequence[Any], scalars: np.ndarray, hint: pa.DataType | None) -> pa.Array:
    """Values among which some were shown as Arrow scalars: those are taken as they are. Raises Refused."""
    import pyarrow.compute as pc

    shown = pa.array([v if scalar else None for v, scalar in zip(values, scalars, strict=True)])
    others = [None if scalar else v for v, scalar in zip(values, scalars, strict=True)]
    made = values_column(others, shown.type)
    if not made.type.equals(shown.type):
        raise Refused(f"whose values are some {shown.type} and some {made.type}", "give values of one type, or None")
    return kept(pc.if_else(pa.array(scalars), shown, made), hint)  # type: ignore[attr-defined]


def _contains_map(type: pa.DataType) -> bool:
    if _t.is_map(type):
        return True
    plain = _t.is_struct(type) or _is_list(type)
    return plain and any(_contains_map(type.field(i).type) for i in range(type.num_fields))


def _nested(values: Sequence[Any], hint: pa.DataType) -> pa.Array | None:
    """Values of the form of `hint`, which holds maps, put together from columns of their leaves. None: of another form."""
    null = [v is None for v in values]
    mask = pa.array(null)
    present = [v for v in values if v is not None]
    if _t.is_struct(hint):
        names = [field.name for field in hint]
        if len(names) > len(set(names)) or not all(isinstance(v, dict) and v.keys() <= set(names) for v in present):
            return None
        children = [values_column([None if v is None else v.get(f.name) for v in values], f.type) for f in hint]
        fields = [pa.field(name, child.type) for name, child in zip(names, children, strict=True)]
        return pa.StructArray.from_arrays(children, fields=fields, mask=mask)
    if not all(isinstance(v, (list, tuple)) for v in present):
        return None
    flat = list(itertools.chain.from_iterable(present))
    ends = itertools.accumulate((len(v) if v is not None else 0 for v in values), initial=0)
    offsets = pa.array(ends, pa.int32())
    if not _t.is_map(hint):
        return pa.ListArray.from_arrays(offsets, values_column(flat, hint.value_type), mask=mask)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in flat):
        return None
    keys = values_column([key for key, _ in flat], hint.key_type)
    items = values_column([item for _, item in flat], hint.item_type)
    return pa.MapArray.from_arrays(offsets, keys, items, pa.map_(keys.type, items.type, hint.keys_sorted), mask=mask)


# Arrow makes microseconds of pandas' timestamps, which are what it shows nanoseconds as.


def _is_clock(type: pa.DataType) -> bool:
    return _t.is_timestamp(type) or _t.is_duration(type)


def _have_nanoseconds(values: Iterable[Any]) -> bool:
    """Whether there are pandas' timestamps or durations in nanoseconds among the values, however deep."""
    import pandas as pd

    values = list(values)
    kinds = set(map(type, values))
    clocks = tuple(kind for kind in kinds if issubclass(kind, (pd.Timestamp, pd.Timedelta)))
    if clocks and any(v.unit == "ns" for v in values if isinstance(v, clocks)):
        return True
    inner = (v.values() if isinstance(v, dict) else v for v in values if isinstance(v, (dict, list, tuple)))
    return not kinds.isdisjoint((dict, list, tuple)) and any(map(_have_nanoseconds, inner))


def _in_nanoseconds(made: pa.DataType) -> pa.DataType:
    """A type that Arrow inferred, with nanoseconds in the place of longer units."""
    if _t.is_timestamp(made):
        return pa.timestamp("ns", made.tz)
    if _t.is_duration(made):
        return pa.duration("ns")
    if _t.is_list(made):
        return pa.list_(_in_nanoseconds(made.value_type))
    if _t.is_struct(made):
        return pa.struct([pa.field(f.name, _in_nanoseconds(f.type)) for f in made])
    return made


# --- arrays ----------------------------------------------------------------------------------------------------------


def torch_to_numpy(tensor: Any) -> np.ndarray:
    """An array of its own memory; bfloat16 as float32."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    on_host = tensor.device.type == "cpu"
    array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array.copy() if on_host else array  # torch code that reuses its buffers must not change our columns


def _tensors(values: Sequence[Any], hint: pa.DataType | None) -> pa.Array:
    arrays = _of_one_dtype([None if v is None else np.asarray(v) for v in values])
    first = next(a for a in arrays if a is not None)
    same = all(a is not None and a.shape == first.shape and a.dtype == first.dtype for a in arrays)
    if same and not (hint is not None and (is_ragged(hint) or _is_list(hint))) and not first.dtype.hasobject:
        try:
            return numpy_to_array(np.stack(arrays))  # pyright: ignore[reportArgumentType, reportCallIssue]
        except TypeError as exc:
            raise Refused(f"whose values are {described(first)}: {exc}", "convert them, for example with .astype()") from exc
    return ragged(arrays, hint)


def ragged(values: list[Any], hint: pa.DataType | None) -> pa.Array:
    """Arrays that differ in shape: lists when they are vectors, ragged tensors otherwise."""
    arrays = _of_one_dtype([None if v is None else np.asarray(v) for v in values])
    vectors = all(a is None or a.ndim == 1 for a in arrays)
    numeric = all(a is None or a.dtype.kind == "b" or arrow_type(a.dtype) is not None for a in arrays)
    try:
        if numeric and not (vectors and not (hint is not None and is_ragged(hint))):
            return ragged_to_array(arrays)
        plain = [a if a is None or (a.ndim == 1 and a.dtype.kind not in "SU") else a.tolist() for a in arrays]
        return kept(pa.array(plain), hint)
    except _UNMADE as exc:
        raise Refused(f"whose arrays don't make a column: {exc}", "give arrays of one number type") from exc


def _of_one_dtype(arrays: list[Any]) -> list[Any]:
    """The arrays, their numbers brought together as they are between blocks: a block's type is not to depend on how rows were
    cut. Raises Refused for a number that has no equal among the wider ones.
    """
    dtypes = dict.fromkeys(a.dtype for a in arrays if a is not None)
    if len(dtypes) < 2:
        return arrays
    types = [arrow_type(dtype) for dtype in dtypes]
    met = functools.reduce(lambda a, b: None if a is None or b is None else promoted(a, b), types)
    if met is None:
        return arrays
    try:
        return [None if a is None else _as_numbers(a, met) for a in arrays]
    except pa.ArrowInvalid as exc:
        raise Refused(f"whose arrays don't make a column: {exc}", "give arrays of one number type") from exc


def _as_numbers(array: np.ndarray, type: pa.DataType) -> np.ndarray:
    if arrow_type(array.dtype) == type:
        return array
    return vector_to_numpy(numpy_to_array(array.reshape(-1)).cast(type)).reshape(array.shape)


# --- types -----------------------------------------------------------------------------------------------------------


def kept(made: pa.Array, hint: pa.DataType | None) -> pa.Array:
    """The column in the type it had before, if that is of the same kind and takes the values."""
    if hint is None or made.type.equals(hint) or not _is_kind_of(made.type, hint):
        return made
    if _t.is_integer(made.type) and _t.is_floating(hint):
        return made
    try:
        return cast(made, hint)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return made


def _is_kind_of(made: pa.DataType, hint: pa.DataType) -> bool:
    """As `widens`, but that a float is of the kind of narrower ones, too, a value of that of its dictionaries, and tensors only
    of that of their own numbers.
    """
    if isinstance(made, pa.BaseExtensionType) or isinstance(hint, pa.BaseExtensionType):
        return made.equals(hint) or (widens(made, hint) and made.value_type.equals(hint.value_type))
    if _t.is_dictionary(hint) and not _t.is_dictionary(made):
        return _is_kind_of(made, hint.value_type)
    if _is_list(made) and _is_list(hint):
        return _is_kind_of(made.value_type, hint.value_type)
    if _t.is_struct(made) and _t.is_struct(hint):
        same = [f.name for f in made] == [f.name for f in hint]
        return same and all(_is_kind_of(a.type, b.type) for a, b in zip(made, hint, strict=True))
    return (_t.is_floating(made) and _t.is_floating(hint)) or widens(made, hint)


def _is_list(type: pa.DataType) -> bool:
    return _t.is_list(type) or _t.is_large_list(type) or _t.is_fixed_size_list(type)


def described(value: Any) -> str:
    """The value's type, for messages."""
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
