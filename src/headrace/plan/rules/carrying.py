"""Carrying columns in the form in which they are stored: what no operator changes, the sink takes from the input, encoded as
it is there; what none reads, either, need not pass through the pipeline at all.

Only through plans whose rows are those of the input, one for one: rows that fail may still be missing, and the sink sees which.
A function of batches as the last step may do anything, but what it gives back as it got it is known while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from headrace.contracts.sink import CarryingSink
from headrace.contracts.source import LeavingSource
from headrace.core.carried import Carried
from headrace.plan.columns import ALL, Columns, makes, needs
from headrace.plan.nodes import Apply, Evaluate, MapBatches, Op, Plan, Predict, Project, Read


def carry_stored(plan: Plan, at_end: Columns, notes: list[str], *, leave: bool) -> tuple[Plan, Carried | None]:
    """The plan, and what its sink takes over; None for nothing. leave: columns that nobody reads may be left unread."""
    if plan.write is None or at_end is not ALL or not isinstance(plan.write.sink, CarryingSink):
        return plan, None
    steps = _traced(_names(plan), plan.ops)
    if steps is None:
        return plan, _given_back(plan, plan.write.sink, notes)
    sources = _taken(plan, plan.write.sink, steps)
    if not sources:
        return plan, None
    names = tuple(steps[-1])
    carried = Carried(names, sources)
    text = f"{len(sources)} of {len(names)} columns are copied encoded, where a row group stays whole"
    read = needs(plan.ops, frozenset(name for name in names if name not in sources))[0]
    source = plan.read.source
    left = frozenset(carried.sources.values()) - read if isinstance(read, frozenset) else frozenset[str]()
    if not leave or not left or not isinstance(source, LeavingSource):
        notes.append(text)
        return plan, carried
    notes.append(f"{text}; {len(left)} of them are only checked")
    ops = tuple(_lenient(op, step, left) for op, step in zip(plan.ops, steps, strict=False))
    return replace(plan, read=Read(source.leave(left)), ops=ops), carried


def _given_back(plan: Plan, sink: CarryingSink, notes: list[str]) -> Carried | None:
    """What the sink takes over where a function of batches is the last to touch the rows, and gives columns back."""
    last = max((place for place, op in enumerate(plan.ops) if not isinstance(op, Evaluate)), default=-1)
    op = plan.ops[last] if last >= 0 else None
    if not isinstance(op, MapBatches) or op.types or op.batch_format != "numpy":
        return None
    steps = _traced(_names(plan), plan.ops[:last])
    sources = {} if steps is None else _taken(plan, sink, steps)
    if not sources:
        return None
    notes.append(
        f"what {op.name} gives back unchanged of {len(sources)} columns is copied encoded, where a row group stays whole"
    )
    return Carried(None, sources)


def _taken(plan: Plan, sink: CarryingSink, steps: Sequence[Mapping[str, str | None]]) -> dict[str, str]:
    """Columns at the end of these steps that the sink would take over -> the input columns that they are."""
    came = {source for source in steps[-1].values() if source is not None}
    taken = sink.carries(plan.read.source, [name for name in steps[0] if name in came])
    return {name: source for name, source in steps[-1].items() if source is not None and source in taken}


def _traced(names: Sequence[str], ops: Sequence[Op]) -> list[dict[str, str | None]] | None:
    """The columns before each operator and at the end, in order, each with the input column that it is, None for one that was
    made. None: an operator may change rows, or names its columns only while it runs.
    """
    steps: list[dict[str, str | None]] = [dict(zip(names, names, strict=True))]
    for op in ops:
        made = makes(op)
        if not isinstance(op, Project | Apply | Predict | Evaluate) or made is None:
            return None
        now = steps[-1]
        if isinstance(op, Predict) and not op.output:
            return None
        if isinstance(op, Project):
            steps.append({new: now[old] for new, old in op.columns})
            continue
        steps.append({**now, **dict.fromkeys(made, None)})
    return steps


def _names(plan: Plan) -> list[str]:
    names: list[str] = list(plan.read.source.schema().names)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return [name for name in names if name]


def _lenient(op: Op, now: dict[str, str | None], left: frozenset[str]) -> Op:
    """A projection that does not insist on what was left in the input."""
    if not isinstance(op, Project):
        return op
    return replace(op, left=frozenset(old for _, old in op.columns if now[old] in left))
