"""Predicate pushdown: filter expressions move before row-wise work that they don't depend on, then into the reader."""

from __future__ import annotations

from msgspec.structs import replace

from headrace.plan.nodes import Apply, FilterExpr, Op, Plan, Predict, Read


def push_filters_up(plan: Plan, notes: list[str]) -> Plan:
    """Move each filter expression before the transforms and models whose outputs it does not read.

    Not past user functions over rows (they may see every row), limits (the rows counted would differ), evaluations
    (likewise), nor projections (names may differ).
    """
    ops = list(plan.ops)
    for i, op in enumerate(ops):
        if not isinstance(op, FilterExpr) or not op.columns:
            continue
        j = i
        while j > 0 and _may_pass(op, ops[j - 1]):
            j -= 1
        if j < i:
            ops.insert(j, ops.pop(i))
            notes.append(f"filter on {', '.join(op.columns)} moved before {ops[j + 1].name}")
    return replace(plan, ops=tuple(ops))


def _may_pass(op: FilterExpr, before: Op) -> bool:
    match before:
        case Predict(output=output, inputs=inputs):
            return bool(output) and bool(inputs) and not set(output) & set(op.columns)
        case Apply(transform=transform):
            return not set(transform.columns_out) & set(op.columns)
        case _:
            return False


def push_predicate_down(plan: Plan, notes: list[str]) -> Plan:
    """Give the filter expressions that stand right after the read to the source."""
    source, ops = plan.read.source, list(plan.ops)
    kept: list[Op] = []
    while ops and isinstance(ops[0], FilterExpr):
        op = ops.pop(0)
        assert isinstance(op, FilterExpr)
        if not op.columns:
            kept.append(op)
            break
        source, exact = source.prune(op.expression)
        notes.append(f"filter on {', '.join(op.columns)} pushed into the reader{'' if exact else ' (row groups only)'}")
        if not exact:
            kept.append(op)
    return replace(plan, read=Read(source), ops=(*kept, *ops))
