"""What is special about inline: the caller's own thread."""

from __future__ import annotations

import threading

import pytest

from headrace.core.resources import WorkerSpec
from headrace.core.steps import StepDone
from headrace.substrates.inline import InlineSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, advance


class Recorder(ScriptedBody):
    def run(self, step):
        if step.stage == Act.HANG:
            raise KeyboardInterrupt
        self.thread = threading.current_thread()
        return super().run(step)


@pytest.fixture
def substrate():
    bodies: list[Recorder] = []
    s = InlineSubstrate(body_factory=lambda *args: bodies.append(Recorder(*args)) or bodies[-1])
    s.start(None, [WorkerSpec(0, "cpu", "cpu")])
    s.wait(0)
    s.bodies = bodies
    yield s
    s.stop()


def test_one_step_per_wait_in_this_thread(substrate) -> None:
    substrate.submit(advance(1, 0, Act.MAKE, nbytes=8))
    substrate.submit(advance(2, 0, Act.MAKE, nbytes=8))
    assert [e.step for e in substrate.wait(0) if isinstance(e, StepDone)] == [1]
    assert substrate.bodies[0].thread is threading.current_thread()
    assert [e.step for e in substrate.wait(0) if isinstance(e, StepDone)] == [2]
    assert substrate.wait(0) == []


def test_ctrl_c_in_user_code_belongs_to_the_caller(substrate) -> None:
    substrate.submit(advance(1, 0, Act.HANG))
    with pytest.raises(KeyboardInterrupt):
        substrate.wait(None)
