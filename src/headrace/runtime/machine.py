"""What this machine has: usable cores, usable memory, accelerators. Reads affinity, cgroups and /proc; imports no framework."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from headrace.core.resources import Machine

MEMORY_SHARE = 0.25  # of usable memory for blocks in flight: the rest is the user's models, readers and page cache
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
    """Memory that is free for us now, cut by a cgroup's limit."""
    import psutil

    available = psutil.virtual_memory().available
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current").strip()
        available = min(available, int(limit) - (int(used) if used.isdigit() else 0))
    return max(256 << 20, available)


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
    try:
        return Path(path).read_text()
    except OSError:
        return ""
