"""How much memory a batch took, and how much the next may take: on a CUDA device, by its allocator; on the host, by a bound.

A host's own figures (resident set, high-water mark) tell of everything that the process does at the same time, blocks under way
most of all, so that there only what is known is counted: a batch's input and output. That is a lower bound: it keeps rows that
are large from making huge batches, while intermediate results that are too large show as MemoryError.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

SHARE = 0.5  # of the memory that the host has left, for the batches of all its cores
DEVICE_SHARE = 0.9  # of what a device has left: its allocator rounds sizes up


class HostMemory:
    """Batches on CPUs, and on simulated devices."""

    def begin(self, *, alone: bool = True) -> None:
        """A batch is about to run; alone, or while the one before it still does."""

    def peak_bytes(self, batch_bytes: int) -> int:
        """What the batch took. batch_bytes: its input and output."""
        return batch_bytes

    def room_bytes(self) -> int | None:
        """What a batch may take; None when unknown."""
        free = _free_bytes()
        return None if free is None else int(free * SHARE / max(1, os.cpu_count() or 1))


class CudaMemory(HostMemory):
    """Batches that torch runs on a CUDA device. Nothing is known, and nothing done, before torch has begun to use it.

    The allocator counts for the whole process: models that share a device and a worker run one after the other.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0

    def begin(self, *, alone: bool = True) -> None:
        cuda = _cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats(self._device)
            if alone:
                self._before = cuda.memory_allocated(self._device)

    def peak_bytes(self, batch_bytes: int) -> int:
        cuda = _cuda()
        if cuda is None:
            return 0
        return max(0, cuda.max_memory_allocated(self._device) - self._before)

    def room_bytes(self) -> int | None:
        cuda = _cuda()
        if cuda is None:
            return None
        free, _ = cuda.mem_get_info(self._device)
        cached = cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device)
        return int((free + cached) * DEVICE_SHARE)


def memory_of(device: str) -> HostMemory:
    return CudaMemory(device) if device.partition(":")[0] == "cuda" else HostMemory()


def free_memory() -> None:
    """After memory ran out: drop what only cycles hold, and give the device's allocator's cache back."""
    gc.collect()
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()


def _cuda() -> Any:
    """torch.cuda, if it is in use."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _free_bytes() -> int | None:
    """Memory that this host, and the container's limit where it shows, leave."""
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free)) if free else None
