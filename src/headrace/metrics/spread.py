"""Variance, Std and Histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import PlanError
from headrace.metrics import sums
from headrace.metrics.base import Metric, State, unique
from headrace.metrics.columns import checked, drop_missing, numbers, weights


@dataclass(frozen=True, slots=True)
class Variance(Metric):
    """The variance of a numeric or boolean column; NaN of no more than `ddof` rows.

    It is computed from the exact sums of the numbers and of their squares, so that nothing cancels and no order of rows or
    merges changes it: the exact variance, correctly rounded. ddof: 0 for that of the rows themselves, 1 for the estimate from a
    sample. weight: a column of weights; sums of w*x and w*x*x are then exact to about 2**-100 of each product, and the divisor
    is sum(w) - ddof, as if a row were there w times. Raises DataError for nulls, NaN and infinite values.
    skip_nulls: rows that are null or NaN are left out.
    """

    column: str
    ddof: int = 0
    skip_nulls: bool = False
    weight: str | None = None

    def _reads(self) -> tuple[str, ...]:
        return unique((self.column, self.weight))

    def _zero(self) -> State:
        return {"rows": 0, "sum": "0", "squares": "0"}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        batch = drop_missing(batch, self.column) if self.skip_nulls else batch
        x = numbers(batch, self.column)
        if self.weight is None:
            return self._add(state, len(x), sums.scaled_sum(x), sums.scaled_squares(x))
        w = weights(batch, self.weight)
        once, squared = _weighted(w, x.astype(np.float64), f"{self._name}: a weight times a square")
        return self._add(state, sums.encode(sums.scaled_sum(w)), once, squared << sums.SCALE_BITS)

    @staticmethod
    def _add(state: State, rows: sums.Total, total: int, squares: int) -> State:
        state["rows"] = sums.plus(state["rows"], rows)
        state["sum"] = sums.encode(sums.decode(state["sum"]) + total)
        state["squares"] = sums.encode(sums.decode(state["squares"]) + squares)
        return state

    def _merge(self, a: State, b: State) -> State:
        return self._add(a, b["rows"], sums.decode(b["sum"]), sums.decode(b["squares"]))

    def _result(self, state: State) -> float:
        return self._variance(state)

    def _variance(self, state: State) -> float:
        total = sums.decode(state["sum"])
        rows = state["rows"]
        n = rows << sums.SCALE_BITS if isinstance(rows, int) else sums.decode(rows)  # in units of 2**-SCALE_BITS, as `total` is
        left = n - (self.ddof << sums.SCALE_BITS)
        if left <= 0:
            return math.nan
        # (squares - total**2 / n) / left, squares being in the unit of total**2.
        above = sums.decode(state["squares"]) * n - (total * total << sums.SCALE_BITS)
        try:
            return above / (n * left << sums.SCALE_BITS)
        except OverflowError:
            return math.inf


@dataclass(frozen=True, slots=True)
class Std(Variance):
    """The standard deviation: the square root of `Variance`, with the same arguments."""

    def _result(self, state: State) -> float:
        return math.sqrt(self._variance(state))


@dataclass(frozen=True, slots=True)
class Histogram(Metric):
    """Counts of a numeric column between fixed edges: {"edges", "counts", "below", "above"}, counts one shorter than edges.

    Either `bins` of equal width between `low` and `high`, or `edges` (ascending). A bin holds its lower edge and not its upper
    one, but for the last, which holds both, as numpy.histogram has it. below, above: rows outside. weight: a column of weights,
    whose exact sums take the place of counts. Raises DataError for nulls, NaN and infinite values.
    skip_nulls: rows that are null or NaN are left out.
    """

    column: str
    bins: int = 10
    low: float | None = None
    high: float | None = None
    edges: Sequence[float] | None = None
    skip_nulls: bool = False
    weight: str | None = None

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        if self.edges is None:
            if self.low is None or self.high is None or not self.low < self.high or self.bins < 1:
                raise PlanError("Histogram needs low < high and at least one bin", hint="give low= and high=, or edges=")
            return
        object.__setattr__(self, "edges", tuple(float(x) for x in self.edges))
        if len(self.edges or ()) < 2 or not (np.diff(self.edges or ()) > 0).all():
            raise PlanError("Histogram: edges must be ascending, at least two", hint="for example edges=[0, 1, 10, 100]")

    def _reads(self) -> tuple[str, ...]:
        return unique((self.column, self.weight))

    def _edges(self) -> np.ndarray:
        if self.edges is not None:
            return np.asarray(self.edges)
        return np.linspace(float(self.low or 0.0), float(self.high or 0.0), self.bins + 1)

    def _zero(self) -> State:
        return {"counts": [0] * (len(self._edges()) + 1)}  # the first is below, the last above

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        batch = drop_missing(batch, self.column) if self.skip_nulls else batch
        x = numbers(batch, self.column)
        edges = self._edges()
        at = np.searchsorted(edges, x, side="right")
        at[x == edges[-1]] -= 1
        given = None if self.weight is None else weights(batch, self.weight)
        for cell, total in sums.by_cell(at, len(edges) + 1, given):
            state["counts"][cell] = sums.plus(state["counts"][cell], total)
        return state

    def _merge(self, a: State, b: State) -> State:
        a["counts"] = [sums.plus(x, y) for x, y in zip(a["counts"], b["counts"], strict=True)]
        return a

    def _result(self, state: State) -> dict[str, Any]:
        below, *counts, above = [x if self.weight is None else sums.number(x) for x in state["counts"]]
        return {"edges": self._edges().tolist(), "counts": counts, "below": below, "above": above}


def _weighted(w: np.ndarray, x: np.ndarray, what: str) -> tuple[int, int]:
    """Scaled sums of w*x and w*x*x, each product as two doubles."""
    with np.errstate(over="ignore", invalid="ignore"):
        parts = sums.two_product(w, x)
        square, error = sums.two_product(x, x)
        squares = (*sums.two_product(w, square), w * error)
    once, twice = (sum(sums.scaled_sum(checked(part, what)) for part in each) for each in (parts, squares))
    return once, twice
