"""Driver: carries the scheduler's commands to the substrate and its events back. No decisions, no polling.

One thread runs the loop and blocks in `substrate.wait`; other threads speak to it through `post`, which wakes it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from headrace.contracts.observer import Observer
from headrace.contracts.substrate import Substrate
from headrace.core.errors import HeadraceError
from headrace.core.events import (
    MemorySampled,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitSettled,
    SplitsFound,
    StepFinished,
    StepStarted,
)
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Advance, Step, StepDone
from headrace.runtime.committer import Committer
from headrace.runtime.listing import Lister
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import (
    Command,
    ConsumerTook,
    Deliver,
    Drop,
    Event,
    Fail,
    Finish,
    ListSplits,
    Release,
    Settle,
    SplitsListed,
    Start,
    Submit,
)

MEMORY_SAMPLE_S = 0.5  # reading the resident size of a few processes costs about a millisecond


class Stopped(Exception):
    """The run was stopped from outside."""


class Driver:
    """One run. deliver: called with (block as the consumer's own record batch) in order, for plans that end in the consumer."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        substrate: Substrate,
        program: Any,
        workers: Sequence[WorkerSpec],
        splits: Any,
        committer: Committer,
        observers: Sequence[Observer],
        started: RunStarted,
        deliver: Callable[[Any], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.substrate = substrate
        self.committer = committer
        self._program = program
        self._workers = workers
        self._pools: Mapping[int, str] = {w.id: w.pool for w in workers}
        self._observers = observers
        self._started = started
        self._deliver = deliver
        self._posted: deque[Event | HeadraceError | Stopped] = deque()
        inline = substrate.name == "inline"
        self._lister = Lister(splits, self.post, inline=inline)
        self._steps: dict[int, Step] = {}
        self._found = SplitsFound(0.0, 0, 0, complete=False, rows=0)
        self._sampled_s = 0.0
        self._done = False
        self.metrics: dict[str, Any] = {}

    # ---------------------------------------------------------------- from other threads

    def post(self, event: Event | HeadraceError | Stopped) -> None:
        """Give the loop an event; safe from any thread."""
        self._posted.append(event)
        self.substrate.wake()

    def stop(self) -> None:
        """Make `run` raise Stopped soon; safe from any thread."""
        self.post(Stopped())

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, Any]:
        """Run to the end. Returns the metrics' results.

        Raises the run's error, Stopped, or KeyboardInterrupt; whatever the end, no worker and no block outlives it.
        """
        for _ in self.turns():
            pass
        return self.metrics

    def turns(self) -> Generator[None]:
        """The loop, a turn per `next`; for a caller that takes delivered blocks in between. As `run` otherwise."""
        error = "stopped"
        try:
            self._tell(self._started)
            self.substrate.start(self._program, self._workers)
            self._carry(self.scheduler.handle(Start(), self._now()))
            while not self._done:
                self._turn()
                yield
            self.metrics = self.committer.results()
            error = ""
        except HeadraceError as failure:
            error = str(failure)
            raise
        except KeyboardInterrupt:
            error = "interrupted"
            raise
        finally:
            try:
                self._lister.close()
                self._sample_memory(force=True)
            finally:  # also when an observer fails
                self.substrate.stop()
                self._close_observers(RunFinished(self._now(), self.committer.tally, error, self.metrics))

    def _close_observers(self, finished: RunFinished) -> None:
        """Tell all of the end and close them, the others too when one fails."""
        with contextlib.ExitStack() as closing:
            for observer in self._observers:
                closing.callback(observer.close)
            self._tell(finished)

    def _turn(self) -> None:
        """Wait until something happened; take it in."""
        for event in self.substrate.wait(0.0 if self._posted else None):
            if isinstance(event, StepDone):
                self._note_done(event)
            self._carry(self.scheduler.handle(event, self._now()))
        while self._posted:
            posted = self._posted.popleft()
            if isinstance(posted, HeadraceError | Stopped):
                raise posted
            if isinstance(posted, SplitsListed):
                self._note_found(posted)
            self._carry(self.scheduler.handle(posted, self._now()))
        self._sample_memory()

    def _carry(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Submit(step):
                    self._steps[step.id] = step
                    self._tell(StepStarted(self._now(), step.worker, self._pools.get(step.worker, ""), step.stage))
                    self.substrate.submit(step)
                case Release(parts):
                    self.substrate.release(parts)
                case Settle():
                    self.committer.settle(command)
                    self._tell(SplitSettled(self._now(), command.split.index, command.split.bytes, command.receipt))
                case Deliver(_, block):
                    batch = self.substrate.fetch(block)
                    if self._deliver is not None:
                        self._deliver(batch)
                case ListSplits(count):
                    self._lister.ask(count)
                case Drop(discard):
                    self.substrate.submit(discard)
                case Fail(error):
                    raise error
                case Finish():
                    self._done = True

    def took(self, blocks: int) -> None:
        """The consumer has taken delivered blocks; safe from any thread."""
        self.post(ConsumerTook(blocks))

    # ---------------------------------------------------------------- what observers hear

    def _note_done(self, event: StepDone) -> None:
        step = self._steps.pop(event.step, None)
        if step is None:
            return
        if isinstance(step, Advance):
            self.committer.add(step.split_index, event.metrics)
        made = sum(b.rows for b in event.outputs)
        size = sum(b.bytes for b in event.outputs)
        self._tell(
            StepFinished(
                self._now(),
                event.worker,
                self._pools.get(event.worker, ""),
                step.stage,
                made or event.tally.written,
                size,
                event.timing,
                event.tally,
            )
        )

    def _note_found(self, listed: SplitsListed) -> None:
        rows = [s.rows for s in listed.splits]
        known = self._found.rows is not None and None not in rows
        self._found = SplitsFound(
            self._now(),
            self._found.count + len(listed.splits),
            self._found.bytes + sum(s.bytes for s in listed.splits),
            listed.done,
            (self._found.rows or 0) + sum(r or 0 for r in rows) if known else None,
        )
        self._tell(self._found)

    def _sample_memory(self, force: bool = False) -> None:
        now = self._now()
        if self._observers and (force or now - self._sampled_s >= MEMORY_SAMPLE_S):
            self._sampled_s = now
            self._tell(MemorySampled(now, self.scheduler.in_flight, self.substrate.memory_bytes()))

    def _tell(self, event: RunEvent) -> None:
        for observer in self._observers:
            observer.on_event(event)

    @staticmethod
    def _now() -> float:
        return time.perf_counter()
