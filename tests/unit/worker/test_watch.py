"""Breadcrumbs and suspects: what a worker says before user code runs, and rows that are run alone or never again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.unit.worker.fakes import SPLIT, BatchSource, Bench, DictStore, KeepingSink, ListCrumb, column, fn, numbers
from tests.unit.worker.test_bad_rows import OPS

from headrace.core.errors import WorkerDied
from headrace.core.refs import Segment
from headrace.core.stages import Order
from headrace.core.steps import StepDone, StepFailed, Suspect
from headrace.plan import nodes
from headrace.worker.watch import SAMPLE_BYTES, Halt, row_bytes, row_digest

USER_OPS = ["map", "filter", "flat", "batches", "generator", "apply", "predict", "evaluate"]


def crumbed() -> tuple[DictStore, ListCrumb]:
    store, crumb = DictStore(), ListCrumb()
    store.crumb = crumb
    return store, crumb


def suspect(op: int, row: int, rows: int = 1, condemned: tuple[tuple[str, str], ...] = ()) -> Suspect:
    return Suspect(op, (Segment("a.parquet", row, rows),), condemned)


def model(x: np.ndarray) -> np.ndarray:
    return x * 3


PREDICT = nodes.Predict(fn(model), ("x",), True, ("p",), batch_rows=4)


@pytest.mark.parametrize("name", USER_OPS)
def test_every_batch_is_announced_and_nothing_is_left_after_the_step(name):
    store, crumb = crumbed()
    bench = Bench([nodes.Limit(50), OPS[name][0]], source=BatchSource([numbers(6)]), store=store, on_error="skip")
    bench.run()
    assert crumb.written
    assert {(d.op, d.name, d.digest, d.sample) for d in crumb.written} == {(1, OPS[name][0].name, "", b"")}
    named = {r for d in crumb.written for s in d.segments for r in range(s.row, s.row + s.rows)}
    assert named == set(range(6))
    assert crumb.cleared == len(bench.answers)


def test_a_construction_is_announced_and_over_before_the_first_batch():
    store, crumb = crumbed()
    seen: list[tuple[int, int]] = []

    class Model:
        def __init__(self) -> None:
            seen.append((len(crumb.written), crumb.cleared))

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return x

    Bench(
        [nodes.Predict(fn(Model, is_class=True), ("x",), True, ("p",), batch_rows=4)],
        source=BatchSource([numbers(6)]),
        store=store,
    ).run()
    assert seen == [(1, 0)]
    making, *batches = crumb.written
    assert (making.constructing, making.name, making.segments) == (True, "predict(Model)", ())
    assert batches
    assert not any(doing.constructing for doing in batches)


@pytest.mark.parametrize("name", USER_OPS)
@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_suspected_rows_are_run_alone_with_the_same_result(name, on_error):
    batches = [numbers(8), numbers(8, 8)]
    plain = Bench([OPS[name][0]], source=BatchSource(batches), on_error=on_error)
    rows = plain.run()
    store, crumb = crumbed()
    bench = Bench([OPS[name][0]], source=BatchSource(batches), store=store, on_error=on_error)
    alone = bench.run(suspects=(suspect(0, 3), suspect(5, 12)))
    assert pa.Table.from_batches(alone).to_pydict() == pa.Table.from_batches(rows).to_pydict()
    assert bench.tally == plain.tally
    single = [d for d in crumb.written if d.digest]
    assert single
    assert any(d.segments == (Segment("a.parquet", 3, 1),) for d in single)
    assert all(d.sample and row_digest(d.sample) == d.digest for d in single)
    assert not any(s.row >= 12 for d in single for s in d.segments), "that suspect is another operator's"


@pytest.mark.parametrize("name", USER_OPS)
def test_a_condemned_row_is_never_run_but_set_aside(name):
    given = numbers(6)
    store, crumb = crumbed()
    scout = Bench([OPS[name][0]], source=BatchSource([given]), store=store, on_error="skip")
    scout.run(suspects=(suspect(0, 0),))
    digest = crumb.written[0].digest
    sink = KeepingSink()
    bench = Bench([OPS[name][0]], source=BatchSource([given]), sink=sink, on_error="quarantine")
    bench.run(suspects=(suspect(0, 0, condemned=((digest, "killed by signal 11"),)),))
    rows = [row for _, _, t in sink.aside for row in t.to_pylist() if row["x"] == 0]
    assert [(r["_exception"], r["_source_row"]) for r in rows] == [("WorkerDied: killed by signal 11", 0)]
    assert 0 not in column(sink.published, "x")


def test_a_condemned_row_ends_a_run_that_fails_on_bad_rows():
    store, crumb = crumbed()
    bench = Bench([PREDICT], source=BatchSource([numbers(6)]), store=store)
    bench.run(suspects=(suspect(0, 2),))
    digest = next(d.digest for d in crumb.written if d.segments == (Segment("a.parquet", 2, 1),))
    suspects = (suspect(0, 2, condemned=((digest, "no answer for 30 s"),)),)
    done = Bench([PREDICT], source=BatchSource([numbers(6)])).advance(split=SPLIT, end=True, suspects=suspects)
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, WorkerDied)
    assert ("row", "2 of a.parquet") in done.error.where


def test_a_row_has_one_digest_on_every_route():
    """Among other operators and in a step of its own; after a filter, in another batch, beside other columns."""
    store, crumb = crumbed()
    ops = [nodes.FilterExpr(pc.field("x") > 1, ("x",)), PREDICT]
    Bench(ops, source=BatchSource([numbers(3), numbers(6, 3)]), store=store).run(suspects=(suspect(1, 0, 99),))
    fused = {d.segments[0].row: d.digest for d in crumb.written}
    step_store, step_crumb = crumbed()
    bench = Bench([PREDICT], model=True, columns_in=("x",), order=Order.FREE, store=step_store)
    done = bench.apply(numbers(9), suspects=(suspect(0, 0, 9),))
    assert isinstance(done, StepDone)
    assert bench.batch(done.outputs[0])["p"].to_pylist() == [3 * x for x in range(9)]
    step = {d.segments[0].row: d.digest for d in step_crumb.written}
    assert step.keys() == set(range(9))
    assert fused == {row: digest for row, digest in step.items() if row > 1}


def test_a_stream_is_asked_row_by_row():
    class Stream:
        calls: list[list[int]] = []  # noqa: RUF012

        async def stream(self, rows: Any) -> Any:
            held = [item async for item in rows]
            self.calls.append([row["x"] for _, row in held])
            for key, row in held:
                yield key, {"p": row["x"]}

    op = nodes.Predict(fn(Stream()), ("x",), False, ("p",))
    bench = Bench([op], model=True, columns_in=("x",), order=Order.FREE)
    try:
        done = bench.apply(numbers(3), suspects=(suspect(0, 1),))
    finally:
        bench.body.close()
    assert isinstance(done, StepDone)
    assert bench.batch(done.outputs[0])["p"].to_pylist() == [0, 1, 2]
    assert Stream.calls == [[0], [1], [2]]


def test_digests_are_of_content_alone():
    values = {"b": [i % 3 == 0 for i in range(64)], "s": [None if i % 5 == 0 else f"v{i % 7}" for i in range(64)]}
    batch = pa.record_batch(values)
    again = pa.record_batch({n: v[40:48] for n, v in values.items()}).replace_schema_metadata({"k": "v"})
    other = batch.append_column("d", pa.array(["a", "b"] * 32).dictionary_encode()).slice(42, 1)
    third = again.append_column("d", pa.array(["a"] * 8).dictionary_encode()).slice(2, 1)
    assert row_bytes(batch.slice(42, 1)) == row_bytes(again.slice(2, 1)) != row_bytes(again.slice(3, 1))
    assert row_bytes(other) == row_bytes(third)


def test_a_row_too_large_for_the_crumb_is_named_without_its_sample():
    store, crumb = crumbed()
    batch = pa.record_batch({"x": ["a" * (SAMPLE_BYTES + 1)]})
    bench = Bench([nodes.MapRows(fn(lambda row: row))], source=BatchSource([batch]), store=store)
    bench.run(suspects=(suspect(0, 0),))
    (doing,) = crumb.written
    assert (len(doing.digest), doing.sample) == (32, b"")


# --- a run that has stopped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("kind", ["filter", "map", "flat_map", "map_batches"])
def test_once_a_run_has_stopped_no_call_of_user_code_begins(kind, on_error):
    halt, calls = Halt(), 0

    def f(given):
        nonlocal calls
        calls += 1
        halt.over = calls == 2
        return [given] if kind == "flat_map" else given

    ops = {
        "filter": nodes.FilterRows(fn(f)),
        "map": nodes.MapRows(fn(f)),
        "flat_map": nodes.FlatMap(fn(f)),
        "map_batches": nodes.MapBatches(fn(f), batch_rows=2),
    }
    store = DictStore()
    store.crumb = halt
    bench = Bench([ops[kind]], source=BatchSource([numbers(20)]), on_error=on_error, store=store)
    with pytest.raises(WorkerDied, match="the run was stopped"):
        bench.run()
    assert calls == 2
