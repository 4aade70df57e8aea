"""The processes that small jobs share, and the driver's side of their sockets.

Each has the next job at hand before it has ended one, so that it never waits. Invariants: a job is given to one process at a
time; one whose process dies comes back as not ended; the processes end with the crew, and with the driver, however that dies.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.jobs.job import Job
from headrace.observe.run import Run
from headrace.substrates.processes import wire
from headrace.substrates.processes.spawn import worker_environment

AHEAD = 2  # jobs that a process has, with the one that it is at


@dataclass(frozen=True, slots=True)
class Outcome:
    """job: its number. ended: False: it was too large to share the machine, or its process died. wall_s: of this attempt."""

    job: int
    ended: bool
    run: Run | None = None
    error: Exception | None = None
    wall_s: float = 0.0


@dataclass(slots=True)
class _Member:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    outgoing: wire.Outgoing
    lifeline: int  # our end: the kernel kills the process when it closes
    reader: wire.FrameReader = field(default_factory=wire.FrameReader)
    has: deque[int] = field(default_factory=deque[int])


class Crew:
    """size: of processes. memory_bytes: that each may use for blocks."""

    def __init__(self, size: int, memory_bytes: int) -> None:
        self._size = size
        self._memory_bytes = memory_bytes
        self._members: dict[int, _Member] = {}
        self._poll = select.epoll()

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux"

    def __enter__(self) -> Self:
        try:
            for _ in range(self._size):
                self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[Outcome]:
        """Outcomes as they come, one of each job."""
        waiting = deque(jobs)
        while self._members and (waiting or any(m.has for m in self._members.values())):
            for member in list(self._members.values()):
                yield from self._hand_out(member, waiting)
            for fd, event in self._poll.poll():
                member = self._members.get(fd)
                if member is None:
                    continue
                if event & select.EPOLLOUT:
                    self._flush(member)
                if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    yield from self._hear(member, waiting)
        yield from (Outcome(i, ended=False) for i, _ in waiting)

    def close(self) -> None:
        """End the processes where they stand: what they were at goes on the next time."""
        for member in list(self._members.values()):
            self._remove(member)
        self._poll.close()

    # -- one process

    def _start(self) -> None:
        with contextlib.ExitStack() as failing:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            failing.callback(ours.close)
            ours.setblocking(False)
            lifeline_read, lifeline_write = os.pipe()
            failing.callback(os.close, lifeline_write)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "headrace.jobs.member", str(theirs.fileno()), str(lifeline_read)],
                    stdin=subprocess.DEVNULL,
                    cwd=Path(__file__).parents[2],  # that this headrace was imported from
                    env=worker_environment(os.environ, WorkerSpec(0, CPU_POOL, "cpu"), 1),
                    pass_fds=(theirs.fileno(), lifeline_read),
                )
            finally:
                theirs.close()
                os.close(lifeline_read)
            failing.pop_all()
        member = _Member(process, ours, wire.Outgoing(ours), lifeline_write)
        self._members[ours.fileno()] = member
        self._poll.register(ours.fileno(), select.EPOLLIN)
        # What code of a notebook says is known to this process alone.
        typed = {name: entry for name, entry in linecache.cache.items() if len(entry) == 4 and entry[1] is None}
        self._send(member, (os.getcwd(), list(sys.path), self._memory_bytes, typed))

    def _hand_out(self, member: _Member, waiting: deque[tuple[int, Job]]) -> Iterator[Outcome]:
        import cloudpickle

        while waiting and len(member.has) < AHEAD:
            number, job = waiting.popleft()
            try:
                payload = cloudpickle.dumps(job)
            except Exception:  # it can be run here
                yield Outcome(number, ended=False)
                continue
            member.has.append(number)
            self._send(member, (number, payload))

    def _send(self, member: _Member, message: tuple[Any, ...]) -> None:
        try:
            sent = member.outgoing.send(wire.frame(message))
        except OSError:
            return  # it died, and its socket tells
        if not sent:
            self._poll.modify(member.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, member: _Member) -> None:
        try:
            done = member.outgoing.flush()
        except OSError:
            return
        if done:
            self._poll.modify(member.socket.fileno(), select.EPOLLIN)

    def _hear(self, member: _Member, waiting: deque[tuple[int, Job]]) -> Iterator[Outcome]:
        try:
            data = member.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            yield from self._lost(member, waiting)
            return
        for (outcome,) in member.reader.feed(data):
            member.has.remove(outcome.job)
            yield outcome

    def _lost(self, member: _Member, waiting: deque[tuple[int, Job]]) -> Iterator[Outcome]:
        """What it was at is not ended; what it had not begun is not ended, too: whoever runs it alone need not know which."""
        self._remove(member)
        yield from (Outcome(number, ended=False) for number in member.has)
        if waiting:
            self._start()

    def _remove(self, member: _Member) -> None:
        del self._members[member.socket.fileno()]
        self._poll.unregister(member.socket.fileno())
        member.socket.close()
        os.close(member.lifeline)
        with contextlib.suppress(ProcessLookupError):
            member.process.send_signal(signal.SIGKILL)
        member.process.wait()
