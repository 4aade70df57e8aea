"""What must hold of the scheduler's tables after every event. For tests and simulations: a check looks at everything.

Nothing here changes the scheduler. A broken invariant raises AssertionError with the story: what was found, and the list of
the split that it concerns.
"""

from __future__ import annotations

from collections import Counter

from headrace.core.refs import BlockRef
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance
from headrace.scheduler.dispatch import Dispatcher
from headrace.scheduler.machine import Scheduler
from headrace.scheduler.state import DELIVER_STAGE, MAX_DEPTH, CursorEntry, CursorState, Node, SplitState, WorkerState


def check(scheduler: Scheduler) -> None:
    """Raise AssertionError if any invariant is broken. After `Fail` the tables mean nothing, and nothing is checked."""
    if scheduler.failed:
        return
    _check_splits(scheduler)
    _check_queues(scheduler)
    _check_steps(scheduler)
    _check_memory(scheduler)
    if scheduler.finished:
        _check_end(scheduler)
    else:
        _check_work_conserving(scheduler)


def story(split: SplitState) -> str:
    """The split's list in words: what stands where, oldest first."""
    places: list[str] = []
    for node in split.nodes():
        if node.cursor is not None:
            cursor = node.cursor
            bound = "" if cursor.worker is None else f" on {cursor.worker}"
            places.append(f"<cursor {cursor.id} stage {cursor.stage.id} {cursor.state.value}{bound}>")
        elif node.block is not None:
            places.append(f"[{node.block.rows} rows -> {node.stage}{' running' if node.running else ''}]")
    return f"split {split.index} (source {'done' if split.source_done else 'open'}): {' '.join(places) or '(empty)'}"


# ---------------------------------------------------------------- splits and their lists


def _check_splits(s: Scheduler) -> None:
    waiting: Counter[int] = Counter()
    indexes = list(s.open)
    assert indexes == sorted(indexes), f"open splits out of order: {indexes}"
    assert s.listed == len(s.pending) + len(s.open) + s.settled, (
        f"{s.listed} splits listed, but {len(s.pending)} pending, {len(s.open)} open, {s.settled} settled"
    )
    assert s.pending_bytes == sum(p.bytes for p in s.pending), "pending_bytes differs from a recount"
    assert not s.pending or not s.open or s.pending[0].index > indexes[-1], "a pending split comes before an open one"
    for index, split in s.open.items():
        assert index == split.index
        assert not split.closed, f"settled, yet open: {story(split)}"
        _check_list(s, split, waiting)
    for stage, count in s.waiting.items():
        assert count == waiting[stage], f"stage {stage}: waiting says {count}, the lists hold {waiting[stage]}"


def _check_list(s: Scheduler, split: SplitState, waiting: Counter[int]) -> None:
    cursors: set[int] = set()
    before, node = split.head, split.head.next
    earlier: dict[int, tuple[int, ...]] = {}
    lowest_marker = 1 << 30
    while node is not split.tail:
        assert node is not None, f"the list breaks off: {story(split)}"
        assert node.prev is before, f"prev and next disagree: {story(split)}"
        assert not node.gone, f"a node that is gone is in the list: {story(split)}"
        assert node.split is split
        if node.cursor is not None:
            cursor = node.cursor
            cursors.add(cursor.id)
            assert cursor.state is not CursorState.DONE, f"a closed cursor is in the list: {story(split)}"
            if cursor.sequential:
                assert cursor.stage.id < lowest_marker, f"sequences out of order: {story(split)}"
                lowest_marker = cursor.stage.id
            else:
                assert cursor.stage.id < lowest_marker, f"a cursor stands behind a sequence that it feeds: {story(split)}"
        else:
            assert node.block is not None
            if not node.running:
                waiting[node.stage] += 1
            assert node.stage == DELIVER_STAGE or node.stage <= lowest_marker, f"a block was overtaken: {story(split)}"
            last = earlier.get(node.stage)
            assert last is None or last < node.key, f"keys don't follow the list's order: {story(split)}"
            earlier[node.stage] = node.key
        before, node = node, node.next
    assert split.tail.prev is before, f"the tail's prev is wrong: {story(split)}"
    assert cursors == set(split.cursors), f"cursors {set(split.cursors)} are open, the list holds {cursors}: {story(split)}"
    assert split.source is not None
    assert split.source_done == (split.source.state is CursorState.DONE)
    assert {m.stage.id for m in split.markers.values()} == {c.stage.id for c in split.cursors.values() if c.sequential}


