"""Operators: projections, filters, row functions, batch functions, transforms and metrics."""

from __future__ import annotations

import datetime
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.unit.worker.fakes import BatchSource, Bench, column, fn, numbers

from headrace.core.errors import DataError, UserCodeError
from headrace.core.tensors import numpy_to_array, tensor_to_numpy
from headrace.plan import nodes
from headrace.worker.user_code import user_frames


def run(op: nodes.Op, *batches: pa.RecordBatch) -> list[pa.RecordBatch]:
    return Bench([op], source=BatchSource(list(batches))).run()


def error(op: nodes.Op, *batches: pa.RecordBatch) -> UserCodeError:
    with pytest.raises(UserCodeError) as caught:
        run(op, *(batches or (numbers(3),)))
    return caught.value


def test_project_selects_renames_and_repeats():
    (out,) = run(nodes.Project((("a", "name"), ("b", "x"), ("c", "x"))), numbers(2))
    assert out.to_pydict() == {"a": ["n0", "n1"], "b": [0, 1], "c": [0, 1]}


def test_a_missing_column_is_named_with_those_there():
    with pytest.raises(DataError, match=r"'z', which is not there; the columns are \['x', 'name'\]"):
        run(nodes.Project((("z", "z"),)), numbers(1))


def test_a_filter_expression_that_cannot_be_computed():
    with pytest.raises(DataError, match="can't be computed"):
        run(nodes.FilterExpr(pc.field("name") > 3, ("name",)), numbers(1))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_filter_rows():
    op = nodes.FilterRows(fn(lambda row, at: row["x"] >= at, kwargs={"at": 2}))
    assert column(run(op, numbers(4)), "x") == [2, 3]


def test_map_rows_keeps_types_of_columns_that_keep_their_kind():
    batch = pa.record_batch(
        {
            "i": pa.array([1, 2], pa.int32()),
            "f": pa.array([0.5, 1.5], pa.float32()),
            "t": pa.array([datetime.datetime(2024, 1, 1)] * 2, pa.timestamp("ms")),
            "s": pa.array(["a", "b"], pa.large_string()),
            "none": pa.array([None, None], pa.string()),
            "d": pa.array([{"k": [1]}, None], pa.struct([("k", pa.list_(pa.int16()))])),
        }
    )
    (out,) = run(nodes.MapRows(fn(lambda row: {**row, "new": row["i"] / 2})), batch)
    assert out.schema.remove(6) == batch.schema
    assert out.column("new").to_pylist() == [0.5, 1.0]
    (changed,) = run(nodes.MapRows(fn(lambda row: {"i": str(row["i"])})), batch)
    assert changed.column("i").to_pylist() == ["1", "2"]


def test_rows_may_lack_keys_and_hold_bytes_and_tensors():
    batch = pa.record_batch({"b": [b"x", b"y"], "t": numpy_to_array(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))})

    def f(row):
        assert isinstance(row["b"], bytes)
        assert row["t"].shape == (2, 2)
        return {"t": row["t"] + 1} if row["b"] == b"x" else {"t": row["t"], "more": np.float32(1)}

    (out,) = run(nodes.MapRows(fn(f)), batch)
    assert tensor_to_numpy(out.column("t")).tolist() == [[[1, 2], [3, 4]], [[4, 5], [6, 7]]]
    assert out.column("more").to_pylist() == [None, 1.0]


def test_map_rows_must_return_dicts():
    assert "map(<lambda>) returned None for a row" in str(error(nodes.MapRows(fn(lambda row: None))))


def test_an_error_in_a_row_function_names_the_very_row():
    def f(row):
        if row["x"] == 12:
            raise KeyError("k")
        return row

    text = str(error(nodes.MapRows(fn(f)), numbers(10), numbers(10, 10)))
    assert "map(f) raised KeyError: 'k'" in text
    assert "row: 12 of a.parquet" in text
    assert "columns: x, name" in text


def test_values_that_make_no_column():
    assert "column 'v'" in str(error(nodes.MapRows(fn(lambda row: {"v": [1, "a"][row["x"] % 2]}))))


