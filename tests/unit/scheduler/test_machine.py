"""What becomes of events: limits, cancelling, the end, failures."""

from __future__ import annotations

import pytest
from tests.unit.scheduler.desk import Desk, of, released, split, stage

from headrace.core.errors import InternalError, UserCodeError, WorkerDied
from headrace.core.receipts import Tally
from headrace.core.refs import Segment
from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.core.steps import CONSTRUCTING, Discard, Doing, PartsFreed, StepDone, StepFailed, WorkerLost, WorkerUp
from headrace.scheduler.invariants import check
from headrace.scheduler.messages import AddWorker, Deliver, Drop, Fail, Finish, Limits, Release, Retry, Settle, Submit
from headrace.scheduler.state import DELIVER_STAGE

FUSED = (stage(0, Order.SOURCE, End.SINK),)
DEVICE = "sim"


def limited(*limits: int) -> tuple:
    middle = tuple(stage(i + 1, Order.GLOBAL, limit=n) for i, n in enumerate(limits))
    return (stage(0, Order.SOURCE), *middle, stage(len(limits) + 1, Order.SPLIT, End.SINK))


def test_no_splits_at_all() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    assert of(desk.list_splits(), Finish)


def test_a_limit_of_nothing_reads_nothing() -> None:
    desk = Desk(limited(0), {CPU_POOL: 1})
    assert of(desk.commands, Finish)
    assert not of(desk.commands, Submit)


def test_what_a_limit_cuts_is_cancelled_and_given_back() -> None:
    desk = Desk(limited(10), {CPU_POOL: 2})
    desk.list_splits(split(0), split(1), split(2))
    first, second = desk.at(0)
    desk.answer(first, blocks=3, more=True)
    limit = desk.at(1)[0]
    assert limit.limit_left == 10  # pyright: ignore[reportAttributeAccessIssue]
    fed = [p.id for b in limit.inputs for p in b.parts]
    commands = desk.answer(limit, blocks=1, finished=True, taken=10)
    cancelled = [c.split.index for c in of(commands, Settle) if c.cancelled]
    assert cancelled == [1]
    assert Discard(second.worker, second.cursor) in [c.discard for c in of(commands, Drop)]  # pyright: ignore[reportAttributeAccessIssue]
    assert set(fed) <= set(released(commands))
    assert desk.scheduler.pending == type(desk.scheduler.pending)()
    write = desk.at(2)[0]
    commands = desk.answer(write, finished=True, written=10)
    settled = of(commands, Settle)
    assert [(s.split.index, s.tally) for s in settled] == [(0, Tally(rows_in=30, written=10, cut=20))]
    assert of(commands, Finish), "a cancelled step that still runs does not hold up the end"
    late = desk.answer(second, blocks=2, more=True)
    assert len(released(late)) == 2
    assert not of(late, Submit)
    assert desk.scheduler.reserved == 0


def test_a_second_limit_does_not_cut_what_only_the_first_has_reached() -> None:
    """Split 1 uses up the first limit; that split 0 leaves the second one must not cancel split 1."""
    desk = Desk(limited(15, 100), {CPU_POOL: 4})
    desk.list_splits(split(0), split(1))
    first, second = desk.at(0)
    desk.answer(second, blocks=1, finished=True)
    desk.answer(first, blocks=1, finished=True)
    one = desk.at(1)[0]
    desk.answer(one, blocks=1, finished=True, taken=10)
    assert desk.splits_at(1) == [1]
    desk.answer(desk.at(1)[0], blocks=1, rows=5, finished=True, taken=5)
    assert desk.scheduler.enough
    desk.answer(desk.at(2)[0], blocks=1, finished=True, taken=10)
    assert list(desk.scheduler.open) == [0, 1]
    assert desk.splits_at(2) == [1], "and it is its turn now"


def test_a_cancelled_step_that_fails_counts_for_nothing() -> None:
    desk = Desk(limited(10), {CPU_POOL: 2})
    desk.list_splits(split(0), split(1))
    first, second = desk.at(0)
    desk.answer(first, blocks=1, more=True)
    desk.answer(desk.at(1)[0], blocks=1, finished=True, taken=10)
    desk.running.remove(second)
    commands = desk.tell(StepFailed(second.id, second.worker, UserCodeError("late")))
    assert not of(commands, Fail)
    assert second.id not in desk.scheduler.steps


