"""What starts next, and where."""

from __future__ import annotations

import pytest
from tests.unit.scheduler.desk import Desk, asked, of, split, stage

from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.core.steps import Advance, Apply, PartsFreed, WorkerUp
from headrace.scheduler.messages import ConsumerTook, Deliver, Limits

DEVICE = "sim"
READ_MODEL_WRITE = (
    stage(0, Order.SOURCE),
    stage(1, Order.FREE, pool=DEVICE, model=True, batch_rows=10),
    stage(2, Order.SPLIT, End.SINK),
)
READ_WRITE = (stage(0, Order.SOURCE), stage(1, Order.SPLIT, End.SINK))
READ_WORK_WRITE = (stage(0, Order.SOURCE), stage(1, Order.FREE), stage(2, Order.SPLIT, End.SINK))


def test_the_step_closest_to_commit_goes_first() -> None:
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 1, DEVICE: 1})
    desk.list_splits(split(0), split(1))
    desk.answer(desk.at(0)[0], blocks=1, more=True)
    assert len(desk.at(0)) == 1, "the CPU worker reads on while the device works"
    desk.answer(desk.at(1)[0])
    assert desk.at(2) == [], "the CPU worker is busy"
    desk.answer(desk.at(0)[0], blocks=1, more=True)
    assert desk.splits_at(2) == [0], "writing comes before reading"
    assert desk.at(0) == []


def test_within_a_stage_the_oldest_split_goes_first() -> None:
    desk = Desk(READ_WORK_WRITE, {CPU_POOL: 2})
    desk.list_splits(split(0), split(1))
    older, newer = desk.at(0)
    desk.answer(newer, blocks=2, finished=True)
    assert desk.splits_at(1) == [1]
    desk.answer(older, blocks=1, more=True)
    assert desk.splits_at(1) == [1, 0], "split 1's second block waits: split 0's came later, but goes first"


def test_a_device_has_one_step_running_and_one_queued() -> None:
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 4, DEVICE: 1})
    desk.list_splits(*(split(i) for i in range(8)))
    for step in desk.at(0):
        desk.answer(step, blocks=1, more=True)
    assert len(desk.at(1)) == 2
    assert desk.scheduler.waiting[1] == 2


def test_an_idle_device_comes_before_another_ones_queue() -> None:
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 4, DEVICE: 2})
    desk.list_splits(*(split(i) for i in range(8)))
    readers = desk.at(0)
    for step in readers[:2]:
        desk.answer(step, blocks=1, more=True)
    assert sorted(desk.workers_at(1)) == [4, 5]


def test_blocks_for_a_model_are_joined_once_the_pipeline_is_warm() -> None:
    """The first ones leave by themselves, one a step, so that the model begins; a writer gets them as they were cut."""
    read_write = (READ_MODEL_WRITE[0], stage(1, Order.SPLIT, End.SINK))
    for stages, expected in ((READ_MODEL_WRITE, [0, 0, 200, 200]), (read_write, [0, 0, 0, 0])):
        desk = Desk(stages, {CPU_POOL: 1, DEVICE: 1}, limits=Limits(credit_bytes=100, block_bytes=100, join_bytes=200))
        desk.list_splits(split(0))
        reads: list[Advance] = []
        while len(reads) < 4:
            step = desk.running[0]
            if step.stage == 0 and isinstance(step, Advance):
                reads.append(step)
            desk.answer(step, blocks=int(step.stage < len(stages) - 1), more=step.stage == 0)
        assert [step.join_bytes for step in reads] == expected
        assert [step.credit_bytes for step in reads] == [1, 1, *(max(100, joined) for joined in expected[2:])]


