"""Governor: holds work back before the kernel or its out-of-memory killer does. A pure decision, and what measures for it.

It compares what the run's own processes hold with what they could hold and, inside a control group, the group's memory with
its limit; the tightest counts. What then waits is the scheduler's affair. Nothing is killed here.

Invariant: a level falls only well below the mark where it rose, so that it does not flutter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from headrace.runtime.machine import available_bytes, memory_cgroups

RISE = (0.85, 0.93)  # levels 1 and 2 begin; the kernel starts to reclaim in earnest from about 95%
FALL = (0.80, 0.89)  # and end
CALM_S = 0.5  # between samples
TENSE_S = 0.1  # the same while memory is scarce: an allocation of a gigabyte takes longer
COST_SHARE = 0.01  # sampling may take this share of the driver's time
RARELY_S = 2.0  # however much it costs
SAY_EVERY_S = 60.0  # the same level is not told again sooner

_SAID = {
    1: "no new work until it falls",
    2: "one step at a time until it falls, and blocks that wait go to disk",
}


class Room(Struct, frozen=True):
    """Memory in use, of what there is."""

    used_bytes: int
    of_bytes: int

    @property
    def share(self) -> float:
        return self.used_bytes / max(1, self.of_bytes)

    def __str__(self) -> str:
        unit, name = (1e9, "GB") if self.of_bytes >= 1e9 else (1e6, "MB")
        return f"{self.used_bytes / unit:.1f} of {self.of_bytes / unit:.3g} {name}"


def next_level(level: int, share: float) -> int:
    """The pressure level after `level`, with `share` of the memory in use. 0: fine. 1: scarce. 2: nearly none."""
    return max(
        sum(1 for mark in RISE if share >= mark),
        sum(1 for i, mark in enumerate(FALL) if share >= mark and level > i),
    )


class MachineRooms:
    """Measures: what the machine and its control groups leave to the run. Costs about 0.1 ms."""

    def __init__(self) -> None:
        self._groups = memory_cgroups()

    def __call__(self, own_bytes: int) -> Sequence[Room]:
        """own_bytes: held by the run's processes. Others' memory makes less room."""
        return (Room(own_bytes, own_bytes + available_bytes()), *(Room(g.used(), g.limit()) for g in self._groups))


class Governor:
    """`due_s` tells when to sample next. budget_bytes: what the run's processes may hold; None: what the machine can give."""

    def __init__(self, budget_bytes: int | None = None, *, rooms: Callable[[int], Sequence[Room]] | None = None) -> None:
        if budget_bytes is not None:
            rooms = lambda own: (Room(own, budget_bytes),)  # noqa: E731 - as short as it can be said
        self._rooms = rooms or MachineRooms()
        self._said_s = [float("-inf"), float("-inf"), float("-inf")]
        self.level = 0
        self.due_s = float("-inf")

    def sample(self, measure: Callable[[], int], now_s: float) -> tuple[int, bool, str]:
        """(own memory as `measure` tells it, whether the level has changed, what to tell people of that or "")."""
        before_s = time.perf_counter()
        own_bytes = measure()
        room = max(self._rooms(own_bytes), key=lambda r: r.share)
        level = next_level(self.level, room.share)
        changed, self.level = level != self.level, level
        spent_s = time.perf_counter() - before_s
        self.due_s = now_s + min(max(TENSE_S if level else CALM_S, spent_s / COST_SHARE), RARELY_S)
        note = ""
        if changed and level and now_s - self._said_s[level] >= SAY_EVERY_S:
            self._said_s[level] = now_s
            note = f"memory {room}: {_SAID[level]}"
        return own_bytes, changed, note