# ---------------------------------------------------------------- queues


def _check_queues(s: Scheduler) -> None:
    queued: Counter[int] = Counter()
    blocks: Counter[int] = Counter()
    for heaps, bound in ((s.shared, False), (s.bound, True)):
        for stage, heap in heaps.items():
            for _, _, _, item in heap:
                if isinstance(item, Node):
                    assert not bound
                    blocks[id(item)] += not item.gone and not item.running
                elif item.state is CursorState.QUEUED:
                    assert item.stage.id == stage
                    assert (item.worker is not None) == bound, f"cursor {item.id} is in the wrong heap"
                    queued[item.id] += 1
    for (stage, place), heap in s.near.items():
        assert place in s.pools[s.stages[stage].pool].nodes, f"stage {stage}: blocks near {place}, where no worker is"
        everywhere = {id(entry) for entry in s.shared[stage]}
        for entry in heap:
            assert not isinstance(entry[3], Node) or not _waits(entry[3]) or id(entry) in everywhere, "near, and nowhere"
    for worker in s.workers.values():
        assert not worker.parked or worker.place is None, f"worker {worker.id} has room and parked cursors"
        for _, _, _, item in worker.parked:
            assert isinstance(item, CursorEntry)
            queued[item.id] += item.state is CursorState.QUEUED
    for split in s.open.values():
        for cursor in split.cursors.values():
            wanted = 1 if cursor.state is CursorState.QUEUED else 0
            assert queued[cursor.id] == wanted, f"cursor {cursor.id} is in {queued[cursor.id]} queues: {story(split)}"
            runnable = not cursor.sequential or _is_ready(s, cursor)
            assert cursor.state is not CursorState.IDLE or not runnable, f"cursor {cursor.id} is forgotten: {story(split)}"
            assert cursor.state is not CursorState.QUEUED or runnable, f"cursor {cursor.id} has nothing to do: {story(split)}"
        for node in split.nodes():
            if node.block is not None and node.stage != DELIVER_STAGE and s.stages[node.stage].order is Order.FREE:
                assert blocks[id(node)] == (not node.running), f"a block is in {blocks[id(node)]} queues: {story(split)}"


def _is_ready(s: Scheduler, cursor: CursorEntry) -> bool:
    """A sequence may take what follows it, told from the list alone."""
    stage, split = cursor.stage, cursor.split
    if stage.order is Order.GLOBAL and s.global_next[stage.id] != split.index and stage.id not in split.granted:
        return False
    following = cursor.node.next
    if cursor.more:
        return True
    if following is split.tail:
        closed = s.in_order and stage.end is End.SINK and min(s.open) != split.index
        return not cursor.end_sent and split.source_done and not closed
    return following is not None and following.block is not None and following.stage == cursor.stage.id


# ---------------------------------------------------------------- steps, workers, memory


