"""What is special about threads: one address space, native thread pools, and that they can't be killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from headrace.core.errors import WorkerDied
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Doing, Step, StepDone, StepFailed
from headrace.substrates.threads import NativeLimits, ThreadsSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, advance, running
from headrace.worker.watch import Halt


def test_blocks_are_handed_on_as_they_are() -> None:
    with running(lambda: ThreadsSubstrate(body_factory=ScriptedBody), 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=80))
        part = block.parts[0]
        assert part.handle.column("x").to_pylist() == list(range(10))
        fetched = s.substrate.fetch(block)
        assert fetched.column("x").buffers()[1].address != part.handle.column("x").buffers()[1].address


def test_bodies_are_made_one_at_a_time() -> None:
    inside = threading.Semaphore(1)

    def make(*args):
        assert inside.acquire(blocking=False), "two bodies under construction at once"
        body = ScriptedBody(*args)
        inside.release()
        return body

    with running(lambda: ThreadsSubstrate(body_factory=make), 8) as s:
        assert s.up == set(range(8))


def test_no_user_code_begins_once_the_substrate_stops() -> None:
    begun = threading.Event()
    refused: list[WorkerDied] = []

    class Body(ScriptedBody):
        def run(self, step: Step) -> StepDone | StepFailed:
            crumb = self._store.crumb
            assert isinstance(crumb, Halt)
            crumb.write(Doing(0, "first"))
            begun.set()
            while not crumb.over:
                time.sleep(0.001)
            try:
                crumb.write(Doing(0, "second"))
            except WorkerDied as error:
                refused.append(error)
            return StepDone(step.id, step.worker)

    substrate = ThreadsSubstrate(body_factory=Body)
    with running(lambda: substrate, 1) as s:
        substrate.submit(advance(1, 0, Act.MAKE, nbytes=80))
        assert begun.wait(60)
        s.substrate.stop()
    assert "stopped before second" in str(refused[0])


@pytest.mark.parametrize("error", [SystemExit(4), ValueError("no")])
def test_a_body_that_cannot_be_made_is_a_lost_worker(error: BaseException) -> None:
    def make(*_):
        raise error

    with running(lambda: ThreadsSubstrate(body_factory=make), 1, program="broken") as s:
        s.until(lambda: 0 in s.lost)
        assert type(error).__name__ in s.lost[0].reason
        assert not s.lost[0].started


def test_ctrl_c_interrupts_wait() -> None:
    """In a process of its own: a test runner has a use for this signal, too."""
    code = "from tests.unit.substrates.test_threads import interrupt_a_wait; interrupt_a_wait()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert ended.stdout == "interrupted\n", ended.stderr


def interrupt_once(number: int, frame: object) -> None:
    if not Interrupter.interrupted:
        Interrupter.interrupted = True
        raise KeyboardInterrupt


def interrupt_a_wait() -> None:
    signal.signal(signal.SIGINT, interrupt_once)
    substrate = ThreadsSubstrate(body_factory=Interrupter)
    substrate.start(None, [WorkerSpec(0, "cpu", "cpu")])
    try:
        assert len(substrate.wait(60.0)) == 1, "the worker comes up"
        _submit_and_wait(substrate)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        Interrupter.go_on.set()
        substrate.stop()


def _submit_and_wait(substrate: ThreadsSubstrate) -> None:
    substrate.submit(advance(1, 0, Act.MAKE, nbytes=8))  # it interrupts us, then blocks until the test lets it go
    substrate.wait(60.0)


class Interrupter(ScriptedBody):
    interrupted = False
    go_on = threading.Event()

    def run(self, step):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while not self.go_on.wait(1.0):  # one that comes just before Python begins to wait is seen when it has waited
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return super().run(step)


class FakeTorch:
    def __init__(self) -> None:
        self.threads = 16

    def get_num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, n: int) -> None:
        self.threads = n


def test_native_pools_are_limited_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, log = FakeTorch(), []
    cv2 = SimpleNamespace(getNumThreads=lambda: 12, setNumThreads=log.append)
    limit = SimpleNamespace(restore_original_limits=lambda: log.append("restored"))
    controller = SimpleNamespace(limit=lambda limits: log.append(("all", limits)) or limit)
    per_thread = SimpleNamespace(limit=lambda limits: log.append(("openmp", limits)))
    controller.select = lambda user_api: per_thread
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    monkeypatch.setitem(sys.modules, "threadpoolctl", SimpleNamespace(ThreadpoolController=lambda: controller))
    with running(lambda: ThreadsSubstrate(body_factory=ScriptedBody, cores=6), 2):
        assert torch.threads == 3
        assert log == [3, ("all", 3), ("openmp", 3), ("openmp", 3)]
    assert torch.threads == 16
    assert log[4:] == ["restored", 12]


def test_libraries_that_are_not_loaded_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "cv2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    limits = NativeLimits(1)
    limits.apply()
    limits.apply_to_thread()
    limits.restore()
    assert not {"torch", "cv2"} & set(sys.modules)


def test_blas_has_a_thread_a_worker_though_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy brings its BLAS along: products of matrices in several workers at once must not fight over cores."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    pools = threadpoolctl.ThreadpoolController().select(user_api="blas")
    if not pools.info():
        pytest.skip("this NumPy has a BLAS without threads of its own")
    monkeypatch.delitem(sys.modules, "threadpoolctl")
    with pools.limit(limits=2):
        limits = NativeLimits(1)
        limits.apply()
        assert {pool["num_threads"] for pool in pools.info()} == {1}
        limits.restore()
        assert {pool["num_threads"] for pool in pools.info()} == {2}
