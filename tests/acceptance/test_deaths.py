"""Workers and drivers that die for real. Kills come from outside the process, or from code that no handler can stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import WorkerDied

from .conftest import read_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")
QUIET: dict[str, Any] = {"engine": "processes", "cpus": 2, "progress": "quiet"}


def crashes_once(marker: Path, row_id: int, how: str) -> Any:
    path = str(marker)

    def fn(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import os
        import signal

        if row_id in batch["id"] and not os.path.exists(path):
            with open(path, "w"):
                pass
            os.kill(os.getpid(), getattr(signal, how))
        return {**batch, "y": batch["x"] * 2}

    return fn


def poisoned(row_id: int) -> Any:
    def fn(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ctypes

        if row_id in batch["id"]:
            ctypes.string_at(0)
        return {**batch, "y": batch["x"] * 2}

    return fn


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_a_killed_worker_is_replaced(data: Path, tmp_path: Path, how: str) -> None:
    ds = hr.read_parquet(data).map_batches(crashes_once(tmp_path / "marker", 77, how), batch_size=10)
    run = ds.write_parquet(tmp_path / "out", **QUIET)
    back = read_back(tmp_path / "out")
    assert back["id"].to_pylist() == list(range(200))
    assert back["y"].to_pylist() == [float(i) for i in range(200)]
    assert run.workers_lost == 1
    assert run.retries >= 1
    assert run.tally.balanced


def test_a_poison_row_is_found_and_set_aside(data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).map_batches(poisoned(77), batch_size=50)
    run = ds.write_parquet(tmp_path / "out", on_error="quarantine", **QUIET)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [i for i in range(200) if i != 77]
    assert run.tally.quarantined == 1
    aside = pq.read_table(next((tmp_path / "out" / "_headrace").rglob("quarantine/*.parquet")))
    assert aside["id"].to_pylist() == [77]
    assert "WorkerDied" in aside["_exception"][0].as_py()


def test_a_poison_row_without_quarantine_fails_by_name(data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).map_batches(poisoned(77), batch_size=50)
    with pytest.raises(WorkerDied) as caught:
        ds.write_parquet(tmp_path / "out", **QUIET)
    text = str(caught.value)
    assert "37 of" in text
    assert "f1.parquet" in text
    assert "HEADRACE_REPRODUCE=" in text


def test_a_poison_row_in_a_model_of_its_own_stage(data: Path, tmp_path: Path) -> None:
    class Model:
        def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
            import ctypes

            if 77 in batch["id"]:
                ctypes.string_at(0)
            return batch["x"] * 2

    ds = hr.read_parquet(data).predict(Model, input=["id", "x"], output="y", device="sim")
    run = ds.write_parquet(tmp_path / "out", on_error="skip", **QUIET)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [i for i in range(200) if i != 77]
    assert run.tally.skipped == 1


def test_a_hang_is_ended_and_tried_again(data: Path, tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")

    def fn(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import os
        import time

        if 77 in batch["id"] and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            time.sleep(1000)
        return batch

    run = hr.read_parquet(data).map_batches(fn, batch_size=10).write_parquet(tmp_path / "out", timeout=2, **QUIET)
    assert read_back(tmp_path / "out")["id"].to_pylist() == list(range(200))
    assert run.workers_lost == 1


def test_a_hang_is_told_by_the_users_frames(data: Path, tmp_path: Path) -> None:
    def fn(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import time

        time.sleep(1000)
        return batch

    ds = hr.read_parquet(data / "f0.parquet").map_batches(fn, batch_size=1000)
    with pytest.raises(WorkerDied) as caught:
        ds.write_parquet(tmp_path / "out", timeout=1, **QUIET)
    assert __file__ in caught.value.frames
    assert os.path.dirname(hr.__file__) not in caught.value.frames
    assert "threading.py" not in caught.value.frames


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_model_that_dies_as_it_is_made_is_named(data: Path, tmp_path: Path, device: str) -> None:
    class Fatal:
        def __init__(self) -> None:
            import ctypes

            ctypes.string_at(0)

        def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
            return batch["x"]

    ds = hr.read_parquet(data / "f0.parquet").predict(Fatal, input="x", output="y", device=device)
    with pytest.raises(WorkerDied, match=r"while predict\(Fatal\) was constructed") as caught:
        ds.write_parquet(tmp_path / "out", on_error="skip", **QUIET)
    assert ("stage", "predict(Fatal)") in caught.value.where
    assert "in __init__" in caught.value.frames
    assert "user_code.py" not in caught.value.frames


def test_a_model_that_dies_once_as_it_is_made_is_made_again(data: Path, tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")

    class Once:
        def __init__(self) -> None:
            import os
            import signal

            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))  # two workers may be at it
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        def __call__(self, x: np.ndarray) -> np.ndarray:
            return x * 2

    ds = hr.read_parquet(data / "f0.parquet").predict(Once, input="x", output="y")
    run = ds.write_parquet(tmp_path / "out", **QUIET)
    assert run.workers_lost == 1
    assert read_back(tmp_path / "out")["id"].to_pylist() == list(range(40))


SCRIPT = """
import sys, time
import headrace as hr

