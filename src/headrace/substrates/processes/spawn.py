"""Starting a worker process and saying how it ended. Nothing here knows of steps or blocks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from headrace.core.resources import WorkerSpec

# Read by OpenMP (and torch, Arrow), OpenBLAS, MKL, numexpr, OpenCV, Rayon (tokenizers, polars' dependencies), Polars.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


def start_process(spec: WorkerSpec, threads: int) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """(process, the driver's non-blocking end of its control socket, the lifeline's end to keep open).

    The interpreter starts in the directory that this headrace was imported from, so that `-m` finds the same one; the
    worker then moves to the driver's directory.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    lifeline_read, lifeline_write = os.pipe()
    ours.setblocking(False)
    # Ctrl-C before the worker has said that it ignores it: blocked here, inherited, unblocked in main().
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "headrace.substrates.processes.main",
                str(theirs.fileno()),
                str(lifeline_read),
            ],
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[3],
            env=worker_environment(os.environ, spec, threads),
            pass_fds=(theirs.fileno(), lifeline_read),
        )
    except BaseException:
        ours.close()
        os.close(lifeline_write)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        os.close(lifeline_read)
    return process, ours, lifeline_write


def worker_environment(environment: os._Environ[str] | dict[str, str], spec: WorkerSpec, threads: int) -> dict[str, str]:
    """The user's environment, with `threads` for native pools where the user did not say, and only the own device.

    A CUDA worker sees its device as the first and only one, counted within what the user made visible; the others see
    none, so that no CPU worker takes device memory by accident.
    """
    env = dict(environment)
    for name in _THREAD_VARIABLES:
        env.setdefault(name, str(threads))
    kind, _, index = spec.device.partition(":")
    if kind == "cuda":
        visible = [d.strip() for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
        number = int(index or 0)
        env["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def death_reason(code: int, oom_kills_before: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    reason = f"killed by signal {-code}{name}"
    if -code == signal.SIGKILL and oom_kills() > oom_kills_before:
        reason += ", probably by the kernel because memory ran out: use fewer cpus, or smaller batches"
    return reason


def oom_kills() -> int:
    """How many processes the kernel has killed for memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat") as f:
        for line in f:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
