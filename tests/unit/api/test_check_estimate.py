"""Estimates: what steps say of a row, a call and a start; checked on steps made up with known costs."""

from __future__ import annotations

import pytest

from headrace.api.estimate import operator_cost
from headrace.observe.rehearsal import Failure, Rehearsal, StageCost, text


def steps(call_s: float, row_s: float, batch: int, sizes: list[int], startup_s: float = 0.0) -> list[tuple[bool, float, int]]:
    made = [(False, call_s * -(-n // batch) + row_s * n, n) for n in sizes]
    _, first_s, first_n = made[0]
    return [(True, first_s + startup_s, first_n), *made]


@pytest.mark.parametrize(("call_s", "row_s"), [(0.005, 0.0), (0.0, 1e-4), (0.002, 5e-5)])
def test_calls_and_rows_are_told_apart(call_s: float, row_s: float) -> None:
    cost = operator_cost(steps(call_s, row_s, 100, [15, 110, 15, 220, 110], startup_s=3.0), 100)
    assert cost.s_per_row == pytest.approx(row_s + call_s / 100)
    assert cost.startup_s == pytest.approx(3.0)
    assert cost.warm


def test_steps_of_one_size_say_no_more_than_the_mean() -> None:
    cost = operator_cost(steps(0.005, 0.0, 100, [50, 50, 50]), 100)
    assert cost.s_per_row == pytest.approx(0.005 / 50)


def test_row_by_row_it_is_the_mean() -> None:
    cost = operator_cost([(True, 2.0, 10), (False, 1.0, 10), (False, 3.0, 30)], None)
    assert cost.s_per_row == pytest.approx(0.1)
    assert cost.startup_s == pytest.approx(1.0)
    assert cost.error == pytest.approx(0.0)


def test_first_steps_alone_are_work() -> None:
    cost = operator_cost([(True, 2.0, 10)], None)
    assert cost.s_per_row == pytest.approx(0.2)
    assert not cost.warm
    assert operator_cost([], None).s_per_row == 0.0


def test_failures_of_a_kind_are_told_once() -> None:
    failures = tuple(Failure("map(f)", "a.csv", i, f"ValueError: bad {i}", "mend it") for i in range(120))
    shown = text(Rehearsal("check", False, failures, rows_failed=120, rows_sampled=1000))
    assert shown.count("ValueError") == 1
    assert "row 0 of a.csv, and 119 other rows" in shown
    assert "120 rows of 1,000 sampled failed" in shown


def test_a_failure_of_many_rows_says_how_many() -> None:
    group = Failure("read", "a.parquet", 0, "DataError: broken", rows=1000)
    shown = text(Rehearsal("check", False, (group,), rows_failed=1000, rows_sampled=2000))
    assert "row 0 of a.parquet, and 999 other rows" in shown
    nowhere = Failure("predict(m)", "", None, "ValueError: x", rows=7)
    assert text(Rehearsal("check", False, (nowhere,), rows_failed=7, rows_sampled=10)).endswith("      7 rows")


def test_unusual_texts_are_one_line() -> None:
    failure = Failure("map(f)", "", None, "ValueError: two\nlines\x1b[31m", rows=0)
    shown = text(Rehearsal("check", False, (failure,), stages=(StageCost("s", "cpu", 1, 0.0, 0.0, 0.0),)))
    assert "\x1b" not in shown
    assert "two lines" in shown
