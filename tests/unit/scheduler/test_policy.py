"""The policies are functions of numbers: a table of them each."""

from __future__ import annotations

import pytest

from headrace.scheduler.policy.admission import may_produce, producers_wanted, queue_target, within_budget
from headrace.scheduler.policy.routing import MANY_SPLITS, prefer_fused


@pytest.mark.parametrize(
    ("pool", "workers", "per_step", "target"),
    [
        ("cpu", 0, 1, 2),
        ("cpu", 1, 1, 2),
        ("cpu", 16, 1, 16),
        ("cuda", 0, 1, 2),  # not up yet: enough for its first device
        ("cuda", 1, 1, 2),
        ("cuda", 4, 1, 8),
        ("cuda", 1, 8, 16),  # a batch gathers eight blocks: two batches
    ],
)
def test_queue_target(pool: str, workers: int, per_step: int, target: int) -> None:
    assert queue_target(pool, workers, per_step) == target


def test_producers_wanted_follows_littles_law() -> None:
    assert producers_wanted(consumers=1, make_s=0.1, take_s=0.1) == 2
    assert producers_wanted(consumers=4, make_s=1.0, take_s=0.1) == 41
    assert producers_wanted(consumers=1, make_s=0.01, take_s=1.0) == 2
    assert producers_wanted(consumers=0, make_s=1.0, take_s=1.0) == 1


@pytest.mark.parametrize(("make_s", "take_s"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_producers_are_not_limited_before_both_sides_are_measured(make_s: float, take_s: float) -> None:
    assert producers_wanted(1, make_s, take_s) > 1_000_000


@pytest.mark.parametrize(
    ("waiting", "producing", "starving", "may"),
    [
        (0, 0, False, True),
        (1, 1, False, True),
        (2, 0, False, False),  # the queue is full
        (0, 2, False, False),  # enough makers are at it
        (0, 9, True, True),  # a consumer has nothing: all hands
        (1, 9, True, False),  # it is about to get something
    ],
)
def test_may_produce(waiting: int, producing: int, starving: bool, may: bool) -> None:
    assert may_produce(waiting=waiting, target=2, producing=producing, wanted=2, starving=starving) is may


def test_budget_counts_what_is_promised() -> None:
    assert within_budget(in_flight=50, reserved=30, expected=20, budget=100)
    assert not within_budget(in_flight=50, reserved=31, expected=20, budget=100)


@pytest.mark.parametrize(
    ("left_splits", "left_bytes", "reading", "listing_done", "workers", "fused"),
    [
        (0, 0, [], True, 1, True),  # nobody to share with
        (100, 10_000, [], True, 4, True),
        (3, 300, [], True, 4, True),  # one each
        (2, 200, [], True, 4, False),  # the tail: several workers share a split
        (2, 200, [100], True, 4, True),  # the fourth has its own
        (2, 200, [40], True, 4, False),  # but would be done long before
        (0, 0, [100, 100, 900], True, 4, True),
        (0, 0, [900, 50], True, 4, False),  # one that takes long keeps only one worker busy
        (9, 90, [], True, 4, False),  # many, but all of them small beside this one
        (9, 90, [], False, 4, True),  # more will come
        (0, 0, [], False, 4, False),
    ],
)
def test_fused_before_the_tail(
    left_splits: int, left_bytes: int, reading: list[float], listing_done: bool, workers: int, fused: bool
) -> None:
    found = prefer_fused(
        split_bytes=100,
        left_bytes=left_bytes,
        left_splits=left_splits,
        listing_done=listing_done,
        workers=workers,
        reading=reading,
    )
    assert found is fused


def test_a_long_listing_that_goes_on_promises_enough_for_everybody() -> None:
    def fused(listed: int, done: bool) -> bool:
        return prefer_fused(split_bytes=100, left_bytes=100, left_splits=1, listing_done=done, workers=64_000, listed=listed)

    assert not fused(MANY_SPLITS - 1, False)
    assert fused(MANY_SPLITS, False)
    assert not fused(MANY_SPLITS, True)
