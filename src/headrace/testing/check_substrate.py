"""What every substrate must do, as checks that a plug-in's author can run too.

    for check in CHECKS: check(lambda: MySubstrate(body_factory=ScriptedBody))

SPILL_CHECKS as well, where blocks that wait can be moved to disk; DEATH_CHECKS, where workers die alone; ISOLATION_CHECKS,
where blocks outlive them, or FRAIL_CHECKS, where they don't.

`ScriptedBody` stands in for the worker's body: a step's `stage` says what to do (`Act`), so that a check needs no
pipeline. Checks block on events, never on time; each starts a substrate of its own and stops it.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.contracts.substrate import BlockStore, Substrate
from headrace.core.errors import BlockLost, UserCodeError
from headrace.core.refs import BlockRef, PartRef, Segment
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.steps import (
    Advance,
    Discard,
    Doing,
    PartsFreed,
    PartsLost,
    Step,
    StepDone,
    StepFailed,
    SubstrateEvent,
    WorkerLost,
    WorkerUp,
)

PATIENCE_S = 60.0  # a check that hears nothing for this long fails instead of hanging

MakeSubstrate = Callable[[], Substrate]


class Act(IntEnum):
    """What a ScriptedBody does with a step of this stage number."""

    MAKE = 0  # one block of `credit_bytes` / 8 rows: n, n + 1, ... with n = `split_index`
    SUM = 1  # one block of one row: the sum of all inputs
    FAIL = 2  # answer StepFailed
    KEEP = 3  # as SUM, and keep views of the inputs
    DROP = 4  # let go of the views that KEEP kept
    EXIT = 5  # raise SystemExit
    DIE = 6  # SIGKILL to its own process
    HANG = 7  # never return
    DISCARDED = 8  # the cursors that were discarded, as one block
    CRASH = 9  # a fault in native code


class ScriptedBody:
    """See Act. program: None; "broken" makes the constructor raise; the path of a FIFO is opened by HANG, then closed."""

    def __init__(self, program: Any, spec: WorkerSpec, store: BlockStore) -> None:
        if program == "broken":
            raise ValueError("a body that can't be made")
        self._program = program
        self._store = store
        self._kept: list[np.ndarray] = []
        self._discarded: list[int] = []

    def run(self, step: Step) -> StepDone | StepFailed:
        act = Act(step.stage)
        crumb = self._store.crumb
        if crumb is not None:
            crumb.write(doing(step))
        answer = self._act(step, act)
        if crumb is not None:
            crumb.clear()
        return answer

    def _act(self, step: Step, act: Act) -> StepDone | StepFailed:
        if act is Act.FAIL:
            return StepFailed(step.id, step.worker, UserCodeError("scripted failure", where=(("stage", "2"),)))
        if act is Act.EXIT:
            raise SystemExit(3)
        if act is Act.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if act is Act.CRASH:
            ctypes.string_at(8)
        if act is Act.HANG:
            if self._program is not None:
                open(self._program, "wb").close()
            threading.Event().wait()
        if act is Act.DROP:
            self._kept.clear()
        return StepDone(step.id, step.worker, (self._block(self._rows(step, act)),), finished=True)

    def discard(self, cursor: int) -> None:
        self._discarded.append(cursor)

    def close(self) -> None:
        self._kept.clear()

    def _rows(self, step: Step, act: Act) -> np.ndarray:
        if act is Act.MAKE and isinstance(step, Advance):
            return np.arange(step.credit_bytes // 8, dtype=np.int64) + step.split_index
        if act is Act.DISCARDED:
            return np.array(self._discarded, dtype=np.int64)
        arrays = [self._store.get(p).column(0).to_numpy() for block in step.inputs for p in block.parts]
        if act is Act.KEEP:
            self._kept += arrays
        return np.array([sum(int(a.sum()) for a in arrays)], dtype=np.int64)

    def _block(self, values: np.ndarray) -> BlockRef:
        batch = pa.record_batch({"x": values})
        return BlockRef(batch.num_rows, (self._store.put(batch),))


def check_substrate(make: MakeSubstrate) -> None:
    """Run every check that holds for all substrates. Raises AssertionError saying what is not as it must be."""
    for check in CHECKS:
        check(make)


def check_isolation(make: MakeSubstrate) -> None:
    """Run the checks of substrates whose workers can die alone."""
    for check in ISOLATION_CHECKS:
        check(make)


# -- checks for all


def workers_report_up(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        s.submit(advance(1, 0, Act.MAKE, nbytes=8))
        assert s.up == {0, 1}, f"WorkerUp must come once for each worker, came for {s.up}"
        s.substrate.add_worker(WorkerSpec(2, CPU_POOL, "cpu"))
        s.until(lambda: 2 in s.up)


def answers_in_order(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        for i in range(40):
            s.submit(advance(i, i % 2, Act.MAKE, nbytes=80, n=i))
        s.until(lambda: len(s.answers) == 40)
        for worker in (0, 1):
            ids = [a.step for a in s.answers if a.worker == worker]
            assert len(ids) == 20
            assert ids == sorted(ids), f"worker {worker} answered its steps as {ids}"


def blocks_cross_workers(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        made = [s.run(advance(i, 0, Act.MAKE, nbytes=8000, n=i)) for i in range(3)]
        total = s.run(advance(9, 1, Act.SUM, inputs=made))
        expected = sum(int(np.arange(1000).sum()) + 1000 * i for i in range(3))
        assert s.substrate.fetch(total).column("x").to_pylist() == [expected]


def fetch_gives_own_memory(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=80_000, n=5))
        batch = s.substrate.fetch(block)
        s.substrate.release(block.parts)
        s.until(lambda: s.freed == {block.parts[0].id})
        s.run(advance(2, 0, Act.MAKE, nbytes=80_000, n=77))  # may reuse the memory
    assert batch.column("x").to_numpy()[[0, 1, -1]].tolist() == [5, 6, 10_004], "a fetched block must be the caller's own"
    assert batch.num_rows == 10_000


def fetch_zips_parts(make: MakeSubstrate) -> None:
    """Parts side by side; of a part only the columns that its reference names; a row count where there are none."""
    with running(make, 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=80, n=5))
        part = block.parts[0]
        none = PartRef(part.id, part.owner, part.bytes, (), part.handle)
        assert s.substrate.fetch(BlockRef(10, (none, part))).schema.names == ["x"]
        empty = s.substrate.fetch(BlockRef(10, (none,)))
        assert (empty.num_columns, empty.num_rows) == (0, 10)


def failures_are_answers(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        s.submit(advance(1, 0, Act.FAIL))
        s.submit(advance(2, 0, Act.EXIT))
        s.submit(advance(3, 0, Act.MAKE, nbytes=8))
        s.until(lambda: len(s.answers) == 3)
        failed, left, done = sorted(s.answers, key=lambda a: a.step)  # calls of one actor may be answered in any order
        assert isinstance(failed, StepFailed)
        assert failed.error.where[:1] == (("stage", "2"),), "an error must arrive complete"
        assert isinstance(left, StepFailed), "SystemExit must become an answer"
        assert isinstance(left.error, UserCodeError)
        assert isinstance(done, StepDone), "a worker must go on after a failed step"


def spilled_parts_stay_readable(make: MakeSubstrate) -> None:
    """By another worker and by the consumer; and they are released like others."""
    with running(make, 2) as s:
        blocks = [s.run(advance(i, 0, Act.MAKE, nbytes=80_000, n=i)) for i in range(3)]
        refs = [b.parts[0] for b in blocks]
        moved = s.substrate.spill(refs[:2])
        assert [(p.id, p.bytes, p.columns) for p in moved] == [(p.id, p.bytes, p.columns) for p in refs[:2]]
        assert s.substrate.spill(moved) == (), "parts that are on disk can't be moved there"
        assert not s.freed, "a part on disk is not a freed part"
        s.run(advance(10, 0, Act.MAKE, nbytes=80_000, n=99))  # may use their memory
        mixed = [BlockRef(10_000, (p,)) for p in (*moved, refs[2])]
        total = s.run(advance(11, 1, Act.SUM, inputs=mixed))
        expected = sum(int(np.arange(10_000).sum()) + 10_000 * i for i in range(3))
        assert s.substrate.fetch(total).column("x").to_pylist() == [expected]
        assert s.substrate.fetch(mixed[1]).column("x").to_numpy()[[0, -1]].tolist() == [1, 10_000]
        s.substrate.release([*moved, refs[2]])
        s.until(lambda: s.freed == {p.id for p in refs})


def release_frees(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=800))
        s.run(advance(2, 1, Act.SUM, inputs=[block]))
        assert block.parts[0].id not in s.freed, "a part that the run did not release was freed"
        s.substrate.release(block.parts)
        s.until(lambda: block.parts[0].id in s.freed)


def discard_reaches_worker(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        s.substrate.submit(Discard(0, 17))
        seen = s.substrate.fetch(s.run(advance(1, 0, Act.DISCARDED)))
        assert seen.column("x").to_pylist() == [17]


def wake_returns(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        s.substrate.wake()
        assert s.substrate.wait(PATIENCE_S) == [], "a wake before wait must make it return"
        waker = threading.Thread(target=s.substrate.wake)
        waker.start()
        assert s.substrate.wait(None) == []
        waker.join()
        assert s.substrate.wait(0.0) == [], "a timeout of zero must not block"


def memory_is_told(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        assert s.substrate.memory_bytes() > 1 << 20


def stop_is_idempotent(make: MakeSubstrate) -> None:
    """Also with work queued and before anything has started. Threads and descriptors are as before."""
    threads, descriptors = threading.active_count(), _descriptors()
    with running(make, 2) as s:
        for i in range(10):
            s.submit(advance(i, i % 2, Act.MAKE, nbytes=8000))
        assert not s.substrate.stop(), "no worker was lost"
        assert not s.substrate.stop()
        s.substrate.wake()
        assert s.substrate.wait(0.0) == []
    unstarted = make()
    unstarted.stop()
    assert threading.active_count() == threads, f"threads outlive stop: {threading.enumerate()}"
    assert _descriptors() == descriptors, "descriptors outlive stop"


CHECKS: tuple[Callable[[MakeSubstrate], None], ...] = (
    workers_report_up,
    answers_in_order,
    blocks_cross_workers,
    fetch_gives_own_memory,
    fetch_zips_parts,
    failures_are_answers,
    release_frees,
    discard_reaches_worker,
    wake_returns,
    memory_is_told,
    stop_is_idempotent,
)
SPILL_CHECKS: tuple[Callable[[MakeSubstrate], None], ...] = (spilled_parts_stay_readable,)

# -- checks for workers that can die alone


def blocks_survive_their_maker(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=8000))
        s.submit(advance(2, 0, Act.DIE))
        s.until(lambda: 0 in s.lost)
        assert "signal 9 (SIGKILL)" in s.lost[0].reason, f"the reason must name the signal: {s.lost[0]}"
        total = s.run(advance(3, 1, Act.SUM, inputs=[block]))
        assert s.substrate.fetch(total).column("x").to_pylist() == [int(np.arange(1000).sum())]
        assert s.substrate.fetch(block).num_rows == 1000
        s.substrate.release(block.parts)
        s.until(lambda: block.parts[0].id in s.freed)
        s.submit(advance(4, 0, Act.MAKE, nbytes=8))  # to the dead: must do nothing


def views_hold_memory(make: MakeSubstrate) -> None:
    """A released part is freed when the last view dies, and not before."""
    with running(make, 2) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=8000, n=1))
        s.run(advance(2, 1, Act.KEEP, inputs=[block]))
        s.substrate.release(block.parts)
        for i in range(3, 9):  # would overwrite it
            other = s.run(advance(i, 0, Act.MAKE, nbytes=8000, n=i))
            s.substrate.release(other.parts)
        assert block.parts[0].id not in s.freed, "memory was freed under a view"
        s.run(advance(20, 1, Act.DROP))
        s.until(lambda: block.parts[0].id in s.freed)


def the_dead_hold_nothing(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=8000))
        s.run(advance(2, 1, Act.KEEP, inputs=[block]))
        s.substrate.release(block.parts)
        s.submit(advance(3, 1, Act.DIE))
        s.until(lambda: 1 in s.lost and block.parts[0].id in s.freed)
        s.run(advance(4, 0, Act.MAKE, nbytes=8))


def stop_ends_running_steps(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        s.submit(advance(2, 1, Act.HANG))


def a_body_that_fails_is_a_lost_worker(make: MakeSubstrate) -> None:
    with running(make, 1, program="broken") as s:
        s.until(lambda: 0 in s.lost)
        assert "a body that can't be made" in s.lost[0].reason
        assert not s.lost[0].started


def the_dead_say_what_they_did(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        step = advance(2, 0, Act.DIE)
        s.submit(step)
        s.until(lambda: 0 in s.lost)
        assert s.lost[0].doing == doing(step)
        assert s.lost[0].started
        assert s.substrate.kill(0, "dead already") is False
        s.run(advance(3, 1, Act.MAKE, nbytes=8))
        s.submit(crash := advance(4, 1, Act.CRASH))
        s.until(lambda: 1 in s.lost)
        assert s.lost[1].doing == doing(crash)
        assert "SIGSEGV" in s.lost[1].reason or "Segmentation fault" in s.lost[1].reason
        assert "in _act" in s.lost[1].stack, f"a crash must come with its stack: {s.lost[1]}"


def idle_workers_say_nothing(make: MakeSubstrate) -> None:
    with running(make, 1) as s:
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        assert s.substrate.kill(0, "not needed") is True
        s.until(lambda: 0 in s.lost)
        assert s.lost[0].doing is None


def hung_workers_can_be_killed(make: MakeSubstrate) -> None:
    with tempfile.TemporaryDirectory() as directory, running(make, 2, program=(fifo := f"{directory}/hangs")) as s:
        os.mkfifo(fifo)
        block = s.run(advance(1, 1, Act.MAKE, nbytes=8000))
        s.submit(step := advance(2, 0, Act.HANG, inputs=[block]))
        with open(fifo, "rb") as at_work:
            at_work.read()
        assert s.substrate.kill(0, "no answer for 30 s") is True
        s.substrate.release(block.parts)
        s.until(lambda: 0 in s.lost and block.parts[0].id in s.freed)
        lost = s.lost[0]
        assert (lost.reason, lost.doing, lost.started) == ("no answer for 30 s", doing(step), True)
        assert "in _act" in lost.stack, f"a killed worker must come with its stack: {lost}"
        s.substrate.add_worker(WorkerSpec(2, CPU_POOL, "cpu"))
        s.until(lambda: 2 in s.up)
        made = s.run(advance(3, 2, Act.MAKE, nbytes=8000, n=1))
        s.run(advance(4, 1, Act.SUM, inputs=[made]))


def only_unread_parts_are_spilled(make: MakeSubstrate) -> None:
    with running(make, 2) as s:
        kept = s.run(advance(1, 0, Act.MAKE, nbytes=8000))
        free = s.run(advance(2, 0, Act.MAKE, nbytes=8000))
        s.run(advance(3, 1, Act.KEEP, inputs=[kept]))
        moved = s.substrate.spill([*kept.parts, *free.parts])
        assert [p.id for p in moved] == [p.id for p in free.parts], "a part was moved under a view"
        s.run(advance(4, 1, Act.SUM, inputs=[kept, BlockRef(free.rows, moved)]))


def crashes_leave_nothing(make: MakeSubstrate) -> None:
    """Workers are killed and replaced while blocks flow between them; each block's sum is right, and all memory comes back."""
    dice = random.Random(7)
    with running(make, 3) as s:
        before, flow = _descriptors(), _Flow(s, dice, blocks=150)
        while not flow.done:
            flow.feed()
            s.next_event()
            flow.take()
            if flow.losses < 6 and len(flow.sums) >= 20 * (flow.losses + 1):
                flow.kill_one()
        assert flow.sums == {n: int(np.arange(flow.rows(n)).sum()) + n * flow.rows(n) for n in range(150)}
        assert flow.losses == 6
        flow.release_all()
        s.until(lambda: flow.made <= s.freed)
        mapped = 3  # memory of workers that live, from which blocks were fetched
        assert _descriptors() <= before + mapped, "descriptors of lost workers are still open"


