"""Live objects that keep a state in a call, in worker threads: each has its own."""

from __future__ import annotations

import functools
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr

ROWS = 4000
THREADS: dict[str, Any] = {"engine": "threads", "cpus": 4, "progress": "quiet"}


class Scratch:
    """Lets other threads in between what it keeps and what it answers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        self.kept = x["id"] if isinstance(x, dict) else x
        threading.Event().wait(0.0005)
        return {"p": self.kept * 2} if isinstance(x, dict) else self.kept * 2

    def method(self, x: Any) -> Any:
        return self(x)

    def parts(self, batch: Any) -> Iterator[Any]:
        yield self(batch)


class Uncopyable(Scratch):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Connected(Scratch):
    def __init__(self) -> None:
        super().__init__()
        self.lines = sqlite3.connect(":memory:", check_same_thread=False)


@pytest.mark.parametrize("kind", [Scratch, Uncopyable, Connected])
@pytest.mark.parametrize("method", [False, True])
def test_a_state_within_a_call(kind: type[Scratch], method: bool) -> None:
    model = kind().method if method else kind()
    made = hr.range(ROWS).predict(model, input="id", output="p", batch_size=50).to_arrow(**THREADS)
    assert made["p"].to_pylist() == [2 * i for i in range(ROWS)]
    made = hr.range(ROWS).map_batches(model, batch_size=50).to_arrow(**THREADS)
    assert made["p"].to_pylist() == [2 * i for i in range(ROWS)]
    made = hr.range(200).map(model).to_arrow(**THREADS)
    assert made["p"].to_pylist() == [2 * i for i in range(200)]


@pytest.mark.parametrize("kind", [Scratch, Uncopyable])
def test_generators_of_an_object(kind: type[Scratch]) -> None:
    made = hr.range(ROWS).map_batches(kind().parts, batch_size=50).to_arrow(**THREADS)
    assert made["p"].to_pylist() == [2 * i for i in range(ROWS)]


def test_a_partial_of_a_function_with_a_state() -> None:
    def call(kept: dict[str, Any], x: np.ndarray) -> np.ndarray:
        kept["x"] = x
        threading.Event().wait(0.0005)
        return kept["x"] * 2

    made = hr.range(ROWS).predict(functools.partial(call, {}), input="id", output="p", batch_size=50).to_arrow(**THREADS)
    assert made["p"].to_pylist() == [2 * i for i in range(ROWS)]


def test_the_first_worker_has_the_object_itself_and_functions_are_shared() -> None:
    model, seen = Scratch(), list[int]()
    hr.range(10).predict(model, input="id", output="p").to_arrow(engine="inline", progress="quiet")
    assert model.calls

    def count(batch: Any) -> Any:
        seen.append(len(batch["id"]))
        return batch

    hr.range(ROWS).map_batches(count, batch_size=50).to_arrow(**THREADS)
    assert sum(seen) == ROWS


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
def test_forward_hooks_that_keep_features(adapter: bool, engine: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net: Any = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 64))
    kept: dict[str, Any] = {}
    net[0].register_forward_hook(lambda module, args, out: kept.update(out=out))
    net.register_forward_hook(lambda module, args, out: kept["out"][:, :2])
    values = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    with torch.no_grad():
        want = net(torch.from_numpy(values)).numpy()
    ds = hr.from_arrow(pa.table({"v": pa.FixedSizeListArray.from_arrays(values.ravel(), 8)}))
    ds = ds.predict(hr.models.Torch(net) if adapter else net, input="v", output="p", batch_size=50, device="cpu")
    made = ds.to_arrow(engine=engine, cpus=4 if engine == "threads" else None, progress="quiet")
    np.testing.assert_allclose(made["p"].combine_chunks().to_numpy_ndarray(), want, rtol=1e-4, atol=1e-5)
    assert net.training


def test_a_module_that_can_not_be_copied_is_in_its_mode_afterwards() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Identity().eval())
    net.lock = threading.Lock()
    ds = hr.from_arrow(pa.table({"x": np.arange(ROWS, dtype=np.float32)}))
    made = ds.predict(net, input="x", output="y", batch_size=50, device="cpu").to_arrow(**THREADS)
    assert made["y"].to_pylist() == made["x"].to_pylist()
    assert [m.training for m in net.modules()] == [True, True, False]
