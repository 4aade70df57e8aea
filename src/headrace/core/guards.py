"""What guards of model outputs are called among a run's accumulators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIX = "guard:"  # no metric's name: those are Python identifiers


def guard_name(op: int) -> str:
    """The name of the guard of operator `op`."""
    return f"{_PREFIX}{op}"


def split_guards(results: Mapping[str, Any], ops: Mapping[int, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, guards by the name of their operator, those that found something). results: of all accumulators of a run."""
    metrics = {name: value for name, value in results.items() if not name.startswith(_PREFIX)}
    guards: dict[str, Any] = {}
    for name, value in results.items():
        if name.startswith(_PREFIX) and value:
            index = int(name.removeprefix(_PREFIX))
            shown = ops.get(index, f"operator {index}")
            guards[shown if shown not in guards else f"{shown} ({index})"] = value
    return metrics, guards
