"""MeanMetric: accumulators whose result is the exact mean of one number a row, possibly weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.metrics import columns, sums
from headrace.metrics.base import Metric, State, unique


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanMetric(Metric):
    """weight: a column of finite numbers, none negative. The weighted mean is sum(w * x) / sum(w), where each product is
    rounded once, to the nearest double, and all that follows is exact: no order of rows or of merges changes it.
    """

    weight: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return unique((*self._reads(), self.weight, *self._by))

    def _zero(self) -> State:
        return {"rows": 0, "sum": "0"}

    def _add(self, state: State, batch: pa.RecordBatch, numbers: np.ndarray) -> State:
        """The state with a number for each row of `batch`."""
        if self.weight is None:
            return self._join(state, len(numbers), sums.scaled_sum(numbers))
        weights = columns.weights(batch, self.weight)
        products = columns.checked(weights * numbers, f"{self._name}: a weight times a number")
        return self._join(state, sums.encode(sums.scaled_sum(weights)), sums.scaled_sum(products))

    def _join(self, state: State, rows: sums.Total, total: int) -> State:
        state["rows"] = sums.plus(state["rows"], rows)
        state["sum"] = sums.encode(sums.decode(state["sum"]) + total)
        return state

    def _merge(self, a: State, b: State) -> State:
        return self._join(a, b["rows"], sums.decode(b["sum"]))

    def _result(self, state: State) -> Any:
        return sums.ratio(state["sum"], state["rows"])
