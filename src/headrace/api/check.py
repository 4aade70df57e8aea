"""check(): a rehearsal. Sampled rows go through the plan by the run's own planner, scheduler and workers; nothing is written.

Only the two ends differ from a run: rows come from memory, where a sample of the source's was read to, and end in a sink that
keeps what it learns (api/trial.py). What fails is collected as with on_error="quarantine"; what would end a run whatever the
row (a model that can't be constructed) is a failure, too. `sampling` says which rows, `estimate` what the whole would take.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from headrace.api.estimate import Estimate, Output, Situation, Steps, estimate
from headrace.api.placing import reach
from headrace.api.planning import Prepared, parse_options, prepare
from headrace.api.sampling import Sample, take_sample
from headrace.api.session import accumulators_of, make_driver
from headrace.api.trial import Rows, TrialAside, TrialReceipt, TrialSink, TrialSource, common_schema, schema_of
from headrace.core.errors import HeadraceError, InternalError, PlanError
from headrace.core.guards import split_guards
from headrace.core.options import ActionOptions, RunOptions
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.schemas import common
from headrace.observe.rehearsal import Failure, Rehearsal
from headrace.observe.report import guards as guard_lines
from headrace.plan.nodes import Evaluate, Limit, MapBatches, Op, Plan, Predict, Write
from headrace.plan.physical import is_stream
from headrace.runtime.committer import Committer
from headrace.runtime.signals import handling_signals
from headrace.scheduler.messages import Settle

if TYPE_CHECKING:
    import pyarrow as pa

FIRST_ROWS = 1000
MOST_ROWS = 64_000
QUICK_S = 2.0  # what a rehearsal may take to be worth more rows
MOST_FAILURES = 100  # told one by one
SMALL_SHARE = 8  # a place's rows are rehearsed as one part in so many, and the rest
NO_LIMIT = 1 << 60

NULLS_HINT = 'mend that model; with on_error="quarantine" (or "skip") its columns are null where it fails'
DRIFT_HINT = "return one type for every row, or declare it (schema=, output={name: type})"

_HINTS = {
    "read": 'on_error="quarantine" (or "skip") sets aside what can\'t be read',
    "write": DRIFT_HINT,
}
_ROW_HINT = 'mend it, or run with on_error="quarantine" (or "skip"), which sets such rows aside'


def check(plan: Plan, rows: int | None, splits: int, price_per_hour: float | None, options: ActionOptions) -> Rehearsal:
    """See Dataset.check. rows None: FIRST_ROWS, and more when those were quick."""
    _check_numbers(FIRST_ROWS if rows is None else rows, splits, price_per_hour)
    parsed = _trial_options(options)
    with reach(parsed):
        return _check(plan, rows, splits, price_per_hour, parsed)


def _check(plan: Plan, rows: int | None, splits: int, price_per_hour: float | None, parsed: RunOptions) -> Rehearsal:
    name = f"check of {' > '.join([plan.read.name, *(op.name for op in plan.ops)])}"
    try:
        ready = _prepared(plan, parsed)
        source = ready.program.source
        sample = take_sample(source, ready.physical.limits, rows or FIRST_ROWS, splits)
    except PlanError:
        raise
    except HeadraceError as error:  # no input, or none that can be understood
        return Rehearsal(name, False, (_run_failure(error, "read"),))
    trial = _Trial(ready, source.schema())
    if sample.places:
        trial.run(sample, splits)
    more = _more_rows(plan, trial, sample) if rows is None else 0
    if more:  # what a call costs, and what a row, is told apart only by batches as large as the run's
        sample = take_sample(source, ready.physical.limits, more, splits)
        trial = _Trial(ready, source.schema())
        trial.run(sample, splits)
    return _report(name, plan, trial, sample, price_per_hour)


def _more_rows(plan: Plan, trial: _Trial, sample: Sample) -> int:
    """Rows worth a second rehearsal; 0 when the first one says enough, or rows are requests that somebody pays for."""
    if trial.error is not None or trial.aside or not sample.places or trial.wall_s > QUICK_S / 2:
        return 0
    if any(isinstance(op, Predict) and is_stream(op) for op in plan.ops):
        return 0
    return min(MOST_ROWS, int(sample.rows * QUICK_S / max(trial.wall_s, QUICK_S * sample.rows / MOST_ROWS)))


def _check_numbers(rows: object, splits: object, price_per_hour: object) -> None:
    for label, value in (("rows", rows), ("splits", splits)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{label} is {value!r}", hint="use a whole number of at least 1")
    if price_per_hour is not None and (
        isinstance(price_per_hour, bool) or not isinstance(price_per_hour, int | float) or not 0 <= price_per_hour < 1e12
    ):
        raise PlanError(f"price_per_hour is {price_per_hour!r}", hint="use what this machine costs an hour, as a number")


def _trial_options(options: ActionOptions) -> RunOptions:
    """The run's options, with every failure collected and none too many."""
    asked = parse_options(options)
    return replace(asked, on_error="quarantine", max_bad_rows=None, max_bad_fraction=None, progress="quiet", take_over=False)


