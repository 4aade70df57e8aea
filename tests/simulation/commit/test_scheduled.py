"""Whole drivers under seeds: scheduler, workers that die, commit protocol and a disk that forgets."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation.commit.scheduled import run_scheduled
from tests.simulation.commit.scheduled_bugs import SCHEDULED_BUGS, plant_scheduled

SHARDS = 6
SEEDS = 125  # of each
ENOUGH = 500  # seeds within which a planted bug shows; all of them pass without it, being among those above


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_row_counts_once_whatever_dies(shard: int) -> None:
    for seed in range(shard * SEEDS, (shard + 1) * SEEDS):
        run_scheduled(seed)


def test_worlds_are_as_troubled_as_they_should_be() -> None:
    worlds = [run_scheduled(seed) for seed in range(100)]
    counts = sum((w.counts for w in worlds), Counter[str]())
    stories = [line for w in worlds for line in w.story]
    for wanted in ("another driver has taken over", "no space left", "power cut", "killed", "drained"):
        assert sum(wanted in line for line in stories) > 3, wanted
    assert counts["retries"] > 100
    assert counts["worker deaths"] > 100
    assert sum(w.limited for w in worlds) > 20
    assert sum(bool(w.aside) for w in worlds) > 20


def test_a_seed_is_a_world() -> None:
    first, again = run_scheduled(17), run_scheduled(17)
    assert first.story == again.story
    assert first.counts == again.counts
    assert {name: inode.data for name, inode in first.disk.live.items()} == {
        name: inode.data for name, inode in again.disk.live.items()
    }


@pytest.mark.parametrize("name", sorted(SCHEDULED_BUGS))
def test_planted_bugs_are_caught(name: str) -> None:
    with plant_scheduled(name):
        for seed in range(ENOUGH):
            try:
                run_scheduled(seed)
            except AssertionError:
                return
    pytest.fail(f"{name} was not caught within {ENOUGH} seeds")
