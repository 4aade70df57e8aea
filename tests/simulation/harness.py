"""Runs a case in virtual time and checks the scheduler after every event."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

from tests.simulation.cases import Case

from headrace.core.errors import HeadraceError
from headrace.core.receipts import Tally
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Advance, Apply, Step
from headrace.scheduler.invariants import check, story
from headrace.scheduler.machine import MOST_UNSTARTED, Scheduler
from headrace.scheduler.messages import (
    AddWorker,
    Command,
    ConsumerTook,
    Deliver,
    Delivered,
    Drain,
    Drop,
    Fail,
    Finish,
    ListSplits,
    MemoryPressure,
    PartsSpilled,
    Release,
    Retry,
    Settle,
    Spill,
    SplitsListed,
    Start,
    Submit,
)
from headrace.substrates.simulated import SimulatedSubstrate

MAX_EVENTS = 200_000  # a case that takes more goes round in circles
CLOSELY, SOME = 100, 8  # all checks after each of so many events, then after every eighth: tables that are wrong stay so


class Simulation:
    """One run of a case. settled: split index -> how. delivered: what the consumer got. peak: of memory, in bytes."""

    def __init__(self, case: Case, *, checked: bool = True) -> None:
        self.case = case
        self.scheduler = Scheduler(case.plan, case.limits)
        self.substrate = SimulatedSubstrate()
        self.checked = checked
        self.random = Random(case.seed + 1)
        self.settled: dict[int, Settle] = {}
        self.delivered: dict[int, list[int]] = {}
        self.started: list[Step] = []
        self.error: HeadraceError | None = None
        self.finished = False
        self.drained = False
        self.crashed = False
        self.published: dict[int, list[int]] = {}
        self.retries: list[Retry] = []
        self.peak = 0
        self.events = 0
        self._counted = case.limits.settled_before  # and what was settled since
        self._begun: set[int] = set()  # cursors
        self._unlisted = list(case.splits)
        self._taking = 0
        self._delivered_last = -1
        self._lost = ""  # why the block that was just delivered did not reach the consumer

    def run(self) -> Simulation:
        """To the end, and on until nothing happens any more."""
        self.substrate.start(self.case.program, self.case.workers)
        if self.case.pressure_s:
            self._change_pressure()
        if self.case.drain_s is not None:
            self.substrate.later(self.case.drain_s, Drain())
        self.tell(Start())
        while not self.substrate.idle:
            for event in self.substrate.wait(0.0):
                self.tell(event)
                if self.events == self.case.crash:
                    self.crashed = True
                    return self
        if not self.finished and self.error is None:
            raise AssertionError(self._stalled())
        return self

    def tell(self, event: Any) -> None:
        """Give the scheduler one event, carry its commands out, and check."""
        self.events += 1
        assert self.events < MAX_EVENTS, f"no end after {self.events} events; {self._stalled()}"
        over = self.finished or self.error is not None
        commands = self.scheduler.handle(event, self.substrate.now_s)
        if self.error is not None:
            assert not commands, f"commands after Fail: {commands}"
        waiting = deque(commands)
        while waiting:
            command = waiting.popleft()
            if over:
                assert isinstance(command, Release), f"after Finish: {command}"
            self._carry(command)
            if isinstance(command, Deliver) and command.confirm:
                self.events += 1
                commands = self.scheduler.handle(Delivered(command.split, self._lost), self.substrate.now_s)
                waiting.extend(commands)
        self.peak = max(self.peak, self.scheduler.in_flight + self.scheduler.reserved)
        if self.checked:
            self._check_admissions(commands)
            if self.events <= CLOSELY or self.events % SOME == 0 or self.finished or self.error is not None:
                self._check_counts()
                check(self.scheduler)

    def _carry(self, command: Command) -> None:
        assert self.error is None, f"{command} after Fail"
        match command:
            case Submit(step):
                known = isinstance(step, Advance) and step.cursor in self._begun
                assert known or not self.scheduler.workers[step.worker].resting, f"new work for one that rests: {step}"
                if isinstance(step, Advance):
                    self._begun.add(step.cursor)
                self.started.append(step)
                self.substrate.submit(step)
            case Drop(discard):
                self.substrate.submit(discard)
            case Release(parts):
                self.substrate.release(parts)
            case ListSplits(count):
                self.substrate.later(self.random.random() * self.case.listing_s, lambda: self._list(count))
            case Deliver(split, block, skip):
                assert split >= self._delivered_last, "blocks are delivered out of order"
                assert skip < block.rows
                self._delivered_last = split
                self._lost = "its node died" if command.confirm and self.random.random() < 0.05 else ""
                if self._lost:
                    return
                self.delivered.setdefault(split, []).extend(self.substrate.fetch(block)[skip:])
                self._taking += 1
                if self._taking == 1:
                    self._take_later()
            case Settle(split):
                assert split.index not in self.settled, f"{split.label} is settled twice"
                self.settled[split.index] = command
                self._counted += command.tally
                if command.receipt is not None:
                    assert command.receipt.attempt == command.attempt
                    self.published[split.index] = self.substrate.staged[split.index, command.attempt]
            case Retry():
                assert command.index not in self.settled, f"split {command.index} is retried, and was settled"
                self.retries.append(command)
            case AddWorker(worker, pool):
                self.substrate.add_worker(WorkerSpec(worker, pool, f"{pool}:{worker}", command.node))
            case Spill(parts):
                self.tell(PartsSpilled(self.substrate.spill(parts)))
            case Finish(drained):
                assert not self.finished, "Finish twice"
                self.finished = True
                self.drained = drained
            case Fail(error):
                self.error = error

    def _list(self, asked: int) -> SplitsListed:
        """As many as asked for, some of them, or none yet."""
        count = asked if self.case.listing_s == 0.0 else self.random.choice((0, 1, asked // 2, asked))
        found, self._unlisted = self._unlisted[:count], self._unlisted[count:]
        done = not self._unlisted and (self.case.listing_s == 0.0 or self.random.random() < 0.5)
        known = tuple((s.index, self.case.settled[s.index]) for s in found if s.index in self.case.settled)
        return SplitsListed(tuple(s for s in found if s.index not in self.case.settled), done, known)

    def _change_pressure(self) -> None:
        """Levels come and go as long as the run is under way; the last one is 0."""
        self.substrate.later(self.random.random() * 2 * self.case.pressure_s, self._pressure)

    def _pressure(self) -> MemoryPressure | None:
        if self.finished or self.error is not None:
            return None
        self._change_pressure()
        return MemoryPressure(self.random.choice((0, 0, 1, 2)))

    def _take_later(self) -> None:
        self.substrate.later(self.random.random() * self.case.consumer_s, self._take)

    def _take(self) -> ConsumerTook:
        assert self._taking <= self.case.limits.deliver_blocks, "the consumer has more blocks than it wants"
        blocks = self.random.randint(1, self._taking)
        self._taking -= blocks
        if self._taking:
            self._take_later()
        return ConsumerTook(blocks)

    def _check_admissions(self, commands: list[Command]) -> None:
        """Every step was either admitted by the budget, or makes no blocks, or belongs to the oldest split."""
        s = self.scheduler
        total = s.in_flight + s.reserved
        for command in reversed(commands):
            if isinstance(command, Submit) and (entry := s.steps.get(command.step.id)) is not None:
                if entry[3] and total > s.limits.budget_bytes and not s.pressure and not s.limits.bulk:
                    oldest = next(iter(s.open))
                    step = command.step
                    splits = [step.split_index] if isinstance(step, Advance) else [i for i, _ in step.owners]
                    assert splits == [oldest] or len(splits) == 1, f"past the budget: {step}"
                    assert splits == [oldest], f"past the budget, and not of the oldest split {oldest}: {step}"
                total -= entry[3]
                if s.pressure >= 2:
                    pool = s.pools[s.workers[command.step.worker].pool]
                    assert sum(len(w.running) for w in pool.workers.values()) == 1, f"not alone in its pool: {command.step}"

    def _check_counts(self) -> None:
        """Rows are counted for what is settled and for the open attempts, and every worker that died has a successor."""
        s = self.scheduler
        if self.error is not None:
            return
        open_now = [split.tally for split in s.open.values()]
        assert s.read == self._counted.rows_in + sum(t.rows_in for t in open_now), "rows read differ from a recount"
        assert s.bad == self._counted.bad + sum(t.bad for t in open_now), "bad rows differ from a recount"
        if not s.finished and max(s.unstarted.values(), default=0) < MOST_UNSTARTED:
            program, living = self.case.program, self.substrate.living
            if not (program.leaves or program.joins):
                assert living == self.case.plan.pools, f"{living} are alive"
            believed = self.substrate.believed
            assert all(believed[pool] for pool in self.case.plan.pools), f"a pool is left without workers: {believed}"

    def _stalled(self) -> str:
        lists = "\n".join(story(split) for split in self.scheduler.open.values())
        return f"the run stalled with {len(self.scheduler.pending)} pending splits and\n{lists}"


def run_checked(case: Case, rows: dict[int, list[int]]) -> Simulation:
    """Run a case that must succeed, and assert all that must be true of it afterwards. rows: see cases.expected."""
    done = Simulation(case).run()
    if done.error is not None:
        raise done.error
    assert done.finished
    got = done.delivered if case.delivers else done.published
    if case.delivers:
        got = {i: got.get(i, []) for i in rows}
    assert got == rows, _difference(got, rows)
    _check_settled(done, rows)
    s = done.scheduler
    assert not s.steps
    assert s.in_flight == 0, f"{s.in_flight} bytes in flight after the end"
    assert s.reserved == 0
    assert not s.alive
    assert not done.substrate.unreleased, f"never released: parts {done.substrate.unreleased}"
    assert not done.substrate.open_cursors, "cursors were neither finished nor discarded"
    assert done.substrate.memory_bytes() == 0
    return done


def _check_settled(done: Simulation, rows: dict[int, list[int]]) -> None:
    listed = {s.index for s in done.case.splits}
    if rows.keys() == listed:
        assert done.settled.keys() == listed, "not every split is settled"
    for index, settle in done.settled.items():
        assert settle.cancelled == (index not in rows)
        assert settle.tally.balanced
        assert settle.tally.cut >= 0
        written = len(rows.get(index, ()))
        assert settle.tally.written == written, f"split {index}: {settle.tally.written} rows counted, {written} came out"
        if settle.cancelled:
            assert settle.tally == Tally()
        elif not done.case.delivers:
            assert settle.receipt is not None
            assert (settle.receipt.split, settle.receipt.rows) == (index, written)


def _difference(got: dict[int, list[int]], rows: dict[int, list[int]]) -> str:
    if got.keys() != rows.keys():
        return f"splits {sorted(got)} came out, {sorted(rows)} should have"
    index = next(i for i in rows if got[i] != rows[i])
    return f"split {index}: {got[index][:20]}... instead of {rows[index][:20]}..."


def steps_of(done: Simulation, stage: int) -> list[Advance | Apply]:
    """The steps that a stage was given, in order."""
    return [step for step in done.started if step.stage == stage]