def _prepared(plan: Plan, options: RunOptions) -> Prepared:
    """The plan as the run would have it."""
    ops = tuple(_without_end(op) for op in plan.ops)
    return prepare(Plan(plan.read, ops, Write(TrialSink())), options)


def _without_end(op: Op) -> Op:
    """Limits and stop conditions would keep sampled rows from what follows."""
    if isinstance(op, Limit):
        return replace(op, rows=NO_LIMIT)
    return replace(op, stop_if={}) if isinstance(op, Evaluate) else op


class _TrialCommitter(Committer):
    """Keeps what settled splits tell, by split."""

    def __init__(self, accumulators: Mapping[str, Any]) -> None:
        super().__init__(accumulators)
        self.receipts: dict[int, TrialReceipt] = {}
        self.aside: list[TrialAside] = []

    def settle(self, done: Settle) -> None:
        super().settle(done)
        if not done.cancelled:
            self.aside += [file for file in done.aside if isinstance(file, TrialAside)]
            if isinstance(done.receipt, TrialReceipt):
                self.receipts[done.split.index] = done.receipt


class _Trial(Struct):
    """The rehearsal's run. error: what ended it. pieces: what was served, a split each."""

    ready: Prepared
    schema: pa.Schema
    steps: Steps = field(default_factory=Steps)
    pieces: list[Rows] = field(default_factory=list[Rows])
    committer: _TrialCommitter | None = None
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    error: HeadraceError | None = None
    workers: int = 0
    wall_s: float = 0.0

    @property
    def receipts(self) -> dict[int, TrialReceipt]:
        return {} if self.committer is None else self.committer.receipts

    @property
    def aside(self) -> list[TrialAside]:
        return [] if self.committer is None else self.committer.aside

    def run(self, sample: Sample, splits: int) -> None:
        """Raises only what is a fault of ours, or a signal."""
        ready = self.ready
        self.pieces = _pieces(sample)
        source = TrialSource(ready.program.source.name, self.schema, self.pieces)
        workers = _few(ready.workers, max(1, splits // 2))
        self.workers = len(workers)
        routes = tuple(r for r in ready.physical.routes if r.name == "fused") or ready.physical.routes
        trial = replace(
            ready,
            program=replace(ready.program, source=source),
            physical=replace(ready.physical, routes=routes),
            workers=workers,
        )
        self.committer = _TrialCommitter(accumulators_of(ready))
        driver = make_driver(trial, [self.steps], self.committer)
        began = time.perf_counter()
        try:
            with handling_signals(driver, resumable=False):
                self.metrics = driver.run()
        except InternalError:
            raise
        except HeadraceError as error:
            self.error = error
        self.wall_s = time.perf_counter() - began


def _pieces(sample: Sample) -> list[Rows]:
    """Each place's rows as two splits, a small and a large one; the small ones first, so that workers warm up on those."""
    uris = [p.label for p in sample.places]
    small: list[Rows] = []
    large: list[Rows] = []
    for number, place in enumerate(sample.places):
        cut = place.count // SMALL_SHARE
        left: list[Any] = []
        right: list[Any] = []
        for batch, origin in place.blocks:
            n = min(cut, batch.num_rows)
            cut -= n
            if n:
                left.append((batch.slice(0, n), origin.slice(0, n)))
            if n < batch.num_rows:
                right.append((batch.slice(n), origin.slice(n, batch.num_rows - n)))
        for blocks, pieces in ((left, small), (right, large)):
            if blocks:
                segments = blocks[0][1].segments
                place_in = f" from row {segments[0].row:,}" if uris.count(place.label) > 1 and segments else ""
                pieces.append(Rows(number, place.label + place_in, tuple(blocks)))
    return small + large


def _few(workers: Sequence[WorkerSpec], most: int) -> tuple[WorkerSpec, ...]:
    """Of each pool no more than there is work for; two of each kind of device."""
    kept: list[WorkerSpec] = []
    for worker in workers:
        allowed = most if worker.pool == CPU_POOL else min(most, 2)
        if sum(k.pool == worker.pool for k in kept) < allowed:
            kept.append(replace(worker, id=len(kept)))
    return tuple(kept)


# --- the report ------------------------------------------------------------------------------------------------------


def _report(name: str, plan: Plan, trial: _Trial, sample: Sample, price_per_hour: float | None) -> Rehearsal:
    receipts, aside = trial.receipts, trial.aside
    schemas = [(trial.pieces[i].label, schema_of(r)) for i, r in sorted(receipts.items()) if r.schema]
    conflicts, drifts = _drift(schemas)
    metrics, guards = split_guards(trial.metrics, {i: op.name for i, op in enumerate(trial.ready.program.ops)})
    broken_conditions, met_conditions = _stop_conditions(plan, metrics)
    ended = [] if trial.error is None else [_run_failure(trial.error, "run")]
    nulls = [Failure(op, "", None, w["why"], NULLS_HINT, w["failed"]) for op, w in guards.items() if w.get("failed")]
    failures = [*ended, *sample.failures, *_row_failures(aside), *nulls, *conflicts, *broken_conditions]
    failed = sample.rows_failed + sum(a.rows for a in aside) + sum(f.rows for f in nulls)
    output = _output(receipts)
    workers: dict[str, int] = {}
    for worker in trial.ready.workers:
        workers[worker.pool] = workers.get(worker.pool, 0) + 1
    report = Rehearsal(
        name=name,
        ok=not failures,
        failures=tuple(_some_of_each(failures, MOST_FAILURES)),
        rows_failed=failed,
        warnings=(*drifts, *guard_lines({op: {**wrong, "failed": 0} for op, wrong in guards.items()}), *met_conditions),
        schema=common_schema([s for _, s in schemas]) if schemas else None,
        rows_sampled=sample.rows,
        splits_sampled=len(sample.places),
        rows_expected=sample.rows_expected,
        rows_exact=sample.rows_exact,
        inputs=sample.survey.count,
        bytes=sample.survey.bytes,
        listed_whole=sample.survey.whole,
        metrics=metrics,
        engine=trial.ready.engine,
        workers=workers,
    )
    if ended:  # what was measured until then says nothing of the whole
        return report
    found = _estimated(plan, trial, sample, output, workers)
    measured = found.expected_s is not None
    return dataclasses.replace(
        report,
        rows_out=found.rows_out,
        output_bytes=None if found.rows_out is None else round(found.rows_out * output.row_bytes),
        stages=found.stages,
        bottleneck=found.bottleneck,
        startup_s=found.startup_s if measured else None,
        expected_s=found.expected_s,
        expected_low_s=found.low_s,
        expected_high_s=found.high_s,
        memory_bytes=found.memory_bytes if measured else None,
        cost=found.expected_s / 3600 * price_per_hour if found.expected_s is not None and price_per_hour is not None else None,
        notes=tuple(_notes(plan, trial.ready, sample, found, failed)),
    )


def _row_failures(asides: Sequence[TrialAside]) -> list[Failure]:
    """Of all rows that were set aside; those that are not told one by one are counted with the last of their file."""
    found: list[Failure] = []
    for aside in asides:
        for stage, uri, row, rows, error in aside.notes:
            found.append(Failure(stage, uri, row, error, _HINTS.get(stage, _ROW_HINT), rows))
        if found:
            untold = aside.rows - sum(rows for *_, rows, _ in aside.notes)
            found[-1] = dataclasses.replace(found[-1], rows=found[-1].rows + untold)
    return sorted(found, key=lambda f: (f.stage, f.kind, f.uri, f.row or 0))


def _some_of_each(failures: Sequence[Failure], most: int) -> list[Failure]:
    """At most `most`, and of each kind as many as there is room for; the last one of a kind stands for those left out."""
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        kinds.setdefault((failure.stage, failure.kind), []).append(failure)
    share = max(1, most // max(1, len(kinds)))
    kept: list[Failure] = []
    for same in list(kinds.values())[:most]:
        shown = same[:share]
        shown[-1] = dataclasses.replace(shown[-1], rows=shown[-1].rows + sum(f.rows for f in same[share:]))
        kept += shown
    return kept


def _run_failure(error: HeadraceError, stage: str) -> Failure:
    """What ends a run whatever the row."""
    where = dict(error.where)
    row, _, uri = where.get("row", "").partition(" of ")
    at = int(row) if row.isdigit() else None
    text = f"{type(error).__name__}: {error.message}"
    return Failure(where.get("stage", stage), uri or where.get("file", ""), at, text, error.hint, rows=0)


def _drift(schemas: Sequence[tuple[str, pa.Schema]]) -> tuple[list[Failure], list[str]]:
    """(columns whose types have nothing in common, columns whose types differ and can be brought together)."""
    failures: list[Failure] = []
    warnings: list[str] = []
    names = list(dict.fromkeys(name for _, schema in schemas for name in schema.names))
    for name in names:
        places: list[tuple[pa.DataType, list[str]]] = []
        missing: list[str] = []
        for label, schema in schemas:
            index = schema.get_field_index(name)
            if index < 0:
                missing.append(label)
                continue
            kind = schema.field(index).type
            same = next((labels for known, labels in places if known.equals(kind)), None)
            if same is None:
                places.append((kind, [label]))
            else:
                same.append(label)
        if len(places) < 2 and not missing:
            continue
        told = ", ".join(f"{kind} in {_some(labels)}" for kind, labels in places)
        if missing:
            told += f", and is missing in {_some(missing)}"
        if _go_together([kind for kind, _ in places]):
            warnings.append(f"column {name!r} is {told}; {DRIFT_HINT}")
        else:
            failures.append(Failure("schema", places[1][1][0], None, f"column {name!r} is {told}", DRIFT_HINT, rows=0))
    return failures, warnings


def _go_together(types: Sequence[pa.DataType]) -> bool:
    both = types[0]
    for other in types[1:]:
        joined = common(both, other)
        if joined is None:
            return False
        both = joined
    return True


def _some(labels: Sequence[str]) -> str:
    different = list(dict.fromkeys(labels))
    if len(different) <= 2:
        return " and ".join(different)
    return f"{different[0]}, {different[1]} and {len(different) - 2} more"


def _stop_conditions(plan: Plan, metrics: Mapping[str, Any]) -> tuple[list[Failure], list[str]]:
    """evaluate(stop_if=...) on the sampled rows' metrics."""
    failures: list[Failure] = []
    warnings: list[str] = []
    for op in plan.ops:
        for name, rule in op.stop_if.items() if isinstance(op, Evaluate) else ():
            if name not in metrics:
                continue
            try:
                met = bool(rule(metrics[name]))
            except Exception as exc:
                text = f"stop_if[{name!r}] raised {type(exc).__name__}: {exc}"
                failures.append(Failure("evaluate", "", None, text, "mend the condition", rows=0))
                continue
            if met:
                warnings.append(f"stop_if[{name!r}] is true of the sampled rows: the run would end early")
    return failures, warnings


def _output(receipts: Mapping[int, TrialReceipt]) -> Output:
    """Means are weighted by rows: larger splits tell more."""
    told = [r for r in receipts.values() if r.rows]
    rows = sum(r.rows for r in told)
    if not rows:
        return Output()
    return Output(
        rows,
        sum(r.arrow_bytes for r in told),
        sum(r.row_bytes * r.rows for r in told) / rows,
        sum(r.row_s * r.rows for r in told) / rows,
    )


def _estimated(plan: Plan, trial: _Trial, sample: Sample, output: Output, workers: Mapping[str, int]) -> Estimate:
    ready = trial.ready
    asked = [op.rows for op in plan.ops if isinstance(op, Limit)]
    places = [i for i, op in enumerate(ready.program.ops) if isinstance(op, Limit)]
    route = next((r for r in ready.physical.routes if r.name == "fused"), ready.physical.routes[0])
    situation = Situation(
        ops=ready.program.ops,
        stages=ready.physical.stages,
        route=route.stages,
        workers=workers,
        trial_workers=trial.workers,
        limits=dict(zip(places, asked, strict=True)),
        block=ready.physical.limits,
        budget_bytes=ready.budget_bytes,
        remote=ready.program.source.remote,
        processes=ready.engine == "processes",
    )
    return estimate(trial.steps, sample, output, situation)


def _notes(plan: Plan, ready: Prepared, sample: Sample, found: Estimate, failed: int) -> list[str]:
    """What there is to know of how the figures came about."""
    notes = [note for note in ready.notes if " held the interpreter lock " in note]
    if not sample.rows and not sample.failures:
        notes.append("there was no row to rehearse")
    if any(isinstance(op, Limit) for op in plan.ops):
        notes.append("rows from all over the input were rehearsed; the run itself reads only what its limit needs")
    if sample.rows and failed:
        notes.append("batches with rows that fail are halved until those are alone: times of their stages are too high")
    if sample.rows and not found.warm and found.expected_s is not None:
        notes.append("too few rows to tell start-up from work: give more with rows=")
    if not sample.survey.whole:
        notes.append("listing took too long and was ended: sizes and times are of what was listed")
    each = sample.rows // max(1, len(sample.places))
    for op in ready.program.ops:
        if isinstance(op, Predict | MapBatches) and op.batch_rows and each and each < op.batch_rows:
            wanted = op.batch_rows * len(sample.places)
            notes.append(
                f"{op.name} was rehearsed with batches of {each} rows, fewer than its {op.batch_rows}: try rows={wanted}"
            )
    return notes
