"""Events for observers: the one stream that progress, report and traces subscribe to, and read nothing else."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from headrace.core.receipts import Receipt, Tally
from headrace.core.steps import Timing


class RunStarted(Struct, frozen=True):
    """pools: pool name -> number of workers. stages: stage id -> (name, pool). ops: operator index -> name.

    settled: splits that earlier sessions of the run have settled; tally: their rows. run: its name in the destination, "" when
    nothing is kept. sessions: this one included. quarantine: where rows that fail are set aside, "" when they are not.
    shared: models that run in one pass: (their names, the operator that the first of them is).
    """

    at_s: float
    name: str
    engine: str
    pools: dict[str, int]
    stages: dict[int, tuple[str, str]]
    ops: dict[int, str]
    budget_bytes: int
    notes: tuple[str, ...] = ()
    settled: int = 0
    tally: Tally = field(default_factory=Tally)
    run: str = ""
    sessions: int = 1
    quarantine: str = ""
    shared: tuple[tuple[tuple[str, ...], int], ...] = ()


class SplitsFound(Struct, frozen=True):
    """count, bytes: totals so far. complete: the listing is finished. rows: in all splits, None when not known."""

    at_s: float
    count: int
    bytes: int
    complete: bool
    rows: int | None = None


class StepStarted(Struct, frozen=True):
    at_s: float
    worker: int
    pool: str
    stage: int


class StepFinished(Struct, frozen=True):
    """rows: rows that left the stage (for a source stage that ends in a sink: rows written)."""

    at_s: float
    worker: int
    pool: str
    stage: int
    rows: int
    bytes: int
    timing: Timing
    tally: Tally


class SplitSettled(Struct, frozen=True):
    """receipt is None for a split whose rows were delivered to a consumer or cut by a limit."""

    at_s: float
    index: int
    bytes: int
    receipt: Receipt | None


class SplitRetried(Struct, frozen=True):
    """A split starts again as `attempt`. why: what befell the one before. tally: what its steps told, and no longer counts."""

    at_s: float
    index: int
    attempt: int
    why: str
    tally: Tally = field(default_factory=Tally)


class WorkerReplaced(Struct, frozen=True):
    """A worker takes the place of one that is gone; replaces None: on a node that has joined. node: "" on one machine."""

    at_s: float
    worker: int
    pool: str
    replaces: int | None
    why: str
    node: str = ""


class WorkerGone(Struct, frozen=True):
    """A worker is lost: it died or hung, or it had come up and went with its node. Told before WorkerReplaced, if anyone is."""

    at_s: float
    worker: int
    pool: str


class BlocksSpilled(Struct, frozen=True):
    """Blocks that wait went to disk."""

    at_s: float
    bytes: int


class Noted(Struct, frozen=True):
    """Something that people should know while the run goes on: memory pressure, draining, a lost worker. Lines after the first
    are details, such as a stack.
    """

    at_s: float
    text: str


class MemorySampled(Struct, frozen=True):
    """in_flight_bytes: blocks between stages. rss_bytes: anonymous memory of driver and workers."""

    at_s: float
    in_flight_bytes: int
    rss_bytes: int


class ClusterSampled(Struct, frozen=True):
    """nodes: alive; leaving: those of them that are about to go. workers: pool -> workers that are up. store_bytes: blocks of
    the run in the nodes' object stores. budget_bytes: what blocks may take now; 0: as when the run began.
    """

    at_s: float
    nodes: int
    leaving: int
    workers: dict[str, int]
    store_bytes: int
    budget_bytes: int = 0


class RunFinished(Struct, frozen=True):
    """error: its text, or "" after success. metrics: accumulator results by name."""

    at_s: float
    tally: Tally
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])


RunEvent = (
    RunStarted
    | SplitsFound
    | StepStarted
    | StepFinished
    | SplitSettled
    | SplitRetried
    | WorkerReplaced
    | WorkerGone
    | BlocksSpilled
    | Noted
    | MemorySampled
    | ClusterSampled
    | RunFinished
)
