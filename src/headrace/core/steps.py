"""Steps: what a worker is asked to do, and what it answers. The only messages between driver and workers.

`Advance` moves one cursor: a cursor is a (stage, split) or (stage, block) under way in one worker, a suspended
generator that stops when its credit is used up. `Apply` runs a row-wise model stage over blocks of any splits
and answers one new part for each.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from headrace.core.errors import HeadraceError
from headrace.core.receipts import NO_ROWS, OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef, Segment
from headrace.core.splits import Split


class Suspect(Struct, frozen=True):
    """Rows on which a worker died or hung.

    op: index of the plan node at work. segments: where the rows came from: a batch given to `op` whose origin overlaps them is
    run one row at a time. condemned: (digest of a row's content, reason): such a row is never given to `op` again but set
    aside. Content identifies a row whatever the route, block or batch that it comes in.
    """

    op: int
    segments: tuple[Segment, ...]
    condemned: tuple[tuple[str, str], ...] = ()


CONSTRUCTING = -1


class Doing(Struct, frozen=True):
    """What a worker's user code was given when it died: its last breadcrumb.

    op, name: the plan node; op CONSTRUCTING: its function or model was being made, and had no rows yet. segments: the rows.
    digest: of the row's content, when it was run alone; "" otherwise. sample: that row as an Arrow IPC stream, b"" when too
    large or not alone.
    """

    op: int
    name: str
    segments: tuple[Segment, ...] = ()
    digest: str = ""
    sample: bytes = b""

    @property
    def constructing(self) -> bool:
        return self.op == CONSTRUCTING


class Advance(Struct, frozen=True):
    """Give `inputs` to a cursor (created at its first step) and run it until its credit is used up.

    split: sent with a source's or a sink's first step; None afterwards and for stages that need none.
    end: no input will follow these. A source cursor has no inputs and end=True.
    credit_bytes: stop after a block that brings the output to this much. credit_s: stop at the next block
    boundary after this many seconds. join_bytes: smaller outputs of this step travel as one block, up to this much.
    limit_left: for a stage that starts with `limit`: how many rows may still pass, None elsewhere.
    suspects: sent with a cursor's first step: what the split's earlier attempts died on.
    next: sent to a source: splits to be opened soon, by this worker or others of its process. A hint.
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
    join_bytes: int = 0
    limit_left: int | None = None
    suspects: tuple[Suspect, ...] = ()
    next: tuple[Split, ...] = ()


class Apply(Struct, frozen=True):
    """Run a model stage over `inputs`; the answer's `outputs[i]` has as many rows as `inputs[i]`, unless it is in `whole`.

    owners[i]: (split index, attempt) of inputs[i]. suspects: of all owners.
    """

    id: int
    worker: int
    stage: int
    inputs: tuple[BlockRef, ...]
    owners: tuple[tuple[int, int], ...]
    suspects: tuple[Suspect, ...] = ()


class Discard(Struct, frozen=True):
    """Close cursor `cursor` and abort what it wrote: its split is cancelled. No answer comes."""

    worker: int
    cursor: int


Step = Advance | Apply


class OpTime(Struct, frozen=True):
    """What one operator did in one step. op: index of the plan node; -1 reading, -2 writing, -3 cutting batches
    for the next stage.
    """

    op: int
    wall_s: float
    rows_in: int
    rows_out: int


class Timing(Struct, frozen=True):
    """wall_s: the step's running time in the worker. cpu_s: CPU time its thread (or process) used meanwhile."""

    start_s: float
    wall_s: float
    cpu_s: float
    ops: tuple[OpTime, ...] = ()


NO_TIME = Timing(0.0, 0.0, 0.0)


class Share(Struct, frozen=True):
    """What an Apply has to say of one of its owners. tally: bad rows (and rows written, if it delivers); metrics: states;
    aside: quarantine files.
    """

    split_index: int
    attempt: int
    tally: Tally = NO_ROWS
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    aside: tuple[OutputFile, ...] = ()


class StepDone(Struct, frozen=True):
    """The answer to a step.

    outputs: the blocks that an Advance made, in order; for an Apply, one block per input that holds only the new part.
    finished: the cursor has taken all its input, given all its output, and is closed.
    more: it stopped because its credit was used up and can go on without further input.
    receipt: what the sink says of the published split; with finished, for stages that end in a sink.
    tally: row counts of this step (a delta). metrics: accumulator states of this step, by name (a delta; set when a
    cursor finishes). taken: rows that passed a `limit` in this step. aside: staged quarantine files of this step.
    For an Apply tally, metrics and aside are told per owner, in `shares` (none for an owner with nothing to tell).
    whole: indexes of an Apply's outputs that lost rows: such an output is the whole block (carried columns included) that takes
    the input's place, or a block of no rows and no parts when none is left.
    unreadable: what was skipped of the input and is in no tally, because nobody can tell how many rows it held; a few texts.
    wanted_rows: rows that the models of an Apply would like in one step from now on; 0: as planned.
    remarks: what the source has to say, see contracts.source.RemarkingSource.
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
    aside: tuple[OutputFile, ...] = ()
    shares: tuple[Share, ...] = ()
    whole: frozenset[int] = frozenset()
    unreadable: tuple[str, ...] = ()
    wanted_rows: int = 0
    remarks: tuple[tuple[str, str], ...] = ()


class StepFailed(Struct, frozen=True):
    """The step raised. error is picklable and complete: it is what the user reads."""

    step: int
    worker: int
    error: HeadraceError


class WorkerUp(Struct, frozen=True):
    worker: int
    pool: str
    node: str = ""


class WorkerLost(Struct, frozen=True):
    """The worker died. reason: "killed by signal 9", "no answer for 30 s", ... doing: its last breadcrumb, None when no user
    code was at work. stack: of all its threads, when it hung. started: it had come up before. pool: that it belonged to.
    gone: its place is gone with it (the node died or leaves): it was no fault of what ran there, and no worker takes its place.
    untold: nobody could be asked what it died of: its node may be about to be found dead.
    """

    worker: int
    reason: str
    doing: Doing | None = None
    stack: str = ""
    started: bool = True
    pool: str = ""
    gone: bool = False
    untold: bool = False


class WorkerResting(Struct, frozen=True):
    """The worker shall take no new work while it rests, and goes on with the cursors that it has: its node leaves, or is short
    of memory.
    """

    worker: int
    resting: bool


class RoomOffered(Struct, frozen=True):
    """There is room for another worker. Answered by AddWorker, or by nothing. node: "" for one that is to come. why: for
    people.
    """

    pool: str
    device: str
    node: str
    why: str = "a node has joined"


class PartsLost(Struct, frozen=True):
    """These parts are gone with the node or worker that held them: the splits that still need them start again."""

    parts: tuple[int, ...]
    reason: str


class PartsFreed(Struct, frozen=True):
    """The memory of these parts is free again: they were released and no view of them is left."""

    parts: tuple[int, ...]


SubstrateEvent = StepDone | StepFailed | WorkerUp | WorkerLost | WorkerResting | RoomOffered | PartsFreed | PartsLost
