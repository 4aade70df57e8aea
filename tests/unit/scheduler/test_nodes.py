"""Nodes of a cluster: work near its blocks, workers that rest, nodes that come and go, blocks that are lost with them."""

from __future__ import annotations

import pytest
from tests.unit.scheduler.desk import Desk, of, released, split, stage

from headrace.core.errors import BlockLost
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.core.steps import (
    Advance,
    Apply,
    Doing,
    PartsFreed,
    PartsLost,
    RoomOffered,
    StepDone,
    StepFailed,
    WorkerLost,
    WorkerResting,
    WorkerUp,
)
from headrace.scheduler.machine import MOST_UNSTARTED
from headrace.scheduler.messages import AddWorker, BudgetChanged, Drain, Fail, Finish, Limits, Retry, Settle, Submit
from headrace.scheduler.policy.retry import MOST_LOST
from headrace.scheduler.state import PoolState, WorkerState

READ = stage(0, Order.SOURCE)
MODEL = stage(1, Order.FREE, pool="sim", model=True, keep=("id",), batch_rows=1)
CHAIN = (READ, MODEL, stage(2, Order.SPLIT, End.SINK))
FUSED = (stage(0, Order.SOURCE, End.SINK),)


def steps(commands: list[object]) -> list[tuple[int, int]]:
    """(stage, worker) of what was submitted."""
    return [(c.step.stage, c.step.worker) for c in of(commands, Submit)]


# ---------------------------------------------------------------- locality


def test_a_model_runs_where_its_blocks_are() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 2, "sim": 2}, nodes=("a", "b", "a", "b"))
    desk.list_splits(split(0), split(1))
    first, second = desk.at(0)
    assert (first.worker, second.worker) == (0, 1)
    assert (1, 3) in steps(desk.answer(second, blocks=1, finished=True))
    assert (1, 2) in steps(desk.answer(first, blocks=1, finished=True))


def test_no_worker_is_left_idle_for_the_sake_of_locality() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 1, "sim": 2}, nodes=("a", "b", "a"))
    desk.list_splits(split(0))
    (read,) = desk.at(0)
    desk.answer(read, blocks=3, finished=True)
    assert desk.workers_at(1) == [2, 1, 2], "the one on the node, then the idle one, then the one on the node again"


def test_only_what_the_model_reads_draws_it() -> None:
    model = stage(1, Order.FREE, pool="sim", model=True, columns_in=("image",), batch_rows=1)
    desk = Desk((READ, model, CHAIN[2]), {CPU_POOL: 1, "sim": 2}, nodes=("a", "b", "c"))
    desk.list_splits(split(0))
    (read,) = desk.at(0)
    carried, image = PartRef(1, 0, 5_000, ("id",), None, "b"), PartRef(2, 0, 100, ("image",), None, "c")
    desk.running.remove(read)
    desk.tell(StepDone(read.id, 0, (BlockRef(10, (carried, image)),), finished=True))
    assert desk.workers_at(1) == [2]


@pytest.mark.parametrize(("most", "writer"), [("a", 0), ("b", 1)])
def test_a_writer_begins_where_most_of_its_blocks_wait(most: str, writer: int) -> None:
    desk = Desk((READ, stage(1, Order.SPLIT, End.SINK)), {CPU_POOL: 2}, nodes=("a", "b"))
    desk.list_splits(split(0))
    (read,) = desk.running
    desk.running.clear()
    parts = [PartRef(i, 0, 900 if node == most else 100, ("id",), None, node) for i, node in enumerate("ab")]
    desk.tell(StepDone(read.id, read.worker, tuple(BlockRef(10, (part,)) for part in parts), finished=True))
    assert desk.workers_at(1) == [writer]


def test_an_idle_worker_elsewhere_comes_before_a_busy_one_on_the_node() -> None:
    pool = PoolState()
    for i, node in enumerate(("a", "a", "b", "")):
        worker = WorkerState(i, "sim", node)
        worker.running = {}
        pool.add(worker)
        pool.file(worker, 2)

    def give(id: int, steps: int) -> None:
        worker = pool.workers[id]
        worker.running = {n: Advance(n, id, 0, 0, 0, 1) for n in range(steps)}
        pool.file(worker, 2)

    def picked(near: str) -> int | None:
        worker = pool.pick(near)
        return None if worker is None else worker.id

    assert (picked("b"), picked("a"), picked("nowhere"), picked("")) == (2, 0, 0, 0)
    give(2, 1)
    assert picked("b") == 0
    for i in (0, 1, 3):
        give(i, 1)
    assert picked("b") == 2
    give(2, 2)
    assert picked("b") == 0
    pool.forget(pool.workers[2])
    assert picked("b") == 0
    assert set(pool.nodes) == {"a"}


