"""Stages: runs of plan operators that execute together in one worker. Pure data, shared by plan, scheduler, worker."""

from __future__ import annotations

from enum import Enum

from msgspec import Struct


class Order(Enum):
    """In what order a stage takes its input blocks."""

    SOURCE = "source"  # no input blocks: a cursor per split reads it
    FREE = "free"  # any block on any worker: a cursor per block
    SPLIT = "split"  # blocks of a split in sequence, in one worker: a cursor per split
    GLOBAL = "global"  # as SPLIT, and splits one after the other in split order (limit)


class End(Enum):
    """Where a stage's output goes."""

    NEXT = "next"  # blocks for the next stage of the route
    SINK = "sink"  # written and published by the cursor itself: the answer is a receipt
    DELIVER = "deliver"  # blocks for the consumer in the driver, in split order


class Stage(Struct, frozen=True):
    """Operators [first, stop) of the plan in one worker of one pool.

    id: index in the physical plan's stage table. reads: the stage starts by reading the split (order SOURCE).
    model: the stage is a row-wise model, run by Apply: output i belongs to input i, and input columns other than
    `columns_in` never leave where they are.
    columns_in: what a model stage reads, None for all. keep: for a model stage, the columns of its input that later
    stages need. transient: columns of this stage's output that only the next (model) stage reads; they go into a
    part of their own so that their memory is free as soon as the model has run. feeds: those that it reads and later stages
    need, too; named where blocks cross a network: in a part of their own, so that the other columns stay where they are.
    max_workers: at most this many workers open this stage (replicas), None for the whole pool.
    stream: the model works on the rows of several steps at once: they are begun as they come, and answered in any order.
    limit: rows that may pass, for a GLOBAL stage. batch_rows: for a model stage, rows worth gathering for one Apply.
    cut_rows: a stage that sees a split's rows in sequence gives them on in pieces of exactly so many (the last one: what is
    left), so that the next stage, whose batches they are, may take its blocks in any order; None: as they come.
    """

    id: int
    name: str
    pool: str
    order: Order
    end: End
    first: int
    stop: int
    model: bool = False
    columns_in: tuple[str, ...] | None = None
    keep: tuple[str, ...] | None = None
    transient: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    max_workers: int | None = None
    limit: int | None = None
    batch_rows: int = 256
    stream: bool = False
    cut_rows: int | None = None


class Route(Struct, frozen=True):
    """One way of a split through the stages. `fused`: as few stages as possible; `spread`: reading apart from
    computing, so that several workers share a split. Output is the same on both.
    """

    name: str
    stages: tuple[int, ...]
