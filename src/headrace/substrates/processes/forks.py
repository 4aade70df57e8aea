"""The driver's side of a fork server: processes that are forked from it, and how they ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self

from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.substrates.processes import wire
from headrace.substrates.processes.fork_server import FORK, REAP
from headrace.substrates.processes.spawn import start_process, worker_environment

ANSWER_S = 30.0  # a server that says nothing for so long is given up
LAYERS = ("connectors", "core", "metrics", "models", "plan", "transforms", "worker")  # of headrace, which workers import
ALWAYS = (
    "headrace.substrates.bodies",
    "headrace.substrates.processes.crumb",
    "headrace.substrates.processes.main",
    "headrace.substrates.processes.store",
    "headrace.worker.body",
)


class Process(Protocol):
    """As subprocess.Popen: of a process that was started here or forked for us."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class ForkServer:
    """Starts in the background; its environment is that of a worker like `spec`. Not thread-safe. To be closed after the
    processes that it forked have been waited for.
    """

    def __init__(self, spec: WorkerSpec, threads: int, modules: Iterable[str] = ()) -> None:
        """Raises OSError when the system has no room for it."""
        self._environment = worker_environment(os.environ, spec, threads)
        names = ",".join([*ALWAYS, *modules])
        module = "headrace.substrates.processes.fork_server"
        self._process, self._socket, self._lifeline = start_process(module, spec, threads, arguments=(names,))
        self._socket.setblocking(True)
        self._socket.settimeout(ANSWER_S)
        self._reader, self._fds, self._answers = wire.FrameReader(), deque[int](), deque[Any]()
        self._ready: bool | None = None  # not known yet

    @classmethod
    def begin(cls, threads: int, modules: Iterable[str] = ()) -> Self | None:
        """For CPU workers; None where there is none: then each is started by itself."""
        if sys.platform != "linux" or not hasattr(signal, "pidfd_send_signal"):
            return None
        try:
            os.close(os.pidfd_open(os.getpid()))
            return cls(WorkerSpec(0, CPU_POOL, "cpu"), threads, modules)
        except OSError:
            return None

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Can it fork a process that is to have this environment? Waits until it can, the first time."""
        if environment != self._environment or self._ready is False:
            return False
        if self._ready is None:
            try:
                self._answer()
                self._ready = True
            except OSError:
                self.close()
        return bool(self._ready)

    def fork(self, module: str, *fds: int) -> Forked | None:
        """A process that runs `module.main(*fds)`, with copies of these descriptors; None where the server is gone. Raises
        OSError when the system has no room for it.
        """
        try:
            socket.send_fds(self._socket, [wire.frame((FORK, module, len(fds)))], fds)
            pid, error = self._answer()
        except OSError:
            self.close()
            return None
        if error:
            raise OSError(error, os.strerror(error))
        return Forked(self, pid, self._fds.popleft())

    def reap(self, pid: int) -> int:
        """The exit code of a process that it forked and that has ended. Raises OSError when that can't be known any more."""
        try:
            self._socket.sendall(wire.frame((REAP, pid)))
            return os.waitstatus_to_exitcode(self._answer()[0])
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._ready = False
        if self._lifeline < 0:
            return
        self._socket.close()
        os.close(self._lifeline)
        self._lifeline = -1
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        while not self._answers:
            data = wire.receive(self._socket, self._fds, block=True)
            if not data:
                raise ConnectionResetError("the fork server has ended")
            self._answers.extend(self._reader.feed(data))
        return self._answers.popleft()


class Forked:
    """A process that a fork server has forked. It keeps its number until it is waited for, as a child of our own would."""

    def __init__(self, server: ForkServer, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server
        self._pidfd = pidfd

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is not None:
            return self.returncode
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        try:
            self.returncode = self._server.reap(self.pid)
        except OSError:  # the server died, and with it what it knew: who killed it has killed this one, too
            self.returncode = -signal.SIGKILL
        os.close(self._pidfd)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def imported() -> list[str]:
    """Modules of headrace, and of Arrow, that this process has imported and its workers are going to."""
    ours = tuple(f"headrace.{layer}." for layer in LAYERS)
    return sorted(name for name in sys.modules if name.startswith((*ours, "pyarrow.")))
