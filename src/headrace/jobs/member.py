"""A process that runs small jobs, one after the other: `python -m headrace.jobs.member <control fd> <lifeline fd>`.

It never imports the user's `__main__`: jobs arrive pickled, with functions of `__main__` by value. Each runs in the main
thread, by the inline engine. When the driver is gone the process is gone too.
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import logging
import os
import pickle
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

from headrace.substrates.malloc import keep_large_allocations
from headrace.substrates.processes.main import die_with_driver, leave_signals_to_the_driver, watch_driver
from headrace.substrates.processes.wire import frame

if TYPE_CHECKING:
    from headrace.jobs.crew import Outcome
    from headrace.jobs.job import Job

SMALL_BYTES = 64 << 20  # of input: more is worth the whole machine
_HEADER = struct.Struct("<I")


def main(control_fd: int, lifeline_fd: int) -> None:
    leave_signals_to_the_driver()
    for fd in (control_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    die_with_driver(lifeline_fd)
    keep_large_allocations()
    control = socket.socket(fileno=control_fd)
    begin = _receive(control)
    if begin is None:
        os._exit(0)
    driver_pid, cwd, sys.path[:], memory_bytes, typed, script = begin
    watch_driver(driver_pid, control_fd)
    with contextlib.suppress(OSError):
        os.chdir(cwd)
    linecache.cache.update(typed)
    if script is not None:
        sys.modules["__main__"].__file__ = script  # where the source of by-value classes is looked for
    _warm()
    control.sendall(frame((None,)))
    while (message := _receive(control)) is not None:
        number, payload = message
        outcome = _run(number, payload, memory_bytes)
        _flush()
        control.sendall(_framed(outcome))
        del message, payload, outcome
    logging.shutdown()
    _flush()
    os._exit(0)  # without waiting for threads of user code


def _warm() -> None:
    """Import what every job needs, and leave it out of garbage collections."""
    import headrace.api.dataset
    import headrace.api.session
    import headrace.observe.run  # noqa: F401

    gc.collect()
    gc.freeze()


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # user code may have closed or taken them away
        sys.stdout.flush()
        sys.stderr.flush()


def _run(number: int, payload: bytes, memory_bytes: int) -> Outcome:
    from headrace.jobs.crew import Outcome

    began = time.perf_counter()
    try:
        job: Job = pickle.loads(payload)
        if not is_small(job):
            return Outcome(number, ended=False)
        run = job.run(engine="inline", progress="quiet", memory_bytes=memory_bytes)
        return Outcome(number, True, run, None, time.perf_counter() - began)
    except Exception as error:
        return Outcome(number, True, None, error, time.perf_counter() - began)


def is_small(job: Job) -> bool:
    """Is its input small? Lists as much of it as tells."""
    total = 0
    for split in job.dataset._plan.read.source.splits(per_input=False):  # pyright: ignore[reportPrivateUsage]
        total += split.bytes
        if total > SMALL_BYTES:
            return False
    return True


def _framed(outcome: Outcome) -> bytes:
    """For the socket, whatever the error holds."""
    from headrace.core.errors import UserCodeError
    from headrace.jobs.crew import Outcome

    try:
        data = frame((outcome,))
        pickle.loads(memoryview(data)[_HEADER.size :])
        return data
    except Exception:
        if outcome.error is None:
            return frame((Outcome(outcome.job, ended=False),))
        error = UserCodeError(f"{type(outcome.error).__name__}: {outcome.error}")
        return frame((Outcome(outcome.job, True, None, error, outcome.wall_s),))


def _receive(control: socket.socket) -> Any:
    """The next message; None when the driver has closed its end."""
    head = _exactly(control, _HEADER.size)
    body = None if head is None else _exactly(control, _HEADER.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def _exactly(control: socket.socket, size: int) -> bytearray | None:
    out = bytearray(size)
    view, at = memoryview(out), 0
    while at < size:
        n = control.recv_into(view[at:])
        if n == 0:
            return None
        at += n
    return out


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
