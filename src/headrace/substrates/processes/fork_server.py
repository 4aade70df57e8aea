"""A process that imports what workers need, and forks them: `python -m headrace.substrates.processes.fork_server <control fd>
<lifeline fd> <modules>`.

An interpreter and its imports take 0.3 s of CPU; a fork takes 3 ms, and shares the memory of what was imported. The driver
itself is never forked: its threads, and locks that they hold, would be in an unknown state. This process has none, or ends.

Driver to server: (FORK, module, fds) with so many descriptors, which `module.main` is called with in the new process;
(REAP, pid).
Server to driver: (READY,) when all is imported; (pid, errno), with a pidfd where errno is 0; (status,) as os.waitpid tells it.
Answers come in the order of what was asked. Processes that have ended keep their number until they are reaped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from collections import deque
from importlib import import_module
from typing import Any, NoReturn

from headrace.substrates.processes import main as worker
from headrace.substrates.processes import wire

FORK, REAP, READY = range(3)
HARMLESS = ("jemalloc_bg_thd",)  # threads whose library looks after forks itself


def main(control_fd: int, lifeline_fd: int, modules: list[str]) -> NoReturn:
    """Serve until the driver has closed its end. SIGINT and SIGTERM came blocked, and stay so: workers unblock them."""
    for fd in (control_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    worker.die_with_driver(lifeline_fd)
    worker.forked_by = os.getpid()
    for name in modules:
        with contextlib.suppress(Exception):  # who needs it will hear
            import_module(name)
    gc.collect()
    gc.freeze()
    if not is_alone():
        os._exit(0)
    control = socket.socket(fileno=control_fd)
    _serve(control, lifeline_fd)
    os._exit(0)


def is_alone() -> bool:
    """Does this process have one thread, so that a fork of it is whole?"""
    names: list[str] = []
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/comm") as name:
            names.append(name.read().strip())
    return sum(name not in HARMLESS for name in names) == 1


def _serve(control: socket.socket, lifeline_fd: int) -> None:
    reader, fds = wire.FrameReader(), deque[int]()
    control.sendall(wire.frame((READY,)))
    while data := wire.receive(control, fds, block=True):
        for message in reader.feed(data):
            if message[0] == REAP:
                control.sendall(wire.frame((_reaped(message[1]),)))
                continue
            given = [fds.popleft() for _ in range(message[2])]
            try:
                pid = os.fork()
            except OSError as error:
                control.sendall(wire.frame((0, error.errno)))
            else:
                if pid == 0:
                    _begin(message[1], given, (control.detach(), lifeline_fd, *fds))
                _tell(control, pid)
            for fd in given:
                os.close(fd)


def _reaped(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def _tell(control: socket.socket, pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        socket.send_fds(control, [wire.frame((pid, 0))], [pidfd])
    finally:
        os.close(pidfd)


def _begin(module: str, given: list[int], others: tuple[int, ...]) -> NoReturn:
    """In the new process, which goes on as if it had been started as `python -m <module> <given>`."""
    code = 1
    try:
        for fd in others:
            os.close(fd)
        sys.argv = [module, *map(str, given)]
        numbers: Any = sys.modules.get("numpy.random")
        if numbers is not None:  # or all workers would draw the same numbers; `random` sees to it itself
            numbers.seed()
        run = sys.modules["__main__"] = import_module(module)
        run.main(*given)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
