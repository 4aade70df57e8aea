"""Everything in the caller's own thread: for `pdb`, for tiny inputs, and as the plainest of all substrates.

`wait` runs one queued step and returns its answer, so a breakpoint in user code stops in the caller's terminal. Only models
that are asynchronous streams go on beside that, in their event loop's thread.
Blocks are record batches handed on as they are. Here too lives `LocalStore`, the block store of every substrate
whose workers share one address space.
"""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from headrace.contracts.substrate import Crumb
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Discard, PartsFreed, Step, SubstrateEvent, WorkerUp
from headrace.substrates.blocks import anonymous_bytes, own_copy, zip_parts
from headrace.substrates.bodies import Body, BodyFactory, begins, default_body, run_guarded
from headrace.substrates.spill import LocalSpill, SpilledBatch


class LocalStore:
    """Block memory shared by all workers of one process: a part's handle is the batch itself, or where it is on disk.

    A part is "freed" as soon as the run releases it: what views still hold of it is ordinary memory of this process,
    counted where all of that is.
    """

    def __init__(self, owner: int, next_id: Callable[[], int], crumb: Crumb | None = None) -> None:
        """crumb: None where there is no need of one; whoever would read it dies with the worker."""
        self.crumb = crumb
        self._owner = owner
        self._next_id = next_id

    def put(self, batch: pa.RecordBatch) -> PartRef:
        return PartRef(self._next_id(), self._owner, batch.nbytes, tuple(batch.schema.names), batch)

    def get(self, part: PartRef) -> pa.RecordBatch:
        return local_batch(part)


def local_batch(part: PartRef) -> pa.RecordBatch:
    """A local part's batch, zero-copy."""
    handle = part.handle
    return handle.read() if isinstance(handle, SpilledBatch) else handle


def fetch_local(block: BlockRef) -> pa.RecordBatch:
    """A block of local parts, copied: user code elsewhere may still hold writable views of the original."""
    return own_copy(zip_parts(tuple((p.columns, local_batch(p)) for p in block.parts), block.rows))


class InlineSubstrate:
    """Steps run one after the other, in the order of `submit`, inside `wait`."""

    name = "inline"

    def __init__(self, *, body_factory: BodyFactory | None = None) -> None:
        self._factory = body_factory or default_body
        self._program: Any = None
        self._bodies: dict[int, Body] = {}
        self._next_id = itertools.count(1).__next__
        self._events: deque[SubstrateEvent] = deque()
        self._steps: deque[Step | Discard] = deque()
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put() is safe in a signal handler
        self._ready: deque[Step] = deque()  # steps that were begun and need not be waited for; filled from any thread
        self._spill = LocalSpill()
        self.spill_dir: str | None = None  # where spilled parts go; None: a temporary directory
        self._stopped = False

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        self._program = program
        for spec in workers:
            self.add_worker(spec)

    def add_worker(self, worker: WorkerSpec) -> None:
        self._bodies[worker.id] = self._factory(self._program, worker, LocalStore(worker.id, self._next_id))
        self._events.append(WorkerUp(worker.id, worker.pool))

    def submit(self, step: Step | Discard) -> None:
        if self._stopped:
            return
        self._steps.append(step)

    def release(self, parts: Sequence[PartRef]) -> None:
        self._spill.collect()
        if parts:
            self._events.append(PartsFreed(tuple(p.id for p in parts)))

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        if self._events or self._stopped:
            return self._take_events()
        if not self._wakes.empty():
            self._drain_wakes()
            return []
        while self._ready or self._steps:
            if self._ready:
                step = self._ready.popleft()
                return [run_guarded(self._bodies[step.worker], step, interruptible=True)]
            step = self._steps.popleft()
            body = self._bodies[step.worker]
            if isinstance(step, Discard):
                body.discard(step.cursor)
                continue
            if not begins(body, step, lambda step=step: self._is_ready(step)):
                return [run_guarded(body, step, interruptible=True)]
        try:
            self._wakes.get(timeout=timeout_s)  # nothing to run: only another thread can change that
        except queue.Empty:
            return []
        self._drain_wakes()
        return self._take_events()

    def wake(self) -> None:
        self._wakes.put(None)

    def fetch(self, block: BlockRef) -> pa.RecordBatch:
        return fetch_local(block)

    def kill(self, worker: int, reason: str) -> bool:
        """The worker is the caller."""
        return False

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        return self._spill.spill(parts, self.spill_dir)

    def memory_bytes(self) -> int:
        return anonymous_bytes()

    def stop(self) -> tuple[()]:
        if self._stopped:
            return ()
        self._stopped = True
        self._steps.clear()
        self._events.clear()
        self._ready.clear()
        bodies, self._bodies, self._program = self._bodies, {}, None
        try:
            for body in bodies.values():
                body.close()
        finally:
            self._spill.close()
        return ()

    def _is_ready(self, step: Step) -> None:
        self._ready.append(step)
        self.wake()

    def _take_events(self) -> list[SubstrateEvent]:
        events = list(self._events)
        self._events.clear()
        return events

    def _drain_wakes(self) -> None:
        while not self._wakes.empty():
            self._wakes.get_nowait()