def test_half_floats_among_whole_numbers_are_floats():
    op = nodes.MapRows(fn(lambda row: {"h": [1, np.float16(0.75)][row["x"] % 2], "v": [1, np.float16(0.75)]}))
    (out,) = run(op, numbers(2))
    assert out.to_pylist() == [{"h": 1.0, "v": [1.0, 0.75]}, {"h": 0.75, "v": [1.0, 0.75]}]


def test_times_with_and_without_a_zone_are_not_mixed():
    times = [datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)]
    for mix in (times, times[::-1], [[t] for t in times]):
        op = nodes.MapRows(fn(lambda row, mix=mix: {"t": mix[row["x"] % 2]}))
        assert "some with a time zone" in str(error(op))


def test_flat_map_expands_and_drops():
    op = nodes.FlatMap(fn(lambda row: ({"x": row["x"], "k": k} for k in range(row["x"]))))
    bench = Bench([op], source=BatchSource([numbers(4)]))
    out = bench.run()
    assert column(out, "x") == [1, 2, 2, 3, 3, 3]
    assert (bench.tally.expanded, bench.tally.filtered) == (3, 1)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("sizes", [[9], [2, 3, 4], [1] * 9])
def test_what_flat_map_drops_and_adds_does_not_depend_on_blocks(sizes, on_error):
    op = nodes.FlatMap(fn(lambda row: [{"x": row["x"]}] * (row["x"] % 3 * 9000)))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    source = BatchSource([numbers(n, at) for n, at in zip(sizes, starts, strict=True)])
    bench = Bench([op], source=source, on_error=on_error)
    bench.run()
    assert (bench.tally.expanded, bench.tally.filtered) == (81_000 - 6, 3)


def test_flat_map_never_holds_all_that_it_makes():
    alive: list[Any] = []
    most = 0

    def frames(row):
        nonlocal most
        for k in range(60):
            frame = np.full((1 << 20,), k, np.uint8)
            alive.append(weakref.ref(frame))
            most = max(most, sum(ref() is not None for ref in alive))
            yield {"k": k, "frame": frame}

    bench = Bench([nodes.FlatMap(fn(frames))], source=BatchSource([numbers(1)]))
    out = bench.run(credit_bytes=1)
    assert column(out, "k") == list(range(60))
    assert max(b.nbytes for b in out) <= 20 << 20
    assert most <= 40
    assert bench.tally.expanded == 59


def test_flat_map_takes_few_rows_ahead_when_small_ones_become_large():
    def texts(row):
        for k in range(1100):
            yield {"k": k, "text": "a" * (1 << 20 if k >= 1000 else 1)}

    bench = Bench([nodes.FlatMap(fn(texts))], source=BatchSource([numbers(1)]))
    out = bench.run(credit_bytes=1)
    assert column(out, "k") == list(range(1100))
    assert max(b.nbytes for b in out) <= 20 << 20


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("kind", [list, iter])
def test_flat_map_calls_no_function_of_ours_for_each_small_row(kind, on_error):
    bench = Bench(
        [nodes.FlatMap(fn(lambda row: kind([{"x": row["x"], "s": "text"}] * 100)))],
        source=BatchSource([numbers(100)]),
        on_error=on_error,
    )
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        out = bench.run()
    finally:
        sys.setprofile(None)
    assert sum(b.num_rows for b in out) == 10_000
    assert calls < 5_000


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_flat_map_of_lists_longer_than_a_run_is_whole(on_error):
    made = [{"x": k} if k % 3 else {"x": k, "more": "text"} for k in range(1000)]
    out = Bench([nodes.FlatMap(fn(lambda row: made))], source=BatchSource([numbers(3)]), on_error=on_error).run()
    assert column(out, "x") == [k for _ in range(3) for k in range(1000)]


@pytest.mark.parametrize("made", [None, {"x": 1}, "text", [1]])
def test_flat_map_must_return_rows(made):
    assert "flat_map(<lambda>) returned" in str(error(nodes.FlatMap(fn(lambda row: made))))


def test_errors_while_iterating_are_the_users():
    def f(row):
        yield row
        raise RuntimeError("late")

    assert "raised RuntimeError: late" in str(error(nodes.FlatMap(fn(f))))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_cut_from_the_start_of_the_split():
    sizes = []

    def f(batch):
        sizes.append(len(batch["x"]))
        return batch

    out = run(nodes.MapBatches(fn(f), batch_rows=4), numbers(3), numbers(6, 3), numbers(2, 9))
    assert sizes == [4, 4, 3]
    assert column(out, "x") == list(range(11))


