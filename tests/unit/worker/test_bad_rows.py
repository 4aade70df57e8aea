"""Rows that fail: bisected, counted, set aside, the others kept in order; the same fused and through model steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.worker.fakes import SPLIT, BatchSource, Bench, DictStore, KeepingSink, column, fn, numbers

from headrace.contracts.source import BadRange
from headrace.core.errors import DataError, PlanError, TransientError, UserCodeError
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef
from headrace.core.stages import End, Order
from headrace.core.steps import StepDone, StepFailed
from headrace.plan import nodes

# --- a pipeline and what it should do --------------------------------------------------------------------------------


def fails(x: int, every: int, at: int) -> bool:
    return x % every == at


def map_row(row):
    if fails(row["x"], 7, 3):
        raise KeyError("three")
    return None if fails(row["x"], 11, 5) else {**row, "m": row["x"] + 1}


def keep_row(row):
    if fails(row["x"], 13, 4):
        raise ValueError("four")
    return row["x"] % 4 != 1


def flat_row(row):
    for k in range(row["x"] % 3):
        yield {**row, "k": k}
    if fails(row["x"], 5, 2):
        raise RuntimeError("late")


def batch(columns):
    if any(fails(x, 6, 1) for x in columns["x"]):
        raise ValueError("a batch with a bad row")
    return {**columns, "y": columns["x"] * 2}


def batches(columns):
    half = len(columns["x"]) // 2
    yield {n: c[:half] for n, c in columns.items()}
    if any(fails(x, 9, 2) for x in columns["x"]):
        raise ValueError("after it has yielded")
    yield {n: c[half:] for n, c in columns.items()}


def model(x):
    if any(fails(v, 8, 5) for v in x):
        raise ValueError("no")
    return x[1:] if any(fails(v, 8, 6) for v in x) else x * 3


@dataclass(frozen=True)
class Double:
    name: str = "double"
    columns_in: tuple[str, ...] = ("x",)
    columns_out: tuple[str, ...] = ("d",)
    row_bytes: int | None = 1 << 22

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        bad = [i for i, x in enumerate(batch.column("x").to_pylist()) if fails(x, 10, 7)]
        if bad:
            raise DataError("seven", where=(("row", str(bad[0])),))
        return pa.record_batch({"d": pc.multiply(batch.column("x"), 2)})

    def schema(self, schema: pa.Schema) -> pa.Schema:
        return pa.schema([("d", pa.int64())])


class Sum:
    columns = ("x",)

    def zero(self) -> int:
        return 0

    def update(self, state: int, batch: pa.RecordBatch) -> int:
        values = batch.column("x").to_pylist()
        if any(fails(x, 10, 9) for x in values):
            raise ValueError("nine")
        return state + sum(values)

    def merge(self, a: int, b: int) -> int:
        return a + b

    def result(self, state: int) -> int:
        return state


OPS: dict[str, tuple[nodes.Op, Callable[[int], bool], Callable[[int], int]]] = {
    # the operator, which rows fail, how many rows it makes of another
    "map": (nodes.MapRows(fn(map_row)), lambda x: fails(x, 7, 3) or fails(x, 11, 5), lambda x: 1),
    "filter": (nodes.FilterRows(fn(keep_row)), lambda x: fails(x, 13, 4), lambda x: int(x % 4 != 1)),
    "expr": (nodes.FilterExpr(pc.field("x") > 2, ("x",)), lambda x: False, lambda x: int(x > 2)),
    "flat": (nodes.FlatMap(fn(flat_row)), lambda x: fails(x, 5, 2), lambda x: x % 3),
    "batches": (nodes.MapBatches(fn(batch), batch_rows=3), lambda x: fails(x, 6, 1), lambda x: 1),
    "generator": (nodes.MapBatches(fn(batches)), lambda x: fails(x, 9, 2), lambda x: 1),
    "apply": (nodes.Apply(Double()), lambda x: fails(x, 10, 7), lambda x: 1),
    "predict": (
        nodes.Predict(fn(model), ("x",), True, ("p",), batch_rows=4),
        lambda x: fails(x, 8, 5) or fails(x, 8, 6),
        lambda x: 1,
    ),
    "evaluate": (nodes.Evaluate({"sum": Sum()}), lambda x: fails(x, 10, 9), lambda x: 1),
}


def expected(names: list[str], rows: list[int]) -> tuple[list[int], list[int], Tally, int]:
    """(what is left, what failed, row counts, what evaluate adds up to)."""
    bad: list[int] = []
    tally = Tally(rows_in=len(rows))
    total = 0
    for name in names:
        _, failing, made = OPS[name]
        good = [x for x in rows if not failing(x)]
        bad += [x for x in rows if failing(x)]
        rows = [x for x in good for _ in range(made(x))]
        if name == "evaluate":
            total = sum(rows)
        tally += Tally(expanded=len(rows) - len(good))  # filtered is the rest: it depends on how batches net out
    return rows, bad, tally, total


SIZES = st.lists(st.integers(0, 40), max_size=4)
NAMES = st.lists(st.sampled_from(sorted(OPS)), max_size=4, unique=True)


def split_of(sizes: list[int]) -> list[pa.RecordBatch]:
    starts = np.cumsum([0, *sizes])
    return [numbers(n, int(at)) for n, at in zip(sizes, starts[:-1], strict=True)]


def aside(sink: KeepingSink) -> list[tuple[int, int | None]]:
    """(x, source row) of all that was set aside."""
    return [pair for _, _, t in sink.aside for pair in zip(t["x"].to_pylist(), t["_source_row"].to_pylist(), strict=True)]


@settings(max_examples=80, deadline=None)
@given(names=NAMES, sizes=SIZES, credit=st.sampled_from([0, 1 << 40]))
def test_good_rows_pass_and_bad_rows_are_set_aside(names, sizes, credit):
    sink = KeepingSink()
    bench = Bench([OPS[n][0] for n in names], source=BatchSource(split_of(sizes)), sink=sink, on_error="quarantine")
    bench.run(credit_bytes=credit, credit_s=0.0 if credit == 0 else 1e9)
    rows, bad, tally, total = expected(names, list(range(sum(sizes))))
    assert column(sink.published, "x") == rows
    assert sorted(x for x, _ in aside(sink)) == sorted(bad)
    assert all(at in (x, None) for x, at in aside(sink))
    assert (bench.tally.quarantined, bench.tally.written, bench.tally.skipped) == (len(bad), len(rows), 0)
    assert bench.tally.expanded - bench.tally.filtered == tally.expanded
    if "evaluate" in names:
        assert bench.answers[-1].metrics == {"sum": total}
    check_lineage(bench, rows)
    assert sum(f.rows for a in bench.answers for f in a.aside) == len(bad)


@settings(max_examples=80, deadline=None)
@given(names=NAMES, sizes=SIZES, deterministic=st.booleans(), on_error=st.sampled_from(["skip", "quarantine"]))
def test_the_same_through_stages_of_their_own(names, sizes, deterministic, on_error):
    """Every operator in a stage of its own, models by Apply."""
    route = Spread(names, split_of(sizes), deterministic, on_error)
    rows, bad, _, total = expected(names, list(range(sum(sizes))))
    assert column(route.sink.published, "x") == rows
    if on_error == "quarantine":
        assert sorted(x for x, _ in aside(route.sink)) == sorted(bad)
        assert route.tally.quarantined == len(bad)
        assert all(at in (x, None) for x, at in aside(route.sink))
    else:
        assert (route.tally.skipped, route.sink.aside) == (len(bad), [])
    assert route.tally.balanced
    if "evaluate" in names:
        assert route.sums == total
    check_lineage(route.last, rows)


class Spread:
    """Runs a split through one stage after the other, as a scheduler would."""

    def __init__(self, names: list[str], given: list[pa.RecordBatch], deterministic: bool, on_error: Any) -> None:
        self.store = DictStore()
        self.sink = KeepingSink()
        self.tally = Tally()
        self.sums = 0
        common: dict[str, Any] = {"store": self.store, "on_error": on_error, "deterministic": deterministic}
        read = Bench([], source=BatchSource(given), sink=self.sink, end=End.NEXT, **common)
        blocks = self._advance(read, {"split": SPLIT})
        for name in names:
            op = OPS[name][0]
            if name == "predict":
                blocks = self._apply(
                    Bench([op], model=True, columns_in=("x",), order=Order.FREE, sink=self.sink, **common), blocks
                )
            elif name in ("batches", "generator"):
                blocks = self._advance(
                    Bench([op], order=Order.SPLIT, sink=self.sink, end=End.NEXT, **common), {"inputs": tuple(blocks)}
                )
            else:
                bench = Bench([op], order=Order.FREE, sink=self.sink, end=End.NEXT, **common)
                blocks = [b for i, block in enumerate(blocks) for b in self._advance(bench, {"inputs": (block,)}, i)]
        self.last = Bench([], order=Order.SPLIT, sink=self.sink, **common)
        assert self._advance(self.last, {"inputs": tuple(blocks), "split": SPLIT}) == []

    def _advance(self, bench: Bench, given: dict[str, Any], cursor: int = 0) -> list[BlockRef]:
        done = bench.advance(cursor, end=True, **given)
        if isinstance(done, StepFailed):
            raise done.error
        assert done.finished
        bench.answers.append(done)
        self.tally += done.tally
        self.sums += done.metrics.get("sum", 0)
        return list(done.outputs)

    def _apply(self, bench: Bench, blocks: list[BlockRef]) -> list[BlockRef]:
        if not blocks:
            return []
        done = bench.apply_blocks(*blocks)
        if isinstance(done, StepFailed):
            raise done.error
        assert done.tally == Tally()
        for share in done.shares:
            assert (share.split_index, share.attempt) == (0, 1)
            self.tally += share.tally
        out: list[BlockRef] = []
        for i, (block, made) in enumerate(zip(blocks, done.outputs, strict=True)):
            if i not in done.whole:
                out.append(BlockRef(block.rows, (*block.parts, *made.parts), block.origin, block.cuts))
            elif made.rows:
                assert sum(made.cuts or (made.rows,)) == made.rows
                out.append(made)
        return out


def check_lineage(bench: Bench, rows: list[int]) -> None:
    """Every output row (whose x is its row in the input) is named, and rightly."""
    receipt = bench.answers[-1].receipt
    assert receipt is not None
    named = 0
    for (row, count), runs in groupby(receipt.lineage, key=lambda run: (run.row, run.rows)):
        assert row == named
        values = rows[row : row + count]
        assert len(values) == count
        places = [list(range(r.source_row, r.source_row + r.source_rows)) for r in runs]
        assert set(values) <= {x for place in places for x in place}
        named += count
    assert named == len(rows)
    for run in receipt.lineage:
        if run.exact and run.rows == run.source_rows:
            assert rows[run.row : run.row + run.rows] == list(range(run.source_row, run.source_row + run.rows))
        assert not run.exact or run.source_rows in (1, run.rows)


def test_lineage_is_exact_until_a_batch_function():
    names = ["map", "filter", "flat", "predict"]
    sink = KeepingSink()
    bench = Bench([OPS[n][0] for n in names], source=BatchSource([numbers(50), numbers(50, 50)]), sink=sink, on_error="skip")
    bench.run()
    receipt = bench.answers[-1].receipt
    assert receipt is not None
    rows = [r.source_row + (i if r.source_rows == r.rows else 0) for r in receipt.lineage for i in range(r.rows)]
    assert rows == column(sink.published, "x")
    route = Spread(names, [numbers(50), numbers(50, 50)], False, "skip")
    (done,) = route.last.answers
    assert done.receipt is not None
    assert done.receipt.lineage == receipt.lineage


# --- what is kept of a bad row ---------------------------------------------------------------------------------------


def one_bad(row):
    if row["x"] == 4:
        raise ValueError("postgres://me:secret@host/db is down")
    return {"x": row["x"]}


def test_a_row_set_aside_has_its_columns_and_its_story():
    sink = KeepingSink()
    batch = numbers(9).append_column("_stage", pa.array(["mine"] * 9))
    ops = [nodes.FilterExpr(pc.field("x") >= 3, ("x",)), nodes.MapRows(fn(one_bad))]
    Bench(ops, source=BatchSource([batch]), sink=sink, on_error="quarantine").run()
    ((split, attempt, table),) = sink.aside
    assert (split, attempt) == (0, 1)
    (row,) = table.to_pylist()
    frames = row.pop("_traceback")
    assert "one_bad" in frames
    assert row.pop("_exception").startswith("ValueError: postgres://")
    assert row == {
        "x": 4,
        "name": "n4",
        "_stage": "mine",
        "_source_uri": "a.parquet",
        "_source_row": 4,
        "_rows": 1,
        "_stage_": "map(one_bad)",
        "_attempt": 1,
    }


def test_secrets_in_exceptions_are_not_kept():
    sink = KeepingSink()
    Bench([nodes.MapRows(fn(one_bad))], source=BatchSource([numbers(9)]), sink=sink, on_error="quarantine").run()
    assert "me:secret" not in sink.aside[0][2]["_exception"][0].as_py()


def test_many_bad_rows_are_staged_in_parts_while_the_split_goes_on():
    def fail(row):
        raise ValueError("x" * 1000)

    sink = KeepingSink()
    bench = Bench(
        [nodes.MapRows(fn(fail))], source=BatchSource([numbers(9000, i) for i in (0, 9000)]), sink=sink, on_error="quarantine"
    )
    bench.run(credit_s=0.0)
    assert len(sink.aside) > 1
    assert [f.rows for a in bench.answers for f in a.aside] == [t.num_rows for _, _, t in sink.aside]
    assert bench.tally == Tally(rows_in=18_000, quarantined=18_000)


def test_rows_of_mixed_types_lose_the_rarer():
    def f(row):
        return {"v": "text" if row["x"] == 1 else row["x"]}

    sink = KeepingSink()
    Bench([nodes.MapRows(fn(f))], source=BatchSource([numbers(5)]), sink=sink, on_error="quarantine").run()
    assert column(sink.published, "v") == [0, 2, 3, 4]
    assert "don't make a column" in sink.aside[0][2]["_exception"][0].as_py()


def test_a_flat_map_that_fails_late_passes_nothing_of_that_row_on():
    bench = Bench([nodes.FlatMap(fn(flat_row))], source=BatchSource([numbers(9)]), on_error="skip")
    assert set(column(bench.run(), "x")) == {1, 4, 5, 8}  # 2 and 7 fail, 0, 3 and 6 make nothing
    assert (bench.tally.skipped, bench.tally.filtered, bench.tally.expanded) == (2, 3, 2)


def test_an_expression_that_fails_on_a_value():
    op = nodes.FilterExpr(pc.field("s").cast(pa.int64()) > 1, ("s",))
    bench = Bench([op], source=BatchSource([pa.record_batch({"s": ["1", "2", "x", "4"]})]), on_error="skip")
    assert column(bench.run(), "s") == ["2", "4"]
    assert (bench.tally.skipped, bench.tally.filtered) == (1, 1)
    wrong = nodes.FilterExpr(pc.field("name") > 3, ("name",))
    with pytest.raises(DataError, match="can't be computed"):
        Bench([wrong], source=BatchSource([numbers(1)]), on_error="skip").run()


# --- what no row is to blame for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TransientError("later"), PlanError("never")])
def test_errors_that_no_row_is_to_blame_for_end_the_run(error):
    def fail(batch):
        raise error

    for op in (nodes.MapBatches(fn(fail)), nodes.MapRows(fn(fail)), nodes.FlatMap(fn(fail)), nodes.FilterRows(fn(fail))):
        done = Bench([op], source=BatchSource([numbers(3)]), on_error="skip").advance(split=SPLIT, end=True)
        assert isinstance(done, StepFailed)
        assert type(done.error) is type(error)


def test_a_missing_column_and_a_failed_construction_end_the_run():
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no weights")

        def __call__(self, batch):
            return batch

    ops = [
        nodes.Predict(fn(model), ("z",), True, ("p",)),
        nodes.MapBatches(fn(Broken, is_class=True)),
        nodes.Project((("z", "z"),)),
    ]
    for op in ops:
        done = Bench([op], source=BatchSource([numbers(3)]), on_error="skip").advance(split=SPLIT, end=True)
        assert isinstance(done, StepFailed)


def test_an_error_after_a_filter_names_the_row():
    def fail(row):
        raise ValueError("no")

    ops = [nodes.FilterExpr(pc.field("x") == 7, ("x",)), nodes.MapRows(fn(fail))]
    done = Bench(ops, source=BatchSource([numbers(5), numbers(5, 5)])).advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert ("row", "7 of a.parquet") in done.error.where


# --- input that can't be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_unreadable_ranges_are_counted_and_set_aside(remote):
    bad = BadRange("a.parquet", 5, 3, DataError("broken page", where=(("row group", "1"),)))
    lost = BadRange("b.parquet", -1, 0, DataError("no footer"))
    sink = KeepingSink()
    source = BatchSource([numbers(5), numbers(2, 8)], remote=remote, unreadable={1: [bad, lost]})
    bench = Bench([], source=source, sink=sink, on_error="quarantine")
    bench.run()
    assert bench.tally == Tally(rows_in=10, written=7, quarantined=3)
    rows = [row for _, _, t in sink.aside for row in t.to_pylist()]
    assert [(r["_source_uri"], r["_source_row"], r["_rows"]) for r in rows] == [("a.parquet", 5, 3), ("b.parquet", None, 0)]
    assert rows[0]["_exception"] == "DataError: broken page (row group: 1)"
    told = [text for answer in bench.answers for text in answer.unreadable]
    assert told == ["set aside input of which nobody can tell the rows: DataError: no footer"]


def test_skipped_input_that_no_tally_can_hold_is_told():
    lost = [
        BadRange(f"{name}.parquet", -1, 0, DataError("no footer", where=(("file", f"{name}.parquet"),))) for name in "abcde"
    ]
    counted = BadRange("f.parquet", 5, 3, DataError("broken page"))
    source = BatchSource([numbers(5), numbers(2, 8)], unreadable={1: [*lost, counted]})
    bench = Bench([], source=source, sink=KeepingSink(), on_error="skip")
    bench.run()
    assert bench.tally == Tally(rows_in=10, written=7, skipped=3)
    texts = [text for answer in bench.answers for text in answer.unreadable]
    assert [name for name in "abcdef" if any(f"{name}.parquet" in text for text in texts)] == ["a", "b", "c"]
    assert texts[-1] == "skipped 2 more such parts of the input"


# --- model steps -----------------------------------------------------------------------------------------------------


def step(op: nodes.Op, *more: nodes.Op, **kwargs: Any) -> Bench:
    return Bench(
        [op, *more], model=True, columns_in=("x",), order=Order.FREE, sink=KeepingSink(), on_error="quarantine", **kwargs
    )


def test_blocks_that_lost_rows_are_answered_whole():
    bench = step(OPS["predict"][0], keep=("name",))
    done = bench.apply(numbers(4), numbers(4, 4), numbers(2, 5), owners=((0, 1), (1, 1), (0, 1)))
    assert isinstance(done, StepDone)
    assert done.whole == {1, 2}
    first, second, third = done.outputs
    assert bench.batch(first).to_pydict() == {"p": [0, 3, 6, 9]}
    assert bench.batch(second).to_pydict() == {"name": ["n4", "n7"], "p": [12, 21]}
    assert (third.rows, third.parts) == (0, ())
    assert [(s.split_index, s.tally.quarantined, len(s.aside)) for s in done.shares] == [(0, 2, 1), (1, 2, 1)]
    assert bench.sink is not None
    assert [(split, t["x"].to_pylist(), t["name"].to_pylist()) for split, _, t in bench.sink.aside] == [
        (0, [5, 6], ["n5", "n6"]),
        (1, [5, 6], ["n5", "n6"]),
    ]


def test_metrics_of_a_model_stage_are_told_by_owner_and_leave_bad_rows_out():
    bench = step(OPS["predict"][0], nodes.Evaluate({"sum": Sum()}))
    done = bench.apply(numbers(4), numbers(4, 8), owners=((3, 1), (4, 2)))
    assert isinstance(done, StepDone)
    assert {(s.split_index, s.attempt): (s.metrics, s.tally.quarantined) for s in done.shares} == {
        (3, 1): ({"sum": 6}, 0),
        (4, 2): ({"sum": 8 + 10 + 11}, 1),
    }
    assert bench.batch(done.outputs[1]).to_pydict()["p"] == [24, 30, 33]


def test_a_delivering_model_stage_tells_what_it_wrote():
    done = step(OPS["predict"][0], end=End.DELIVER).apply(numbers(4, 4))
    assert isinstance(done, StepDone)
    assert [s.tally for s in done.shares] == [Tally(written=2, quarantined=2)]


class Picky:
    """A stream: some rows fail by themselves, and one breaks all of it."""

    async def stream(self, rows):
        async for key, row in rows:
            if row["x"] == 6:
                raise RuntimeError("the engine fell over")
            yield key, ValueError("no") if row["x"] == 2 else {"q": 1} if row["x"] == 4 else {"p": row["x"]}


def test_rows_of_a_stream_fail_by_themselves():
    bench = step(nodes.Predict(fn(Picky()), ("x",), False, ("p",)))
    try:
        done = bench.apply(numbers(9))
    finally:
        bench.body.close()
    assert isinstance(done, StepDone)
    assert bench.batch(done.outputs[0])["p"].to_pylist() == [0, 1, 3, 5, 7, 8]
    assert bench.sink is not None
    table = bench.sink.aside[0][2]
    assert table["x"].to_pylist() == [2, 4, 6]
    assert [e.split(":")[0] for e in table["_exception"].to_pylist()] == ["ValueError", "UserCodeError", "RuntimeError"]


def test_the_hidden_positions_reach_nobody():
    seen: list[list[str]] = []

    def look(batch):
        seen.append(sorted(batch))
        return batch

    keep = nodes.FilterExpr(pc.field("x") != 2, ("x",))
    read = Bench([keep], source=BatchSource([numbers(4)]))
    read.run()
    (block,) = read.answers[0].outputs
    assert block.origin.listed
    assert block.parts[0].columns == ("x", "name")
    later = Bench([nodes.MapBatches(fn(look))], order=Order.FREE, store=read.store, end=End.DELIVER)
    done = later.advance(inputs=(block,), end=True)
    assert isinstance(done, StepDone)
    assert seen == [["name", "x"]]
    delivered = Bench([keep], source=BatchSource([numbers(4)]), end=End.DELIVER)
    delivered.run()
    (block,) = delivered.answers[0].outputs
    assert delivered.store.kept[block.parts[0].id].schema.names == ["x", "name"]


def test_a_stage_that_drops_every_carried_column_keeps_the_positions():
    store = DictStore()
    read = Bench([nodes.FilterExpr(pc.field("x") != 2, ("x",))], source=BatchSource([numbers(4)]), store=store)
    read.run()
    (block,) = read.answers[0].outputs
    made = Bench([OPS["predict"][0]], model=True, columns_in=("x",), order=Order.FREE, store=store).apply_blocks(block)
    assert isinstance(made, StepDone)
    alone = replace(made.outputs[0], origin=block.origin)
    sink = KeepingSink()
    last = Bench([], order=Order.SPLIT, sink=sink, store=store).advance(inputs=(alone,), split=SPLIT, end=True)
    assert isinstance(last, StepDone)
    assert last.receipt is not None
    assert [(r.row, r.rows, r.source_row) for r in last.receipt.lineage] == [(0, 2, 0), (2, 1, 3)]


def test_failing_rows_end_the_run_by_default():
    for name in ("map", "filter", "flat", "batches", "generator", "predict", "evaluate"):
        with pytest.raises(UserCodeError):
            Bench([OPS[name][0]], source=BatchSource([numbers(30)])).run()
