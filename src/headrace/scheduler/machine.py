"""The scheduler's one mutator: `handle(event, now) -> [command]`.

How a decision is made: when a worker has a free slot, take the runnable work closest to commit (downstream first) that
its pool may do; work that makes blocks must be admitted (policy/admission.py); a new split is opened only by a
worker that reads no other. Nothing is re-derived per event: queues are kept per stage, and an event looks only at the
workers that it may have freed.

Liveness: the front of a split (nothing before it but blocks that wait for later stages) is admitted past full queues, the front
of the oldest split past the memory budget too, and when nothing runs at all the oldest work is started regardless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush

from headrace.core.errors import InternalError, WorkerDied
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import CPU_POOL
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.core.steps import Advance, Apply, Discard, PartsFreed, Step, StepDone, StepFailed, WorkerLost, WorkerUp
from headrace.scheduler.messages import (
    Command,
    ConsumerTook,
    Deliver,
    Drop,
    Event,
    Fail,
    Finish,
    Limits,
    ListSplits,
    Release,
    SchedulerPlan,
    Settle,
    SplitsListed,
    Start,
    Submit,
)
from headrace.scheduler.policy.admission import may_produce, producers_wanted, queue_target, within_budget
from headrace.scheduler.policy.routing import prefer_fused
from headrace.scheduler.state import DELIVER_STAGE, CursorEntry, CursorState, Node, SplitState, WorkerState

SHORT_STEP_S = 0.005  # below this a round trip (about 0.3 ms) matters, so a second step is queued ahead
FEED_BLOCKS = 16  # blocks given to a sequential cursor in one step
APPLY_BYTES = 32 << 20  # a model step gathers blocks up to this much, or the stage's batch_rows
APPLY_BLOCKS = 64
WAKE_AT_ONCE = 8  # idle workers tried per event beyond those that the event concerns


class _Measure:
    """Moving averages of a stage: seconds per block made, seconds per block taken, bytes made per step."""

    __slots__ = ("made_bytes", "make_s", "step_s", "take_s")

    def __init__(self, block_bytes: int) -> None:
        self.make_s = 0.0
        self.take_s = 0.0
        self.step_s = 0.0
        self.made_bytes = float(block_bytes)

    def update(self, wall_s: float, taken: int, made: int, made_bytes: int) -> None:
        self.step_s = _blend(self.step_s, wall_s)
        if taken:
            self.take_s = _blend(self.take_s, wall_s / taken)
        if made:
            self.make_s = _blend(self.make_s, wall_s / made)
            self.made_bytes = _blend(self.made_bytes, float(made_bytes))


def _blend(old: float, new: float) -> float:
    return new if old == 0.0 else old * 0.7 + new * 0.3


class Scheduler:
    """See the module. Public state is for invariants, display and tests; only `handle` changes it."""

    def __init__(self, plan: SchedulerPlan, limits: Limits | None = None) -> None:
        self.plan = plan
        self.limits = limits or Limits()
        self.stages = plan.stages
        self.following = {route.name: self._follow(route) for route in plan.routes}
        self.order = {pool: self._stage_order(pool) for pool in {s.pool for s in plan.stages} | {CPU_POOL}}
        self.workers: dict[int, WorkerState] = {}
        self.pool_workers: dict[str, dict[int, WorkerState]] = {}
        self.idle: dict[str, dict[int, None]] = {}
        self.pending: deque[Split] = deque()
        self.pending_bytes = 0
        self.open: dict[int, SplitState] = {}
        self.settled = 0
        self.listing = False
        self.listing_done = False
        self.shared: dict[int, list[tuple[int, int, Node | CursorEntry]]] = {s.id: [] for s in plan.stages}
        self.waiting: dict[int, int] = {s.id: 0 for s in plan.stages} | {DELIVER_STAGE: 0}
        self.producing: dict[int, int] = {s.id: 0 for s in plan.stages}
        self.stage_workers: dict[int, set[int]] = {s.id: set() for s in plan.stages if s.max_workers is not None}
        self.measures = {s.id: _Measure(self.limits.block_bytes) for s in plan.stages}
        self.steps: dict[int, tuple[Step, tuple[Node | None, ...], CursorEntry | None, int]] = {}
        self.alive: dict[int, int] = {}  # part id -> bytes, from its making until PartsFreed
        self.in_flight = 0
        self.reserved = 0
        self.passed = {s.id: 0 for s in plan.stages if s.limit is not None}
        self.global_next = {s.id: 0 for s in plan.stages if s.order is Order.GLOBAL}
        self.deliver_next = 0
        self.consumer_waiting = 0
        self.finished = False
        self.ends_in_sink = any(s.end is End.SINK for s in plan.stages)
        self._next_step = 0
        self._next_cursor = 0
        self._tie = 0
        self._out: list[Command] = []
        self._dirty: dict[int, None] = {}

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Take in one event; the commands are in the order in which they must be carried out."""
        del now  # no decision needs the time yet; retries and hang limits will
        self._out = out = []
        self._dirty.clear()
        if self.finished:
            self._late(event)
            return out
        match event:
            case StepDone():
                self._on_done(event)
            case PartsFreed(parts):
                self._on_freed(parts)
            case SplitsListed(splits, done):
                self.listing = False
                self.listing_done = self.listing_done or done
                if not self._limit_reached():
                    self.pending.extend(splits)
                    self.pending_bytes += sum(s.bytes for s in splits)
            case ConsumerTook(blocks):
                self.consumer_waiting -= blocks
                self._deliver()
            case WorkerUp(worker, pool):
                self._on_up(worker, pool)
            case StepFailed(step, _, error):
                entry = self.steps.get(step)
                if entry is not None and not self._is_cancelled(entry):
                    self._fail_with(Fail(error))
                elif entry is not None:
                    self._retire_step(step)
            case WorkerLost(worker, reason):
                self._on_lost(worker, reason)
            case Start():
                pass
        if not self.finished:
            self._dispatch()
        return out

    def _late(self, event: Event) -> None:
        """After the end only memory still matters."""
        if isinstance(event, PartsFreed):
            self._on_freed(event.parts)
        elif isinstance(event, StepDone):
            for block in event.outputs:
                self._out.append(Release(block.parts))

    def _on_freed(self, parts: Sequence[int]) -> None:
        for part in parts:
            self.in_flight -= self.alive.pop(part, 0)

    def _on_up(self, worker: int, pool: str) -> None:
        state = WorkerState(worker, pool)
        self.workers[worker] = state
        self.pool_workers.setdefault(pool, {})[worker] = state
        self.idle.setdefault(pool, {})[worker] = None
        self.order.setdefault(pool, self._stage_order(pool))
        self._dirty[worker] = None

    def _on_lost(self, worker: int, reason: str) -> None:
        state = self.workers.pop(worker, None)
        label = ""
        if state is not None:
            self.pool_workers[state.pool].pop(worker, None)
            self.idle[state.pool].pop(worker, None)
            for step in state.running.values():
                if isinstance(step, Advance):
                    entry = self.open.get(step.split_index)
                    label = entry.split.label if entry else f"split {step.split_index}"
                else:
                    label = ", ".join(f"split {index}" for index, _ in step.owners)
                label += f", stage {self.stages[step.stage].name}"
                break
        where = (("worker", str(worker)), ("doing", label or "nothing"))
        hint = "look for a crash in native code or the kernel's out-of-memory killer (dmesg); no half-written output was published"
        self._fail_with(Fail(WorkerDied(f"worker {worker} died: {reason}", where=where, hint=hint)))

    def _fail_with(self, fail: Fail) -> None:
        self._out.append(fail)
        self.finished = True

    # ---------------------------------------------------------------- a step's answer

    def _retire_step(self, step_id: int) -> tuple[Step, tuple[Node | None, ...], CursorEntry | None]:
        step, nodes, cursor, reserved = self.steps.pop(step_id)
        self.reserved -= reserved
        self.producing[step.stage] -= 1
        worker = self.workers.get(step.worker)
        if worker is not None:
            worker.running.pop(step_id, None)
            self._dirty[worker.id] = None
        return step, nodes, cursor

    def _is_cancelled(self, entry: tuple[Step, tuple[Node | None, ...], CursorEntry | None, int]) -> bool:
        _, nodes, cursor, _ = entry
        if cursor is not None:
            return cursor.state is CursorState.DONE
        return all(node is None or node.gone for node in nodes)

    def _on_done(self, event: StepDone) -> None:
        if event.step not in self.steps:
            raise InternalError(f"an answer to step {event.step}, which nobody waits for")
        step, nodes, cursor = self._retire_step(event.step)
        for block in event.outputs:
            for part in block.parts:
                self.alive[part.id] = part.bytes
                self.in_flight += part.bytes
        taken = len(step.inputs)
        made_bytes = sum(b.bytes for b in event.outputs)
        self.measures[step.stage].update(event.timing.wall_s, taken, len(event.outputs), made_bytes)
        if isinstance(step, Apply):
            self._applied(step, nodes, event)
        else:
            assert cursor is not None
            self._advanced(cursor, event)
        self._deliver()

    def _applied(self, step: Apply, nodes: tuple[Node | None, ...], event: StepDone) -> None:
        stage = self.stages[step.stage]
        if len(event.outputs) != len(step.inputs):
            raise InternalError(f"stage {stage.name} answered {len(event.outputs)} blocks for {len(step.inputs)}")
        for node, given, made in zip(nodes, step.inputs, event.outputs, strict=True):
            assert node is not None
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
            block = BlockRef(given.rows, (*kept, *made.parts), given.origin)
            self._place(node, stage, block)
            node.split.unlink(node)
            self._poke_markers(node.split)

    def _advanced(self, cursor: CursorEntry, event: StepDone) -> None:
        stage = cursor.stage
        for block in cursor.fed:
            self._release(block.parts)
        cursor.fed = ()
        split = cursor.split
        if cursor.state is CursorState.DONE:  # cancelled while it ran
            for block in event.outputs:
                self._release(block.parts)
            return
        split.tally = split.tally + event.tally
        for block in event.outputs:
            self._place(cursor.node, stage, block)
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
            self.global_next[stage.id] = split.index + 1
            self._cut_rest_of(split, stage)
            if self._limit_reached():
                self._cancel_after(split.index)
            elif (later := self.open.get(split.index + 1)) is not None:
                self._poke_markers(later)
        self._poke_markers(split)
        if self.ends_in_sink and split.source_done and split.empty:
            self._settle(split)

    def _close_cursor(self, cursor: CursorEntry) -> None:
        cursor.state = CursorState.DONE
        cursor.split.unlink(cursor.node)
        cursor.split.cursors.pop(cursor.id, None)
        cursor.split.markers.pop(cursor.stage.id, None)
        if cursor is cursor.split.source:
            cursor.split.source_done = True
            worker = self.workers.get(cursor.worker) if cursor.worker is not None else None
            if worker is not None:
                worker.sources -= 1
                self._dirty[worker.id] = None

    def _place(self, before: Node, stage: Stage, block: BlockRef) -> None:
        """Put an output block of `stage` into the list, waiting for the next stage."""
        split = before.split
        following = split.following[stage.id]
        assert following is not None
        node = Node(split, following, block)
        split.insert_before(before, node)
        self.waiting[following] += 1
        if following != DELIVER_STAGE and self.stages[following].order is Order.FREE:
            self._queue_shared(following, split.index, node)

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
        return node.block is not None and node.stage == cursor.stage.id and not node.running

    def _deliver(self) -> None:
        """Give the consumer blocks from the head of the oldest split, as far as it has room; settle splits in order."""
        while not self.ends_in_sink and (split := self.open.get(self.deliver_next)) is not None:
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
        self.settled += 1
        if not self.ends_in_sink:
            self.deliver_next = split.index + 1
        tally = split.tally
        if self.passed:  # what a limit cut may never have been read to its end: the rest is cut by definition
            gained = tally.rows_in + tally.expanded
            tally = replace(tally, cut=gained - tally.written - tally.filtered - tally.skipped - tally.quarantined)
        if not tally.balanced:
            self._fail_with(Fail(InternalError(f"the rows of {split.split.label} don't add up: {tally}")))
            return
        self._out.append(Settle(split.split, split.attempt, split.receipt, tally))

    # ---------------------------------------------------------------- limits and cancelling

    def _limit_reached(self) -> bool:
        return any(passed >= (self.stages[stage].limit or 0) for stage, passed in self.passed.items())

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
        self.pending.clear()
        self.pending_bytes = 0
        self.listing_done = True
        for split in [s for i, s in self.open.items() if i > index]:
            for node in split.nodes():
                if node.cursor is not None:
                    self._cancel_cursor(node.cursor)
                else:
                    self._drop_block(node)
            del self.open[split.index]
            self.settled += 1
            self._out.append(Settle(split.split, split.attempt, None, Tally(), cancelled=True))

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

    # ---------------------------------------------------------------- queues

    def _queue(self, cursor: CursorEntry) -> None:
        """A runnable cursor: to its worker's own heap once it has one, else to the stage's."""
        cursor.state = CursorState.QUEUED
        if cursor.worker is None:
            self._queue_shared(cursor.stage.id, cursor.split.index, cursor)
            return
        worker = self.workers.get(cursor.worker)
        if worker is None:
            return  # it died; the run is ending
        self._tie += 1
        heappush(worker.bound.setdefault(cursor.stage.id, []), (cursor.split.index, self._tie, cursor))
        self._dirty[worker.id] = None

    def _queue_shared(self, stage: int, split: int, item: Node | CursorEntry) -> None:
        self._tie += 1
        heappush(self.shared[stage], (split, self._tie, item))

    def _top_shared(self, stage: int) -> Node | CursorEntry | None:
        """The oldest runnable item; entries made void by a cancel are dropped on the way."""
        heap = self.shared[stage]
        while heap:
            item = heap[0][2]
            alive = not item.gone if isinstance(item, Node) else item.state is CursorState.QUEUED
            if alive:
                return item
            heappop(heap)
        return None

    def _top_bound(self, worker: WorkerState, stage: int) -> CursorEntry | None:
        heap = worker.bound.get(stage)
        while heap:
            cursor = heap[0][2]
            if cursor.state is CursorState.QUEUED:
                return cursor
            heappop(heap)
        return None

    def _release(self, parts: tuple[PartRef, ...]) -> None:
        if parts:
            self._out.append(Release(parts))

    # ---------------------------------------------------------------- dispatch

    def _dispatch(self) -> None:
        self._ask_for_splits()
        for worker in list(self._dirty):
            self._fill(worker)
        for idle in self.idle.values():
            for _ in range(min(len(idle), WAKE_AT_ONCE) if len(idle) > 4 * WAKE_AT_ONCE else len(idle)):
                if not idle:
                    break
                worker = next(iter(idle))
                self._fill(worker)
                if worker in idle:  # still has a free slot: to the back of the line
                    del idle[worker]
                    idle[worker] = None
        if not self.steps:
            self._start_something()
        if self.listing_done and not self.pending and not self.open and not self.finished:
            self.finished = True
            self._out.append(Finish())

    def _ask_for_splits(self) -> None:
        if self._limit_reached():
            self.listing_done = True
        ahead = 2 * max(1, len(self.pool_workers.get(CPU_POOL, ()))) + 2
        if not self.listing and not self.listing_done and len(self.pending) < ahead:
            self.listing = True
            self._out.append(ListSplits(2 * ahead))

    def _depth(self, worker: WorkerState) -> int:
        if worker.pool != CPU_POOL:
            return 2
        for step in worker.running.values():
            measured = self.measures[step.stage].step_s
            return 2 if 0.0 < measured < SHORT_STEP_S else 1
        return 1

    def _fill(self, worker_id: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is None:
            return
        while len(worker.running) < self._depth(worker) and self._start_one(worker):
            pass
        idle = self.idle[worker.pool]
        if len(worker.running) < self._depth(worker):
            idle.setdefault(worker.id, None)
        else:
            idle.pop(worker.id, None)

    def _start_one(self, worker: WorkerState, forced: bool = False) -> bool:
        for stage in self.order[worker.pool]:
            if self._closed_to(worker, stage):
                continue
            cursor = self._top_bound(worker, stage.id)
            if cursor is not None and (forced or self._admit(stage, cursor.node)):
                heappop(worker.bound[stage.id])
                self._submit_advance(worker, cursor)
                return True
            item = self._top_shared(stage.id)
            if item is not None:
                node = item if isinstance(item, Node) else item.node
                if forced or self._admit(stage, node):
                    self._start_shared(worker, stage, item)
                    return True
            if stage.order is Order.SOURCE and self._may_open(worker, stage, forced):
                self._open_next(worker, stage)
                return True
        return False

    def _closed_to(self, worker: WorkerState, stage: Stage) -> bool:
        if stage.max_workers is None:
            return False
        members = self.stage_workers[stage.id]
        return worker.id not in members and len(members) >= stage.max_workers

    def _start_shared(self, worker: WorkerState, stage: Stage, item: Node | CursorEntry) -> None:
        if isinstance(item, CursorEntry):
            heappop(self.shared[stage.id])
            self._submit_advance(worker, item)
        elif stage.model:
            self._submit_apply(worker, stage)
        else:
            heappop(self.shared[stage.id])
            self.waiting[stage.id] -= 1
            cursor = self._new_cursor(stage, item.split)
            assert item.block is not None
            cursor.fed = (item.block,)
            item.split.replace(item, cursor.node)
            self._submit_advance(worker, cursor)

    # ---------------------------------------------------------------- admission

    def _admit(self, stage: Stage, node: Node) -> bool:
        """May this stage make blocks now, from this place of its split?"""
        if stage.end is End.SINK:
            return True
        following = node.split.following[stage.id]
        assert following is not None
        queues = self._queues_allow(stage, following)
        room = self._room_for(stage)
        if queues and room:
            return True
        if not self._is_front(node, stage):
            return False
        return room or node.split.index == next(iter(self.open))

    def _queues_allow(self, stage: Stage, following: int) -> bool:
        waiting = self.waiting[following]
        if following == DELIVER_STAGE:
            return waiting < queue_target(CPU_POOL, len(self.pool_workers.get(CPU_POOL, ())))
        consumer = self.stages[following]
        members = self.pool_workers.get(consumer.pool, {})
        count = len(members)
        if consumer.pool == stage.pool:
            return waiting < queue_target(consumer.pool, count)
        starving = count <= 64 and any(not w.running for w in members.values())
        wanted = producers_wanted(count, self.measures[stage.id].make_s, self.measures[following].take_s)
        return may_produce(
            waiting=waiting,
            target=queue_target(consumer.pool, count),
            producing=self.producing[stage.id],
            wanted=wanted,
            starving=starving,
        )

    def _room_for(self, stage: Stage) -> bool:
        return within_budget(
            in_flight=self.in_flight,
            reserved=self.reserved,
            expected=int(self.measures[stage.id].made_bytes),
            budget=self.limits.budget_bytes,
        )

    def _is_front(self, node: Node, stage: Stage) -> bool:
        """Nothing of the split stands before the node but markers and at most a few blocks that wait for later stages."""
        before = node.prev
        blocks = 0
        while before is not None and before is not node.split.head:
            if before.cursor is not None:
                if not before.cursor.sequential:
                    return False
            elif (before.stage != DELIVER_STAGE and before.stage <= stage.id) or blocks >= 4:
                return False
            else:
                blocks += 1
            before = before.prev
        return True

    def _may_open(self, worker: WorkerState, stage: Stage, forced: bool) -> bool:
        if not self.pending or worker.sources > 0 or self._route_of_next().stages[0] != stage.id:
            return False
        if forced or not self.open or stage.end is End.SINK:
            return True
        if len(self.open) >= 4 * len(self.workers) + 16:
            return False
        following = self.following[self._route_of_next().name][stage.id]
        assert following is not None
        return self._queues_allow(stage, following) and self._room_for(stage)

    def _route_of_next(self) -> Route:
        routes = self.plan.routes
        if len(routes) == 1:
            return routes[0]
        split = self.pending[0]
        fused = prefer_fused(
            split_bytes=split.bytes,
            left_bytes=self.pending_bytes - split.bytes,
            left_splits=len(self.pending) - 1,
            listing_done=self.listing_done,
            workers=len(self.pool_workers.get(CPU_POOL, ())),
        )
        return routes[0] if fused else routes[-1]

    # ---------------------------------------------------------------- submitting

    def _new_cursor(self, stage: Stage, split: SplitState) -> CursorEntry:
        self._next_cursor += 1
        cursor = CursorEntry(self._next_cursor, stage, split)
        split.cursors[cursor.id] = cursor
        return cursor

    def _open_next(self, worker: WorkerState, stage: Stage) -> None:
        route = self._route_of_next()
        split = self.pending.popleft()
        self.pending_bytes -= split.bytes
        state = SplitState(split, 1, self.following[route.name])
        self.open[split.index] = state
        for stage_id in reversed(route.stages[1:]):
            sequence = self.stages[stage_id]
            if sequence.order in (Order.SPLIT, Order.GLOBAL):
                marker = self._new_cursor(sequence, state)
                state.markers[stage_id] = marker
                state.insert_before(state.tail, marker.node)
        source = self._new_cursor(stage, state)
        state.source = source
        state.insert_before(state.tail, source.node)
        worker.sources += 1
        self._submit_advance(worker, source)

    def _submit_advance(self, worker: WorkerState, cursor: CursorEntry) -> None:
        stage, split = cursor.stage, cursor.split
        end = True
        if cursor.sequential:
            end = self._feed(cursor)
        first = not cursor.started
        named = first and (stage.order is Order.SOURCE or stage.end is End.SINK)
        limit_left = None if stage.limit is None else stage.limit - self.passed[stage.id]
        self._next_step += 1
        step = Advance(
            id=self._next_step,
            worker=worker.id,
            stage=stage.id,
            cursor=cursor.id,
            split_index=split.index,
            attempt=split.attempt,
            split=split.split if named else None,
            inputs=cursor.fed,
            end=end,
            credit_bytes=self.limits.credit_bytes,
            credit_s=self.limits.slice_s,
            limit_left=limit_left,
        )
        cursor.started = True
        cursor.more = False
        cursor.end_sent = end
        cursor.worker = worker.id
        cursor.state = CursorState.RUNNING
        self._submit(worker, step, (), cursor)

    def _feed(self, cursor: CursorEntry) -> bool:
        """Take the blocks that follow the marker into `fed`; true when no input will come after them."""
        fed: list[BlockRef] = []
        split = cursor.split
        node = cursor.node.next
        assert node is not None
        while len(fed) < FEED_BLOCKS and node.block is not None and node.stage == cursor.stage.id and not node.running:
            fed.append(node.block)
            self.waiting[node.stage] -= 1
            following = node.next
            assert following is not None
            split.unlink(node)
            node = following
        cursor.fed = tuple(fed)
        return node is split.tail and split.source_done

    def _submit_apply(self, worker: WorkerState, stage: Stage) -> None:
        nodes: list[Node] = []
        rows = size = 0
        while len(nodes) < APPLY_BLOCKS and rows < stage.batch_rows and size < APPLY_BYTES:
            node = self._top_shared(stage.id)
            if node is None:
                break
            assert isinstance(node, Node)
            assert node.block is not None
            heappop(self.shared[stage.id])
            self.waiting[stage.id] -= 1
            node.running = True
            nodes.append(node)
            rows += node.block.rows
            size += node.block.bytes
        self._next_step += 1
        step = Apply(
            id=self._next_step,
            worker=worker.id,
            stage=stage.id,
            inputs=tuple(n.block for n in nodes if n.block is not None),
            owners=tuple((n.split.index, n.split.attempt) for n in nodes),
        )
        self._submit(worker, step, tuple(nodes), None)

    def _submit(self, worker: WorkerState, step: Step, nodes: tuple[Node, ...], cursor: CursorEntry | None) -> None:
        stage = self.stages[step.stage]
        reserved = 0 if stage.end is End.SINK else int(self.measures[stage.id].made_bytes)
        self.reserved += reserved
        self.producing[stage.id] += 1
        if stage.max_workers is not None:
            self.stage_workers[stage.id].add(worker.id)
        self.steps[step.id] = (step, nodes, cursor, reserved)
        worker.running[step.id] = step
        self._out.append(Submit(step))

    def _start_something(self) -> None:
        """Nothing runs: start the oldest work regardless of queues and budget, or say why there is none."""
        if self.finished or not (self.open or self.pending):
            return
        if any(not self.pool_workers.get(pool) for pool in self.plan.pools):
            return  # workers are still coming up
        for worker in self.workers.values():
            if self._start_one(worker, forced=True):
                self._fill(worker.id)
                return
        if self.consumer_waiting or (self.listing and not self.open):
            return
        waits = ", ".join(f"{self.stages[s].name}: {n}" for s, n in self.waiting.items() if n and s != DELIVER_STAGE)
        self._fail_with(Fail(InternalError(f"the run has stalled with {len(self.open)} open splits ({waits or 'no block waits'})")))

    # ---------------------------------------------------------------- tables made once

    def _follow(self, route: Route) -> dict[int, int | None]:
        following: dict[int, int | None] = {}
        for here, there in zip(route.stages, (*route.stages[1:], None), strict=True):
            ends = self.plan.stages[here].end
            following[here] = DELIVER_STAGE if ends is End.DELIVER else there
        return following

    def _stage_order(self, pool: str) -> tuple[Stage, ...]:
        """The pool's stages, the one closest to commit first. Stage ids grow along every route."""
        return tuple(sorted((s for s in self.plan.stages if s.pool == pool), key=lambda s: -s.id))