def blocks_die_with_their_maker(make: MakeSubstrate) -> None:
    """Their loss is told; whoever reads one all the same gets it whole, or says that it is lost."""
    with running(make, 2) as s:
        first = s.run(advance(1, 0, Act.MAKE, nbytes=8000))
        second = s.run(advance(2, 0, Act.MAKE, nbytes=8000))
        s.substrate.release(second.parts)
        s.until(lambda: second.parts[0].id in s.freed)
        s.submit(advance(3, 0, Act.DIE))
        s.until(lambda: 0 in s.lost and bool(s.gone))
        assert s.gone == {first.parts[0].id}, "what was released is nobody's loss"
        s.submit(advance(4, 1, Act.SUM, inputs=[first]))
        s.until(lambda: any(a.step == 4 for a in s.answers))
        answer = s.answers[-1]
        if isinstance(answer, StepFailed):
            assert isinstance(answer.error, BlockLost)
        else:
            assert s.substrate.fetch(answer.outputs[0]).column("x").to_pylist() == [int(np.arange(1000).sum())]
        s.substrate.release(first.parts)
        s.until(lambda: first.parts[0].id in s.freed)
        s.run(advance(5, 1, Act.MAKE, nbytes=8))


DEATH_CHECKS: tuple[Callable[[MakeSubstrate], None], ...] = (
    the_dead_hold_nothing,
    stop_ends_running_steps,
    a_body_that_fails_is_a_lost_worker,
    the_dead_say_what_they_did,
    idle_workers_say_nothing,
    hung_workers_can_be_killed,
)
ISOLATION_CHECKS: tuple[Callable[[MakeSubstrate], None], ...] = (
    blocks_survive_their_maker,
    views_hold_memory,
    only_unread_parts_are_spilled,
    crashes_leave_nothing,
)
FRAIL_CHECKS: tuple[Callable[[MakeSubstrate], None], ...] = (blocks_die_with_their_maker,)

