"""The driver's side of a fork server: processes that are forked from it, and how they ended."""

from __future__ import annotations

import contextlib
import errno
import os
import re
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
from headrace.substrates.processes.fork_server import FORK, READY, REAP
from headrace.substrates.processes.spawn import THREAD_VARIABLES, UNKNOWN_CODE, start_process, worker_environment

READY_S = 30.0  # for its imports; a server that takes longer is given up
ANSWER_S = 5.0  # for a fork
LAYERS = ("connectors", "core", "metrics", "models", "plan", "transforms", "worker")  # of headrace, which workers import
ALWAYS = (
    "headrace.substrates.bodies",
    "headrace.substrates.processes.crumb",
    "headrace.substrates.processes.main",
    "headrace.substrates.processes.store",
    "headrace.worker.body",
)
_PANDAS = re.compile(r"pyarrow\._?(dataset|acero|substrait)")  # parts of Arrow that import it
# Read when Python or a library loads: a process that has loaded them can't change its mind.
_AT_LOAD = ("ARROW_", "GLIBC_TUNABLES", "JE_", "LD_", "MALLOC_", "MIMALLOC_", "PYTHON")


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
        self._path = list(sys.path)
        module = "headrace.substrates.processes.fork_server"
        self._process, self._socket, self._lifeline = start_process(module, spec, threads)
        self._reader, self._fds, self._answers = wire.FrameReader(), deque[int](), deque[Any]()
        self._ready: bool | None = None  # not known yet
        self._socket.settimeout(READY_S)
        with contextlib.suppress(OSError):  # it is heard when it is needed
            self._socket.sendall(wire.frame((os.getpid(), self._path, [*ALWAYS, *modules])))

    @classmethod
    def begin(cls, threads: int, modules: Iterable[str] = ()) -> Self | None:
        """For CPU workers; None where it could not serve them: then each is started by itself."""
        if sys.platform != "linux" or not hasattr(signal, "pidfd_send_signal"):
            return None
        spec = WorkerSpec(0, CPU_POOL, "cpu")
        if worker_environment(os.environ, spec, threads)["OPENBLAS_NUM_THREADS"] != "1":
            return None  # NumPy starts threads when it loads
        try:
            os.close(os.pidfd_open(os.getpid()))
            return cls(spec, threads, modules)
        except OSError:
            return None

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Can it fork a process that is to have this environment? Waits until it can, the first time."""
        if self._ready is False or self._path != sys.path:
            return False
        if any(name in THREAD_VARIABLES or name.startswith(_AT_LOAD) for name in self._changed(environment)):
            return False
        if self._ready is None:
            try:
                (answer,) = self._answer()
            except OSError:
                self.close()
                return False
            except BaseException:
                self.close()
                raise
            self._socket.settimeout(ANSWER_S)
            self._ready = answer == READY
        return bool(self._ready)

    def fork(self, module: str, environment: Mapping[str, str], *fds: int) -> Forked | None:
        """A process that runs `module.main(*fds)`, with copies of these descriptors. None where the server is gone: a process
        may then be there all the same, and has to be shut out by closing what it would talk to. Raises OSError when the system
        has no room for it.
        """
        pid, error = self._ask((FORK, module, len(fds), self._changed(environment)), fds) or (0, 0)
        if error or (pid and not self._fds):
            raise OSError(error or errno.EMFILE, os.strerror(error or errno.EMFILE))
        return Forked(self, pid, self._fds.popleft()) if pid else None

    def reap(self, pid: int) -> int | None:
        """The exit code of a process that it forked and that has ended; None where that can't be known any more."""
        status, error = self._ask((REAP, pid)) or (0, errno.ECHILD)
        return None if error else os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._ready = False
        if self._lifeline < 0:
            return
        self._process.kill()  # before it could notice that its socket is closed, and say so
        self._socket.close()
        os.close(self._lifeline)
        self._lifeline = -1
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._process.wait()

    def _changed(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """What differs from its own; None for names that are not to be there."""
        if environment == self._environment:
            return {}
        names = environment.keys() | self._environment.keys()
        return {n: environment.get(n) for n in names if environment.get(n) != self._environment.get(n)}

    def _ask(self, message: tuple[Any, ...], fds: tuple[int, ...] = ()) -> Any:
        """Its answer; None where it is gone."""
        if not self._ready:
            return None
        try:
            socket.send_fds(self._socket, [wire.frame(message)], fds)
            return self._answer()
        except OSError:
            self.close()
            return None
        except BaseException:  # an interrupt: whatever it answers now must not be taken for the answer to something else
            self.close()
            raise

    def _answer(self) -> Any:
        while not self._answers:
            data = wire.receive(self._socket, self._fds, block=True)
            if not data:
                raise ConnectionResetError("the fork server has ended")
            self._answers.extend(self._reader.feed(data))
        return self._answers.popleft()


class Forked:
    """A process that a fork server has forked. It keeps its number until it is waited for, as a child of our own would.

    pidfd: the caller's, to be closed after it was waited for.
    """

    def __init__(self, server: ForkServer, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """As subprocess tells it; UNKNOWN_CODE where the server died before, which alone could tell."""
        if self.returncode is not None:
            return self.returncode
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        code = self._server.reap(self.pid)
        self.returncode = self._adopted() if code is None else code
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _adopted(self) -> int:
        """The server is dead: where orphans become this process's children (in a container, say), it is ours to reap."""
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        except OSError:
            return UNKNOWN_CODE
        if found is None:
            return UNKNOWN_CODE
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def pidfd_of(process: Process) -> int:
    """A descriptor that is ready when the process has ended: the caller's to close. Raises OSError where there is none."""
    return process.pidfd if isinstance(process, Forked) else os.pidfd_open(process.pid)


def imported() -> list[str]:
    """Modules of headrace, and of Arrow, that this process has imported and its workers are going to. Arrow's parts that import
    pandas come with a module of ours that needs them, or not at all: programs have them for reasons of their own.
    """
    ours = tuple(f"headrace.{layer}." for layer in LAYERS)
    return sorted(name for name in sys.modules if name.startswith((*ours, "pyarrow.")) and not _PANDAS.match(name))
