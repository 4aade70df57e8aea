"""Rehearsal: what `Dataset.check` returns, and its text. Frozen, pure: measures nothing, decides nothing.

Definitions:
- seconds per row of an operator are those of one worker that is warmed up: what its first call took beyond that is start-up.
- work of a pool = sum over its operators of (rows expected there x seconds per row); its time is that over its workers.
- expected_s = start-up + the longest of these times; the range comes from how far the sampled splits are apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.observe import words
from headrace.observe.report import metric_lines, table
from headrace.observe.run import plain

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_KINDS = 8  # kinds of failures in the text
SHOWN_COLUMNS = 30
SHOWN_CHARS = 300  # of an exception's text
_NAME_CELLS = 44


@dataclass(frozen=True, slots=True)
class Failure:
    """stage: the operator, "read", "write", "schema" or "run". uri, row: where the row came from; "" and None when that is not
    known. error: the exception's type and text. next: what to do, "" when the text says it. rows: that it stands for (0: input
    of which nobody can tell the rows, or what ends a run whatever the row).
    """

    stage: str
    uri: str
    row: int | None
    error: str
    next: str = ""
    rows: int = 1

    @property
    def kind(self) -> str:
        """Texts that differ in their numbers alone are of one kind."""
        return re.sub(r"\d+", "#", self.error[:80])


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """s_per_row: of a warm worker, per row that comes in. rows: that will come in. startup_s: of a worker's first call, beyond
    that: imports, construction of the model, warming up.
    """

    name: str
    s_per_row: float
    rows: float
    startup_s: float = 0.0

    @property
    def work_s(self) -> float:
        return self.s_per_row * self.rows


@dataclass(frozen=True, slots=True)
class StageCost:
    """workers: that will run it on this machine. s_per_row: per row that enters the stage. bytes_per_row: Arrow size of what
    leaves it, 0 when nothing did. startup_s: a worker's.
    """

    name: str
    pool: str
    workers: int
    s_per_row: float
    bytes_per_row: float
    startup_s: float
    operators: tuple[OperatorCost, ...] = ()

    @property
    def work_s(self) -> float:
        return sum(op.work_s for op in self.operators)


@dataclass(frozen=True)
class Rehearsal:
    """What a trial of sampled rows found, and what the whole run would take on this machine. Print it; `to_dict` for JSON.

    ok: nothing failed; warnings may be there. failures: the first of each kind (stage and text) and more, at most 100;
    rows_failed counts all. schema: of the output, brought together over the splits; None when no row came out.
    splits_sampled: as many places of the input. rows_sampled: that entered the plan. rows_expected, rows_out: of the whole
    run, in and out; None when that can't be told. rows_exact: rows_expected is known, not extrapolated. inputs, bytes: of the
    whole input, stored size; listed_whole is False when listing took too long: then there is more. output_bytes: as Parquet.
    bottleneck: operator and pool, "" when nothing was measured. startup_s, expected_s, expected_low_s, expected_high_s,
    memory_bytes (driver and workers at their peak) and cost (in the unit of the price) are estimates; None when nothing was
    measured.
    metrics: of the sampled rows alone, a preview. engine, workers: that the run would use, {pool: number}.
    """

    name: str
    ok: bool
    failures: tuple[Failure, ...] = ()
    rows_failed: int = 0
    warnings: tuple[str, ...] = ()
    schema: pa.Schema | None = None
    rows_sampled: int = 0
    splits_sampled: int = 0
    rows_expected: int | None = None
    rows_exact: bool = False
    rows_out: int | None = None
    inputs: int = 0
    bytes: int = 0
    listed_whole: bool = True
    output_bytes: int | None = None
    stages: tuple[StageCost, ...] = ()
    bottleneck: str = ""
    startup_s: float | None = None
    expected_s: float | None = None
    expected_low_s: float | None = None
    expected_high_s: float | None = None
    memory_bytes: int | None = None
    cost: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    engine: str = ""
    workers: Mapping[str, int] = field(default_factory=dict[str, int])
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the schema as {column: type as text}."""
        shown = asdict(self)
        shown["schema"] = None if self.schema is None else {f.name: str(f.type) for f in self.schema}
        return plain(shown)

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def text(r: Rehearsal) -> str:
    """Several lines: verdict, failures, what comes out, what it takes."""
    lines = [f"{r.name}  {_verdict(r)}", *(f"  {line}" for line in _facts(r))]
    if r.failures:
        lines += ["", "  failures", *(f"    {line}" for line in _failures(r.failures))]
    lines += [f"  warning: {line}" for line in r.warnings]
    if r.schema is not None:
        lines += ["", "  output", *(f"    {line}" for line in _schema(r.schema))]
    if r.stages and r.rows_sampled:
        lines += ["", *_stages(r.stages)]
    if r.expected_s is not None:
        lines += ["", *(f"  {line}" for line in _estimates(r))]
    if r.metrics:
        lines += ["", "  metrics of the sampled rows alone", *(f"    {line}" for line in metric_lines(r.metrics))]
    return "\n".join([*lines, *(f"  note: {note}" for note in r.notes)])


