"""The scheduler's tables: splits, their ordered lists of nodes, cursors, workers.

A split's blocks under way form a doubly linked list in input order. A free stage may finish its blocks in any
order: a cursor stands where its input stood, its outputs are inserted before it, and it is unlinked when done. A
sequential stage is a marker in the list: everything before it has passed the stage, everything after has not, so it
takes the node that follows it. The source stands at the end. So order needs no sequence numbers and no reorder buffer.

Invariants: a node is in exactly one list; a part belongs to exactly one live block; a cursor is idle, queued or running.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from headrace.core.receipts import Receipt, Tally
from headrace.core.refs import BlockRef
from headrace.core.splits import Split
from headrace.core.stages import Order, Stage
from headrace.core.steps import Step

DELIVER_STAGE = -1  # the "next stage" of a block that waits for the consumer


class CursorState(Enum):
    IDLE = "idle"  # waits for input
    QUEUED = "queued"  # could run
    RUNNING = "running"
    DONE = "done"


class Node:
    """A place in a split's list: a block (cursor is None), or a cursor (source, free, or the marker of a sequence).

    stage: for a block the stage that it waits for or is running in. running: handed to a worker.
    """

    __slots__ = ("block", "cursor", "gone", "next", "prev", "running", "split", "stage")

    def __init__(self, split: SplitState, stage: int, block: BlockRef | None = None) -> None:
        self.split = split
        self.stage = stage
        self.block = block
        self.cursor: CursorEntry | None = None
        self.running = False
        self.gone = False
        self.prev: Node | None = None
        self.next: Node | None = None


class CursorEntry:
    """A cursor, as the scheduler sees it. worker: None until first dispatched; bound to it afterwards."""

    __slots__ = ("end_sent", "fed", "id", "more", "node", "split", "stage", "started", "state", "worker")

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

    @property
    def sequential(self) -> bool:
        return self.stage.order in (Order.SPLIT, Order.GLOBAL)


class SplitState:
    """An open split. following: stage id -> the next stage of its route (DELIVER_STAGE at the end, None after a sink)."""

    __slots__ = (
        "attempt",
        "closed",
        "cursors",
        "following",
        "head",
        "markers",
        "receipt",
        "source",
        "source_done",
        "split",
        "tail",
        "tally",
    )

    def __init__(self, split: Split, attempt: int, following: dict[int, int | None]) -> None:
        self.split = split
        self.attempt = attempt
        self.following = following
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
    """A live worker. running: its steps, oldest first. bound: stage id -> heap of (split, tie, cursor) that only it can run."""

    __slots__ = ("bound", "id", "pool", "running", "sources")

    def __init__(self, id: int, pool: str) -> None:
        self.id = id
        self.pool = pool
        self.running: dict[int, Step] = {}
        self.bound: dict[int, list[tuple[int, int, CursorEntry]]] = {}
        self.sources = 0
