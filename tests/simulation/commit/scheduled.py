"""Worlds whose drivers are whole: the production driver, scheduler, lister, committer and ledger over simulated workers.

`world` has disks, power cuts and competing drivers; here each of those drivers runs a case of `cases.small_case`, in which
workers die (also after they have staged a file), rows fail and kill, storage stumbles, limits cut, memory is short and sessions
drain. Attempts make bytes, metrics and files of bad rows that no other attempt makes. Two threads are taken apart: the
committer's and the driver's turns come as the seed says.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any, cast

from msgspec.structs import replace
from tests.simulation.cases import Case, expected, small_case
from tests.simulation.commit.world import Checker, Made, Session, Sum, World, run_world

from headrace.commit.protocol import Event, Flush, Tick
from headrace.core.errors import HeadraceError, InternalError, UserCodeError
from headrace.core.events import RunEvent, SplitRetried, WorkerReplaced
from headrace.core.receipts import OutputFile, Tally
from headrace.core.steps import Advance, Share, Step, StepDone, SubstrateEvent, WorkerLost
from headrace.runtime import ledger
from headrace.runtime.committer import Committer
from headrace.runtime.driver import Driver
from headrace.runtime.ledger import OpenedRun
from headrace.runtime.listing import Lister
from headrace.runtime.signals import Stopped
from headrace.scheduler.invariants import check
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import MemoryPressure
from headrace.substrates.simulated import Rows, SimulatedSubstrate, source_rows

TURNS = (1, 3, 10, 30)  # of a driver, at a time
CHECKED = 20  # in every so many worlds the scheduler's tables are checked after each turn
ROUNDS = 10_000  # of a committer, until it must be through
Origin = tuple[int, int, int]  # session, split, attempt


@dataclass(frozen=True)
class Attempted(Made):
    """What an attempt made. values: its rows. origin: which attempt, of which session."""

    values: tuple[int, ...]
    origin: Origin


class ScheduledWorld(World):
    """wanted: split -> the rows that must be published. counts: what the workers went through."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.case = small_case(seed)
        self.splits = self.case.splits
        self.count = len(self.splits)
        self.wanted = expected(self.case)
        self.limited = any(stage.limit is not None for stage in self.case.plan.stages)
        self.quarantines = self.rng.random() < 0.7
        self.most_bad = None if self.limited else _bad_rows(self.case)
        self.aside: dict[str, Origin] = {}
        self.counts: Counter[str] = Counter()

    def _make_checker(self) -> Checker:
        return ScheduledChecker(self)

    def _make_session(self, number: int, fresh: bool, take_over: bool) -> Session:
        return ScheduledSession(self, number, fresh, take_over)


def _bad_rows(case: Case) -> int:
    """How many rows of the whole input fail, at whichever stage."""
    found = 0
    for split in case.splits:
        rows: Rows = source_rows(split)
        for stage in case.plan.routes[-1].stages:
            good = case.program.works[stage].good(rows)
            found += len(rows) - len(good)
            rows = good if case.plan.stages[stage].model else case.program.works[stage].of(good)
    return found


class SteppedCommitter(Committer):
    """A committer without its thread: `serve` is one round of what that does."""

    def __init__(self, session: ScheduledSession, opened: OpenedRun) -> None:
        super().__init__({"sum": Sum()}, opened)
        self._session = session
        self._answer: Event = Tick()
        self._posted = False

    def start(self, post: Any) -> None:
        self._post = post
        self._thread = cast(Any, _NoThread())

    def serve(self) -> None:
        loop, now = self._loop, self._session.world.now
        assert loop is not None
        answer, self._answer = self._answer, Tick()
        loop.tell(answer, now)
        if not self._posted and (trouble := self._trouble(loop)) is not None:
            self._posted = True
            self._post(trouble)
        while self._inbox:
            loop.tell(self._inbox.popleft(), now)
        loop.tell(Tick(), now)
        if loop.busy:
            self._answer = loop.step()

    def _await_clean(self, timeout_s: float | None) -> bool:
        loop, world = self._loop, self._session.world
        assert loop is not None
        self._inbox.append(Flush())
        until = None if timeout_s is None else world.now + timeout_s
        for _ in range(ROUNDS):
            if loop.error is not None or self._is_clean(loop):
                return loop.error is None
            if until is not None and world.now > until:
                return False
            self.serve()
            if not loop.busy:
                world.now += 0.5
        raise AssertionError("the committer does not come to its end")


class _NoThread:
    def join(self, timeout: float | None = None) -> None:
        """There is none."""


class SteppedLister(Lister):
    """Answers later, with as many splits as it likes."""

    def __init__(self, session: ScheduledSession, substrate: SimulatedSubstrate, driver: Driver) -> None:
        admit = driver.committer.admit
        super().__init__(iter(session.world.splits), driver.post, admit=admit, inline=True)
        self._session = session
        self._substrate = substrate

    def ask(self, count: int) -> None:
        rng, case = self._session.rng, self._session.case
        few = rng.choice((1, 2, count)) if case.listing_s else count
        self._substrate.later(rng.random() * case.listing_s, lambda: self._answer(few))


