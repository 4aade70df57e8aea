"""Projection pushdown: the reader reads only the columns that something later looks at."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from headrace.plan.columns import Columns, needs
from headrace.plan.nodes import Plan, Project, Read


def push_projection_down(plan: Plan, at_end: Columns, notes: list[str]) -> Plan:
    wanted = needs(plan.ops, at_end)[0]
    if not isinstance(wanted, frozenset):
        return plan
    names = cast(list[str], plan.read.source.schema().names)  # pyright: ignore[reportUnknownMemberType]
    columns = tuple(name for name in names if name in wanted)
    if len(columns) == len(names):
        return plan
    notes.append(f"reads {len(columns)} of {len(names)} columns")
    # A projection whose inputs are no longer all read gives only what is still wanted of it.
    ops = list(plan.ops)
    for i, after in enumerate(needs(plan.ops, at_end)[1:]):
        op = ops[i]
        if isinstance(op, Project) and isinstance(after, frozenset):
            ops[i] = replace(op, columns=tuple(c for c in op.columns if c[0] in after))
    return replace(plan, read=Read(plan.read.source.project(columns)), ops=tuple(ops))
