"""The pause in which answers gather: taken while every worker has enough to do, and only then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from headrace.core.steps import StepDone
from headrace.substrates.bodies import GATHER_S, STEPS_AHEAD, let_answers_gather
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.threads import ThreadsSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, advance, running

Sleeps = list[float]


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    """What was slept, without sleeping."""
    slept: Sleeps = []
    monkeypatch.setattr("headrace.substrates.bodies.time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.mark.parametrize(
    ("steps", "timeout_s", "pauses"),
    [
        ([STEPS_AHEAD, STEPS_AHEAD + 1], None, True),
        ([STEPS_AHEAD], 1.0, True),
        ([STEPS_AHEAD, STEPS_AHEAD - 1], None, False),  # one of them may run dry
        ([STEPS_AHEAD, 0], None, False),
        ([STEPS_AHEAD], GATHER_S / 2, False),  # the caller does not want to wait so long
        ([STEPS_AHEAD], 0.0, False),
        ([], None, False),
    ],
)
def test_when_answers_gather(steps: list[int], timeout_s: float | None, pauses: bool, sleeps: Sleeps) -> None:
    let_answers_gather(steps, timeout_s)
    assert sleeps == ([GATHER_S] if pauses else [])


PROCESSES = pytest.param(ProcessesSubstrate, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"))


@pytest.mark.parametrize("substrate", [ThreadsSubstrate, PROCESSES])
def test_steps_whose_answers_were_taken_up_count_no_more(substrate: Callable[..., ThreadsSubstrate], sleeps: Sleeps) -> None:
    with running(lambda: substrate(body_factory=ScriptedBody), 1) as s:
        for round in range(2):
            for i in range(STEPS_AHEAD):
                s.substrate.submit(advance(STEPS_AHEAD * round + i, 0, Act.MAKE, nbytes=8))
            left, slept = STEPS_AHEAD, len(sleeps)
            while left:
                assert len(sleeps) == slept
                slept += left == STEPS_AHEAD
                left -= sum(isinstance(event, StepDone) for event in s.substrate.wait(60.0))
            assert len(sleeps) == slept
            assert s.substrate.wait(0.0) == []
        assert len(sleeps) >= 2
