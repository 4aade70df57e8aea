"""Workers that exist in virtual time: no threads, no clock, no Arrow. For simulations of the scheduler.

`wait` jumps to the next thing that happens. A block is a sequence of row numbers, so that a test can tell that each row
arrived once and in order: row r of split i is `i * SPLIT_ROWS + r`, and a row's k-th child is `row * CHILDREN + k`.
Everything random comes from the program's seed: the same seed gives the same run.

Invariants, asserted here: a part is released once, and never while a step that reads it is queued or runs; a cursor's steps go
to one worker, and none to a dead one; parts of a block stay row for row together; a spilled part is read by its new handle.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from random import Random
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from headrace.core.errors import BlockLost, InternalError, TransientError, UserCodeError
from headrace.core.receipts import Receipt, Tally
from headrace.core.refs import BlockRef, PartRef, Segment
from headrace.core.resources import WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import (
    Advance,
    Apply,
    Discard,
    Doing,
    PartsFreed,
    PartsLost,
    RoomOffered,
    Share,
    Step,
    StepDone,
    StepFailed,
    SubstrateEvent,
    Suspect,
    Timing,
    WorkerLost,
    WorkerResting,
    WorkerUp,
)

SPLIT_ROWS = 1_000_000
CHILDREN = 1_000
HANG_S = 30.0  # a worker that hangs is killed after so long
Rows = Sequence[int]


def source_rows(split: Split) -> range:
    """The rows that reading `split` gives."""
    start = split.index * SPLIT_ROWS
    return range(start, start + (split.rows or 0))


class Work(Struct, frozen=True):
    """What a stage's code does and costs. Its operator's index is the stage's `first`.

    step_s + row_s * rows is a step's time. block_rows: rows of an output block, at most. row_bytes: of one output row.
    expand: children per row (1: the row itself). drop: every row whose number is divisible by it is dropped (0: none).
    step_blocks: input pieces that a sink, which makes no output, takes per step before its time slice is over.
    bad: every row whose number leaves 1 when divided by it fails and is skipped (0: none). poison: rows that kill the worker.
    """

    step_s: float = 1e-3
    row_s: float = 1e-5
    block_rows: int = 100
    row_bytes: int = 10
    expand: int = 1
    drop: int = 0
    step_blocks: int = 1 << 30
    bad: int = 0
    poison: frozenset[int] = frozenset()

    def good(self, rows: Rows) -> Rows:
        """Those of the input rows that don't fail."""
        if self.bad or self.poison:
            return [row for row in rows if not (self.bad and row % self.bad == 1) and row not in self.poison]
        return rows

    def of(self, rows: Rows) -> Rows:
        """The output rows of good input rows: what a test compares with."""
        if self.expand > 1:
            rows = [row * CHILDREN + k for row in rows for k in range(self.expand)]
        if self.drop:
            rows = [row for row in rows if row % self.drop]
        return rows


class SimulatedProgram(Struct, frozen=True):
    """What the simulated workers run.

    jitter: step times are stretched or shrunk by a random factor in [1 - jitter, 1 + jitter]; one step in fifty then takes
    twenty times as long. start_s, free_s: the longest that a worker takes to come up, and a part to be freed.
    fails: the n-th step of the run raises. loses: at these steps of the run their workers die; tells: with a breadcrumb.
    hangs: at these they hang, and are killed for it. kills: at these times some worker dies, whether it has a step or not.
    unborn: these workers, in the order in which they are started, die before they come up.
    stumbles: these steps meet trouble with the storage. record: keep the rows of sinks.

    Where workers name nodes: leaves: (when, notice): a node goes, and its workers rest from that much time before. joins: when
    a node of one worker for each pool comes. rests: (when, how long): some worker rests. forgets: when some parts of some node
    are lost. news_s: the longest that it takes until the loss of a node's workers and parts is known.
    """

    stages: tuple[Stage, ...]
    works: Mapping[int, Work]
    seed: int = 0
    jitter: float = 0.0
    start_s: float = 0.0
    free_s: float = 0.0
    fails: int | None = None
    loses: frozenset[int] = frozenset()
    tells: bool = False
    hangs: frozenset[int] = frozenset()
    kills: tuple[float, ...] = ()
    unborn: frozenset[int] = frozenset()
    stumbles: frozenset[int] = frozenset()
    record: bool = True
    leaves: tuple[tuple[float, float], ...] = ()
    joins: tuple[float, ...] = ()
    rests: tuple[tuple[float, float], ...] = ()
    forgets: tuple[float, ...] = ()
    news_s: float = 0.0