def test_a_free_worker_takes_what_lies_on_its_node_but_the_oldest_split_waits_for_nobody() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 4, "sim": 2}, nodes=("b", "b", "b", "a", "a", "b"))
    desk.tell(WorkerResting(5, True))  # so that all blocks go to the device on a
    desk.list_splits(*map(split, range(4)))
    reads = {step.split_index: step for step in desk.at(0) if isinstance(step, Advance)}
    assert [reads[i].worker for i in range(4)] == [0, 1, 2, 3]
    for index in (1, 2, 3, 0):
        desk.answer(reads[index], blocks=2, finished=True)
    ran: list[int] = []
    for step in (desk.at(1)[0] for _ in range(8)):
        assert isinstance(step, Apply)
        ran += [index for index, _ in step.owners]
        desk.answer(step)
    assert ran[:2] == [1, 1], "they came first, and the device had nothing else"
    assert ran[2:4] == [0, 0]
    assert ran[4:] == [3, 2, 3, 2], "and nobody waits for more than a turn of the pool"


# ---------------------------------------------------------------- rest


def test_a_worker_that_rests_opens_nothing_and_takes_nothing() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 2, "sim": 1})
    desk.tell(WorkerResting(0, True))
    desk.list_splits(split(0), split(1))
    assert desk.workers_at(0) == [1]
    desk.answer(desk.at(0)[0], blocks=1, finished=True)
    desk.answer(desk.at(1)[0])
    assert {step.worker for step in desk.at(0) + desk.at(2)} == {1}
    assert (0, 0) in steps(desk.tell(WorkerResting(0, False))) or not desk.scheduler.pending


def test_a_worker_that_rests_goes_on_with_its_cursors() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 1, "sim": 1})
    desk.list_splits(split(0))
    (read,) = desk.at(0)
    desk.tell(WorkerResting(0, True))
    assert (0, 0) in steps(desk.answer(read, blocks=1, more=True))


def test_when_all_rest_work_waits() -> None:
    desk = Desk(FUSED, {CPU_POOL: 2})
    desk.tell(WorkerResting(0, True))
    desk.tell(WorkerResting(1, True))
    assert not of(desk.list_splits(split(0)), Fail)
    assert desk.running == []
    assert steps(desk.tell(WorkerResting(1, False))) == [(0, 1)]


def test_a_stage_of_few_workers_moves_when_its_only_one_rests() -> None:
    work = stage(1, Order.FREE, max_workers=1)
    desk = Desk((READ, work, CHAIN[2]), {CPU_POOL: 2})
    desk.list_splits(split(0))
    (read,) = desk.at(0)
    desk.answer(read, blocks=1, more=True)
    (step,) = desk.at(1)
    desk.tell(WorkerResting(step.worker, True))
    desk.answer(step, blocks=1, finished=True)
    while not desk.at(1):
        other = next(s for s in desk.running if s.worker != step.worker or s.stage == 0)
        desk.answer(other, blocks=other.stage == 0, finished=other.stage == 0)
    assert desk.workers_at(1) == [1 - step.worker]
    assert desk.scheduler.stage_workers[1] == {1 - step.worker}


def test_rest_of_a_worker_that_is_unknown_means_nothing() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    assert desk.tell(WorkerResting(7, True)) == []


# ---------------------------------------------------------------- nodes that leave and join


def test_a_worker_whose_node_is_gone_is_not_replaced_and_nothing_is_blamed() -> None:
    desk = Desk(FUSED, {CPU_POOL: 2}, nodes=("a", "b"))
    desk.list_splits(split(0), split(1))
    commands = desk.tell(WorkerLost(0, "node a is gone", Doing(0, "f"), pool=CPU_POOL, gone=True))
    assert of(commands, AddWorker) == []
    assert of(commands, Retry) == [Retry(0, 2, "worker 0 is gone: node a is gone", None)]
    history = desk.scheduler.open[0].history
    assert (history.blind, history.suspects) == (0, ())


