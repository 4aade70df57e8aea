"""The driver's side of the processes substrate: starts workers, carries steps, keeps account of blocks.

One thread, no helpers, no ticks: `wait` sleeps in epoll on the workers' sockets, their pidfds and an eventfd.
Steps go out as small pickles; block bytes stay in arenas, and pass through here only when `fetch` copies them.

Invariants: a part's range goes back to its owner when the run has released the part and no worker holds a lease of it
(see `store`), never before; a dead worker holds no leases, and its blocks stay readable; `stop` leaves no process,
descriptor or memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InternalError, PlanError
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
from headrace.substrates.bodies import usable_cores
from headrace.substrates.processes import wire
from headrace.substrates.processes.spawn import death_reason, oom_kills, start_process

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.substrates.bodies import BodyFactory
    from headrace.substrates.processes.arena import Mapping

FREE_NOTICE_BYTES = 64 << 20  # a worker that gets no step is told when this much of its arena is free again
STOP_IDLE_S = 10.0  # to close cursors and models
STOP_BUSY_S = 0.5  # a running step is not waited for; its output was never published


class ProcessesSubstrate:
    """One process per worker, on this machine. Linux only.

    cores: what the workers' native thread pools share, None for all usable ones. arena_bytes: addresses of an arena.
    """

    name = "processes"

    def __init__(
        self, *, body_factory: BodyFactory | None = None, cores: int | None = None, arena_bytes: int | None = None
    ) -> None:
        if sys.platform != "linux":
            raise PlanError(
                f"engine='processes' needs Linux, and this is {sys.platform}", hint="use engine='threads', or leave it out"
            )
        self._factory = body_factory
        self._cores = cores or usable_cores()
        self._arena_bytes = arena_bytes
        self._threads = 1
        self._payload = b""
        self._workers: dict[int, _Worker] = {}
        self._by_fd: dict[int, _Worker] = {}
        self._parts: dict[int, _Part] = {}
        self._arenas: dict[int, int] = {}  # worker -> descriptor; kept until the end, also of the dead
        self._mappings: dict[int, Mapping] = {}  # arenas that `fetch` has read
        self._events: list[SubstrateEvent] = []
        self._freed: list[int] = []
        self._epoll = select.epoll()
        self._wake_lock = threading.RLock()  # re-entrant: a signal handler may call wake inside wake
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._oom_kills = oom_kills()
        self._stopped = False

    # -- the contract

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        from headrace.substrates.processes.arena import arena_bytes

        cpu_workers = sum(1 for w in workers if w.pool == CPU_POOL)
        self._threads = max(1, self._cores // max(1, cpu_workers or len(workers)))
        self._arena_bytes = self._arena_bytes or arena_bytes(len(workers))
        started = [self._launch(spec) for spec in workers]
        self._payload = self._pickle(program)  # while the interpreters start
        for worker in started:
            self._greet(worker)

    def add_worker(self, worker: WorkerSpec) -> None:
        self._greet(self._launch(worker))

    def submit(self, step: Step | Discard) -> None:
        worker = self._workers.get(step.worker)
        if worker is None:
            return  # it died; WorkerLost has told, or will
        freed = worker.take_freed()
        if isinstance(step, Discard):
            self._send(worker, (wire.DISCARD, freed, step.cursor))
            return
        self._lease_inputs(worker, step)
        worker.steps += 1
        self._send(worker, (wire.STEP, freed, step))

    def release(self, parts: Sequence[PartRef]) -> None:
        for ref in parts:
            part = self._parts.get(ref.id)
            if part is not None:
                part.released = True
                if not part.leases:
                    self._free(ref.id, part)

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        if self._stopped:
            return []
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = self._epoll.poll(0 if self._events or self._freed else left)
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

        return zip_parts([(part.columns, self._copy(part)) for part in block.parts], block.rows)

    def memory_bytes(self) -> int:
        from headrace.substrates.blocks import anonymous_bytes
        from headrace.substrates.processes.arena import touched_bytes

        shared = sum(touched_bytes(fd) for fd in self._arenas.values())
        return shared + anonymous_bytes() + sum(anonymous_bytes(w.process.pid) for w in self._workers.values())

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._end_workers()
        for worker in list(self._workers.values()):
            self._forget(worker)
            worker.process.wait()
        for mapping in self._mappings.values():
            mapping.close()
        for fd in self._arenas.values():
            os.close(fd)
        self._mappings.clear()
        self._arenas.clear()
        self._parts.clear()
        self._events.clear()
        self._freed.clear()
        self._payload = b""
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._epoll.close()

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

    def _launch(self, spec: WorkerSpec) -> _Worker:
        from headrace.substrates.processes.arena import arena_bytes, create_arena

        self._arenas[spec.id] = create_arena(spec.id, self._arena_bytes or arena_bytes(1))
        process, sock, lifeline = start_process(spec, self._threads)
        worker = _Worker(spec, process, sock, lifeline)
        self._workers[spec.id] = worker
        self._by_fd[sock.fileno()] = worker
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        if worker.pidfd >= 0:
            self._by_fd[worker.pidfd] = worker
            self._epoll.register(worker.pidfd, select.EPOLLIN)
        return worker

    def _greet(self, worker: _Worker) -> None:
        spec = worker.spec
        if spec.device.startswith("cuda:"):  # its environment shows it one device only, which is then the first
            spec = replace(spec, device="cuda:0")
        hello = (wire.HELLO, spec, os.getpid(), os.getcwd(), list(sys.path), self._payload)
        self._send(worker, hello, (self._arenas[spec.id],))

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
                self._register(event)
            self._events.append(event)
            self._return_leases(worker, message[2])
        elif kind == wire.VIEWS:
            self._return_leases(worker, message[1])
        elif kind == wire.UP:
            worker.up = True
            self._events.append(WorkerUp(worker.spec.id, worker.spec.pool))
        elif kind == wire.BROKEN:
            worker.broken = message[1]

    def _take_events(self) -> list[SubstrateEvent]:
        events, self._events = self._events, []
        if self._freed:
            events.append(PartsFreed(tuple(self._freed)))
            self._freed.clear()
        return events

    # -- blocks

    def _register(self, answer: StepDone) -> None:
        parts = self._parts
        for block in answer.outputs:
            for ref in block.parts:
                if ref.id not in parts and ref.owner == answer.worker:
                    parts[ref.id] = _Part(ref.owner, ref.handle[1], ref.handle[2])

    def _lease_inputs(self, worker: _Worker, step: Step) -> None:
        me = worker.spec.id
        unknown: list[int] = []
        for block in step.inputs:
            for ref in block.parts:
                part = self._parts.get(ref.id)
                if part is None:
                    raise InternalError(f"step {step.id} names part {ref.id}, whose memory is free already")
                part.leases[me] = part.leases.get(me, 0) + 1
                if ref.owner not in worker.arenas:
                    worker.arenas.add(ref.owner)
                    unknown.append(ref.owner)
        for i in range(0, len(unknown), wire.MAX_FDS):
            ids = unknown[i : i + wire.MAX_FDS]
            self._send(worker, (wire.ARENAS, ids), tuple(self._arenas[a] for a in ids))

    def _return_leases(self, worker: _Worker, views: Sequence[tuple[int, int]]) -> None:
        me = worker.spec.id
        for part_id, count in views:
            part = self._parts[part_id]
            part.leases[me] -= count
            if not part.leases[me]:
                del part.leases[me]
                if part.released and not part.leases:
                    self._free(part_id, part)

    def _free(self, part_id: int, part: _Part) -> None:
        del self._parts[part_id]
        self._freed.append(part_id)
        owner = self._workers.get(part.owner)
        if owner is None:
            from headrace.substrates.processes.arena import punch

            punch(self._arenas[part.owner], part.offset, part.offset + part.length)
            return
        owner.freed.append(part.offset)
        owner.freed_bytes += part.length
        if owner.freed_bytes >= FREE_NOTICE_BYTES:
            self._send(owner, (wire.FREE, owner.take_freed()))

    def _copy(self, ref: PartRef) -> pa.RecordBatch:
        """The part in new memory."""
        import numpy as np
        import pyarrow as pa

        from headrace.substrates.blocks import decode
        from headrace.substrates.processes.arena import Mapping

        arena, offset, length = ref.handle
        mapping = self._mappings.get(arena)
        if mapping is None:
            mapping = self._mappings[arena] = Mapping(os.dup(self._arenas[arena]), writable=False)
        copy = pa.allocate_buffer(length)
        np.frombuffer(copy, np.uint8)[:] = mapping.view(offset, length)
        return decode(copy)

    # -- endings

    def _lose(self, worker: _Worker) -> None:
        """A worker is gone, or has closed its channel and can never answer again."""
        self._read_rest(worker)
        self._forget(worker)
        worker.process.kill()  # no effect on a dead one, nor on the exit code of one that is exiting
        code = worker.process.wait()
        reason = worker.broken and f"it could not start: {worker.broken}"
        self._events.append(WorkerLost(worker.spec.id, reason or death_reason(code, self._oom_kills)))
        me = worker.spec.id
        for part_id, part in list(self._parts.items()):
            if part.leases.pop(me, 0) and part.released and not part.leases:
                self._free(part_id, part)
        self._reclaim(me)

    def _read_rest(self, worker: _Worker) -> None:
        """What it answered before it died counts."""
        with contextlib.suppress(OSError):
            while data := worker.sock.recv(256 << 10):
                for message in worker.reader.feed(data):
                    self._take(worker, message)

    def _reclaim(self, dead: int) -> None:
        """Give back all memory of a dead worker's arena that holds no known part: nobody else will."""
        from headrace.substrates.processes.arena import punch

        fd, start = self._arenas[dead], 0
        for part in sorted((p for p in self._parts.values() if p.owner == dead), key=lambda p: p.offset):
            punch(fd, start, part.offset)
            start = part.offset + part.length
        punch(fd, start, os.fstat(fd).st_size)

    def _forget(self, worker: _Worker) -> None:
        """Close everything that belongs to the worker except its arena."""
        del self._workers[worker.spec.id]
        for fd in (worker.sock.fileno(), worker.pidfd):
            if fd >= 0:
                self._epoll.unregister(fd)
                del self._by_fd[fd]
        worker.sock.close()
        os.close(worker.lifeline)
        if worker.pidfd >= 0:
            os.close(worker.pidfd)

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

    def __init__(self, spec: WorkerSpec, process: subprocess.Popen[bytes], sock: socket.socket, lifeline: int) -> None:
        self.spec = spec
        self.process = process
        self.sock = sock
        self.lifeline = lifeline  # open as long as the driver lives: see main._die_with_driver
        self.out = wire.Outgoing(sock)
        self.reader = wire.FrameReader()
        self.up = False
        self.broken = ""
        self.steps = 0  # submitted and not answered
        self.arenas = {spec.id}  # whose descriptors it has
        self.freed: list[int] = []  # offsets in its arena, to be told with the next message
        self.freed_bytes = 0
        try:
            self.pidfd = os.pidfd_open(process.pid)
        except OSError:  # a kernel or sandbox without pidfd: the closed socket tells of its death
            self.pidfd = -1

    def take_freed(self) -> tuple[int, ...]:
        freed = tuple(self.freed)
        self.freed.clear()
        self.freed_bytes = 0
        return freed


class _Part:
    """A part in some arena. leases: worker -> how often it was sent there and not given back."""

    __slots__ = ("leases", "length", "offset", "owner", "released")

    def __init__(self, owner: int, offset: int, length: int) -> None:
        self.owner = owner
        self.offset = offset
        self.length = length
        self.released = False
        self.leases: dict[int, int] = {}


def _wait_exit(worker: _Worker, timeout_s: float) -> None:
    """Wait for the process to end, without the polling of Popen.wait(timeout)."""
    if worker.pidfd >= 0:
        poll = select.poll()
        poll.register(worker.pidfd, select.POLLIN)
        if poll.poll(timeout_s * 1000):
            worker.process.wait()
    else:
        worker.process.wait(timeout_s)
