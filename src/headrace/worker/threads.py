"""How many threads native libraries may use in one worker, so that all workers together use the cores once."""

from __future__ import annotations

import os

from headrace.core.resources import CPU_POOL, WAITING_POOL

DEVICE_THREADS = 4  # for what a device's worker does on the host: tokenizing, copies into pinned memory


def fair_threads(pool: str, cpu_share: int = 1) -> int:
    """Threads for a worker of this pool. cpu_share: for a CPU worker, cores per CPU worker.

    There is one CPU worker a core, so each computes with one thread. A device's worker feeds the device, for which all others
    work: it gets a few.
    """
    if pool in (CPU_POOL, WAITING_POOL):
        return max(1, cpu_share)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cpu_share, min(DEVICE_THREADS, cores))
