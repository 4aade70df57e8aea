"""Metric: what every accumulator of ours shares, above all its groups (`by=`).

A metric says how rows are added to one group's state (`_zero`, `_update`, `_merge`, `_result`); this module splits batches by
group and keeps a state for each. Without `by` a metric's state is that of its only group.

Invariant: a state is JSON-able at any moment, so that it can ride in a receipt as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.metrics.groups import split_by_group

State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """by: a column, or several, whose values split the rows into groups: the result is {value: result of its rows}, with
    several columns a dict in a dict, in their order. Values are shown as text. max_groups: more are a DataError.
    """

    by: str | Sequence[str] | None = None
    max_groups: int = 1000

    def __post_init__(self) -> None:
        by = () if self.by is None else (self.by,) if isinstance(self.by, str) else tuple(self.by)
        object.__setattr__(self, "by", by or None)
        if self.max_groups < 1:
            raise PlanError(f"{self._name}: max_groups is {self.max_groups}", hint="give at least 1; the default is 1000")

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _by(self) -> tuple[str, ...]:
        return tuple(self.by or ())

    @property
    def columns(self) -> tuple[str, ...]:
        return unique((*self._reads(), *self._by))

    def zero(self) -> State:
        return {"groups": {}} if self.by else self._zero()

    def update(self, state: State, batch: pa.RecordBatch) -> State:
        if batch.num_rows == 0:
            return state
        if not self.by:
            return self._update(state, batch)
        groups = state["groups"]
        for key, rows in split_by_group(batch, self._by):
            groups[key] = self._update(groups[key] if key in groups else self._zero(), rows)
        self._check_groups(groups)
        return state

    def merge(self, a: State, b: State) -> State:
        if not self.by:
            return self._merge(a, b)
        groups = a["groups"]
        for key, state in b["groups"].items():
            groups[key] = self._merge(groups[key] if key in groups else self._zero(), state)
        self._check_groups(groups)
        return a

    def result(self, state: State) -> Any:
        if not self.by:
            return self._result(state)
        return self._each_group(state, self._result)

    def _each_group(self, state: State, result: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for names, key in sorted((json.loads(key), key) for key in state["groups"]):
            inner = out
            for name in names[:-1]:
                inner = inner.setdefault(name, {})
            inner[names[-1]] = result(state["groups"][key])
        return out

    def _check_groups(self, groups: State) -> None:
        if len(groups) > self.max_groups:
            names = ", ".join(map(repr, self._by))
            raise DataError(
                f"{self._name} by {names} has more than {self.max_groups:,} groups",
                where=(("column", names),),
                hint="group by columns with fewer values, or raise max_groups= (each group has a state of its own)",
            )

    # ---------------------------------------------------------------- what a metric is: of one group

    def _reads(self) -> tuple[str, ...]:
        """Columns, without those of `by`."""
        raise NotImplementedError

    def _zero(self) -> State:
        raise NotImplementedError

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        """Add at least one row; may change the state in place."""
        raise NotImplementedError

    def _merge(self, a: State, b: State) -> State:
        """May change `a`, never `b`."""
        raise NotImplementedError

    def _result(self, state: State) -> Any:
        raise NotImplementedError


def unique(names: Iterable[str | None]) -> tuple[str, ...]:
    """In order, each once, without None."""
    return tuple(dict.fromkeys(name for name in names if name is not None))


def one_of(metric: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises PlanError for a parameter that is none of these."""
    if value not in allowed:
        raise PlanError(f"{metric}: {name} is {value!r}", hint=f"use one of {', '.join(map(repr, allowed))}")
