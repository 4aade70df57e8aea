"""The commit protocol under seeds: thousands of worlds of dying, pausing and competing drivers."""

from __future__ import annotations

import pytest
from tests.simulation.commit.bugs import BUGS, plant
from tests.simulation.commit.world import run_seed

SHARDS = 6
SEEDS = 400  # of each
ENOUGH = 600  # seeds within which a planted bug shows; all of them pass without it, being among those above


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_split_counts_once_whatever_dies(shard: int) -> None:
    for seed in range(shard * SEEDS, (shard + 1) * SEEDS):
        run_seed(seed)


def test_worlds_are_as_troubled_as_they_should_be() -> None:
    """Or nothing would be shown: drivers die, are taken over, find full disks and lose answers, in the seeds used above."""
    worlds = [run_seed(seed) for seed in range(200)]
    sessions = [s for w in worlds for s in w.sessions]
    stories = [line for w in worlds for line in w.story]
    assert len(sessions) > 5 * len(worlds)
    for wanted in ("another driver has taken over", "another driver is at work", "no space left", "power cut", "killed"):
        assert sum(wanted in line for line in stories) > 20, wanted
    assert sum("opened run-00001" in line for line in stories) > 20


def test_a_seed_is_a_world() -> None:
    assert run_seed(17).story == run_seed(17).story


@pytest.mark.parametrize("name", sorted(BUGS))
def test_planted_bugs_are_caught(name: str) -> None:
    with plant(name):
        for seed in range(ENOUGH):
            try:
                run_seed(seed)
            except AssertionError:
                return
    pytest.fail(f"{name} was not caught within {ENOUGH} seeds")
