"""When the next worker may load a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.core.errors import UserCodeError
from headrace.plan.nodes import UserFunction
from headrace.worker import loads as module
from headrace.worker.loads import PATIENCE_S, SHARE, Loads
from headrace.worker.user_code import Functions


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def passing(clock: Clock, seconds: float, after: float = float("inf")) -> Any:
    """An `over` by which time passes at each question; true when `after` seconds have."""
    until = clock.now_s + after

    def over() -> bool:
        clock.now_s += seconds
        return clock.now_s > until

    return over


def load(loads: Loads, clock: Clock, seconds: float, index: int = 0) -> None:
    with loads.loading(index):
        clock.now_s += seconds


def test_the_next_load_begins_when_the_work_has_gone_on_for_a_share_of_the_last(clock: Clock) -> None:
    loads = Loads()
    load(loads, clock, 8.0)
    assert not loads.may_begin(0)
    ended_s = clock.now_s
    assert loads.await_turn(0, passing(clock, 0.1), clock.now_s)
    assert SHARE * 8.0 <= clock.now_s - ended_s <= SHARE * 8.0 + 0.2
    assert loads.may_begin(0)
    assert not loads.may_begin(1)


def test_a_load_that_is_under_way_or_forgotten_is_nobodys_turn(clock: Clock) -> None:
    loads = Loads()
    load(loads, clock, 0.0)
    assert loads.may_begin(0)
    with loads.loading(0):
        assert not loads.may_begin(0)
    loads.forget(0)
    assert not loads.may_begin(0)
    assert not loads.await_turn(0, passing(clock, PATIENCE_S), clock.now_s)


def test_nobody_waits_for_a_load_when_it_is_over(clock: Clock) -> None:
    loads = Loads()
    load(loads, clock, 8.0)
    assert not loads.await_turn(0, passing(clock, 0.1, after=1.0), clock.now_s)


def test_a_first_load_is_waited_for_however_long_it_takes(clock: Clock) -> None:
    loads = Loads()
    over: Iterator[int] = iter(range(100))
    with loads.loading(0):

        def over_at_last() -> bool:
            clock.now_s += PATIENCE_S
            return next(over) == 50

        assert not loads.await_turn(0, over_at_last, clock.now_s)


def test_what_nobody_loads_is_not_waited_for(clock: Clock) -> None:
    assert not Loads().await_turn(0, passing(clock, PATIENCE_S / 3), clock.now_s)
    assert clock.now_s < 100 + 2 * PATIENCE_S


class Model:
    made = 0

    def __init__(self, fails: bool = False) -> None:
        type(self).made += 1
        if fails:
            raise ValueError("no")


def test_warming_constructs_once_others_have() -> None:
    loads, fn = Loads(), UserFunction(Model, is_class=True)
    first, second = Functions("cpu", loads=loads), Functions("cpu", loads=loads)
    thread = threading.Thread(target=second.warm, args=(0, fn, "predict", (), lambda: False, 0.0))
    made = first.get(0, fn, "predict")
    thread.start()
    thread.join()
    before = Model.made
    assert second.get(0, fn, "predict") is not made
    assert Model.made == before


def test_what_fails_in_warming_is_told_when_it_is_needed() -> None:
    loads = Loads()
    with loads.loading(0):
        pass
    functions, fn = Functions("cpu", loads=loads), UserFunction(Model, is_class=True, ctor_args=(True,))
    functions.warm(0, fn, "predict", (), lambda: False, 0.0)
    with pytest.raises(UserCodeError, match="no"):
        functions.get(0, fn, "predict")
