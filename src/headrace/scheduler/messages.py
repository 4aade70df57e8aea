"""What the scheduler is told besides substrate events, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.core.errors import HeadraceError
from headrace.core.receipts import Receipt, Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.splits import Split
from headrace.core.stages import Route, Stage
from headrace.core.steps import Discard, Step, SubstrateEvent


@dataclass(frozen=True, slots=True)
class SchedulerPlan:
    """stages: the stage table. routes: ways through it, the most fused first. pools: workers that will come up."""

    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    pools: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers behind the decisions; none of them is the user's to set except the budget.

    budget_bytes: blocks in flight and reserved. credit_bytes: what one step may produce before it must ask again (half a
    block, so that a block of ordinary size ends the step). slice_s: how long a step may run before it reports at
    the next block boundary (long enough that messages cost nothing, short enough for a live progress line).
    deliver_blocks: blocks that the consumer may have waiting.
    """

    budget_bytes: int = 1 << 30
    block_bytes: int = 16 << 20
    credit_bytes: int = 8 << 20
    slice_s: float = 0.25
    deliver_blocks: int = 4


# --- told


@dataclass(frozen=True, slots=True)
class SplitsListed:
    """The answer to ListSplits. done: there are no more."""

    splits: tuple[Split, ...]
    done: bool


@dataclass(frozen=True, slots=True)
class ConsumerTook:
    """The consumer has taken `blocks` of the delivered blocks."""

    blocks: int


@dataclass(frozen=True, slots=True)
class Start:
    """The run begins."""


Event = SubstrateEvent | SplitsListed | ConsumerTook | Start


# --- answered


@dataclass(frozen=True, slots=True)
class Submit:
    step: Step


@dataclass(frozen=True, slots=True)
class Drop:
    discard: Discard


@dataclass(frozen=True, slots=True)
class Release:
    parts: tuple[PartRef, ...]


@dataclass(frozen=True, slots=True)
class ListSplits:
    """Find `count` more splits."""

    count: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand the block to the consumer. Its parts are released by a command of their own, right after."""

    split: int
    block: BlockRef


@dataclass(frozen=True, slots=True)
class Settle:
    """The split is done. receipt: None when its rows were delivered, or all cut by a limit. attempt: the one that counts."""

    split: Split
    attempt: int
    receipt: Receipt | None
    tally: Tally
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """All splits are settled."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The run can't go on."""

    error: HeadraceError


Command = Submit | Drop | Release | ListSplits | Deliver | Settle | Finish | Fail