def _verdict(r: Rehearsal) -> str:
    if r.ok:
        return "ready to run" + (f", with {words.plural(len(r.warnings), 'warning')}" if r.warnings else "")
    if r.rows_failed:
        return f"not ready: {words.plural(r.rows_failed, 'row')} of {words.count(r.rows_sampled)} sampled failed"
    return "not ready"


def _facts(r: Rehearsal) -> list[str]:
    facts = [f"rehearsed {words.plural(r.rows_sampled, 'row')} of {words.plural(r.splits_sampled, 'place')} in the input"]
    more = "" if r.listed_whole else "at least "
    if r.rows_expected is not None:
        about = "" if r.rows_exact else "about "
        facts.append(f"the whole input: {more or about}{words.plural(r.rows_expected, 'row')}")
    if r.inputs:
        facts[-1] += f" in {more}{words.plural(r.inputs, 'input')}, {words.size(r.bytes)}"
    facts.append("nothing was written")
    return facts


def _failures(failures: Sequence[Failure]) -> list[str]:
    """One entry for each stage and text, the first place of it."""
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        kinds.setdefault((failure.stage, failure.kind), []).append(failure)
    lines: list[str] = []
    for same in list(kinds.values())[:SHOWN_KINDS]:
        first = same[0]
        rows = sum(f.rows for f in same)
        lines.append(f"{first.stage}: {words.one_line(first.error)[:SHOWN_CHARS]}")
        where = _place(first)
        if rows > 1:
            where += f", and {words.plural(rows - min(1, first.rows), 'other row')}" if where else words.plural(rows, "row")
        if where:
            lines.append(f"  {where}")
        if first.next:
            lines.append(f"  next: {words.one_line(first.next)}")
    if len(kinds) > SHOWN_KINDS:
        lines.append(f"... and {words.plural(len(kinds) - SHOWN_KINDS, 'other kind')}: see .failures")
    return lines


def _place(failure: Failure) -> str:
    if not failure.uri:
        return ""
    return failure.uri if failure.row is None else f"row {failure.row:,} of {failure.uri}"


def _schema(schema: pa.Schema) -> list[str]:
    shown = list(schema)[:SHOWN_COLUMNS]
    width = max((words.cells(f.name) for f in shown), default=0)
    lines = [f"{f.name}{' ' * (width - words.cells(f.name))}  {f.type}" for f in shown]
    if len(schema) > len(shown):
        lines.append(f"... and {words.plural(len(schema) - len(shown), 'other column')}")
    return lines or ["no columns"]


def _stages(stages: Sequence[StageCost]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        rows.append(_row(stage.name, f"{stage.pool} x{stage.workers}", stage.s_per_row, stage.work_s, stage.startup_s))
        for op in stage.operators:
            rows.append(_row(f"  {op.name}", "", op.s_per_row, op.work_s, op.startup_s))
    return table(("stage", "pool", "a row", "rows/s a worker", "work in all", "start-up"), rows)


def _row(name: str, pool: str, s_per_row: float, work_s: float, startup_s: float) -> tuple[str, ...]:
    speed = words.rate(1 / s_per_row) if s_per_row > 0 else "-"
    startup = words.duration(startup_s) if startup_s >= 0.01 else "-"
    return (words.cut(name, _NAME_CELLS), pool, _short(s_per_row), speed, words.duration(work_s), startup)


def _short(seconds: float) -> str:
    """0.8 µs, 12 µs, 3.4 ms, 1.20 s."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{seconds * 1e6:.2f} µs" if seconds > 0 else "-"


def _estimates(r: Rehearsal) -> list[str]:
    assert r.expected_s is not None
    lines: list[str] = []
    if r.bottleneck:
        lines.append(f"bottleneck: {r.bottleneck}")
    sure = ""
    if r.expected_low_s is not None and r.expected_high_s is not None:
        sure = f" (between {words.duration(r.expected_low_s)} and {words.duration(r.expected_high_s)})"
    workers = ", ".join(f"{n} {pool}" for pool, n in r.workers.items())
    least = "" if r.listed_whole else "at least "
    lines.append(f"expected on this machine: {least}{words.duration(r.expected_s)}{sure}")
    if r.startup_s is not None and r.startup_s >= 0.1:
        lines[-1] += f"; start-up {words.duration(r.startup_s)} of it"
    lines.append(f"engine: {r.engine}; workers: {workers}")
    if r.rows_out is not None and r.output_bytes is not None:
        lines.append(f"output: about {words.plural(r.rows_out, 'row')}, {words.size(r.output_bytes)} as Parquet")
    if r.memory_bytes is not None:
        lines.append(f"memory at its peak: about {words.size(r.memory_bytes)}")
    if r.cost is not None:
        lines.append(f"cost: about {r.cost:,.2f}" if r.cost >= 1 else f"cost: about {r.cost:.2g}")
    return lines
