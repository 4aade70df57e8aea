"""The driver's side of the Ray substrate by what comes in, without a cluster: ends of calls that are hard to bring about."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, OwnerDiedError, RayTaskError, WorkerCrashedError

from headrace.core.errors import BlockLost, InternalError, TransientError
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Advance, StepDone, StepFailed, WorkerLost, WorkerResting
from headrace.substrates.ray.actor import Vitals
from headrace.substrates.ray.cluster import PATIENCE_S, Errands, Watch
from headrace.substrates.ray.placement import Node
from headrace.substrates.ray.pool import RaySubstrate, _Site, _Worker

OBJECT = "00" * 28


class Desk:
    """A substrate with workers that are up, on one node: {id: pool}."""

    def __init__(self, pools: dict[int, str], node: str = "") -> None:
        self.substrate = RaySubstrate()
        for id, pool in pools.items():
            handle: Any = SimpleNamespace()
            self.substrate._workers[id] = _Worker(WorkerSpec(id, pool, "cpu", node), handle, False, node, up=True)
        if node:
            self.substrate._sites[node] = _Site(Node(node, "id", {}), set(pools))

    def given(self, worker: int, *ids: int) -> list[Advance]:
        steps = [Advance(id, worker, stage=0, cursor=id, split_index=0, attempt=1) for id in ids]
        self.substrate._workers[worker].steps = {s.id: s for s in steps}
        return steps

    def answered(self, worker: int, steps: list[Advance], answer: Any) -> list[Any]:
        done: Future[Any] = Future()
        if isinstance(answer, BaseException):
            done.set_exception(answer)
        else:
            done.set_result(answer)
        self.substrate._inbox.put(("run", worker, steps, done))
        return self.substrate.wait(0.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActorDiedError(), "its process ended"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "its node ran out of memory"),
        (WorkerCrashedError(), "worker died unexpectedly"),
    ],
)
def test_whatever_ends_an_actor_is_a_lost_worker(error: BaseException, reason: str) -> None:
    desk = Desk({3: "cpu"})
    (lost,) = desk.answered(3, desk.given(3, 1, 2), error)
    assert isinstance(lost, WorkerLost)
    assert lost.worker == 3
    assert reason in lost.reason


@pytest.mark.parametrize("how", ["in the call", "in the worker"])
def test_an_input_that_is_lost_fails_the_steps_only(how: str) -> None:
    desk = Desk({3: "cpu"})
    lost: Any = (OwnerDiedError if how == "in the call" else ObjectLostError)(OBJECT, None, "")
    error = lost if how == "in the call" else RayTaskError("run", "frames", lost)
    events = desk.answered(3, desk.given(3, 1, 2), error)
    assert [(type(e), e.step, type(e.error)) for e in events] == [(StepFailed, 1, BlockLost), (StepFailed, 2, BlockLost)]
    assert 3 in desk.substrate._workers


def test_a_fault_of_ours_is_told_as_such() -> None:
    desk = Desk({3: "cpu"})
    (failed,) = desk.answered(3, desk.given(3, 1), RayTaskError("run", "frames", KeyError("oops")))
    assert isinstance(failed, StepFailed)
    assert isinstance(failed.error, InternalError)


def test_where_memory_is_short_one_worker_of_each_pool_goes_on() -> None:
    """The one that tells may belong to a pool which has nothing to do until the others have made something."""
    desk = Desk({0: "cpu", 1: "cpu", 2: "cpu", 3: "cuda", 4: "cuda"}, node="a")

    def told(tight: bool) -> dict[int, bool]:
        (step,) = desk.given(4, 1)
        events = desk.answered(4, [step], ((StepDone(1, 4),), Vitals(1, tight)))
        return {e.worker: e.resting for e in events if isinstance(e, WorkerResting)}

    assert told(True) == {0: False, 1: True, 2: True, 3: True, 4: False}
    assert told(True) == {}
    assert told(False) == dict.fromkeys(range(5), False)


def test_a_silent_head_ends_the_run_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's calls to a dead head take a minute, and then end the whole process."""
    desk = Desk({3: "cpu"})  # whose handle has no method that could be called
    watch = Watch((), lambda changed: None)
    desk.substrate._watch = watch
    assert desk.substrate.wait(0.0) == []
    monkeypatch.setattr(watch, "_since_s", time.monotonic() - PATIENCE_S)
    with pytest.raises(TransientError, match="not answered"):
        desk.substrate.wait(0.0)
    desk.substrate.stop()


def test_errands_do_not_hold_up_those_who_send_them() -> None:
    errands, gate, done = Errands(), threading.Event(), threading.Event()

    def fails() -> None:
        raise ValueError("lost")

    for errand in (gate.wait, fails, done.set):
        errands.add(errand)
    assert not done.is_set()
    gate.set()
    errands.close(5.0)
    assert done.is_set()
