"""Modules that keep a state in a call, in worker threads: each has its own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr

ROWS = 4000
THREADS: dict[str, Any] = {"engine": "threads", "cpus": 4, "progress": "quiet"}


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
