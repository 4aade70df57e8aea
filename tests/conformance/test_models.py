"""The conformance kit for models: good ones pass, and each broken promise is found."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import UserCodeError
from headrace.core.tensors import tensor_to_numpy
from headrace.testing.check_model import check_model

BATCH = pa.record_batch({"x": np.arange(6, dtype=np.float64), "y": np.ones(6), "id": [f"i{k}" for k in range(6)]})


class Linear:
    def __init__(self, weight: float, device: str) -> None:
        self.weight, self.device = weight, device

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert list(batch) == ["x", "y"]
        return {"score": batch["x"] * self.weight + batch["y"], "device": [self.device] * len(batch["x"])}


class Stream:
    async def stream(self, rows: Any) -> Any:
        held = [item async for item in rows]
        for key, row in reversed(held):
            yield key, {"answer": row["id"].upper()}


def test_a_class():
    out = check_model(Linear, BATCH, input=["x", "y"], constructor_args=(2.0,), device="sim:0")
    assert out.column("score").to_pylist() == [2.0 * x + 1 for x in range(6)]
    assert set(out.column("device").to_pylist()) == {"sim:0"}


def test_a_function_of_one_column():
    out = check_model(lambda x: np.stack([x, x], axis=1), BATCH, input="x", output="pair")
    assert tensor_to_numpy(out.column("pair")).shape == (6, 2)


def test_a_stream():
    assert check_model(Stream(), BATCH, input=["id"]).column("answer").to_pylist() == [f"I{k}" for k in range(6)]


def test_a_torch_module():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    from headrace.core.tensors import numpy_to_array

    batch = pa.record_batch({"t": numpy_to_array(np.random.default_rng(0).random((5, 3), np.float32))})
    assert tensor_to_numpy(check_model(module, batch, input="t", output="z").column("z")).shape == (5, 2)


def test_rows_that_depend_on_their_neighbours():
    with pytest.raises(AssertionError, match="a model must treat every row by itself"):
        check_model(lambda x: x - x.mean(), BATCH, input="x", output="centred")


def test_answers_that_depend_on_earlier_calls():
    calls: list[int] = []

    def model(x: np.ndarray) -> np.ndarray:
        calls.append(1)
        return x + len(calls)

    with pytest.raises(AssertionError, match="a second call"):
        check_model(model, BATCH, input="x", output="z")


def test_a_row_too_few():
    with pytest.raises(UserCodeError, match="was given 6 rows and returned 5 rows"):
        check_model(lambda x: x[1:], BATCH, input="x", output="z")


def test_other_columns_than_its_inputs():
    with pytest.raises(UserCodeError, match="KeyError: 'y'"):
        check_model(lambda b: {"z": b["y"]}, BATCH, input=["x"])


def test_a_model_that_cannot_travel():
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return x

    with pytest.raises(TypeError, match="pickle"):
        check_model(Locked(), BATCH, input="x", output="z")


def test_a_sample_of_one_row():
    with pytest.raises(AssertionError, match="a sample of one row"):
        check_model(Linear, BATCH.slice(0, 1))
