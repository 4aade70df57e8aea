"""Which columns each operator reads, makes and still needs: the analysis behind pushdown and carry bypass.

A set of names, or ALL when everything may be read (a user's function sees every column; a sink writes what comes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.core.errors import PlanError
from headrace.plan.nodes import (
    Apply,
    Evaluate,
    FilterExpr,
    FlatMap,
    Limit,
    MapBatches,
    MapRows,
    Op,
    Predict,
    Project,
)


class _All:
    def __repr__(self) -> str:
        return "ALL"


ALL: Final = _All()
Columns = frozenset[str] | _All


def union(a: Columns, b: Columns) -> Columns:
    if isinstance(a, _All) or isinstance(b, _All):
        return ALL
    return a | b


def reads(op: Op) -> Columns:
    """The columns that an operator looks at; ALL for user functions over whole rows."""
    match op:
        case Project(columns=columns):
            return frozenset(name for _, name in columns)
        case FilterExpr(columns=columns):
            return frozenset(columns) if columns else ALL
        case Apply(transform=transform):
            return frozenset(transform.columns_in)
        case Predict(inputs=inputs):
            return frozenset(inputs) if inputs else ALL
        case Evaluate(accumulators=accumulators):
            return frozenset(name for a in accumulators.values() for name in a.columns)
        case Limit():
            return frozenset()
        case _:
            return ALL


def makes(op: Op) -> tuple[str, ...] | None:
    """The columns, in order, that an operator adds or replaces beside those it passes on; None: it replaces the whole row."""
    match op:
        case Apply(transform=transform):
            return transform.columns_out
        case Predict(output=output):
            return output
        case FilterExpr() | Evaluate() | Limit() | Project():
            return ()
        case _:
            return None


def needed_before(op: Op, after: Columns) -> Columns:
    """What must come into `op` so that `after` can come out."""
    match op:
        case Project(columns=columns):
            wanted = columns if isinstance(after, _All) else tuple(c for c in columns if c[0] in after)
            return frozenset(name for _, name in wanted)
        case Apply() | Predict():
            passed = after if isinstance(after, _All) else after.difference(makes(op) or ())
            return union(passed, reads(op))
        case _:
            return union(after, reads(op)) if makes(op) is not None else ALL


def needs(ops: Sequence[Op], at_end: Columns) -> list[Columns]:
    """needs[i]: what must come into ops[i]; needs[len(ops)] is `at_end`."""
    out: list[Columns] = [at_end]
    for op in reversed(ops):
        out.append(needed_before(op, out[-1]))
    out.reverse()
    return out


def check_columns(ops: Sequence[Op], schema: Sequence[str]) -> list[tuple[str, ...] | None]:
    """The column names that come into each operator (and, last, out of the plan), None once a user's function decides.

    Raises PlanError for a column that can't be there.
    """
    known: tuple[str, ...] | None = tuple(schema)
    out: list[tuple[str, ...] | None] = []
    for op in ops:
        out.append(known)
        wanted = reads(op)
        if known is not None and not isinstance(wanted, _All):
            for name in sorted(wanted - set(known)):
                raise PlanError(
                    f"{op.name} needs column {name!r}, which is not there",
                    where=(("columns there", ", ".join(known)),),
                    hint="check the spelling, or keep the column in an earlier select or drop",
                )
        known = _after(op, known)
    out.append(known)
    return out


def _after(op: Op, known: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if isinstance(op, Project):
        return tuple(name for name, _ in op.columns)
    if isinstance(op, MapRows | FlatMap | MapBatches) and op.types:
        return tuple(name for name, _ in op.types)
    made = makes(op)
    if known is None or made is None or (isinstance(op, Predict) and not op.output):
        return None
    return known + tuple(name for name in made if name not in known)
