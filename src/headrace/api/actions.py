"""Actions that bring rows, counts or words to the caller; each runs the plan through the session."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from headrace.api.placing import reach
from headrace.api.planning import known_schema, parse_options, prepare, schema_without_rows
from headrace.api.session import stream, write
from headrace.core.errors import PlanError
from headrace.core.options import ActionOptions
from headrace.plan.nodes import Apply, BatchFormat, Evaluate, Limit, Plan, Predict, Project, Reshape

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def iter_batches(
    plan: Plan, rows: int | None, batch_format: BatchFormat, drop_last: bool, options: ActionOptions
) -> Iterator[Any]:
    """Batches of `rows` rows in a format; see Dataset.iter_batches."""
    from headrace.worker.formats import NumpyReader, to_format

    options = _quiet(options)
    reader = NumpyReader()
    if batch_format not in ("numpy", "pyarrow", "pandas", "torch"):
        raise PlanError(f"batch_format is {batch_format!r}", hint="use numpy, pyarrow, pandas or torch")
    batches = rebatch(stream(plan, options), rows, drop_last)
    try:
        for batch in batches:
            yield _writable(to_format(batch, batch_format, reader)[0])
    finally:
        batches.close()


def _writable(batch: Any) -> Any:
    """The batch with arrays that may be written to: their memory is the caller's own, though Arrow calls it constant."""
    from headrace.worker.formats import writable_view

    if isinstance(batch, dict):
        return {name: writable_view(values) for name, values in batch.items()}
    return batch


def rebatch(blocks: Iterator[pa.RecordBatch], rows: int | None, drop_last: bool) -> Generator[pa.RecordBatch]:
    """Cut blocks into batches of exactly `rows` rows (the last may be shorter), copying only where a batch spans blocks."""
    if rows is None:
        yield from (b for b in blocks if b.num_rows)
        return
    from headrace.worker.casting import concat

    held: list[pa.RecordBatch] = []
    have = 0
    try:
        for block in blocks:
            at = 0
            while have + block.num_rows - at >= rows:
                piece = block.slice(at, rows - have)
                at += rows - have
                yield concat([*held, piece], "the batches of this iterator")
                held, have = [], 0
            if at < block.num_rows:
                held.append(block.slice(at))
                have += block.num_rows - at
        if held and not drop_last:
            yield concat(held, "the batches of this iterator")
    finally:
        close = getattr(blocks, "close", None)
        if close is not None:
            close()


def _quiet(options: ActionOptions) -> ActionOptions:
    """Loops of the caller's own show no progress unless asked to."""
    return options if "progress" in options else {**options, "progress": "quiet"}


def take(plan: Plan, rows: int, options: ActionOptions) -> list[dict[str, Any]]:
    from headrace.worker.formats import to_rows

    limited = replace(plan, ops=(*plan.ops, Limit(rows)))
    return [row for batch in stream(limited, _quiet(options)) for row in to_rows(batch)]


CELL_CHARS = 28  # of a value in show(): three wide columns still fit a terminal


def show(plan: Plan, rows: int, options: ActionOptions) -> None:
    from rich.console import Console
    from rich.table import Table

    found = take(plan, rows, options)
    if not found:
        print("(no rows)")
        return
    table = Table()
    for name in found[0]:
        table.add_column(name, overflow="ellipsis", no_wrap=True, min_width=min(len(name), 6))
    for row in found:
        table.add_row(*(_cell(row.get(name)) for name in found[0]))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape:
        return f"<{value.dtype} {'x'.join(map(str, value.shape))}>"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"


def count(plan: Plan, options: ActionOptions) -> int:
    from headrace.connectors.sinks.discard import DiscardSink

    if all(isinstance(op, Project | Reshape | Predict | Apply | Evaluate) for op in plan.ops):
        known = plan.read.source.count()
        if known is not None:
            return known
    return write(plan, DiscardSink(), _quiet(options), at_end=frozenset()).rows


def schema(plan: Plan) -> pa.Schema:
    static = known_schema(plan)
    if static is not None:
        return static
    limited = replace(plan, ops=(*plan.ops, Limit(1)))
    for batch in stream(limited, {"engine": "inline", "progress": "quiet"}):
        return batch.schema
    raise PlanError("the schema can't be told: a user's function decides it, and there is no row to run it on")


def to_arrow(plan: Plan, options: ActionOptions) -> pa.Table:
    import pyarrow as pa

    from headrace.core.expressions import empty_batch
    from headrace.worker.casting import alike

    batches = list(stream(plan, options))
    if not batches:
        return pa.Table.from_batches([empty_batch(schema_without_rows(plan))])
    return pa.Table.from_batches(alike(batches, "all rows"))


def to_ray_dataset(plan: Plan, options: ActionOptions) -> Any:
    from headrace.substrates.ray.cluster import connect_to_stay
    from headrace.substrates.ray.tables import to_ray_dataset as make

    parsed = parse_options({**options, "engine": "ray"})
    connect_to_stay(parsed.address)
    blocks = list(stream(plan, _quiet({**options, "engine": "ray"}), refs=True))
    return make(blocks, schema_without_rows(plan))


def to_pandas(plan: Plan, options: ActionOptions) -> pd.DataFrame:
    from headrace.worker.formats import to_pandas as frame

    table = to_arrow(plan, options).combine_chunks()
    batches = table.to_batches()
    return frame(batches[0]) if batches else table.to_pandas(ignore_metadata=True)


def check_device(device: str | None) -> None:
    """Raises PlanError for a device of a name that torch does not know, or of CUDA where torch has none."""
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise PlanError(f"device is {device!r}: {error}", hint='for example "cpu" or "cuda:0"') from None
    if kind == "cuda" and not torch.cuda.is_available():
        hint = "leave device out, or install a torch with CUDA on a machine with a GPU"
        raise PlanError(f"device is {device!r}, but torch {torch.__version__} finds no CUDA device here", hint=hint)


def to_torch(batch: dict[str, Any], device: str | None, dtypes: Any) -> dict[str, Any]:
    """Move and cast the tensors of a batch. Raises PlanError for dtypes of columns that it lacks."""
    for name in dtypes if isinstance(dtypes, Mapping) else ():
        if name not in batch:
            where = (("columns there", ", ".join(batch)),)
            raise PlanError(f"dtypes names column {name!r}, which is not there", where=where, hint="check the spelling")
    out: dict[str, Any] = {}
    for name, value in batch.items():
        if hasattr(value, "to"):
            dtype = dtypes.get(name) if isinstance(dtypes, Mapping) else dtypes
            value = value.to(device=device, dtype=dtype, non_blocking=True)
        out[name] = value
    return out


def explain(plan: Plan, options: ActionOptions) -> str:
    from headrace.plan.explain import explain as explain_plan

    parsed = parse_options(options)
    with reach(parsed):
        ready = prepare(plan, parsed)
    pools: dict[str, list[str]] = {}
    for worker in ready.workers:
        pools.setdefault(worker.pool, []).append(worker.device)
    return explain_plan(
        plan, ready.physical, pools=pools, engine=ready.engine, budget_bytes=ready.budget_bytes, notes=ready.notes
    )
