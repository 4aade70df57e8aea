"""StepWatch: since when each worker has been at its present step, or coming up, and who has been at it for too long.

Pure: moments are arguments.

A worker comes up, and then runs its steps one at a time, in the order in which they were submitted. So a step begins when it
is submitted, or when the one before it is answered, whichever is later. Steps of streaming models are answered in any order:
the oldest one has the time limit, from when it became the oldest.

A worker stands in a heap, once, by a moment that is not after its deadline: with tens of thousands of workers nobody looks at
all of them.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

from msgspec import Struct

NEVER_S = float("inf")
START_S = 120.0  # to come up, which imports the user's modules: many at once, on a slow file system, take long


class _Busy(Struct):
    """steps: those not answered, oldest first. since_s: when that became the oldest one."""

    steps: list[int]
    since_s: float
    limit_s: float
    answered: bool = False  # at least once
    up: bool = True
    filed: bool = False  # in the heap

    @property
    def due_s(self) -> float:
        return self.since_s + self.limit_s


class StepWatch:
    """limit_s: how long a step may take (a worker's start START_S at least); None: for ever, and then nothing is kept."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._workers: dict[int, _Busy] = {}
        self._killed: set[int] = set()
        self._heap: list[tuple[float, int, int, _Busy]] = []  # (see the module, tie, worker, what it is at)
        self._tie = 0

    def starting(self, worker: int, now_s: float) -> None:
        if self._limit_s is not None:
            self._workers[worker] = busy = _Busy([-1], now_s, max(self._limit_s, START_S), up=False)
            self._file(worker, busy)

    def came_up(self, worker: int) -> None:
        self._workers.pop(worker, None)

    def submitted(self, worker: int, now_s: float, step: int = 0) -> None:
        if self._limit_s is None:
            return
        busy = self._workers.get(worker)
        if busy is None:
            busy = self._workers[worker] = _Busy([], now_s, self._limit_s)
        if not busy.steps:
            busy.since_s = now_s
        busy.steps.append(step)
        self._file(worker, busy)

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
        while self._heap:
            filed_s, tie, worker, busy = self._heap[0]
            if not busy.steps or self._workers.get(worker) is not busy or worker in self._killed:
                heappop(self._heap)
                busy.filed = False
            elif busy.due_s > filed_s:
                heapreplace(self._heap, (busy.due_s, tie, worker, busy))
            else:
                return busy.due_s
        return NEVER_S

    def overdue(self, now_s: float) -> list[tuple[int, str]]:
        """Workers whose step's time is up, each told once, and the reason in words."""
        found: list[tuple[int, str]] = []
        while now_s >= self.next_deadline_s:
            _, _, worker, busy = heappop(self._heap)
            busy.filed = False
            self._killed.add(worker)
            first = "" if busy.answered else " to its first step, which loads models too"
            reason = f"no answer for {busy.limit_s:g} s{first}" if busy.up else f"not up after {busy.limit_s:g} s"
            found.append((worker, reason))
        return found

    def _file(self, worker: int, busy: _Busy) -> None:
        if not busy.filed:
            busy.filed = True
            self._tie += 1
            heappush(self._heap, (busy.due_s, self._tie, worker, busy))
