"""Cursors: splits and blocks on their way through operators, suspended by credit, ended by limits and failures."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.unit.worker.fakes import SPLIT, BatchSource, Bench, KeepingSink, column, fn, numbers

from headrace.core.errors import DataError, DestinationError, TransientError, UserCodeError
from headrace.core.refs import BlockRef
from headrace.core.stages import End, Order
from headrace.core.steps import StepDone, StepFailed
from headrace.plan import nodes
from headrace.worker.blocks import read_block, read_origin


def add_y(batch):
    return {**batch, "y": batch["x"] * 2}


def test_a_split_is_read_computed_and_written():
    sink = KeepingSink()
    bench = Bench(
        [nodes.FilterExpr(pc.field("x") >= 3, ("x",)), nodes.MapBatches(fn(add_y), batch_rows=4)],
        source=BatchSource([numbers(5), numbers(5, 5)]),
        sink=sink,
    )
    assert bench.run() == []
    assert column(sink.published, "x") == list(range(3, 10))
    assert column(sink.published, "y") == [2 * x for x in range(3, 10)]
    last = bench.answers[-1]
    assert last.receipt is not None
    assert (last.receipt.rows, last.receipt.split_id, last.receipt.attempt) == (7, SPLIT.id, 1)
    assert (bench.tally.rows_in, bench.tally.filtered, bench.tally.written) == (10, 3, 7)


def test_credit_suspends_and_the_output_is_the_same():
    big = [pa.record_batch({"x": np.arange(i, i + 200_000)}) for i in range(0, 1_000_000, 200_000)]
    whole = Bench(source=BatchSource(big)).run()
    bench = Bench(source=BatchSource(big))
    parts = bench.run(credit_bytes=1)
    assert len(bench.answers) > len(big)
    assert all(len(a.outputs) <= 1 for a in bench.answers)
    assert [b.num_rows for b in parts] == [b.num_rows for b in whole] == [200_000] * 5


def test_a_time_slice_suspends_a_cursor_without_output():
    sink = KeepingSink()
    source = BatchSource([numbers(2, i) for i in range(0, 10, 2)])
    bench = Bench(source=source, sink=sink)
    done = bench.advance(split=SPLIT, end=True, credit_s=0.0)
    assert isinstance(done, StepDone)
    assert (done.finished, done.more, source.pulled) == (False, True, 1)
    assert sink.published == []
    bench.run(credit_s=0.0)
    assert column(sink.published, "x") == list(range(10))


def test_a_fed_cursor_waits_for_input_and_keeps_its_rest():
    bench = Bench([nodes.MapBatches(fn(add_y), batch_rows=4)], order=Order.SPLIT)
    first = bench.advance(inputs=(bench.block(numbers(6)),))
    assert isinstance(first, StepDone)
    assert (first.finished, first.more, [b.rows for b in first.outputs]) == (False, False, [4])
    last = bench.advance(inputs=(bench.block(numbers(3, 6)),), end=True)
    assert isinstance(last, StepDone)
    assert last.finished
    out = [bench.batch(b) for b in (*first.outputs, *last.outputs)]
    assert column(out, "x") == list(range(9))


def test_inputs_left_by_credit_are_taken_up_by_the_next_step():
    bench = Bench(order=Order.SPLIT)
    blocks = tuple(bench.block(numbers(2, i)) for i in (0, 2, 4))
    done = bench.advance(inputs=blocks, end=True, credit_bytes=1)
    rows = []
    while isinstance(done, StepDone):
        rows += [bench.batch(b) for b in done.outputs]
        if done.finished:
            break
        assert done.more
        done = bench.advance(credit_bytes=1)
    assert column(rows, "x") == list(range(6))


def test_small_outputs_of_one_block_travel_together():
    bench = Bench([nodes.MapBatches(fn(add_y), batch_rows=2)], source=BatchSource([numbers(10), numbers(10, 10)]))
    assert [b.num_rows for b in bench.run()] == [10, 10]


def test_outputs_of_a_step_are_joined_where_that_is_asked_for():
    """Cuts, and with them the batches of the next stage, stay as they are."""
    sources = [BatchSource([numbers(10, i) for i in range(0, 50, 10)]) for _ in range(2)]
    size = numbers(10).nbytes
    bench = Bench(source=sources[0])
    joined = bench.run(join_bytes=2 * size - size // 2)
    assert [b.num_rows for b in joined] == [50], "a small block does not leave by itself in any case"
    assert bench.pieces == [10] * 5
    assert column(joined, "x") == list(range(50))
    assert [b.num_rows for b in Bench(source=sources[1]).run(join_bytes=1 << 30, credit_s=0.0)] == [10] * 5, "a step ends"


def test_pieces_keep_their_cuts_on_the_way():
    bench = Bench([nodes.MapBatches(fn(add_y), batch_rows=2)], source=BatchSource([numbers(4)]))
    (batch,) = bench.run()
    (block,) = bench.answers[0].outputs
    sizes: list[int] = []
    later = Bench([nodes.MapBatches(fn(lambda b: sizes.append(len(b["x"])) or b), batch_rows=None)], order=Order.FREE)
    given = replace(later.block(batch), cuts=block.cuts)
    assert isinstance(later.advance(inputs=(given,), end=True), StepDone)
    assert sizes == [2, 2]


def test_batches_for_the_next_stage_are_cut_across_blocks_and_keep_their_places():
    keep = [nodes.FilterExpr(pc.field("x") != 1, ("x",)), nodes.MapBatches(fn(add_y), batch_rows=4)]
    bench = Bench(keep, order=Order.SPLIT, cut_rows=4)
    first = bench.advance(inputs=(bench.block(numbers(8)),))
    last = bench.advance(inputs=(bench.block(numbers(3, 8), 8),), end=True)
    assert isinstance(first, StepDone)
    assert isinstance(last, StepDone)
    blocks = (*first.outputs, *last.outputs)
    assert [b.cuts or (b.rows,) for b in first.outputs] == [(4,)], "the rest waits"
    assert [rows for b in blocks for rows in b.cuts or (b.rows,)] == [4, 4, 2]
    assert column([bench.batch(b) for b in blocks], "x") == [0, *range(2, 11)]
    for block in blocks:
        origin = read_origin(bench.store, block)
        assert [origin.locate(i) for i in range(block.rows)] == [("a.parquet", x) for x in column([bench.batch(block)], "x")]


def test_a_reader_cuts_batches_for_the_next_stage():
    bench = Bench([nodes.MapBatches(fn(add_y), batch_rows=4)], source=BatchSource([numbers(6), numbers(5, 6)]), cut_rows=4)
    assert column(bench.run(), "x") == list(range(11))
    assert bench.pieces == [4, 4, 3]


def test_transient_columns_are_a_part_of_their_own():
    bench = Bench(source=BatchSource([numbers(3)]), transient=("x",))
    bench.run()
    (block,) = bench.answers[0].outputs
    assert [p.columns for p in block.parts] == [("x",), ("name",)]
    alone = Bench([nodes.Project((("x", "x"),))], source=BatchSource([numbers(3)]), transient=("x",))
    alone.run()
    assert [p.columns for p in alone.answers[0].outputs[0].parts] == [("x",)]


def test_a_block_without_columns_keeps_its_rows():
    bench = Bench([nodes.Project(())], source=BatchSource([numbers(3)]))
    (batch,) = bench.run()
    assert (batch.num_rows, batch.num_columns) == (3, 0)
    fed = Bench([nodes.Limit(2)], order=Order.FREE)
    (out,) = fed.run(batch)
    assert (out.num_rows, out.num_columns) == (2, 0)


def test_parts_are_zipped_and_only_the_wanted_columns_are_read():
    bench = Bench()
    left = bench.store.put(numbers(2))
    right = bench.store.put(pa.record_batch({"y": [1.0, 2.0], "x": [7, 8]}))
    block = BlockRef(2, (replace(left, columns=("x",)), right))
    assert read_block(bench.store, block).to_pydict() == {"x": [7, 8], "y": [1.0, 2.0]}
    bench.store.read.clear()
    assert read_block(bench.store, block, ("y",)).schema.names == ["y"]
    assert bench.store.read == [right.id]
    assert read_block(bench.store, block, ()).num_rows == 2


def test_empty_blocks_are_not_emitted():
    source = BatchSource([numbers(4), numbers(0), numbers(2)])
    bench = Bench([nodes.FilterExpr(pc.field("x") > 10, ("x",))], source=source)
    assert bench.run() == []
    assert bench.tally.filtered == 6


# --- limit -----------------------------------------------------------------------------------------------------------


def test_limit_stops_reading_early():
    source = BatchSource([numbers(4, i) for i in range(0, 40, 4)])
    bench = Bench([nodes.Limit(6), nodes.MapBatches(fn(add_y), batch_rows=4)], source=source)
    assert column(bench.run(), "x") == list(range(6))
    assert (source.pulled, source.closed) == (2, 1)
    assert (bench.tally.rows_in, bench.tally.cut) == (8, 2)


def test_rows_that_a_batcher_held_before_the_limit_are_cut():
    source = BatchSource([numbers(10)])
    bench = Bench([nodes.MapBatches(fn(add_y), batch_rows=3), nodes.Limit(4)], source=source)
    assert column(bench.run(), "x") == list(range(4))
    assert bench.tally.cut == 6


def test_a_limit_shared_by_splits_is_told_by_the_step():
    bench = Bench([nodes.Limit(100)], order=Order.GLOBAL, end=End.DELIVER)
    inputs = (bench.block(numbers(5)), bench.block(numbers(5, 5)))
    done = bench.advance(inputs=inputs, limit_left=3)
    assert isinstance(done, StepDone)
    assert done.finished
    assert (done.taken, done.tally.cut, done.tally.written) == (3, 7, 3)
    nothing = bench.advance(cursor=1, inputs=(bench.block(numbers(5)),), limit_left=0)
    assert isinstance(nothing, StepDone)
    assert (nothing.finished, nothing.taken, nothing.tally.cut, nothing.outputs) == (True, 0, 5, ())


def test_inputs_that_come_after_the_limit_was_reached_are_cut():
    bench = Bench([nodes.Limit(2)], order=Order.SPLIT)
    answers = [bench.advance(inputs=(bench.block(numbers(3)),), credit_s=0.0)]
    answers.append(bench.advance(credit_s=0.0))
    answers.append(bench.advance(inputs=(bench.block(numbers(4)),)))
    assert all(isinstance(a, StepDone) for a in answers)
    assert [a.finished for a in answers if isinstance(a, StepDone)] == [False, False, True]
    assert sum(a.tally.cut for a in answers if isinstance(a, StepDone)) == 5


# --- casting to the output's schema ----------------------------------------------------------------------------------


def test_blocks_are_cast_to_the_output_schema():
    schema = pa.schema([("x", pa.int64()), ("y", pa.float64()), ("s", pa.large_string())])
    first = pa.record_batch({"s": pa.array(["a"]), "x": pa.array([1], pa.int8()), "y": pa.array([1], pa.float32())})
    second = pa.record_batch({"x": pa.array([2], pa.int64()), "y": pa.nulls(1), "s": pa.nulls(1)})
    sink = KeepingSink()
    Bench(source=BatchSource([first, second]), sink=sink, out_schema=schema).run()
    assert [b.schema for b in sink.published] == [schema, schema]
    assert column(sink.published, "y") == [1.0, None]


@pytest.mark.parametrize("values", [pa.array(["a"]), pa.array([2**40]), pa.array([1.5])])
def test_what_does_not_fit_the_schema_names_column_types_and_rows(values):
    sink = KeepingSink()
    bench = Bench(source=BatchSource([pa.record_batch({"x": values})]), sink=sink, out_schema=pa.schema([("x", pa.int32())]))
    with pytest.raises(DataError, match=r"column 'x' is .* here, but the output has int32") as caught:
        bench.run()
    assert ("rows", "rows 0-0 of a.parquet") in caught.value.where
    assert sink.aborted == 1


def test_other_columns_than_the_schema_has():
    bench = Bench(source=BatchSource([numbers(1)]), sink=KeepingSink(), out_schema=pa.schema([("x", pa.int64())]))
    with pytest.raises(DataError, match="a block has columns"):
        bench.run()


# --- failure ---------------------------------------------------------------------------------------------------------


def test_a_failed_step_aborts_the_writer_and_closes_the_source():
    def fail(batch):
        raise ValueError("no")

    sink, source = KeepingSink(), BatchSource([numbers(3)])
    bench = Bench([nodes.MapBatches(fn(fail))], source=source, sink=sink)
    done = bench.advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, UserCodeError)
    assert (sink.aborted, source.closed) == (1, 1)
    assert str(pickle.loads(pickle.dumps(done.error))) == str(done.error)
    labels = dict(done.error.where)
    assert labels["split"] == "split 0 (a.parquet)"
    assert labels["stage"] == "map_batches(fail)"
    assert labels["rows"] == "rows 0-2 of a.parquet"


def test_a_body_works_on_after_a_failure():
    source = BatchSource([numbers(3), numbers(3)], error_after=1)
    bench = Bench(source=source)
    done = bench.advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, DataError)
    assert "the disk is gone" in str(done.error)
    source.error_after = None
    assert column(bench.run(), "x") == [0, 1, 2, 0, 1, 2]


def test_errors_of_the_source_keep_their_type():
    class Flaky(BatchSource):
        def open(self, split, limits):
            raise TransientError("try again")

    done = Bench(source=Flaky([])).advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, TransientError)


def test_a_full_disk_is_the_destinations_error():
    sink = KeepingSink(full_after=1)
    done = Bench(source=BatchSource([numbers(1), numbers(1)]), sink=sink).advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, DestinationError)
    assert sink.aborted == 1


def test_discard_and_close_abort_what_was_begun():
    sink, source = KeepingSink(), BatchSource([numbers(1), numbers(1)])
    bench = Bench(source=source, sink=sink)
    bench.advance(cursor=1, split=SPLIT, end=True, credit_s=0.0)
    bench.body.discard(1)
    assert (sink.aborted, source.closed) == (1, 1)
    bench.body.discard(1)
    bench.advance(cursor=2, split=SPLIT, end=True, credit_s=0.0)
    bench.body.close()
    bench.body.close()
    assert (sink.aborted, source.closed) == (2, 2)


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_a_remote_source_is_read_one_block_ahead():
    source = BatchSource([numbers(1, i) for i in range(5)], remote=True)
    bench = Bench(source=source)
    assert column(bench.run(), "x") == list(range(5))
    assert source.closed == 1


def test_a_discarded_remote_source_is_closed_and_its_thread_joined():
    source = BatchSource([numbers(1, i) for i in range(5)], remote=True)
    bench = Bench(source=source)
    bench.advance(split=SPLIT, end=True, credit_bytes=0)
    bench.body.close()
    assert source.closed == 1
    assert source.pulled <= 3  # the one being used, the one that showed where the first block ends, one ahead
    assert not [t for t in threading.enumerate() if t.name == "headrace-read-ahead"]


def test_errors_of_a_remote_source_arrive():
    done = Bench(source=BatchSource([numbers(1)], remote=True, error_after=0)).advance(split=SPLIT, end=True)
    assert isinstance(done, StepFailed)
    assert "the disk is gone" in str(done.error)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_operators_are_timed_with_their_rows():
    source = BatchSource([numbers(4), numbers(4)])
    bench = Bench([nodes.FilterExpr(pc.field("x") > 0, ("x",)), nodes.MapBatches(fn(add_y))], source=source)
    bench.run()
    times = {t.op: t for t in bench.answers[0].timing.ops}
    assert {op: (t.rows_in, t.rows_out) for op, t in times.items()} == {-2: (6, 6), -1: (8, 8), 0: (8, 6), 1: (6, 6)}
    assert sum(t.wall_s for t in times.values()) <= bench.answers[0].timing.wall_s


# --- the law ---------------------------------------------------------------------------------------------------------


def twice(row):
    return [row] * (row["x"] % 3)


OPS = {
    "filter": nodes.FilterExpr(pc.field("x") > 3, ("x",)),
    "rows": nodes.FilterRows(fn(lambda row: row["x"] % 5 != 1)),
    "flat": nodes.FlatMap(fn(twice)),
    "batches": nodes.MapBatches(fn(add_y), batch_rows=3),
    "project": nodes.Project((("x", "x"),)),
    "predict": nodes.Predict(fn(lambda x: x * 2), ("x",), True, ("p",), batch_rows=4),
    "limit": nodes.Limit(7),
}


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(OPS)), max_size=4),
    sizes=st.lists(st.integers(0, 9), max_size=5),
    credit=st.sampled_from([0, 1 << 40]),
)
def test_rows_are_conserved_and_do_not_depend_on_suspension(names, sizes, credit):
    """Bench.run checks the law over all steps of the split."""
    batches, at = [], 0
    for size in sizes:
        batches.append(numbers(size, at))
        at += size
    ops = [OPS[n] for n in names]
    whole, parts = Bench(ops, source=BatchSource(batches)), Bench(ops, source=BatchSource(batches))
    rows = column(whole.run(), "x")
    assert column(parts.run(credit_bytes=credit, credit_s=0.0), "x") == rows
    assert column(Bench(ops, order=Order.SPLIT).run(*batches, credit_s=0.0), "x") == rows
    joined = Bench(ops, source=BatchSource(batches))
    assert column(joined.run(join_bytes=1 << 20), "x") == rows
    assert parts.pieces == whole.pieces == joined.pieces
