"""The scheduler's one mutator: `handle(event, now) -> [command]`.

Here: what an event changes in the splits' lists (an answer's blocks are placed, sequences become runnable, splits are
delivered, settled, cut by a limit). What starts next is chosen in `dispatch.py`. Nothing is re-derived per event.

Liveness: the front of the oldest split (nothing before it but blocks that wait for later stages) is admitted past full queues
and past the memory budget. So as long as a split is open, the oldest one's front runs, waits for a worker that is busy, or
waits for the consumer; anything else is reported as a stall.

After `Fail` no command follows. After `Finish` only late answers to cancelled steps come in, and what they hold is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.core.errors import HeadraceError, InternalError, WorkerDied
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance, Apply, Discard, PartsFreed, Step, StepDone, StepFailed, WorkerLost, WorkerUp
from headrace.scheduler.dispatch import Dispatcher
from headrace.scheduler.messages import (
    Command,
    ConsumerTook,
    Deliver,
    Drop,
    Event,
    Fail,
    Limits,
    Release,
    SchedulerPlan,
    Settle,
    SplitsListed,
    Start,
)
from headrace.scheduler.state import DELIVER_STAGE, CursorEntry, CursorState, Node, SplitState, WorkerState

_NO_ROWS = Tally()


class Scheduler(Dispatcher):
    """See the module. Only `handle` changes it."""

    def __init__(self, plan: SchedulerPlan, limits: Limits | None = None) -> None:
        super().__init__(plan, limits)
        self.alive: dict[int, int] = {}  # part id -> bytes, from its making until PartsFreed
        self.deliver_next = 0
        self.failed = False
        self.ends_in_sink = any(s.end is End.SINK for s in plan.stages)

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Take in one event; the commands are in the order in which they must be carried out."""
        del now  # no decision needs the time yet; retries and hang limits will
        self._out = out = list[Command]()
        if self.finished:
            self._late(event)
            return out
        try:
            self._take_in(event)
            self._dispatch()
        except HeadraceError as error:
            self.finished = self.failed = True
            out.append(Fail(error))
        return out

    def _take_in(self, event: Event) -> None:
        match event:
            case StepDone():
                self._on_done(event)
            case PartsFreed(parts):
                self._on_freed(parts)
            case SplitsListed(splits, done):
                self.listing = False
                self.listing_done = self.listing_done or done
                if not self.enough:
                    self.listed += len(splits)
                    self.pending.extend(splits)
                    self.pending_bytes += sum(s.bytes for s in splits)
            case ConsumerTook(blocks):
                self.consumer_waiting -= blocks
                self._deliver()
            case WorkerUp(worker, pool):
                self.workers[worker] = self.pools[pool].workers[worker] = state = WorkerState(worker, pool)
                self._file(state)
            case StepFailed(step, _, error):
                if step not in self.steps:
                    raise error
                self._on_failed(step, error)
            case WorkerLost(worker, reason):
                raise self._worker_died(worker, reason)
            case Start():
                pass

    def _late(self, event: Event) -> None:
        """After the end only memory still matters: a cancelled step's inputs and outputs are given back."""
        match event:
            case PartsFreed(parts):
                self._on_freed(parts)
            case StepDone(step, _, outputs) if not self.failed and step in self.steps:
                self._count(outputs)
                self._abandon(step, outputs)
            case StepFailed(step) if not self.failed and step in self.steps:
                self._abandon(step, ())
            case _:
                pass

    def _on_freed(self, parts: Sequence[int]) -> None:
        for part in parts:
            self.in_flight -= self.alive.pop(part, 0)

    def _on_failed(self, step_id: int, error: HeadraceError) -> None:
        """Of a cancelled step a failure counts for nothing."""
        if not self._is_cancelled(step_id):
            raise error
        self._abandon(step_id, ())

    def _worker_died(self, worker: int, reason: str) -> WorkerDied:
        """The error that ends the run; the worker is gone from the tables."""
        state = self.workers.pop(worker, None)
        label = ""
        if state is not None:
            self.pools[state.pool].workers.pop(worker, None)
            self.pools[state.pool].remove(state)
            for step in state.running.values():
                if isinstance(step, Advance):
                    entry = self.open.get(step.split_index)
                    label = entry.split.label if entry else f"split {step.split_index}"
                else:
                    label = ", ".join(f"split {index}" for index in dict.fromkeys(index for index, _ in step.owners))
                label += f", stage {self.stages[step.stage].name}"
                break
        where = (("worker", str(worker)), ("doing", label or "nothing"))
        hint = "look for a crash in native code or the out-of-memory killer (dmesg); nothing half-written was published"
        return WorkerDied(f"worker {worker} died: {reason}", where=where, hint=hint)

    # ---------------------------------------------------------------- a step's answer

    def _retire_step(self, step_id: int) -> tuple[Step, tuple[Node, ...], CursorEntry | None]:
        step, nodes, cursor, reserved = self.steps.pop(step_id)
        self.reserved -= reserved
        self.producing[step.stage] -= 1
        worker = self.workers.get(step.worker)
        if worker is not None:
            worker.running.pop(step_id, None)
            self._file(worker)
        return step, nodes, cursor

    def _is_cancelled(self, step_id: int) -> bool:
        _, nodes, cursor, _ = self.steps[step_id]
        if cursor is not None:
            return cursor.state is CursorState.DONE
        return all(node.gone for node in nodes)

    def _abandon(self, step_id: int, outputs: tuple[BlockRef, ...]) -> None:
        """A cancelled step has ended: give back what it was given and what it made."""
        step, _, _ = self._retire_step(step_id)
        for block in (*step.inputs, *outputs):
            self._release(block.parts)

    def _count(self, outputs: tuple[BlockRef, ...]) -> None:
        for block in outputs:
            for part in block.parts:
                self.alive[part.id] = part.bytes
                self.in_flight += part.bytes

    def _on_done(self, event: StepDone) -> None:
        if event.step not in self.steps:
            raise InternalError(f"an answer to step {event.step}, which nobody waits for")
        self._count(event.outputs)
        if self._is_cancelled(event.step):
            self._abandon(event.step, event.outputs)
            return
        step, nodes, cursor = self._retire_step(event.step)
        self.measures[step.stage].update(event.timing.wall_s, len(step.inputs), event.outputs, event.finished)
        if isinstance(step, Apply):
            self._applied(step, nodes, event)
        else:
            assert cursor is not None
            self._advanced(cursor, event)
        if not self.ends_in_sink:
            self._deliver()

    def _applied(self, step: Apply, nodes: tuple[Node, ...], event: StepDone) -> None:
        stage = self.stages[step.stage]
        if len(event.outputs) != len(step.inputs):
            raise InternalError(f"stage {stage.name} answered {len(event.outputs)} blocks for {len(step.inputs)}")
        for node, given, made in zip(nodes, step.inputs, event.outputs, strict=True):
            if node.gone:
                self._release(made.parts)
                self._release(given.parts)
                continue
            kept: list[PartRef] = []
            for part in given.parts:
                columns = part.columns if stage.keep is None else tuple(c for c in part.columns if c in stage.keep)
                if columns:
                    kept.append(part if columns == part.columns else replace(part, columns=columns))
                else:
                    self._release((part,))
            self._place(node, stage, BlockRef(given.rows, (*kept, *made.parts), given.origin, given.cuts), node.key)
            node.split.unlink(node)
            if stage.end is End.DELIVER:  # a step over blocks of many splits has no tally of one split
                node.split.tally += Tally(written=given.rows)
        for split in {node.split: None for node in nodes if not node.split.closed}:
            self._poke_markers(split)

    def _advanced(self, cursor: CursorEntry, event: StepDone) -> None:
        stage, split = cursor.stage, cursor.split
        for block in cursor.fed:
            self._release(block.parts)
        cursor.fed = ()
        if event.tally is not _NO_ROWS:
            split.tally = split.tally + event.tally
        prefix = cursor.node.key
        for block in event.outputs:
            self._place(cursor.node, stage, block, (*prefix, cursor.made))
            cursor.made += 1
        cursor.more = event.more
        if event.finished:
            self._close_cursor(cursor)
            split.receipt = event.receipt or split.receipt
        else:
            cursor.state = CursorState.IDLE
            if not cursor.sequential:
                self._queue(cursor)
        if stage.limit is not None:
            self.passed[stage.id] += event.taken
        if event.finished and stage.order is Order.GLOBAL:
            self._leave_global(split, stage)
        if split.markers:
            self._poke_markers(split)
        if self.ends_in_sink and split.source_done and split.empty:
            self._settle(split)

    def _close_cursor(self, cursor: CursorEntry) -> None:
        cursor.state = CursorState.DONE
        self.cursors[cursor.stage.id] -= 1
        cursor.split.unlink(cursor.node)
        cursor.split.cursors.pop(cursor.id, None)
        if cursor.sequential:
            cursor.split.markers.pop(cursor.stage.id, None)
        if cursor is cursor.split.source:
            cursor.split.source_done = True
            worker = self.workers.get(cursor.worker) if cursor.worker is not None else None
            if worker is not None:
                worker.sources -= 1
                self._file(worker)

    def _place(self, before: Node, stage: Stage, block: BlockRef, key: tuple[int, ...]) -> None:
        """Put an output block of `stage` into the list, waiting for the next stage."""
        split = before.split
        following = split.following[stage.id]
        if following is None:
            raise InternalError(f"stage {stage.name} ends in a sink, yet it answered with blocks")
        node = Node(split, following, block, key)
        split.insert_before(before, node)
        self.waiting[following] += 1
        if following != DELIVER_STAGE and self.stages[following].order is Order.FREE:
            self._queue_block(node)

    # ---------------------------------------------------------------- sequences, delivery, settling

    def _poke_markers(self, split: SplitState) -> None:
        """Queue every sequential cursor of the split that has become runnable."""
        for cursor in split.markers.values():
            if cursor.state is CursorState.IDLE and self._marker_ready(cursor):
                self._queue(cursor)

    def _marker_ready(self, cursor: CursorEntry) -> bool:
        if cursor.stage.order is Order.GLOBAL and self.global_next[cursor.stage.id] != cursor.split.index:
            return False
        if cursor.more:
            return True
        if cursor.end_sent:
            return False
        node = cursor.node.next
        assert node is not None
        if node is cursor.split.tail:
            return cursor.split.source_done
        return node.block is not None and node.stage == cursor.stage.id

    def _deliver(self) -> None:
        """Give the consumer blocks from the head of the oldest split, as far as it has room; settle splits in order."""
        while (split := self.open.get(self.deliver_next)) is not None:
            node = split.head.next
            assert node is not None
            if node is split.tail and split.source_done:
                self._settle(split)
                continue
            if node.block is None or node.stage != DELIVER_STAGE:
                return
            if self.consumer_waiting >= self.limits.deliver_blocks:
                return
            split.unlink(node)
            self.waiting[DELIVER_STAGE] -= 1
            self.consumer_waiting += 1
            self._out.append(Deliver(split.index, node.block))
            self._release(node.block.parts)

    def _settle(self, split: SplitState) -> None:
        del self.open[split.index]
        split.closed = True
        self.settled += 1
        if not self.ends_in_sink:
            self.deliver_next = split.index + 1
        tally = split.tally
        if self.passed:  # what a limit cut may never have been read to its end: the rest is cut by definition
            gained = tally.rows_in + tally.expanded
            tally = replace(tally, cut=gained - tally.written - tally.filtered - tally.skipped - tally.quarantined)
        if not tally.balanced or tally.cut < 0:
            raise InternalError(f"the rows of {split.split.label} don't add up: {tally}")
        self._out.append(Settle(split.split, split.attempt, split.receipt, tally))

    # ---------------------------------------------------------------- limits and cancelling

    def _leave_global(self, split: SplitState, stage: Stage) -> None:
        """A split has passed a stage that takes splits one after the other: it is the next one's turn, or the limit's end."""
        self.global_next[stage.id] = split.index + 1
        self._cut_rest_of(split, stage)
        if stage.limit is not None and self.passed[stage.id] >= stage.limit:
            self._cancel_after(split.index)
        elif (later := self.open.get(split.index + 1)) is not None:
            self._poke_markers(later)

    def _cut_rest_of(self, split: SplitState, stage: Stage) -> None:
        """Nothing more of this split may pass the limit stage: drop what is before it."""
        for node in split.nodes():
            if node.cursor is not None:
                if node.cursor.stage.id < stage.id:
                    self._cancel_cursor(node.cursor)
            elif node.stage != DELIVER_STAGE and node.stage <= stage.id:
                self._drop_block(node)

    def _cancel_after(self, index: int) -> None:
        """The limit is reached in split `index`: later splits count for nothing."""
        self.enough = self.listing_done = True
        self.listed -= len(self.pending)
        self.pending.clear()
        self.pending_bytes = 0
        for split in [s for i, s in self.open.items() if i > index]:
            for node in split.nodes():
                if node.cursor is not None:
                    self._cancel_cursor(node.cursor)
                else:
                    self._drop_block(node)
            del self.open[split.index]
            split.closed = True
            self.settled += 1
            self._out.append(Settle(split.split, split.attempt, None, _NO_ROWS, cancelled=True))

    def _cancel_cursor(self, cursor: CursorEntry) -> None:
        if cursor.started and cursor.worker is not None:
            self._out.append(Drop(Discard(cursor.worker, cursor.id)))
        self._close_cursor(cursor)

    def _drop_block(self, node: Node) -> None:
        assert node.block is not None
        node.split.unlink(node)
        if not node.running:  # a running one is released with its step's answer
            self.waiting[node.stage] -= 1
            self._release(node.block.parts)

    def _release(self, parts: tuple[PartRef, ...]) -> None:
        if parts:
            self._out.append(Release(parts))