# -- tools


class Session:
    """A running substrate and all that it has reported."""

    def __init__(self, substrate: Substrate) -> None:
        self.substrate = substrate
        self.up: set[int] = set()
        self.lost: dict[int, WorkerLost] = {}
        self.answers: list[StepDone | StepFailed] = []
        self.freed: set[int] = set()
        self.gone: set[int] = set()

    def submit(self, step: Step) -> None:
        self.substrate.submit(step)

    def run(self, step: Advance) -> BlockRef:
        """Submit a step and give the one block that it makes."""
        self.submit(step)
        self.until(lambda: any(a.step == step.id for a in self.answers))
        answer = next(a for a in self.answers if a.step == step.id)
        assert isinstance(answer, StepDone), f"step {step.id} failed: {answer}"
        return answer.outputs[0]

    def next_event(self) -> None:
        """Wait for something to happen."""
        events = self.substrate.wait(PATIENCE_S)
        assert events, "nothing was reported in time"
        for event in events:
            self._record(event)

    def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            self.next_event()

    def _record(self, event: SubstrateEvent) -> None:
        match event:
            case WorkerUp():
                assert event.worker not in self.up, f"worker {event.worker} came up twice"
                self.up.add(event.worker)
            case WorkerLost():
                assert event.worker not in self.lost, f"worker {event.worker} was lost twice"
                self.lost[event.worker] = event
            case PartsFreed():
                twice = self.freed.intersection(event.parts)
                assert not twice, f"parts {twice} were freed twice"
                self.freed.update(event.parts)
            case PartsLost():
                self.gone.update(event.parts)
            case StepDone() | StepFailed():
                self.answers.append(event)
            case _:
                pass


