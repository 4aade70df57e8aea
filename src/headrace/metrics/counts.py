"""Count, Sum, Mean, Min and Max."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.metrics import sums
from headrace.metrics.base import Metric, State
from headrace.metrics.columns import drop_missing, numbers, values
from headrace.metrics.means import MeanMetric


@dataclass(frozen=True, slots=True)
class Count(Metric):
    """The number of rows. Of a column: a DataError when it has nulls, unless skip_nulls, which counts the others (not NaN)."""

    column: str | None = None
    skip_nulls: bool = False

    def _reads(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def _zero(self) -> State:
        return {"rows": 0}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        if self.column is not None:
            batch = drop_missing(batch, self.column) if self.skip_nulls else batch
            values(batch, self.column)  # refuses nulls
        state["rows"] += batch.num_rows
        return state

    def _merge(self, a: State, b: State) -> State:
        a["rows"] += b["rows"]
        return a

    def _result(self, state: State) -> int:
        return state["rows"]


@dataclass(frozen=True, slots=True)
class Mean(MeanMetric):
    """The mean of a numeric or boolean column, correctly rounded; NaN of no rows. Decimals are read as floats.

    Raises DataError for nulls, NaN and infinite values. skip_nulls: rows that are null or NaN are left out.
    """

    column: str
    skip_nulls: bool = False

    def _reads(self) -> tuple[str, ...]:
        return (self.column,)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        batch = drop_missing(batch, self.column) if self.skip_nulls else batch
        return self._add(state, batch, numbers(batch, self.column))


@dataclass(frozen=True, slots=True)
class Sum(Mean):
    """The sum of a numeric or boolean column, correctly rounded: an int of whole numbers without weights, else a float; 0 of no
    rows. Raises DataError for nulls, NaN and infinite values. skip_nulls: rows that are null or NaN are left out.
    """

    def _zero(self) -> State:
        return {"rows": 0, "sum": "0", "whole": True}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        state = Mean._update(self, state, batch)
        kind = batch.schema.field(self.column).type
        whole = not (pa.types.is_floating(kind) or pa.types.is_decimal(kind))
        state["whole"] = state["whole"] and self.weight is None and whole
        return state

    def _merge(self, a: State, b: State) -> State:
        a = Mean._merge(self, a, b)
        a["whole"] = a["whole"] and b["whole"]
        return a

    def _result(self, state: State) -> int | float:
        return sums.decode(state["sum"]) >> sums.SCALE_BITS if state["whole"] else sums.number(state["sum"])


@dataclass(frozen=True, slots=True)
class _Extreme(Metric):
    column: str
    skip_nulls: bool = False

    def _reads(self) -> tuple[str, ...]:
        return (self.column,)

    def _zero(self) -> State:
        return {"value": None}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        found = numbers(drop_missing(batch, self.column) if self.skip_nulls else batch, self.column)
        if len(found):
            state["value"] = self._choose([*self._held(state), self._of(found) + 0])  # + 0: -0.0 is 0.0, in any order
        return state

    def _merge(self, a: State, b: State) -> State:
        held = [*self._held(a), *self._held(b)]
        a["value"] = self._choose(held) if held else None
        return a

    def _result(self, state: State) -> int | float:
        return float("nan") if state["value"] is None else state["value"]

    @staticmethod
    def _held(state: State) -> list[Any]:
        return [] if state["value"] is None else [state["value"]]

    def _choose(self, found: list[Any]) -> Any:
        raise NotImplementedError

    def _of(self, found: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Min(_Extreme):
    """The smallest value of a numeric or boolean column, int or float as the column is; NaN of no rows.

    Raises DataError for nulls, NaN and infinite values. skip_nulls: rows that are null or NaN are left out.
    """

    def _choose(self, found: list[Any]) -> Any:
        return min(found)

    def _of(self, found: Any) -> Any:
        return found.min().item()


@dataclass(frozen=True, slots=True)
class Max(_Extreme):
    """The largest value of a numeric or boolean column, int or float as the column is; NaN of no rows.

    Raises DataError for nulls, NaN and infinite values. skip_nulls: rows that are null or NaN are left out.
    """

    def _choose(self, found: list[Any]) -> Any:
        return max(found)

    def _of(self, found: Any) -> Any:
        return found.max().item()
