"""Workers that are forked from a server: how they start and end, and what goes on without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import StepDone
from headrace.substrates.processes.forks import ForkServer
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.processes.spawn import start_process
from headrace.testing.check_substrate import Act, ScriptedBody, Session, advance, running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")

SPEC = WorkerSpec(0, "cpu", "cpu")


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer.begin(1)
    assert server is not None
    yield server
    server.close()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules other processes find."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return name


def parents(s: Session) -> set[int]:
    return {psutil.Process(pid).ppid() for pid in s.substrate.pids.values()}


class Drawn(ScriptedBody):
    """MAKE: the next random numbers."""

    def run(self, step):
        if step.stage != Act.MAKE:
            return super().run(step)
        import random

        import numpy as np

        batch = pa.record_batch({"numpy": [np.random.random()], "random": [random.random()]})
        return StepDone(step.id, step.worker, (BlockRef(1, (self._store.put(batch),)),))


def test_cpu_workers_are_forked_and_a_single_one_is_not() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 3) as s:
        assert os.getpid() not in parents(s)
        assert len(parents(s)) == 1
        s.substrate.add_worker(WorkerSpec(3, "cpu", "cpu"))
        assert len(parents(s)) == 1
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 1) as s:
        assert parents(s) == {os.getpid()}


def test_a_device_worker_has_an_interpreter_with_an_environment_of_its_own() -> None:
    substrate = ProcessesSubstrate(body_factory=ScriptedBody)
    substrate.start(None, [WorkerSpec(0, "cpu", "cpu"), WorkerSpec(1, "cpu", "cpu"), WorkerSpec(2, "cuda", "cuda:0")])
    try:
        assert psutil.Process(substrate.pids[2]).ppid() == os.getpid()
        assert psutil.Process(substrate.pids[0]).ppid() != os.getpid()
    finally:
        substrate.stop()


@pytest.mark.parametrize("code", [0, 3, -signal.SIGTERM, -signal.SIGSEGV])
def test_how_a_process_ended_is_known(programs: Path, code: int) -> None:
    ends = f"os._exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    name = module(
        programs,
        "ends",
        f"""
        import os, signal
        def main(control, lifeline):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            {ends}
        """,
    )
    server = ForkServer.begin(1)
    assert server is not None
    process, ours, lifeline = start_process(name, SPEC, 1, server=server)
    try:
        assert not isinstance(process, subprocess.Popen)
        assert process.wait() == process.wait() == process.poll() == process.returncode == code
        process.kill()  # no effect, and no error
    finally:
        ours.close()
        os.close(lifeline)
        server.close()


def test_another_environment_is_not_served(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.serves(server._environment)
    assert not server.serves({**server._environment, "OMP_NUM_THREADS": "7"})


def test_a_server_with_threads_of_others_gives_up_and_workers_start_without_it(programs: Path) -> None:
    name = module(
        programs,
        "threaded",
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        """,
    )
    server = ForkServer.begin(1, [name])
    assert server is not None
    assert not server.serves(server._environment)
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody, server=server), 2) as s:
        assert parents(s) == {os.getpid()}
        s.run(advance(1, 0, Act.MAKE, nbytes=8))


def test_a_module_that_can_not_be_imported_is_left_to_who_needs_it(programs: Path) -> None:
    server = ForkServer.begin(1, [module(programs, "broken", "raise ValueError"), "no.such.module"])
    assert server is not None
    assert server.serves(server._environment)
    server.close()


def test_workers_outlive_the_server_and_are_replaced_without_it() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2) as s:
        (parent,) = parents(s)
        os.kill(parent, signal.SIGKILL)
        s.run(advance(1, 0, Act.MAKE, nbytes=8))
        s.submit(advance(2, 1, Act.DIE))
        s.until(lambda: 1 in s.lost)
        s.substrate.add_worker(WorkerSpec(2, "cpu", "cpu"))
        s.run(advance(3, 2, Act.MAKE, nbytes=8))
        assert psutil.Process(s.substrate.pids[2]).ppid() == os.getpid()


def test_forked_workers_draw_numbers_of_their_own() -> None:
    server = ForkServer.begin(1, ["numpy.random"])
    with running(lambda: ProcessesSubstrate(body_factory=Drawn, cores=2, server=server), 2) as s:
        assert os.getpid() not in parents(s)
        drawn = [s.substrate.fetch(s.run(advance(1 + w, w, Act.MAKE))).to_pylist()[0] for w in (0, 1)]
    assert drawn[0]["numpy"] != drawn[1]["numpy"]
    assert drawn[0]["random"] != drawn[1]["random"]


def test_a_killed_driver_leaves_neither_server_nor_workers(tmp_path: Path) -> None:
    program = """
        import os, signal, psutil
        from headrace.testing.check_substrate import ScriptedBody, running
        from headrace.substrates.processes.pool import ProcessesSubstrate

        with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2):
            print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
