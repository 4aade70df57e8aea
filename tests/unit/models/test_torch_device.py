"""The device path, with lanes that note what they are told: nothing here needs an accelerator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from headrace.models import torch_device  # noqa: E402
from headrace.models.torch_device import DevicePath, NoLanes, PinnedRing, sharing, torch_threads  # noqa: E402


class Point:
    def __init__(self, machine: FakeLanes, name: str) -> None:
        self.machine, self.name, self.waited = machine, name, False

    def wait(self) -> None:
        self.waited = True
        self.machine.log.append(f"host waits {self.name}")


class FakeLane:
    def __init__(self, machine: FakeLanes, name: str) -> None:
        self.machine, self.name, self.marks = machine, name, 0
        self.used: list[Any] = []

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        self.machine.log.append(f"{self.name} begins")
        yield

    def mark(self) -> Point:
        self.marks += 1
        self.machine.log.append(f"{self.name} marks {self.marks}")
        return Point(self.machine, f"{self.name} {self.marks}")

    def after(self, mark: Any) -> None:
        self.machine.log.append(f"{self.name} after {mark.name}")

    def uses(self, tensor: Any) -> None:
        self.used.append(tensor)


class FakeLanes:
    """A device whose memory is the host's. buffers: what was pinned, in bytes."""

    pins = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.buffers: list[int] = []
        self.copy, self.compute, self.back = (FakeLane(self, n) for n in ("copy", "compute", "back"))

    def host_buffer(self, size_bytes: int) -> Any:
        self.buffers.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    def host_like(self, tensor: Any) -> Any:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


@pytest.fixture
def lanes() -> FakeLanes:
    return FakeLanes()