def test_a_model_step_gathers_blocks_of_several_splits_up_to_its_batch() -> None:
    stages = (READ_MODEL_WRITE[0], stage(1, Order.FREE, pool=DEVICE, model=True, batch_rows=25), READ_MODEL_WRITE[2])
    desk = Desk(stages, {CPU_POOL: 4, DEVICE: 1})
    desk.list_splits(*(split(i) for i in range(8)))
    readers = desk.at(0)
    for step in readers:
        desk.answer(step, blocks=3, more=True)
    sizes = [len(step.inputs) for step in desk.at(1)]
    assert sizes == [3, 3], "10 rows a block: the third block makes the 25 full"
    third = desk.at(1)[0]
    desk.answer(third)
    newest = desk.at(1)[-1]
    assert isinstance(newest, Apply)
    assert {index for index, _ in newest.owners} <= {0, 1, 2, 3}


def test_producers_pause_when_the_device_has_enough_and_go_on_when_it_takes() -> None:
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 2, DEVICE: 1})
    desk.list_splits(*(split(i) for i in range(4)))
    for _ in range(20):
        if not desk.at(0):
            break
        desk.answer(desk.at(0)[0], blocks=1, more=True)
    assert desk.at(0) == [], "nobody reads for a full queue"
    before = desk.scheduler.waiting[1]
    desk.answer(desk.at(1)[0])
    assert desk.scheduler.waiting[1] == before - 1
    assert desk.at(2), "its result is written"
    desk.answer(desk.at(1)[0])
    assert desk.at(0), "with room in the queue a worker reads again"


def test_steps_of_ordinary_length_are_not_queued_at_a_cpu_worker() -> None:
    desk = Desk((stage(0, Order.SOURCE, End.SINK),), {CPU_POOL: 1})
    desk.list_splits(*(split(i) for i in range(5)))
    for _ in range(3):
        assert len(desk.running) == 1
        desk.answer(desk.running[0], finished=True, written=10, wall_s=0.1)
    assert len(desk.running) == 1


def test_short_steps_are_queued_ahead() -> None:
    desk = Desk((stage(0, Order.SOURCE, End.SINK),), {CPU_POOL: 1})
    desk.list_splits(*(split(i) for i in range(20)))
    for _ in range(8):
        desk.answer(desk.running[0], finished=True, written=10, wall_s=0.002)
    assert len(desk.running) == 3, "about 5 ms of steps wait at a worker"
    assert len({s.worker for s in desk.running}) == 1


def test_a_long_step_that_is_queued_behind_a_short_one_counts() -> None:
    desk = Desk(READ_WRITE, {CPU_POOL: 1})
    desk.list_splits(*(split(i) for i in range(20)))
    for _ in range(3):
        desk.answer(desk.at(0)[0], blocks=1, finished=True, wall_s=0.1)
        assert len(desk.at(1)) == 1
        desk.answer(desk.at(1)[0], finished=True, written=10, wall_s=0.0001)
    desk.answer(desk.at(0)[0], blocks=1, finished=True, wall_s=0.1)
    assert [step.stage for step in desk.running] == [1, 0], "one that reads goes behind the one that writes, and no other"


def test_a_short_step_is_not_queued_behind_another_while_somebody_is_idle() -> None:
    desk = Desk(READ_WORK_WRITE, {CPU_POOL: 2})
    desk.list_splits(split(0))
    for _ in range(4):
        desk.answer(desk.at(0)[0], blocks=1, more=True, wall_s=0.001)
        for step in desk.at(1):
            desk.answer(step, blocks=1, finished=True, wall_s=0.001)
        assert len({s.worker for s in desk.running}) == min(2, len(desk.running))


@pytest.mark.parametrize(("read_s", "ahead"), [(0.01, 1), (0.1, 2), (0.3, 4)])
def test_a_reader_goes_on_while_the_others_have_too_little_for_as_long_as_it_reads(read_s: float, ahead: int) -> None:
    """The others take 0.1 s for a block, and the reader's worker ends first what it has begun."""
    for blocks in (ahead, ahead + 1):
        desk = Desk(READ_WORK_WRITE, {CPU_POOL: 2})
        desk.list_splits(split(0))
        for made in (1, 1, blocks):
            while rest := [*desk.at(1), *desk.at(2)]:
                desk.answer(rest[0], blocks=int(rest[0].stage == 1), finished=rest[0].stage == 1)
            desk.answer(desk.at(0)[0], blocks=made, more=True, wall_s=read_s)
        assert len(desk.at(0)) == (blocks == ahead)


