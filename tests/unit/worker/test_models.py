"""predict: in a stage of its own (Apply) and among other operators."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.worker.fakes import BatchSource, Bench, KeepingSink, column, fn, numbers
from tests.unit.worker.test_operators import Sum

from headrace.core.errors import UserCodeError
from headrace.core.stages import Order
from headrace.core.steps import StepDone, StepFailed
from headrace.core.tensors import tensor_to_numpy
from headrace.plan import nodes


def predict(model: Any, *, single: bool = True, output: tuple[str, ...] = ("p",), **kwargs: Any) -> nodes.Predict:
    return nodes.Predict(model if isinstance(model, nodes.UserFunction) else fn(model), ("x",), single, output, **kwargs)


def stage(op: nodes.Predict, *more: nodes.Op, **kwargs: Any) -> Bench:
    return Bench([op, *more], model=True, columns_in=("x",), order=Order.FREE, **kwargs)


def error(op: nodes.Predict, rows: int = 4) -> UserCodeError:
    done = stage(op).apply(numbers(rows))
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, UserCodeError)
    return done.error


class Recorder:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.sizes.append(len(x))
        return x * 2


def test_batches_span_blocks_and_answers_go_back_to_their_own():
    model = Recorder()
    bench = stage(predict(model, batch_rows=4))
    out = bench.applied(numbers(3), numbers(6, 100), numbers(2, 200))
    assert model.sizes == [4, 4, 3]
    assert [b.schema.names for b in out] == [["p"]] * 3
    assert [b.column("p").to_pylist() for b in out] == [[0, 2, 4], [200 + 2 * i for i in range(6)], [400, 402]]


def test_origins_are_kept_and_other_columns_never_read():
    bench = stage(predict(Recorder()))
    done = bench.apply(numbers(3), numbers(2))
    assert isinstance(done, StepDone)
    assert [b.origin.label for b in done.outputs] == ["rows 0-2 of a.parquet", "rows 1000-1001 of a.parquet"]


def test_deterministic_batches_do_not_span_blocks():
    model = Recorder()
    stage(predict(model, batch_rows=4), deterministic=True).applied(numbers(3), numbers(6))
    assert model.sizes == [3, 4, 2]
    model.sizes.clear()
    stage(predict(model), deterministic=True).applied(numbers(300))
    assert model.sizes == [256, 44]
    model.sizes.clear()
    assert isinstance(stage(predict(model), deterministic=True).apply(numbers(9), cuts=(4, 5)), StepDone)
    assert model.sizes == [4, 5]


def test_metrics_after_the_model_in_its_stage():
    bench = stage(predict(Recorder()), nodes.Evaluate({"sum": Sum()}))
    done = bench.apply(numbers(3), numbers(2))
    assert isinstance(done, StepDone)
    assert [(s.split_index, s.metrics) for s in done.shares] == [(0, {"sum": 3}), (1, {"sum": 1})]


def test_a_model_among_other_operators_carries_columns_untouched():
    model = Recorder()
    batches = [numbers(3), numbers(3, 3), numbers(3, 6)]
    bench = Bench([predict(model, batch_rows=5)], source=BatchSource(batches))
    out = bench.run()
    assert model.sizes == [5, 1, 3]
    assert column(out, "p") == [2 * x for x in range(9)]
    assert column(out, "name") == [f"n{x}" for x in range(9)]
    assert out[0].schema.names == ["x", "name", "p"]


def test_an_output_may_replace_a_column():
    bench = Bench([predict(Recorder(), output=("x",))], source=BatchSource([numbers(2)]))
    (out,) = bench.run()
    assert out.to_pydict() == {"x": [0, 2], "name": ["n0", "n1"]}


def test_wide_outputs_leave_in_parts():
    op = predict(lambda x: np.zeros((len(x), 1 << 17)), batch_rows=8)
    out = Bench([op], source=BatchSource([numbers(64)])).run()
    assert sum(b.num_rows for b in out) == 64
    assert max(b.nbytes for b in out) <= 32 << 20
    assert column(out, "x") == list(range(64))


# --- naming ----------------------------------------------------------------------------------------------------------

TWO = {"a": np.arange(4), "b": np.arange(4) * 2}


@pytest.mark.parametrize(
    ("result", "output", "names"),
    [
        (np.arange(4), ("p",), ["p"]),
        (np.arange(4), (), ["prediction"]),
        ([1, 2, 3, 4], ("p",), ["p"]),
        ((np.arange(4),), ("p",), ["p"]),
        ({"p": np.arange(4)}, ("p",), ["p"]),
        (TWO, (), ["a", "b"]),
        (UserDict(TWO), ("b",), ["b"]),
        (tuple(TWO.values()), ("u", "v"), ["u", "v"]),
        (pa.table(TWO), ("b", "a"), ["b", "a"]),
        (pa.array([1, 2, 3, 4]), ("p",), ["p"]),
    ],
)
def test_names_of_outputs(result, output, names):
    (out,) = stage(predict(lambda x: result, output=output)).applied(numbers(4))
    assert out.schema.names == names


@pytest.mark.parametrize(
    ("result", "output", "says"),
    [
        (np.arange(3), ("p",), "was given 4 rows and returned 3 rows"),
        ({"a": np.arange(4), "b": np.arange(9)}, (), "returned 9 rows in column 'b'"),
        (TWO, ("c",), "returned columns ['a', 'b'], but output names ['c']"),
        (np.arange(4), ("a", "b"), "for the 2 columns"),
        (None, ("p",), "returned None"),
        (7, ("p",), "which is an int"),
    ],
)
def test_answers_that_break_the_contract(result, output, says):
    failed = error(predict(lambda x: result, output=output))
    assert says in str(failed)
    assert ("stage", "predict(<lambda>)") in failed.where
    assert ("rows", "rows 0-3 of a.parquet") in failed.where


def squeezed(model: Any, **kwargs: Any) -> Any:
    return predict(lambda x: model(x).squeeze(), batch_rows=3, **kwargs)


@pytest.mark.parametrize("wrapped", [lambda made: made, lambda made: {"p": made}, lambda made: (made,), lambda made: made + 0])
def test_squeezed_to_a_number_is_the_value_of_the_one_row(wrapped):
    op = predict(lambda x: wrapped(x.reshape(-1, 1).squeeze()), batch_rows=3)
    out = Bench([op], source=BatchSource([numbers(4)])).run()
    assert column(out, "p") == [0, 1, 2, 3]


def test_squeezed_tensors_are_the_values_of_the_one_row():
    torch = pytest.importorskip("torch")
    out = Bench([squeezed(lambda x: torch.from_numpy(x.copy())[:, None])], source=BatchSource([numbers(4)])).run()
    assert column(out, "p") == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 2)])
def test_squeezed_to_the_shape_of_other_rows_is_that_of_the_one_row(shape):
    op = squeezed(lambda x: np.ones((len(x), *shape), np.float32) * x.reshape(-1, *(1 for _ in shape)))
    out = Bench([op], source=BatchSource([numbers(4)])).run()
    rows = np.concatenate([tensor_to_numpy(batch.column("p")) for batch in out])
    assert rows.shape == (4, *(n for n in shape if n > 1))
    assert (rows.reshape(4, -1)[:, 0] == np.arange(4)).all()


def test_squeezed_rows_of_a_shape_not_known_are_refused():
    op = squeezed(lambda x: np.ones((len(x), 2), np.float32))
    failed = error(op, rows=1)
    assert "was given 1 row and returned 2 rows" in str(failed)
    assert "squeeze(-1)" in str(failed)
    declared = squeezed(lambda x: np.ones((len(x), 2)), types=(("p", pa.fixed_shape_tensor(pa.float64(), (2,))),))
    assert sum(b.num_rows for b in Bench([declared], source=BatchSource([numbers(1)])).run()) == 1


@pytest.mark.parametrize("on_error", ["fail", "skip", "quarantine"])
@pytest.mark.parametrize(
    "wrapped", [lambda made: made, lambda made: {"p": made}, lambda made: (made,), lambda made: made.tolist()]
)
def test_what_may_be_a_squeezed_row_ends_the_run_rather_than_cost_the_row(wrapped, on_error):
    op = predict(lambda x: wrapped(np.ones((len(x), 2), np.float32).squeeze()), batch_rows=3)
    with pytest.raises(UserCodeError, match="was given 1 row and returned 2 rows"):
        Bench([op], source=BatchSource([numbers(1)]), sink=KeepingSink(), on_error=on_error).run()


def test_squeezed_rows_whose_shapes_differ_end_the_run():
    def model(x):  # rows as long as the largest of their batch
        return np.ones((len(x), int(x.max()) + 2), np.float32).squeeze()

    bench = Bench([predict(model, batch_rows=3)], source=BatchSource([numbers(4)]), on_error="skip")
    with pytest.raises(UserCodeError, match="was given 1 row and returned 5 rows"):
        bench.run()


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x[x % 2 == 0],  # leaves a row out
        lambda x: pa.table({"p": np.repeat(x, 1 + x % 2)}),  # a table has rows: nothing is squeezed
        lambda x: np.repeat(x, 1 + x % 2),  # nor is it where rows are known to be single values
    ],
)
def test_other_answers_of_a_wrong_length_are_the_rows_fault(answer):
    bench = Bench([predict(answer, batch_rows=3)], source=BatchSource([numbers(4)]), on_error="skip")
    assert column(bench.run(), "p") == [0, 2]
    assert bench.tally.skipped == 2


@pytest.mark.parametrize("wrapped", [lambda made: made, lambda made: {"p": made}, lambda made: (made,)])
def test_a_python_number_is_the_value_of_the_one_row(wrapped):
    op = predict(lambda x: wrapped((x * 0.5).item()), batch_rows=1)
    assert column(Bench([op], source=BatchSource([numbers(3)])).run(), "p") == [0.0, 0.5, 1.0]


def test_tensor_outputs_are_tensor_columns():
    (out,) = stage(predict(lambda x: np.ones((len(x), 2, 3), np.float32))).applied(numbers(4))
    assert tensor_to_numpy(out.column("p")).shape == (4, 2, 3)


def test_a_model_that_reuses_its_answer_does_not_change_answers_given():
    class Reuser:
        def __init__(self, view: bool) -> None:
            self.out, self.view = np.empty(8, np.int64), view

        def __call__(self, x: np.ndarray) -> Any:
            self.out[: len(x)] = x
            return self.out[: len(x)] if self.view else self.out

    for view in (False, True):
        out = stage(predict(Reuser(view), batch_rows=8)).applied(numbers(8), numbers(8, 8))
        assert column(out, "p") == list(range(16))

    class DictReuser(Reuser):
        def __call__(self, x: np.ndarray) -> Any:
            self.kept = getattr(self, "kept", {"p": np.empty(8, np.int64)})
            self.kept["p"][:] = x
            return self.kept

    out = stage(predict(DictReuser(True), batch_rows=8)).applied(numbers(8), numbers(8, 8))
    assert column(out, "p") == list(range(16))


def test_a_fresh_answer_is_not_copied():
    seen = []

    def model(x):
        out = x * 2
        seen.append(out.ctypes.data)
        return out

    (out,) = stage(predict(model, batch_rows=100)).applied(numbers(8))
    assert out.column("p").buffers()[1].address == seen[0]


# --- memory ----------------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def test_out_of_memory_halves_the_batch_and_remembers():
    sizes = []

    def model(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise OutOfMemoryError("CUDA out of memory")
        return x + 1

    bench = stage(predict(model, batch_rows=8))
    assert column(bench.applied(numbers(8)), "p") == list(range(1, 9))
    assert sizes == [8, 4, 2, 2, 2, 2]
    sizes.clear()
    bench.applied(numbers(4))
    assert max(sizes) <= 2


def test_memory_that_is_short_for_one_row_is_an_error():
    def model(x):
        raise MemoryError

    assert "raised MemoryError" in str(error(predict(model)))


# --- torch -----------------------------------------------------------------------------------------------------------


def test_torch_modules_run_without_gradients_in_evaluation_mode():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            return x.to(torch.bfloat16) * 2

    (out,) = stage(predict(Net())).applied(numbers(4))
    assert out.column("p").to_pylist() == [0.0, 2.0, 4.0, 6.0]
    assert out.column("p").type == pa.float32()


def test_single_input_in_every_format():
    pytest.importorskip("torch")
    pytest.importorskip("pandas")
    for format, kind in (("numpy", "ndarray"), ("torch", "Tensor"), ("pandas", "Series"), ("pyarrow", "Int64Array")):
        seen = []
        op = predict(lambda x, seen=seen: seen.append(type(x).__name__) or x, batch_format=format)
        (out,) = stage(op).applied(numbers(3))
        assert seen == [kind]
        assert column([out], "p") == [0, 1, 2]


# --- streams ---------------------------------------------------------------------------------------------------------


class Backwards:
    """Answers the rows in reverse order."""

    async def stream(self, rows):
        held = [item async for item in rows]
        for key, row in reversed(held):
            yield key, {"p": row["x"] * 10}


@pytest.fixture
def streams():
    benches: list[Bench] = []

    def make(model: Any, **kwargs: Any) -> Bench:
        benches.append(stage(predict(model, **kwargs)))
        return benches[-1]

    yield make
    for bench in benches:
        bench.body.close()


def test_stream_answers_are_put_back_in_order(streams):
    bench = streams(Backwards(), single=False)
    for _ in range(2):
        out = bench.applied(numbers(3), numbers(2, 3))
        assert [b.column("p").to_pylist() for b in out] == [[0, 10, 20], [30, 40]]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(0, {"p": 1})], "left 3 of 4 rows without an answer"),
        ([(0, {"p": 1}), (0, {"p": 1})], "answered a row twice"),
        ([(9, {"p": 1})], "answered key 9"),
        ([(2, ValueError("too long"))], "raised ValueError: too long"),
        ([(1, 5)], "answered a row with a int"),
        ([(i, {"q": 1}) for i in range(4)], "returned columns ['q'], but output names ['p']"),
    ],
)
def test_streams_that_break_the_contract(streams, answers, says):
    class Broken:
        async def stream(self, rows):
            for item in answers:
                yield item

    done = streams(Broken(), single=False).apply(numbers(4))
    assert isinstance(done, StepFailed)
    assert says in str(done.error)


def test_a_failed_row_of_a_stream_is_named(streams):
    class Picky:
        async def stream(self, rows):
            async for key, row in rows:
                yield key, ValueError("no") if row["x"] == 2 else {"p": 1}

    done = streams(Picky(), single=False).apply(numbers(4))
    assert isinstance(done, StepFailed)
    assert ("row", "2 of a.parquet") in done.error.where
