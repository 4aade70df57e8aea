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
from headrace.substrates.processes import forks
from headrace.substrates.processes.forks import Forked, ForkServer
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.processes.spawn import start_process, worker_environment
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
    monkeypatch.syspath_prepend(str(tmp_path))
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


class Surroundings(ScriptedBody):
    """MAKE: two environment variables."""

    def run(self, step):
        if step.stage != Act.MAKE:
            return super().run(step)
        batch = pa.record_batch(
            {"mark": [os.environ.get("HEADRACE_TEST_MARK")], "gone": [os.environ.get("HEADRACE_TEST_GONE")]}
        )
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
        assert isinstance(process, Forked)
        assert process.wait() == process.wait() == process.poll() == process.returncode == code
        process.kill()  # no effect, and no error
        os.close(process.pidfd)
    finally:
        ours.close()
        os.close(lifeline)
        server.close()


def environment(**changed: str) -> dict[str, str]:
    return {**worker_environment(os.environ, SPEC, 1), **changed}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "LD_PRELOAD", "PYTHONHASHSEED"])
def test_what_is_read_at_load_must_be_the_servers(server: ForkServer, name: str) -> None:
    assert server.serves(environment())
    assert not server.serves(environment(**{name: "7"}))
    assert server.serves(environment())


def test_nor_does_it_serve_another_path(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("/elsewhere")
    assert not server.serves(environment())


def test_there_is_no_server_where_numpy_starts_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ForkServer.begin(2) is None
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert ForkServer.begin(1) is None


def test_an_environment_that_the_tried_functions_changed_reaches_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TEST_GONE", "yes")
    server = ForkServer.begin(1)
    assert server is not None
    monkeypatch.delenv("HEADRACE_TEST_GONE")
    monkeypatch.setenv("HEADRACE_TEST_MARK", "yes")
    with running(lambda: ProcessesSubstrate(body_factory=Surroundings, cores=2, server=server), 2) as s:
        assert os.getpid() not in parents(s)
        (seen,) = s.substrate.fetch(s.run(advance(1, 0, Act.MAKE))).to_pylist()
    assert seen == {"mark": "yes", "gone": None}


def test_the_drivers_path_is_there_before_anything_is_imported(programs: Path) -> None:
    """Or workers would have other versions of libraries than the driver."""
    name = module(programs, "marks", "open(__file__ + '.seen', 'w').close()")
    server = ForkServer.begin(1, [name])
    assert server is not None
    assert server.serves(environment())
    server.close()
    assert (programs / "marks.py.seen").exists()


def test_a_server_that_dies_in_a_fork_leaves_one_worker(programs: Path) -> None:
    """The one that it forked, if it did, has nobody to talk to."""
    name = module(
        programs,
        "dies",
        """
        import os, signal
        def before():
            os.kill(os.getpid(), signal.SIGKILL)
        os.register_at_fork(after_in_parent=before)
        """,
    )
    server = ForkServer.begin(1, [name])
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody, cores=2, server=server), 2) as s:
        assert parents(s) == {os.getpid()}
        for k in range(6):
            s.run(advance(1 + k, k % 2, Act.MAKE, nbytes=8))


def test_an_interrupted_question_ends_the_server(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer would be taken for that to the next one."""
    assert server.serves(environment())

    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(forks.wire, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start_process("headrace.substrates.processes.main", SPEC, 1, server=server)
    assert not server.serves(environment())
    process, ours, lifeline = start_process("headrace.substrates.processes.main", SPEC, 1, server=server)
    assert isinstance(process, subprocess.Popen)
    ours.close()
    os.close(lifeline)
    process.wait()


def test_children_can_be_waited_for_where_their_end_was_to_be_ignored(programs: Path) -> None:
    """SIGCHLD is ignored in some programs, and then in all that they start."""
    name = module(programs, "leaves", "def main(*fds): raise SystemExit(3)")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        server = ForkServer.begin(1)
        assert server is not None
        process, ours, lifeline = start_process(name, SPEC, 1, server=server)
        assert isinstance(process, Forked)
        assert process.wait() == 1
        os.close(process.pidfd)
        ours.close()
        os.close(lifeline)
        server.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_end_of_a_process_whose_server_died_is_unknown() -> None:
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody), 2) as s:
        (parent,) = parents(s)
        os.kill(parent, signal.SIGKILL)
        s.submit(advance(1, 1, Act.DIE))
        s.until(lambda: 1 in s.lost)
        assert "nobody can tell how" in s.lost[1].reason


def test_a_server_that_is_closed_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for k in range(6):
        server = ForkServer.begin(1)
        assert server is not None
        if k % 2:
            assert server.serves(environment())
        server.close()
        server.close()
    assert capfd.readouterr() == ("", "")


def test_few_workers_need_no_server_after_all() -> None:
    server = ForkServer.begin(1)
    substrate = ProcessesSubstrate(body_factory=ScriptedBody, server=server)
    substrate.start(None, [WorkerSpec(0, "cuda", "cuda:0")])
    try:
        assert psutil.Process(substrate.pids[0]).ppid() == os.getpid()
        assert server is not None
        assert not server.serves(environment()), "it is closed"
    finally:
        substrate.stop()


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
    assert not server.serves(environment())
    with running(lambda: ProcessesSubstrate(body_factory=ScriptedBody, server=server), 2) as s:
        assert parents(s) == {os.getpid()}
        s.run(advance(1, 0, Act.MAKE, nbytes=8))


def test_a_module_that_can_not_be_imported_is_left_to_who_needs_it(programs: Path) -> None:
    server = ForkServer.begin(1, [module(programs, "broken", "raise ValueError"), "no.such.module"])
    assert server is not None
    assert server.serves(environment())
    server.close()


@pytest.mark.parametrize(("first", "there"), [("pyarrow.dataset", False), ("headrace.core.arrow_dataset", True)])
def test_pandas_is_there_for_plans_with_expressions_and_not_because_a_program_has_it(first: str, there: bool) -> None:
    code = f"""
        import sys
        import {first}
        import pandas
        from headrace.substrates.processes.forks import imported
        modules = imported()
        arrow = [name for name in modules if name.startswith("pyarrow.")]
        print(bool(arrow), "headrace.core.arrow_dataset" in modules, any("dataset" in name for name in arrow))
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", str(there), "False"]


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
