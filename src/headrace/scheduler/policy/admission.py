"""Whether a step that makes blocks may start now. Non-goals: fairness between splits (the oldest goes first)."""

from __future__ import annotations

import math


def queue_target(pool: str, workers: int, blocks_per_step: int = 1) -> int:
    """Blocks that may wait for a stage before those who feed it pause.

    A device worker holds one step running and one queued; two more per device ride out the jitter of CPU steps. CPU
    workers take downstream work first, so one block each is enough. blocks_per_step: blocks that one step gathers.
    """
    return 2 * max(1, workers) * blocks_per_step if pool != "cpu" else max(2, workers)


def producers_wanted(consumers: int, make_s: float, take_s: float) -> int:
    """How many workers should make blocks for `consumers` at the measured seconds per block, with one to spare.

    Little's law: to feed c consumers that take a block every `take_s`, c * make_s / take_s makers must be busy.
    0.0 means not measured yet: any number.
    """
    if make_s <= 0.0 or take_s <= 0.0:
        return 1 << 30
    return math.ceil(consumers * make_s / take_s) + 1


def may_produce(*, waiting: int, target: int, producing: int, wanted: int, starving: bool) -> bool:
    """waiting: blocks queued at the consumer stage. producing: steps now making blocks for it. starving: a consumer idles."""
    if starving and waiting == 0:
        return True
    return waiting < target and producing < wanted


def within_budget(*, in_flight: int, reserved: int, expected: int, budget: int) -> bool:
    """Memory: blocks alive, room promised to running steps, and what this step is expected to add."""
    return in_flight + reserved + expected <= budget