def test_delivery_is_in_split_order() -> None:
    desk = Desk((stage(0, Order.SOURCE, End.DELIVER),), {CPU_POOL: 2})
    desk.list_splits(split(0), split(1))
    first, second = desk.running
    desk.answer(second, blocks=1, finished=True)
    assert desk.scheduler.waiting[DELIVER_STAGE] == 1
    commands = desk.tell(StepDone(first.id, first.worker, desk.blocks(1), True, tally=Tally(rows_in=10, written=10)))
    assert [c.split for c in of(commands, Deliver)] == [0, 1]


def test_rows_that_a_model_delivers_are_counted() -> None:
    stages = (stage(0, Order.SOURCE), stage(1, Order.FREE, End.DELIVER, pool=DEVICE, model=True))
    desk = Desk(stages, {CPU_POOL: 1, DEVICE: 1})
    desk.list_splits(split(0))
    desk.answer(desk.at(0)[0], blocks=2, finished=True)
    commands = [c for _ in range(2) if desk.at(1) for c in desk.answer(desk.at(1)[0])]
    assert [s.tally for s in of(commands, Settle)] == [Tally(rows_in=20, written=20)]
    assert of(commands, Finish)


def test_a_failure_ends_the_run_with_one_fail() -> None:
    desk = Desk(FUSED, {CPU_POOL: 2})
    desk.list_splits(split(0), split(1), split(2))
    first, second = desk.running
    error = UserCodeError("no")
    assert desk.tell(StepFailed(first.id, first.worker, error)) == [Fail(error)]
    assert desk.tell(StepFailed(second.id, second.worker, error)) == []
    assert desk.tell(StepDone(second.id, second.worker, desk.blocks(1))) == []
    assert desk.tell(WorkerLost(1, "gone")) == []
    assert desk.tell(WorkerUp(7, CPU_POOL)) == []


def test_a_split_is_tried_again_elsewhere_and_not_for_ever() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    desk.list_splits(split(3))
    for attempt in (1, 2):
        commands = desk.tell(WorkerLost(attempt - 1, "killed by signal 9"))
        assert [(r.index, r.attempt) for r in of(commands, Retry)] == [(3, attempt + 1)]
        assert [(a.worker, a.replaces) for a in of(commands, AddWorker)] == [(attempt, attempt - 1)]
        (submit,) = of(desk.tell(WorkerUp(attempt, CPU_POOL)), Submit)
        assert (submit.step.worker, submit.step.attempt) == (attempt, attempt + 1)
    (fail,) = desk.tell(WorkerLost(2, "killed by signal 9"))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, WorkerDied)
    assert dict(fail.error.where)["split"].startswith("split 3")
    assert dict(fail.error.where)["attempts"] == "3"


def test_a_row_is_condemned_at_its_second_death_alone() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1}, limits=Limits(fail_on_bad_rows=False))
    desk.list_splits(split(0))
    batch = Doing(0, "map(f)", (Segment("a", 0, 100),))
    row = Doing(0, "map(f)", (Segment("a", 7, 1),), "digest of 7")
    for worker, doing in enumerate((batch, row, row)):
        assert of(desk.tell(WorkerLost(worker, "killed by signal 11", doing)), Retry)
        (submit,) = of(desk.tell(WorkerUp(worker + 1, CPU_POOL)), Submit)
        condemned = [c for s in submit.step.suspects for c in s.condemned]
        assert bool(condemned) == (worker == 2)
    assert condemned == [("digest of 7", "killed by signal 11")]


