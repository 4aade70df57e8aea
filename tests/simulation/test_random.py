"""Thousands of seeded random runs, each checked after every event. A failure names its seed and how to run it alone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from tests.simulation.cases import expected, random_case
from tests.simulation.harness import Simulation, run_checked

from headrace.core.errors import UserCodeError, WorkerDied

CHUNKS = 20
SEEDS = 110  # per chunk
FAULTS = 20  # seeds per chunk that are run again with a fault


def run_seed(seed: int) -> None:
    case = random_case(seed)
    run_checked(case, expected(case))


def run_fault(seed: int) -> None:
    """One step raises, or one worker dies: Fail is said once, and nothing after it."""
    case = random_case(seed)
    steps = len(Simulation(case, checked=False).run().started)
    if not steps:
        return
    rnd = Random(seed)
    nth = rnd.randint(1, steps)
    dies = rnd.random() < 0.5
    program = replace(case.program, loses=nth) if dies else replace(case.program, fails=nth)
    failed = Simulation(replace(case, program=program)).run()
    if failed.error is None:  # a limit was reached while the step ran: it counts for nothing
        assert failed.finished
        assert any(stage.limit is not None for stage in case.plan.stages)
        return
    assert isinstance(failed.error, WorkerDied if dies else UserCodeError)


def _named(run: str, seed: int) -> str:
    module = "from tests.simulation.test_random import *"
    return f"seed {seed}; alone: PYTHONPATH=src:. python -c '{module}; {run}({seed})'"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_runs(chunk: int) -> None:
    for seed in range(chunk * SEEDS, (chunk + 1) * SEEDS):
        try:
            run_seed(seed)
        except Exception as error:
            raise AssertionError(_named("run_seed", seed)) from error


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_faults(chunk: int) -> None:
    for seed in range(chunk * SEEDS, chunk * SEEDS + FAULTS):
        try:
            run_fault(seed)
        except Exception as error:
            raise AssertionError(_named("run_fault", seed)) from error
