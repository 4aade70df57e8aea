"""FileSpool: a Spool (commit/table.py) in a temporary file without a name, so that what is settled takes no memory.

The kernel removes the file with its descriptor, which is closed when the spool is gone: nothing is left, whatever happens.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref

from headrace.core.errors import DestinationError

MEMORY_BYTES = 1 << 20  # what stays in memory: small runs make no file, and large ones write it in pieces of this size


class FileSpool:
    """Where no file can be made, or the disk takes no more, what comes from then on stays in memory.

    directory: where to make the file; None for the usual temporary directory (TMPDIR).
    """

    def __init__(self, directory: str | None = None, memory_bytes: int = MEMORY_BYTES) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._fd = -1
        self._filed = 0  # bytes in the file; they never change
        self._tail = bytearray()  # what follows them
        self._refused = False

    def append(self, data: bytes) -> int:
        with self._lock:
            at = self._filed + len(self._tail)
            self._tail += data
            if len(self._tail) >= self._memory_bytes and not self._refused:
                self._write()
            return at

    def read(self, start: int, size: int) -> bytes:
        """Raises DestinationError when the disk does not give it back."""
        with self._lock:
            filed = self._filed
            tail = bytes(self._tail[max(0, start - filed) : max(0, start + size - filed)])
        return self._read(start, min(size, filed - start)) + tail if start < filed else tail

    def _write(self) -> None:
        try:
            if self._fd < 0:
                self._fd = _nameless(self._directory)
                weakref.finalize(self, os.close, self._fd).atexit = False
            done = 0
            with memoryview(self._tail) as view:
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], self._filed + done)
        except (OSError, AttributeError):  # AttributeError: a system without pwrite
            self._refused = True
            return
        self._filed += done
        self._tail.clear()

    def _read(self, start: int, size: int) -> bytes:
        try:
            found = os.pread(self._fd, size, start)
            while len(found) < size and (more := os.pread(self._fd, size - len(found), start + len(found))):
                found += more
        except OSError as e:
            where = (("folder", self._directory or tempfile.gettempdir()),)
            hint = "look at the disk's health; the same call goes on with what is settled"
            raise DestinationError(f"a temporary file can't be read: {e.strerror}", where=where, hint=hint) from e
        return found


def _nameless(directory: str | None) -> int:
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        return os.dup(file.fileno())
