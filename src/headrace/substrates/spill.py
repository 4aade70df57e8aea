"""Blocks on disk, in a file without a name whose ranges are used again. For all substrates; decides nothing.

The kernel removes the file with its last descriptor and view: nothing is left, whatever happens. What `store` has taken is on
disk, so that the kernel may drop its pages at once, and a write error that shows up late can't damage a block.

Invariants: a range is freed once, when nothing reads it any more; ranges start at pages, so that each can be mapped alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace

from headrace.core.refs import PartRef
from headrace.substrates.blocks import decode, encode_into, encoded_bytes
from headrace.substrates.processes.arena import Allocator, punch

_PAGE = mmap.ALLOCATIONGRANULARITY
_MEMORY_SYSTEMS = frozenset({"tmpfs", "ramfs"})
_LEAST_ADDRESSES = 64 << 30


class SpillFile:
    """Used by one thread. directory: where to make it; None for a temporary directory that is on a disk.

    Raises OSError when there is no such place, or the file can't be made.
    """

    def __init__(self, directory: str | None) -> None:
        place = directory or _disk_directory()
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            self.fd = os.dup(file.fileno())
        try:
            size = _address_bytes(self.fd)
            os.ftruncate(self.fd, size)  # sparse; readers map all of it
        except OSError:
            os.close(self.fd)
            raise
        self._allocator = Allocator(size, lambda start, stop: None)  # free ranges are punched one by one

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    def store(self, blocks: Iterable[Any]) -> list[int]:
        """Write blocks (buffers), one after the other, as long as the disk takes them: the offsets of those it took."""
        ranges: list[tuple[int, int]] = []
        with contextlib.suppress(OSError, MemoryError):
            for block in blocks:
                data = memoryview(block).cast("B")
                ranges.append((self._write(data), len(data)))
        try:
            self._sync()
        except OSError:  # none of them can be trusted
            for offset, length in ranges:
                self.free(offset, length)
            return []
        return [offset for offset, _ in ranges]

    def free(self, offset: int, length: int) -> None:
        """Nothing reads the range any more: its space goes back to the disk where the file system can do that."""
        self._allocator.free(offset)
        with contextlib.suppress(OSError, AttributeError):
            punch(self.fd, offset, offset + _padded(length))

    def close(self) -> None:
        """Views of what was read stay valid."""
        os.close(self.fd)

    def _write(self, data: memoryview) -> int:
        offset, _ = self._allocator.allocate(_padded(len(data)))
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self.fd, data[done:], offset + done)
        except OSError:
            self.free(offset, len(data))
            raise
        return offset

    def _sync(self) -> None:
        if sys.platform == "linux":
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # pages that nobody has mapped leave memory now
        else:
            os.fsync(self.fd)


class LocalSpill:
    """Spilled batches of substrates whose workers share one address space. spill_dir: see SpillFile.

    A range is free when neither its handle nor a view of it is left, which the garbage collector tells, from any thread.
    """

    def __init__(self) -> None:
        self._file: SpillFile | None = None
        self._dead: deque[tuple[int, int]] = deque()

    def spill(self, parts: Sequence[PartRef], directory: str | None) -> tuple[PartRef, ...]:
        """The parts that were moved, with new handles."""
        if not hasattr(os, "pwrite"):
            return ()
        waiting = [p for p in parts if not isinstance(p.handle, SpilledBatch)]
        self.collect()
        if self._file is None:
            try:
                self._file = SpillFile(directory)
            except OSError:
                return ()
        lengths: list[int] = []
        offsets = self._file.store(_encoded(waiting, lengths))
        moved = zip(waiting, offsets, lengths, strict=False)
        return tuple(replace(p, handle=SpilledBatch(self._file.fd, at, n, self._dead)) for p, at, n in moved)

    def collect(self) -> None:
        """Free the ranges that nothing refers to any more."""
        while self._dead and self._file is not None:
            self._file.free(*self._dead.popleft())

    def close(self) -> None:
        """Views stay valid; handles can't be read any more."""
        if self._file is not None:
            self._file.close()
            self._file = None


class SpilledBatch:
    """The handle of a spilled local part: the range of the file that holds it."""

    def __init__(self, fd: int, offset: int, length: int, dead: deque[tuple[int, int]]) -> None:
        self._fd = fd
        self._offset = offset
        self._length = length
        self._dead = dead

    def read(self) -> pa.RecordBatch:
        """The batch, by memory map: its pages are read when they are looked at."""
        view = np.frombuffer(mmap.mmap(self._fd, self._length, offset=self._offset, access=mmap.ACCESS_READ), np.uint8)
        return decode(pa.foreign_buffer(view.ctypes.data, self._length, base=(view, self)))  # views keep the range too

    def __del__(self) -> None:
        self._dead.append((self._offset, self._length))


def _encoded(parts: Iterable[PartRef], lengths: list[int]) -> Iterable[pa.Buffer]:
    """Each part's batch as an IPC stream, made when it is its turn."""
    for part in parts:
        lengths.append(encoded_bytes(part.handle))
        buffer = pa.allocate_buffer(lengths[-1])
        encode_into(buffer, part.handle)
        yield buffer


def _padded(length: int) -> int:
    return max(_PAGE, -(-length // _PAGE) * _PAGE)


def _address_bytes(fd: int) -> int:
    """How long the file is: as the file system, so that space runs out before addresses do."""
    system = os.fstatvfs(fd)
    size = max(_LEAST_ADDRESSES, system.f_blocks * system.f_frsize)
    return min(size, 8 << 40) // _PAGE * _PAGE  # the smallest limit on a file's length among usual systems is 16 TiB


def _disk_directory() -> str:
    for place in (tempfile.gettempdir(), "/var/tmp"):
        if os.path.isdir(place) and _file_system(place) not in _MEMORY_SYSTEMS:
            return place
    raise OSError("temporary directories are in memory here")


def _file_system(path: str) -> str:
    """The type of the file system that holds `path`; "" where the kernel does not tell."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            mount, _, system = line.partition(" - ")
            if mount.split()[2] == number:
                return system.split()[0]
    return ""
