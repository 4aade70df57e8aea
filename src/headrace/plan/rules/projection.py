"""Projection pushdown: the reader reads only the columns that something later looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from msgspec.structs import replace

from headrace.plan.columns import Columns, needs
from headrace.plan.nodes import Op, Plan, Project, Read


def push_projection_down(plan: Plan, at_end: Columns, notes: list[str]) -> Plan:
    wanted = needs(plan.ops, at_end)
    plan = replace(plan, ops=_trimmed(plan.ops, wanted))
    first = wanted[0]
    if not isinstance(first, frozenset):
        return plan
    names = cast(list[str], plan.read.source.schema().names)  # pyright: ignore[reportUnknownMemberType]
    columns = tuple(name for name in names if name in first)
    if len(columns) == len(names):
        return plan
    notes.append(f"reads {len(columns)} of {len(names)} columns")
    return replace(plan, read=Read(plan.read.source.project(columns)))


def _trimmed(ops: Sequence[Op], wanted: Sequence[Columns]) -> tuple[Op, ...]:
    """Each projection gives only what is still wanted of it: the rest may not be read, nor carried past a model."""
    out: list[Op] = []
    for op, after in zip(ops, wanted[1:], strict=True):
        if isinstance(op, Project) and isinstance(after, frozenset):
            op = replace(op, columns=tuple(c for c in op.columns if c[0] in after))
        out.append(op)
    return tuple(out)
