"""Events for observers: the one stream that progress, report and traces subscribe to, and read nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headrace.core.receipts import Receipt, Tally
from headrace.core.steps import Timing


@dataclass(frozen=True, slots=True)
class RunStarted:
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


@dataclass(frozen=True, slots=True)
class SplitsFound:
    """count, bytes: totals so far. complete: the listing is finished. rows: in all splits, None when not known."""

    at_s: float
    count: int
    bytes: int
    complete: bool
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class StepStarted:
    at_s: float
    worker: int
    pool: str
    stage: int


@dataclass(frozen=True, slots=True)
class StepFinished:
    """rows: rows that left the stage (for a source stage that ends in a sink: rows written)."""

    at_s: float
    worker: int
    pool: str
    stage: int
    rows: int
    bytes: int
    timing: Timing
    tally: Tally


@dataclass(frozen=True, slots=True)
class SplitSettled:
    """receipt is None for a split whose rows were delivered to a consumer or cut by a limit."""

    at_s: float
    index: int
    bytes: int
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class SplitRetried:
    """A split starts again as `attempt`. why: what befell the one before. tally: what its steps told, and no longer counts."""

    at_s: float
    index: int
    attempt: int
    why: str
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class WorkerReplaced:
    """A worker is started in the place of one that died; replaces None: on a node that has joined. node: "" on one machine."""

    at_s: float
    worker: int
    pool: str
    replaces: int | None
    why: str
    node: str = ""


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker that had come up is lost with its node. Others may be started elsewhere, in nobody's place."""

    at_s: float
    worker: int
    pool: str


@dataclass(frozen=True, slots=True)
class BlocksSpilled:
    """Blocks that wait went to disk."""

    at_s: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that people should know while the run goes on: memory pressure, draining, a lost worker. Lines after the first
    are details, such as a stack.
    """

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class MemorySampled:
    """in_flight_bytes: blocks between stages. rss_bytes: anonymous memory of driver and workers."""

    at_s: float
    in_flight_bytes: int
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class ClusterSampled:
    """nodes: alive; leaving: those of them that are about to go. workers: pool -> workers that are up. store_bytes: blocks of
    the run in the nodes' object stores. budget_bytes: what blocks may take now; 0: as when the run began.
    """

    at_s: float
    nodes: int
    leaving: int
    workers: dict[str, int]
    store_bytes: int
    budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunFinished:
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
