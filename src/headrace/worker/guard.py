"""OutputGuard: what is wrong with a model's outputs, counted in the pass beside the metrics.

It is no metric that a user asks for: the engine keeps one for each model. A state is {} while nothing is wrong, so that the run
log has nothing of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct

from headrace.core.tensors import is_ragged, is_tensor, vector_to_numpy

State = dict[str, Any]


class OutputGuard(Struct, frozen=True):
    """Values that are NaN or infinite, by column, and rows that failed where others of the group went on.

    A result: {"nan": {column: values}, "infinite": {column: values}, "failed": rows, "why": the first failure in alphabetical
    order}, without what is zero; {} when nothing is wrong.
    """

    columns: tuple[str, ...] = ()

    def zero(self) -> State:
        return {}

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        """Look at the model's output columns."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values = _floats(column)
            if values is None or np.isfinite(values).all():
                continue
            _count(state, "nan", name, int(np.isnan(values).sum()))
            _count(state, "infinite", name, int(np.isinf(values).sum()))
        return state

    def fail(self, state: State, rows: int, why: str) -> State:
        """So many rows have nulls because the model failed on them."""
        if rows:
            state["failed"] = state.get("failed", 0) + rows
            state["why"] = min(why, state.get("why", why))
        return state

    def merge(self, a: State, b: State) -> State:
        for kind in ("nan", "infinite"):
            for name, values in b.get(kind, {}).items():
                _count(a, kind, name, values)
        return self.fail(a, b.get("failed", 0), b.get("why", ""))

    def result(self, state: State) -> State:
        return state


def _count(state: State, kind: str, column: str, values: int) -> None:
    if values:
        counts = state.setdefault(kind, {})
        counts[column] = counts.get(column, 0) + values


def _floats(column: pa.Array) -> np.ndarray | None:
    """All numbers of a float column, or of a tensor or list column of floats, without nulls; None for any other."""
    if is_tensor(column.type) or is_ragged(column.type):
        column = column.storage if is_tensor(column.type) else column.storage.field("data")
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if not pa.types.is_floating(column.type):
        return None
    return vector_to_numpy(column.drop_null() if column.null_count else column)
