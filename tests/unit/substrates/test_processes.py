"""Worker processes: what reaches them, what ends them, and where memory goes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import InternalError, PlanError
from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import PartsFreed, StepDone, StepFailed
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, advance, running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")

MB = 1 << 20


class Reporter(ScriptedBody):
    """Answers with what the worker process looks like from inside."""

    def __init__(self, program, spec, store):
        super().__init__(program, spec, store)
        self._spec = spec

    def run(self, step):
        if step.stage != Act.MAKE:
            return super().run(step)
        env = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HEADRACE_TEST_MARK")}
        facts = {
            "cwd": os.getcwd(),
            "path": sys.path,
            "main": sys.modules["__main__"].__spec__.name,
            "device": self._spec.device,
            "sigint": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
            "blocked": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "stdin": os.readlink("/proc/self/fd/0"),
            **env,
        }
        batch = pa.record_batch({k: [v] for k, v in facts.items()})
        return StepDone(step.id, step.worker, (BlockRef(1, (self._store.put(batch),)),))


def facts(device: str = "cpu", **options) -> dict:
    substrate = ProcessesSubstrate(body_factory=Reporter, **options)
    try:
        substrate.start(None, [WorkerSpec(0, device.partition(":")[0], device)])
        substrate.submit(advance(1, 0, Act.MAKE))
        answers: list[StepDone] = []
        while not answers:
            answers = [e for e in substrate.wait(60.0) if isinstance(e, StepDone)]
        return substrate.fetch(answers[0].outputs[0]).to_pylist()[0]
    finally:
        substrate.stop()


def test_a_worker_has_the_drivers_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_TEST_MARK", "yes")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = facts(cores=3)
    assert seen["cwd"] == str(tmp_path)
    assert seen["path"] == sys.path
    assert seen["main"] == "headrace.substrates.processes.main", "the user's __main__ is never imported"
    assert seen["HEADRACE_TEST_MARK"] == "yes"
    assert seen["stdin"] == "/dev/null"
    assert seen["sigint"]
    assert not seen["blocked"]


def test_threads_and_devices_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu = facts(cores=3)
    assert (cpu["OMP_NUM_THREADS"], cpu["CUDA_VISIBLE_DEVICES"], cpu["device"]) == ("3", "", "cpu")
    cuda = facts("cuda:1")
    assert (cuda["CUDA_VISIBLE_DEVICES"], cuda["device"]) == ("1", "cuda:0")


def test_what_cannot_be_pickled_is_refused_before_any_work() -> None:
    substrate = ProcessesSubstrate(body_factory=ScriptedBody)
    try:
        with pytest.raises(PlanError, match=r"can't be sent .* cannot pickle '_thread.lock'"):
            substrate.start(threading.Lock(), [WorkerSpec(0, "cpu", "cpu")])
    finally:
        substrate.stop()


def test_other_systems_are_told_to_use_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(PlanError, match="needs Linux"):
        ProcessesSubstrate()


def test_steady_traffic_reuses_the_same_memory() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2) as s:
        for i in range(60):
            block = s.run(advance(2 * i, 0, Act.MAKE, nbytes=4 * MB))
            s.run(advance(2 * i + 1, 1, Act.SUM, inputs=[block]))
            s.substrate.release(block.parts)
        assert s.substrate._ledger.arena_bytes(0) <= 9 * MB
        s.until(lambda: len(s.freed) == 60)


def test_kept_views_do_not_stall_the_flow() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2) as s:
        kept: set[int] = set()
        for i in range(12):
            block = s.run(advance(2 * i, 0, Act.MAKE, nbytes=MB))
            s.run(advance(2 * i + 1, 1, Act.KEEP if i % 2 else Act.SUM, inputs=[block]))
            s.substrate.release(block.parts)
            kept |= {p.id for p in block.parts} if i % 2 else set()
        assert not kept & s.freed
        s.run(advance(99, 1, Act.DROP))
        s.until(lambda: kept <= s.freed)


def test_a_step_with_freed_memory_is_refused() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=8))
        s.substrate.release(block.parts)
        s.until(lambda: bool(s.freed))
        with pytest.raises(InternalError, match="free already"):
            s.submit(advance(2, 0, Act.SUM, inputs=[block]))


def test_a_dead_workers_memory_goes_back_as_its_parts_do() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2) as s:
        blocks = [s.run(advance(i, 0, Act.MAKE, nbytes=4 * MB, n=i)) for i in range(3)]
        s.substrate.release(blocks[0].parts)
        s.until(lambda: len(s.freed) == 1)
        s.submit(advance(9, 0, Act.DIE))
        s.until(lambda: 0 in s.lost)
        ledger = s.substrate._ledger
        assert 8 * MB <= ledger.arena_bytes(0) < 9 * MB
        assert s.substrate.fetch(blocks[2]).column("x")[0].as_py() == 2
        s.substrate.release([*blocks[1].parts, *blocks[2].parts])
        s.until(lambda: len(s.freed) == 3)
        assert 0 not in ledger._arenas, "an empty arena of a dead worker is closed"


def test_memory_bytes_counts_block_memory() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        before = s.substrate.memory_bytes()
        s.run(advance(1, 0, Act.MAKE, nbytes=64 * MB))
        assert s.substrate.memory_bytes() - before >= 64 * MB


def test_an_answer_that_cannot_be_pickled_is_a_failure() -> None:
    class Odd(ScriptedBody):
        def run(self, step):
            return StepDone(step.id, step.worker, metrics={"f": lambda: 0})

    with running(lambda: ProcessesSubstrate(body_factory=Odd), 1) as s:
        s.submit(advance(1, 0, Act.SUM))
        s.until(lambda: bool(s.answers))
        assert isinstance(s.answers[0], StepFailed)
        assert "can't be sent" in str(s.answers[0].error)


def test_more_steps_than_a_socket_holds() -> None:
    """submit never blocks, whatever the worker does meanwhile."""
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        for i in range(5000):
            s.submit(advance(i, 0, Act.FAIL))
        s.until(lambda: len(s.answers) == 5000)
        assert [a.step for a in s.answers] == list(range(5000))


def test_ctrl_c_interrupts_wait() -> None:
    class Interrupter(ScriptedBody):
        def run(self, step):
            os.kill(step.split_index, signal.SIGINT)
            return super().run(step)

    with running(lambda: ProcessesSubstrate(body_factory=Interrupter), 1) as s:

        def submit_and_wait() -> None:
            s.submit(advance(1, 0, Act.HANG, n=os.getpid()))
            s.substrate.wait(60.0)

        with pytest.raises(KeyboardInterrupt):
            submit_and_wait()


def test_functions_of_main_travel_by_value(tmp_path: Path) -> None:
    """A script's own classes work in workers, prints of workers appear, and the script runs once."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            print("script runs", flush=True)
            from headrace.testing.check_substrate import Act, ScriptedBody, advance, running
            from headrace.substrates.processes.pool import ProcessesSubstrate

            class Mine(ScriptedBody):
                def run(self, step):
                    print("worker prints", flush=True)
                    return super().run(step)

            with running(lambda: ProcessesSubstrate(body_factory=Mine), 1) as s:
                s.run(advance(1, 0, Act.MAKE, nbytes=8))
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("script runs\nworker prints\n", "", 0)


