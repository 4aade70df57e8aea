"""Driver: carries the scheduler's commands to the substrate and its events back. No decisions, no polling.

One thread runs the loop and blocks in `substrate.wait`; other threads and signal handlers speak to it through `post`, which
wakes it. What depends on time wakes it too, and only that: the memory sample, a step's time limit, the end of a drain.

Invariants:
- Answers of an attempt that no longer counts reach neither the committer nor the counts that observers sum up.
- Whatever the end, no worker and no block outlives `run`.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from headrace.connectors.sources.remarks import Remarks
from headrace.contracts.observer import Observer
from headrace.contracts.substrate import Substrate
from headrace.core.errors import BlockLost, HeadraceError
from headrace.core.events import (
    BlocksSpilled,
    ClusterSampled,
    MemorySampled,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitRetried,
    SplitSettled,
    SplitsFound,
    StepFinished,
    StepStarted,
    WorkerGone,
    WorkerReplaced,
)
from headrace.core.receipts import NO_ROWS, Receipt, Tally
from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import NO_TIME, Advance, Step, StepDone, StepFailed, WorkerLost, WorkerResting, WorkerUp
from headrace.runtime.committer import Committer
from headrace.runtime.crashes import CrashSamples
from headrace.runtime.governor import Governor
from headrace.runtime.listing import Lister
from headrace.runtime.signals import GRACE_S, Stopped
from headrace.runtime.stop_rules import StopRule, StopRules
from headrace.runtime.watch import StepWatch
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import (
    AddWorker,
    BudgetChanged,
    Command,
    ConsumerTook,
    Deliver,
    Delivered,
    Drain,
    Drop,
    Event,
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

STACK_LINES = 40  # of a hung worker's stack: the rest is threads that wait


class _Drained(Struct, frozen=True):
    """Posted by `drain`. by_s: when patience ends."""

    why: str
    note: str
    by_s: float


class _Open(Struct):
    """A split under way: its attempt, and what its steps told so far."""

    attempt: int
    tally: Tally = NO_ROWS


class Driver:
    """One run, or one session of it.

    deliver: called with (block as the consumer's own record batch) in order, for plans that end in the consumer.
    timeout_s: a step that gives no answer for so long has its worker killed. That includes loading a model, which happens in a
    worker's first step; a long step answers at least four times a second between batches, so only one batch can use it up.
    crash_dir: where rows that killed a worker are kept; None: a temporary directory. governor: None: of this machine.
    stop_rules: conditions on metrics that end the run.
    """

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
        timeout_s: float | None = None,
        crash_dir: str | None = None,
        governor: Governor | None = None,
        stop_rules: Mapping[str, StopRule] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.substrate = substrate
        self.committer = committer
        self.metrics: dict[str, Any] = {}
        self.drained = False
        self.interruptible = False  # see signals.Stoppable
        self.over = False
        self._program = program
        self._workers = {w.id: w for w in workers}
        self._pools = {w.id: w.pool for w in workers}
        self._nodes: dict[int, str] = {}
        self._sizes = Counter(self._pools.values())  # pool -> workers, those that start included
        self._resting: dict[str, set[int]] = {}
        self._observers = observers
        self._started = started
        self._deliver = deliver
        self._posted: deque[Event | HeadraceError | Stopped | _Drained] = deque()
        self._inline = substrate.name == "inline"
        self._lister = Lister(splits, self.post, admit=committer.admit, inline=self._inline)
        self._steps: dict[int, Step] = {}
        self._at: dict[int, set[int]] = {}  # worker -> its steps
        self._open: dict[int, _Open] = {}
        self._found = SplitsFound(0.0, 0, 0, complete=False, rows=0)
        self._watch = StepWatch(timeout_s)
        self._stop_rules = StopRules(stop_rules or {}, self._now)
        self._crashes = CrashSamples(crash_dir)
        self._governor = governor or Governor()
        self._typed: tuple[str, tuple[tuple[str, str], ...]] | None = None  # the first file with rows, and what it holds
        self._drifted = False
        self._remarks = Remarks()
        self._draining: _Drained | None = None
        self._done = False
        self._stopping = False

    # ---------------------------------------------------------------- from other threads and signal handlers

    def post(self, event: Event | HeadraceError | Stopped | _Drained) -> None:
        """Give the loop an event; safe from any thread."""
        self._posted.append(event)
        if not self._stopping:
            self.substrate.wake()

    def stop(self, why: str = "stopped") -> None:
        """Make `run` raise Stopped soon; safe from any thread."""
        self.post(Stopped(why))

    def drain(self, why: str, note: str, grace_s: float = GRACE_S) -> None:
        """Finish the open splits, for `grace_s` at most, then make `run` raise Stopped(why). note: for people, now."""
        self.post(_Drained(why, note, self._now() + grace_s))

    def took(self, blocks: int) -> None:
        """The consumer has taken delivered blocks; safe from any thread."""
        self.post(ConsumerTook(blocks))

    def progress(self) -> str:
        """How far the run is, in words."""
        done = self.committer.splits
        if self._found.complete:
            return f"{done:,} of {self._found.count:,} splits are committed"
        return f"{done:,} splits are committed"

    # ---------------------------------------------------------------- the loop

    def run(self) -> dict[str, Any]:
        """Run to the end. Returns the metrics' results; everything settled is then logged and published.

        Raises the run's error, Stopped (also after a drain that left splits for the next session), or KeyboardInterrupt;
        whatever the end, no worker and no block outlives it.
        """
        for _ in self.turns():
            pass
        return self.metrics

    def turns(self) -> Generator[None]:
        """The loop, a turn per `next`; for a caller that takes delivered blocks in between. As `run` otherwise."""
        error = "stopped"
        try:
            self._tell(self._started)
            if self._stop_rules:
                self._stop_rules.add(self.committer.totals(self._stop_rules.names))
            self.committer.start(self.post)
            self.substrate.start(self._program, list(self._workers.values()))
            for worker in self._workers.values():
                self._expect(worker)
            self._carry(self.scheduler.handle(Start(), self._now()))
            while not self._done:
                self._turn()
                yield
            self._flush()
            if self.drained:
                raise Stopped(self._draining.why if self._draining else "stopped")
            self.metrics = self.committer.results()
            self._stop_rules.judge(self.metrics, self.committer.tally.rows_in)
            error = ""
        except Stopped as stopped:
            error = str(stopped)
            if self._draining is not None and not self.drained:  # the workers' time is over; what is settled is kept
                self._end_work()
                self._flush()
            raise
        except HeadraceError as failure:
            error = str(failure)
            raise
        except KeyboardInterrupt:
            error = "interrupted"
            raise
        finally:
            try:
                self._end_work()
            finally:  # also when an observer fails
                self.over = self.interruptible = True
                self._close_observers(RunFinished(self._now(), self.committer.tally, error, self.metrics))

    def _end_work(self) -> None:
        """End the listing and the workers. Idempotent."""
        if self._stopping:
            return
        self._stopping = True  # from now on a signal handler leaves the substrate alone
        try:
            self._lister.close()
            self._sample_memory(last=True)
        finally:
            try:
                self.interruptible = self.substrate.name == "threads"  # which waits for user code that can't be ended
                lost = self.substrate.stop()
            finally:
                self.interruptible = False
                self.substrate.stop()  # an interrupt may have come before the first one began
            for worker in lost:
                self._note_lost(worker)

    def _flush(self) -> None:
        self.interruptible = True
        try:
            self.committer.flush()
        finally:
            self.interruptible = False

    def _close_observers(self, finished: RunFinished) -> None:
        """Tell all of the end and close them, the others too when one fails."""
        with contextlib.ExitStack() as closing:
            for observer in self._observers:
                closing.callback(observer.close)
            self._tell(finished)

    def _turn(self) -> None:
        """Wait until something happened; take it in."""
        for event in self._wait():
            self._take(event)
        while self._posted and not self._done:
            posted = self._posted.popleft()
            if isinstance(posted, HeadraceError | Stopped):
                raise posted
            if isinstance(posted, _Drained):
                self._begin_drain(posted)
                continue
            if isinstance(posted, SplitsListed):
                self._note_found(posted)
            self._carry(self.scheduler.handle(posted, self._now()))
        if not self._done:
            if self._stop_rules:
                self._stop_rules.look(self.scheduler.read)
            self._keep_time()

    def _wait(self) -> Sequence[Any]:
        timeout_s = 0.0 if self._posted else max(0.0, self._next_deadline() - self._now())
        if not self._inline:
            return self.substrate.wait(timeout_s)
        self.interruptible = True
        try:
            return self.substrate.wait(timeout_s)
        finally:
            self.interruptible = False

    def _take(self, event: Any) -> None:
        """A substrate's event."""
        path = ""
        match event:
            case StepDone():
                self._watch.answered(event.worker, self._now(), event.step)
                self._note_done(event)
            case StepFailed():
                self._watch.answered(event.worker, self._now(), event.step)
                self._note_failed(event)
            case WorkerUp():
                self._watch.came_up(event.worker)
                if event.node:
                    self._nodes[event.worker] = event.node
            case WorkerLost():
                path = self._note_lost(event)
            case WorkerResting():
                self._note_rest(event)
            case _:
                pass
        self._carry(self.scheduler.handle(event, self._now()), path)
        if isinstance(event, WorkerLost):
            self._forget(event.worker)

    def _forget(self, worker: int) -> None:
        """After the commands that follow its loss: who takes its place has its device."""
        self._workers.pop(worker, None)
        self._nodes.pop(worker, None)
        pool = self._pools.pop(worker, None)
        if pool is not None:
            self._sizes[pool] -= 1
            self._resting.get(pool, set()).discard(worker)

    def _next_deadline(self) -> float:
        by_s = min(self._governor.due_s, self._watch.next_deadline_s)
        return by_s if self._draining is None else min(by_s, self._draining.by_s)

    def _keep_time(self) -> None:
        """What is due by now."""
        now = self._now()
        for worker, reason in self._watch.overdue(now):
            self.substrate.kill(worker, reason)
        if now >= self._governor.due_s:
            self._sample_memory()
        if self._draining is not None and now >= self._draining.by_s:
            raise Stopped(self._draining.why)

    def _begin_drain(self, drained: _Drained) -> None:
        if self._draining is None:
            self._draining = drained
            self._tell(Noted(self._now(), drained.note))
            self._carry(self.scheduler.handle(Drain(), self._now()))

    def _carry(self, commands: Sequence[Command], sample: str = "") -> None:
        """Carry out commands in order. sample: file of the row that has just killed a worker, "" for none."""
        waiting = deque(commands)
        while waiting:
            command = waiting.popleft()
            match command:
                case Submit(step):
                    self._submit(step)
                case Release(parts):
                    self.substrate.release(parts)
                case Settle():
                    self._open.pop(command.split.index, None)
                    self.committer.settle(command)
                    self._note_types(command.receipt)
                    self._tell(SplitSettled(self._now(), command.split.index, command.split.bytes, command.receipt))
                case Deliver(split, block, skip, confirm):
                    lost = self._hand_over(block, skip, confirm)
                    if confirm:
                        waiting.extend(self.scheduler.handle(Delivered(split, lost), self._now()))
                case ListSplits(count):
                    self._lister.ask(count)
                case Drop(discard):
                    self.substrate.submit(discard)
                case Retry():
                    self._retry(command)
                case AddWorker():
                    self._add_worker(command)
                case Spill(parts):
                    moved = self.substrate.spill(parts)
                    if moved:
                        self._tell(BlocksSpilled(self._now(), sum(part.bytes for part in moved)))
                    waiting.extend(self.scheduler.handle(PartsSpilled(moved), self._now()))
                case Fail(error):
                    raise self._crashes.point_out(error, sample)
                case Finish(drained):
                    self._done = True
                    self.drained = drained

    def _submit(self, step: Step) -> None:
        now = self._now()
        self._steps[step.id] = step
        at = self._at.get(step.worker)
        if at is None:
            at = self._at[step.worker] = set()
        at.add(step.id)
        self._watch.submitted(step.worker, now, step.id)
        if isinstance(step, Advance):
            known = self._open.get(step.split_index)
            if known is None or known.attempt < step.attempt:
                self._open[step.split_index] = _Open(step.attempt)
        self._tell(StepStarted(now, step.worker, self._pools.get(step.worker, ""), step.stage))
        self.substrate.submit(step)

    def _hand_over(self, block: BlockRef, skip: int, may_be_lost: bool) -> str:
        """Give the consumer a block without its first `skip` rows. Why it did not get it, "" when it did."""
        try:
            batch = self.substrate.fetch(block)
        except BlockLost as lost:
            if not may_be_lost:
                raise
            return lost.message
        if skip:
            batch = batch.slice(skip)
        if self._deliver is not None:
            self._deliver(batch)
        return ""

    def _retry(self, command: Retry) -> None:
        before = self._open.get(command.index)
        self._open[command.index] = _Open(command.attempt)
        self.committer.retry(command.index, command.attempt)
        tally = before.tally if before is not None else NO_ROWS
        self._tell(SplitRetried(self._now(), command.index, command.attempt, command.why, tally))

    def _add_worker(self, command: AddWorker) -> None:
        before = None if command.replaces is None else self._workers.get(command.replaces)
        device = command.device if before is None else before.device
        spec = WorkerSpec(command.worker, command.pool, device or command.pool, command.node)
        self._workers[spec.id] = spec
        self._pools[spec.id] = spec.pool
        self._sizes[spec.pool] += 1
        self._tell(WorkerReplaced(self._now(), spec.id, spec.pool, command.replaces, command.why, spec.node))
        self._expect(spec)
        self.substrate.add_worker(spec)

    def _expect(self, spec: WorkerSpec) -> None:
        """It has so long to come up, unless it waits for its node."""
        if self.substrate.name != "ray" or spec.node:
            self._watch.starting(spec.id, self._now())

    # ---------------------------------------------------------------- what observers hear

    def _counts(self, split: int, attempt: int) -> _Open | None:
        """The split, if it is still under way in just this attempt."""
        known = self._open.get(split)
        return known if known is not None and known.attempt == attempt else None

    def _answered(self, event: StepDone | StepFailed) -> Step | None:
        """The step; None when nobody waits for it any more."""
        at = self._at.get(event.worker)
        if at is not None:
            at.discard(event.step)
        return self._steps.pop(event.step, None)

    def _note_done(self, event: StepDone) -> None:
        step = self._answered(event)
        if step is None:
            return
        tally = self._add(step, event)
        self._note_remarks(event.remarks)
        made = sum(b.rows for b in event.outputs)
        size = sum(b.bytes for b in event.outputs)
        pool = self._pools.get(event.worker, "")
        rows = made or tally.written
        self._tell(StepFinished(self._now(), event.worker, pool, step.stage, rows, size, event.timing, tally))

    def _note_failed(self, event: StepFailed) -> None:
        step = self._answered(event)
        if step is not None:
            pool = self._pools.get(event.worker, "")
            self._tell(StepFinished(self._now(), event.worker, pool, step.stage, 0, 0, NO_TIME, NO_ROWS))

    def _add(self, step: Step, event: StepDone) -> Tally:
        """Give the committer what the answer says of attempts that count; their rows."""
        if isinstance(step, Advance):
            told = [(step.split_index, step.attempt, event.tally, event.metrics)]
        else:
            told = [(s.split_index, s.attempt, s.tally, s.metrics) for s in event.shares]
        total = NO_ROWS
        for split, attempt, tally, metrics in told:
            known = self._counts(split, attempt)
            if known is not None:
                for text in event.unreadable:
                    self._tell(Noted(self._now(), text))
                known.tally += tally
                total += tally
                if metrics:
                    self._stop_rules.add(metrics)
                    self.committer.add(split, attempt, metrics)
        return total

    def _note_lost(self, event: WorkerLost) -> str:
        """Tell people. Returns the file of the row that it died on, "" when that is not known or could not be kept."""
        self._watch.lost(event.worker)
        for step in self._at.pop(event.worker, ()):
            self._steps.pop(step, None)
        node = self._nodes.get(event.worker)
        pool = self._pools.get(event.worker) or event.pool or "?"
        text = f"worker {event.worker} ({f'{pool} on {node}' if node else pool}) is lost: {event.reason}"
        doing = event.doing
        path = ""
        if doing is not None:
            text += f", in {doing.name}"
            path = self._crashes.keep(doing)
        if path:
            text += f"\nthe row is in {path}; see it again with\n{self._crashes.command(path)}"
        if event.stack:
            lines = event.stack.rstrip().splitlines()
            text += "\n" + "\n".join(lines[:STACK_LINES])
            if len(lines) > STACK_LINES:
                text += f"\n... and {len(lines) - STACK_LINES} lines more"
        self._tell(Noted(self._now(), text))
        if event.started or not event.gone:
            self._tell(WorkerGone(self._now(), event.worker, pool))
        return path

    def _note_rest(self, event: WorkerResting) -> None:
        """Tell people when nobody of a pool is left to take up work: the run waits then."""
        pool = self._pools.get(event.worker)
        if pool is None:
            return
        resting = self._resting.setdefault(pool, set())
        if not event.resting:
            resting.discard(event.worker)
        elif event.worker not in resting:
            resting.add(event.worker)
            if len(resting) == self._sizes[pool]:
                text = f"all workers of pool {pool} rest: its work waits until one of them goes on or another one comes"
                self._tell(Noted(self._now(), text))

    def _note_remarks(self, remarks: tuple[tuple[str, str], ...]) -> None:
        """Tell people what the source says, once of each subject."""
        for about, text in remarks:
            self._remarks.add(about, text)
        for _, text in self._remarks.take():
            self._tell(Noted(self._now(), text))

    def _note_types(self, receipt: Receipt | None) -> None:
        """Tell people, once, when files of the output differ in columns or types."""
        if receipt is None or not receipt.types or self._drifted:
            return
        name = receipt.outputs[0].name
        if self._typed is None:
            self._typed = (name, receipt.types)
            return
        first, types = self._typed
        if types != receipt.types:
            self._drifted = True
            here, there = dict(receipt.types), dict(types)
            text = f"columns stand in another order in {first} than in {name}"
            if here != there:
                column = min(c for c in here.keys() | there.keys() if here.get(c) != there.get(c))
                before, now = there.get(column, "not there"), here.get(column, "not there")
                text = f"column {column!r} is {before} in {first}, and {now} in {name}"
            hint = "declare the types to have one for all (schema=, output={name: type})"
            self._tell(Noted(self._now(), f"files of the output differ: {text}; {hint}"))

    def _note_found(self, listed: SplitsListed) -> None:
        rows = [s.rows for s in listed.splits]
        known = self._found.rows is not None and None not in rows
        self._found = SplitsFound(
            self._now(),
            self._found.count + len(listed.splits) + len(listed.settled),
            self._found.bytes + sum(s.bytes for s in listed.splits),
            listed.done,
            (self._found.rows or 0) + sum(r or 0 for r in rows) if known else None,
        )
        self._tell(self._found)

    def _sample_memory(self, last: bool = False) -> None:
        """Tell of the memory in use; tell the scheduler when it becomes scarce, or no longer is."""
        now = self._now()
        own_bytes, changed, note = self._governor.sample(self.substrate.memory_bytes, now)
        cluster = getattr(self.substrate, "cluster", None)
        in_all = own_bytes if cluster is None else cluster.memory_bytes
        self._tell(MemorySampled(now, self.scheduler.in_flight, in_all))
        if cluster is not None:
            seen = (cluster.nodes, cluster.leaving, cluster.workers, cluster.store_bytes, cluster.budget_bytes)
            self._tell(ClusterSampled(now, *seen))
            if not last:
                self.substrate.want(self.scheduler.wanted_workers())  # type: ignore[attr-defined]
                if cluster.budget_bytes and cluster.budget_bytes != self.scheduler.limits.budget_bytes:
                    self._carry(self.scheduler.handle(BudgetChanged(cluster.budget_bytes), now))
        if (changed or self._governor.level >= 2) and not last:  # at the highest level, each sample lets more go to disk
            if note:
                self._tell(Noted(now, note))
            self._carry(self.scheduler.handle(MemoryPressure(self._governor.level), now))

    def _tell(self, event: RunEvent) -> None:
        for observer in self._observers:
            observer.on_event(event)

    @staticmethod
    def _now() -> float:
        return time.perf_counter()
