"""What models of one pass share: conversions of columns, and copies on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.models import torch_device
from headrace.worker import formats

ROWS = 3000


def lengths(batch: dict[str, Any]) -> np.ndarray:
    return np.array([len(text) for text in batch["text"]])


def firsts(batch: dict[str, Any]) -> np.ndarray:
    return np.array([text[0] for text in batch["text"]])


def none(batch: dict[str, Any]) -> np.ndarray:
    return np.array([text is None for text in batch["maybe"]])


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_texts_are_converted_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    converted: list[int] = []
    original: Callable[[pa.Array], np.ndarray] = formats._texts

    def counted(column: pa.Array) -> np.ndarray:
        converted.append(len(column))
        return original(column)

    monkeypatch.setattr(formats, "_texts", counted)
    texts = [chr(97 + i % 26) * (1 + i % 7) for i in range(ROWS)]
    table = pa.table({"text": texts, "maybe": pa.array([None if i % 5 == 0 else "x" for i in range(ROWS)])})
    models = {"length": lengths, "first": firsts, "none": none}
    ds = hr.from_arrow(table).predict(models, input={"length": ["text"], "first": ["text"], "none": ["maybe"]}, device=device)
    made = ds.to_arrow(engine="inline", progress="quiet")
    assert made["length"].to_pylist() == [len(t) for t in texts]
    assert made["first"].to_pylist() == [t[0] for t in texts]
    assert made["none"].to_pylist() == [i % 5 == 0 for i in range(ROWS)]
    assert sum(converted) == 2 * ROWS  # of two columns, which three models read


def test_a_column_without_nulls_here_and_with_nulls_there_has_the_dtype_of_its_rows() -> None:
    shared = formats.SharedArrays()
    column = pa.array([True, False, None, True])
    shared.add(pa.record_batch({"x": column}))
    assert shared.find(column.slice(1, 2)).tolist() == [False, None]  # type: ignore[union-attr]
    assert shared.find(column.slice(0, 2)) is None
    assert shared.find(pa.array([True, False, None, True])) is None
    reader = formats.NumpyReader(shared)
    assert reader.read(pa.record_batch({"x": column.slice(0, 2)}))[0]["x"].dtype == bool
    shared.clear()
    assert shared.find(column) is None


class HostLanes(torch_device.NoLanes):
    """Lanes that pin, so that batches are copied; in memory of the host."""

    pins = True


@pytest.mark.parametrize("sizes", ["auto", {"a": 64, "b": 200}, 128])
def test_two_torch_models_copy_a_column_once(monkeypatch: pytest.MonkeyPatch, sizes: Any) -> None:
    torch = pytest.importorskip("torch")
    copied: list[int] = []
    original = torch_device.DevicePath._copied

    def counted(self: Any, tensors: Any, shared: Any) -> Any:
        copied.append(sum(len(t) for t in tensors))
        return original(self, tensors, shared)

    monkeypatch.setattr(torch_device, "lanes_of", lambda device: HostLanes())
    monkeypatch.setattr(torch_device.DevicePath, "_copied", counted)
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    torch.manual_seed(0)
    nets = {"a": torch.nn.Linear(4, 2).eval(), "b": torch.nn.Linear(4, 3).eval()}
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)})
    models = {name: hr.models.Torch(net) for name, net in nets.items()}
    made = (
        hr.from_arrow(table)
        .predict(models, input="x", batch_size=sizes, device="sim")
        .to_arrow(engine="inline", progress="quiet")
    )
    for name, net in nets.items():
        wanted = net(torch.from_numpy(values)).detach().numpy()
        got = made[name].combine_chunks()
        np.testing.assert_allclose(got.to_numpy_ndarray(), wanted, rtol=1e-5, atol=1e-6)
    assert sum(copied) == ROWS