class _NoGovernor:
    """Memory is as the world says."""

    level = 0
    due_s = float("inf")

    def sample(self, *_: Any) -> tuple[int, bool, str]:
        return 0, False, ""


class _Counting:
    """An observer."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def on_event(self, event: RunEvent) -> None:
        match event:
            case SplitRetried():
                self._counts["retries"] += 1
            case WorkerReplaced():
                self._counts["worker deaths"] += 1
            case _:
                pass

    def close(self) -> None:
        """Nothing is held."""


class StagingSubstrate(SimulatedSubstrate):
    """Workers whose sinks stage files on the world's disk, whose bad rows become files, and whose answers hold metrics.

    Metrics come from stages behind the last limit alone: what came before it may be read in part, and then counts for nothing.
    """

    name = "inline"  # the driver then lists in its own thread

    def __init__(self, session: ScheduledSession) -> None:
        super().__init__()
        self._session = session
        self._told: Counter[tuple[int, int]] = Counter()
        self._counted_from = max((s.id for s in session.case.plan.stages if s.limit is not None), default=0)

    def _run(self, worker: Any, step: Step) -> SubstrateEvent:
        answer = super()._run(worker, step)
        session, world = self._session, self._session.world
        if not isinstance(answer, StepDone):
            if isinstance(answer, WorkerLost) and isinstance(step, Advance) and session.rng.random() < 0.5:
                session.stage(step.split_index, step.attempt)  # the file that it was at
            return answer
        if not isinstance(step, Advance):
            return replace(answer, shares=self._shares(step.owners, answer, step.stage))
        split, attempt = step.split_index, step.attempt
        tally, aside = self._set_aside(split, attempt, answer.tally)
        answer = replace(answer, tally=tally, aside=aside)
        if answer.finished:
            answer = replace(answer, metrics=self._metrics(split, attempt, step.stage))
        if answer.receipt is not None:
            file = session.stage_rows(split, attempt, self.staged[split, attempt], self._told[split, attempt])
            id = world.splits[split].id
            answer = replace(answer, receipt=replace(answer.receipt, split_id=id, outputs=(file,)))
            if not world.calm and session.rng.random() < 0.05:  # and so nobody hears of the file
                return WorkerLost(worker.spec.id, "killed after it had staged its file", None, pool=worker.spec.pool)
        return answer

    def _shares(self, owners: tuple[tuple[int, int], ...], answer: StepDone, stage: int) -> tuple[Share, ...]:
        told = {(s.split_index, s.attempt): s.tally for s in answer.shares}
        shares: list[Share] = []
        for split, attempt in dict.fromkeys(owners):
            tally, aside = self._set_aside(split, attempt, told.get((split, attempt), Tally()))
            shares.append(Share(split, attempt, tally, self._metrics(split, attempt, stage), aside))
        return tuple(shares)

    def _metrics(self, split: int, attempt: int, stage: int) -> dict[str, Any]:
        if stage < self._counted_from:
            return {}
        value = self._session.rng.randint(1, 10**9)
        self._told[split, attempt] += value
        return {"sum": {"sum": value}}

    def _set_aside(self, split: int, attempt: int, tally: Tally) -> tuple[Tally, tuple[OutputFile, ...]]:
        if not (tally.skipped and self._session.world.quarantines):
            return tally, ()
        file = self._session.stage_aside(split, attempt, tally.skipped)
        return dataclasses.replace(tally, skipped=0, quarantined=tally.skipped), (file,)


class ScheduledSession(Session):
    """One driver's process, with its workers."""

    world: ScheduledWorld

    def __init__(self, world: ScheduledWorld, number: int, fresh: bool, take_over: bool) -> None:
        super().__init__(world, number, fresh, take_over)
        self.case = world.case
        self.driver: Driver | None = None
        self.turns: Generator[None] | None = None

    def _make_committer(self, opened: OpenedRun) -> Committer:
        return SteppedCommitter(self, opened)

    def _open(self) -> None:
        super()._open()
        assert self.opened is not None
        if not self.opened.finished:
            self._wire(cast(SteppedCommitter, self.committer))

    def _wire(self, committer: SteppedCommitter) -> None:
        """As api/session.py does."""
        case, rng = self.case, self.rng
        substrate = StagingSubstrate(self)
        limits = replace(case.limits, max_bad_rows=self.world.most_bad, settled_before=committer.tally)
        self.driver = Driver(
            scheduler=Scheduler(case.plan, limits),
            substrate=substrate,
            program=replace(case.program, seed=rng.randrange(1 << 30), **self._troubles(rng)),
            workers=case.workers,
            splits=iter(()),
            committer=committer,
            observers=[_Counting(self.world.counts)],
            started=cast(Any, None),
            governor=cast(Any, _NoGovernor()),
        )
        self.driver._lister = SteppedLister(self, substrate, self.driver)
        self.turns = self.driver.turns()

    def _troubles(self, rng: Random) -> dict[str, Any]:
        if self.world.calm:
            return {}
        within = 12 * self.world.count
        deaths = frozenset(rng.randint(1, within) for _ in range(rng.choice((0, 1, 2, 4))))
        stumbles = frozenset(rng.randint(1, within) for _ in range(rng.choice((0, 0, 1, 2)))) - deaths
        return {"loses": deaths, "stumbles": stumbles, "tells": rng.random() < 0.5}

    # ---------------------------------------------------------------- what workers stage

    def stage(self, index: int, attempt: int) -> tuple[OutputFile, Made]:
        """A file that nobody asks for any more."""
        file = self.stage_rows(index, attempt, [-1], -1)
        return file, self.world.made[file.digest]

    def stage_rows(self, split: int, attempt: int, rows: list[int], metric: int) -> OutputFile:
        file, data = self._put(split, attempt, rows, f"part-{self._generation:02d}-{split:06d}.bin", len(rows))
        self.world.made[file.digest] = Attempted(split, data, len(rows), metric, tuple(rows), (self.number, split, attempt))
        return file

    def stage_aside(self, split: int, attempt: int, rows: int) -> OutputFile:
        file, _ = self._put(split, attempt, f"{rows} bad rows", "bad.bin", rows)
        self.world.aside[file.digest] = (self.number, split, attempt)
        return replace(file, kind="quarantine")

    @property
    def _generation(self) -> int:
        assert self.opened is not None
        return int(self.opened.run[4:])

    def _put(self, split: int, attempt: int, what: Any, name: str, rows: int) -> tuple[OutputFile, bytes]:
        opened = self.opened
        assert opened is not None
        self.staged += 1
        data = json.dumps([self.number, split, attempt, self.staged, opened.run, what]).encode()
        staged = f"_headrace/{opened.run}/staging/{opened.epoch}/{split:06d}-{attempt}-{self.staged}.bin"
        self.world.disk.put(staged, data, durable=False)
        return OutputFile(name, rows, len(data), sha256(data).hexdigest(), staged), data

    # ---------------------------------------------------------------- at work

    def _work(self, committer: Any, opened: OpenedRun) -> None:
        roll = self.rng.random()
        if roll < 0.35:
            committer.serve()
        elif roll < 0.36:
            ledger.write_heartbeat(self.store, opened.run, opened.epoch, self.identity, self.world.now)
        else:
            if not self.world.calm and roll < 0.41:
                self._disturb()
            self._drive(committer, opened)

    def _disturb(self) -> None:
        assert self.driver is not None
        if self.rng.random() < 0.2:
            self.world.counts["drains"] += 1
            self.driver.drain("stopped", "", self.rng.choice((-1.0, 1e9, 1e9)))  # out of time, or as much as it takes
        else:
            self.driver.post(MemoryPressure(self.rng.choice((0, 1, 2))))

    def _drive(self, committer: SteppedCommitter, opened: OpenedRun) -> None:
        """Some turns of the driver; at its end, the session's, as in api/session.py."""
        assert self.turns is not None
        try:
            for _ in range(self.rng.choice(TURNS)):
                if next(self.turns, self) is self:
                    committer.finish({"tally": committer.tally.written, "metrics": committer.results()})
                    opened.finished = True
                    return
                if self.world.seed % CHECKED == 0:
                    check(cast(Driver, self.driver).scheduler)
        except Stopped:
            committer.close(released=True)
            self.kill("drained")
        except HeadraceError as error:
            _check_error(error)
            committer.close(released=True)
            raise (ledger.successor(opened) or error) from error


