"""Workers that are killed, that crash, and that get signals meant for their driver."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import StepDone
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes import pool
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.processes.stacks import user_stack
from headrace.substrates.threads import ThreadsSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, Session, advance, running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")


class Stuck(ScriptedBody):
    """HANG: waits in a way of its own, after it has opened the FIFO."""

    def run(self, step):
        if step.stage == Act.HANG:
            open(self._program, "wb").close()
            self.wait_for_ever()
        return super().run(step)

    def wait_for_ever(self) -> None: ...


class HoldsTheLock(Stuck):
    def wait_for_ever(self) -> None:
        ctypes.PyDLL(None).sleep(10_000)


class Sleeps(Stuck):
    def wait_for_ever(self) -> None:
        time.sleep(10_000)


class Spins(Stuck):
    def wait_for_ever(self) -> None:
        while True:
            pass


def hang(s: Session, fifo: Path) -> None:
    """Worker 0 is in `wait_for_ever`, or about to enter it."""
    os.mkfifo(fifo)
    s.submit(advance(1, 0, Act.HANG))
    with fifo.open("rb") as at_work:
        at_work.read()


@pytest.mark.parametrize("body", [HoldsTheLock, Sleeps, Spins])
def test_the_stack_of_a_hung_worker(body: type[Stuck], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    with running(lambda: ProcessesSubstrate(body_factory=body), 1, program=str(fifo)) as s:
        hang(s, fifo)
        assert s.substrate.kill(0, "no answer")
        s.substrate.kill(0, "asked twice")  # True or, when it is gone by now, False
        s.until(lambda: 0 in s.lost)
        assert s.lost[0].reason == "no answer"
        assert s.lost[0].stack.endswith(" in run"), "the user's outermost frame is the last one"
        assert "wait_for_the_end" not in s.lost[0].stack, "threads of our own are none of the user's code"


def test_a_stopped_worker_can_be_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    with running(lambda: ProcessesSubstrate(body_factory=Sleeps), 1, program=str(fifo)) as s:
        hang(s, fifo)
        os.kill(s.substrate.pids[0], signal.SIGSTOP)
        assert s.substrate.kill(0, "no answer")
        s.until(lambda: 0 in s.lost)
        assert s.lost[0].reason == "no answer"
        assert "T (stopped)" in s.lost[0].stack


@pytest.mark.parametrize("kind", [InlineSubstrate, ThreadsSubstrate])
def test_threads_cannot_be_killed(kind: type) -> None:
    with running(lambda: kind(body_factory=ScriptedBody), 1) as s:
        assert s.substrate.kill(0, "no answer") is False
        s.run(advance(1, 0, Act.MAKE, nbytes=8))


def test_a_crash_is_shown_to_people_too(capfd: pytest.CaptureFixture[str]) -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        s.submit(advance(1, 0, Act.CRASH))
        s.until(lambda: 0 in s.lost)
        assert s.lost[0].stack.startswith("Fatal Python error: Segmentation fault")
        assert "in wait_for_the_end" in capfd.readouterr().err, "with all threads"


OURS, PYTHON, PACKAGE = pool.__file__, threading.__file__, pa.__file__
MINE = "/home/me/model.py"


def thread(name: str, *frames: tuple[str, str]) -> str:
    lines = [f'  File "{file}", line 7 in {function}' for file, function in frames]
    return "\n".join([f"{name} 0x00007f00 (most recent call first):", *lines])


def test_of_a_stack_the_users_part_is_shown() -> None:
    watchdog = thread("Thread", (OURS, "wait_for_the_end"), (PYTHON, "run"))
    helper = thread("Thread", (PYTHON, "wait"), (MINE, "helper"), (PYTHON, "run"))
    main = thread(
        "Current thread", (PACKAGE, "compute"), (OURS, "helps"), (MINE, "fn"), (OURS, "main"), ("<frozen runpy>", "r")
    )
    inner = thread("Current thread", (PACKAGE, "compute"), (OURS, "helps"), (MINE, "fn"))
    text = "\n\n".join(["Fatal Python error: Aborted", watchdog, helper, main])
    assert user_stack(text) == "\n\n".join(
        ["Fatal Python error: Aborted", thread("Thread", (PYTHON, "wait"), (MINE, "helper")), inner]
    )


def test_of_a_stack_without_the_users_code_the_current_thread_is_shown() -> None:
    watchdog = thread("Thread", (OURS, "wait_for_the_end"), (PYTHON, "run"))
    adapter = thread("Current thread", (PACKAGE, "compute"), (PACKAGE, "predict"), (OURS, "call"))
    assert user_stack(f"{watchdog}\n\n{adapter}") == thread("Current thread", (PACKAGE, "compute"), (PACKAGE, "predict"))
    ours = thread("Current thread", (OURS, "read"), (PYTHON, "run"))
    assert user_stack(f"{watchdog}\n\n{ours}") == ours
    assert user_stack("no stack could be taken") == "no stack could be taken"
    assert user_stack("") == ""


def test_a_death_by_the_kernels_memory_killer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its kills accounts for one worker; the counter is all that differs from any other SIGKILL."""
    kills = 5
    monkeypatch.setattr(pool, "oom_kills", lambda: kills)
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 3) as s:
        s.submit(advance(1, 0, Act.DIE))
        s.until(lambda: 0 in s.lost)
        kills = 6
        for worker in (1, 2):
            s.submit(advance(1 + worker, worker, Act.DIE))
            s.until(lambda worker=worker: worker in s.lost)
        assert ["out of memory" in s.lost[w].reason for w in range(3)] == [False, True, False]