def test_a_batch_goes_through_pinned_memory_and_the_computation_waits_for_it(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    columns = [torch.arange(6, dtype=torch.uint8).reshape(2, 3), torch.tensor([1.5, 2.5], dtype=torch.float64)]
    made = path.upload(columns)
    assert [m.dtype for m in made] == [torch.uint8, torch.float64]
    assert all(torch.equal(m, c) and m.data_ptr() != c.data_ptr() for m, c in zip(made, columns, strict=True))
    assert lanes.log.index("copy marks 2") < lanes.log.index("compute after copy 2")
    assert [t.data_ptr() for t in lanes.compute.used] == [m.data_ptr() for m in made]
    assert lanes.buffers == [2 * torch_device.ALIGN_BYTES]


def test_the_answer_travels_after_the_computation_and_is_waited_for_once(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    pending = path.download({"y": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "n": torch.tensor([1, 2])})
    assert lanes.log == ["compute begins", "compute marks 1", "back after compute 1", "back begins", "back marks 1"]
    result = pending.result()
    assert lanes.log[-1] == "host waits back 1"
    assert result["y"].dtype == np.float32
    np.testing.assert_array_equal(result["y"], [1.0, 2.0])
    np.testing.assert_array_equal(result["n"], [1, 2])


def test_what_travels_is_a_copy_that_the_next_computation_does_not_write_to(lanes: FakeLanes) -> None:
    output = torch.tensor([1, 2])
    DevicePath("cpu", lanes).download({"y": output})
    (travels,) = lanes.back.used
    assert travels.data_ptr() != output.data_ptr()


def test_a_slot_is_written_again_only_when_its_copy_is_done(lanes: FakeLanes) -> None:
    ring = PinnedRing(lanes)
    for i in range(5):
        with ring.staged([torch.full((4,), i)]) as (view,):
            assert view.tolist() == [i] * 4
    assert lanes.log == [
        "copy marks 1",
        "copy marks 2",
        "host waits copy 1",
        "copy marks 3",
        "host waits copy 2",
        "copy marks 4",
        "host waits copy 3",
        "copy marks 5",
    ]
    ring.close()
    assert lanes.log[-2:] == ["host waits copy 5", "host waits copy 4"]
    assert ring.size_bytes == 0


def test_slots_grow_and_are_used_again(lanes: FakeLanes) -> None:
    ring = PinnedRing(lanes, slots=1)
    for rows in (10, 1000, 10, 500):
        with ring.staged([torch.zeros(rows, dtype=torch.uint8)]):
            pass
    assert lanes.buffers == [256, 1024]
    assert ring.size_bytes == 1024


def test_a_failure_half_way_is_waited_for_all_the_same(lanes: FakeLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second column finds no device memory: the copy of the first is under way out of the slot."""
    path = DevicePath("cpu", lanes)
    empty, calls = torch.empty, []

    def full(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            calls.append(args)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", full)
    with sharing() as shared, pytest.raises(torch.OutOfMemoryError):
        path.upload([torch.zeros(3), torch.ones(3)])
    assert lanes.log == ["copy begins", "copy marks 1"]
    assert not shared._kept
    monkeypatch.undo()
    for _ in range(2):
        assert path.upload([torch.ones(3)])[0].tolist() == [1.0] * 3
    assert "host waits copy 1" in lanes.log


def test_columns_that_are_not_contiguous_arrive_in_order(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    matrix = torch.arange(12).reshape(3, 4).t()
    assert torch.equal(path.upload([matrix])[0], matrix)
    assert path.upload([torch.empty(0, 5)])[0].shape == (0, 5)


def test_models_share_a_copy_of_one_block(lanes: FakeLanes) -> None:
    first, second = DevicePath("cpu", lanes), DevicePath("cpu", lanes)
    values = np.arange(10.0)
    with sharing() as shared:
        (a,) = first.upload([torch.from_numpy(values)])
        (b,) = second.upload([torch.from_numpy(values)])  # another tensor over the same memory
        (c,) = second.upload([torch.from_numpy(values[2:7])])
        (d,) = second.upload([torch.from_numpy(values.view(np.int64))])
        assert a.data_ptr() == b.data_ptr()
        assert c.data_ptr() == a[2:].data_ptr()
        assert d.data_ptr() != a.data_ptr()
        assert (shared.hits, shared.saved_bytes) == (2, 120)
        assert "compute after copy 2" in lanes.log
    values[:] = 7.0
    (e,) = first.upload([torch.from_numpy(values)])
    assert e.tolist() == [7.0] * 10  # the next block may lie at the same address


def test_batches_of_another_size_share_copies(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    values = torch.arange(20.0).reshape(10, 2)
    with sharing() as shared:
        for start in (0, 4, 8):
            path.upload([values[start : start + 4]])
        pinned = lanes.log.count("copy begins")
        for start, stop in ((0, 10), (1, 3), (3, 9), (9, 10)):
            assert torch.equal(path.upload([values[start:stop]])[0], values[start:stop])
        assert lanes.log.count("copy begins") == pinned
        assert shared.hits == 4
        torch_device.forget_shared()
        path.upload([values[:4]])
        assert torch.equal(path.upload([values[2:6]])[0], values[2:6])  # half of it is there: all is copied
        assert shared.hits == 4
        shared.keeps = False
        path.upload([values[6:]])
        path.upload([values[6:]])
        assert shared.hits == 4


def test_memory_of_a_shared_array_is_not_given_away(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    with sharing():
        for i in range(50):  # without a hold on them, arrays would follow each other at one address
            values = np.full(1000, i)
            assert path.upload([torch.from_numpy(values)])[0][0].item() == i
            del values


def test_blocks_within_blocks_do_not_mix(lanes: FakeLanes) -> None:
    path = DevicePath("cpu", lanes)
    host = torch.arange(3)
    with sharing() as outer:
        path.upload([host])
        with sharing() as inner:
            path.upload([host])
        path.upload([host])
    assert (outer.hits, inner.hits) == (1, 0)


def test_a_cpu_copies_nothing() -> None:
    path = DevicePath("sim:0")
    assert isinstance(path.lanes, NoLanes)
    assert path.device == "cpu"
    tensor = torch.arange(3)
    assert path.upload([tensor])[0] is tensor
    with path.compute():
        made = tensor + 1
    array = path.download({"y": made}).result()["y"]
    assert np.shares_memory(array, made.numpy())
    path.close()


def test_threads_are_those_of_before_after_the_last_user() -> None:
    before = torch.get_num_threads()
    with torch_threads(3):
        assert torch.get_num_threads() == 3
        with torch_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


# --- a model on such a device ----------------------------------------------------------------------------------------


def loaded(lanes: FakeLanes, net: Any) -> Any:
    from headrace.contracts.model import Place
    from headrace.models.torch import Torch

    model = Torch(net).load(Place(inputs=("x",)))
    model._path = DevicePath("cpu", lanes)
    return model


def test_the_next_batch_is_on_its_way_before_the_last_is_waited_for(lanes: FakeLanes) -> None:
    model = loaded(lanes, torch.nn.Linear(3, 2))
    batches = [torch.randn(4, 3) for _ in range(3)]
    first = model.submit(batches[0])
    second = model.submit(batches[1])
    assert not any(line.startswith("host waits") for line in lanes.log)
    made = [model.collect(first)]
    third = model.submit(batches[2])
    made += [model.collect(second), model.collect(third)]
    with torch.no_grad():
        for batch, answer in zip(batches, made, strict=True):
            np.testing.assert_array_equal(answer, model._module(batch).numpy())
    assert [line for line in lanes.log if line.startswith("host waits back")] == [f"host waits back {i}" for i in (1, 2, 3)]
    model.close()


@pytest.mark.parametrize("where", ["compute", "download"])
def test_out_of_memory_leaves_nothing_behind(where: str, lanes: FakeLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `submit`, and the next batch works."""
    import gc
    import weakref

    inputs: list[Any] = []

    class Net(torch.nn.Module):
        full = True

        def forward(self, x: Any) -> Any:
            inputs.append(weakref.ref(x))
            if self.full and where == "compute":
                raise torch.OutOfMemoryError("no memory")
            return x + 1

    net = Net()
    model = loaded(lanes, net)
    model._module = net
    host_like = lanes.host_like
    if where == "download":
        monkeypatch.setattr(lanes, "host_like", lambda tensor: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        model.submit(torch.zeros(2, 3))
    lanes.compute.used.clear()
    lanes.back.used.clear()
    gc.collect()
    assert inputs[0]() is None
    net.full = False
    monkeypatch.setattr(lanes, "host_like", host_like)
    np.testing.assert_array_equal(model(torch.zeros(2, 3)), np.ones((2, 3)))
    model.close()
