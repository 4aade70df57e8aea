"""Custom: a user's class with three methods as a metric.

Invariant: nothing is pickled. A state is the instance's attributes as JSON, exact for whole numbers, floats, texts, bytes and
NumPy arrays; what can't be told exactly is refused by name.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import PlanError, UserCodeError
from headrace.core.tensors import fixed_list_to_numpy, is_ragged, is_tensor, ragged_to_numpy, tensor_to_numpy
from headrace.metrics.base import Metric, State

_METHODS = ("update", "merge", "result")
_HINT = "keep numbers, texts, bytes, lists, tuples, sets, dicts and NumPy arrays as attributes"


@dataclass(frozen=True, slots=True, init=False)
class Custom(Metric):
    """A metric of your own: `hr.metrics.Custom(MyMetric, columns=["score", "label"], threshold=0.5)`.

    metric: a class, constructed with `params`, whose methods are
    `update(self, batch)`: add a batch, a dict of read-only NumPy arrays of `columns` (nulls as in map_batches: NaN, or None in
    arrays of objects);
    `merge(self, other)`: add what `other`, an instance of the same class, has seen;
    `result(self)`: numbers, texts, lists and dicts of them.
    Its attributes are its state: None, booleans, numbers, texts, bytes, lists, tuples, sets, dicts and NumPy arrays of these,
    small, since they are written with every batch. Any order of rows and merges should give the same result: where the last
    bits of floats matter, add whole numbers. `__init__` is called for the state of no rows, and not when one is read.
    by, max_groups: as of every metric.
    Raises PlanError for a class without these methods or with other attributes; UserCodeError when they appear later.
    """

    metric: type
    params: Mapping[str, Any]
    reads: tuple[str, ...]

    def __init__(
        self,
        metric: type,
        columns: str | Sequence[str],
        *,
        by: str | Sequence[str] | None = None,
        max_groups: int = 1000,
        **params: Any,
    ) -> None:
        for name, value in (
            ("metric", metric),
            ("params", params),
            ("reads", (columns,) if isinstance(columns, str) else tuple(columns)),
            ("by", by),
            ("max_groups", max_groups),
        ):
            object.__setattr__(self, name, value)
        Metric.__post_init__(self)
        if not isinstance(metric, type):
            raise PlanError(f"Custom needs a class, not {metric!r}", hint="give the class itself; parameters follow by name")
        if missing := [name for name in _METHODS if not callable(getattr(metric, name, None))]:
            raise PlanError(f"{metric.__name__} has no method {missing[0]}", hint="a metric has update, merge and result")
        try:
            self._zero()
        except UserCodeError as error:
            raise PlanError(error.message, hint=error.hint) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.metric, self.reads, self.by, self.max_groups, dict(self.params))

    @property
    def _name(self) -> str:
        return self.metric.__name__ if isinstance(self.metric, type) else "Custom"

    def _reads(self) -> tuple[str, ...]:
        return self.reads

    def _zero(self) -> State:
        return self._write(self.metric(**self.params))

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        mine = self._made(state)
        mine.update({name: _arrays(batch.column(name)) for name in self.reads})
        return self._write(mine)

    def _merge(self, a: State, b: State) -> State:
        mine = self._made(a)
        mine.merge(self._made(b))
        return self._write(mine)

    def _result(self, state: State) -> Any:
        return plain(self._made(state).result(), f"the result of {self._name}")

    def _made(self, state: State) -> Any:
        made = object.__new__(self.metric)
        made.__dict__.update({name: decode(value) for name, value in state.items()})
        return made

    def _write(self, instance: Any) -> State:
        if not hasattr(instance, "__dict__"):
            raise UserCodeError(f"{self._name} has __slots__ instead of attributes", hint="leave __slots__ out")
        return {name: encode(value, f"attribute {name!r} of {self._name}") for name, value in vars(instance).items()}


def _remade(metric: type, reads: tuple[str, ...], by: Any, max_groups: int, params: dict[str, Any]) -> Custom:
    return Custom(metric, reads, by=by, max_groups=max_groups, **params)


def _arrays(column: pa.Array) -> np.ndarray:
    kind = column.type
    if isinstance(column, pa.DictionaryArray):
        return _arrays(column.dictionary_decode())
    if is_tensor(kind):
        made = tensor_to_numpy(column)
    elif is_ragged(kind):
        made = ragged_to_numpy(column)
    elif pa.types.is_fixed_size_list(kind) and not column.null_count and not column.flatten().null_count:
        made = fixed_list_to_numpy(column)
    else:
        made = column.to_numpy(zero_copy_only=False)
    made.setflags(write=False)
    return made


# ---------------------------------------------------------------- attributes as JSON


def encode(value: Any, what: str) -> Any:
    """JSON of a value. Dicts with one key that begins with "$" stand for what JSON lacks. Raises UserCodeError."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [encode(item, what) for item in value]
    if kind is dict:
        return _encode_dict(value, what)
    if kind is tuple:
        return {"$tuple": [encode(item, what) for item in value]}
    if kind in (set, frozenset):
        return {f"${kind.__name__}": sorted((encode(item, what) for item in value), key=repr)}
    if kind is bytes:
        return {"$bytes": _text(value)}
    if (kind is np.ndarray or isinstance(value, np.generic)) and not value.dtype.hasobject and value.dtype.names is None:
        data = _text(np.ascontiguousarray(value).tobytes())
        if isinstance(value, np.generic):
            return {"$scalar": [value.dtype.str, data]}
        return {"$array": [value.dtype.str, list(value.shape), data]}
    raise UserCodeError(f"{what} holds a {kind.__module__}.{kind.__qualname__}, which a metric's state can't keep", hint=_HINT)


def _encode_dict(value: dict[Any, Any], what: str) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, what) for key, item in value.items()}
    return {"$dict": [[encode(key, what), encode(item, what)] for key, item in value.items()]}


def decode(value: Any) -> Any:
    """What `encode` was given. Arrays are writable."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value)) if len(value) == 1 else ""
    body: Any = value.get(mark)
    match mark:
        case "$float":
            return float(body)
        case "$dict":
            return {decode(key): decode(item) for key, item in body}
        case "$tuple":
            return tuple(decode(item) for item in body)
        case "$set":
            return {decode(item) for item in body}
        case "$frozenset":
            return frozenset(decode(item) for item in body)
        case "$bytes":
            return base64.b64decode(body)
        case "$scalar":
            return np.frombuffer(base64.b64decode(body[1]), body[0])[0]
        case "$array":
            return np.frombuffer(base64.b64decode(body[2]), body[0]).reshape(body[1]).copy()
    return {key: decode(item) for key, item in value.items()}


def plain(value: Any, what: str) -> Any:
    """A result as JSON has it: NumPy's numbers and arrays as Python's, tuples as lists, keys as texts. Raises UserCodeError."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, what) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what) for item in value]
    raise UserCodeError(f"{what} holds a {type(value).__name__}", hint="return numbers, texts, lists and dicts of them")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