def test_whole_blocks():
    sizes = []
    run(nodes.MapBatches(fn(lambda b: sizes.append(len(b["x"])) or b), batch_rows=None), numbers(3), numbers(6))
    assert sizes == [3, 6]


def test_blocks_whose_types_drift_are_brought_together():
    first = pa.record_batch({"x": pa.array([1], pa.int32()), "s": pa.nulls(1)})
    second = pa.record_batch({"x": pa.array([2], pa.int64()), "s": ["a"]})
    (out,) = run(nodes.MapBatches(fn(lambda b: b), batch_rows=10), first, second)
    assert out.to_pydict() == {"x": [1, 2], "s": [None, "a"]}


def test_a_generator_of_batches():
    def f(batch):
        for x in batch["x"]:
            yield {"x": np.repeat(x, 2)}

    assert column(run(nodes.MapBatches(fn(f)), numbers(3)), "x") == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("format", ["numpy", "pyarrow", "pandas", "torch"])
def test_batches_in_every_format_come_back_the_same(format):
    if format in ("pandas", "torch"):
        pytest.importorskip(format)
    batch = pa.record_batch(
        {"x": [1, 2, 3], "s": ["a", "b", None], "t": numpy_to_array(np.arange(12, dtype=np.float32).reshape(3, 2, 2))}
    )
    (out,) = run(nodes.MapBatches(fn(lambda b: b), batch_format=format), batch)
    assert out.column("x").to_pylist() == [1, 2, 3]
    assert out.column("s").to_pylist() == ["a", "b", None]
    assert np.array_equal(tensor_to_numpy(out.column("t")), tensor_to_numpy(batch.column("t")))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "returned None"),
        (7, "returned an int"),
        ({"x": 1}, "column 'x', which is an int"),
        ({"x": [1], "y": [1, 2]}, "different lengths ('x': 1, 'y': 2)"),
        ({1: [1]}, "key 1"),
        ({"x": np.zeros(2, complex)}, "complex128"),
    ],
)
def test_results_that_are_no_batch(made, says):
    text = str(error(nodes.MapBatches(fn(lambda batch: made))))
    assert "map_batches(<lambda>) returned" in text
    assert says in text


def test_the_read_only_trap_is_explained():
    def f(batch):
        batch["x"][0] = 1
        return batch

    text = str(error(nodes.MapBatches(fn(f))))
    assert "assignment destination is read-only" in text
    assert "x = x.copy()" in text


def test_frames_are_those_of_each_exception(tmp_path: Path) -> None:
    """What they are as text is remembered by place: two lines of a function are two places, and so are twins in two files."""
    source = "def fail(low):\n    if low:\n        raise ValueError\n    raise ValueError from KeyError('why')\n"
    functions = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        space: dict[str, Any] = {}
        exec(compile(source, file, "exec"), space)
        functions.append(space["fail"])
    for _ in range(2):
        for name, fail in zip(("one", "two"), functions, strict=True):
            for low, line in ((True, 3), (False, 4)):
                with pytest.raises(ValueError) as caught:
                    fail(low)
                text = user_frames(caught.value)
                assert f'{name}.py", line {line}, in fail' in text
                assert ("caused by KeyError: 'why'" in text) == (not low)


def test_frames_are_the_users_own_and_shown_once():
    def helper():
        return np.concatenate([])

    def f(batch):
        return helper()

    failed = error(nodes.MapBatches(fn(f)))
    assert "headrace/worker" not in failed.frames
    assert failed.frames.count("return helper()") == 1
    assert failed.frames.index("return helper()") < failed.frames.index("np.concatenate")


def test_a_function_that_cannot_be_called_so():
    failed = error(nodes.MapBatches(fn(lambda: 1)))
    assert "takes 0 positional arguments" in str(failed)
    assert failed.frames == ""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_code_that_ends_the_process_only_fails_its_step(kind):
    def f(batch):
        raise kind

    with ThreadPoolExecutor(1) as worker:
        failed = worker.submit(error, nodes.MapBatches(fn(f))).result()
    assert f"raised {kind.__name__}" in str(failed)


