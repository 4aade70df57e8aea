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

from collections.abc import Iterator
from enum import Enum

from headrace.core.receipts import OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef
from headrace.core.splits import Split
from headrace.core.stages import Order, Route, Stage
from headrace.core.steps import Step
from headrace.scheduler.policy.retry import History

DELIVER_STAGE = -1  # the "next stage" of a block that waits for the consumer
MAX_DEPTH = 4  # steps that a worker may hold: one runs, the others are queued behind it (more of a streaming model: all run)


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
        self.tally = Tally()
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
    of streaming models; stream_rows: rows given to those.

    parked: queued cursors that only it can run, while it has no room. place: where its pool has filed it.
    """

    __slots__ = ("id", "parked", "place", "pool", "running", "sources", "stream_rows", "streams")

    def __init__(self, id: int, pool: str) -> None:
        self.id = id
        self.pool = pool
        self.running: dict[int, Step] = {}
        self.parked: list[QueueEntry] = []
        self.place: dict[int, WorkerState] | None = None
        self.sources = self.streams = self.stream_rows = 0


class PoolState:
    """The live workers of a pool, filed by what they could take on.

    places: those with nothing running that read no split, those with nothing running that do, then the same for those
    with one step that may have a second one queued, and so on; the last ones are for those with more steps too. A worker
    without room is in none.
    """

    __slots__ = ("places", "workers")

    def __init__(self) -> None:
        self.workers: dict[int, WorkerState] = {}
        self.places: tuple[dict[int, WorkerState], ...] = tuple({} for _ in range(2 * MAX_DEPTH))

    def file(self, worker: WorkerState, depth: int) -> None:
        """Put the worker where it belongs. depth: steps that it may hold now."""
        running = len(worker.running)
        place = self.places[2 * min(running, MAX_DEPTH - 1) + (worker.sources > 0)] if running < depth else None
        if place is not worker.place:
            self.remove(worker)
            if place is not None:
                place[worker.id] = worker
            worker.place = place

    @staticmethod
    def remove(worker: WorkerState) -> None:
        """Take the worker out of its place."""
        if worker.place is not None:
            del worker.place[worker.id]
            worker.place = None

    def pick(self) -> WorkerState | None:
        """The worker that new work should go to: the least loaded, first those that read no split."""
        for place in self.places:
            if place:
                return next(iter(place.values()))
        return None

    @property
    def has_room(self) -> bool:
        return any(self.places)

    @property
    def starving(self) -> bool:
        """Some worker has nothing to do."""
        return bool(self.places[0] or self.places[1])


QueueEntry = tuple[int, tuple[int, ...], int, Node | CursorEntry]  # (split, key, tie, item): the order of queues
