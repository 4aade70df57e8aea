"""Steps: what a worker is asked to do, and what it answers. The only messages between driver and workers.

`Advance` moves one cursor: a cursor is a (stage, split) or (stage, block) under way in one worker, a suspended
generator that stops when its credit is used up. `Apply` runs a row-wise model stage over blocks of any splits
and answers one new part for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.receipts import NO_ROWS, Receipt, Tally
from headrace.core.refs import BlockRef
from headrace.core.splits import Split
from headrace.core.wire import travels


@travels
@dataclass(frozen=True, slots=True)
class Advance:
    """Give `inputs` to a cursor (created at its first step) and run it until its credit is used up.

    split: sent with a source's or a sink's first step; None afterwards and for stages that need none.
    end: no input will follow these. A source cursor has no inputs and end=True.
    credit_bytes: stop after a block that brings the output to this much. credit_s: stop at the next block
    boundary after this many seconds.
    limit_left: for a stage that starts with `limit`: how many rows may still pass, None elsewhere.
    """

    id: int
    worker: int
    stage: int
    cursor: int
    split_index: int
    attempt: int
    split: Split | None = None
    inputs: tuple[BlockRef, ...] = ()
    end: bool = False
    credit_bytes: int = 0
    credit_s: float = 1.0
    limit_left: int | None = None


@travels
@dataclass(frozen=True, slots=True)
class Apply:
    """Run a model stage over `inputs`; the answer's `outputs[i]` has as many rows as `inputs[i]`.

    owners[i]: (split index, attempt) of inputs[i], for messages.
    """

    id: int
    worker: int
    stage: int
    inputs: tuple[BlockRef, ...]
    owners: tuple[tuple[int, int], ...]


@travels
@dataclass(frozen=True, slots=True)
class Discard:
    """Close cursor `cursor` and abort what it wrote: its split is cancelled. No answer comes."""

    worker: int
    cursor: int


Step = Advance | Apply


@travels
@dataclass(frozen=True, slots=True)
class OpTime:
    """What one operator did in one step. op: index of the plan node; -1 reading, -2 writing."""

    op: int
    wall_s: float
    rows_in: int
    rows_out: int


@travels
@dataclass(frozen=True, slots=True)
class Timing:
    """wall_s: the step's running time in the worker. cpu_s: CPU time its thread (or process) used meanwhile."""

    start_s: float
    wall_s: float
    cpu_s: float
    ops: tuple[OpTime, ...] = ()


NO_TIME = Timing(0.0, 0.0, 0.0)


@travels
@dataclass(frozen=True, slots=True)
class StepDone:
    """The answer to a step.

    outputs: the blocks that an Advance made, in order; for an Apply, one block per input that holds only the new part.
    finished: the cursor has taken all its input, given all its output, and is closed.
    more: it stopped because its credit was used up and can go on without further input.
    receipt: what the sink says of the published split; with finished, for stages that end in a sink.
    tally: row counts of this step (a delta). metrics: accumulator states of this step, by name (a delta; set when a
    cursor finishes or after an Apply). taken: rows that passed a `limit` in this step.
    """

    step: int
    worker: int
    outputs: tuple[BlockRef, ...] = ()
    finished: bool = False
    more: bool = False
    receipt: Receipt | None = None
    tally: Tally = NO_ROWS
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    taken: int = 0
    timing: Timing = NO_TIME


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step raised. error is picklable and complete: it is what the user reads."""

    step: int
    worker: int
    error: HeadraceError


@dataclass(frozen=True, slots=True)
class WorkerUp:
    worker: int
    pool: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker died. reason: "killed by signal 9", "exit code 1", ..."""

    worker: int
    reason: str


@dataclass(frozen=True, slots=True)
class PartsFreed:
    """The memory of these parts is free again: they were released and no view of them is left."""

    parts: tuple[int, ...]


SubstrateEvent = StepDone | StepFailed | WorkerUp | WorkerLost | PartsFreed
