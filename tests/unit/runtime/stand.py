"""A driver on a stand: a scheduler that answers by a script, a substrate whose events and clock the test makes, a committer
that remembers what it was told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.events import RunEvent, RunFinished, RunStarted
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.splits import Split
from headrace.core.steps import Advance, Discard, Step, SubstrateEvent, WorkerLost
from headrace.runtime.driver import Driver
from headrace.runtime.governor import Governor
from headrace.scheduler.messages import Command, Event, Settle, SplitsListed

SPLIT = Split(0, (), 100)


def advance(id: int, *, worker: int = 0, attempt: int = 1, split: int = 0) -> Advance:
    return Advance(id, worker, 0, id, split, attempt, split=SPLIT, end=True)


class ScriptedScheduler:
    """answer: the commands to an event; None for none."""

    in_flight = 0

    def __init__(self, answer: Callable[[Event], Sequence[Command] | None]) -> None:
        self._answer = answer
        self.told: list[Event] = []

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        del now
        self.told.append(event)
        return list(self._answer(event) or ())


class StandSubstrate:
    """rounds: what each `wait` returns, or what makes it. With none left, the clock goes on by the timeout."""

    def __init__(self, rounds: Sequence[Any] = (), *, name: str = "stand") -> None:
        self.name = name
        self.rounds: deque[Any] = deque(rounds)
        self.clock_s = 0.0
        self.held_bytes = 0
        self.waits = 0
        self.started: list[WorkerSpec] = []
        self.submitted: list[Step | Discard] = []
        self.released: list[PartRef] = []
        self.killed: list[tuple[int, str]] = []
        self.stopped = False
        self.untold: list[WorkerLost] = []
        self.when_killed: Callable[[int, str], WorkerLost] = WorkerLost

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        del program
        self.started.extend(workers)

    def add_worker(self, worker: WorkerSpec) -> None:
        self.started.append(worker)

    def submit(self, step: Step | Discard) -> None:
        self.submitted.append(step)

    def release(self, parts: Sequence[PartRef]) -> None:
        self.released.extend(parts)

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        self.waits += 1
        assert self.waits < 10_000, "the driver waits for ever"
        if self.rounds:
            found = self.rounds.popleft()
            made: Any = found() if callable(found) else found
            return list(made)
        assert timeout_s is not None
        self.clock_s += timeout_s
        return []

    def wake(self) -> None:
        assert not self.stopped, "woken after its end"

    def fetch(self, block: BlockRef) -> Any:
        return block.parts[0].handle

    def kill(self, worker: int, reason: str) -> bool:
        self.killed.append((worker, reason))
        self.rounds.append([self.when_killed(worker, reason)])
        return True

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        return tuple(PartRef(p.id, p.owner, p.bytes, p.columns, "on disk") for p in parts)

    def memory_bytes(self) -> int:
        return self.held_bytes

    def stop(self) -> list[WorkerLost]:
        told = [] if self.stopped else self.untold
        self.stopped = True
        return told


class NotingCommitter:
    """calls: in order, by name."""

    def __init__(self, substrate: StandSubstrate) -> None:
        self._substrate = substrate
        self.calls: list[tuple[Any, ...]] = []
        self.tally = Tally()
        self.splits = 0
        self.post: Callable[[HeadraceError], None] | None = None

    def start(self, post: Callable[[HeadraceError], None]) -> None:
        self.post = post

    def add(self, split: int, attempt: int, states: Mapping[str, Any]) -> None:
        self.calls.append(("add", split, attempt, dict(states)))

    def retry(self, split: int, attempt: int) -> None:
        self.calls.append(("retry", split, attempt))

    def settle(self, done: Settle) -> None:
        self.calls.append(("settle", done.split.index, done.attempt))
        self.splits += 1
        self.tally += done.tally

    def admit(self, splits: tuple[Split, ...], done: bool, more: Iterator[Split]) -> SplitsListed:
        del more
        return SplitsListed(splits, done)

    def flush(self) -> None:
        self.calls.append(("flush", "workers ended" if self._substrate.stopped else "workers there"))

    def results(self) -> dict[str, Any]:
        return {"n": 1}


class Ear:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def on_event(self, event: RunEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing to restore."""

    @property
    def finished(self) -> RunFinished:
        """The last event of all."""
        last = self.events[-1]
        assert isinstance(last, RunFinished)
        return last

    def of(self, kind: type[Any]) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]


class Stand:
    """All of it, wired."""

    def __init__(
        self,
        answer: Callable[[Event], Sequence[Command] | None],
        rounds: Sequence[Any] = (),
        *,
        engine: str = "stand",
        timeout_s: float | None = None,
        crash_dir: str | None = None,
        budget_bytes: int = 1 << 40,
        deliver: Callable[[Any], None] | None = None,
    ) -> None:
        self.scheduler = ScriptedScheduler(answer)
        self.substrate = StandSubstrate(rounds, name=engine)
        self.committer = NotingCommitter(self.substrate)
        self.ear = Ear()
        scheduler: Any = self.scheduler
        committer: Any = self.committer
        self.driver = _ClockedDriver(
            scheduler=scheduler,
            substrate=self.substrate,
            program=None,
            workers=(WorkerSpec(0, "sim", "sim:0"),),
            splits=iter(()),
            committer=committer,
            observers=[self.ear],
            started=RunStarted(0.0, "", engine, {"sim": 1}, {}, {}, 0),
            deliver=deliver,
            timeout_s=timeout_s,
            crash_dir=crash_dir,
            governor=Governor(budget_bytes),
        )


class _ClockedDriver(Driver):
    """The stand's clock is the driver's."""

    substrate: StandSubstrate

    def _now(self) -> float:  # type: ignore[override]
        return self.substrate.clock_s