def test_splits_of_nodes_that_are_gone_are_tried_again_and_again() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1}, nodes=("a",))
    desk.list_splits(split(0))
    for worker in range(10):
        (added,) = of(desk.tell(WorkerLost(worker, "its node is gone", pool=CPU_POOL, gone=True)), AddWorker)
        assert (added.replaces, added.node, added.why) == (worker, "", "its node is gone")
        desk.tell(WorkerUp(added.worker, CPU_POOL, f"node{worker}"))
    assert desk.scheduler.open[0].attempt == 11


def test_deaths_that_nobody_can_tell_of_are_no_fault_of_the_splits_until_they_are_many() -> None:
    """A node may be dead for a while before the head knows."""
    desk = Desk(FUSED, {CPU_POOL: 1}, nodes=("a",))
    desk.list_splits(split(0))
    commands: list[object] = []
    for worker in range(MOST_LOST):
        commands = list(desk.tell(WorkerLost(worker, "its process ended", pool=CPU_POOL, untold=True)))
        if worker < MOST_LOST - 1:
            (added,) = of(commands, AddWorker)
            assert (added.replaces, added.node) == (worker, "a")
            desk.tell(WorkerUp(added.worker, CPU_POOL, "a"))
            assert desk.scheduler.open[0].history.blind == 0
    (failed,) = of(commands, Fail)
    assert ("attempts", str(MOST_LOST)) in failed.error.where


def test_a_pool_is_never_left_without_a_worker_to_come() -> None:
    desk = Desk(FUSED, {CPU_POOL: 2}, late=True)
    desk.list_splits(split(0))
    assert of(desk.tell(WorkerLost(0, "gone", started=False, pool=CPU_POOL, gone=True)), AddWorker) == []
    (added,) = of(desk.tell(WorkerLost(1, "gone", started=False, pool=CPU_POOL, gone=True)), AddWorker)
    for _ in range(MOST_UNSTARTED + 1):  # they count for no trouble with starting
        lost = WorkerLost(added.worker, "gone", started=False, pool=CPU_POOL, gone=True)
        (added,) = of(desk.tell(lost), AddWorker)
    assert steps(desk.tell(WorkerUp(added.worker, CPU_POOL))) == [(0, added.worker)]


def test_who_dies_by_itself_is_replaced_on_its_node() -> None:
    desk = Desk(FUSED, {CPU_POOL: 2}, nodes=("a", "b"))
    (added,) = of(desk.tell(WorkerLost(1, "killed", pool=CPU_POOL)), AddWorker)
    assert (added.worker, added.replaces, added.node) == (2, 1, "b")


def test_the_budget_follows_the_nodes() -> None:
    desk = Desk(CHAIN, {CPU_POOL: 1, "sim": 1}, limits=Limits(budget_bytes=150, block_bytes=100))
    desk.list_splits(split(0), split(1), split(2))
    (read,) = desk.at(0)
    desk.answer(read, blocks=1, finished=True)
    assert desk.splits_at(0) == [], "a block is there, and no room for another one"
    desk.tell(BudgetChanged(1000))
    assert desk.splits_at(0) == [1]


def test_room_is_taken_while_there_may_be_work() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1})
    desk.list_splits(split(0), split(1))
    (added,) = of(desk.tell(RoomOffered(CPU_POOL, CPU_POOL, "b")), AddWorker)
    assert (added.worker, added.replaces, added.device, added.node) == (1, None, CPU_POOL, "b")
    assert desk.tell(RoomOffered("cuda", "cuda:0", "b")) == [], "the plan has no such pool"
    assert steps(desk.tell(WorkerUp(1, CPU_POOL, "b"))) == [(0, 1)]
    desk.tell(Drain())
    assert desk.tell(RoomOffered(CPU_POOL, CPU_POOL, "c")) == []
    for step in list(desk.running):
        desk.answer(step, finished=True)
    assert of(desk.commands, Finish)
    assert desk.tell(RoomOffered(CPU_POOL, CPU_POOL, "d")) == []


