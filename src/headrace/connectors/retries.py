"""Retries for requests to object stores: what is tried again, after how long, and how often in all.

What must not live here: requests themselves, and what an answer means to the caller. Invariants:
- Delays have full jitter (uniform between 0 and a bound that doubles), so that workers which failed together don't come back
  together (M. Brooker, "Exponential Backoff And Jitter", 2015).
- All retries of a process draw on one budget: a tenth of its requests, and RATE_PER_S more. Where it is spent a retry waits
  until it has filled again, so that a store in trouble is never sent much more than it was before.
- Anything that is tried again must be harmless when it takes effect twice: that is the caller's part.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from msgspec import Struct

from headrace.core.errors import HeadraceError

T = TypeVar("T")

SHARE = 0.1  # retries per request that the budget allows in the long run
RATE_PER_S = 5.0  # and per second, whatever the requests: what keeps a run of few requests going through a bad minute
BURST = 50.0  # saved up at most, and there at the start


class Policy(Struct, frozen=True):
    """attempts: at most, in all. first_s, most_s: bounds of the first and the longest delay. total_s: no retry after that."""

    attempts: int = 10
    first_s: float = 0.1
    most_s: float = 20.0
    total_s: float = 180.0

    def bound(self, failures: int) -> float:
        """The longest delay after that many failures (from 1)."""
        return min(self.most_s, self.first_s * 2 ** (failures - 1))


POLICY = Policy()


class Budget:
    """A bucket of tokens: a request adds SHARE, time adds RATE_PER_S a second, a retry takes one; at most BURST are kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = BURST
        self._at = clock()
        self._lock = threading.Lock()

    def spend(self) -> float:
        """Take a token for a retry; how many seconds to wait until it is there."""
        with self._lock:
            self._fill(0.0)
            self._tokens -= 1
            return max(0.0, -self._tokens / RATE_PER_S)

    def earn(self) -> None:
        """A request is made for the first time."""
        with self._lock:
            self._fill(SHARE)

    def _fill(self, more: float) -> None:
        now = self._clock()
        self._tokens = min(BURST, self._tokens + more + (now - self._at) * RATE_PER_S)
        self._at = now


budget = Budget()


class Exhausted(Exception):
    """The request failed for good; `__cause__` is the last failure."""

    def __init__(self, attempts: int) -> None:
        super().__init__(f"{attempts} attempts")
        self.attempts = attempts


def call(
    action: Callable[[], T],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    jitter: Callable[[float, float], float] = random.uniform,
) -> T:
    """`action()`, again after transient trouble. Raises Exhausted when that goes on, other errors at once."""
    policy = POLICY
    budget.earn()
    started = clock()
    failures = 0
    while True:
        try:
            return action()
        except Exception as e:
            if not transient(e):
                raise
            failures += 1
            delay = max(jitter(0.0, policy.bound(failures)), 0.0)
            if failures >= policy.attempts:
                raise Exhausted(failures) from e
            delay = max(delay, budget.spend())
            if clock() - started + delay > policy.total_s:
                raise Exhausted(failures) from e
            sleep(delay)


# The client has one exception for all of these; the status and S3's error code are in its text, and part of the protocol.
_STATUS = re.compile(r"status(?: code)?:? (\d{3})\b")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING_CODE = frozenset({"RequestTimeout", "SlowDown", "Throttling", "RequestThrottled", "InternalError"})


def transient(error: BaseException) -> bool:
    """May the same request succeed later: the server's fault, throttling, a timeout, a lost connection?"""
    if isinstance(error, HeadraceError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    from obstore import exceptions as oe

    if not isinstance(error, oe.GenericError | oe.JoinError):
        return False
    text = str(error)
    status = _STATUS.search(text)
    if status is None:
        return "builder error" not in text and "NoSuchBucket" not in text
    code = _CODE.search(text)
    if code is not None and code[1] in _PASSING_CODE:
        return True
    return (int(status[1]) >= 500 and status[1] != "501") or int(status[1]) in _PASSING_STATUS
