from __future__ import annotations

from headrace.runtime.watch import NEVER_S, START_S, StepWatch


def test_without_a_limit_nothing_is_due() -> None:
    watch = StepWatch(None)
    watch.submitted(0, 0.0)
    assert watch.next_deadline_s == NEVER_S
    assert watch.overdue(1e9) == []


def test_a_step_is_timed_from_the_answer_before_it() -> None:
    watch = StepWatch(30.0)
    watch.submitted(0, 0.0)
    watch.submitted(0, 1.0)
    assert watch.next_deadline_s == 30.0
    watch.answered(0, 25.0)
    assert watch.next_deadline_s == 55.0
    assert watch.overdue(54.9) == []
    assert watch.overdue(55.0) == [(0, "no answer for 30 s")]


def test_an_idle_worker_is_never_overdue() -> None:
    watch = StepWatch(30.0)
    watch.submitted(0, 0.0)
    watch.answered(0, 1.0)
    assert watch.next_deadline_s == NEVER_S
    watch.submitted(0, 100.0)
    assert watch.next_deadline_s == 130.0


def test_each_is_told_once_and_the_others_go_on() -> None:
    watch = StepWatch(2.0)
    watch.submitted(0, 0.0)
    watch.submitted(1, 1.0)
    assert [worker for worker, _ in watch.overdue(2.0)] == [0]
    assert watch.overdue(2.5) == []
    assert watch.next_deadline_s == 3.0
    watch.lost(0)
    assert [worker for worker, _ in watch.overdue(3.0)] == [1]


def test_a_first_step_says_that_it_loads_models() -> None:
    watch = StepWatch(0.5)
    watch.submitted(7, 0.0)
    assert watch.overdue(1.0) == [(7, "no answer for 0.5 s to its first step, which loads models too")]


def test_a_worker_that_never_comes_up() -> None:
    watch = StepWatch(2.0)
    watch.starting(0, 0.0)
    watch.starting(1, 0.0)
    assert watch.next_deadline_s == START_S
    watch.came_up(1)
    watch.submitted(1, 3.0)
    assert watch.next_deadline_s == 5.0
    watch.answered(1, 4.0)
    assert watch.overdue(START_S) == [(0, f"not up after {START_S:g} s")]
    watch.lost(0)
    assert watch.next_deadline_s == NEVER_S
    patient = StepWatch(2 * START_S)
    patient.starting(0, 0.0)
    assert patient.next_deadline_s == 2 * START_S


def test_answers_in_any_order_leave_the_oldest_step_its_limit() -> None:
    watch = StepWatch(10.0)
    for step in (1, 2, 3):
        watch.submitted(0, 0.0, step)
    watch.answered(0, 8.0, 2)
    watch.answered(0, 9.0, 3)
    assert watch.next_deadline_s == 10.0
    watch.answered(0, 9.5, 1)
    assert watch.next_deadline_s == NEVER_S


def test_a_worker_that_is_never_idle_is_overdue_by_its_oldest_step() -> None:
    """Workers are looked at by deadline: answers move it, and so does a new worker under an old number."""
    watch = StepWatch(10.0)
    watch.starting(0, 0.0)
    watch.came_up(0)
    for second in range(10):
        watch.submitted(0, float(second), second)
        watch.submitted(1, float(second), second)
        if second:
            watch.answered(0, float(second), second - 1)
        assert watch.next_deadline_s == 10.0
    assert [worker for worker, _ in watch.overdue(10.0)] == [1]
    assert watch.next_deadline_s == 19.0
    watch.lost(1)
    watch.submitted(1, 12.0, 200)
    assert watch.next_deadline_s == 19.0
    watch.answered(0, 13.0, 9)
    assert watch.next_deadline_s == 22.0
    assert [worker for worker, _ in watch.overdue(22.0)] == [1]
