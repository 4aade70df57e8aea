"""Retries: full jitter, one budget for a process, and what is tried again at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from obstore import exceptions as oe

from headrace.connectors import retries
from headrace.connectors.retries import Budget, Exhausted, Policy, transient
from headrace.core.errors import DataError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, s: float) -> None:
        self.slept.append(s)
        self.now += s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "budget", Budget(clock))
    return clock


def failing(times: int, error: Exception) -> Callable[[], int]:
    left = [times]

    def action() -> int:
        if left[0]:
            left[0] -= 1
            raise error
        return 7

    return action


def test_delays_double_up_to_a_bound_and_begin_at_zero(clock: Clock) -> None:
    bounds: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    assert retries.call(failing(9, ConnectionResetError()), sleep=clock.sleep, clock=clock, jitter=jitter) == 7
    assert [low for low, _ in bounds] == [0.0] * 9
    assert [high for _, high in bounds] == [min(20.0, 0.1 * 2**k) for k in range(9)]
    assert clock.slept == [high for _, high in bounds]


def test_attempts_are_counted(clock: Clock) -> None:
    with pytest.raises(Exhausted) as caught:
        retries.call(failing(10, TimeoutError("slow")), sleep=clock.sleep, clock=clock)
    assert caught.value.attempts == 10
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_time_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", Policy(attempts=1000, first_s=50.0, most_s=50.0, total_s=180.0))
    with pytest.raises(Exhausted):
        retries.call(failing(1000, TimeoutError()), sleep=clock.sleep, clock=clock, jitter=lambda low, high: high)
    assert clock.now == 150.0


def test_other_errors_come_at_once(clock: Clock) -> None:
    for error in (DataError("x"), FileNotFoundError(), oe.AlreadyExistsError(), oe.PermissionDeniedError(), ValueError()):
        with pytest.raises(type(error)):
            retries.call(failing(1, error), sleep=clock.sleep, clock=clock)
    assert not clock.slept


def test_the_budget_is_a_share_of_requests_and_a_rate(clock: Clock) -> None:
    budget = Budget(clock)
    assert [budget.spend() for _ in range(int(retries.BURST))] == [0.0] * int(retries.BURST)
    assert budget.spend() == pytest.approx(1 / retries.RATE_PER_S)
    for _ in range(20):
        budget.earn()
    assert budget.spend() == pytest.approx(0.0, abs=1e-9), "twenty requests have earned two retries: one owed, and this"
    clock.now += 1000.0
    assert [budget.spend() for _ in range(int(retries.BURST))] == [0.0] * int(retries.BURST)
    assert budget.spend() > 0.0, "no more than BURST is saved up"


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("Server returned non-2xx status code: 503 Service Unavailable: <Code>SlowDown</Code>", True),
        ("Server returned non-2xx status code: 500 Internal Server Error: ", True),
        ("Server returned non-2xx status code: 429 Too Many Requests: ", True),
        ("Server returned non-2xx status code: 400 Bad Request: <Error><Code>RequestTimeout</Code></Error>", True),
        ("Server returned non-2xx status code: 400 Bad Request: <Error><Code>InvalidRequest</Code></Error>", False),
        ("Server returned non-2xx status code: 501 Not Implemented: ", False),
        ("HTTP error: error sending request", True),
        ("HTTP error: operation timed out", True),
    ],
)
def test_what_may_pass(text: str, again: bool) -> None:
    assert transient(oe.GenericError(f"Generic S3 error: Error performing GET http://h/b/k in 1ms - {text}")) == again
