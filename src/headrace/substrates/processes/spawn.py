"""Starting a worker process and saying how it ended. Nothing here knows of steps or blocks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.core.resources import WorkerSpec
from headrace.worker.threads import fair_threads

if TYPE_CHECKING:
    from headrace.substrates.processes.forks import ForkServer, Process

# Read when they load, by OpenMP (and torch, Arrow, scikit-learn, XGBoost), OpenBLAS, BLIS, MKL, Accelerate, numexpr, OpenCV,
# Rayon (tokenizers, polars' dependencies), Polars, TensorFlow.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
UNKNOWN_CODE = 1 << 16  # the exit code of a process that has ended unseen


def start_process(
    module: str, spec: WorkerSpec, threads: int, *fds: int, server: ForkServer | None = None
) -> tuple[Process, socket.socket, int]:
    """(process, the driver's non-blocking end of its control socket, the lifeline's end to keep open).

    Runs `python -m <module> <control fd> <lifeline fd> <fds>`, in the directory that this headrace was imported from, so that
    `-m` finds the same one; it then moves to the driver's directory. server: forks it, if it can. Raises OSError when the
    system has no room for it.
    """
    environment = worker_environment(os.environ, spec, threads)
    if server is not None and server.serves(environment):
        found = _with_channel(lambda control, lifeline: server.fork(module, environment, control, lifeline, *fds))
        if found is not None:
            return found
    found = _with_channel(lambda control, lifeline: _interpreter(module, environment, (control, lifeline, *fds)))
    assert found is not None
    return found


def _with_channel(begin: Callable[[int, int], Process | None]) -> tuple[Process, socket.socket, int] | None:
    """Begin a process with its ends of a control socket and a lifeline, and keep ours. None where there is no process: if one
    is there all the same, its ends lead nowhere, and it leaves.
    """
    with contextlib.ExitStack() as opened:
        lifeline_read, lifeline_write = os.pipe()
        opened.callback(os.close, lifeline_read)
        undo = opened.enter_context(contextlib.ExitStack())
        undo.callback(os.close, lifeline_write)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        opened.callback(theirs.close)
        undo.callback(ours.close)
        ours.setblocking(False)
        process = begin(theirs.fileno(), lifeline_read)
        if process is None:
            return None
        undo.pop_all()
        return process, ours, lifeline_write


def _interpreter(module: str, environment: Mapping[str, str], fds: tuple[int, ...]) -> Process:
    # Ctrl-C or SIGTERM before the worker has said that it ignores them: blocked here, inherited, unblocked in main().
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, fds)],
            stdin=subprocess.DEVNULL,
            cwd=Path(__file__).parents[3],
            env=environment,
            pass_fds=fds,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_environment(environment: os._Environ[str] | dict[str, str], spec: WorkerSpec, threads: int) -> dict[str, str]:
    """The user's environment, with a fair number of threads for native pools where the user did not say, and only the own
    device. threads: a CPU worker's share of the cores; a device's worker gets a few.

    A CUDA worker sees its device as the first and only one, counted within what the user made visible; the others see
    none, so that no CPU worker takes device memory by accident.
    """
    env = dict(environment)
    fair = fair_threads(spec.pool, threads)
    for name in THREAD_VARIABLES:
        env.setdefault(name, str(fair))
    kind, _, index = spec.device.partition(":")
    if kind == "cuda":
        visible = [d.strip() for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
        number = int(index or 0)
        env["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def death_reason(code: int, *, out_of_memory: bool = False) -> str:
    """How a process ended, in words. code: as subprocess tells it."""
    if out_of_memory:
        return "out of memory: killed by the kernel (signal 9, SIGKILL); use fewer cpus, or smaller batches"
    if code == UNKNOWN_CODE:
        return "its process has ended, and nobody can tell how"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    return f"killed by signal {-code}{name}"


def oom_kills() -> int:
    """Processes that the kernel has killed for memory: of this control group, else of the machine; 0 where it is not told."""
    group = _control_group()
    if group:
        found = _counter(f"/sys/fs/cgroup{group.rstrip('/')}/memory.events", "oom_kill")
        if found is not None:
            return found
    return _counter("/proc/vmstat", "oom_kill") or 0


def _control_group() -> str:
    """This process's group in the unified hierarchy, "" where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as groups:
        for line in groups:
            if line.startswith("0::"):
                return line[3:].strip()
    return ""


def _counter(path: str, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(path) as counters:
        for line in counters:
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None
