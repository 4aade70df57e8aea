"""A scheduler driven by hand: tests say which step is answered, and with what."""

from __future__ import annotations

from typing import Any

from headrace.core.receipts import Receipt, Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import CPU_POOL
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.core.steps import Advance, Apply, Share, Step, StepDone, Timing, WorkerUp
from headrace.scheduler.invariants import check
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.messages import Command, Limits, ListSplits, Release, SchedulerPlan, SplitsListed, Start, Submit


def stage(id: int, order: Order, end: End = End.NEXT, pool: str = CPU_POOL, **more: Any) -> Stage:
    return Stage(id, f"stage{id}", pool, order, end, id, id + 1, **more)


def split(index: int, bytes: int = 100, rows: int = 10) -> Split:
    return Split(index, (), bytes, rows)


class Desk:
    """running: submitted steps that are not answered yet, oldest first. commands: all that were given so far.

    late: no worker is up yet. nodes: where each worker lives; its blocks stay there.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        pools: dict[str, int],
        *,
        routes: tuple[tuple[int, ...], ...] = (),
        limits: Limits | None = None,
        late: bool = False,
        nodes: tuple[str, ...] = (),
    ) -> None:
        used = routes or (tuple(range(len(stages))),)
        plan = SchedulerPlan(stages, tuple(Route(f"r{i}", r) for i, r in enumerate(used)), pools)
        self.scheduler = Scheduler(plan, limits or Limits(budget_bytes=10_000, block_bytes=100))
        self.commands: list[Command] = []
        self.running: list[Step] = []
        self._parts = 0
        self.nodes = dict(enumerate(nodes))
        self.tell(Start())
        for i, pool in enumerate(pool for pool, count in pools.items() for _ in range(count)):
            if not late:
                self.tell(WorkerUp(i, pool, self.nodes.get(i, "")))

    def tell(self, event: Any) -> list[Command]:
        """One event; every invariant holds afterwards."""
        commands = self.scheduler.handle(event)
        check(self.scheduler)
        self.commands += commands
        self.running += [c.step for c in commands if isinstance(c, Submit)]
        return commands

    def list_splits(self, *splits: Split, done: bool = True) -> list[Command]:
        return self.tell(SplitsListed(splits, done))

    def blocks(self, count: int, rows: int = 10, bytes: int = 100, worker: int = 0) -> tuple[BlockRef, ...]:
        made: list[BlockRef] = []
        for _ in range(count):
            self._parts += 1
            made.append(BlockRef(rows, (PartRef(self._parts, worker, bytes, ("id",), None, self.nodes.get(worker, "")),)))
        return tuple(made)

    def answer(
        self,
        step: Step,
        *,
        blocks: int = 0,
        rows: int = 10,
        bytes: int = 100,
        finished: bool = False,
        more: bool = False,
        taken: int = 0,
        wall_s: float = 0.1,
        written: int = 0,
    ) -> list[Command]:
        """Answer a step: an Apply with a part per input, an Advance with as many blocks."""
        self.running.remove(step)
        at = self.scheduler.stages[step.stage]
        receipt = None
        if isinstance(step, Apply):
            outputs = self.blocks(len(step.inputs), step.inputs[0].rows, bytes, step.worker)
        else:
            outputs = self.blocks(blocks, rows, bytes, step.worker)
            if finished and at.end is End.SINK:
                receipt = Receipt(step.split_index, "", step.attempt)
        read = blocks * rows + written if at.order is Order.SOURCE else 0
        timing = Timing(0.0, wall_s, 0.0)
        tally = Tally(rows_in=read, written=written)
        if isinstance(step, Apply) and at.end is End.DELIVER:
            tallies: dict[tuple[int, int], Tally] = {}
            for owner, block in zip(step.owners, step.inputs, strict=True):
                tallies[owner] = tallies.get(owner, Tally()) + Tally(written=block.rows)
            shares = tuple(Share(split, attempt, told) for (split, attempt), told in tallies.items())
            return self.tell(StepDone(step.id, step.worker, outputs, timing=timing, shares=shares))
        done = StepDone(step.id, step.worker, outputs, finished, more, receipt, tally, taken=taken, timing=timing)
        return self.tell(done)

    def at(self, stage: int) -> list[Step]:
        """The running steps of a stage."""
        return [s for s in self.running if s.stage == stage]

    def workers_at(self, stage: int) -> list[int]:
        return [s.worker for s in self.at(stage)]

    def splits_at(self, stage: int) -> list[int]:
        return [s.split_index for s in self.at(stage) if isinstance(s, Advance)]


def of(commands: list[Command], kind: type[Any]) -> list[Any]:
    return [c for c in commands if isinstance(c, kind)]


def released(commands: list[Command]) -> list[int]:
    return [p.id for c in commands if isinstance(c, Release) for p in c.parts]


def asked(commands: list[Command]) -> list[int]:
    return [c.count for c in commands if isinstance(c, ListSplits)]
