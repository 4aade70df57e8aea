"""A process that runs small jobs, one after the other: `python -m headrace.jobs.member <control fd> <lifeline fd>`.

It never imports the user's `__main__`: jobs arrive pickled, with functions of `__main__` by value. Each runs in the main
thread, by the inline engine, and begins in the driver's working directory. When the driver is gone the process is gone too.
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.core.frames import with_room
from headrace.substrates.malloc import keep_large_allocations
from headrace.substrates.processes.main import die_with_driver, flush_prints, leave_signals_to_the_driver, watch_driver
from headrace.substrates.processes.wire import FrameReader, frame

if TYPE_CHECKING:
    from headrace.jobs.crew import Outcome
    from headrace.jobs.job import Job

SMALL_BYTES = 64 << 20  # of input: more is worth the whole machine
RECV_BYTES = 256 << 10


def main(control_fd: int, lifeline_fd: int) -> None:
    leave_signals_to_the_driver()
    for fd in (control_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    die_with_driver(lifeline_fd)
    keep_large_allocations()
    control = socket.socket(fileno=control_fd)
    messages = _messages(control)
    begin = next(messages, None)
    if begin is None:
        os._exit(0)
    driver_pid, cwd, sys.path[:], memory_bytes, typed, script = begin
    watch_driver(driver_pid, control_fd)
    _go_to(cwd)
    linecache.cache.update(typed)
    if script is not None:
        sys.modules["__main__"].__file__ = script  # where the source of by-value classes is looked for
    _warm()
    control.sendall(frame((None,)))
    for number, payload in messages:
        _go_to(cwd)  # where the job before it left the process: relative paths would lead elsewhere
        outcome = with_room(_run, number, payload, memory_bytes)
        flush_prints()
        control.sendall(_framed(outcome))
        del payload, outcome
    logging.shutdown()
    flush_prints()
    os._exit(0)  # without waiting for threads of user code


def _go_to(cwd: str) -> None:
    with contextlib.suppress(OSError):  # it may be gone
        os.chdir(cwd)


def _warm() -> None:
    """Import what every job needs, and leave it out of garbage collections."""
    import headrace.api.dataset
    import headrace.api.session
    import headrace.observe.run  # noqa: F401

    gc.collect()
    gc.freeze()


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
        FrameReader().feed(data)  # it must be readable, too
        return data
    except Exception:
        if outcome.error is None:
            return frame((Outcome(outcome.job, ended=False),))
        error = UserCodeError(f"{type(outcome.error).__name__}: {outcome.error}")
        return frame((Outcome(outcome.job, True, None, error, outcome.wall_s),))


def _messages(control: socket.socket) -> Iterator[Any]:
    """Until the driver has closed its end."""
    reader = FrameReader()
    while data := control.recv(RECV_BYTES):
        yield from reader.feed(data)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
