"""Rules: Plan -> Plan, one file each. They never change what a plan means."""

from __future__ import annotations

from collections.abc import Callable

from headrace.plan.columns import Columns
from headrace.plan.nodes import Plan
from headrace.plan.rules.predicate import push_filters_up, push_predicate_down
from headrace.plan.rules.projection import push_projection_down

Rule = Callable[[Plan], Plan]


def optimise(plan: Plan, at_end: Columns) -> tuple[Plan, tuple[str, ...]]:
    """Apply all rules in order. at_end: the columns that the plan's end wants. Returns the plan and what was done, in words."""
    notes: list[str] = []
    plan = push_filters_up(plan, notes)
    plan = push_predicate_down(plan, notes)
    plan = push_projection_down(plan, at_end, notes)
    return plan, tuple(notes)