def test_the_error_that_ends_the_run_names_the_node() -> None:
    desk = Desk(FUSED, {CPU_POOL: 1}, nodes=("a",))
    desk.list_splits(split(0))
    worker = 0
    while not of(desk.commands, Fail):
        for added in of(desk.tell(WorkerLost(worker, "killed", pool=CPU_POOL)), AddWorker):
            worker = added.worker
            desk.tell(WorkerUp(worker, CPU_POOL, "a"))
    (fail,) = of(desk.commands, Fail)
    assert ("node", "a") in fail.error.where


# ---------------------------------------------------------------- blocks that are lost


def lossy() -> Desk:
    """Two splits; of the first a block is at the model, of the second one waits."""
    desk = Desk(CHAIN, {CPU_POOL: 2, "sim": 1}, limits=Limits(budget_bytes=10_000, block_bytes=100))
    desk.list_splits(split(0), split(1))
    first, second = desk.at(0)
    desk.answer(first, blocks=1, more=True)
    desk.answer(second, blocks=4, more=True)
    return desk


def parts_of(desk: Desk, index: int) -> list[int]:
    return [p.id for node in desk.scheduler.open[index].nodes() if node.block is not None for p in node.block.parts]


def test_splits_that_hold_lost_parts_start_again() -> None:
    desk = lossy()
    lost = parts_of(desk, 1)[-1]
    commands = desk.tell(PartsLost((lost, 999), "node b is gone"))
    assert [(r.index, r.attempt) for r in of(commands, Retry)] == [(1, 2)]
    assert lost in released(commands)
    held = desk.scheduler.in_flight
    desk.tell(PartsFreed((lost,)))
    assert desk.scheduler.in_flight == held - 100
    assert desk.scheduler.open[1].history.blind == 0


def test_parts_that_a_running_step_reads_count_as_lost_too() -> None:
    desk = lossy()
    (part,) = parts_of(desk, 0)
    model = desk.at(1)[0]
    assert [p.id for p in model.inputs[0].parts] == [part]
    commands = desk.tell(PartsLost((part,), "node b is gone"))
    assert [r.index for r in of(commands, Retry)] == [0]
    assert part not in released(commands), "not while the step may read it"
    assert part in released(desk.answer(model))


def test_what_nobody_holds_any_more_is_no_loss() -> None:
    desk = lossy()
    (part,) = parts_of(desk, 0)
    desk.answer(desk.at(1)[0])
    (write,) = (s for s in desk.at(2) if isinstance(s, Advance) and s.split_index == 0)
    assert part in released(desk.answer(write))
    assert desk.tell(PartsLost((part,), "node b is gone")) == []
    desk.tell(PartsFreed((part,)))
    assert desk.tell(PartsLost((part, 12345), "node b is gone")) == []


def test_a_step_that_finds_its_blocks_gone_is_no_fault_but_there_is_an_end() -> None:
    desk = lossy()
    error = BlockLost("block 1 is gone")
    model = desk.at(1)[0]
    desk.running.remove(model)
    commands = desk.tell(StepFailed(model.id, model.worker, error))
    assert [r.index for r in of(commands, Retry)] == [0]
    for _ in range(MOST_LOST):
        if of(desk.commands, Fail):
            break
        step = next(s for s in desk.running if isinstance(s, Advance) and s.split_index == 0)
        desk.running.remove(step)
        desk.tell(StepFailed(step.id, step.worker, error))
    (fail,) = of(desk.commands, Fail)
    assert fail.error is error
    assert desk.scheduler.open[0].history.lost == MOST_LOST


def test_a_cancelled_step_may_lose_its_blocks() -> None:
    desk = lossy()
    (part,) = parts_of(desk, 0)
    model = desk.at(1)[0]
    desk.tell(PartsLost((part,), "node b is gone"))
    desk.running.remove(model)
    commands = desk.tell(StepFailed(model.id, model.worker, BlockLost("block 1 is gone")))
    assert of(commands, Retry) == []
    assert part in released(commands)


@pytest.mark.parametrize("gone", [True, False])
def test_a_split_is_settled_once_whatever_is_lost(gone: bool) -> None:
    desk = Desk(FUSED, {CPU_POOL: 2}, nodes=("a", "b"))
    desk.list_splits(split(0))
    (step,) = desk.running
    desk.running.clear()
    desk.tell(WorkerLost(step.worker, "no more", pool=CPU_POOL, gone=gone))
    (again,) = desk.running
    desk.answer(again, finished=True)
    assert [s.attempt for s in of(desk.commands, Settle)] == [2]
    assert of(desk.commands, Finish)
