"""The way of a batch to a device and back: pinned memory, and copies that go on beside the computation.

    upload(batch)  -> tensors on the device     host -> pinned slot -> device, on the copy lane
    compute()      -> what is issued inside runs after the uploads, on the compute lane
    download(out)  -> Pending                   device -> host memory, on the way-back lane, after the computation

A lane is a queue of device work that runs in the order of issue, beside the other lanes (a CUDA stream); a mark is a point in
it that the host or another lane can wait for (a CUDA event). Without an accelerator the lanes are absent: work is done when
it has been issued, and nothing is copied.

What must not live here: what is computed. Invariants:
- A pinned slot is written again only after the copy out of it has finished; also when something failed half-way.
- What a computation returned may be its own memory: it is copied before the next one, on the lane of both.
- A tensor is told to each lane that uses it, so that its memory is not given to others while that lane may still read it.
- Nothing is held between batches but the pinned slots: what `upload` and `download` return holds all else.
- Device copies are shared only inside `sharing(...)`, which holds the host arrays too: their addresses can't be those of
  other data meanwhile.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

SLOTS = 2  # one is read by the copy under way while the next batch is written to the other
ALIGN_BYTES = 256  # of columns in a slot: what CUDA aligns its own allocations to
_ACCELERATORS = ("cuda", "mps", "xpu")


class Mark(Protocol):
    """A point in a lane."""

    def wait(self) -> None:
        """Return when all that was issued before it has been done."""
        ...


class Lane(Protocol):
    """A queue of device work."""

    def issue(self) -> AbstractContextManager[Any]:
        """Work issued inside goes to this lane."""
        ...

    def mark(self) -> Mark: ...

    def after(self, mark: Mark) -> None:
        """What is issued to this lane from now on starts after the mark."""
        ...

    def uses(self, tensor: torch.Tensor) -> None:
        """This lane works on a tensor that another lane allocated."""
        ...


class Lanes(Protocol):
    """The lanes of a device, and host memory that its copy engines reach. pins: False where copying there gains nothing."""

    pins: bool

    @property
    def copy(self) -> Lane: ...

    @property
    def compute(self) -> Lane: ...

    @property
    def back(self) -> Lane: ...

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Pinned memory: uint8, one dimension."""
        ...

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a copy of `tensor`."""
        ...


def is_accelerator(device: str) -> bool:
    """False for "cpu", and for "sim:0": a simulated device computes on the CPU."""
    return device.partition(":")[0] in _ACCELERATORS


def torch_device(device: str) -> str:
    """The name by which torch knows a worker's device."""
    return device if is_accelerator(device) else "cpu"


# --- lanes that are absent -------------------------------------------------------------------------------------------


class _Done:
    def wait(self) -> None: ...