def slow(batch):
    time.sleep(0.15)
    return {**batch, "y": batch["x"] * 2}

if __name__ == "__main__":
    ds = hr.read_parquet(sys.argv[1]).map_batches(slow, batch_size=10).evaluate(n=hr.metrics.Count(), m=hr.metrics.Mean("y"))
    run = ds.write_parquet(sys.argv[2], outputs="per_input", engine=sys.argv[3], cpus=2, progress="log")
    print("done", run.rows, run.metrics["n"], run.metrics["m"])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "many").mkdir()
    for i in range(12):
        ids = np.arange(i * 40, (i + 1) * 40)
        pq.write_table(pa.table({"id": ids, "x": ids * 0.5}), tmp_path / "many" / f"f{i:02d}.parquet")
    return path


def begin(script: Path, engine: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(script.parent / "many"), str(script.parent / "out"), engine]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, start_new_session=True, **pipes)


def wait_for_files(out: Path, least: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(out.glob("f*.parquet"))) < least:
        assert time.monotonic() < deadline, "no output came"
        time.sleep(0.01)


def left_in_group(pgid: int) -> list[int]:
    found: list[int] = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                if os.getpgid(int(pid)) == pgid:
                    found.append(int(pid))
            except ProcessLookupError:
                continue
    return found


def check_done(script: Path, text: str) -> None:
    assert "done 480 480" in text
    back = read_back(script.parent / "out")
    assert back["id"].to_pylist() == list(range(480))
    assert hr.verify(str(script.parent / "out")).ok


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_a_killed_driver_resumes(script: Path, engine: str) -> None:
    job = begin(script, engine)
    wait_for_files(script.parent / "out", 3)
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 10
    while left_in_group(job.pid):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.05)
    before = {p.name: p.stat().st_mtime_ns for p in (script.parent / "out").glob("f*.parquet")}
    again = begin(script, engine)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    check_done(script, out)
    assert "resumed" in err
    after = {p.name: p.stat().st_mtime_ns for p in (script.parent / "out").glob("f*.parquet")}
    assert before.items() <= after.items()


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_sigterm_drains_and_says_resumable(script: Path, engine: str) -> None:
    job = begin(script, engine)
    wait_for_files(script.parent / "out", 2)
    os.kill(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 143, err
    assert "resumable" in err
    assert left_in_group(job.pid) == []
    assert not (script.parent / "out" / "_SUCCESS").exists()
    again = begin(script, engine)
    out, err = again.communicate(timeout=60)
    check_done(script, out)


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_ctrl_c_drains(script: Path, engine: str) -> None:
    job = begin(script, engine)
    wait_for_files(script.parent / "out", 2)
    os.killpg(job.pid, signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode not in (0, 143)
    assert "KeyboardInterrupt" in err
    assert "signals.py" not in err, "where the handler is helps nobody"
    assert left_in_group(job.pid) == []
    again = begin(script, engine)
    out, err = again.communicate(timeout=60)
    check_done(script, out)


def test_a_second_driver_is_refused_and_may_take_over(script: Path) -> None:
    held = 'while "HELD" in os.environ and batch["id"][0] >= 240: time.sleep(0.05)'  # or it may be done before the others start
    script.write_text(script.read_text().replace("import sys,", "import os, sys,").replace("time.sleep(0.15)", held))
    job = begin(script, "processes", HELD="1")
    wait_for_files(script.parent / "out", 2)
    second = begin(script, "processes")
    _, err = second.communicate(timeout=60)
    assert second.returncode != 0
    assert "take_over" in err
    text = script.read_text().replace('progress="log"', 'progress="log", take_over=True')
    (script.parent / "take.py").write_text(text)
    third = begin(script.parent / "take.py", "processes")
    out, err = third.communicate(timeout=60)
    assert third.returncode == 0, err
    check_done(script, out)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "taken over" in err
