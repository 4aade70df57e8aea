from __future__ import annotations

import pytest

from headrace.core.errors import StopConditionMet, UserCodeError
from headrace.metrics import Count
from headrace.runtime.stop_rules import StopRule, StopRules


def rules(after_rows: int = 0, **options: object) -> tuple[StopRules, list[float]]:
    now = [0.0]
    condition = options.get("condition", lambda rows: rows > 5)
    return StopRules({"n": StopRule(Count(), condition, after_rows)}, lambda: now[0]), now  # type: ignore[arg-type]


def test_nothing_to_look_at() -> None:
    empty = StopRules({}, lambda: 0.0)
    assert not empty
    empty.add({"n": {"rows": 9}})
    empty.look(9)
    empty.judge({"n": 9}, 9)


def test_answers_add_up_and_are_not_changed() -> None:
    found, _ = rules()
    state = {"rows": 3}
    found.add({"n": state, "other": {"rows": 100}})
    found.look(3)
    found.add({"n": state})
    assert state == {"rows": 3}
    with pytest.raises(StopConditionMet, match=r"evaluate\(n\) is 6 after 6 rows"):
        found.look(6)


def test_not_before_enough_rows() -> None:
    found, _ = rules(after_rows=10)
    found.add({"n": {"rows": 6}})
    found.look(6)
    found.add({"n": {"rows": 4}})
    with pytest.raises(StopConditionMet):
        found.look(10)


def test_the_end_is_judged_however_few_rows() -> None:
    found, _ = rules(after_rows=1000)
    found.judge({"n": 5}, 5)
    with pytest.raises(StopConditionMet):
        found.judge({"n": 6}, 6)


def test_looking_takes_a_small_share_of_the_time() -> None:
    calls: list[float] = []
    now = [0.0]

    def slow(rows: int) -> bool:
        calls.append(now[0])
        now[0] += 1.0
        return False

    found = StopRules({"n": StopRule(Count(), slow, 0)}, lambda: now[0])
    while now[0] < 100.0:
        found.add({"n": {"rows": 1}})
        found.look(1)
        now[0] += 0.5
    assert 3 <= len(calls) <= 6


def test_a_condition_that_raises() -> None:
    found, _ = rules(condition=lambda rows: rows["auc"])
    found.add({"n": {"rows": 1}})
    with pytest.raises(UserCodeError, match="TypeError"):
        found.look(1)