class _Worker(Struct):
    """running: the step at work and its answer to be. untold: it is dead, and nobody knows yet."""

    spec: WorkerSpec
    queue: deque[Step | Discard] = field(default_factory=deque[Step | Discard])
    running: tuple[Step, SubstrateEvent] | None = None
    up: bool = False
    dead: bool = False
    untold: bool = False
    cursors: dict[int, _Cursor] = field(default_factory=dict[int, "_Cursor"])


class SimulatedSubstrate:
    """See the module. now_s: virtual time. staged: (split index, attempt) -> rows that its sink wrote."""

    name = "simulated"

    def __init__(self) -> None:
        self.now_s = 0.0
        self.staged: dict[tuple[int, int], list[int]] = {}
        self.steps_run = 0
        self._program: SimulatedProgram = SimulatedProgram((), {})
        self._random = Random(0)
        self._workers: dict[int, _Worker] = {}
        self._agenda: list[tuple[float, int, Callable[[], Any] | SubstrateEvent]] = []
        self._tie = 0
        self._next_part = 0
        self._parts: dict[int, int] = {}  # part id -> bytes, until released
        self._sizes: dict[int, int] = {}  # the same as far as memory is concerned: 0 once it is on disk
        self._moved: dict[int, Rows] = {}  # part id -> its handle since it was spilled
        self._unfreed_bytes = 0
        self._started = 0
        self._reading: dict[int, int] = {}  # part id -> steps that read it
        self._nodes: dict[str, bool] = {}  # living nodes -> they leave soon
        self._named = 0
        self._home: dict[int, str] = {}  # part id -> the node that holds it
        self._lost: set[int] = set()  # parts that are gone, and not released yet
        self._woken = threading.Event()
        self._stopped = False

    # ---------------------------------------------------------------- the contract

    def start(self, program: SimulatedProgram, workers: Sequence[WorkerSpec]) -> None:
        self._program = program
        self._random = Random(program.seed)
        self._nodes = {spec.node: False for spec in workers if spec.node}
        for spec in workers:
            self.add_worker(spec)
        for at_s in program.kills:
            self.later(at_s, self._kill_any)
        for at_s, notice_s in program.leaves:
            self.later(at_s, lambda notice_s=notice_s: self._give_notice(notice_s))
        for at_s in program.joins:
            self.later(at_s, self._join)
        for at_s, seconds in program.rests:
            self.later(at_s, lambda seconds=seconds: self._rest_any(seconds))
        for at_s in program.forgets:
            self.later(at_s, self._forget_any)

    def add_worker(self, worker: WorkerSpec) -> None:
        if self._nodes and not worker.node:
            worker = replace(worker, node=self._random.choice(tuple(self._nodes)))
        elif worker.node == "" and self._named:
            worker = replace(worker, node=self._new_node())  # all are gone: it waits until another one comes
        state = self._workers[worker.id] = _Worker(worker)
        self._started += 1
        born = self._started not in self._program.unborn

        def up() -> WorkerUp | WorkerLost:
            if worker.node and worker.node not in self._nodes:
                state.dead = True
                return WorkerLost(worker.id, "its node is gone", started=False, pool=worker.pool, gone=True)
            if not born:
                state.dead = True
                return WorkerLost(worker.id, "exited while it started", started=False, pool=worker.pool)
            state.up = True
            if self._nodes.get(worker.node):
                self.later(0.0, WorkerResting(worker.id, True))
            return WorkerUp(worker.id, worker.pool, worker.node)

        self.later(self._random.random() * self._program.start_s, up)

    def submit(self, step: Step | Discard) -> None:
        worker = self._workers[step.worker]
        if worker.untold:
            return  # it goes nowhere, and the worker's loss will say so
        assert not worker.dead or isinstance(step, Discard), f"a step for worker {step.worker}, which is dead"
        assert worker.up, f"a step for worker {step.worker}, which is not up"
        if not isinstance(step, Discard):
            for block in step.inputs:
                for part in block.parts:
                    assert part.id in self._parts, f"step {step.id} reads part {part.id}, which was released"
                    assert self._is_current(part), f"step {step.id} reads part {part.id} where it was before it was spilled"
                    self._reading[part.id] = self._reading.get(part.id, 0) + 1
        worker.queue.append(step)
        if worker.running is None:
            self._begin(worker)

    def release(self, parts: Sequence[PartRef]) -> None:
        for part in parts:
            assert part.id in self._parts, f"part {part.id} is released twice, or was never made"
            assert part.id not in self._reading, f"part {part.id} is released while a step reads it"
            del self._parts[part.id]
            self._moved.pop(part.id, None)
            self._home.pop(part.id, None)
            self._lost.discard(part.id)
        event = PartsFreed(tuple(p.id for p in parts))
        size = sum(self._sizes.pop(p.id) for p in parts)

        def freed() -> PartsFreed:
            self._unfreed_bytes -= size
            return event

        self.later(self._random.random() * self._program.free_s, freed)

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        """The next thing that happens. With nothing on the agenda, blocks until `wake` unless there is a timeout."""
        if self._stopped:
            return []
        if not self._agenda:
            if timeout_s is None:
                self._woken.wait()
            self._woken.clear()
            return []
        self.now_s, _, item = heappop(self._agenda)
        event = item() if callable(item) else item
        return [] if event is None else [event]

    def wake(self) -> None:
        self._woken.set()

    def fetch(self, block: BlockRef) -> Any:
        """The block's rows (there is no Arrow here)."""
        return self._rows(block)

    def kill(self, worker: int, reason: str) -> bool:
        """Nothing hangs here."""
        return False

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        """To a disk of which half of the parts find no room."""
        moved: list[PartRef] = []
        for part in parts:
            assert part.id in self._parts, f"part {part.id} is spilled, and was released"
            assert part.id not in self._reading, f"part {part.id} is spilled while a step reads it"
            if self._random.random() < 0.5 and part.id not in self._lost:
                self._unfreed_bytes -= self._sizes[part.id]
                self._sizes[part.id] = 0
                self._moved[part.id] = part.handle[:]
                moved.append(replace(part, handle=self._moved[part.id]))
        return tuple(moved)

    def memory_bytes(self) -> int:
        return self._unfreed_bytes

    def stop(self) -> tuple[()]:
        self._stopped = True
        self._workers.clear()
        self._agenda.clear()
        return ()

    # ---------------------------------------------------------------- for simulations

    def later(self, delay_s: float, item: Callable[[], Any] | Any) -> None:
        """Put an event, or a call that makes one or None, on the agenda: the simulation's own parts share the clock."""
        self._tie += 1
        heappush(self._agenda, (self.now_s + delay_s, self._tie, item))

    @property
    def idle(self) -> bool:
        """Nothing will ever happen by itself."""
        return not self._agenda

    @property
    def unreleased(self) -> tuple[int, ...]:
        """Parts that were made and not released."""
        return tuple(self._parts)

    @property
    def open_cursors(self) -> int:
        """Cursors that are neither finished nor discarded."""
        return sum(len(w.cursors) for w in self._workers.values())

    @property
    def living(self) -> Counter[str]:
        """Workers that are up or about to be, by pool."""
        return Counter(w.spec.pool for w in self._workers.values() if not w.dead)

    @property
    def believed(self) -> Counter[str]:
        """The same, with those that are dead unknown to anybody."""
        return Counter(w.spec.pool for w in self._workers.values() if not w.dead or w.untold)

    # ---------------------------------------------------------------- workers

    def _begin(self, worker: _Worker) -> None:
        """Run the next queued step; its answer comes when its time is over."""
        while worker.queue and not worker.dead:
            step = worker.queue.popleft()
            if isinstance(step, Discard):
                worker.cursors.pop(step.cursor, None)
                continue
            hangs = self.steps_run + 1 in self._program.hangs
            answer = self._run(worker, step)
            worker.running = (step, answer)
            seconds = answer.timing.wall_s if isinstance(answer, StepDone) else HANG_S if hangs else 0.0

            def ends(step: Step = step, answer: SubstrateEvent = answer) -> SubstrateEvent | None:
                if worker.dead:  # killed meanwhile
                    return None
                self._end_reading(step)
                worker.running = None
                if isinstance(answer, WorkerLost):
                    self._die(worker)
                self._begin(worker)
                return answer

            self.later(seconds, ends)
            return

    def _kill_any(self) -> WorkerLost | None:
        """A worker dies, whatever it is at."""
        living = [w for w in self._workers.values() if w.up and not w.dead]
        if not living:
            return None
        worker = self._random.choice(living)
        doing = self._kill(worker)
        return WorkerLost(worker.spec.id, "killed by signal 9", doing, pool=worker.spec.pool)

    def _kill(self, worker: _Worker) -> Doing | None:
        """Its breadcrumb."""
        doing = None
        if worker.running is not None:
            step, answer = worker.running
            doing = self._crumb(step) if self._program.tells else None
            self._end_reading(step)
            if isinstance(answer, StepDone):
                self._forget([part.id for block in answer.outputs for part in block.parts])
        self._die(worker)
        return doing

    # ---------------------------------------------------------------- nodes

    def _new_node(self) -> str:
        self._named += 1
        name = f"new{self._named}"
        self._nodes[name] = False
        return name

    def _join(self) -> None:
        node = self._new_node()
        for pool in {w.spec.pool: None for w in self._workers.values()}:
            self.later(self._random.random() * self._program.start_s, RoomOffered(pool, f"{pool}:{node}", node))

    def _on(self, node: str) -> list[_Worker]:
        return [w for w in self._workers.values() if w.spec.node == node and w.up and not w.dead]

    def _give_notice(self, notice_s: float) -> None:
        """Some node is about to leave: its workers take no more work."""
        staying = [name for name, leaves in self._nodes.items() if not leaves]
        if not staying:
            return
        node = self._random.choice(staying)
        self._nodes[node] = notice_s > 0.0
        for worker in self._on(node) if notice_s > 0.0 else ():
            self.later(0.0, lambda worker=worker: None if worker.dead else WorkerResting(worker.spec.id, True))
        self.later(notice_s, lambda: self._leave(node))

    def _leave(self, node: str) -> None:
        """The node is gone with all that it holds; the news comes bit by bit."""
        del self._nodes[node]
        self._named = max(self._named, 1)
        lost = [part for part, home in self._home.items() if home == node]
        for worker in self._on(node):
            self._kill(worker)
            worker.untold = True

            def told(worker: _Worker = worker) -> WorkerLost:
                worker.untold = False
                return WorkerLost(worker.spec.id, f"node {node} is gone", pool=worker.spec.pool, gone=True)

            self.later(self._random.random() * self._program.news_s, told)
        self._lose(lost, f"node {node} is gone")

    def _rest_any(self, seconds: float) -> WorkerResting | None:
        """Some worker rests for a while."""
        living = [w for w in self._workers.values() if w.up and not w.dead]
        if not living:
            return None
        worker = self._random.choice(living)
        leaves = self._nodes.get(worker.spec.node, False)
        self.later(seconds, lambda: None if worker.dead or leaves else WorkerResting(worker.spec.id, False))
        return WorkerResting(worker.spec.id, True)

    def _forget_any(self) -> None:
        """Some parts of some node are lost, and nothing else."""
        if self._home:
            node = self._random.choice(sorted(set(self._home.values())))
            parts = [part for part, home in self._home.items() if home == node and self._random.random() < 0.5]
            self._lose(parts, f"node {node} has dropped them")

    def _lose(self, parts: list[int], reason: str) -> None:
        parts = [part for part in parts if part in self._parts]
        self._lost.update(parts)
        if parts:
            self.later(self._random.random() * self._program.news_s, PartsLost(tuple(parts), reason))

    # ---------------------------------------------------------------- steps

    def _forget(self, parts: Sequence[int]) -> None:
        """Made and never told: they go with their worker."""
        for part in parts:
            del self._parts[part]
            self._home.pop(part, None)
            self._lost.discard(part)
            self._unfreed_bytes -= self._sizes.pop(part)

    def _die(self, worker: _Worker) -> None:
        worker.dead = True
        worker.running = None
        worker.cursors.clear()
        for step in worker.queue:
            if not isinstance(step, Discard):
                self._end_reading(step)
        worker.queue.clear()

    def _end_reading(self, step: Step) -> None:
        for block in step.inputs:
            for part in block.parts:
                left = self._reading[part.id] - 1
                if left:
                    self._reading[part.id] = left
                else:
                    del self._reading[part.id]

    def _run(self, worker: _Worker, step: Step) -> SubstrateEvent:
        self.steps_run += 1
        if self.steps_run == self._program.fails:
            return StepFailed(step.id, worker.spec.id, UserCodeError("the simulated code raises"))
        if self.steps_run in self._program.stumbles:
            if isinstance(step, Advance):
                worker.cursors.pop(step.cursor, None)
            return StepFailed(step.id, worker.spec.id, TransientError("the simulated storage is busy"))
        if self._lost and any(part.id in self._lost for block in step.inputs for part in block.parts):
            if isinstance(step, Advance):
                worker.cursors.pop(step.cursor, None)
            return StepFailed(step.id, worker.spec.id, BlockLost("a simulated block is lost"))
        known = self._next_part
        try:
            if self.steps_run in self._program.loses or self.steps_run in self._program.hangs:
                raise Death(self._crumb(step) if self._program.tells else None)
            return self._work(worker, step)
        except Death as death:
            self._forget(range(known + 1, self._next_part + 1))
            hung = self.steps_run in self._program.hangs
            reason = f"no answer for {HANG_S:g} s" if hung else "killed by the simulation"
            return WorkerLost(worker.spec.id, reason, death.doing, pool=worker.spec.pool)

    def _crumb(self, step: Step) -> Doing:
        rows = [row for block in step.inputs for row in self._rows(block)] or [0]
        first = self._program.stages[step.stage].first
        return Doing(first, f"op {first}", (Segment("rows", min(rows), max(rows) - min(rows) + 1),))

    def _work(self, worker: _Worker, step: Step) -> SubstrateEvent:
        if isinstance(step, Apply):
            return self._apply(worker, step)
        cursor = worker.cursors.get(step.cursor)
        if cursor is None:
            stage = self._program.stages[step.stage]
            cursor = worker.cursors[step.cursor] = _Cursor(stage, self._program.works[stage.id], step)
        done = cursor.advance(step, self)
        if done.finished:
            del worker.cursors[step.cursor]
        return done

    def _apply(self, worker: _Worker, step: Apply) -> StepDone:
        stage, work = self._program.stages[step.stage], self._program.works[step.stage]
        outputs: list[BlockRef] = []
        whole: set[int] = set()
        shares: dict[tuple[int, int], Tally] = {}
        rows = 0
        for i, (block, owner) in enumerate(zip(step.inputs, step.owners, strict=True)):
            given = self._rows(block)
            survive(work, stage, given, step.suspects)
            good = work.good(given)
            written = len(good) if stage.end is End.DELIVER else 0
            shares[owner] = shares.get(owner, Tally()) + Tally(skipped=len(given) - len(good), written=written)
            rows += block.rows
            if len(good) < len(given):
                whole.add(i)
                part = (self.put(worker.spec.id, good, work.row_bytes * len(good), ("id",)),) if good else ()
                outputs.append(BlockRef(len(good), part))
            else:
                part = (self.put(worker.spec.id, given, work.row_bytes * block.rows, (f"model{step.stage}",)),)
                outputs.append(BlockRef(block.rows, part))
        timing = Timing(self.now_s, self.stretch(work.step_s + work.row_s * rows), 0.0)
        told = tuple(Share(split, attempt, tally) for (split, attempt), tally in shares.items() if tally != Tally())
        return StepDone(step.id, worker.spec.id, tuple(outputs), timing=timing, shares=told, whole=frozenset(whole))

    def put(self, owner: int, rows: Rows, size: int, columns: tuple[str, ...]) -> PartRef:
        """A new part."""
        self._next_part += 1
        self._parts[self._next_part] = self._sizes[self._next_part] = size
        self._unfreed_bytes += size
        node = self._workers[owner].spec.node
        if node:
            self._home[self._next_part] = node
        return PartRef(self._next_part, owner, size, columns, rows, node)

    def stretch(self, seconds: float) -> float:
        """A step's time under the program's jitter."""
        jitter = self._program.jitter
        if not jitter:
            return seconds
        seconds *= 1.0 + jitter * (2.0 * self._random.random() - 1.0)
        return seconds * 20.0 if self._random.random() < 0.02 else seconds

    def stage(self, split: int, attempt: int, rows: list[int]) -> None:
        """A sink's output. An attempt ends once."""
        if (split, attempt) in self.staged:
            raise InternalError(f"attempt {attempt} at split {split} ends twice")
        if self._program.record:
            self.staged[split, attempt] = rows

    @property
    def records(self) -> bool:
        return self._program.record

    def _is_current(self, part: PartRef) -> bool:
        return self._moved.get(part.id, part.handle) is part.handle

    def _rows(self, block: BlockRef) -> Rows:
        assert all(map(self._is_current, block.parts)), "a spilled part is read where it was before"
        rows: Rows = block.parts[0].handle
        assert len(rows) == block.rows
        for part in block.parts[1:]:
            assert part.handle == rows, "the parts of a block don't belong to the same rows"
        return rows


