"""What this machine has: usable cores, usable memory, accelerators. Reads affinity, cgroups and /proc; imports no framework."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from headrace.core.resources import Machine

MEMORY_SHARE = 0.25  # of usable memory for blocks in flight: the rest is the user's models, readers and page cache
_READ_BYTES = 64 << 10  # more than such files hold
MEMORY_MAX = 8 << 30  # more would only deepen queues: throughput needs a few blocks per worker


def detect_machine() -> Machine:
    return Machine(cores=usable_cores(), memory_bytes=usable_memory_bytes(), devices=cuda_devices())


def block_budget_bytes(machine: Machine) -> int:
    """The memory budget for blocks in flight when the user names none."""
    return max(256 << 20, min(MEMORY_MAX, int(machine.memory_bytes * MEMORY_SHARE)))


def usable_cores() -> int:
    """Cores by affinity, cut by a cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return max(1, cores)


def usable_memory_bytes() -> int:
    """Memory that is free for us now, cut by the limits of our cgroup and of those around it."""
    return max(256 << 20, min([available_bytes(), *(group.limit() - group.used() for group in memory_cgroups())]))


def available_bytes() -> int:
    """Memory of the machine that processes could still get without swapping: free, or cache that can go."""
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    import psutil

    return psutil.virtual_memory().available


class MemoryCgroup(Struct, frozen=True):
    """A control group with a memory limit. The files' names differ between versions 1 and 2 of the kernel interface."""

    folder: str
    limit_file: str
    used_file: str
    cache_keys: tuple[str, ...]

    def limit(self) -> int:
        """In bytes; no limit is a number beyond any memory."""
        text = _read(f"{self.folder}/{self.limit_file}").strip()
        return int(text) if text.isdigit() else 1 << 62

    def used(self) -> int:
        """In bytes, without cached file pages: the kernel takes those back before it kills."""
        text = _read(f"{self.folder}/{self.used_file}").strip()
        cached = 0
        for line in _read(f"{self.folder}/memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key in self.cache_keys:
                cached += int(value)
        return max(0, int(text) - cached) if text.isdigit() else 0


def memory_cgroups(root: str = "/sys/fs/cgroup", own: str | None = None) -> tuple[MemoryCgroup, ...]:
    """The groups around this process that limit its memory, innermost first. own: the text of /proc/self/cgroup."""
    found: list[MemoryCgroup] = []
    for line in (_read("/proc/self/cgroup") if own is None else own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", ("active_file", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
            base = f"{root}/memory"
        else:
            continue
        groups = (MemoryCgroup(folder, *names) for folder in _upwards(base, path))
        found += [group for group in groups if 0 < group.limit() < 1 << 50]
    return tuple(found)


def _upwards(base: str, path: str) -> Iterator[str]:
    """The folder of a cgroup and those that hold it, as far as they are mounted here."""
    below = path.strip("/")
    while below:
        if os.path.isdir(f"{base}/{below}"):
            yield f"{base}/{below}"
        below = below.rpartition("/")[0]
    yield base


def cuda_devices() -> tuple[str, ...]:
    """Names "cuda:0"... of the GPUs that this process may use; found without loading a framework."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
        return tuple(f"cuda:{i}" for i in range(len(named)))
    if sys.platform != "linux":
        return ()
    gpus = Path("/proc/driver/nvidia/gpus")
    try:
        return tuple(f"cuda:{i}" for i in range(len(list(gpus.iterdir()))))
    except OSError:
        return ()


def _read(path: str) -> str:
    """Of the kernel's small files: "" for one that can't be read. A third of the time that a text file takes."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = b""
            while piece := os.read(descriptor, _READ_BYTES):
                data += piece
            return data.decode("utf-8", "replace")
        finally:
            os.close(descriptor)
    except OSError:
        return ""
