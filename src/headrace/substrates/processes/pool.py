"""The driver's side of the processes substrate: starts workers, carries steps, keeps account of blocks.

One thread, no helpers, no ticks: `wait` sleeps in epoll on the workers' sockets, their pidfds and an eventfd; first, while all
workers have enough to do, for a moment in which answers gather.
Steps go out as small pickles; block bytes stay in arenas, and pass through here only when `fetch` copies them.

Invariants: each worker that `start` or `add_worker` was given ends in one WorkerLost, or with `stop`; what a dead worker
answered before is told first; a lost worker leaves nothing but the arena of blocks that are still needed (see `ledger`); `stop`
leaves no process, descriptor or memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from headrace.core.errors import PlanError
from headrace.core.paths import working_directory
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.steps import (
    Discard,
    PartsFreed,
    Step,
    StepDone,
    SubstrateEvent,
    WorkerLost,
    WorkerUp,
)
from headrace.substrates.bodies import let_answers_gather, usable_cores
from headrace.substrates.processes import wire
from headrace.substrates.processes.crumb import create_crumb, read_crumb
from headrace.substrates.processes.forks import Forked, ForkServer, Process, imported, pidfd_of
from headrace.substrates.processes.ledger import Ledger
from headrace.substrates.processes.spawn import death_reason, oom_kills, start_process
from headrace.substrates.processes.stacks import crash_stack, create_report, take_stack, user_stack

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.substrates.bodies import BodyFactory

FREE_NOTICE_BYTES = 64 << 20  # a worker that gets no step is told when this much of its arena is free again
STOP_IDLE_S = 10.0  # to close cursors and models
STOP_BUSY_S = 0.5  # a running step is not waited for; its output was never published


class ProcessesSubstrate:
    """One process per worker, on this machine. Linux only.

    cores: what the workers' native thread pools share, None for all usable ones. arena_bytes: addresses of an arena. server:
    one that has been begun for this run, which is closed with it; else `start` begins one for several CPU workers.
    """

    name = "processes"

    def __init__(
        self,
        *,
        body_factory: BodyFactory | None = None,
        cores: int | None = None,
        arena_bytes: int | None = None,
        server: ForkServer | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise PlanError(
                f"engine='processes' needs Linux, and this is {sys.platform}", hint="use engine='threads', or leave it out"
            )
        self._factory = body_factory
        self._cores = cores or usable_cores()
        self._arena_bytes = arena_bytes
        self._server = server
        self._threads = 1
        self._payload = b""
        self._workers: dict[int, _Worker] = {}
        self._by_fd: dict[int, _Worker] = {}
        self._ledger = Ledger(self._tell_free, self._tell_gone)
        self._surroundings = (os.getpid(), "", list[str]())  # what workers are told of the driver's process
        self._events: list[SubstrateEvent] = []
        self._epoll = select.epoll()
        self._wake_lock = threading.RLock()  # re-entrant: a signal handler may call wake inside wake
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._oom_kills = oom_kills()  # so many of them are accounted for
        self._stopped = False

    # -- the contract

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        from headrace.substrates.processes.arena import arena_bytes

        cpu_workers = sum(1 for w in workers if w.pool == CPU_POOL)
        self._threads = max(1, self._cores // max(1, cpu_workers or len(workers)))
        self._arena_bytes = self._arena_bytes or arena_bytes(len(workers))
        self._surroundings = (os.getpid(), working_directory(), list(sys.path))
        if self._server is None and cpu_workers > 1:
            self._server = ForkServer.begin(self._threads, imported())
        own = {w.id for w in workers if self._server is None or w.pool != CPU_POOL}
        started = [self._launch(spec) for spec in workers if spec.id in own]
        self._payload = self._pickle(program)  # while the interpreters start
        started += [self._launch(spec) for spec in workers if spec.id not in own]
        if self._server is not None and not any(isinstance(w.process, Forked) for w in self._workers.values()):
            self._server.close()  # nor will it fork any later
            self._server = None
        for worker in started:
            self._greet(worker)

    def add_worker(self, worker: WorkerSpec) -> None:
        """Its id must be new in this run."""
        self._greet(self._launch(worker))

    def submit(self, step: Step | Discard) -> None:
        worker = self._workers.get(step.worker)
        if worker is None:
            return  # it died; WorkerLost has told, or will
        freed = worker.take_freed()
        if isinstance(step, Discard):
            self._send(worker, (wire.DISCARD, freed, step.cursor))
            return
        self._announce(worker, self._ledger.lease(step.worker, step))
        worker.steps += 1
        self._send(worker, (wire.STEP, freed, step))

    def release(self, parts: Sequence[PartRef]) -> None:
        self._ledger.release(parts)

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        if self._stopped:
            return []
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        let_answers_gather((w.steps for w in self._workers.values()), timeout_s)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._epoll.poll(0 if self._events or self._ledger.has_freed else left)
            woken = False
            for fd, mask in ready:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    woken = True
                elif (worker := self._by_fd.get(fd)) is not None:  # None: lost in this very round
                    self._serve(worker, fd, mask)
            events = self._take_events()
            if events or woken or (not ready and deadline is not None):
                return events

    def wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                with contextlib.suppress(BlockingIOError):  # the counter is full: wait returns anyway
                    os.eventfd_write(self._wake_fd, 1)

    def fetch(self, block: BlockRef) -> pa.RecordBatch:
        from headrace.substrates.blocks import zip_parts

        return zip_parts([(part.columns, self._ledger.copy(part)) for part in block.parts], block.rows)

    def kill(self, worker: int, reason: str) -> bool:
        """As the contract says; False too for a worker that is gone already. Takes up to half a second."""
        victim = self._workers.get(worker)
        if victim is None or victim.process.poll() is not None:
            return False
        if not victim.killed:
            victim.killed = reason
            victim.stack = take_stack(victim.process.pid, victim.report)
            victim.process.kill()  # also ends a process that is stopped
        return True

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        return self._ledger.spill(parts)

    @property
    def spill_dir(self) -> str | None:
        """Where spilled parts go, in a file without a name; None for a temporary directory that is on a disk."""
        return self._ledger.spill_dir

    @spill_dir.setter
    def spill_dir(self, directory: str | None) -> None:
        self._ledger.spill_dir = directory

    def memory_bytes(self) -> int:
        from headrace.substrates.blocks import anonymous_bytes

        own = sum(anonymous_bytes(w.process.pid) for w in self._workers.values())
        return self._ledger.memory_bytes + anonymous_bytes() + own

    def worker_memory(self) -> dict[int, int]:
        """Worker -> its anonymous memory and what its arena holds, of those alive."""
        from headrace.substrates.blocks import anonymous_bytes

        return {i: anonymous_bytes(w.process.pid) + self._ledger.arena_bytes(i) for i, w in self._workers.items()}

    def stop(self) -> list[WorkerLost]:
        if self._stopped:
            return []
        self._stopped = True
        self._end_workers()
        for worker in list(self._workers.values()):
            worker.process.wait()
            self._forget(worker)
        if self._server is not None:
            self._server.close()
        self._ledger.close()
        untold = [event for event in self._events if isinstance(event, WorkerLost)]
        self._events.clear()
        self._payload = b""
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._epoll.close()
        return untold

    @property
    def pids(self) -> dict[int, int]:
        """Worker -> process id, of those alive."""
        return {w.spec.id: w.process.pid for w in self._workers.values()}

    # -- starting

    def _pickle(self, program: Any) -> bytes:
        import cloudpickle

        try:
            return cloudpickle.dumps((program, self._factory), protocol=5)
        except Exception as exc:
            raise PlanError(
                f"this pipeline can't be sent to worker processes: {type(exc).__name__}: {exc}",
                hint="make what your functions and models refer to picklable (build it in a class's __init__, which runs "
                "in the worker), or use engine='threads'",
            ) from exc

    def _launch(self, spec: WorkerSpec) -> _Worker | None:
        """None where the system has no room for another process, which is then a lost worker."""
        from headrace.substrates.processes.arena import arena_bytes

        try:
            worker = _start(spec, self._threads, self._server)
        except OSError as exc:
            reason = f"its process could not be started: {exc}"
            self._events.append(WorkerLost(spec.id, reason, started=False, pool=spec.pool))
            return None
        self._ledger.open_arena(spec.id, self._arena_bytes or arena_bytes(1))
        self._workers[spec.id] = worker
        self._by_fd[worker.sock.fileno()] = worker
        self._epoll.register(worker.sock.fileno(), select.EPOLLIN)
        if worker.pidfd >= 0:
            self._by_fd[worker.pidfd] = worker
            self._epoll.register(worker.pidfd, select.EPOLLIN)
        return worker

    def _greet(self, worker: _Worker | None) -> None:
        if worker is None:
            return
        spec = worker.spec
        if spec.device.startswith("cuda:"):  # its environment shows it one device only, which is then the first
            spec = replace(spec, device="cuda:0")
        hello = (wire.HELLO, spec, *self._surroundings, self._payload)
        self._send(worker, hello, (self._ledger.descriptor(spec.id), worker.crumb))

    # -- sending and receiving

    def _send(self, worker: _Worker, message: tuple[Any, ...], fds: tuple[int, ...] = ()) -> None:
        try:
            if not worker.out.send(wire.frame(message), fds):
                self._epoll.modify(worker.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except (BrokenPipeError, ConnectionResetError):
            return  # it died: epoll will say so

    def _serve(self, worker: _Worker, fd: int, mask: int) -> None:
        if fd == worker.pidfd:
            self._lose(worker)
            return
        try:
            if mask & select.EPOLLOUT and worker.out.flush():
                self._epoll.modify(fd, select.EPOLLIN)
            if not mask & ~select.EPOLLOUT:
                return
            data = worker.sock.recv(256 << 10)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            data = b""
        if not data:
            self._lose(worker)
            return
        for message in worker.reader.feed(data):
            self._take(worker, message)

    def _take(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == wire.ANSWER:
            event = message[1]
            worker.steps -= 1
            if isinstance(event, StepDone):
                self._ledger.register(event)
            self._events.append(event)
            self._ledger.give_back(worker.spec.id, message[2])
        elif kind == wire.VIEWS:
            self._ledger.give_back(worker.spec.id, message[1])
        elif kind == wire.UP:
            worker.up = True
            self._events.append(WorkerUp(worker.spec.id, worker.spec.pool))
        elif kind == wire.BROKEN:
            worker.broken = message[1]

    def _take_events(self) -> list[SubstrateEvent]:
        events, self._events = self._events, []
        if self._ledger.has_freed:
            events.append(PartsFreed(self._ledger.take_freed()))
        return events

    # -- what workers must know of blocks

    def _announce(self, worker: _Worker, arenas: set[int]) -> None:
        """Send descriptors of those of the arenas that the worker does not have."""
        unknown = sorted(arenas - worker.arenas)
        worker.arenas.update(unknown)
        for i in range(0, len(unknown), wire.MAX_FDS):
            ids = unknown[i : i + wire.MAX_FDS]
            self._send(worker, (wire.ARENAS, ids), tuple(self._ledger.descriptor(a) for a in ids))

    def _tell_free(self, owner: int, offset: int, length: int) -> None:
        worker = self._workers.get(owner)
        if worker is None:  # it is being lost at this moment
            return
        worker.freed.append(offset)
        worker.freed_bytes += length
        if worker.freed_bytes >= FREE_NOTICE_BYTES:
            self._send(worker, (wire.FREE, worker.take_freed()))

    def _tell_gone(self, arena: int) -> None:
        for worker in self._workers.values():
            if arena in worker.arenas:
                worker.arenas.remove(arena)
                self._send(worker, (wire.GONE, (arena,)))

    # -- endings

    def _lose(self, worker: _Worker) -> None:
        """A worker is gone, or has closed its channel and can never answer again."""
        self._read_rest(worker)
        worker.process.kill()  # no effect on a dead one, nor on the exit code of one that is exiting
        code = worker.process.wait()
        crash = "" if worker.killed else crash_stack(code, worker.report)
        if crash:
            with contextlib.suppress(Exception):  # stderr may be closed
                print(crash, file=sys.stderr, flush=True)
        doing = read_crumb(worker.crumb)
        reason = self._reason(worker, code)
        stack = user_stack(worker.stack or crash)
        self._events.append(WorkerLost(worker.spec.id, reason, doing, stack, worker.up, worker.spec.pool))
        self._forget(worker)
        self._ledger.worker_died(worker.spec.id)

    def _reason(self, worker: _Worker, code: int) -> str:
        if worker.killed:
            return worker.killed
        if worker.broken:
            return f"it could not start: {worker.broken}"
        out_of_memory = code == -signal.SIGKILL and oom_kills() > self._oom_kills
        self._oom_kills += out_of_memory
        return death_reason(code, out_of_memory=out_of_memory)

    def _read_rest(self, worker: _Worker) -> None:
        """What it answered before it died counts."""
        with contextlib.suppress(OSError):
            while data := worker.sock.recv(256 << 10):
                for message in worker.reader.feed(data):
                    self._take(worker, message)

    def _forget(self, worker: _Worker) -> None:
        """Close everything that belongs to the worker except its arena."""
        del self._workers[worker.spec.id]
        for fd in (worker.sock.fileno(), worker.pidfd):
            if fd >= 0:
                self._epoll.unregister(fd)
                del self._by_fd[fd]
        worker.sock.close()
        for fd in (worker.lifeline, worker.crumb, worker.report, worker.pidfd):
            if fd >= 0:
                os.close(fd)

    def _end_workers(self) -> None:
        """Ask those who can listen to close, and kill the others; on return none runs."""
        for worker in self._workers.values():
            if worker.up:
                self._send(worker, (wire.STOP,))
            else:
                worker.process.kill()
        for patience, concerned in ((STOP_BUSY_S, True), (STOP_IDLE_S - STOP_BUSY_S, False)):
            deadline = time.monotonic() + patience
            for worker in self._workers.values():
                if concerned and not worker.steps:
                    continue
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _wait_exit(worker, max(0.0, deadline - time.monotonic()))
                if worker.process.returncode is None:
                    worker.process.kill()


class _Worker:
    """What the driver knows of one worker process."""

    def __init__(
        self,
        spec: WorkerSpec,
        process: Process,
        sock: socket.socket,
        lifeline: int,
        crumb: int,
        report: int,
    ) -> None:
        self.spec = spec
        self.process = process
        self.sock = sock
        self.lifeline = lifeline  # open as long as the driver lives: see main._die_with_driver
        self.crumb = crumb
        self.report = report
        self.out = wire.Outgoing(sock)
        self.reader = wire.FrameReader()
        self.up = False
        self.broken = ""
        self.killed = ""  # why, when `kill` ended it
        self.stack = ""  # taken then
        self.steps = 0  # submitted and not answered
        self.arenas = {spec.id}  # whose descriptors it has
        self.freed: list[int] = []  # offsets in its arena, to be told with the next message
        self.freed_bytes = 0
        try:
            self.pidfd = pidfd_of(process)
        except OSError:  # a kernel or sandbox without pidfd: the closed socket tells of its death
            self.pidfd = -1

    def take_freed(self) -> tuple[int, ...]:
        freed = tuple(self.freed)
        self.freed.clear()
        self.freed_bytes = 0
        return freed


def _start(spec: WorkerSpec, threads: int, server: ForkServer | None) -> _Worker:
    """Start a process. Raises OSError, and leaves nothing, when the system has no room for it."""
    with contextlib.ExitStack() as undo:
        crumb = create_crumb(spec.id)
        undo.callback(os.close, crumb)
        report = create_report(spec.id)
        undo.callback(os.close, report)
        process, sock, lifeline = start_process("headrace.substrates.processes.main", spec, threads, report, server=server)
        undo.pop_all()
    return _Worker(spec, process, sock, lifeline, crumb, report)


def _wait_exit(worker: _Worker, timeout_s: float) -> None:
    """Wait for the process to end, without the polling of Popen.wait(timeout)."""
    if worker.pidfd >= 0:
        poll = select.poll()
        poll.register(worker.pidfd, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            worker.process.wait()
    else:
        worker.process.wait(timeout_s)