def test_ctrl_c_in_the_main_thread_belongs_to_the_caller():
    def f(batch):
        raise KeyboardInterrupt

    source = BatchSource([numbers(1)])
    with pytest.raises(KeyboardInterrupt):
        Bench([nodes.MapBatches(fn(f))], source=source).run()
    assert source.closed == 1


def test_an_exception_that_cannot_be_shown():
    class Odd(Exception):
        def __str__(self):
            raise ValueError

    def f(batch):
        raise Odd

    assert "raised Odd: (its message can't be shown)" in str(error(nodes.MapBatches(fn(f))))


# --- classes ---------------------------------------------------------------------------------------------------------


class Adder:
    made: ClassVar[list[Adder]] = []

    def __init__(self, by: int, device: str = "none") -> None:
        self.by, self.device, self.closed = by, device, False
        Adder.made.append(self)

    def __call__(self, batch: Any, times: int = 1) -> Any:
        return {"x": batch["x"] + self.by * times}

    def close(self) -> None:
        self.closed = True


def test_a_class_is_constructed_once_per_worker_and_closed():
    Adder.made = []
    op = nodes.MapBatches(fn(Adder, is_class=True, ctor_args=(5,), args=(2,)))
    bench = Bench([op], source=BatchSource([numbers(2)]), device="sim:3")
    assert column(bench.run(), "x") == [10, 11]
    bench.run()
    (made,) = Adder.made
    assert (made.device, made.closed) == ("sim:3", False)
    bench.body.close()
    assert made.closed


def test_a_device_that_the_user_gave_stays():
    Adder.made = []
    op = nodes.MapBatches(fn(Adder, is_class=True, ctor_args=(1, "mine")))
    run(op, numbers(1))
    assert Adder.made[0].device == "mine"


def test_a_constructor_that_fails():
    class Broken:
        def __init__(self):
            raise RuntimeError("no weights")

        def __call__(self, batch):
            return batch

    text = str(error(nodes.MapBatches(fn(Broken, is_class=True))))
    assert "map_batches(Broken) raised RuntimeError while constructing Broken: no weights" in text


# --- transforms and metrics ------------------------------------------------------------------------------------------


@dataclass
class Double:
    name: str = "double"
    columns_in: tuple[str, ...] = ("x",)
    columns_out: tuple[str, ...] = ("x", "big")
    row_bytes: int | None = 8 << 20
    fail_at: int | None = None

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        assert batch.schema.names == ["x"]
        values = batch.column("x").to_pylist()
        if self.fail_at in values:
            raise DataError("bad", where=(("row", str(values.index(self.fail_at))),))
        return pa.record_batch({"x": [2 * v for v in values], "big": values})

    def schema(self, schema: pa.Schema) -> pa.Schema:
        return schema


def test_a_transform_replaces_and_appends_a_few_rows_at_a_time():
    bench = Bench([nodes.Apply(Double())], source=BatchSource([numbers(5)]))
    (out,) = bench.run()
    assert out.schema.names == ["x", "name", "big"]
    assert column([out], "x") == [0, 2, 4, 6, 8]
    assert bench.answers[0].timing.ops[-1].rows_out == 5


def test_a_transform_names_the_row_of_the_input():
    with pytest.raises(DataError) as caught:
        run(nodes.Apply(Double(fail_at=4)), numbers(5))
    assert ("row", "4 of a.parquet") in caught.value.where


class Sum:
    columns = ("x",)

    def zero(self) -> Any:
        return 0

    def update(self, state: Any, batch: pa.RecordBatch) -> Any:
        assert batch.schema.names == ["x"]
        return state + sum(batch.column("x").to_pylist())

    def merge(self, a: Any, b: Any) -> Any:
        return a + b

    def result(self, state: Any) -> Any:
        return state


def test_metrics_come_with_the_end_of_a_cursor():
    bench = Bench([nodes.Evaluate({"sum": Sum()})], source=BatchSource([numbers(3), numbers(3)]))
    bench.run(credit_bytes=0)
    assert [a.metrics for a in bench.answers] == [{}] * (len(bench.answers) - 1) + [{"sum": 6}]
