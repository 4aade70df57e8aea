"""When functions and models of a run were constructed in this process, by operator, and when the next worker may construct its.

Workers construct in turn, and a model may take a minute. One that begins at once is still at it when little work has long been
done by others, and the run would wait for it. One that begins when the work has gone on for a quarter of what a load takes
comes up that much later at most, where there is much work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.25  # of the time that the last load took, after it
PATIENCE_S = 1.0  # for the first worker to begin: it may be at something that needs no load
POLL_S = 0.05  # between asking whether it is too late


class Loads:
    """Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next_s: dict[int, float] = {}  # of what was begun: when the next load may begin

    @contextmanager
    def loading(self, index: int) -> Iterator[None]:
        """Operator `index` is constructed inside."""
        began_s = time.monotonic()
        with self._changed:
            self._next_s[index] = float("inf")
        try:
            yield
        finally:
            with self._changed:
                now_s = time.monotonic()
                self._next_s[index] = now_s + SHARE * (now_s - began_s)
                self._changed.notify_all()

    def forget(self, index: int) -> None:
        """What was constructed is gone: the first worker has to, again."""
        with self._changed:
            self._next_s.pop(index, None)

    def may_begin(self, index: int) -> bool:
        """Has one been constructed, and has the work gone on for long enough since the last?"""
        return time.monotonic() >= self._next_s.get(index, float("inf"))

    def await_turn(self, index: int, over: Callable[[], bool], since_s: float) -> bool:
        """Wait until `may_begin`. False: nobody has begun at all for a while since `since_s`, or it is over, as `over` says."""
        with self._changed:
            while not over():
                wait_s = self._next_s.get(index, float("inf")) - time.monotonic()
                if wait_s <= 0:
                    return True
                if index not in self._next_s and time.monotonic() - since_s > PATIENCE_S:
                    return False
                self._changed.wait(min(wait_s, POLL_S))
        return False
