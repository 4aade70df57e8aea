"""What the scheduler is told besides substrate events, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from headrace.core.errors import HeadraceError
from headrace.core.receipts import NO_ROWS, OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.splits import Split
from headrace.core.stages import Route, Stage
from headrace.core.steps import Discard, Doing, Step, SubstrateEvent


class SchedulerPlan(Struct, frozen=True):
    """stages: the stage table. routes: ways through it, the most fused first. pools: workers that will come up."""

    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    pools: Mapping[str, int]


class Limits(Struct, frozen=True):
    """Numbers behind the decisions; none of them is the user's to set except the budget.

    budget_bytes: blocks in flight and reserved. credit_bytes: what one step may produce before it must ask again (half a
    block, so that a block of ordinary size ends the step). slice_s: how long a step may run before it reports at
    the next block boundary (long enough that messages cost nothing, short enough for a live progress line).
    join_bytes: blocks for a model that are smaller leave a step as one, up to this much, for as long as a step may run: where
    a block costs milliseconds. 0: each leaves by itself.
    deliver_blocks: blocks that the consumer may have waiting.
    frail_blocks: a block may be lost before the consumer has it: each Deliver is answered by Delivered before anything else.
    bulk: a stage begins when all stages before it have ended; blocks beyond the budget are spilled, where that is possible.
    read_next: tell sources which splits come next: their workers share a process, and wait for a network.
    fail_on_bad_rows: a row that kills its worker ends the run (on_error="fail"). max_bad_rows, max_bad_fraction: see
    RunOptions. settled_before: rows of splits that earlier sessions of this run settled.
    """

    budget_bytes: int = 1 << 30
    block_bytes: int = 16 << 20
    credit_bytes: int = 8 << 20
    slice_s: float = 0.25
    join_bytes: int = 0
    bulk: bool = False
    deliver_blocks: int = 4
    fail_on_bad_rows: bool = True
    frail_blocks: bool = False
    read_next: bool = False
    max_bad_rows: int | None = None
    max_bad_fraction: float | None = None
    settled_before: Tally = NO_ROWS


# --- told


class SplitsListed(Struct, frozen=True):
    """The answer to ListSplits. done: there are no more.

    splits: those still to do. settled: those in between that an earlier session settled: (index, rows that passed each limit,
    by the limit's operator index). Together they are consecutive.
    """

    splits: tuple[Split, ...]
    done: bool
    settled: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()


class ConsumerTook(Struct, frozen=True):
    """The consumer has taken `blocks` of the delivered blocks."""

    blocks: int


class Delivered(Struct, frozen=True):
    """The answer to a Deliver, with frail blocks. lost: why the consumer did not get it, "" when it did."""

    split: int
    lost: str = ""


class Start(Struct, frozen=True):
    """The run begins."""


class Drain(Struct, frozen=True):
    """Open no further split; finish when those that are open are settled."""


class MemoryPressure(Struct, frozen=True):
    """How the node's memory stands against its budget. 0: fine. 1: no new work that makes blocks. 2: one step at a time in each
    pool, and blocks that wait go to disk.
    """

    level: int


class BudgetChanged(Struct, frozen=True):
    """Blocks in flight and reserved may take so much from now on: nodes have come or gone. What is there already stays."""

    budget_bytes: int


class PartsSpilled(Struct, frozen=True):
    """The answer to Spill, at once: these parts (same ids) are on disk, with new handles, and cost no memory."""

    parts: tuple[PartRef, ...]


Event = SubstrateEvent | SplitsListed | ConsumerTook | Delivered | Start | Drain | MemoryPressure | BudgetChanged | PartsSpilled


# --- answered


class Submit(Struct, frozen=True):
    step: Step


class Drop(Struct, frozen=True):
    discard: Discard


class Release(Struct, frozen=True):
    parts: tuple[PartRef, ...]


class ListSplits(Struct, frozen=True):
    """Find `count` more splits."""

    count: int


class Deliver(Struct, frozen=True):
    """Hand the block to the consumer, without its first `skip` rows: a split that was retried had delivered them before. Its
    parts are released by a command of their own, right after; with `confirm`, when Delivered has told how it went.
    """

    split: int
    block: BlockRef
    skip: int = 0
    confirm: bool = False


class Settle(Struct, frozen=True):
    """The split is done. receipt: None when its rows were delivered, or all cut by a limit. attempt: the one that counts.

    aside: its quarantine files. taken: rows that passed each limit, by the limit's operator index.
    """

    split: Split
    attempt: int
    receipt: Receipt | None
    tally: Tally
    cancelled: bool = False
    aside: tuple[OutputFile, ...] = ()
    taken: tuple[tuple[int, int], ...] = ()


class Retry(Struct, frozen=True):
    """Split `index` starts again as `attempt`: whatever earlier attempts told counts for nothing. why: for people.

    crash: the breadcrumb of the worker that died on it, None when it was no user code.
    """

    index: int
    attempt: int
    why: str
    crash: Doing | None = None


class AddWorker(Struct, frozen=True):
    """Start a worker: in the place of one that died (`replaces`), or where there is room (replaces None; device, node)."""

    worker: int
    pool: str
    replaces: int | None
    why: str
    device: str = ""
    node: str = ""


class Spill(Struct, frozen=True):
    """Move these parts to disk now; answered by PartsSpilled before anything else."""

    parts: tuple[PartRef, ...]


class Finish(Struct, frozen=True):
    """All splits are settled; drained: those that were open are, the others wait for the next session."""

    drained: bool = False


class Fail(Struct, frozen=True):
    """The run can't go on."""

    error: HeadraceError


Command = Submit | Drop | Release | ListSplits | Deliver | Settle | Retry | AddWorker | Spill | Finish | Fail
