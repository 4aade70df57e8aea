"""All files of a file system made durable by one call, where that says as much as an fsync of each of them.

It does on Linux from 5.8 on (before, syncfs kept errors to itself), for file systems that were looked at: others may leave it
to a server, or to nobody. It waits for what other programs have written there, too: it is for times when that is little.
"""

from __future__ import annotations

import os
import re
import sys

LEAST_FILES = 32  # fewer are as quick one by one
MOST_DIRTY_BYTES = 64 << 20  # of the whole machine, not yet on disk: a second of a slow disk's time

_EXT4, _XFS = 0xEF53, 0x58465342  # <linux/magic.h>


class WholeDisk:
    """The file system that a directory lies on, from now until `close`."""

    def __init__(self, folder: str) -> None:
        """Raises OSError for a folder that can't be opened."""
        self._fd = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._fit: bool | None = None

    def sync(self) -> bool:
        """True: all that was written there since this was made is durable. False: that is not known; files are to be synced by
        themselves, and will tell which of them is not.
        """
        if self._fit is None:
            self._fit = _kernel() >= (5, 8) and _kind(self._fd) in (_EXT4, _XFS)
        if not self._fit or _dirty_bytes() > MOST_DIRTY_BYTES:
            return False
        import ctypes

        # A descriptor is told of an error once, which may be that of a file to come: from then on each file is asked itself.
        done: bool = ctypes.CDLL(None).syncfs(self._fd) == 0
        self._fit = done
        return done

    def close(self) -> None:
        os.close(self._fd)


def _kernel() -> tuple[int, int]:
    if sys.platform != "linux":
        return (0, 0)
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


def _kind(descriptor: int) -> int:
    """The file system's magic number, 0 when it can't be told."""
    import ctypes

    told = (ctypes.c_long * 64)()  # struct statfs, of about 16 longs, begins with it
    return int(told[0]) if ctypes.CDLL(None).fstatfs(descriptor, told) == 0 else 0


def _dirty_bytes() -> int:
    """What the machine has yet to write to its disks; more than anybody allows when that can't be told."""
    try:
        with open("/proc/meminfo", "rb") as file:
            found = re.findall(rb"^(?:Dirty|Writeback):\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        found = []
    return sum(map(int, found)) << 10 if len(found) == 2 else sys.maxsize
