"""The scheduler's tables: splits, their ordered lists of nodes, cursors, workers.

A split's blocks under way form a doubly linked list in input order. A free stage may finish its blocks in any
order: a cursor stands where its input stood, its outputs are inserted before it, and it is unlinked when done. A
sequential stage is a marker in the list: everything before it has passed the stage, everything after has not, so it
takes the node that follows it. The source stands at the end. So order needs no sequence numbers and no reorder buffer.

A block's key tells its place among the blocks of its split that wait for the same stage: keys compare as the list is
ordered, so that "the oldest first" is a heap's order.

Invariants: a node is in exactly one list; a part belongs to exactly one live block; a cursor is idle, queued or running;
a queued cursor that has a worker is in its stage's `bound` heap, or parked at its worker while that has no room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum

from headrace.core.receipts import NO_ROWS, OutputFile, Receipt
from headrace.core.refs import BlockRef
from headrace.core.splits import Split
from headrace.core.stages import Order, Route, Stage
from headrace.core.steps import Step
from headrace.scheduler.policy.retry import History

DELIVER_STAGE = -1  # the "next stage" of a block that waits for the consumer
MAX_DEPTH = 8  # steps that a worker may hold: one runs, the others are queued behind it (more of a streaming model: all run)


class CursorState(Enum):
    IDLE = "idle"  # waits for input
    QUEUED = "queued"  # could run
    RUNNING = "running"
    DONE = "done"


class Node:
    """A place in a split's list: a block (cursor is None), or a cursor (source, free, or the marker of a sequence).

    stage: for a block the stage that it waits for or is running in. running: handed to a worker. key: see the module.
    """

    __slots__ = ("block", "cursor", "gone", "key", "next", "prev", "running", "split", "stage")

    def __init__(self, split: SplitState, stage: int, block: BlockRef | None = None, key: tuple[int, ...] = ()) -> None:
        self.split = split
        self.stage = stage
        self.block = block
        self.key = key
        self.cursor: CursorEntry | None = None
        self.running = False
        self.gone = False
        self.prev: Node | None = None
        self.next: Node | None = None


class CursorEntry:
    """A cursor, as the scheduler sees it. worker: None until first dispatched; bound to it afterwards.

    made: blocks it has put out. fed: its input blocks, from dispatch to answer.
    """

    __slots__ = ("end_sent", "fed", "id", "made", "more", "node", "sequential", "split", "stage", "started", "state", "worker")

    def __init__(self, id: int, stage: Stage, split: SplitState) -> None:
        self.id = id
        self.stage = stage
        self.split = split
        self.node = Node(split, stage.id)
        self.node.cursor = self
        self.worker: int | None = None
        self.state = CursorState.IDLE
        self.started = False
        self.more = False
        self.end_sent = False
        self.fed: tuple[BlockRef, ...] = ()
        self.made = 0
        self.sequential = stage.order is Order.SPLIT or stage.order is Order.GLOBAL


class SplitState:
    """One attempt at an open split. following: stage id -> the next stage of its route (DELIVER_STAGE at the end, None after a
    sink).

    aside: quarantine files. unreadable: parts of the input that can't be read and hold nobody knows how many rows. taken: rows
    that passed each limit, by stage. granted: of limits that an earlier attempt had left, the rows that may pass again.
    delivered: rows that the consumer has; skip: those of them that this attempt is still to make again. history: of all
    attempts.
    """

    __slots__ = (
        "aside",
        "attempt",
        "closed",
        "cursors",
        "delivered",
        "following",
        "granted",
        "head",
        "history",
        "markers",
        "receipt",
        "route",
        "skip",
        "source",
        "source_done",
        "split",
        "tail",
        "taken",
        "tally",
        "unreadable",
    )

    def __init__(self, split: Split, route: Route, following: dict[int, int | None], before: SplitState | None = None) -> None:
        self.split = split
        self.attempt = 1 if before is None else before.attempt + 1
        self.route = route
        self.following = following
        self.history = History() if before is None else before.history
        self.delivered = self.skip = 0 if before is None else before.delivered
        self.granted: dict[int, int] = {} if before is None else before.granted
        self.taken: dict[int, int] = {}
        self.aside: list[OutputFile] = []
        self.unreadable = 0
        self.head = Node(self, -2)
        self.tail = Node(self, -2)
        self.head.next = self.tail
        self.tail.prev = self.head
        self.cursors: dict[int, CursorEntry] = {}
        self.markers: dict[int, CursorEntry] = {}
        self.source: CursorEntry | None = None
        self.source_done = False
        self.receipt: Receipt | None = None
        self.tally = NO_ROWS
        self.closed = False

    @property
    def index(self) -> int:
        return self.split.index

    def insert_before(self, place: Node, node: Node) -> None:
        before = place.prev
        assert before is not None
        node.prev, node.next = before, place
        before.next = node
        place.prev = node

    def unlink(self, node: Node) -> None:
        assert node.prev is not None
        assert node.next is not None
        node.prev.next = node.next
        node.next.prev = node.prev
        node.prev = node.next = None  # neighbours that point at each other would keep their blocks until a garbage collection
        node.gone = True

    def replace(self, old: Node, new: Node) -> None:
        self.insert_before(old, new)
        self.unlink(old)

    def nodes(self) -> Iterator[Node]:
        node = self.head.next
        while node is not None and node is not self.tail:
            following = node.next
            yield node
            node = following

    @property
    def empty(self) -> bool:
        return self.head.next is self.tail


class WorkerState:
    """A live worker. running: its steps, oldest first. sources: open splits that it reads. streams: how many of its steps are
    of streaming models; stream_rows: rows given to those. node: its machine, "" when there is one only. resting: it takes no
    new work, and goes on with `cursors`, those that it has begun.

    parked: queued cursors that only it can run, while it has no room. place: where its pool has filed it; None: no room.
    """

    __slots__ = (
        "at",
        "cursors",
        "id",
        "node",
        "parked",
        "place",
        "pool",
        "resting",
        "running",
        "sources",
        "stream_rows",
        "streams",
    )

    def __init__(self, id: int, pool: str, node: str = "") -> None:
        self.id = id
        self.pool = pool
        self.node = node
        self.resting = False
        self.running: dict[int, Step] = {}
        self.cursors: dict[int, CursorEntry] = {}
        self.parked: list[QueueEntry] = []
        self.place: Place | None = None
        self.at = 0  # the number of its place
        self.sources = self.streams = self.stream_rows = 0


Place = OrderedDict[int, WorkerState]  # ordered: the first of a plain dict is found slowly once many before it are gone

_ASLEEP = 2 * MAX_DEPTH  # the place of those that rest


def _places() -> tuple[Place, ...]:
    return tuple(Place() for _ in range(_ASLEEP + 1))


class PoolState:
    """The live workers of a pool, filed by what they could take on.

    places: those with nothing running that read no split, those with nothing running that do, then the same for those
    with one step that may have a second one queued, and so on; the last ones are for those with more steps too. A worker
    without room is in none, one that rests in `asleep`. nodes: the same for the workers of each node, where they have names.
    busy: workers with a step. resting: how many rest.
    """

    __slots__ = ("asleep", "busy", "members", "nodes", "places", "resting", "workers")

    def __init__(self) -> None:
        self.workers: dict[int, WorkerState] = {}
        places = _places()
        self.places = places[:_ASLEEP]
        self.asleep = places[_ASLEEP]
        self.nodes: dict[str, tuple[Place, ...]] = {}
        self.members: dict[str, int] = {}  # node -> its workers
        self.busy: set[int] = set()
        self.resting = 0

    def add(self, worker: WorkerState) -> None:
        self.workers[worker.id] = worker
        if worker.node:
            self.members[worker.node] = self.members.get(worker.node, 0) + 1
            self.nodes.setdefault(worker.node, _places())

    def forget(self, worker: WorkerState) -> None:
        """The worker is no more."""
        self._take_out(worker)
        self.busy.discard(worker.id)
        self.resting -= worker.resting
        del self.workers[worker.id]
        if worker.node:
            self.members[worker.node] -= 1
            if not self.members[worker.node]:
                del self.members[worker.node], self.nodes[worker.node]

    def rest(self, worker: WorkerState, resting: bool) -> None:
        """To be filed anew afterwards."""
        self.resting += resting - worker.resting
        worker.resting = resting

    def file(self, worker: WorkerState, depth: int) -> None:
        """Put the worker where it belongs. depth: steps that it may hold now."""
        running = len(worker.running)
        if running:
            self.busy.add(worker.id)
        else:
            self.busy.discard(worker.id)
        if running >= depth:
            self._take_out(worker)
            return
        at = _ASLEEP if worker.resting else 2 * min(running, MAX_DEPTH - 1) + (worker.sources > 0)
        if worker.place is None or worker.at != at:
            self._take_out(worker)
            worker.at = at
            worker.place = self.asleep if at == _ASLEEP else self.places[at]
            worker.place[worker.id] = worker
            if worker.node:
                self.nodes[worker.node][at][worker.id] = worker

    def _take_out(self, worker: WorkerState) -> None:
        if worker.place is not None:
            del worker.place[worker.id]
            worker.place = None
            if worker.node:
                del self.nodes[worker.node][worker.at][worker.id]

    def pick(self, near: str = "") -> WorkerState | None:
        """The worker that new work should go to: the least loaded, first those that read no split; of equals one on the node
        `near`.
        """
        local = self.nodes.get(near) if near else None
        if local is None:
            for place in self.places:
                if place:
                    return next(iter(place.values()))
            return None
        for place, there in zip(self.places, local, strict=False):
            if there:
                return next(iter(there.values()))
            if place:
                return next(iter(place.values()))
        return None

    @property
    def spread(self) -> bool:
        """Its workers are on several nodes, so that it matters who does what."""
        return len(self.nodes) > 1

    @property
    def awake(self) -> int:
        """Workers that may take new work."""
        return len(self.workers) - self.resting

    @property
    def has_room(self) -> bool:
        return any(self.places) or bool(self.asleep)

    @property
    def starving(self) -> bool:
        """Some worker has nothing to do."""
        return bool(self.places[0] or self.places[1])


QueueEntry = tuple[int, tuple[int, ...], int, Node | CursorEntry]  # (split, key, tie, item): the order of queues
