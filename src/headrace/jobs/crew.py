"""The processes that small jobs share, and the driver's side of their sockets.

Each has the next job at hand before it has ended one, so that it need not wait. Invariants: a job is given to one process at a
time; the one that a process was at when it died comes back as not ended, those that it had not begun go to others; processes
that can't even start are given up, not started for ever; all end with the crew, and with the driver, however that dies.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from msgspec import Struct, field

from headrace.core.paths import working_directory
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.jobs.job import Job
from headrace.observe.run import Run
from headrace.substrates.processes import wire
from headrace.substrates.processes.forks import ForkServer, Process, imported, pidfd_of
from headrace.substrates.processes.spawn import start_process

MEMBER = "headrace.jobs.member"
AHEAD = 2  # jobs that a process has, with the one that it is at
MOST_BYTES = 1 << 30  # of a pickled job: larger ones stay where they are
LEAVE_S = 1.0  # for processes to end by themselves when all is done


class Outcome(Struct, frozen=True):
    """job: its number. ended: False: it is too large to share the machine, or `died`: its process did. wall_s: of this
    attempt.
    """

    job: int
    ended: bool
    run: Run | None = None
    error: Exception | None = None
    wall_s: float = 0.0
    died: bool = False


class _Member(Struct, eq=False):
    """lifeline: our end; the kernel kills the process when it closes. ended: a descriptor that is ready when it has."""

    process: Process
    socket: socket.socket
    outgoing: wire.Outgoing
    lifeline: int
    ended: int
    reader: wire.FrameReader = field(default_factory=wire.FrameReader)
    up: bool = False
    has: deque[tuple[int, Job]] = field(default_factory=deque[tuple[int, Job]])


class Crew:
    """size: of processes. memory_bytes: that each may use for blocks."""

    def __init__(self, size: int, memory_bytes: int) -> None:
        self._size = size
        self._memory_bytes = memory_bytes
        self._members: list[_Member] = []
        self._by_fd: dict[int, _Member] = {}  # its socket's, and the one that tells its end
        self._poll = select.epoll()
        self._waiting: deque[tuple[int, Job]] = deque()
        self._vain = 0  # processes that did not come up
        self._server: ForkServer | None = None

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux"

    def __enter__(self) -> Self:
        self._server = ForkServer.begin(1, [*imported(), MEMBER, "headrace.api.session"]) if self._size > 1 else None
        try:
            for _ in range(self._size):
                self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error processes end where they stand: what they were at goes on the next time."""
        if kind is None:
            for member in self._members:
                with contextlib.suppress(OSError):
                    member.socket.shutdown(socket.SHUT_WR)
            for member in self._members:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    member.process.wait(LEAVE_S)
        self._close()

    def run(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[Outcome]:
        """Outcomes as they come, one of each job."""
        self._waiting.extend(jobs)
        while self._waiting or any(m.has for m in self._members):
            yield from self._hand_out()
            if not self._members:
                break
            for member, fd, event in [(self._by_fd.get(fd), fd, event) for fd, event in self._poll.poll()]:
                if member is None or self._by_fd.get(fd) is not member:  # lost meanwhile; its number may be another's by now
                    continue
                if fd == member.ended:
                    yield from self._lost(member)
                    continue
                if event & select.EPOLLOUT:
                    self._flush(member)
                if event & ~select.EPOLLOUT:
                    yield from self._hear(member)
        yield from (Outcome(number, ended=False) for number, _ in self._waiting)
        self._waiting.clear()

    def _close(self) -> None:
        for member in list(self._members):
            self._remove(member)
        if self._server is not None:
            self._server.close()
        self._poll.close()

    # -- one process

    def _start(self) -> None:
        process, ours, lifeline = start_process(MEMBER, WorkerSpec(0, CPU_POOL, "cpu"), 1, server=self._server)
        member = _Member(process, ours, wire.Outgoing(ours), lifeline, pidfd_of(process))
        self._members.append(member)
        for fd in (ours.fileno(), member.ended):
            self._by_fd[fd] = member
            self._poll.register(fd, select.EPOLLIN)
        # What code of a notebook says is known to this process alone.
        typed = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        script = None if main is None else os.path.abspath(main)
        self._send(member, (os.getpid(), working_directory(), list(sys.path), self._memory_bytes, typed, script))

    def _hand_out(self) -> Iterator[Outcome]:
        """One job for each process first; a second one while there are enough for all."""
        for depth in range(1, AHEAD + 1):
            for member in self._members:
                while self._waiting and len(member.has) < depth and (depth == 1 or len(self._waiting) >= self._size):
                    yield from self._give(member, self._waiting.popleft())

    def _give(self, member: _Member, job: tuple[int, Job]) -> Iterator[Outcome]:
        import cloudpickle

        try:
            payload: bytes = cloudpickle.dumps(job[1])
        except Exception:  # it can be run here
            payload = b""
        if not 0 < len(payload) <= MOST_BYTES:
            yield Outcome(job[0], ended=False)
            return
        member.has.append(job)
        self._send(member, (job[0], payload))

    def _send(self, member: _Member, message: tuple[Any, ...]) -> None:
        try:
            sent = member.outgoing.send(wire.frame(message))
        except OSError:
            return  # it died, as we shall hear
        if not sent:
            self._poll.modify(member.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, member: _Member) -> None:
        with contextlib.suppress(OSError):
            if member.outgoing.flush():
                self._poll.modify(member.socket.fileno(), select.EPOLLIN)

    def _hear(self, member: _Member) -> Iterator[Outcome]:
        try:
            data = member.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # its end is told by another descriptor
            self._poll.modify(member.socket.fileno(), 0)
            return
        for (outcome,) in member.reader.feed(data):
            if outcome is None:
                member.up = True
                continue
            member.has = deque(pair for pair in member.has if pair[0] != outcome.job)
            yield outcome

    def _lost(self, member: _Member) -> Iterator[Outcome]:
        while True:  # what it said before
            heard = list(self._hear(member))
            yield from heard
            if not heard:
                break
        self._remove(member)
        if member.up and member.has:
            yield Outcome(member.has.popleft()[0], ended=False, died=True)
        self._waiting.extendleft(reversed(member.has))
        self._vain = 0 if member.up else self._vain + 1
        if self._waiting and self._vain < self._size:
            self._start()

    def _remove(self, member: _Member) -> None:
        self._members.remove(member)
        for fd in (member.socket.fileno(), member.ended):
            del self._by_fd[fd]
            self._poll.unregister(fd)
        member.socket.close()
        os.close(member.lifeline)
        with contextlib.suppress(ProcessLookupError):
            member.process.kill()
        member.process.wait()
        os.close(member.ended)
