"""Hub: the coordinator under a lock, for consumers that wait in threads, and the run that feeds it in a thread of its own.

Invariants: one run at a time; nothing of it outlives its epoch, nor `close`. Held for consumers are the blocks that the run has
credits for, and those that the coordinator deals out of.
"""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from headrace.core.errors import HeadraceError, InternalError, PlanError
from headrace.runtime.ingest.coordinator import Answer, Begin, Coordinator, Piece, Place, Stop, Took
from headrace.runtime.signals import Stopped

PATIENCE_S = 15.0  # at a barrier, before it is said who is missing: workers that import torch take that long to come up


class EpochRun(Protocol):
    """A driver, as the hub sees it."""

    def run(self) -> object: ...

    def stop(self, why: str = "stopped") -> None: ...

    def took(self, blocks: int) -> None: ...


Deliver = Callable[[Any], None]


class Hub:
    """All n ranks of one split, in the process that runs its pipeline. Every method is safe from any thread.

    open_run: makes the run of one epoch, given what to call with each block (anything with `num_rows`), in order; called in the
    thread that will run it. What it raises is the epoch's error.
    """

    def __init__(self, ranks: int, *, equal: bool, open_run: Callable[[Deliver], EpochRun]) -> None:
        self._open_run = open_run
        self._coordinator = Coordinator(ranks, equal=equal)
        self._changed = threading.Condition()
        self._tickets = itertools.count(1)
        self._run: EpochRun | None = None
        self._stop = False
        self._threads: list[threading.Thread] = []
        self._told = 0  # the epoch for which it was said who is missing
        self._closed = False

    # ---------------------------------------------------------------- consumers

    def ticket(self) -> int:
        """A number for one consumer in one epoch."""
        return next(self._tickets)

    def join(self, ticket: int, rank: int) -> None:
        """Take the rank's seat for the next epoch, without waiting. Raises PlanError when it is taken, or the hub closed."""
        with self._changed:
            if self._closed:
                raise _closed()
            self._coordinator.join(ticket, rank)
            self._carry()

    def wait_begin(self, ticket: int, timeout_s: float | None = None) -> int:
        """Wait until the epoch begins. Its number; 0 when the consumer has left meanwhile, -1 when the time is over."""
        with self._changed:
            if timeout_s is not None and self._waits(ticket):
                self._changed.wait_for(lambda: not self._waits(ticket), timeout_s)
                if self._waits(ticket):
                    return -1
            while (place := self._coordinator.place(ticket)) is Place.WAITING and not self._closed:
                if self._told > self._coordinator.epoch:
                    self._changed.wait()
                elif not self._changed.wait(PATIENCE_S):
                    self._tell_missing()
            if self._closed:
                raise _closed()
            return self._coordinator.epoch if place is Place.READING else 0

    def _waits(self, ticket: int) -> bool:
        return self._coordinator.place(ticket) is Place.WAITING and not self._closed

    def reads(self, ticket: int) -> bool:
        """Whether the consumer is in an epoch."""
        with self._changed:
            return self._coordinator.place(ticket) is Place.READING

    def next(self, ticket: int, *, sent: bool = False) -> Piece | None:
        """The consumer's next piece; waits for it. None at the end, and once it has left. Raises the run's error. sent: see
        Coordinator.take.
        """
        with self._changed:
            while not self._closed:
                try:
                    answer = self._coordinator.take(ticket, sent=sent)
                except BaseException as error:
                    self._carry()
                    raise _fresh(error) from error.__cause__
                self._carry()
                if isinstance(answer, Piece):
                    return answer
                if answer is Answer.END:
                    return None
                self._changed.wait()
            raise _closed()  # also for one that has left: an end it must not look like

    def leave(self, ticket: int) -> None:
        """The consumer gives up its share of the epoch; again and again, if need be."""
        with self._changed:
            self._coordinator.leave(ticket)
            self._carry()

    def reached(self, ticket: int) -> None:
        """The consumer has got what was sent to it."""
        with self._changed:
            self._coordinator.reached(ticket)
            self._carry()

    def give_back(self, epoch: int, piece: Piece) -> None:
        """The piece did not reach the one that it was for."""
        with self._changed:
            self._coordinator.give_back(epoch, piece)
            self._carry()

    def held(self) -> list[Any]:
        """The blocks held for consumers; those of the run itself are in its own books."""
        with self._changed:
            return self._coordinator.held

    def close(self, timeout_s: float | None = None) -> None:
        """End the run, if there is one. Who still reads gets a PlanError. timeout_s: how long to wait for user code."""
        with self._changed:
            self._closed = self._stop = True
            if self._run is not None:
                self._run.stop("the split was closed")
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    # ---------------------------------------------------------------- the run

    def _carry(self) -> None:
        """Carry out what the coordinator wants. Under the lock."""
        for command in self._coordinator.commands():
            match command:
                case Begin():
                    if not self._closed:
                        self._begin()
                case Took(count):
                    if self._run is not None:
                        self._run.took(count)
                case Stop():
                    self._stop = True
                    if self._run is not None:
                        self._run.stop("all consumers have left")
        self._changed.notify_all()

    def _begin(self) -> None:
        self._stop = False
        self._threads = [t for t in self._threads if t.is_alive()]
        thread = threading.Thread(target=self._work, name="headrace-ingest-run", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no new threads at the end of a process
            hint = "let it wait for its workers before its script ends"
            self._coordinator.ended(PlanError(f"the process that runs the pipeline is at its end ({error})", hint=hint))
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        """The run of one epoch."""
        error: BaseException | None = None
        try:
            run = self._open_run(self._deliver)
            with self._changed:
                self._run = run
                stop = self._stop
            if not stop:
                run.run()
        except Stopped as stopped:
            if not self._stop:  # else by us, and nobody reads
                error = InternalError(f"the run of an epoch was stopped before its end: {stopped}")
        except HeadraceError as caught:
            error = caught
        except BaseException as caught:
            error = InternalError(f"the run of an epoch broke: {type(caught).__name__}: {caught}")
            error.__cause__ = caught
        with self._changed:
            self._run = None
            self._coordinator.ended(error)
            self._carry()

    def _deliver(self, block: Any) -> None:
        with self._changed:
            self._coordinator.arrived(block, block.num_rows)
            self._carry()

    def _tell_missing(self) -> None:
        """Say, once an epoch, whom it waits for."""
        self._told = self._coordinator.epoch + 1
        missing = self._coordinator.missing()
        if missing:
            ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            text = f"streaming_split: epoch {self._told} begins when all have joined; missing: rank {ranks}"
            print(f"headrace: {text}", file=sys.stderr, flush=True)


def _closed() -> PlanError:
    return PlanError("this streaming_split has been closed", hint="call streaming_split again")


def _fresh(error: BaseException) -> BaseException:
    """The error for one of several readers, each of which adds frames of its own."""
    if not isinstance(error, HeadraceError) or isinstance(error, InternalError):
        return error
    return copy.copy(error).with_traceback(None)
