"""Bugs to plant where the scheduler, the driver and the committer meet: what only whole drivers (`scheduled`) can catch.

As `bugs`: `plant(name)` is a context in which the production code has the bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from headrace.commit.records import Settled
from headrace.core.steps import Advance
from headrace.runtime import committer as committing
from headrace.runtime.committer import Committer, SplitStates
from headrace.runtime.driver import Driver
from headrace.scheduler.dispatch import Dispatcher
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import Settle
from headrace.scheduler.state import CursorState, SplitState

SCHEDULED_BUGS: dict[str, Callable[[], Any]] = {}


def bug(plant: Callable[[], Any]) -> Callable[[], Any]:
    SCHEDULED_BUGS[plant.__name__] = plant
    return plant


@contextmanager
def plant_scheduled(name: str) -> Iterator[None]:
    with SCHEDULED_BUGS[name]():
        yield


@contextmanager
def _both(a: Any, b: Any) -> Iterator[None]:
    with a, b:
        yield


@bug
def retry_not_told_to_the_committer() -> Any:
    """Metrics of the attempts before are the split's."""

    def retry(self: SplitStates, split: int, attempt: int) -> None:
        self._open[split] = (attempt, self._open.get(split, (0, {}))[1])

    return patch.object(SplitStates, "retry", retry)


@bug
def late_answers_counted() -> Any:
    """The driver and the committer take what a step of an earlier attempt tells for the present one's."""
    real = SplitStates.add

    def add(self: SplitStates, split: int, attempt: int, states: Any) -> None:
        real(self, split, self._open.get(split, (attempt, {}))[0], states)

    counts = patch.object(Driver, "_counts", lambda self, split, _: self._open.get(split))
    return _both(counts, patch.object(SplitStates, "add", add))


@bug
def late_answers_taken_in() -> Any:
    """The scheduler takes rows and files of a cancelled step for those of the split's present attempt."""
    real = Scheduler._on_done

    def on_done(self: Scheduler, event: Any) -> None:
        entry = self.steps.get(event.step)
        late = entry is not None and self._is_cancelled(event.step)
        real(self, event)
        if entry is not None and late and isinstance(entry[0], Advance):
            split = self.open.get(entry[0].split_index)
            if split is not None:
                split.tally += event.tally
                split.aside.extend(event.aside)

    return patch.object(Scheduler, "_on_done", on_done)


@bug
def tally_kept_at_retry() -> Any:
    """The new attempt goes on counting where the one before ended."""
    real = SplitState.__init__

    def init(self: SplitState, split: Any, route: Any, following: Any, before: Any = None) -> None:
        real(self, split, route, following, before)
        if before is not None:
            self.tally = before.tally

    return patch.object(SplitState, "__init__", init)


@bug
def aside_of_the_attempt_before_kept() -> Any:
    real = SplitState.__init__

    def init(self: SplitState, split: Any, route: Any, following: Any, before: Any = None) -> None:
        real(self, split, route, following, before)
        if before is not None:
            self.aside.extend(before.aside)

    return patch.object(SplitState, "__init__", init)


@bug
def aside_lost_after_a_retry() -> Any:
    """Only the first attempt's bad rows are logged."""
    real = committing.settled_record

    def settled_record(run: str, done: Settle) -> Settled:
        return real(run, replace(done, aside=()) if done.attempt > 1 else done)

    return patch.object(committing, "settled_record", settled_record)


@bug
def aside_of_models_lost() -> Any:
    """What a model's step sets aside for one of its owners is counted and not kept."""
    real = Scheduler._applied

    def applied(self: Scheduler, step: Any, nodes: Any, event: Any) -> None:
        real(self, step, nodes, replace(event, shares=tuple(replace(s, aside=()) for s in event.shares)))

    return patch.object(Scheduler, "_applied", applied)


@bug
def cancelled_splits_settled() -> Any:
    """What lies behind a limit is logged as done."""
    real = Committer.settle

    def settle(self: Committer, done: Settle) -> None:
        real(self, replace(done, cancelled=False))

    return patch.object(Committer, "settle", settle)


@bug
def limit_published_out_of_order() -> Any:
    return patch.object(Dispatcher, "_may_end", lambda self, cursor: True)


@bug
def settled_turns_ignored() -> Any:
    """What earlier sessions let through a limit does not count."""
    real = Scheduler._skip_turn
    return patch.object(Scheduler, "_skip_turn", lambda self, index, passed: real(self, index, {}))


@bug
def taken_not_logged() -> Any:
    real = committing.settled_record

    def settled_record(run: str, done: Settle) -> Settled:
        return replace(real(run, done), taken=())

    return patch.object(committing, "settled_record", settled_record)


@bug
def settled_splits_listed_as_new() -> Any:
    """`SplitsListed.settled` names them, and they are given out all the same."""
    real = Committer.admit

    def admit(self: Committer, splits: Any, done: bool, more: Any = ()) -> Any:
        return replace(real(self, splits, done, more), splits=splits)

    return patch.object(Committer, "admit", admit)


@bug
def passed_not_given_back_at_retry() -> Any:
    """A limit goes on counting the rows of an attempt that came to nothing."""
    real = Scheduler._retry

    def retry(self: Scheduler, split: SplitState, why: str, crash: Any) -> None:
        before = dict(self.passed)
        real(self, split, why, crash)
        self.passed.update(before)

    return patch.object(Scheduler, "_retry", retry)


@bug
def turn_given_twice() -> Any:
    """A split that had its turn at a limit takes from what is left when it comes again."""
    real = Dispatcher._limit_left

    def limit_left(self: Dispatcher, stage: Any, split: SplitState) -> int | None:
        granted, split.granted = split.granted, {}
        try:
            return real(self, stage, split)
        finally:
            split.granted = granted

    return patch.object(Dispatcher, "_limit_left", limit_left)


@bug
def bad_rows_of_lost_attempts_counted() -> Any:
    """max_bad_rows is reached by rows that fail again in every attempt."""
    real = Scheduler._retry

    def retry(self: Scheduler, split: SplitState, why: str, crash: Any) -> None:
        before = self.bad
        real(self, split, why, crash)
        self.bad = before

    return patch.object(Scheduler, "_retry", retry)


@bug
def lost_worker_s_splits_go_on() -> Any:
    """A death costs only the step at work: cursors that lived in that worker begin again where they were."""
    real = Scheduler._bury

    def bury(self: Scheduler, state: Any, lost: Any) -> None:
        for cursor in list(state.cursors.values()):
            if cursor.state is CursorState.IDLE:
                cursor.worker = None
                cursor.started = False
                del state.cursors[cursor.id]
        real(self, state, lost)

    return patch.object(Scheduler, "_bury", bury)


@bug
def drained_taken_for_finished() -> Any:
    """A drained driver says that the run is finished."""
    real = Driver._carry

    def carry(self: Driver, *args: Any) -> None:
        real(self, *args)
        self.drained = False

    return patch.object(Driver, "_carry", carry)


@bug
def summary_before_the_flush() -> Any:
    """The driver ends without waiting for the committer, and its metrics are what is logged by then."""
    return patch.object(Driver, "_flush", lambda self: None)
