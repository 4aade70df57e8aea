"""Substrate: how workers and blocks exist. inline, threads, processes, simulated; Ray later.

A substrate owns no semantics: it starts workers that run `worker.body.WorkerBody` over a program, carries steps to them
and events back, and keeps blocks. What it must keep for Ray to fit: a PartRef's handle is opaque, no block byte passes
through the driver unless it is delivered to the consumer, and `wait` blocks on readiness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Discard, Doing, Step, SubstrateEvent, WorkerLost

if TYPE_CHECKING:
    import pyarrow as pa


class Crumb(Protocol):
    """Where a worker says what its user code is about to be given, for whoever finds it dead. Costs about a microsecond."""

    def write(self, doing: Doing) -> None:
        """Survives the death of the process; replaces what was there."""
        ...

    def clear(self) -> None:
        """No user code is at work."""
        ...


class BlockStore(Protocol):
    """A worker's view of block memory. crumb: None where a worker's death is the driver's own (threads, inline)."""

    crumb: Crumb | None

    def put(self, batch: pa.RecordBatch) -> PartRef:
        """Keep a batch where other workers can read it without a copy. Copies at most once."""
        ...

    def get(self, part: PartRef) -> pa.RecordBatch:
        """The batch, zero-copy. Its memory stays valid as long as any view of it lives."""
        ...


@runtime_checkable
class Substrate(Protocol):
    """Driven by one thread; only `wake` may be called from others (and from a signal handler)."""

    name: str

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        """Begin to start workers; each reports WorkerUp. program: worker.program.Program. Called once."""
        ...

    def add_worker(self, worker: WorkerSpec) -> None:
        """Start one more."""
        ...

    def submit(self, step: Step | Discard) -> None:
        """Queue a step at its worker; steps of a worker run one at a time, in order. Never blocks for long."""
        ...

    def release(self, parts: Sequence[PartRef]) -> None:
        """The run needs these parts no more. Their memory is reused once no view of them is left: PartsFreed tells."""
        ...

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        """Block until something happened, `wake` was called (may return []), or the timeout. No polling inside.

        While every worker has several steps before it, what happened may be told a few milliseconds late.
        """
        ...

    def wake(self) -> None:
        """Make a blocked or the next `wait` return."""
        ...

    def fetch(self, block: BlockRef) -> pa.RecordBatch:
        """A block for the consumer in the driver: the caller's own memory, valid for ever."""
        ...

    def kill(self, worker: int, reason: str) -> bool:
        """End one worker whose step hangs: WorkerLost(reason, doing, stack) follows. The stack of its threads is taken first.
        False where workers can't be killed (threads, inline).
        """
        ...

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        """Move parts that no worker reads to disk; those that were moved, with new handles. Their memory is free on return."""
        ...

    def memory_bytes(self) -> int:
        """Anonymous memory of driver and workers plus block memory in use, for display and the budget."""
        ...

    def stop(self) -> Sequence[WorkerLost]:
        """End all workers, running steps included, and free all memory. Idempotent; nothing outlives it.

        Gives what is known of workers that were lost before and that `wait` has not told of.
        """
        ...
