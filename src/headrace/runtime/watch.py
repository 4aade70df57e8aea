"""StepWatch: since when each worker has been at its present step, or coming up, and who has been at it for too long.

Pure: moments are arguments.

A worker comes up, and then runs its steps one at a time, in the order in which they were submitted. So a step begins when it
is submitted, or when the one before it is answered, whichever is later. Steps of streaming models are answered in any order:
the oldest one has the time limit, from when it became the oldest.
"""

from __future__ import annotations

from dataclasses import dataclass

NEVER_S = float("inf")
START_S = 120.0  # to come up, which imports the user's modules: many at once, on a slow file system, take long


@dataclass(slots=True)
class _Busy:
    """steps: those not answered, oldest first. since_s: when that became the oldest one."""

    steps: list[int]
    since_s: float
    limit_s: float
    answered: bool = False  # at least once
    up: bool = True


class StepWatch:
    """limit_s: how long a step may take (a worker's start START_S at least); None: for ever, and then nothing is kept."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._workers: dict[int, _Busy] = {}
        self._killed: set[int] = set()

    def starting(self, worker: int, now_s: float) -> None:
        if self._limit_s is not None:
            self._workers[worker] = _Busy([-1], now_s, max(self._limit_s, START_S), up=False)

    def came_up(self, worker: int) -> None:
        self._workers.pop(worker, None)

    def submitted(self, worker: int, now_s: float, step: int = 0) -> None:
        if self._limit_s is None:
            return
        busy = self._workers.setdefault(worker, _Busy([], now_s, self._limit_s))
        if not busy.steps:
            busy.since_s = now_s
        busy.steps.append(step)

    def answered(self, worker: int, now_s: float, step: int = 0) -> None:
        busy = self._workers.get(worker)
        if busy is not None and step in busy.steps:
            if busy.steps[0] == step:
                busy.since_s = now_s
            busy.steps.remove(step)
            busy.answered = True

    def lost(self, worker: int) -> None:
        self._workers.pop(worker, None)
        self._killed.discard(worker)

    @property
    def next_deadline_s(self) -> float:
        """When the first step's time is up, if no answer comes before."""
        if self._limit_s is None:
            return NEVER_S
        due_s = (b.since_s + b.limit_s for w, b in self._workers.items() if b.steps and w not in self._killed)
        return min(due_s, default=NEVER_S)

    def overdue(self, now_s: float) -> list[tuple[int, str]]:
        """Workers whose step's time is up, each told once, and the reason in words."""
        if now_s < self.next_deadline_s:
            return []
        found: list[tuple[int, str]] = []
        for worker, busy in self._workers.items():
            if busy.steps and worker not in self._killed and now_s >= busy.since_s + busy.limit_s:
                self._killed.add(worker)
                first = "" if busy.answered else " to its first step, which loads models too"
                reason = f"no answer for {busy.limit_s:g} s{first}" if busy.up else f"not up after {busy.limit_s:g} s"
                found.append((worker, reason))
        return found