def test_a_sequence_goes_on_before_its_worker_takes_up_what_it_made() -> None:
    """Only that worker can, and the other lives on what it makes."""
    stages = (stage(0, Order.SOURCE), stage(1, Order.SPLIT), stage(2, Order.FREE), stage(3, Order.SPLIT, End.SINK))
    desk = Desk(stages, {CPU_POOL: 2})
    desk.list_splits(split(0))
    desk.answer(desk.at(0)[0], blocks=6, finished=True)
    (cut,) = desk.at(1)
    desk.answer(cut, blocks=3, more=True)
    assert sorted(desk.workers_at(2)) == [0, 1]
    assert desk.scheduler.waiting[2] == 1
    desk.answer(next(s for s in desk.at(2) if s.worker == cut.worker), blocks=1, finished=True)
    assert desk.workers_at(1) == [cut.worker]


def test_a_worker_reads_one_split_at_a_time() -> None:
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 1, DEVICE: 1})
    desk.list_splits(split(0), split(1), split(2))
    for _ in range(6):
        for step in desk.at(0):
            desk.answer(step, blocks=1, more=True)
    assert list(desk.scheduler.open) == [0]


def test_no_more_workers_than_the_stage_may_have() -> None:
    stages = (READ_WORK_WRITE[0], stage(1, Order.FREE, max_workers=1), READ_WORK_WRITE[2])
    desk = Desk(stages, {CPU_POOL: 4})
    desk.list_splits(*(split(i) for i in range(4)))
    for step in desk.at(0):
        desk.answer(step, blocks=2, more=True)
    assert len(set(desk.workers_at(1))) == 1
    assert desk.scheduler.waiting[1] >= 3


ROUTED = (
    stage(0, Order.SOURCE),
    stage(1, Order.FREE),
    stage(2, Order.SOURCE, End.SINK),
    stage(3, Order.SPLIT, End.SINK),
)


@pytest.mark.parametrize(("last_bytes", "last_stage"), [(100, 2), (1000, 0)])
def test_splits_are_fused_first_and_spread_at_the_end(last_bytes: int, last_stage: int) -> None:
    """But not when another worker has as much left to read."""
    desk = Desk(ROUTED, {CPU_POOL: 2}, routes=((2,), (0, 1, 3)))
    desk.list_splits(*(split(i) for i in range(5)), split(5, bytes=last_bytes))
    opened: list[int] = []
    while desk.running:
        step = desk.running[0]
        if step.stage in (0, 2):
            opened.append(step.stage)
        blocks = 1 if step.stage < 2 else 0
        written = {2: 10, 3: 0}.get(step.stage, 0)
        if step.stage == 3:
            written = 10 * len(step.inputs)
            desk.answer(step, finished=step.end, written=written)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            desk.answer(step, blocks=blocks, finished=True, written=written)
    assert desk.scheduler.finished
    assert opened == [2, 2, 2, 2, 2, last_stage]


def test_one_split_is_spread_over_all_workers() -> None:
    desk = Desk(ROUTED, {CPU_POOL: 3}, routes=((2,), (0, 1, 3)))
    desk.list_splits(split(0))
    assert [s.stage for s in desk.running] == [0]
    desk.answer(desk.running[0], blocks=2, more=True)
    assert sorted(s.stage for s in desk.running) == [0, 1, 1]
    assert len({s.worker for s in desk.running}) == 3