def test_no_row_is_suspected_of_what_a_construction_did() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1}, limits=Limits(fail_on_bad_rows=False))
    desk.list_splits(split(0))
    making = Doing(CONSTRUCTING, "predict(M)")
    for worker in range(2):
        (retry,) = of(desk.tell(WorkerLost(worker, "killed by signal 11", making)), Retry)
        assert retry.crash is None
        (submit,) = of(desk.tell(WorkerUp(worker + 1, CPU_POOL)), Submit)
        assert submit.step.suspects == ()
    (fail,) = desk.tell(WorkerLost(2, "killed by signal 11", making))
    assert fail.error.message == "worker 2 died: killed by signal 11, while predict(M) was constructed"
    assert dict(fail.error.where)["stage"] == "predict(M)"
    assert "rows" not in dict(fail.error.where)


def test_without_quarantine_the_row_ends_the_run() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    desk.list_splits(split(0))
    row = Doing(0, "map(f)", (Segment("a", 7, 1),), "digest of 7")
    for worker in range(1):
        desk.tell(WorkerLost(worker, "killed by signal 11", row))
        desk.tell(WorkerUp(worker + 1, CPU_POOL))
    (fail,) = desk.tell(WorkerLost(1, "killed by signal 11", row))
    assert dict(fail.error.where)["row"] == "7 of a"


def test_a_worker_that_comes_up_after_the_end_gets_nothing() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    desk.list_splits()
    assert desk.tell(WorkerUp(9, CPU_POOL)) == []


def test_work_waits_for_a_pool_that_is_not_up() -> None:
    stages = (stage(0, Order.SOURCE), stage(1, Order.FREE, End.DELIVER, pool=DEVICE, model=True))
    desk = Desk(stages, {CPU_POOL: 1, DEVICE: 1}, late=True)
    desk.tell(WorkerUp(0, CPU_POOL))
    desk.list_splits(split(0))
    while desk.running:
        desk.answer(desk.running[0], blocks=1, more=True)
    assert not desk.scheduler.failed
    assert desk.scheduler.waiting[1] >= 2
    assert of(desk.tell(WorkerUp(1, DEVICE)), Submit)


@pytest.mark.parametrize(
    "wrong",
    [Tally(rows_in=10), Tally(rows_in=10, written=11), Tally(rows_in=10, written=4, filtered=5)],
)
def test_rows_that_do_not_add_up_end_the_run(wrong: Tally) -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    desk.list_splits(split(0))
    step = desk.running[0]
    (fail,) = desk.tell(StepDone(step.id, step.worker, finished=True, tally=wrong))
    assert isinstance(fail, Fail)
    assert "don't add up" in str(fail.error)


def test_an_answer_that_nobody_waits_for_ends_the_run() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    (fail,) = desk.tell(StepDone(99, 0))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, InternalError)


def test_memory_is_counted_until_it_is_free() -> None:
    desk = Desk((stage(0, Order.SOURCE, End.DELIVER),), {CPU_POOL: 1})
    desk.list_splits(split(0))
    commands = desk.tell(StepDone(desk.running[0].id, 0, desk.blocks(1, bytes=70), True, tally=Tally(rows_in=10, written=10)))
    assert of(commands, Release)
    assert of(commands, Finish)
    assert desk.scheduler.in_flight == 70, "released, but perhaps still looked at"
    desk.tell(PartsFreed(tuple(released(commands))))
    assert desk.scheduler.in_flight == 0


@pytest.mark.parametrize("table", ["reserved", "in_flight", "listed", "settled"])
def test_the_check_notices_a_wrong_number(table: str) -> None:
    desk = Desk((stage(0, Order.SOURCE), stage(1, Order.SPLIT, End.SINK)), {CPU_POOL: 1})
    desk.list_splits(split(0), split(1))
    setattr(desk.scheduler, table, getattr(desk.scheduler, table) + 1)
    with pytest.raises(AssertionError):
        check(desk.scheduler)


def test_the_check_notices_a_forgotten_block() -> None:
    desk = Desk((stage(0, Order.SOURCE), stage(1, Order.FREE), stage(2, Order.SPLIT, End.SINK)), {CPU_POOL: 1})
    desk.list_splits(split(0))
    desk.answer(desk.running[0], blocks=3, more=True)
    desk.scheduler.shared[1].clear()
    with pytest.raises(AssertionError, match="a block is in 0 queues"):
        check(desk.scheduler)