def _check_error(error: HeadraceError) -> None:
    """Storage may fail and workers may die too often; nothing else may end a session."""
    assert not isinstance(error, InternalError | UserCodeError), f"the driver fails: {error}"


class ScheduledChecker(Checker):
    world: ScheduledWorld

    @property
    def wanted(self) -> list[int]:
        return sorted(self.world.wanted)

    def check_record(self, record: dict[str, Any], nth: int) -> None:
        world, split = self.world, record["split"]
        assert record["files"], f"split {split} is settled without a file"
        output, *aside = record["files"]
        made = world.made[output["digest"]]
        assert isinstance(made, Attempted)
        assert split in world.wanted, f"split {split} lies behind the limit"
        assert list(made.values) == world.wanted[split], f"split {split}: {made.values} instead of {world.wanted[split]}"
        assert made.origin[1:] == (split, record["attempt"]), f"split {split}: its file is of attempt {made.origin}"
        assert not world.limited or split == nth - 1, f"split {split} is settled before an earlier one, behind a limit"
        origins = {world.aside[file["digest"]] for file in aside}
        assert origins <= {made.origin}, f"split {split}: its bad rows are of other attempts: {origins}"
        tally: Mapping[str, int] = record["tally"]
        kept = sum(file["rows"] for file in aside)
        assert kept == tally.get("quarantined", 0), f"split {split}: {kept} bad rows are kept, {tally} counted"
        assert made.rows == tally.get("written", 0) == record["rows"], f"split {split}: {made.rows} rows, {tally} counted"


def run_scheduled(seed: int) -> ScheduledWorld:
    """A world from its seed, to its end; AssertionError tells the seed and what led to it."""
    world = ScheduledWorld(seed)
    run_world(world)
    return world
