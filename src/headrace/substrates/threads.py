"""Workers as threads of this process. Blocks are record batches handed on as they are: nothing is copied.

Right when the code releases the GIL (pyarrow, image decoders, torch, NumPy) and on free-threaded Python.
Each worker has an inbox; all answer into one outbox, on which `wait` blocks; first, while all workers have enough to do, it
sleeps for a moment in which answers gather. Bodies are constructed one at a time, because two threads that import the same
package for the first time at once can see it half initialised.

A thread cannot be killed: `stop` waits `STOP_WAIT_S` for calls of user code that are under way, and no other begins. A
thread that is still busy then is left behind; it is a daemon, answers nobody, and ends after its call or with the process.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from msgspec import Struct

from headrace.core.frames import with_room
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.steps import Discard, PartsFreed, Step, StepDone, StepFailed, SubstrateEvent, WorkerLost, WorkerUp
from headrace.substrates.blocks import anonymous_bytes
from headrace.substrates.bodies import (
    BodyFactory,
    begins,
    default_body,
    describe_exception,
    let_answers_gather,
    run_guarded,
    usable_cores,
    warm,
)
from headrace.substrates.inline import LocalStore, fetch_local
from headrace.substrates.spill import LocalSpill
from headrace.worker.tried import Tried
from headrace.worker.watch import Halt

STOP_WAIT_S = 30.0  # a step is about a second (Advance.credit_s); a model's batch may take many


class ThreadsSubstrate:
    """One thread per worker. cores: what their native thread pools share, None for all usable ones."""

    name = "threads"

    def __init__(self, *, body_factory: BodyFactory | None = None, cores: int | None = None) -> None:
        self._factory = body_factory or default_body
        self._cores = cores or usable_cores()
        self._program: Any = None
        self._threads: dict[int, _Worker] = {}
        self._next_id = itertools.count(1).__next__
        self._outbox: queue.SimpleQueue[SubstrateEvent | None] = queue.SimpleQueue()  # None: a wake
        self._construction = threading.Lock()
        self._limits: NativeLimits | None = None
        self._spill = LocalSpill()
        self.spill_dir: str | None = None  # where spilled parts go; None: a temporary directory
        self._stopped = False

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        self._program = program
        busy = sum(1 for w in workers if w.pool == CPU_POOL) or len(workers) or 1
        if busy > 1:
            self._limits = NativeLimits(max(1, self._cores // busy))
            self._limits.apply()
        first = next((w.id for w in workers if w.pool == CPU_POOL), None)
        for spec in workers:
            self._add(spec, warms=spec.pool == CPU_POOL and spec.id != first)

    def add_worker(self, worker: WorkerSpec) -> None:
        self._add(worker, warms=False)

    def _add(self, worker: WorkerSpec, *, warms: bool) -> None:
        """warms: it comes up when its models are loaded, in turn with others; meanwhile those that are up do the work."""
        thread = _Worker(
            worker,
            lambda store: self._factory(self._program, worker, store),
            LocalStore(worker.id, self._next_id, halt := Halt()),
            self._outbox,
            self._construction,
            self._limits,
            warms,
            halt,
        )
        self._threads[worker.id] = thread
        thread.start(getattr(self._program, "tried", None) if worker.pool == CPU_POOL else None)

    def submit(self, step: Step | Discard) -> None:
        if self._stopped:
            return
        thread = self._threads[step.worker]
        thread.inbox.put(step)
        if not isinstance(step, Discard):
            thread.steps += 1

    def release(self, parts: Sequence[PartRef]) -> None:
        self._spill.collect()
        if parts:
            self._outbox.put(PartsFreed(tuple(p.id for p in parts)))

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        if self._stopped:
            return []
        let_answers_gather((t.steps for t in self._threads.values() if t.up), timeout_s)
        events: list[SubstrateEvent] = []
        with contextlib.suppress(queue.Empty):
            event = self._outbox.get(timeout=timeout_s)
            while True:
                if event is not None:
                    events.append(event)
                event = self._outbox.get_nowait()
        for event in events:
            if isinstance(event, StepDone | StepFailed):
                self._threads[event.worker].steps -= 1
        return events

    def wake(self) -> None:
        self._outbox.put(None)

    def fetch(self, block: BlockRef) -> pa.RecordBatch:
        return fetch_local(block)

    def kill(self, worker: int, reason: str) -> bool:
        """A thread can't be killed."""
        return False

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        return self._spill.spill(parts, self.spill_dir)

    def memory_bytes(self) -> int:
        return anonymous_bytes()

    def stop(self) -> list[WorkerLost]:
        if self._stopped:
            return []
        self._stopped = True
        for thread in self._threads.values():
            thread.finish()
        deadline = time.monotonic() + STOP_WAIT_S
        try:
            for thread in self._threads.values():
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C cuts the waiting short
            self._threads.clear()
            outbox, self._outbox = self._outbox, queue.SimpleQueue()
            self._program = None
            self._spill.close()
            if self._limits is not None:
                self._limits.restore()
                self._limits = None
        untold = [outbox.get() for _ in range(outbox.qsize())]
        return [event for event in untold if isinstance(event, WorkerLost)]


