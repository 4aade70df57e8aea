"""The report: a Run as compact text. Pure; decides nothing, measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.observe import words
from headrace.observe.progress import stopped

if TYPE_CHECKING:
    from headrace.observe.run import Bottleneck, Run, StageTime

_NAME_CELLS = 40
_WORTH_TELLING = 0.02  # shares below this are noise


def text(run: Run) -> str:
    """Several lines: what was done, where time went, what limited it, memory, metrics."""
    if run.already_done:
        return _nothing_to_do(run)
    lines = [_headline(run), *(f"  {line}" for line in _facts(run))]
    if run.pools:
        lines += ["", *_pools(run)]
    if run.stages:
        lines += ["", *_stages(run.stages)]
    if run.bottleneck is not None:
        lines += ["", *(f"  {line}" for line in _bottleneck(run, run.bottleneck))]
    if run.metrics:
        lines += ["", "  metrics", *(f"    {line}" for line in metric_lines(run.metrics))]
    lines += [f"  warning: {line}" for line in guards(run.guards)]
    lines += [f"  note: {note}" for note in run.notes]
    return "\n".join(lines)


def _nothing_to_do(run: Run) -> str:
    """Of a run that an earlier call had finished."""
    which = f" ({run.run_id})" if run.run_id else ""
    files = f" in {words.plural(run.output_files, 'file')}" if run.output_files else ""
    lines = [f"{run.name}  nothing to do: finished before{which}, {words.plural(run.rows, 'row')}{files}"]
    lines += [f"  {line}" for line in (_rows(run), _set_aside(run)) if line]
    if run.metrics:
        lines += ["", "  metrics", *(f"    {line}" for line in metric_lines(run.metrics))]
    lines += [f"  warning: {line}" for line in guards(run.guards)]
    return "\n".join([*lines, *(f"  note: {note}" for note in run.notes)])


def _headline(run: Run) -> str:
    rows = words.count(run.rows)
    if run.resumed_rows:
        rows = f"{words.count(run.rows - run.resumed_rows)} of {rows}"
    took = f"{rows} rows in {words.duration(run.wall_s)}"
    if run.error and stopped(run.error):
        return f"{run.name}  {run.error}\n  {took} until then; the same call goes on from there"
    if run.error:
        return f"{run.name}  failed: {run.error.splitlines()[0]}\n  {took} until then"
    return f"{run.name}  {took}  ({words.rate(run.rows_per_s)} rows/s)"


def _facts(run: Run) -> list[str]:
    facts = [f"engine {run.engine}", f"{words.count(run.splits)} {'split' if run.splits == 1 else 'splits'}"]
    if run.nodes:
        facts.append(words.plural(run.nodes, "node"))
    if run.first_output_s is not None:
        facts.append(f"first output after {words.duration(run.first_output_s)}")
    if run.output_files:
        noun = "file" if run.output_files == 1 else "files"
        facts.append(f"{words.count(run.output_files)} {noun}, {words.size(run.output_bytes)} written")
    lines = [" · ".join(facts)]
    lines += [line for line in (_resumed(run), _rows(run), _set_aside(run), _mishaps(run)) if line]
    if run.peak_rss_bytes or run.peak_in_flight_bytes:
        budget = f" of a budget of {words.size(run.budget_bytes)}" if run.budget_bytes else ""
        peak, in_all = words.size(run.peak_in_flight_bytes), words.size(run.peak_rss_bytes)
        spilled = f"; {words.size(run.spilled_bytes)} went to disk" if run.spilled_bytes else ""
        lines.append(f"memory at its peak: {peak} in flight{budget}, {in_all} in all{spilled}")
    return lines


def _resumed(run: Run) -> str:
    if not run.resumed_splits:
        return f"session {run.sessions} of {run.run_id}" if run.sessions > 1 else ""
    session = f" (session {run.sessions} of {run.run_id})" if run.run_id else ""
    return f"resumed: {words.count(run.resumed_splits)} of {words.plural(run.splits, 'split')} were done{session}"


def _rows(run: Run) -> str:
    t = run.tally
    other = {"expanded": t.expanded, "filtered": t.filtered, "skipped": t.skipped, "quarantined": t.quarantined, "cut": t.cut}
    rows = [f"{words.count(n)} {what}" for what, n in other.items() if n]
    return f"of {words.count(t.rows_in)} rows read: " + ", ".join(rows) if rows else ""


def _set_aside(run: Run) -> str:
    return f"set aside in {run.quarantine}" if run.quarantine and run.tally.quarantined else ""


def _mishaps(run: Run) -> str:
    """What was mended on the way."""
    mended: list[str] = []
    if run.workers_lost:
        mended.append(f"{words.plural(run.workers_lost, 'worker')} lost")
    if run.retries:
        mended.append(f"{words.plural(run.retries, 'split')} started again")
    return " · ".join(mended)


def _pools(run: Run) -> list[str]:
    rows = [(p.name, str(p.workers), words.share(p.busy), words.duration(p.busy_s), words.duration(p.cpu_s)) for p in run.pools]
    return table(("pool", "workers", "busy", "busy time", "cpu time"), rows)


def _stages(stages: Sequence[StageTime]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        rows.append(_row(stage.name, stage.pool, stage.busy_s, stage.rows, stage.rows_per_s))
        for op in stage.operators:
            # Taking a block and passing it on, where it costs nothing, is no news.
            if op.op >= 0 or op.wall_s >= _WORTH_TELLING * stage.busy_s:
                rows.append(_row(f"  {op.name}", "", op.wall_s, op.rows_out, op.rows_per_s))
    return table(("stage", "pool", "busy time", "rows", "rows/s a worker"), rows)


def _row(name: str, pool: str, busy_s: float, rows: int, rows_per_s: float) -> tuple[str, ...]:
    speed = words.rate(rows_per_s) if rows_per_s else "-"
    return (words.cut(name, _NAME_CELLS), pool, words.duration(busy_s), words.count(rows), speed)


def _bottleneck(run: Run, b: Bottleneck) -> list[str]:
    what = b.name if b.kind == "pool" else f"stage {b.name} in {b.workers} worker{'' if b.workers == 1 else 's'}"
    lines = [f"bottleneck: {what}, at {words.share(b.share)} of its limit"]
    if b.operator not in (b.name, b.stage):
        lines[0] += f"; {b.operator} takes {words.share(b.operator_share)} of that"
    gain = 1 - b.what_if_s / run.wall_s if run.wall_s > 0 else 0.0
    more = f"one more {b.name} worker" if b.kind == "pool" else "one more worker for it"
    if gain >= _WORTH_TELLING:
        lines.append(f"{more}: about {words.duration(b.what_if_s)} ({words.share(gain)} less)")
    else:
        lines.append(f"{more} would bring nothing")
    return lines


def guards(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with outputs of models, a line for each kind."""
    lines: list[str] = []
    for op, wrong in found.items():
        for kind, word in (("nan", "NaN"), ("infinite", "infinite")):
            counts = [f"{words.count(n)} in {column}" for column, n in wrong.get(kind, {}).items()]
            if counts:
                lines.append(f"{op} made values that are {word}: {', '.join(counts)}")
        if wrong.get("failed"):
            lines.append(f"{op} failed on {words.plural(wrong['failed'], 'row')}, which have nulls: {wrong['why']}")
    return lines


def metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each metric."""
    width = max(words.cells(name) for name in metrics)
    return [f"{name}{' ' * (width - words.cells(name))}  {_value(value)}" for name, value in metrics.items()]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return words.count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns aligned: text to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(words.cells(line[i]) for line in lines) for i in range(len(head))]
    left = {i for i, name in enumerate(head) if name in ("pool", "stage")}
    out: list[str] = []
    for line in lines:
        padded = [
            cell + " " * (width - words.cells(cell)) if i in left else " " * (width - words.cells(cell)) + cell
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  " + "  ".join(padded).rstrip())
    return out
