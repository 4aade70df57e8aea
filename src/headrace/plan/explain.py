"""explain(): a plan in words. Pure: everything it says was decided before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.core.stages import End, Order, Stage
from headrace.plan.nodes import Evaluate, FilterExpr, Limit, MapBatches, Op, Plan, Predict, Project, Reshape
from headrace.plan.physical import PhysicalPlan

_ORDERS = {
    Order.SOURCE: "a cursor per split",
    Order.FREE: "blocks in any order",
    Order.SPLIT: "each split's blocks in sequence",
    Order.GLOBAL: "splits one after the other",
}


def explain(
    written: Plan,
    physical: PhysicalPlan,
    *,
    pools: Mapping[str, Sequence[str]],
    engine: str,
    budget_bytes: int,
    notes: Sequence[str],
) -> str:
    """written: the plan as the user wrote it. pools: pool -> its workers' devices."""
    lines = ["Logical plan"]
    lines += [f"  {text}" for text in _logical(written)]
    lines.append("Optimised plan")
    lines += [f"  {text}" for text in _logical(physical.plan)]
    lines.append("Stages")
    for route in physical.routes:
        if len(physical.routes) > 1:
            why = "while other splits keep all workers busy" if route.name == "fused" else "for the last splits"
            lines.append(f"  route {route.name} ({why})")
        lines += [f"    {_stage(physical.stages[i], pools)}" for i in route.stages]
    lines.append("Decisions")
    lines.append(f"  engine: {engine}")
    lines += [f"  pool {pool}: {len(devices)} worker(s)" for pool, devices in pools.items()]
    rows = physical.limits.rows_multiple
    aligned = f", cut at multiples of {rows} rows" if rows > 1 else ""
    lines.append(
        f"  blocks: about {physical.limits.target_bytes >> 20} MiB{aligned}; {budget_bytes >> 20} MiB may be in flight"
    )
    lines += [f"  {note}" for note in notes]
    return "\n".join(lines)


def _logical(plan: Plan) -> list[str]:
    lines = [f"{plan.read.name}  {plan.read.source.describe()}"]
    lines += [f"{op.name}{_details(op)}" for op in plan.ops]
    if plan.write is not None:
        lines.append(f"{plan.write.name}  {plan.write.sink.describe()}")
    return lines


def _details(op: Op) -> str:
    match op:
        case Project(columns=columns, name=name):
            names = ", ".join(new if new == old else f"{old} as {new}" for new, old in columns)
            return f"  keeps {names}" if name == "drop" else f"  {names}"
        case Reshape(drop=drop, rename=rename):
            return "  " + ", ".join((*drop, *(f"{old} as {new}" for old, new in rename)))
        case FilterExpr(expression=expression):
            return f"  {expression}"
        case MapBatches(batch_rows=rows, batch_format=form):
            return f"  batches of {rows or 'auto'} rows, {form}"
        case Predict(inputs=inputs, output=output, device=device, batch_rows=rows):
            names = f"{', '.join(inputs) or 'all columns'} -> {', '.join(output) or '(named by the model)'}"
            return f"  {names}, {device}, batch {rows or 'auto'}"
        case Evaluate(accumulators=accumulators):
            return "  " + ", ".join(f"{name}={type(a).__name__}" for name, a in accumulators.items())
        case Limit(rows=rows):
            return f"  {rows} rows"
        case _:
            return ""


def _stage(stage: Stage, pools: Mapping[str, Sequence[str]]) -> str:
    workers = len(pools.get(stage.pool, ()))
    if stage.max_workers is not None:
        workers = min(workers, stage.max_workers)
    text = f"[{stage.id}] {stage.name}  on {stage.pool} x{workers}, {_ORDERS[stage.order]}"
    if stage.cut_rows is not None:
        text += f"; gives whole batches of {stage.cut_rows} rows"
    if stage.columns_in is not None:
        text += f"; gets only {', '.join(stage.columns_in)}"
    if stage.transient:
        text += f"; {', '.join(stage.transient)} freed after the next stage"
    if stage.end is End.DELIVER:
        text += "; delivered to the caller"
    return text
