"""The driver where workers come and go with their nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.unit.runtime.stand import Stand, advance
from tests.unit.runtime.test_driver import answers

from headrace.core.events import ClusterSampled, Noted, StepFinished, WorkerGone, WorkerReplaced
from headrace.core.resources import WorkerSpec
from headrace.core.steps import StepDone, WorkerLost, WorkerResting, WorkerUp
from headrace.scheduler.messages import AddWorker, BudgetChanged, Command, Event, Finish, Limits, Submit


def test_a_worker_is_added_where_a_node_has_joined() -> None:
    add = AddWorker(4, "cuda", None, "a node has joined", "cuda:3", "node7")
    stand = Stand(answers(Start=[add, Finish()]), [])
    stand.driver.run()
    assert stand.substrate.started[-1] == WorkerSpec(4, "cuda", "cuda:3", "node7")
    (added,) = stand.ear.of(WorkerReplaced)
    assert (added.worker, added.pool, added.replaces, added.node) == (4, "cuda", None, "node7")


def test_a_worker_in_the_place_of_one_that_nobody_knows_has_its_pool_for_a_device() -> None:
    stand = Stand(answers(Start=[AddWorker(4, "sim", 99, "its node is gone"), Finish()]), [])
    stand.driver.run()
    assert stand.substrate.started[-1] == WorkerSpec(4, "sim", "sim")


def test_what_is_said_of_a_lost_worker_names_its_node() -> None:
    rounds = [[WorkerUp(0, "sim", "node7")], [WorkerLost(0, "its node is gone", pool="sim", gone=True)]]
    stand = Stand(answers(WorkerLost=[Finish()]), rounds)
    stand.driver.run()
    assert [e.text for e in stand.ear.of(Noted)] == ["worker 0 (sim on node7) is lost: its node is gone"]


def test_a_lost_worker_is_told_and_one_that_went_with_its_node_once_it_had_come_up() -> None:
    lost = [WorkerLost(0, "its node is gone", pool="sim", gone=True), WorkerLost(1, "killed", pool="sim")]
    waited = WorkerLost(2, "its node is gone", started=False, pool="sim", gone=True)
    stand = Stand(answers(WorkerUp=[Finish()]), [[*lost, waited], [WorkerUp(9, "sim")]])
    stand.driver.run()
    assert [(e.worker, e.pool) for e in stand.ear.of(WorkerGone)] == [(0, "sim"), (1, "sim")]


def test_a_worker_whose_loss_is_known_at_the_end_only_is_told_then() -> None:
    stand = Stand(answers(WorkerUp=[Finish()]), [[WorkerUp(0, "sim", "node7")]])
    stand.substrate.untold = [WorkerLost(0, "its process ended", pool="sim")]
    stand.driver.run()
    assert [e.worker for e in stand.ear.of(WorkerGone)] == [0]
    assert [e.text for e in stand.ear.of(Noted)] == ["worker 0 (sim on node7) is lost: its process ended"]


def test_the_scheduler_hears_when_the_nodes_have_more_room() -> None:
    heard: list[int] = []

    def answer(event: Event) -> list[Command]:
        if isinstance(event, BudgetChanged):
            heard.append(event.budget_bytes)
            scheduler.limits = Limits(budget_bytes=event.budget_bytes)
        return [Finish()] if isinstance(event, WorkerUp) else []

    def later() -> list[Any]:
        stand.substrate.clock_s += 10.0
        return []

    stand = Stand(answer, [later, later, [WorkerUp(0, "sim")]])
    substrate: Any = stand.substrate
    scheduler: Any = stand.scheduler
    scheduler.limits, scheduler.wanted_workers = Limits(budget_bytes=5), dict
    substrate.cluster, substrate.want = (
        SimpleNamespace(nodes=1, leaving=0, workers={}, store_bytes=0, memory_bytes=0, budget_bytes=7),
        lambda workers: None,
    )
    stand.driver.run()
    assert len(stand.ear.of(ClusterSampled)) > 2
    assert heard == [7]


def test_answers_of_a_lost_worker_are_nobodys() -> None:
    rounds = [[WorkerLost(0, "its node is gone", pool="sim", gone=True)], [StepDone(1, 0)], [WorkerUp(9, "sim")]]
    begin = [Submit(advance(1)), Submit(advance(2))]
    stand = Stand(answers(Start=begin, WorkerUp=[Finish()]), rounds)
    stand.driver.run()
    assert stand.ear.of(StepFinished) == []


def test_nothing_is_kept_of_workers_that_are_gone() -> None:
    rounds = [[WorkerLost(i, "its node is gone", pool="sim", gone=True)] for i in range(100)]
    script = {i: [AddWorker(i + 1, "sim", i, "its node is gone")] for i in range(99)} | {99: [Finish()]}
    stand = Stand(lambda event: script[event.worker] if isinstance(event, WorkerLost) else None, rounds)
    stand.driver.run()
    assert [spec.device for spec in stand.substrate.started] == ["sim:0"] * 100
    driver = stand.driver
    assert not any((driver._workers, driver._pools, driver._nodes, driver._at, driver._sizes["sim"]))


def test_people_hear_when_a_whole_pool_rests() -> None:
    rounds = [[WorkerResting(0, True)], [WorkerResting(0, True)], [WorkerResting(0, False)], [WorkerResting(7, True)]]
    stand = Stand(answers(WorkerUp=[Finish()]), [*rounds, [WorkerUp(0, "sim")]])
    stand.driver.run()
    (note,) = stand.ear.of(Noted)
    assert note.text.startswith("all workers of pool sim rest: its work waits")
