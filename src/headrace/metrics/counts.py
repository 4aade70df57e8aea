"""Count and Mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.metrics import sums
from headrace.metrics.columns import numbers


@dataclass(frozen=True, slots=True)
class Count:
    """The number of rows."""

    columns: tuple[str, ...] = ()

    def zero(self) -> dict[str, Any]:
        return {"rows": 0}

    def update(self, state: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
        state["rows"] += batch.num_rows
        return state

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        a["rows"] += b["rows"]
        return a

    def result(self, state: dict[str, Any]) -> int:
        return state["rows"]


@dataclass(frozen=True, slots=True)
class Mean(sums.MeanState):
    """The mean of a numeric or boolean column, correctly rounded; NaN of no rows.

    Raises DataError for nulls, NaN and infinite values.
    """

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def update(self, state: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
        added = numbers(batch, self.column)
        return self.add(state, sums.scaled_sum(added), len(added))