def test_a_process_that_cannot_be_started_is_a_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        monkeypatch.setattr(pool, "start_process", refuse)
        s.substrate.add_worker(WorkerSpec(1, "cpu", "cpu"))
        s.until(lambda: 1 in s.lost)
        assert "could not be started" in s.lost[1].reason
        assert not s.lost[1].started
        s.submit(advance(1, 1, Act.MAKE))
        s.run(advance(2, 0, Act.MAKE, nbytes=8))


def test_a_replacement_has_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tells(ScriptedBody):
        def __init__(self, program, spec, store):
            super().__init__(program, spec, store)
            self._facts = pa.record_batch({"x": [f"{spec.device} {os.environ['CUDA_VISIBLE_DEVICES']}"]})

        def run(self, step):
            if step.stage != Act.MAKE:
                return super().run(step)
            return StepDone(step.id, step.worker, (BlockRef(1, (self._store.put(self._facts),)),))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with running(lambda: ProcessesSubstrate(body_factory=Tells), 0) as s:
        for worker in (0, 1):
            s.substrate.add_worker(WorkerSpec(worker, "cuda", "cuda:1"))
            s.until(lambda worker=worker: worker in s.up)
            block = s.run(advance(2 * worker, worker, Act.MAKE))
            assert s.substrate.fetch(block).column("x").to_pylist() == ["cuda:0 1"]
            s.submit(advance(2 * worker + 1, worker, Act.DIE))
            s.until(lambda worker=worker: worker in s.lost)


class GetsSignals(ScriptedBody):
    """MAKE: sends itself SIGTERM and SIGINT, and tells how programs and forks that it starts end on SIGTERM."""

    def run(self, step):
        if step.stage != Act.MAKE:
            return super().run(step)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        program = subprocess.Popen(["sleep", "1000"])
        program.terminate()
        fork = os.fork()
        if not fork:
            signal.pause()
            os._exit(0)
        os.kill(fork, signal.SIGTERM)
        ends = [program.wait(), os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])]
        return StepDone(step.id, step.worker, (BlockRef(2, (self._store.put(pa.record_batch({"x": ends})),)),))


def test_signals_to_the_whole_group_do_not_end_a_worker() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=GetsSignals), 1) as s:
        ends = s.run(advance(1, 0, Act.MAKE))
        assert s.substrate.fetch(ends).column("x").to_pylist() == [-signal.SIGTERM, -signal.SIGTERM]
        assert not s.lost


def test_a_signal_before_the_worker_listens_is_ignored_too() -> None:
    """SIGTERM comes at any moment of the worker's start."""
    substrate = ProcessesSubstrate(body_factory=ScriptedBody)
    s = Session(substrate)
    try:
        substrate.start(None, [WorkerSpec(0, "cpu", "cpu")])
        while 0 not in s.up:
            os.kill(substrate.pids[0], signal.SIGTERM)
            for event in substrate.wait(0.01):
                s._record(event)
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        assert not s.lost
    finally:
        substrate.stop()