def _check_steps(s: Scheduler) -> None:
    running = [step for w in s.workers.values() for step in w.running]
    assert sorted(running) == sorted(s.steps), f"workers run {sorted(running)}, the table has {sorted(s.steps)}"
    producing: Counter[int] = Counter()
    for step_id, (step, nodes, cursor, _) in s.steps.items():
        assert step_id == step.id
        assert step_id in s.workers[step.worker].running, f"step {step_id} is not at worker {step.worker}"
        producing[step.stage] += 1
        if isinstance(step, Advance):
            assert cursor is not None
            assert cursor.worker == step.worker, f"cursor {cursor.id} belongs to {cursor.worker}, runs on {step.worker}"
            assert cursor.state in (CursorState.RUNNING, CursorState.DONE)
            assert cursor.fed == step.inputs
        else:
            assert len(nodes) == len(step.inputs) > 0
            assert all(node.running for node in nodes)
    open_cursors = Counter(cursor.stage.id for split in s.open.values() for cursor in split.cursors.values())
    for stage, count in s.cursors.items():
        assert count == open_cursors[stage], f"stage {stage}: cursors says {count}, {open_cursors[stage]} are open"
    for stage, count in s.producing.items():
        assert count == producing[stage], f"stage {stage}: producing says {count}, {producing[stage]} steps run"
    assert s.reserved == sum(entry[3] for entry in s.steps.values()), "reserved differs from the sum over running steps"
    sources: Counter[int] = Counter()
    for split in s.open.values():
        if split.source is not None and not split.source_done and split.source.worker is not None:
            sources[split.source.worker] += 1
    cursors: dict[int, set[int]] = {}
    for split in s.open.values():
        for cursor in split.cursors.values():
            if cursor.worker is not None:
                cursors.setdefault(cursor.worker, set()).add(cursor.id)
    assert cursors.keys() <= s.workers.keys(), f"cursors at workers that are no more: {cursors.keys() - s.workers.keys()}"
    for worker in s.workers.values():
        assert worker.sources == sources[worker.id], f"worker {worker.id} reads {sources[worker.id]} splits"
        assert set(worker.cursors) == cursors.get(worker.id, set()), f"worker {worker.id} has cursors {set(worker.cursors)}"
        _check_place(s, worker)
    _check_pools(s)
    for stage_id, members in s.stage_workers.items():
        limit = s.stages[stage_id].max_workers
        assert limit is None or len(members) <= limit, f"stage {stage_id} is open in {len(members)} workers"


def _check_place(s: Scheduler, worker: WorkerState) -> None:
    pool = s.pools[worker.pool]
    places = (*pool.places, pool.asleep)
    homes = [i for i, place in enumerate(places) if worker.id in place]
    assert len(homes) <= 1, f"worker {worker.id} is filed {len(homes)} times"
    assert (worker.place is None) == (not homes)
    if homes:
        at = 2 * min(len(worker.running), MAX_DEPTH - 1) + (worker.sources > 0)
        assert homes[0] == (len(pool.places) if worker.resting else at), f"worker {worker.id} is filed wrongly"
    else:
        assert worker.running, f"worker {worker.id} does nothing and nobody knows"
    for node, filed in pool.nodes.items():
        there = [i for i, place in enumerate(filed) if worker.id in place]
        assert there == (homes if node == worker.node else []), f"worker {worker.id} is filed wrongly at node {node}"
    assert (worker.id in pool.busy) == bool(worker.running), f"worker {worker.id} is busy, or is it not?"


def _check_pools(s: Scheduler) -> None:
    for name, pool in s.pools.items():
        mine = {w.id for w in s.workers.values() if w.pool == name}
        assert mine == set(pool.workers), f"pool {name} has workers {set(pool.workers)}, not {mine}"
        assert pool.busy <= mine, f"pool {name}: workers that are no more are busy"
        assert pool.resting == sum(w.resting for w in pool.workers.values()), f"pool {name}: {pool.resting} rest?"
        nodes = Counter(w.node for w in pool.workers.values() if w.node)
        assert pool.members == nodes, f"pool {name}: nodes {pool.members}, not {nodes}"
        assert pool.nodes.keys() == nodes.keys(), f"pool {name}: places at {set(pool.nodes)}, nodes are {set(nodes)}"
        filed = [i for places in (*pool.places, pool.asleep) for i in places]
        filed_at_nodes = [i for places in pool.nodes.values() for place in places for i in place]
        assert {*filed, *filed_at_nodes} <= mine, f"pool {name}: workers that are no more are filed"


