"""A process that imports what workers need, and forks them: `python -m headrace.substrates.processes.fork_server <control fd>
<lifeline fd>`.

An interpreter and its imports take 0.3 s of CPU; a fork takes 3 ms, and shares the memory of what was imported. The driver
itself is never forked: its threads, and locks that they hold, would be in an unknown state. This process has none, or ends.

Driver to server: (driver_pid, sys_path, modules) first; then (FORK, module, fds, environment) with so many descriptors, which
`module.main` is called with in the new process, and what differs in its environment (None: no such name); (REAP, pid).
Server to driver: READY when all is imported; (pid, errno), with a pidfd where errno is 0; (status, errno) as os.waitpid tells
it. Answers come in the order of what was asked. Processes that have ended keep their number until they are reaped.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from headrace.substrates.processes import main as worker
from headrace.substrates.processes import wire

FORK, REAP, READY = range(3)
HARMLESS = ("jemalloc_bg_thd",)  # threads whose library looks after forks itself


def main(control_fd: int, lifeline_fd: int) -> NoReturn:
    """Serve until the driver is gone or has closed its end. SIGINT and SIGTERM came blocked; workers unblock them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where the driver's parent ignored it, nothing could be reaped
    for fd in (control_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    worker.die_with_driver(lifeline_fd)
    with contextlib.suppress(OSError):  # the driver is gone
        _serve(socket.socket(fileno=control_fd), lifeline_fd)
    os._exit(0)


def is_alone() -> bool:
    """Does this process have one thread, so that a fork of it is whole?"""
    names: list[str] = []
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/comm") as name:
                names.append(name.read().strip())
    except OSError:
        return False
    return sum(name not in HARMLESS for name in names) == 1


def _serve(control: socket.socket, lifeline_fd: int) -> None:
    fds = deque[int]()
    messages = _messages(control, fds)
    hello = next(messages, None)
    if hello is None:
        return
    driver_pid, sys.path[:], modules = hello
    driver = os.pidfd_open(driver_pid)
    if os.getppid() != driver_pid:
        return
    _prepare(modules)
    if not is_alone():
        return
    control.sendall(wire.frame((READY,)))
    for message in _until_gone(messages, control, driver):
        if message[0] == REAP:
            control.sendall(wire.frame(_reaped(message[1])))
            continue
        _, module, count, environment = message
        given = [fds.popleft() for _ in range(min(count, len(fds)))]
        pid, error = _forked() if len(given) == count else (0, errno.EMFILE)
        if pid == 0 and not error:
            _begin(module, given, environment, (control.detach(), lifeline_fd, driver, *fds))
        _tell(control, pid, error)
        for fd in given:
            os.close(fd)


def _prepare(modules: Sequence[str]) -> None:
    for name in modules:
        with contextlib.suppress(Exception):  # who needs it will hear
            import_module(name)
    gc.collect()
    gc.freeze()


def _messages(control: socket.socket, fds: deque[int]) -> Iterator[Any]:
    reader = wire.FrameReader()
    while data := wire.receive(control, fds, block=True):
        yield from reader.feed(data)


def _until_gone(messages: Iterator[Any], control: socket.socket, driver: int) -> Iterator[Any]:
    """Messages, until there are no more, or the driver's process has ended: what it has forked may hold its end open."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(driver, select.POLLIN)
    while all(fd != driver for fd, _ in poll.poll()):  # one is under way at a time: none waits in the reader
        message = next(messages, None)
        if message is None:
            return
        yield message


def _forked() -> tuple[int, int]:
    try:
        return os.fork(), 0
    except OSError as error:
        return 0, error.errno or errno.EAGAIN


def _reaped(pid: int) -> tuple[int, int]:
    try:
        return os.waitpid(pid, 0)[1], 0
    except OSError as error:
        return 0, error.errno or errno.ECHILD


def _tell(control: socket.socket, pid: int, error: int) -> None:
    if error:
        control.sendall(wire.frame((pid, error)))
        return
    pidfd = os.pidfd_open(pid)
    try:
        socket.send_fds(control, [wire.frame((pid, 0))], [pidfd])
    finally:
        os.close(pidfd)


def _begin(module: str, given: list[int], environment: Mapping[str, str | None], others: Sequence[int]) -> NoReturn:
    """In the new process, which goes on as if it had been started as `python -m <module> <given>`."""
    code = 1
    try:
        for fd in others:
            os.close(fd)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        time.tzset()
        numbers: Any = sys.modules.get("numpy.random")
        if numbers is not None:  # or all workers would draw the same numbers; `random` sees to it itself
            numbers.seed()
        worker.forked = True
        run = sys.modules["__main__"] = import_module(module)
        sys.argv = [run.__file__ or module, *map(str, given)]
        run.main(*given)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        worker.flush_prints()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
