"""Arenas: one worker's block memory, and which ranges of it may be used again.

An arena is a memfd: sparse, large, created by the driver so that its blocks outlive their worker, and freed by the
kernel when the last process that holds it is gone, whatever happened. Its first touch costs about ten times a warm
write, so ranges are reused, lowest address first, and given back to the kernel only when they have not been needed
for a while (see `Allocator.trim`).

Invariants: ranges in use never overlap; free ranges are sorted, disjoint and never adjacent; nothing here looks at
bytes in a range. An allocator is used by one thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from headrace.core.errors import InternalError, PlanError

ALIGN = 64  # bytes; a cache line, and what Arrow recommends for buffers
EPOCH_ALLOCATIONS = 64  # memory that two epochs did not use goes back to the kernel
TRIM_MIN_BYTES = 32 << 20  # less is not worth the system call and the later page faults

_PAGE = mmap.PAGESIZE
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of <linux/mman.h>, Linux 5.14
_POPULATE_MIN_BYTES = 1 << 20


def arena_bytes(arenas: int) -> int:
    """How long an arena is: twice the memory of the machine, so that addresses never run out before memory does.

    Addresses cost nothing until they are touched; but all arenas may be mapped in one process, which has 128 TiB.
    """
    memory = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")
    size = min(max(2 * memory, 64 << 30), (32 << 40) // max(1, arenas))
    return size - size % _PAGE


def create_arena(worker: int, size: int) -> int:
    """A descriptor of a new, empty arena."""
    fd = os.memfd_create(f"headrace-arena-{worker}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def touched_bytes(fd: int) -> int:
    """Memory that the arena holds now, whether its ranges are in use or free."""
    return os.fstat(fd).st_blocks * 512


def punch(fd: int, start: int, stop: int) -> None:
    """Give the whole pages of [start, stop) back to the kernel. They read as zeros afterwards."""
    start = -(-start // _PAGE) * _PAGE
    stop -= stop % _PAGE
    if stop <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, _PUNCH, ctypes.c_int64(start), ctypes.c_int64(stop - start)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"could not free arena pages: {os.strerror(number)}")


class Mapping:
    """An arena mapped into this process, once. Takes over the descriptor."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        size = os.fstat(fd).st_size
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)  # keeps a descriptor of its own
        except (OSError, ValueError) as exc:
            raise PlanError(
                f"could not map {size >> 30} GiB of addresses for blocks: {exc}",
                hint="raise the limit on virtual memory (ulimit -v), or use engine='threads'",
            ) from exc
        finally:
            os.close(fd)

    def view(self, offset: int, length: int) -> np.ndarray:
        """A range as an array of bytes, read-only when the mapping is. Its memory is the arena's."""
        return np.frombuffer(self._map, np.uint8, length, offset)

    def buffer(self, offset: int, length: int) -> pa.Buffer:
        """A range as a buffer to write into."""
        return pa.py_buffer(memoryview(self._map)[offset : offset + length])

    def populate(self, offset: int, length: int) -> None:
        """Touch a range that is about to be written for the first time: a quarter cheaper in one call than by faults."""
        if length < _POPULATE_MIN_BYTES:
            return
        start = offset - offset % _PAGE
        try:
            self._map.madvise(_POPULATE_WRITE, start, length + offset - start)
        except OSError:
            return  # an older kernel: the write itself will touch it

    def close(self) -> None:
        self._map.close()


class Allocator:
    """First fit at the lowest address: what was touched before is used again before anything new.

    punch(start, stop): gives a free range back to the kernel.
    """

    def __init__(self, size: int, punch: Callable[[int, int], None]) -> None:
        self._punch = punch
        self._starts: list[int] = [0]  # of free ranges, sorted
        self._stops: list[int] = [size]
        self._used: dict[int, int] = {}  # offset -> bytes
        self._touched = 0  # nothing at or above was written since it was last given back
        self._recent_top = 0  # highest end of an allocation in this epoch, and in the one before
        self._previous_top = 0
        self._allocations = 0
        self.used_bytes = 0

    @property
    def touched_bytes(self) -> int:
        """The end of the highest range that may hold memory."""
        return self._touched

    def fits_warm(self, length: int) -> bool:
        """An allocation of `length` would land in memory that was touched before."""
        length = _padded(length)
        for start, stop in zip(self._starts, self._stops, strict=True):
            if stop - start >= length:
                return start + length <= self._touched
        return False

    def allocate(self, length: int) -> tuple[int, int]:
        """(offset, how many bytes at its end were never touched). Raises MemoryError when no range is long enough."""
        length = _padded(length)
        for i, start in enumerate(self._starts):
            if self._stops[i] - start >= length:
                break
        else:
            raise MemoryError(f"no room for a block of {length} bytes; {self.used_bytes} are in use")
        end = start + length
        if end == self._stops[i]:
            del self._starts[i], self._stops[i]
        else:
            self._starts[i] = end
        self._used[start] = length
        self.used_bytes += length
        cold = max(0, end - max(start, self._touched))
        self._touched = max(self._touched, end)
        self._recent_top = max(self._recent_top, end)
        self._allocations += 1
        if self._allocations % EPOCH_ALLOCATIONS == 0:
            self.trim()
            self._previous_top, self._recent_top = self._recent_top, 0
        return start, cold

    def free(self, offset: int) -> None:
        """The range that starts at `offset` may be used again."""
        length = self._used.pop(offset, None)
        if length is None:
            raise InternalError(f"arena offset {offset} was freed, but it is not in use")
        self.used_bytes -= length
        end = offset + length
        i = bisect_left(self._starts, offset)
        joins_next = i < len(self._starts) and self._starts[i] == end
        joins_previous = i > 0 and self._stops[i - 1] == offset
        if joins_previous and joins_next:
            self._stops[i - 1] = self._stops[i]
            del self._starts[i], self._stops[i]
        elif joins_previous:
            self._stops[i - 1] = end
        elif joins_next:
            self._starts[i] = offset
        else:
            self._starts.insert(i, offset)
            self._stops.insert(i, end)

    def trim(self, *, idle: bool = False) -> None:
        """Give back free memory above what the last two epochs used; idle: all of it.

        A range that someone keeps for long does not hold on to what is free below it.
        """
        keep = 0 if idle else max(self._recent_top, self._previous_top)
        for start, stop in zip(self._starts, self._stops, strict=True):
            low, high = max(start, keep), min(stop, self._touched)
            if high - low < TRIM_MIN_BYTES:
                continue
            self._punch(low, high)
            if stop >= self._touched:
                self._touched = low


def _padded(length: int) -> int:
    return max(ALIGN, -(-length // ALIGN) * ALIGN)