@contextmanager
def running(make: MakeSubstrate, workers: int, program: Any = None) -> Iterator[Session]:
    """A substrate with workers 0, 1, ... up, stopped at the end."""
    substrate = make()
    session = Session(substrate)
    try:
        substrate.start(program, [WorkerSpec(i, CPU_POOL, "cpu") for i in range(workers)])
        if program != "broken":
            session.until(lambda: len(session.up) == workers)
        yield session
    finally:
        substrate.stop()


def advance(step: int, worker: int, act: Act, *, nbytes: int = 0, n: int = 0, inputs: Sequence[BlockRef] = ()) -> Advance:
    """A step for a ScriptedBody: a cursor of its own each, finished at once."""
    return Advance(step, worker, int(act), 1000 + step, n, 0, inputs=tuple(inputs), end=True, credit_bytes=nbytes)


def doing(step: Step) -> Doing:
    """The breadcrumb that a ScriptedBody leaves while it is at a step."""
    return Doing(step.stage, Act(step.stage).name, (Segment("memory://scripted", step.id, 1),), f"digest-{step.id}")


class _Flow:
    """Blocks n = 0, 1, ... are made by one worker and summed by another; what a lost worker had to do is done again.

    sums: block -> its sum. made: parts that were reported. losses: workers that were lost and replaced.
    """

    def __init__(self, session: Session, dice: random.Random, blocks: int) -> None:
        self.sums: dict[int, int] = {}
        self.made: set[int] = set()
        self.losses = 0
        self._s = session
        self._dice = dice
        self._to_make = list(reversed(range(blocks)))
        self._to_sum: list[tuple[int, BlockRef]] = []
        self._blocks = blocks
        self._running: dict[int, tuple[int, BlockRef | None, int]] = {}  # step -> (n, its input, worker)
        self._alive = [0, 1, 2]
        self._next_step = 0
        self._next_worker = 3
        self._seen = 0
        self._parts: list[PartRef] = []

    @property
    def done(self) -> bool:
        return len(self.sums) == self._blocks

    def rows(self, n: int) -> int:
        return 1000 + 37 * n

    def feed(self) -> None:
        """Keep two steps at each worker that is up."""
        for worker in self._alive:
            while worker in self._s.up and sum(w == worker for _, _, w in self._running.values()) < 2:
                if self._to_sum and (not self._to_make or self._dice.random() < 0.5):
                    n, block = self._to_sum.pop(self._dice.randrange(len(self._to_sum)))
                    self._submit(n, worker, block)
                elif self._to_make:
                    self._submit(self._to_make.pop(), worker, None)
                else:
                    break

    def take(self) -> None:
        """Account for what was reported: answers that came before a loss count, the rest of the lost worker's steps do not."""
        for answer in self._s.answers[self._seen :]:
            assert isinstance(answer, StepDone)
            n, block, _ = self._running.pop(answer.step)
            out = answer.outputs[0]
            self.made.update(p.id for p in out.parts)
            self._parts += out.parts
            if block is None:
                self._to_sum.append((n, out))
            else:
                self.sums[n] = self._s.substrate.fetch(out).column("x")[0].as_py()
                self._s.substrate.release(block.parts)
        self._seen = len(self._s.answers)
        for worker in [w for w in self._alive if w in self._s.lost]:
            self._replace(worker)

    def kill_one(self) -> None:
        """From outside, whatever it is at; or by request."""
        worker = self._dice.choice([w for w in self._alive if w in self._s.up])
        if self._dice.random() < 0.5:
            self._submit_death(worker)
        else:
            self._s.substrate.kill(worker, "chosen by dice")
        self._s.until(lambda: worker in self._s.lost)
        self.take()

    def release_all(self) -> None:
        """Twice for some: must not matter."""
        self._s.substrate.release(self._parts)

    def _submit(self, n: int, worker: int, block: BlockRef | None) -> None:
        step, self._next_step = self._next_step, self._next_step + 1
        self._running[step] = (n, block, worker)
        if block is None:
            self._s.submit(advance(step, worker, Act.MAKE, nbytes=8 * self.rows(n), n=n))
        else:
            self._s.submit(advance(step, worker, Act.SUM, inputs=[block]))

    def _submit_death(self, worker: int) -> None:
        step, self._next_step = self._next_step, self._next_step + 1
        self._s.submit(advance(step, worker, Act.DIE))

    def _replace(self, worker: int) -> None:
        self.losses += 1
        self._alive.remove(worker)
        for step, (n, block, at) in list(self._running.items()):
            if at == worker:
                del self._running[step]
                if block is None:
                    self._to_make.append(n)
                else:
                    self._to_sum.append((n, block))
        self._s.substrate.add_worker(WorkerSpec(self._next_worker, CPU_POOL, "cpu"))
        self._alive.append(self._next_worker)
        self._next_worker += 1


def _descriptors() -> int:
    if "ray" in sys.modules:  # its connections come and go
        return 0
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0