class _NoLane:
    def issue(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return _Done()

    def after(self, mark: Mark) -> None:
        mark.wait()

    def uses(self, tensor: torch.Tensor) -> None: ...


class NoLanes:
    """A CPU: everything is done when it has been issued."""

    pins = False

    def __init__(self) -> None:
        self.copy = self.compute = self.back = _NoLane()

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        import torch

        return torch.empty(size_bytes, dtype=torch.uint8)

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.empty(tensor.shape, dtype=tensor.dtype)


# --- CUDA ------------------------------------------------------------------------------------------------------------


class _CudaMark:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class _CudaLane:
    def __init__(self, device: str) -> None:
        import torch

        self._stream = torch.cuda.Stream(device=torch.device(device))

    def issue(self) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        import torch

        event = torch.cuda.Event(blocking=True)  # who waits sleeps: its core is for the CPU workers
        event.record(self._stream)
        return _CudaMark(event)

    def after(self, mark: Mark) -> None:
        if isinstance(mark, _CudaMark):
            self._stream.wait_event(mark.event)
        else:
            mark.wait()

    def uses(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)


class CudaLanes:
    """A CUDA device: three streams, pinned memory. Made after the model: what was issued for its weights has been done then."""

    pins = True

    def __init__(self, device: str) -> None:
        import torch

        torch.cuda.synchronize(device)  # these streams don't wait for the default one, on which weights are converted
        self._device = device
        self.copy = _CudaLane(device)
        self.compute = _CudaLane(device)
        self.back = _CudaLane(device)

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        import torch

        with torch.cuda.device(self._device):  # else the first device would be opened, too
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.cuda.device(self._device):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def lanes_of(device: str) -> Lanes:
    """The lanes of a worker's device. ("mps" and "xpu" have none here: their copies are in order with the computation.)"""
    return CudaLanes(device) if device.partition(":")[0] == "cuda" else NoLanes()


# --- pinned memory ---------------------------------------------------------------------------------------------------


class PinnedRing:
    """Pinned memory for batches on their way to the device, slot after slot. Slots grow to the largest batch seen."""

    def __init__(self, lanes: Lanes, slots: int = SLOTS) -> None:
        self._lanes = lanes
        self._buffers: list[torch.Tensor | None] = [None] * slots
        self._marks: list[Mark | None] = [None] * slots
        self._next = 0

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers if buffer is not None)

    @contextlib.contextmanager
    def staged(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Copies of host tensors in a slot. Before it is used again, what the copy lane was given inside is waited for."""
        at = self._next
        mark = self._marks[at]
        if mark is not None:
            mark.wait()
            self._marks[at] = None
        starts, size = _layout(tensors)
        views = [_view(self._buffer(at, size), start, t) for start, t in zip(starts, tensors, strict=True)]
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
        self._next = (at + 1) % len(self._buffers)
        try:
            yield views
        finally:  # a failure half-way leaves copies under way that were issued before it
            self._marks[at] = self._lanes.copy.mark()

    def close(self) -> None:
        """Wait for the copies under way, and let the memory go."""
        for at, mark in enumerate(self._marks):
            if mark is not None:
                mark.wait()
            self._marks[at] = self._buffers[at] = None

    def _buffer(self, at: int, size: int) -> torch.Tensor:
        buffer = self._buffers[at]
        if buffer is None or buffer.numel() < size:
            self._buffers[at] = None  # before the new one is asked for: both need not fit
            buffer = self._buffers[at] = self._lanes.host_buffer(size)
        return buffer


def _layout(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """(where each begins, bytes of all)."""
    starts: list[int] = []
    at = 0
    for tensor in tensors:
        starts.append(at)
        at += -(-tensor.numel() * tensor.element_size() // ALIGN_BYTES) * ALIGN_BYTES
    return starts, max(at, ALIGN_BYTES)


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    size = like.numel() * like.element_size()
    return buffer[start : start + size].view(like.dtype).view(like.shape)


# --- shared copies ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Copy:
    host: torch.Tensor  # keeps the memory, so that its address means this content
    device: torch.Tensor
    mark: Mark


@dataclass(slots=True)
class _Kept:
    """Copies of one kind, by the address of their first row."""

    starts: list[int] = field(default_factory=list[int])
    copies: list[_Copy] = field(default_factory=list[_Copy])

    def add(self, start: int, copy: _Copy) -> None:
        at = bisect.bisect_right(self.starts, start)
        self.starts.insert(at, start)
        self.copies.insert(at, copy)

    def holding(self, address: int, row_bytes: int) -> tuple[_Copy, int] | None:
        """A copy that holds the row at this address, and the row's place in it."""
        at = bisect.bisect_right(self.starts, address) - 1
        if at < 0:
            return None
        row, rest = divmod(address - self.starts[at], row_bytes)
        return None if rest or row >= self.copies[at].host.shape[0] else (self.copies[at], row)


@dataclass(slots=True)
class SharedCopies:
    """Device copies of rows of host arrays, found by where these lie, in the same type and shape of a row.

    Batches of models may differ in size: rows are found in one copy, or in several that follow one another.
    keeps: False for copies that nobody will ask for again. hits: batches that were found; saved_bytes: what these hold.
    """

    hits: int = 0
    saved_bytes: int = 0
    keeps: bool = True
    _kept: dict[tuple[Any, ...], _Kept] = field(default_factory=dict[tuple[Any, ...], _Kept])

    def find(self, host: torch.Tensor, device: str) -> list[_Copy]:
        """Copies that hold all its rows, cut to these, in order; [] when there are none."""
        kept = self._kept.get(_kind_of(host, device)) if _has_rows(host) else None
        if kept is None:
            return []
        left = host.shape[0]
        row_bytes = host.numel() // left * host.element_size()
        address = host.data_ptr()
        found: list[_Copy] = []
        while left:
            place = kept.holding(address, row_bytes)
            if place is None:
                return []
            copy, row = place
            rows = min(left, copy.host.shape[0] - row)
            found.append(_Copy(copy.host, copy.device[row : row + rows], copy.mark))
            address += rows * row_bytes
            left -= rows
        self.hits += 1
        self.saved_bytes += host.numel() * host.element_size()
        return found

    def add(self, host: torch.Tensor, device: str, copy: torch.Tensor, mark: Mark) -> None:
        if self.keeps and _has_rows(host):
            self._kept.setdefault(_kind_of(host, device), _Kept()).add(host.data_ptr(), _Copy(host, copy, mark))

    def forget(self) -> None:
        """Let the memory go."""
        self._kept.clear()


def _has_rows(host: torch.Tensor) -> bool:
    return host.ndim > 0 and host.numel() > 0 and host.is_contiguous()


def _kind_of(host: torch.Tensor, device: str) -> tuple[Any, ...]:
    return device, host.dtype, tuple(host.shape[1:])


_IN_THREAD = threading.local()


@contextlib.contextmanager
def sharing() -> Iterator[SharedCopies]:
    """While some rows are worked on in this thread: models on one device that read the same rows of a column share its copy.

    Nobody may write to the rows' memory meanwhile. The copies are held, in device memory, until the end, or `forget_shared`.
    """
    outer = getattr(_IN_THREAD, "copies", None)
    _IN_THREAD.copies = SharedCopies()
    try:
        yield _IN_THREAD.copies
    finally:
        _IN_THREAD.copies = outer


def forget_shared() -> None:
    """Let go of what models share in this thread: memory ran out."""
    copies: SharedCopies | None = getattr(_IN_THREAD, "copies", None)
    if copies is not None:
        copies.forget()


@contextlib.contextmanager
def keeping(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """While a model uses what was uploaded for it: should it write to that, models after it do not share it."""
    versions = [version_of(tensor) for tensor in tensors]
    try:
        yield
    finally:
        if None in versions or versions != [version_of(tensor) for tensor in tensors]:
            forget_shared()


def version_of(tensor: torch.Tensor) -> int | None:
    """Greater after each write to the tensor. None: not known, it was made in inference mode."""
    return None if tensor.is_inference() else tensor._version


# --- the path --------------------------------------------------------------------------------------------------------


class DevicePath:
    """A device's lanes and pinned memory, of one model in one worker. Not for several threads at once."""

    def __init__(self, device: str, lanes: Lanes | None = None) -> None:
        self.device = torch_device(device)
        self.lanes = lanes_of(device) if lanes is None else lanes
        self._ring = PinnedRing(self.lanes)

    @property
    def uploads(self) -> bool:
        """Does `upload` copy?"""
        return self.lanes.pins or self.device != "cpu"

    def upload(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same values on the device, for use inside `compute()`; on a CPU the very tensors. Returns before they are there.

        Raises torch.OutOfMemoryError, with nothing kept.
        """
        if not self.lanes.pins:
            return [t if self.device == "cpu" else t.to(self.device) for t in tensors]
        shared: SharedCopies | None = getattr(_IN_THREAD, "copies", None)
        found = [[] if shared is None else shared.find(t, self.device) for t in tensors]
        fresh = self._copied([t for t, copies in zip(tensors, found, strict=True) if not copies], shared)
        return [self._joined(copies) if copies else fresh.pop(0) for copies in found]

    def _joined(self, copies: Sequence[_Copy]) -> torch.Tensor:
        """Rows that are on the device already, for use inside `compute()`."""
        import torch

        compute = self.lanes.compute
        for copy in copies:
            compute.after(copy.mark)
            compute.uses(copy.device)
        if len(copies) == 1:
            return copies[0].device
        with compute.issue():
            return torch.cat([copy.device for copy in copies])

    def _copied(self, tensors: Sequence[torch.Tensor], shared: SharedCopies | None) -> list[torch.Tensor]:
        if not tensors:
            return []
        import torch

        made: list[torch.Tensor] = []
        with self._ring.staged(tensors) as pinned, self.lanes.copy.issue():
            for view in pinned:
                target = torch.empty(view.shape, dtype=view.dtype, device=self.device)
                made.append(target.copy_(view, non_blocking=True))
        mark = self.lanes.copy.mark()
        self.lanes.compute.after(mark)
        for host, tensor in zip(tensors, made, strict=True):
            self.lanes.compute.uses(tensor)
            if shared is not None:
                shared.add(host, self.device, tensor, mark)
        return made

    def compute(self) -> AbstractContextManager[Any]:
        """What is issued inside runs after the uploads so far."""
        return self.lanes.compute.issue()

    def download(self, outputs: Mapping[str, torch.Tensor]) -> Pending:
        """The outputs of a computation, on their way to the host. Returns before they are there.

        They may be written to in the next `compute()`, as CUDA graphs do: what travels are copies made on the compute lane. On
        a CPU nothing is copied, and they must stay as they are until the result has been used.
        """
        if not self.lanes.pins:
            return Pending({name: t.detach().cpu() for name, t in outputs.items()}, _Done())
        back = self.lanes.back
        with self.lanes.compute.issue():
            ours = {name: tensor.detach().clone() for name, tensor in outputs.items()}
        back.after(self.lanes.compute.mark())
        hosts: dict[str, torch.Tensor] = {}
        with back.issue():
            for name, tensor in ours.items():
                back.uses(tensor)
                hosts[name] = self.lanes.host_like(tensor).copy_(tensor, non_blocking=True)
        return Pending(hosts, back.mark())

    def close(self) -> None:
        """Wait for copies under way, and let the pinned memory go."""
        self._ring.close()


@dataclass(frozen=True, slots=True)
class Pending:
    """Results on their way to the host."""

    hosts: Mapping[str, torch.Tensor]
    mark: Mark

    def result(self) -> dict[str, np.ndarray]:
        """Arrays of their own memory or of the model's; waits for the device. bfloat16 becomes float32.

        Raises what the computation raised on the device.
        """
        self.mark.wait()
        return {name: to_numpy(tensor) for name, tensor in self.hosts.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """An array over the memory of a tensor on the host; bfloat16 and the 8-bit floats, which NumPy lacks, as float32."""
    import torch

    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


# --- threads of a CPU ------------------------------------------------------------------------------------------------

_THREADS = threading.Lock()
_threads_users = 0
_threads_before = 0


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """`threads` threads for torch on CPUs, in the whole process; after the last user it has those it had before.

    The setting is the process's, and OpenMP's the calling thread's too: each worker thread enters for itself.
    """
    import torch

    global _threads_users, _threads_before
    with _THREADS:
        if _threads_users == 0:
            _threads_before = torch.get_num_threads()
        _threads_users += 1
        torch.set_num_threads(max(1, threads))
    try:
        yield
    finally:
        with _THREADS:
            _threads_users -= 1
            if _threads_users == 0:
                torch.set_num_threads(_threads_before)
