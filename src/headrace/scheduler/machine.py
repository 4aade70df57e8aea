"""The scheduler's one mutator: `handle(event, now) -> [command]`.

Here: what an event changes in the splits' lists (an answer's blocks are placed, sequences become runnable, splits are
delivered, settled, cut by a limit). What starts next is chosen in `dispatch.py`. Nothing is re-derived per event.

Liveness: the front of the oldest split (nothing before it but blocks that wait for later stages) is admitted past full queues
and past the memory budget. So as long as a split is open, the oldest one's front runs, waits for a worker that is busy, or
waits for the consumer; anything else is reported as a stall.

After `Fail` no command follows. After `Finish` only late answers to cancelled steps come in, and what they hold is released.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from msgspec.structs import replace

from headrace.core.errors import BlockLost, HeadraceError, InternalError, TransientError, UserCodeError, WorkerDied
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import (
    Apply,
    Discard,
    Doing,
    PartsFreed,
    PartsLost,
    RoomOffered,
    Step,
    StepDone,
    StepFailed,
    WorkerLost,
    WorkerResting,
    WorkerUp,
)
from headrace.scheduler.dispatch import Dispatcher
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
    Limits,
    MemoryPressure,
    PartsSpilled,
    Release,
    Retry,
    SchedulerPlan,
    Settle,
    Spill,
    SplitsListed,
    Start,
)
from headrace.scheduler.policy.retry import MOST_ATTEMPTS, may_hold, place_of
from headrace.scheduler.state import DELIVER_STAGE, CursorEntry, CursorState, Node, SplitState, WorkerState

MOST_UNSTARTED = 6  # workers of a pool in a row that die before they come up; after that none is started in their place
SPILL_BYTES = 64 << 20  # at a time: the driver waits for the disk meanwhile
FRACTION_ROWS = 1000  # rows before a share of bad ones says something

_NO_ROWS = Tally()
_UNSTABLE = "nodes come and go faster than the work is done: smaller splits, or nodes that last longer"


class Scheduler(Dispatcher):
    """See the module. Only `handle` changes it."""

    def __init__(self, plan: SchedulerPlan, limits: Limits | None = None) -> None:
        super().__init__(plan, limits)
        self.alive: dict[int, int] = {}  # part id -> bytes, from its making until PartsFreed
        self.deliver_next = 0
        self.failed = False
        self.next_worker = sum(plan.pools.values())
        self.unstarted: dict[str, int] = {}  # pool -> workers in a row that died before they came up
        self.read = self.limits.settled_before.rows_in  # rows, of the attempts that count
        self.bad = self.limits.settled_before.bad
        self.ends_in_sink = any(s.end is End.SINK for s in plan.stages)

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Take in one event; the commands are in the order in which they must be carried out."""
        del now  # no decision needs the time; limits on time are the driver's
        self._out = out = list[Command]()
        if self.finished:
            self._late(event)
            return out
        try:
            self._take_in(event)
            self._dispatch()
            if self.limits.bulk and isinstance(event, StepDone) and self.in_flight > self.limits.budget_bytes:
                self._spill()
            if self.finished and not any(isinstance(command, Finish) and command.drained for command in out):
                self._check_share()
        except HeadraceError as error:
            self.finished = self.failed = True
            out[:] = [command for command in out if not isinstance(command, Finish)]
            out.append(Fail(error))
        return out

    def _take_in(self, event: Event) -> None:
        match event:
            case StepDone():
                self._on_done(event)
            case PartsFreed(parts):
                self._on_freed(parts)
            case SplitsListed():
                self._on_listed(event)
            case ConsumerTook(blocks):
                self.consumer_waiting -= blocks
                self._deliver()
            case WorkerUp(worker, pool, node):
                self.next_worker = max(self.next_worker, worker + 1)
                self.unstarted.pop(pool, None)
                self.starting[pool] = self.starting.get(pool, 0) - 1
                self.workers[worker] = state = WorkerState(worker, pool, node)
                self.pools[pool].add(state)
                self._file(state)
            case StepFailed(step, _, error):
                if step not in self.steps:
                    raise error
                self._on_failed(step, error)
            case WorkerLost():
                self._on_lost(event)
            case WorkerResting(worker, resting):
                if (state := self.workers.get(worker)) is not None:
                    self.pools[state.pool].rest(state, resting)
                    self._file(state)
            case RoomOffered(pool, device, node, why):
                if pool in self.plan.pools and not self.draining:
                    self._ask_for_worker(pool, None, why, device, node)
            case PartsLost(parts, reason):
                self._on_parts_lost(parts, reason)
            case Delivered():
                self._on_delivered(event)
            case Drain():
                self.draining = True
            case MemoryPressure(level):
                self.pressure = level
                if level >= 2:
                    self._spill()
            case BudgetChanged(budget_bytes):
                self.limits = replace(self.limits, budget_bytes=budget_bytes)
            case PartsSpilled(parts):
                self._on_spilled(parts)
            case Start():
                self._check_most()  # it may be lower than in the session before

    def _on_listed(self, event: SplitsListed) -> None:
        self.listing = False
        self.listing_done = self.listing_done or event.done
        for index, passed in event.settled:
            self._skip_turn(index, dict(passed))
        for turn in self.global_next.values() if event.settled else ():
            if (split := self.open.get(turn)) is not None:
                self._poke_markers(split)
        if not self.enough:
            self.listed += len(event.splits)
            self.pending.extend(event.splits)
            self.pending_bytes += sum(s.bytes for s in event.splits)

    def _skip_turn(self, index: int, passed: dict[int, int]) -> None:
        """An earlier session has settled this split: what passed its limits counts, and its turn is over."""
        for stage_id, turns in self.settled_turns.items():
            turns.add(index)
            self._next_turn(stage_id, self.global_next[stage_id])
            limit = self.stages[stage_id].limit
            if limit is not None:
                self.passed[stage_id] += passed.get(self.stages[stage_id].first, 0)
                if self.passed[stage_id] >= limit and not self.enough:
                    self._cancel_after(index)

    def _next_turn(self, stage_id: int, index: int) -> None:
        """It is the turn of split `index`, or of the first one after it that is still to do."""
        turns = self.settled_turns[stage_id]
        while index in turns:
            turns.remove(index)
            index += 1
        self.global_next[stage_id] = index

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
            case WorkerLost(worker) if not self.failed and (state := self.workers.pop(worker, None)) is not None:
                self._forget(state)
                for step in list(state.running):
                    self._lose_step(step)
            case _:
                pass

    def _on_freed(self, parts: Sequence[int]) -> None:
        for part in parts:
            self.in_flight -= self.alive.pop(part, 0)

    # ---------------------------------------------------------------- what fails or dies

    def _on_failed(self, step_id: int, error: HeadraceError) -> None:
        """Of a cancelled step a failure counts for nothing; trouble with the storage is worth other attempts."""
        if self._is_cancelled(step_id):
            self._abandon(step_id, ())
            return
        if not isinstance(error, TransientError | BlockLost):
            raise error
        for split in self._lose_step(step_id):
            if not split.history.goes_on_after(error):
                raise error
            self._retry(split, error.message, None)

    def _on_parts_lost(self, parts: Sequence[int], reason: str) -> None:
        """Splits that hold any of these parts start again. What nobody holds any more is no loss."""
        lost = {part for part in parts if part in self.alive}
        for split in self._holders(lost) if lost else ():
            self._retry_lost(split, reason)

    def _retry_lost(self, split: SplitState, reason: str) -> None:
        error = BlockLost(f"blocks are lost: {reason}", where=(("split", split.split.label),), hint=_UNSTABLE)
        if not split.history.goes_on_after(error):
            raise error
        self._retry(split, error.message, None)

    def _holders(self, parts: set[int]) -> list[SplitState]:
        """Open splits with any of these parts in a block that waits, or that a running step was given."""
        found: list[SplitState] = []
        for split in self.open.values():
            blocks = [node.block for node in split.nodes() if node.block is not None]
            blocks += [block for cursor in split.cursors.values() for block in cursor.fed]
            if any(part.id in parts for block in blocks for part in block.parts):
                found.append(split)
        return found

    def _on_lost(self, lost: WorkerLost) -> None:
        """Splits with anything unfinished in that worker start again. Another worker takes its place, unless that is gone, too:
        then only a pool that has none else asks for one.
        """
        state = self.workers.pop(lost.worker, None)
        pool = lost.pool if state is None else state.pool
        self.next_worker = max(self.next_worker, lost.worker + 1)
        if state is not None:
            self._bury(state, lost)
        elif lost.gone:
            self.starting[pool] = self.starting.get(pool, 0) - 1
        elif not self._worth_another(pool):
            if not self.pools[pool].workers and self.starting[pool] <= 0:
                raise self._died(lost, None)
            return  # the others do its work
        if not lost.gone:
            self._ask_for_worker(pool, lost.worker, lost.reason, node="" if state is None else state.node)
        elif not self.pools[pool].workers and self.starting.get(pool, 0) <= 0:
            self._ask_for_worker(pool, lost.worker, "its node is gone")

    def _ask_for_worker(self, pool: str, replaces: int | None, why: str, device: str = "", node: str = "") -> None:
        self.starting[pool] = self.starting.get(pool, 0) + 1
        self._out.append(AddWorker(self.next_worker, pool, replaces, why, device, node))
        self.next_worker += 1

    def _worth_another(self, pool: str) -> bool:
        """A worker of the pool has died before it came up: may another one do better?"""
        self.starting[pool] = self.starting.get(pool, 0) - 1
        self.unstarted[pool] = self.unstarted.get(pool, 0) + 1
        return self.unstarted[pool] < MOST_UNSTARTED

    def _bury(self, state: WorkerState, lost: WorkerLost) -> None:
        self._forget(state)
        for members in self.stage_workers.values():
            members.discard(state.id)
        doing = None if lost.doing is None or lost.doing.constructing else lost.doing  # no row is to blame then
        guilty = self._at_work(list(state.running.values()), doing)
        at_work = dict.fromkeys(split for step in guilty for split in self._lose_step(step))
        touched = dict(at_work)
        for step in list(state.running):
            if step not in guilty:
                touched.update(dict.fromkeys(self._lose_step(step)))
        touched.update(dict.fromkeys(cursor.split for cursor in state.cursors.values()))
        for split in touched if lost.gone else ():
            if split.attempt >= MOST_ATTEMPTS:
                raise self._died(lost, split, state.node)
        if lost.untold:  # as likely as not its node died; the split is blamed if that goes on and on
            for split in at_work:
                if not split.history.goes_on_untold():
                    raise self._died(lost, split, state.node)
        for split in at_work if not (lost.gone or lost.untold) else ():
            certain = split.history.note(doing, lost.reason)
            if (certain and self.limits.fail_on_bad_rows) or split.history.exhausted(split.attempt):
                raise self._died(lost, split, state.node)
        befell = "is gone" if lost.gone else "died"
        for split in sorted(touched, key=lambda s: s.index):
            crash = doing if split in at_work and not lost.gone else None
            self._retry(split, f"worker {lost.worker} {befell}: {lost.reason}", crash)

    def _forget(self, state: WorkerState) -> None:
        """What is filed by workers and their nodes knows it no more."""
        pool = self.pools[state.pool]
        pool.forget(state)
        if state.node and state.node not in pool.nodes:
            for stage in self.stages:
                if stage.pool == state.pool:
                    self.near.pop((stage.id, state.node), None)

    def _at_work(self, steps: Sequence[Step], doing: Doing | None) -> list[int]:
        """Of a dead worker's steps, those that it died on, as far as is known: its first one; of steps of streaming models,
        which run all at once, those whose rows the breadcrumb names.
        """
        streams = [s for s in steps if self.stages[s.stage].stream]
        if not streams or streams[0] is not steps[0] or doing is None:
            return [s.id for s in steps[:1]]
        named = [s.id for s in streams if any(may_hold(block.origin, doing.segments) for block in s.inputs)]
        return named or [steps[0].id]

    def _lose_step(self, step_id: int) -> list[SplitState]:
        """No answer that counts will come to this step: what it was given is given back. The splits that waited for it."""
        _, nodes, cursor, _ = self.steps[step_id]
        step, _, _ = self._retire_step(step_id)
        for block in step.inputs:
            self._release(block.parts)
        if cursor is not None:
            cursor.fed = ()
            return [] if cursor.state is CursorState.DONE else [cursor.split]
        return list(dict.fromkeys(node.split for node in nodes if not node.gone))

    def _retry(self, split: SplitState, why: str, crash: Doing | None) -> None:
        """Take the attempt apart, and begin the next one in its place."""
        for node in split.nodes():
            if node.cursor is not None:
                self._cancel_cursor(node.cursor)
            else:
                self._drop_block(node)
        split.closed = True
        self._take_back(split)
        for stage_id, turn in self.global_next.items():
            taken = split.taken.get(stage_id, 0)
            if turn > split.index:  # it has had its turn, and gets it again for as many rows
                split.granted.setdefault(stage_id, taken)
            elif taken:
                self.passed[stage_id] -= taken
        again = SplitState(split.split, split.route, split.following, split)
        self.open[split.index] = again  # the same place among the open ones
        self._queue(self._lay_out(again))
        self._out.append(Retry(split.index, again.attempt, why, crash))

    def _died(self, lost: WorkerLost, split: SplitState | None, node: str = "") -> WorkerDied:
        """The error that ends the run."""
        where = [("worker", str(lost.worker))]
        if node:
            where.append(("node", node))
        what = f"worker {lost.worker} died: {lost.reason}"
        if lost.doing is not None:
            where.append(("stage", lost.doing.name))
            if lost.doing.constructing:
                what += f", while {lost.doing.name} was constructed"
            else:
                where.append(place_of(lost.doing))
        if split is not None:
            where += [("split", split.split.label), ("attempts", str(split.attempt))]
        hint = "look for a crash in native code or the out-of-memory killer (dmesg)"
        if lost.doing is not None and lost.doing.digest and self.limits.fail_on_bad_rows:
            hint = 'on_error="quarantine" sets such a row aside'
        elif split is None:
            hint = "workers can't start: look at what they print"
        return WorkerDied(what, where=tuple(where), hint=hint, frames=lost.stack)

    # ---------------------------------------------------------------- memory

    def _spill(self) -> None:
        """Blocks that nobody reads go to disk, those that are needed last first."""
        found: list[PartRef] = []
        size = 0
        for index in reversed(self.open):
            for node in reversed(list(self.open[index].nodes())):
                if node.block is None or node.running:
                    continue
                for part in node.block.parts:
                    if self.alive.get(part.id) and size < SPILL_BYTES:
                        found.append(part)
                        size += part.bytes
            if size >= SPILL_BYTES:
                break
        if found:
            self._out.append(Spill(tuple(found)))

    def _on_spilled(self, parts: Sequence[PartRef]) -> None:
        moved = {part.id: part for part in parts}
        for part in moved:
            self.in_flight -= self.alive[part]
            self.alive[part] = 0
        for split in self.open.values():
            for node in split.nodes():
                if node.block is not None and any(p.id in moved for p in node.block.parts):
                    kept = (replace(moved[p.id], columns=p.columns) if p.id in moved else p for p in node.block.parts)
                    node.block = replace(node.block, parts=tuple(kept))

    # ---------------------------------------------------------------- a step's answer

    def _retire_step(self, step_id: int) -> tuple[Step, tuple[Node, ...], CursorEntry | None]:
        step, nodes, cursor, reserved = self.steps.pop(step_id)
        self.reserved -= reserved
        self.producing[step.stage] -= 1
        worker = self.workers.get(step.worker)
        if worker is not None:
            if worker.running.pop(step_id, None) is not None:
                self._count_stream(worker, step, -1)
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
            if event.wanted_rows:
                self.wanted_rows[step.stage] = event.wanted_rows
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
        owners = {(n.split.index, n.split.attempt): n.split for n in nodes if not n.gone}
        for share in event.shares:
            split = owners.get((share.split_index, share.attempt))
            if split is not None:
                split.aside.extend(share.aside)
                self._count_rows(split, share.tally)
        for i, (node, given, made) in enumerate(zip(nodes, step.inputs, event.outputs, strict=True)):
            if node.gone:
                self._release(made.parts)
                self._release(given.parts)
                continue
            if i in event.whole:  # rows were lost: what was made takes the input's place
                self._release(given.parts)
                if made.rows:
                    self._place(node, stage, made, node.key)
                node.split.unlink(node)
                node.block = None
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
            node.block = None  # queues may still hold the node, and must not hold the block's memory
        for split in {node.split: None for node in nodes if not node.split.closed}:
            self._poke_markers(split)

    def _advanced(self, cursor: CursorEntry, event: StepDone) -> None:
        stage, split = cursor.stage, cursor.split
        for block in cursor.fed:
            self._release(block.parts)
        cursor.fed = ()
        if event.tally is not _NO_ROWS:
            self._count_rows(split, event.tally)
        split.aside.extend(event.aside)
        if event.unreadable:
            self._count_unreadable(split, len(event.unreadable))
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
            split.taken[stage.id] = split.taken.get(stage.id, 0) + event.taken
            if stage.id not in split.granted:
                self.passed[stage.id] += event.taken
        if event.finished and stage.order is Order.GLOBAL:
            self._leave_global(split, stage)
        if split.markers:
            self._poke_markers(split)
        if self.ends_in_sink and split.source_done and split.empty:
            self._settle(split)

    def _count_rows(self, split: SplitState, tally: Tally) -> None:
        """Raises UserCodeError when more rows are bad than may be."""
        split.tally = split.tally + tally
        before, bad = self.read, tally.bad
        self.read += tally.rows_in
        self.bad += bad
        if bad or before < FRACTION_ROWS <= self.read:
            self._check_limits()

    def _count_unreadable(self, split: SplitState, parts: int) -> None:
        """Parts of the input with nobody knows how many rows: towards the limits each is one bad row at least."""
        split.unreadable += parts
        self.bad += parts
        self._check_limits()

    def _take_back(self, split: SplitState) -> None:
        """The attempt counts for nothing any more."""
        self.read -= split.tally.rows_in
        self.bad -= split.tally.bad + split.unreadable

    def _check_limits(self) -> None:
        self._check_most()
        if self.read >= FRACTION_ROWS:
            self._check_share()

    def _check_most(self) -> None:
        most = self.limits.max_bad_rows
        if most is not None and self.bad > most:
            raise self._too_many(f"max_bad_rows is {most}")

    def _check_share(self) -> None:
        share = self.limits.max_bad_fraction
        if share is not None and self.bad > share * self.read:
            raise self._too_many(f"max_bad_fraction is {share:g}")

    def _too_many(self, limit: str) -> UserCodeError:
        return UserCodeError(
            f"too many bad rows: {self.bad:,} of {self.read:,} read, and {limit}",
            hint='look at what was set aside (on_error="quarantine" keeps rows and reasons), or raise the limit',
        )

    def _close_cursor(self, cursor: CursorEntry) -> None:
        cursor.state = CursorState.DONE
        self.cursors[cursor.stage.id] -= 1
        cursor.split.unlink(cursor.node)
        cursor.split.cursors.pop(cursor.id, None)
        if cursor.sequential:
            cursor.split.markers.pop(cursor.stage.id, None)
        worker = self.workers.get(cursor.worker) if cursor.worker is not None else None
        if worker is not None:
            worker.cursors.pop(cursor.id, None)
        if cursor is cursor.split.source:
            cursor.split.source_done = True
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
        stage, split = cursor.stage, cursor.split
        if stage.order is Order.GLOBAL and self.global_next[stage.id] != split.index and stage.id not in split.granted:
            return False
        if cursor.more:
            return True
        if cursor.end_sent:
            return False
        node = cursor.node.next
        assert node is not None
        if node is split.tail:
            return split.source_done and self._may_end(cursor)
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
            if node.running:  # it is on its way
                return
            if self.limits.frail_blocks and split.skip < node.block.rows:
                node.running = True
                self.waiting[DELIVER_STAGE] -= 1
                self.consumer_waiting += 1
                self._out.append(Deliver(split.index, node.block, split.skip, confirm=True))
                return
            split.unlink(node)
            self.waiting[DELIVER_STAGE] -= 1
            self._hand_over(split, node.block)
            self._release(node.block.parts)

    def _on_delivered(self, delivered: Delivered) -> None:
        """The front block of the oldest split has reached the consumer, or is lost."""
        split = self.open[delivered.split]
        node = split.head.next
        assert node is not None
        assert node.block is not None
        if delivered.lost:
            self.consumer_waiting -= 1
            node.running = False
            self.waiting[DELIVER_STAGE] += 1  # as one that nobody was given
            self._retry_lost(split, delivered.lost)
            return
        split.unlink(node)
        split.delivered += node.block.rows - split.skip
        split.skip = 0
        self._release(node.block.parts)
        self._deliver()

    def _hand_over(self, split: SplitState, block: BlockRef) -> None:
        """Deliver what an earlier attempt has not delivered yet."""
        if split.skip >= block.rows:
            split.skip -= block.rows
            return
        self.consumer_waiting += 1
        self._out.append(Deliver(split.index, block, split.skip))
        split.delivered += block.rows - split.skip
        split.skip = 0

    def _settle(self, split: SplitState) -> None:
        del self.open[split.index]
        split.closed = True
        self.settled += 1
        if not self.ends_in_sink:
            self.deliver_next = split.index + 1
        tally = split.tally
        if self.passed:  # what a limit cut may never have been read to its end: the rest is cut by definition,
            left = tally.rows_in + tally.expanded - tally.written - tally.filtered - tally.skipped - tally.quarantined
            # or made of a row that was still being expanded
            tally = dataclasses.replace(tally, expanded=tally.expanded + max(0, -left), cut=max(0, left))
        if not tally.balanced or tally.cut < 0:
            raise InternalError(f"the rows of {split.split.label} don't add up: {tally}")
        taken = tuple(sorted((self.stages[stage].first, rows) for stage, rows in split.taken.items()))
        self._out.append(Settle(split.split, split.attempt, split.receipt, tally, aside=tuple(split.aside), taken=taken))
        if self.in_order and self.open:  # it is the next one's turn to be closed
            self._poke_markers(next(iter(self.open.values())))

    # ---------------------------------------------------------------- limits and cancelling

    def _leave_global(self, split: SplitState, stage: Stage) -> None:
        """A split has passed a stage that takes splits one after the other: it is the next one's turn, or the limit's end."""
        if stage.id in split.granted:  # it had its turn in an earlier attempt
            self._cut_rest_of(split, stage)
            return
        self._next_turn(stage.id, split.index + 1)
        self._cut_rest_of(split, stage)
        if stage.limit is not None and self.passed[stage.id] >= stage.limit:
            self._cancel_after(split.index)
        elif (later := self.open.get(self.global_next[stage.id])) is not None:
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
            self._take_back(split)
            self.settled += 1
            self._out.append(Settle(split.split, split.attempt, None, _NO_ROWS, cancelled=True))

    def _cancel_cursor(self, cursor: CursorEntry) -> None:
        if cursor.started and cursor.worker in self.workers:
            assert cursor.worker is not None
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
