"""A model's worker says how many rows it wants, and the next steps hold so many."""

from __future__ import annotations

import pytest
from tests.unit.scheduler.desk import Desk, split, stage

from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.core.steps import StepDone

STAGES = (
    stage(0, Order.SOURCE),
    stage(1, Order.FREE, pool="sim", model=True, batch_rows=20),
    stage(2, Order.SPLIT, End.SINK),
)


@pytest.mark.parametrize(("wanted", "blocks"), [(0, 2), (50, 5), (10, 2), (1000, 8)])
def test_a_step_gathers_what_was_wanted_but_no_less_than_planned(wanted: int, blocks: int) -> None:
    desk = Desk(STAGES, {CPU_POOL: 1, "sim": 1})
    desk.list_splits(split(0))
    desk.answer(desk.at(0)[0], blocks=12, rows=10, finished=True)
    first, second = desk.at(1)
    assert [len(s.inputs) for s in (first, second)] == [2, 2]
    desk.running.remove(first)
    desk.tell(StepDone(first.id, first.worker, desk.blocks(2), finished=True, wanted_rows=wanted))
    assert len(desk.at(1)[-1].inputs) == blocks


def test_more_blocks_may_wait_for_a_stage_that_wants_more() -> None:
    desk = Desk(STAGES, {CPU_POOL: 1, "sim": 1})
    desk.list_splits(split(0), split(1))
    desk.answer(desk.at(0)[0], blocks=4, rows=10, more=True)
    before = desk.scheduler._target(STAGES[0], 1)
    step = desk.at(1)[0]
    desk.running.remove(step)
    desk.tell(StepDone(step.id, step.worker, desk.blocks(2), finished=True, wanted_rows=100))
    assert desk.scheduler._target(STAGES[0], 1) == 5 * before