class _Ready(Struct, frozen=True):
    """A step that was begun need not be waited for any more."""

    step: Step


class _Worker:
    """A thread that makes its body, says WorkerUp, then answers its inbox until `finish`."""

    def __init__(
        self,
        spec: WorkerSpec,
        make_body: Callable[[LocalStore], Any],
        store: LocalStore,
        outbox: queue.SimpleQueue[SubstrateEvent | None],
        construction: threading.Lock,
        limits: NativeLimits | None,
        warms: bool,
        halt: Halt,
    ) -> None:
        self.inbox: queue.SimpleQueue[Step | Discard | _Ready | None] = queue.SimpleQueue()
        self.steps = 0  # submitted, and their answers not taken up
        self._spec = spec
        self._make_body = make_body
        self._store = store
        self._outbox = outbox
        self._construction = construction
        self._limits = limits
        self._warms = warms
        self._halt = halt
        self._finishing = False
        self.up = False
        self._thread: threading.Thread | None = None

    def start(self, tried: Tried | None) -> None:
        """tried: goes on in its thread, if it has one."""
        name = f"headrace-{self._spec.pool}-{self._spec.id}"
        found = None if tried is None else tried.go_on(self._run, name)
        self._thread = found or threading.Thread(target=with_room, args=(self._run,), name=name, daemon=True)
        if found is None:
            self._thread.start()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def finish(self) -> None:
        """Let the call of user code that is under way end; what is behind it is dropped."""
        self._finishing = self._halt.over = True
        self.inbox.put(None)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as exc:  # also SystemExit from a constructor: the driver must hear of a lost worker
            if not self._finishing:
                reason = f"its thread ended: {describe_exception(exc)}"
                self._outbox.put(WorkerLost(self._spec.id, reason, started=self.up, pool=self._spec.pool))

    def _serve(self) -> None:
        if self._limits is not None:
            self._limits.apply_to_thread()
        with self._construction:
            body = self._make_body(self._store)
        if self._warms:
            warm(body, lambda: self._finishing)
        self.up = True
        self._outbox.put(WorkerUp(self._spec.id, self._spec.pool))
        try:
            while (step := self.inbox.get()) is not None and not self._finishing:
                if isinstance(step, Discard):
                    body.discard(step.cursor)
                elif isinstance(step, _Ready):
                    self._outbox.put(run_guarded(body, step.step))
                elif not begins(body, step, lambda step=step: self.inbox.put(_Ready(step))):
                    self._outbox.put(run_guarded(body, step))
                del step  # its inputs must not outlive the step while the thread is idle
        finally:
            body.close()


class NativeLimits:
    """Keeps the thread pools of native libraries at `threads` each while several workers use them at once.

    Touches only libraries that are loaded already: importing one here would cost a run its start-up. (threadpoolctl is small,
    and NumPy's BLAS always there.) `restore` brings back what was there. OpenMP keeps its limit per thread, so each worker
    thread sets it for itself.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._undo: list[Callable[[], Any]] = []
        self._pools: Any = None

    def apply(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "set_num_threads"):
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            self._undo.append(lambda: torch.set_num_threads(before))
        cv2 = sys.modules.get("cv2")
        if cv2 is not None and hasattr(cv2, "setNumThreads"):
            threads_before = cv2.getNumThreads()
            cv2.setNumThreads(self._threads)
            self._undo.append(lambda: cv2.setNumThreads(threads_before))
        try:
            from threadpoolctl import ThreadpoolController  # 5 ms; NumPy's own BLAS has no other switch
        except ImportError:
            return
        self._pools = ThreadpoolController()
        self._undo.append(self._pools.limit(limits=self._threads).restore_original_limits)

    def apply_to_thread(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "set_num_threads"):  # a thread that has used it keeps the number from then
            torch.set_num_threads(self._threads)
        if self._pools is not None:
            self._pools.select(user_api="openmp").limit(limits=self._threads)

    def restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._pools = None
