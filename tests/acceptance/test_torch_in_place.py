"""Torch code that writes to its input in place, as it may elsewhere: what it was given is the block's, and stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.core.errors import UserCodeError
from headrace.models import torch_device
from headrace.worker.formats import NumpyReader
from headrace.worker.refused import BrokenModel
from headrace.worker.torch_inputs import TorchReader

torch = pytest.importorskip("torch")

QUIET: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
VALUES = np.arange(12, dtype=np.float32)

Batch = dict[str, Any]


class InPlace(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        x -= 1
        return x * 2


def tenfold(batch: Batch) -> Batch:
    batch["x"].mul_(10)
    return {"y": batch["x"] + 1}


def tenfold_in_parts(batch: Batch) -> Iterator[Batch]:
    yield {"y": batch["x"][:1] * 10 + 1}
    batch["x"].mul_(10)
    yield {"y": batch["x"][1:] + 1}


def from_eight(batch: Batch) -> Batch:
    """Writes to the third batch of four rows and to those after it."""
    if batch["x"][0] >= 8:
        batch["x"].mul_(10)
    return {"y": batch["x"] + 1}


def after_writing(batch: Batch) -> Batch:
    """Fails, when it has written, on the rows 3 and 10."""
    batch["x"].add_(1)
    if ((batch["x"] == 4) | (batch["x"] == 11)).any():
        raise ValueError("bad row")
    return {"y": batch["x"].clone()}


def table() -> pa.Table:
    return pa.table({"x": VALUES.copy()})


@pytest.mark.parametrize("model", [InPlace(), hr.models.Torch(InPlace())], ids=["module", "adapter"])
@pytest.mark.parametrize("rows", ["auto", 5])
def test_modules(model: Any, rows: Any) -> None:
    given = table()
    made = hr.from_arrow(given).predict(model, input="x", output="y", batch_size=rows, device="cpu").to_arrow(**QUIET)
    assert made["x"].to_pylist() == given["x"].to_pylist() == VALUES.tolist()
    assert made["y"].to_pylist() == ((VALUES - 1) * 2).tolist()


@pytest.mark.parametrize("rows", ["auto", 5])
def test_functions(rows: Any) -> None:
    given = table()
    ds = hr.from_arrow(given)
    made = ds.predict(tenfold, input=["x"], output="y", batch_size=rows, batch_format="torch").to_arrow(**QUIET)
    assert made["x"].to_pylist() == VALUES.tolist()
    assert made["y"].to_pylist() == (VALUES * 10 + 1).tolist()
    for fn in (tenfold, tenfold_in_parts):
        made = ds.map_batches(fn, batch_size=rows, batch_format="torch").to_arrow(**QUIET)
        assert made["y"].to_pylist() == (VALUES * 10 + 1).tolist()
    assert given["x"].to_pylist() == VALUES.tolist()


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_functions_that_write_to_some_batches_end_the_run(on_error: Any) -> None:
    whole: dict[str, Any] = {"batch_size": 4, "batch_format": "torch"}
    for ds in (
        hr.from_arrow(table()).map_batches(from_eight, **whole),
        hr.from_arrow(table()).predict(from_eight, input=["x"], output="y", **whole),
    ):
        with pytest.raises(UserCodeError, match=r"wrote to its input in place, column 'x'.*(?s:.)*clone") as caught:
            ds.to_arrow(on_error=on_error, **QUIET)
        assert "clone" in caught.value.hint


@pytest.mark.parametrize("rows", ["auto", 5])
def test_rows_are_tried_again_as_they_were(rows: Any) -> None:
    whole: dict[str, Any] = {"batch_size": rows, "batch_format": "torch"}
    for ds in (
        hr.from_arrow(table()).map_batches(after_writing, **whole),
        hr.from_arrow(table()).predict(after_writing, input=["x"], output="y", **whole),
    ):
        made = ds.to_arrow(on_error="skip", **QUIET)
        assert made["y"].to_pylist() == [v + 1 for v in VALUES.tolist() if v not in (3, 10)]


def test_code_that_does_not_write_reads_the_blocks_own_memory() -> None:
    batch = pa.record_batch({"x": VALUES, "s": [str(v) for v in VALUES]})
    reader = TorchReader(NumpyReader())
    own: list[bool] = []
    for _ in range(3):
        tensors, given = reader.read(batch)
        own.append(tensors["x"].data_ptr() == batch.column("x").buffers()[1].address)
        reader.check(given)
    assert own == [False, True, True]
    tensors, given = reader.read(batch)
    assert given.column_of(tensors["s"]) is not None
    tensors["x"].detach().zero_()
    with pytest.raises(BrokenModel, match="column 'x'"):
        reader.check(given)


def test_code_that_has_written_gets_copies_for_good() -> None:
    batch = pa.record_batch({"x": VALUES.copy()})
    reader = TorchReader(NumpyReader())
    for writes in (True, False, True):
        tensors, given = reader.read(batch)
        if writes:
            tensors["x"].add_(1)
        reader.check(given)
    assert batch.column("x").to_pylist() == VALUES.tolist()


class HostLanes(torch_device.NoLanes):
    """Lanes that pin, so that batches are copied; in memory of the host."""

    pins = True


def test_models_do_not_share_a_copy_that_one_has_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "lanes_of", lambda device: HostLanes())
    models: dict[str, Any] = {"a": hr.models.Torch(InPlace()), "b": hr.models.Torch(torch.nn.Identity())}
    made = hr.from_arrow(table()).predict(models, input="x", batch_size=4, device="sim").to_arrow(**QUIET)
    assert made["a"].to_pylist() == ((VALUES - 1) * 2).tolist()
    assert made["b"].to_pylist() == made["x"].to_pylist() == VALUES.tolist()


def twice_in_inference_mode(batch: Batch) -> Iterator[Batch]:
    """Leaves the mode on in the thread while it is suspended."""
    with torch.inference_mode():
        yield {"x": batch["x"].clone()}
        yield {"x": batch["x"] * 2}


@pytest.mark.parametrize("after", [tenfold, lambda batch: {"y": batch["x"] * 10 + 1}], ids=["writes", "reads"])
def test_functions_after_one_that_leaves_inference_mode_on(after: Any) -> None:
    ds = hr.from_arrow(table()).map_batches(twice_in_inference_mode, batch_size=4, batch_format="torch")
    made = ds.map_batches(after, batch_format="torch").to_arrow(**QUIET)
    assert sorted(made["y"].to_pylist()) == sorted(
        [v * 10 + 1 for v in VALUES.tolist()] + [v * 20 + 1 for v in VALUES.tolist()]
    )


def test_models_after_a_function_that_leaves_inference_mode_on() -> None:
    ds = hr.from_arrow(table()).map_batches(twice_in_inference_mode, batch_size=4, batch_format="torch")
    made = ds.predict(hr.models.Torch(InPlace()), input="x", output="y", device="cpu").to_arrow(**QUIET)
    assert made["y"].to_pylist() == [(v - 1) * 2 for v in made["x"].to_pylist()]


def test_tensors_count_writes_in_inference_mode() -> None:
    batch = pa.record_batch({"x": VALUES.copy()})
    reader = TorchReader(NumpyReader())
    with torch.inference_mode():
        for writes in (False, False, True):
            tensors, given = reader.read(batch)
            if writes:
                tensors["x"].detach().add_(0)
                with pytest.raises(BrokenModel, match="column 'x'"):
                    reader.check(given)
            else:
                reader.check(given)


def test_what_inference_tensors_share_is_let_go() -> None:
    """They do not tell whether they were written to."""
    with torch.inference_mode():
        tensor = torch.ones(3)
    with torch_device.sharing() as shared:
        shared.add(torch.zeros(3), "cpu", torch.zeros(3), torch_device.NoLanes().compute.mark())
        with torch_device.keeping([tensor]):
            pass
        assert not shared._kept


def test_what_models_upload_in_inference_mode_counts_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    upload = torch_device.DevicePath.upload

    def noted(self: Any, tensors: Any) -> Any:
        made = upload(self, [t.clone() for t in tensors])
        seen.extend(t.is_inference() for t in made)
        return made

    monkeypatch.setattr(torch_device.DevicePath, "upload", noted)
    ds = hr.from_arrow(table()).map_batches(twice_in_inference_mode, batch_size=4, batch_format="torch")
    ds.predict(hr.models.Torch(InPlace()), input="x", output="y", device="cpu").to_arrow(**QUIET)
    assert seen
    assert not any(seen)