class Death(Exception):
    """The worker dies. doing: its breadcrumb."""

    def __init__(self, doing: Doing | None) -> None:
        super().__init__(doing)
        self.doing = doing


def survive(work: Work, stage: Stage, rows: Rows, suspects: tuple[Suspect, ...]) -> None:
    """Raises Death if poison is among the rows; what was condemned is not touched. Suspect rows are tried one by one."""
    if not work.poison or not rows:
        return
    mine = [s for s in suspects if s.op == stage.first]
    condemned = {digest for s in mine for digest, _ in s.condemned}
    killers = [row for row in rows if row in work.poison and str(row) not in condemned]
    if not killers:
        return
    segment = Segment("rows", min(rows), max(rows) - min(rows) + 1)
    alone = any(a.row < segment.row + segment.rows and segment.row < a.row + a.rows for s in mine for a in s.segments)
    if alone:
        raise Death(Doing(stage.first, f"op {stage.first}", (Segment("rows", killers[0], 1),), str(killers[0])))
    raise Death(Doing(stage.first, f"op {stage.first}", (segment,)))


class _Cursor:
    """A stage's generator over one split or block. pieces: input not yet taken. out: output not yet given, from `given` on."""

    def __init__(self, stage: Stage, work: Work, step: Advance) -> None:
        self.stage = stage
        self.work = work
        self.worker = step.worker
        self.split: Split | None = step.split
        self.suspects = step.suspects
        self.pieces: deque[Rows] = deque()
        self.out: list[int] | Rows = []
        self.given = 0
        self.written: list[int] = []
        self.written_rows = 0
        self.used_up = False  # the limit
        self.ended = False
        self.cuts_pieces = stage.order in (Order.SOURCE, Order.FREE)
        if stage.order is Order.SOURCE:
            assert step.split is not None
            rows = source_rows(step.split)
            self.pieces.extend(rows[i : i + work.block_rows] for i in range(0, len(rows), work.block_rows))

    def advance(self, step: Advance, substrate: SimulatedSubstrate) -> StepDone:
        assert not self.ended, f"cursor {step.cursor} goes on after its input has ended"
        assert step.worker == self.worker, f"cursor {step.cursor} lives in worker {self.worker}"
        stage, work = self.stage, self.work
        self.pieces.extend(block.parts[0].handle if len(block.parts) == 1 else substrate.fetch(block) for block in step.inputs)
        left = step.limit_left
        if left == 0:
            self._use_up()
        outputs: list[BlockRef] = []
        size = seen = read = expanded = filtered = taken = written = blocks = skipped = 0
        while size < step.credit_bytes and blocks < work.step_blocks:
            if self._has_output(step.end):
                outputs.append(block := self._give(substrate))
                size += block.bytes
                continue
            if not self.pieces:
                break
            blocks += 1
            piece = self.pieces.popleft()
            read += len(piece)
            if left is not None:
                piece = piece[:left]
                left -= len(piece)
                taken += len(piece)
                if not left:
                    self._use_up()
            seen += len(piece)
            survive(work, stage, piece, self.suspects)
            good = work.good(piece)
            skipped += len(piece) - len(good)
            piece = good
            made = work.of(piece)
            expanded += len(piece) * (work.expand - 1)
            filtered += len(piece) * work.expand - len(made)
            if stage.end is End.SINK:
                written += len(made)
                if substrate.records:
                    self.written.extend(made)
            else:
                self.out = made if self.given == len(self.out) else [*self.out[self.given :], *made]
                self.given = 0
        finished = (step.end or self.used_up) and not self.pieces and self.given == len(self.out)
        more = not finished and (bool(self.pieces) or self._has_output(step.end))
        self.ended = finished
        if stage.end is End.DELIVER:
            written = sum(b.rows for b in outputs)
        rows_in = read if stage.order is Order.SOURCE else 0
        tally = Tally(rows_in=rows_in, expanded=expanded, filtered=filtered, written=written, skipped=skipped)
        self.written_rows += written
        receipt = None
        if finished and stage.end is End.SINK:
            substrate.stage(step.split_index, step.attempt, self.written)
            receipt = Receipt(step.split_index, "", step.attempt, rows=self.written_rows)
        timing = Timing(substrate.now_s, substrate.stretch(work.step_s + work.row_s * seen), 0.0)
        return StepDone(step.id, step.worker, tuple(outputs), finished, more, receipt, tally=tally, taken=taken, timing=timing)

    def _use_up(self) -> None:
        self.used_up = True
        self.pieces.clear()

    def _has_output(self, end: bool) -> bool:
        rows = len(self.out) - self.given
        last = self.used_up or (end and not self.pieces)
        return rows >= self.work.block_rows or (rows > 0 and (self.cuts_pieces or last))

    def _give(self, substrate: SimulatedSubstrate) -> BlockRef:
        stage = self.stage
        rows = self.out[self.given : self.given + self.work.block_rows]
        self.given += len(rows)
        size = self.work.row_bytes * len(rows)
        if not stage.transient:
            return BlockRef(len(rows), (substrate.put(self.worker, rows, size, ("id",)),))
        parts = (
            substrate.put(self.worker, rows, size - size // 2, ("id",)),
            substrate.put(self.worker, rows, size // 2, stage.transient),
        )
        return BlockRef(len(rows), parts)
