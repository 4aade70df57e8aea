"""What starts next: the scheduler's queues and pools, and the choice of work for workers that have room.

Stages are looked at from the end of the plan to its start, so the work closest to commit goes first; within a stage the
oldest split goes first. Splits that one worker does alone go before blocks that any may take: else those are shared, and what
can't be is left to the end. One pass is enough: starting a stage's work only takes blocks from its own queue, which may let
earlier stages (looked at later) start, and takes room and workers, which can't let later stages start.

`machine.py` builds on this and says what becomes of the answers. Nothing here handles an event.

Invariants: `waiting` counts the blocks in lists that wait for a stage; after `_dispatch` no worker is idle while there is
admitted work that it may do.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import islice

from headrace.core.errors import InternalError
from headrace.core.refs import BlockRef
from headrace.core.resources import CPU_POOL
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Route, Stage
from headrace.core.steps import Advance, Apply, Step
from headrace.scheduler.measure import Measure
from headrace.scheduler.messages import Command, Finish, Limits, ListSplits, SchedulerPlan, Submit
from headrace.scheduler.policy.admission import may_produce, producers_wanted, queue_target, within_budget
from headrace.scheduler.policy.routing import MANY_SPLITS, prefer_fused
from headrace.scheduler.state import (
    DELIVER_STAGE,
    MAX_DEPTH,
    CursorEntry,
    CursorState,
    Node,
    PoolState,
    QueueEntry,
    SplitState,
    WorkerState,
)

SHORT_STEP_S = 0.005  # steps up to this long are queued ahead, as many as take so long: a round trip is about 0.3 ms
STREAM_STEPS = 64  # steps of streaming models that a worker may have under way at once,
STREAM_ROWS = 16_384  # and their rows: requests of any sensible number find work beside many rows that take long
DEVICE_DEPTH = 2  # steps that a device may hold: one runs, one is queued behind it
FEED_BLOCKS = 16  # blocks given to a sequential cursor in one step
APPLY_BYTES = 32 << 20  # a model step gathers blocks up to this much, or the stage's batch_rows;
WANTED_BYTES = 256 << 20  # up to this much when its model has said how many rows it wants
APPLY_BLOCKS = 64
MOST_AHEAD = 16  # blocks for each worker that a reader makes ahead: should whoever takes them stall, no more wait
LIST_AHEAD = 512  # splits known beforehand: share done and time left are exact where there are no more; about 5 kB each
RUN_AHEAD_BYTES = 16 << 20  # of blocks, for each worker, that may wait for one before them
WARM_STEPS = 2  # of each worker at a stage, which end after one block: the sooner the run's model and its consumer begin
FRONT_BLOCKS = 4  # past the budget, blocks of the oldest split that may wait before its front makes more
MOST_READING = 256  # open splits that are looked at when the route of the next one is chosen
OPEN_PER_WORKER = 4  # open splits per worker, beyond 16: a bound for splits that wait for others, as behind a limit


StepEntry = tuple[Step, tuple[Node, ...], CursorEntry | None, int]  # (step, an Apply's nodes, an Advance's cursor, reserved)


class Dispatcher:
    """The scheduler's tables and its choices. Public state is for invariants, display and tests."""

    def __init__(self, plan: SchedulerPlan, limits: Limits | None = None) -> None:
        self.plan = plan
        self.limits = limits or Limits()
        self.stages = plan.stages
        self.following = {route.name: self._follow(route) for route in plan.routes}
        self.downstream_first = _in_turn(plan)
        self.feeders = self._feeders()
        self.workers: dict[int, WorkerState] = {}
        names = dict.fromkeys((CPU_POOL, *plan.pools, *(s.pool for s in plan.stages)))
        self.pools: dict[str, PoolState] = {name: PoolState() for name in names}
        self.starting = dict(plan.pools)  # pool -> workers that are not up yet
        self.pending: deque[Split] = deque()
        self.pending_bytes = 0
        self.open: OrderedDict[int, SplitState] = OrderedDict()  # oldest first; it is asked for the first one all the time
        self.listed = 0
        self.settled: int = 0
        self.listing = False
        self.enough = any(s.limit == 0 for s in plan.stages)  # a limit is reached: no further split counts
        self.listing_done = self.enough
        self.shared: dict[int, list[QueueEntry]] = {s.id: [] for s in plan.stages}  # blocks of free stages, unbound cursors
        self.near: dict[tuple[int, str], list[QueueEntry]] = {}  # (stage, node) -> blocks in `shared` that lie there
        self.passed_over = dict.fromkeys(self.shared, 0)  # stage -> times that a block nearer than the oldest was taken
        self.bound: dict[int, list[QueueEntry]] = {s.id: [] for s in plan.stages}  # cursors that have their worker
        self.waiting: dict[int, int] = {s.id: 0 for s in plan.stages} | {DELIVER_STAGE: 0}
        self.producing: dict[int, int] = {s.id: 0 for s in plan.stages}
        self.cursors: dict[int, int] = {s.id: 0 for s in plan.stages}  # open cursors of each stage
        self.stage_workers: dict[int, set[int]] = {s.id: set() for s in plan.stages if s.max_workers is not None}
        self.advanced: dict[int, int] = {s.id: 0 for s in plan.stages}  # steps of its cursors
        self.measures = {s.id: Measure(self.limits.block_bytes) for s in plan.stages}
        self.wanted_rows: dict[int, int] = {}  # model stage -> rows for one step, as its workers said last
        self.steps: dict[int, StepEntry] = {}
        self.in_flight: int = 0
        self.reserved = 0
        self.passed = {s.id: 0 for s in plan.stages if s.limit is not None}
        self.global_next = {s.id: 0 for s in plan.stages if s.order is Order.GLOBAL}  # whose turn it is
        self.settled_turns: dict[int, set[int]] = {stage: set() for stage in self.global_next}  # settled by earlier sessions
        self.in_order = any(s.limit is not None for s in plan.stages)  # then splits are settled one after the other
        self.consumer_waiting: int = 0
        self.pressure = 0
        self.draining = False
        self.finished = False
        self._next_step = 0
        self._next_cursor = 0
        self._tie = 0
        self._out: list[Command] = []

    # ---------------------------------------------------------------- the pass

    def _dispatch(self) -> None:
        self._ask_for_splits()
        for stage, following in self.feeders:
            if self.bound[stage.id]:
                self._feed_first(stage, following)
        for stage in self.downstream_first:
            if (self.bound[stage.id] or self.shared[stage.id]) and self.pools[stage.pool].has_room:
                self._start_stage(stage)
        if self.pending and not self.draining:
            self._open_splits()
        nothing_left = self.listing_done and not self.pending
        if not self.open and (nothing_left or self.draining):
            self.finished = True
            self._out.append(Finish(drained=not nothing_left))
        elif not self.steps:
            self._explain_stillness()

    def _ask_for_splits(self) -> None:
        if self.listing or self.listing_done or self.draining:
            return
        # Routes are chosen by whether there is a split for each worker; of very many workers not all must have theirs in sight.
        workers = min(max(1, self.pools[CPU_POOL].awake), MANY_SPLITS)
        ahead = workers + max(workers // 4, min(workers, LIST_AHEAD)) + 2
        if self.listed == 0:  # a few at once, so that work starts; then enough to know the whole of most runs
            self.listing = True
            self._out.append(ListSplits(2 * ahead))
        elif len(self.pending) < max(ahead, LIST_AHEAD // 2):
            self.listing = True
            self._out.append(ListSplits(max(LIST_AHEAD, ahead - len(self.pending) + workers // 8)))

    def _feed_first(self, stage: Stage, following: int) -> None:
        """Let a cursor go on before its worker takes up the blocks that it makes, if others would have nothing to do else.

        A cursor runs in one worker only, its blocks run anywhere: workers that have no cursor of this stage live on them.
        """
        ahead = self._ahead(stage, following)
        while self.waiting[following] + self.producing[stage.id] <= ahead and ahead and self._room_for(stage):
            entry = self._top_bound(stage.id)
            if entry is None or not self._start_bound(stage, entry):
                return

    def _ahead(self, stage: Stage, following: int) -> int:
        """Blocks that keep the workers without a cursor of the stage at work until a cursor that is to go on has made more: its
        worker first ends the step that it is at.
        """
        others = self.pools[stage.pool].awake - self.cursors[stage.id]
        make_s, take_s = self.measures[stage.id].step_s, self.measures[following].step_s
        return others if take_s <= 0.0 else others * (1 + min(MOST_AHEAD, round(make_s / take_s)))

    def _start_stage(self, stage: Stage) -> None:
        """Start what this stage may start, the oldest first."""
        while True:
            bound, shared = self._top_bound(stage.id), self._top_shared(stage.id)
            if bound is not None and (shared is None or bound < shared):
                started = self._start_bound(stage, bound) or (shared is not None and self._start_shared(stage, shared))
            elif shared is not None:
                started = self._start_shared(stage, shared) or (bound is not None and self._start_bound(stage, bound))
            else:
                return
            if not started:
                return

    def _start_bound(self, stage: Stage, entry: QueueEntry) -> bool:
        cursor = entry[3]
        assert isinstance(cursor, CursorEntry)
        assert cursor.worker is not None
        if not self._admit(stage, cursor.node) or self._is_enough(stage.pool):
            return False
        heappop(self.bound[stage.id])
        self._submit_advance(self.workers[cursor.worker], cursor)
        return True

    def _start_shared(self, stage: Stage, entry: QueueEntry) -> bool:
        item = entry[3]
        worker = self._pick(stage, item)
        if worker is None or self._is_enough(stage.pool):
            return False
        if isinstance(item, CursorEntry):
            if not self._admit(stage, item.node):
                return False
            heappop(self.shared[stage.id])
            self._submit_advance(worker, item)
            return True
        closer = self._closer(stage, worker, entry)
        if closer is not entry and self._admit(stage, found := _block(closer)):
            item = found
        elif self._admit(stage, item):
            closer = entry
        else:
            return False
        if stage.model:
            self._submit_apply(worker, stage, closer)
            return True
        self._take(stage, worker, closer)
        cursor = self._new_cursor(stage, item.split)
        assert item.block is not None
        cursor.fed = (item.block,)
        cursor.node.key = item.key
        item.split.replace(item, cursor.node)
        self._submit_advance(worker, cursor)
        return True

    def _is_enough(self, pool: str) -> bool:
        """Memory is nearly used up, and the pool has a step running: another one would need more."""
        return self.pressure >= 2 and bool(self.pools[pool].busy)

    def _pick(self, stage: Stage, item: Node | CursorEntry) -> WorkerState | None:
        """Who shall do this shared piece of the stage's work: with max_workers, its own workers as far as they are free."""
        pool = self.pools[stage.pool]
        near = self._near(stage, item) if pool.spread else ""
        if stage.max_workers is None:
            return pool.pick(near)
        members = self.stage_workers[stage.id]
        free = [w for i in members if (w := self.workers.get(i)) is not None and w.place is not None and not w.resting]
        best = min(free, key=lambda w: (len(w.running), w.node != near), default=None)
        if best is not None and (not best.running or len(members) >= stage.max_workers):
            return best
        if len(members) >= stage.max_workers and not all(self.workers[i].resting for i in members):
            return None
        other = pool.pick(near)
        return other if best is None or (other is not None and not other.running) else best

    def _closer(self, stage: Stage, worker: WorkerState, oldest: QueueEntry) -> QueueEntry:
        """The oldest block on the worker's own node, in the place of the oldest of all. The oldest split waits for nobody,
        others for a turn of the whole pool.
        """
        pool = self.pools[stage.pool]
        if not pool.spread or oldest[0] == next(iter(self.open)) or self.passed_over[stage.id] >= pool.awake:
            return oldest
        heap = self.near.get((stage.id, worker.node))
        while heap:
            if _is_waiting(heap[0][3]):
                return heap[0]
            heappop(heap)
        return oldest

    def _take(self, stage: Stage, worker: WorkerState, entry: QueueEntry) -> None:
        """The block leaves its queue."""
        self.waiting[stage.id] -= 1
        if self.shared[stage.id][0] is entry:
            heappop(self.shared[stage.id])
            self.passed_over[stage.id] = 0
        else:  # `_top_shared` will find it void
            heappop(self.near[stage.id, worker.node])
            self.passed_over[stage.id] += 1

    def _join(self, stage: Stage, worker: WorkerState) -> None:
        """The worker opens a stage that few may open. It takes the place of one that rests when none is left; a cursor that
        goes on in a worker which has lost its place takes none.
        """
        assert stage.max_workers is not None
        members = self.stage_workers[stage.id]
        if worker.id in members:
            return
        if len(members) >= stage.max_workers:
            asleep = next((i for i in members if self.workers[i].resting), None)
            if asleep is None or worker.resting:
                return
            members.remove(asleep)
        members.add(worker.id)

    def _near(self, stage: Stage, item: Node | CursorEntry) -> str:
        """The node that holds most of what a step on this item would read; "" when it reads nothing, or nobody knows."""
        found: dict[str, int] = {}
        if isinstance(item, Node):
            assert item.block is not None
            read = stage.columns_in if stage.model else None
            for part in item.block.parts:
                if read is None or any(column in read for column in part.columns):
                    found[part.node] = found.get(part.node, 0) + part.bytes
        elif item.sequential:
            node, blocks = item.node.next, 0
            while node is not None and node.block is not None and node.stage == stage.id and blocks < FEED_BLOCKS:
                for part in node.block.parts:
                    found[part.node] = found.get(part.node, 0) + part.bytes
                node, blocks = node.next, blocks + 1
        return max(found, key=lambda name: found[name], default="")

    def _explain_stillness(self) -> None:
        """Nothing runs: something will come (a worker, the listing, the consumer), or the fault is ours."""
        if not self.open and not self.pending:
            return
        if self.consumer_waiting or any(not self.pools[pool].awake for pool in self.plan.pools):
            return  # workers that rest may wake, or be lost
        if self.limits.bulk and self.listing:
            return
        waits = ", ".join(f"{self.stages[s].name}: {n}" for s, n in self.waiting.items() if n and s != DELIVER_STAGE)
        raise InternalError(f"the run has stalled with {len(self.open)} open splits ({waits or 'no block waits'})")

    # ---------------------------------------------------------------- admission

    def _admit(self, stage: Stage, node: Node) -> bool:
        """May this stage make blocks now, from this place of its split?

        Queues may be full of blocks that wait for their turn. So the oldest split has queues of its own, as it were, and any
        split whose sequence waits for just this place may go on. Past the memory budget only the oldest split's front may.
        """
        if self.limits.bulk and not self._is_materialised(stage):
            return False
        if stage.end is End.SINK:
            return True
        split = node.split
        following = split.following[stage.id]
        assert following is not None
        room = self._room_for(stage)
        if room and self._queues_allow(stage, following):
            return True
        if split is next(iter(self.open.values())):
            if self._is_front(node, stage, FRONT_BLOCKS):
                return True
            return room and self._few_before(node, following, self._target(stage, following))
        if not room:
            return False
        return following != DELIVER_STAGE and self.stages[following].order is Order.SPLIT and self._is_front(node, stage, 0)

    def _is_materialised(self, stage: Stage) -> bool:
        """Has all been made that stages before this one make, of all splits?"""
        if stage.order is Order.SOURCE:
            return True
        if not self.draining and (self.pending or not self.listing_done):
            return False
        route = self.plan.routes[-1].stages
        before = route[: route.index(stage.id)]
        return not any(self.cursors[s] or self.producing[s] or self.waiting[s] for s in before)

    def _queues_allow(self, stage: Stage, following: int) -> bool:
        if self.limits.bulk and following != DELIVER_STAGE:
            return True
        waiting, target = self.waiting[following], self._target(stage, following)
        if stage.stream and following != DELIVER_STAGE and self.stages[following].order is Order.SPLIT:
            return self._has_spare(stage, following)  # a row that takes long holds back what waits behind it, not the model
        if following == DELIVER_STAGE or self.stages[following].order is Order.GLOBAL:
            return waiting < target or self._wanted_ahead(stage, following)
        if waiting >= target and self._may_run_ahead(stage, following):
            return True
        if self.stages[following].pool == stage.pool:
            return waiting < (max(target, self._ahead(stage, following)) if (stage, following) in self.feeders else target)
        pool = self.pools[self.stages[following].pool]
        wanted = producers_wanted(pool.awake, self.measures[stage.id].make_s, self.measures[following].take_s)
        producing = self.producing[stage.id]
        return may_produce(waiting=waiting, target=target, producing=producing, wanted=wanted, starving=pool.starving)

    def _may_run_ahead(self, stage: Stage, following: int) -> bool:
        """Blocks are taken in each split's sequence: what waits may wait for one that another worker is slow on. As long as it
        is little, the others go on.
        """
        if stage.order is not Order.FREE or self.stages[following].order is not Order.SPLIT:
            return False
        waiting_bytes = self.waiting[following] * self.measures[stage.id].made_bytes
        return waiting_bytes <= RUN_AHEAD_BYTES * self.pools[stage.pool].awake and self._has_spare(stage, following)

    def _wanted_ahead(self, stage: Stage, following: int) -> bool:
        """Blocks are taken in the order of splits, and the taker could take more: other splits make theirs meanwhile."""
        if not self._has_spare(stage, following):
            return False
        if following == DELIVER_STAGE:
            return self.consumer_waiting < self.limits.deliver_blocks
        taker = self.stages[following]
        rows_known = self.waiting[following] * self.measures[stage.id].made_rows
        if taker.limit is not None and self.passed[following] + rows_known >= taker.limit:
            return False
        after = next(f[following] for f in self.following.values() if following in f)
        return after is None or self.waiting[after] < self._target(taker, after)

    def _has_spare(self, stage: Stage, following: int) -> bool:
        """Is there memory beyond what the oldest split may need, on all workers, to go on?"""
        kept = self._target(stage, following) * self.measures[stage.id].made_bytes
        return self.in_flight + self.reserved + kept <= self.limits.budget_bytes

    def _target(self, stage: Stage, following: int) -> int:
        """Blocks of `stage` that may wait for the stage `following`."""
        if following == DELIVER_STAGE:
            return queue_target(CPU_POOL, self.pools[CPU_POOL].awake)
        consumer = self.stages[following]
        made_rows = self.measures[stage.id].made_rows
        per_step = 1
        if consumer.model and made_rows:
            per_step = min(APPLY_BLOCKS, max(1, round(self._step_rows(consumer) / made_rows)))
        return queue_target(consumer.pool, self.pools[consumer.pool].awake, per_step)

    def _step_rows(self, stage: Stage) -> int:
        """Rows worth gathering for one Apply: as planned, or more when its workers want more."""
        return max(stage.batch_rows, self.wanted_rows.get(stage.id, 0))

    def _room_for(self, stage: Stage) -> bool:
        if self.limits.bulk and DELIVER_STAGE not in (f.get(stage.id) for f in self.following.values()):
            return True  # `_spill` makes room
        return not self.pressure and within_budget(
            in_flight=self.in_flight,
            reserved=self.reserved,
            expected=int(self.measures[stage.id].made_bytes),
            budget=self.limits.budget_bytes,
        )

    def _is_front(self, node: Node, stage: Stage, most: int) -> bool:
        """Nothing of the split stands before the node but markers and at most `most` blocks that wait for later stages."""
        before = node.prev
        blocks = 0
        while before is not None and before is not node.split.head:
            if before.cursor is not None:
                if not before.cursor.sequential:
                    return False
            elif (before.stage != DELIVER_STAGE and before.stage <= stage.id) or blocks >= most:
                return False
            else:
                blocks += 1
            before = before.prev
        return True

    def _few_before(self, node: Node, following: int, most: int) -> bool:
        """Of the split's blocks before the node, fewer than `most` wait for the stage `following`."""
        before = node.prev
        while before is not None and before is not node.split.head:
            if before.stage == following and before.block is not None and not before.running:
                most -= 1
                if most <= 0:
                    return False
            before = before.prev
        return True

    def wanted_workers(self) -> dict[str, int]:
        """Workers that each pool could keep at work now: more than it has only where none is idle."""
        wanted: dict[str, int] = {}
        for name, pool in self.pools.items():
            have = len(pool.workers)
            if name == CPU_POOL:
                more = len(self.pending)
            else:
                more = sum(self.waiting[s.id] for s in self.stages if s.pool == name) - DEVICE_DEPTH * have
            wanted[name] = have + (max(0, more) if have and not pool.starving and not self.draining else 0)
        return wanted

    # ---------------------------------------------------------------- opening splits

    def _open_splits(self) -> None:
        """New splits for workers that have nothing else to do and read no other split."""
        while self.pending:
            route = self._route_of_next()
            stage = self.stages[route.stages[0]]
            worker = self._pick_reader(stage)
            if worker is None or not self._may_open(route, stage):
                return
            self._open_next(worker, route)

    def _pick_reader(self, stage: Stage) -> WorkerState | None:
        """A worker that reads no split; where a split is one short step, also one that is about to end its own."""
        places = self.pools[stage.pool].places
        for place in places[::2]:
            if place:
                return next(iter(place.values()))
        if self.measures[stage.id].unfinished < 0.25:
            for place in places[3::2]:
                for worker in place.values():
                    return worker if worker.sources < MAX_DEPTH else None
        return None

    def _may_open(self, route: Route, stage: Stage) -> bool:
        if not self.open:
            return True
        if stage.end is End.SINK:
            return not self.pressure
        if self.limits.bulk:
            return not self._is_enough(stage.pool)
        if len(self.open) >= OPEN_PER_WORKER * len(self.workers) + 16:
            return False
        following = self.following[route.name][stage.id]
        assert following is not None
        return self._queues_allow(stage, following) and self._room_for(stage)

    def _route_of_next(self) -> Route:
        routes = self.plan.routes
        if len(routes) == 1 or self.limits.bulk:
            return routes[-1]
        split = self.pending[0]
        fused = prefer_fused(
            split_bytes=split.bytes,
            left_bytes=self.pending_bytes - split.bytes,
            left_splits=len(self.pending) - 1,
            listing_done=self.listing_done,
            workers=self._cpus(),
            listed=self.listed,
            reading=self._being_read(routes[0]) if self.listing_done and len(self.pending) <= self._cpus() else (),
        )
        return routes[0] if fused else routes[-1]

    def _being_read(self, route: Route) -> Sequence[float]:
        """Bytes left of each open split on this route whose source is not done; of very many none are told."""
        if len(self.open) > MOST_READING:
            return ()
        found: list[float] = []
        for state in self.open.values():
            if not state.source_done and state.route is route:
                rows = state.split.rows
                share = min(1.0, state.tally.rows_in / rows) if rows else 0.5
                found.append(state.split.bytes * (1.0 - share))
        return found

    def _cpus(self) -> int:
        """CPU workers that there are or soon will be."""
        return self.pools[CPU_POOL].awake + max(0, self.starting.get(CPU_POOL, 0))

    def _open_next(self, worker: WorkerState, route: Route) -> None:
        split = self.pending.popleft()
        self.pending_bytes -= split.bytes
        state = SplitState(split, route, self.following[route.name])
        self.open[split.index] = state
        self._submit_advance(worker, self._lay_out(state))

    def _lay_out(self, state: SplitState) -> CursorEntry:
        """Put the markers of its sequences and its source into the list of a new attempt; the source."""
        for stage_id in reversed(state.route.stages[1:]):
            stage = self.stages[stage_id]
            if stage.order is Order.SPLIT or stage.order is Order.GLOBAL:
                marker = self._new_cursor(stage, state)
                state.markers[stage_id] = marker
                state.insert_before(state.tail, marker.node)
        source = self._new_cursor(self.stages[state.route.stages[0]], state)
        state.source = source
        state.insert_before(state.tail, source.node)
        return source

    # ---------------------------------------------------------------- submitting

    def _new_cursor(self, stage: Stage, split: SplitState) -> CursorEntry:
        self._next_cursor += 1
        self.cursors[stage.id] += 1
        cursor = CursorEntry(self._next_cursor, stage, split)
        split.cursors[cursor.id] = cursor
        return cursor

    def _submit_advance(self, worker: WorkerState, cursor: CursorEntry) -> None:
        stage, split = cursor.stage, cursor.split
        end = self._feed(cursor) if cursor.sequential else True
        named = not cursor.started and (stage.order is Order.SOURCE or stage.end is End.SINK)
        if cursor is split.source and not cursor.started:
            worker.sources += 1
        self._next_step += 1
        self.advanced[stage.id] += 1
        warm = self.advanced[stage.id] > WARM_STEPS * self.pools[stage.pool].awake
        join_bytes = self._join_bytes(stage, split) if warm else 0
        step = Advance(
            self._next_step,
            worker.id,
            stage.id,
            cursor.id,
            split.index,
            split.attempt,
            split.split if named else None,
            cursor.fed,
            end,
            max(self.limits.credit_bytes, join_bytes) if warm else 1,
            self.limits.slice_s,
            join_bytes,
            self._limit_left(stage, split),
            () if cursor.started else split.history.suspects,
            self._next_splits() if cursor is split.source else (),
        )
        cursor.started = True
        cursor.more = False
        cursor.end_sent = end
        cursor.worker = worker.id
        worker.cursors[cursor.id] = cursor
        cursor.state = CursorState.RUNNING
        self._submit(worker, stage, step, (), cursor)

    def _next_splits(self) -> tuple[Split, ...]:
        """One for each worker, and one more: while a step runs, others may open some of them."""
        if not self.limits.read_next or self.pressure or self.draining:
            return ()
        return tuple(islice(self.pending, self.pools[CPU_POOL].awake + 1))

    def _join_bytes(self, stage: Stage, split: SplitState) -> int:
        """Only blocks for a model are joined: those that several workers share come as cut."""
        following = split.following[stage.id]
        if following is None or following == DELIVER_STAGE or not self.stages[following].model:
            return 0
        return self.limits.join_bytes

    def _limit_left(self, stage: Stage, split: SplitState) -> int | None:
        """How many of the split's rows may still pass; for one that had its turn in an earlier attempt, as many as then."""
        if stage.limit is None:
            return None
        granted = split.granted.get(stage.id)
        if granted is not None:
            return max(0, granted - split.taken.get(stage.id, 0))
        return max(0, stage.limit - self.passed[stage.id])

    def _may_end(self, cursor: CursorEntry) -> bool:
        """May the cursor take the end of its input? Behind a limit a split is closed when all before it are settled, so that
        the run log holds the first splits and no others.
        """
        if not self.in_order or cursor.stage.end is not End.SINK:
            return True
        return next(iter(self.open.values())) is cursor.split

    def _feed(self, cursor: CursorEntry) -> bool:
        """Take the blocks that follow the marker into `fed`; true when no input will come after them."""
        fed: list[BlockRef] = []
        split = cursor.split
        node = cursor.node.next
        assert node is not None
        while len(fed) < FEED_BLOCKS and node.block is not None and node.stage == cursor.stage.id:
            fed.append(node.block)
            self.waiting[node.stage] -= 1
            following = node.next
            assert following is not None
            split.unlink(node)
            node.block = None
            node = following
        cursor.fed = tuple(fed)
        return node is split.tail and split.source_done and self._may_end(cursor)

    def _submit_apply(self, worker: WorkerState, stage: Stage, first: QueueEntry) -> None:
        """Gather the oldest blocks for one step, after the first those near the worker; past the budget, only the first, which
        was admitted.
        """
        most = APPLY_BLOCKS if self._room_for(stage) else 1
        nodes: list[Node] = []
        rows = size = 0
        most_rows = self._step_rows(stage)
        most_bytes = WANTED_BYTES if most_rows > stage.batch_rows else APPLY_BYTES
        entry: QueueEntry | None = first
        while entry is not None:
            self._take(stage, worker, entry)
            node = _block(entry)
            assert node.block is not None
            node.running = True
            nodes.append(node)
            rows += node.block.rows
            size += node.block.bytes
            if len(nodes) >= most or rows >= most_rows or size >= most_bytes:
                break
            oldest = self._top_shared(stage.id)
            entry = None if oldest is None else self._closer(stage, worker, oldest)
        self._next_step += 1
        step = Apply(
            self._next_step,
            worker.id,
            stage.id,
            tuple(n.block for n in nodes if n.block is not None),
            tuple((n.split.index, n.split.attempt) for n in nodes),
            tuple(dict.fromkeys(s for n in nodes for s in n.split.history.suspects)),
        )
        self._submit(worker, stage, step, tuple(nodes), None)

    def _submit(
        self, worker: WorkerState, stage: Stage, step: Step, nodes: tuple[Node, ...], cursor: CursorEntry | None
    ) -> None:
        reserved = 0 if stage.end is End.SINK else int(self.measures[stage.id].made_bytes)
        self.reserved += reserved
        self.producing[stage.id] += 1
        if stage.max_workers is not None:
            self._join(stage, worker)
        self.steps[step.id] = (step, nodes, cursor, reserved)
        worker.running[step.id] = step
        self._count_stream(worker, step, 1)
        self._file(worker)
        self._out.append(Submit(step))

    # ---------------------------------------------------------------- workers

    def _file(self, worker: WorkerState) -> None:
        """File the worker by the room that it has; what was parked at it is in the queue again when it has some."""
        self.pools[worker.pool].file(worker, self._depth(worker))
        if worker.parked and worker.place is not None:
            for entry in worker.parked:
                item = entry[3]
                assert isinstance(item, CursorEntry)
                heappush(self.bound[item.stage.id], entry)
            worker.parked.clear()

    def _count_stream(self, worker: WorkerState, step: Step, sign: int) -> None:
        if self.stages[step.stage].stream:
            worker.streams += sign
            worker.stream_rows += sign * sum(block.rows for block in step.inputs)

    def _depth(self, worker: WorkerState) -> int:
        """Steps that the worker may hold: a device's next one waits there, and a short one's successor; those of streaming
        models run all at once.
        """
        if worker.streams and worker.streams == len(worker.running):
            more = worker.streams < STREAM_STEPS and worker.stream_rows < STREAM_ROWS
            return max(DEVICE_DEPTH, worker.streams + more)
        if worker.pool != CPU_POOL:
            return DEVICE_DEPTH
        held, held_s = len(worker.running), 0.0
        for step in worker.running.values():
            step_s = self.measures[step.stage].step_s
            held_s += step_s if step_s > 0.0 else SHORT_STEP_S  # how long is not known yet
        return min(MAX_DEPTH, held + 1) if held_s < SHORT_STEP_S else max(1, held)

    # ---------------------------------------------------------------- queues

    def _queue(self, cursor: CursorEntry) -> None:
        """A runnable cursor: to its own worker once it has one, else to anybody."""
        cursor.state = CursorState.QUEUED
        heaps = self.shared if cursor.worker is None else self.bound
        self._tie += 1
        heappush(heaps[cursor.stage.id], (cursor.split.index, cursor.node.key, self._tie, cursor))

    def _queue_block(self, node: Node) -> None:
        self._tie += 1
        entry = (node.split.index, node.key, self._tie, node)
        heappush(self.shared[node.stage], entry)
        stage = self.stages[node.stage]
        pool = self.pools[stage.pool]
        if pool.spread and (home := self._near(stage, node)) in pool.nodes:
            heap = self.near.setdefault((stage.id, home), [])
            while heap and not _is_waiting(heap[0][3]):
                heappop(heap)
            heappush(heap, entry)

    def _top_shared(self, stage: int) -> QueueEntry | None:
        """The oldest runnable item; entries made void by a cancel, or taken out of turn, are dropped on the way."""
        heap = self.shared[stage]
        while heap:
            if _is_waiting(heap[0][3]):
                return heap[0]
            heappop(heap)
        return None

    def _top_bound(self, stage: int) -> QueueEntry | None:
        """The oldest runnable cursor whose worker has room; others are parked at their workers on the way."""
        heap = self.bound[stage]
        while heap:
            cursor = heap[0][3]
            assert isinstance(cursor, CursorEntry)
            assert cursor.worker is not None
            entry = heap[0]
            if cursor.state is CursorState.QUEUED:
                worker = self.workers[cursor.worker]
                if worker.place is not None:
                    return entry
                worker.parked.append(entry)
            heappop(heap)
        return None

    # ---------------------------------------------------------------- tables made once

    def _follow(self, route: Route) -> dict[int, int | None]:
        following: dict[int, int | None] = {}
        for here, there in zip(route.stages, (*route.stages[1:], None), strict=True):
            ends = self.plan.stages[here].end
            following[here] = DELIVER_STAGE if ends is End.DELIVER else there
        return following

    def _feeders(self) -> tuple[tuple[Stage, int], ...]:
        """(stage, the stage after it): cursors whose blocks any worker of the same pool may take up."""
        found: dict[tuple[int, int], None] = {}
        for route in self.plan.routes:
            for here, there in zip(route.stages, route.stages[1:], strict=False):
                stage, following = self.stages[here], self.stages[there]
                makes = stage.order is not Order.GLOBAL and not stage.model
                if makes and following.order is Order.FREE and following.pool == stage.pool:
                    found[here, there] = None
        return tuple((self.stages[here], there) for here, there in sorted(found, reverse=True))


def _is_waiting(item: Node | CursorEntry) -> bool:
    """Is it still to be taken?"""
    return not (item.gone or item.running) if isinstance(item, Node) else item.state is CursorState.QUEUED


def _block(entry: QueueEntry) -> Node:
    node = entry[3]
    assert isinstance(node, Node)
    return node


def _in_turn(plan: SchedulerPlan) -> tuple[Stage, ...]:
    """Whose work is looked at first. Stage ids grow along every route."""
    turn = sorted(plan.stages, key=lambda s: -s.id)
    for route in plan.routes[:-1]:
        alone = next(s for s in turn if s.id == route.stages[0])
        turn.remove(alone)
        shares = (i for i, s in enumerate(turn) if s.order is Order.FREE and s.pool == alone.pool and s.first < alone.stop)
        turn.insert(next(shares, len(turn)), alone)
    return tuple(turn)
