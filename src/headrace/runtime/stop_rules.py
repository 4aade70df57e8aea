"""StopRules: conditions on metrics that end a run early, looked at while it goes on.

They see what steps have answered so far: rows of splits that are still open too, and those of a split that started again twice.
What is committed is not touched by that. At the end, and when a later session begins, they see what is settled, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from headrace.contracts.accumulator import Accumulator
from headrace.core.errors import StopConditionMet, UserCodeError
from headrace.runtime.committer import as_logged, merged, result_of, zero_of

COST = 20  # the share of a driver's time that looking may take is one in so many


class StopRule(Struct, frozen=True):
    """accumulator's result so far -> whether to stop. after_rows: not before so many were read."""

    accumulator: Accumulator
    condition: Callable[[Any], Any]
    after_rows: int


class StopRules:
    def __init__(self, rules: Mapping[str, StopRule], clock: Callable[[], float]) -> None:
        self._rules = dict(rules)
        self._clock = clock
        self._states: dict[str, Any] = {}
        self._due_s = 0.0
        self._changed = False

    def __bool__(self) -> bool:
        return bool(self._rules)

    @property
    def names(self) -> Iterable[str]:
        return self._rules.keys()

    def add(self, states: Mapping[str, Any]) -> None:
        """What earlier sessions settled, or a step's answer; nothing of it is changed."""
        seen = as_logged({name: states[name] for name in self._rules.keys() & states.keys()})
        for name, state in seen.items():
            accumulator = self._rules[name].accumulator
            before = self._states.get(name)
            self._states[name] = merged(name, accumulator, zero_of(name, accumulator) if before is None else before, state)
            self._changed = True

    def look(self, rows: int) -> None:
        """Raises StopConditionMet. rows: read so far. Does nothing while that would take too much time."""
        now_s = self._clock()
        if not self._changed or now_s < self._due_s:
            return
        self._changed = False
        for name, rule in self._rules.items():
            if name in self._states and rows >= rule.after_rows:
                check(name, rule, result_of(name, rule.accumulator, self._states[name]), rows)
        self._due_s = now_s + COST * (self._clock() - now_s)

    def judge(self, results: Mapping[str, Any], rows: int) -> None:
        """At the end of a run. Raises StopConditionMet."""
        for name, rule in self._rules.items():
            check(name, rule, results[name], rows)


def check(name: str, rule: StopRule, value: Any, rows: int) -> None:
    """Raises StopConditionMet, or UserCodeError when the condition can't be computed."""
    try:
        met = bool(rule.condition(value))
    except Exception as exc:
        raise UserCodeError(
            f"stop_if[{name!r}] raised {type(exc).__name__}: {exc}",
            where=(("metric", name), ("its result", repr(value)[:200])),
            hint="the function gets the metric's result as it would be in Run.metrics",
        ) from None
    if met:
        raise StopConditionMet(
            f"evaluate({name}) is {_shown(value)} after {rows:,} rows, and stop_if says that this is the end",
            where=(("metric", name),),
            hint="look at the model and its input; what was settled is kept, and a call with another condition goes on",
        )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)[:200]