def _check_memory(s: Scheduler) -> None:
    assert s.in_flight == sum(s.alive.values()), f"in_flight {s.in_flight}, alive {sum(s.alive.values())}"
    seen: dict[int, str] = {}

    def claim(block: BlockRef, what: str) -> None:
        for part in block.parts:
            assert part.id not in seen, f"part {part.id} belongs to {seen[part.id]} and to {what}"
            assert part.id in s.alive, f"part {part.id} of {what} was freed"
            seen[part.id] = what

    for split in s.open.values():
        for node in split.nodes():
            if node.block is not None:
                claim(node.block, f"a block of split {split.index} at stage {node.stage}")
    for step, nodes, cursor, _ in s.steps.values():
        for i, block in enumerate(step.inputs):
            if cursor is not None or nodes[i].gone:  # else it stands in its split's list
                claim(block, f"an input of step {step.id}")


def _check_work_conserving(s: Scheduler) -> None:
    """No worker is idle while there is admitted work that it may do. Asks the scheduler's own admission, never its queues."""
    idle = [w for w in s.workers.values() if not w.running]  # one that rests goes on with the cursors that it has
    if not idle or s.pressure >= 2:
        return
    tops: dict[int, list[Node | CursorEntry]] = {}  # stage -> what its queues would give out next
    for split in s.open.values():
        for node in split.nodes():
            stage, needs = _runnable(s, node)
            if stage is None:
                continue
            for worker in idle:
                mine = needs == worker.id or (needs is None and not worker.resting)
                if worker.pool == stage.pool and mine and not _closed_to(s, worker, stage):
                    if stage.id not in tops:
                        tops[stage.id] = _tops(s, stage)
                    # Within a stage the oldest goes first, but for what is written.
                    first = stage.end is End.SINK or any(item is node or item is node.cursor for item in tops[stage.id])
                    assert not first or not Dispatcher._admit(s, stage, node), (  # pyright: ignore[reportPrivateUsage]
                        f"worker {worker.id} is idle, stage {stage.id} has work for it: {story(split)}"
                    )
                    break  # nor is there for the others


def _runnable(s: Scheduler, node: Node) -> tuple[Stage | None, int | None]:
    """(the stage that could work on this node now, the only worker that may)."""
    if node.cursor is not None:
        return (node.cursor.stage, node.cursor.worker) if node.cursor.state is CursorState.QUEUED else (None, None)
    if node.running or node.stage == DELIVER_STAGE or s.stages[node.stage].order is not Order.FREE:
        return None, None
    return s.stages[node.stage], None


def _tops(s: Scheduler, stage: Stage) -> list[Node | CursorEntry]:
    heaps = (s.shared[stage.id], s.bound[stage.id])
    waiting = [[entry for entry in heap if not isinstance(entry[3], Node) or _waits(entry[3])] for heap in heaps]
    return [min(found)[3] for found in waiting if found]


def _waits(node: Node) -> bool:
    return not node.gone and not node.running


def _closed_to(s: Scheduler, worker: WorkerState, stage: Stage) -> bool:
    if stage.max_workers is None:
        return False
    members = s.stage_workers[stage.id]
    full = len(members) >= stage.max_workers and not all(s.workers[i].resting for i in members)
    return worker.id not in members and full


def _check_end(s: Scheduler) -> None:
    assert not s.open, f"finished with open splits {list(s.open)}"
    assert not s.pending or s.draining, "finished with pending splits"
    assert not any(s.waiting.values()), f"finished while blocks wait: {s.waiting}"
    for _, nodes, cursor, _ in s.steps.values():
        assert cursor is None or cursor.state is CursorState.DONE, "finished while work that counts runs"
        assert all(node.gone for node in nodes), "finished while work that counts runs"
    if not s.steps:
        assert s.reserved == 0, f"finished with {s.reserved} bytes reserved"
        assert not any(s.producing.values())