def test_the_only_split_is_spread_though_one_worker_is_up_first() -> None:
    desk = Desk(ROUTED, {CPU_POOL: 2}, routes=((2,), (0, 1, 3)), late=True)
    desk.list_splits(split(0))
    desk.tell(WorkerUp(0, CPU_POOL))
    assert [s.stage for s in desk.running] == [0], "the other worker will want its share"


def test_splits_are_asked_for_ahead_and_only_once() -> None:
    desk = Desk((stage(0, Order.SOURCE, End.SINK),), {CPU_POOL: 2})
    assert len(asked(desk.commands)) == 1
    commands = desk.list_splits(*(split(i) for i in range(3)), done=False)
    assert len(asked(commands)) == 1, "three are not enough for two workers"
    assert asked(desk.list_splits(*(split(i) for i in range(3, 2_000)), done=False)) == []


def test_past_the_budget_only_the_front_of_the_oldest_split_moves() -> None:
    desk = Desk(READ_WORK_WRITE, {CPU_POOL: 4}, limits=Limits(budget_bytes=1, block_bytes=100, credit_bytes=100))
    desk.list_splits(*(split(i) for i in range(4)))
    assert desk.splits_at(0) == [0], "one lone step may always run"
    desk.answer(desk.at(0)[0], blocks=1, more=True)
    assert desk.splits_at(1) == [0]
    assert desk.at(0) == [], "the front is in work: nothing else may add to the debt"
    desk.answer(desk.at(1)[0], blocks=1, finished=True)
    assert desk.splits_at(2) == [0]


def test_freed_memory_lets_work_go_on() -> None:
    limits = Limits(budget_bytes=250, block_bytes=100, credit_bytes=100)
    desk = Desk(READ_MODEL_WRITE, {CPU_POOL: 2, DEVICE: 1}, limits=limits)
    desk.list_splits(split(0), split(1))
    first, second = desk.at(0)
    desk.answer(first, blocks=1, more=True)
    desk.answer(second, blocks=1, more=True)
    assert desk.splits_at(0) != [0, 1]
    step = desk.at(1)[0]
    desk.answer(step, bytes=1)
    while desk.at(2):
        desk.answer(desk.at(2)[0], written=10)
    busy = len(desk.at(0))
    desk.tell(PartsFreed(tuple(p.id for b in step.inputs for p in b.parts)))
    assert len(desk.at(0)) >= busy
    assert desk.at(0), "there is room again"


def test_a_consumer_that_does_not_take_stops_the_work() -> None:
    stages = (stage(0, Order.SOURCE), stage(1, Order.FREE, End.DELIVER))
    desk = Desk(stages, {CPU_POOL: 2}, limits=Limits(budget_bytes=1 << 30, block_bytes=100, deliver_blocks=2))
    desk.list_splits(*(split(i) for i in range(50)))
    for _ in range(500):
        if not desk.running:
            break
        step = desk.running[0]
        if step.stage == 0:
            desk.answer(step, blocks=1, more=True)
        else:
            desk.answer(step, blocks=1, finished=True, written=10)
    assert desk.running == [], "everything rests"
    assert not desk.scheduler.finished
    assert len(of(desk.commands, Deliver)) == 2
    assert sum(desk.scheduler.waiting.values()) < 30
    commands = desk.tell(ConsumerTook(2))
    assert len(of(commands, Deliver)) == 2
    assert desk.running, "what it takes is made again"


def test_sources_are_told_what_comes_next_where_they_wait_for_a_network() -> None:
    for tells, wanted in ((True, (2, 3, 4)), (False, ())):
        desk = Desk((stage(0, Order.SOURCE, End.SINK),), {CPU_POOL: 2}, limits=Limits(read_next=tells))
        desk.list_splits(*(split(i) for i in range(6)))
        first, second = desk.at(0)
        desk.answer(first, more=True)
        desk.answer(second, more=True)
        told = [tuple(s.index for s in step.next) for step in desk.at(0) if isinstance(step, Advance)]
        assert told == [wanted, wanted]
