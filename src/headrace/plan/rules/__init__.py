"""Rules: Plan -> Plan, one file each. They never change what a plan means."""

from __future__ import annotations

from collections.abc import Callable

from headrace.core.carried import Carried
from headrace.plan.columns import Columns
from headrace.plan.nodes import Plan
from headrace.plan.rules.carrying import carry_stored
from headrace.plan.rules.predicate import push_filters_up, push_predicate_down
from headrace.plan.rules.projection import push_projection_down

Rule = Callable[[Plan], Plan]


def optimise(plan: Plan, at_end: Columns, *, leave: bool = False) -> tuple[Plan, tuple[str, ...], Carried | None]:
    """Apply all rules in order. at_end: the columns that the plan's end wants. leave: a column that nobody reads may be left in
    the input for the sink. Returns the plan, what was done, in words, and what the sink takes from the input.
    """
    notes: list[str] = []
    plan = push_filters_up(plan, notes)
    plan = push_predicate_down(plan, notes)
    plan = push_projection_down(plan, at_end, notes)
    plan, carried = carry_stored(plan, at_end, notes, leave=leave)
    return plan, tuple(notes), carried