class GilHog(ScriptedBody):
    """Never returns, and never lets go of the GIL."""

    def run(self, step):
        print(os.getpid(), flush=True)
        ctypes.PyDLL(None).sleep(10_000)
        return super().run(step)


class Sleeper(ScriptedBody):
    def run(self, step):
        print(os.getpid(), flush=True)
        return super().run(step)


@pytest.mark.parametrize(("body", "stopped"), [("GilHog", False), ("Sleeper", False), ("Sleeper", True)])
def test_no_worker_survives_its_driver(body: str, stopped: bool) -> None:
    """The driver is killed while a worker is stuck in user code, or stopped; the worker's end closes its standard output."""
    code = f"""
from headrace.core.resources import WorkerSpec
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.testing.check_substrate import Act, advance
from tests.unit.substrates.test_processes import {body}
s = ProcessesSubstrate(body_factory={body})
s.start(None, [WorkerSpec(0, "cpu", "cpu")])
s.submit(advance(1, 0, Act.HANG))
while True:
    s.wait(None)
"""
    root = Path(__file__).parents[3]
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    with driver:
        worker = int(driver.stdout.readline())
        if stopped:
            os.kill(worker, signal.SIGSTOP)
        driver.kill()
        assert driver.stdout.read() == ""
    assert not Path(f"/proc/{worker}/fd/1").exists()


def test_views_that_die_while_the_worker_is_idle_are_told() -> None:
    """A background thread of user code drops the last view; nothing else happens in the run."""

    class Background(ScriptedBody):
        def run(self, step):
            if step.stage != Act.KEEP:
                return super().run(step)
            kept = [self._store.get(p).column(0).to_numpy() for b in step.inputs for p in b.parts]
            go = self._go = threading.Event()
            threading.Thread(target=lambda: (go.wait(), kept.clear()), daemon=True).start()
            threading.Timer(0.05, go.set).start()
            return StepDone(step.id, step.worker)

    with running(lambda: ProcessesSubstrate(body_factory=Background), 2) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=800))
        s.submit(advance(2, 1, Act.KEEP, inputs=[block]))
        s.substrate.release(block.parts)
        s.until(lambda: block.parts[0].id in s.freed)
        assert any(a.step == 2 for a in s.answers)


def test_values_are_right_while_many_blocks_share_arenas() -> None:
    """Random traffic between four workers: every sum is that of the block that was sent, and all memory comes back."""
    rng = np.random.default_rng(3)
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 4) as s:
        expected: dict[int, int] = {}
        inputs: dict[int, BlockRef] = {}
        for i in range(0, 300, 2):
            rows = int(rng.integers(1, 20_000))
            block = s.run(advance(i, int(rng.integers(4)), Act.MAKE, nbytes=8 * rows, n=i))
            expected[i + 1] = int((np.arange(rows) + i).sum())
            inputs[i + 1] = block
            s.submit(advance(i + 1, int(rng.integers(4)), Act.SUM, inputs=[block]))
            s.substrate.release(block.parts)
        s.until(lambda: len(s.answers) == 300)
        sums = [a for a in s.answers if a.step % 2]
        for answer in sums:
            assert s.substrate.fetch(answer.outputs[0]).column("x")[0].as_py() == expected[answer.step]
            s.substrate.release(answer.outputs[0].parts)
        s.until(lambda: len(s.freed) == 300)
        assert not s.substrate._ledger._parts


def test_release_is_told_in_one_event() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        blocks = [s.run(advance(i, 0, Act.MAKE, nbytes=8)) for i in range(3)]
        s.substrate.release([p for b in blocks for p in b.parts])
        s.substrate.release(blocks[0].parts)
        assert s.substrate.wait(60.0) == [PartsFreed(tuple(b.parts[0].id for b in blocks))]
