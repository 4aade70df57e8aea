"""Quantiles and DistinctCount: Apache DataSketches (extra `sketches`), whose bytes are base64 text in the state.

KLL sketches (Karnin, Lang, Liberty, "Optimal quantile approximation in streams", 2016) take random choices: two runs agree
within the error bound, not to the bit. CPC sketches (Lang, "Back to the future: an even more nearly optimal cardinality
estimation algorithm", 2017) are a function of the set of values; the estimate is always that of a union, so that it does
not depend on the order of rows or merges either.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.core.extras import require
from headrace.core.tensors import vector_to_numpy
from headrace.metrics.base import Metric, State
from headrace.metrics.columns import drop_missing, numbers, values


@dataclass(frozen=True, slots=True)
class _Sketch(Metric):
    """A state is {"sketch": base64 text}, "" of no rows."""

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        require("sketches", self._name)

    def _zero(self) -> State:
        return {"sketch": ""}


@dataclass(frozen=True, slots=True)
class Quantiles(_Sketch):
    """Approximate quantiles of a numeric column (nearest rank, values that occur): {"0.5": value}, or the value alone when
    `q` is one number; NaN of no rows. Needs headrace[sketches].

    k: the sketch's size, 8 to 65535. The rank of a value is within about 2.3 / k**0.9 of the one asked for in 99 of 100
    runs: 0.35 % for the default, whose state is 25 kB. Runs agree within that bound, not to the bit. 0 and 1 are exact.
    Raises DataError for nulls, NaN and infinite values. skip_nulls: rows that are null or NaN are left out.
    """

    column: str
    q: float | Sequence[float] = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    k: int = 800
    skip_nulls: bool = False

    def __post_init__(self) -> None:
        _Sketch.__post_init__(self)
        if not isinstance(self.q, int | float):
            object.__setattr__(self, "q", tuple(float(q) for q in self.q))
        if not all(0.0 <= q <= 1.0 for q in self._ranks()):
            raise PlanError(f"Quantiles: q is {self.q!r}", hint="quantiles are numbers from 0 to 1")
        if not 8 <= self.k <= 65535:
            raise PlanError(f"Quantiles: k is {self.k}", hint="k is from 8 to 65535")

    def _ranks(self) -> list[float]:
        return [float(self.q)] if isinstance(self.q, int | float) else list(self.q)

    def _reads(self) -> tuple[str, ...]:
        return (self.column,)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        found = numbers(drop_missing(batch, self.column) if self.skip_nulls else batch, self.column)
        if len(found):
            sketch = self._load(state)
            sketch.update(found.astype(np.float64))
            state["sketch"] = _text(sketch.serialize())
        return state

    def _merge(self, a: State, b: State) -> State:
        if b["sketch"]:
            sketch = self._load(a)
            sketch.merge(self._load(b))
            a["sketch"] = _text(sketch.serialize())
        return a

    def _result(self, state: State) -> Any:
        ranks = self._ranks()
        found = [math.nan] * len(ranks)
        if state["sketch"]:
            sketch = self._load(state)
            ends = {0.0: sketch.get_min_value(), 1.0: sketch.get_max_value()}  # these are exact
            found = [ends.get(q, at) for q, at in zip(ranks, sketch.get_quantiles(ranks, True), strict=True)]
        if isinstance(self.q, int | float):
            return found[0]
        return {str(q): value for q, value in zip(ranks, found, strict=True)}

    def _load(self, state: State) -> Any:
        from datasketches import kll_doubles_sketch  # pyright: ignore[reportAttributeAccessIssue]

        kept = state["sketch"]
        return kll_doubles_sketch.deserialize(base64.b64decode(kept)) if kept else kll_doubles_sketch(self.k)


@dataclass(frozen=True, slots=True)
class DistinctCount(_Sketch):
    """About how many distinct values a column has: an int. Needs headrace[sketches].

    Numbers, texts, booleans, dates, times, decimals and bytes. lg_k: the sketch's size, 4 to 26. The standard error is about
    0.69 / 2**(lg_k / 2), 1.1 % for the default, whose state is at most 4 kB. Small counts are nearly exact.
    Raises DataError for nulls. skip_nulls: rows that are null or NaN are left out.
    """

    column: str
    lg_k: int = 12
    skip_nulls: bool = False

    def __post_init__(self) -> None:
        _Sketch.__post_init__(self)
        if not 4 <= self.lg_k <= 26:
            raise PlanError(f"DistinctCount: lg_k is {self.lg_k}", hint="lg_k is from 4 to 26")

    def _reads(self) -> tuple[str, ...]:
        return (self.column,)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        from datasketches import cpc_sketch  # pyright: ignore[reportAttributeAccessIssue]

        batch = drop_missing(batch, self.column) if self.skip_nulls else batch
        sketch = cpc_sketch(self.lg_k)
        for value in _hashable(values(batch, self.column), self.column):
            sketch.update(value)
        return self._join(state, _text(sketch.serialize()))

    def _merge(self, a: State, b: State) -> State:
        return self._join(a, b["sketch"]) if b["sketch"] else a

    def _join(self, state: State, other: str) -> State:
        union = self._union([state["sketch"], other])
        state["sketch"] = _text(union.get_result().serialize())
        return state

    def _result(self, state: State) -> int:
        return round(self._union([state["sketch"]]).get_result().get_estimate()) if state["sketch"] else 0

    def _union(self, sketches: Iterable[str]) -> Any:
        from datasketches import cpc_sketch, cpc_union  # pyright: ignore[reportAttributeAccessIssue]

        union = cpc_union(self.lg_k)
        for text in sketches:
            if text:
                union.update(cpc_sketch.deserialize(base64.b64decode(text)))
        return union


def _hashable(array: pa.Array, column: str) -> Iterable[int | float | str]:
    """The distinct values of a batch, as sketches take them: whole numbers of any type are the same where they are equal."""
    kind = array.type
    if pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType):
        raise DataError(
            f"DistinctCount can't compare values of column {column!r}, which is {kind}",
            where=(("column", column),),
            hint="count a column of numbers, texts or dates",
        )
    found = array.unique()
    if pa.types.is_boolean(kind):
        return found.cast(pa.int8()).to_pylist()
    if pa.types.is_floating(kind):
        return (vector_to_numpy(found).astype(np.float64) + 0.0).tolist()  # + 0.0: -0.0 is 0.0
    if pa.types.is_integer(kind):
        return vector_to_numpy(found).astype(np.int64).tolist()  # of uint64 the same bits: as many are distinct
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return (value.hex() for value in found.to_pylist())
    return map(str, found.to_pylist())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
