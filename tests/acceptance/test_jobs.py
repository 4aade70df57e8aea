"""Many jobs in one program: each an exactly-once run of its own, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr


def double(row: dict[str, int]) -> dict[str, int]:
    return {"id": row["id"], "y": row["id"] * 2}


def fail_at_7(row: dict[str, int]) -> dict[str, int]:
    if row["id"] == 7:
        raise ValueError("seven")
    return row


class Deadly:
    """Kills its process once: at the first row of the first attempt."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        if not os.path.exists(self._mark):
            Path(self._mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return row


def ids(folder: Path) -> list[int]:
    return sorted(pq.read_table(folder)["id"].to_pylist())


def make_input(folder: Path, rows: int, first: int = 0) -> str:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": range(first, first + rows)}), folder / "a.parquet")
    return str(folder)


def test_small_jobs_share_the_cores_and_run_once(tmp_path: Path) -> None:
    def jobs() -> list[hr.Job]:
        return [
            hr.Job(hr.read_parquet(str(tmp_path / f"in{i}")).map(double).write_parquet, str(tmp_path / f"out{i}"))
            for i in range(6)
        ]

    for i in range(6):
        make_input(tmp_path / f"in{i}", 20, first=100 * i)
    results = hr.run_jobs(jobs(), progress="quiet")
    assert [r.job.destination for r in results] == [str(tmp_path / f"out{i}") for i in range(6)]
    assert [r.run.rows for r in results if r.run] == [20] * 6
    for i in range(6):
        assert ids(tmp_path / f"out{i}") == list(range(100 * i, 100 * i + 20))
    again = hr.run_jobs(jobs(), progress="quiet")
    assert all(r.run and r.run.already_done for r in again)
    (first,) = hr.run_jobs(jobs()[:1], progress="quiet")  # the same run, whoever goes on with it
    assert first.run
    assert first.run.already_done


def test_a_failed_job_does_not_touch_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = [
        hr.Job(hr.range(10).map(fail_at_7 if i == 1 else double).write_parquet, str(tmp_path / f"out{i}")) for i in range(4)
    ]
    with pytest.raises(hr.JobsFailed, match="1 of 4 jobs failed") as caught:
        hr.run_jobs(jobs)
    results = caught.value.results
    assert [r.ok for r in results] == [True, False, True, True]
    assert isinstance(results[1].error, hr.UserCodeError)
    assert "seven" in str(results[1].error)
    said = capfd.readouterr().err
    assert f"{tmp_path / 'out1'} failed" in said
    assert "4 of 4 jobs, 1 failed, 30 rows" in said


def test_a_job_that_changes_the_working_directory_does_not_lead_others_astray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = tmp_path / "here"
    source = make_input(here / "in", 10)
    (here / "note").touch()
    monkeypatch.chdir(here)

    def go_away(row: dict[str, int]) -> dict[str, int]:
        assert Path("note").exists()  # of each job, whatever the one before it did
        os.chdir(elsewhere)
        return row

    jobs = [hr.Job(hr.read_parquet(source).limit(1).map(go_away).write_parquet, f"out{i}") for i in range(12)]
    assert all(r.ok for r in hr.run_jobs(jobs, progress="quiet"))
    assert all(len(ids(here / f"out{i}")) == 1 for i in range(12))
    assert not list(elsewhere.glob("out*"))


def test_a_job_whose_process_dies_is_tried_again_alone(tmp_path: Path) -> None:
    source = make_input(tmp_path / "in", 30)
    deadly = Deadly(str(tmp_path / "mark"))
    jobs = [hr.Job(hr.read_parquet(source).map(deadly).write_parquet, str(tmp_path / "out0"))]
    jobs += [hr.Job(hr.read_parquet(source).map(double).write_parquet, str(tmp_path / f"out{i}")) for i in range(1, 8)]
    results = hr.run_jobs(jobs, progress="quiet")
    assert all(r.ok for r in results)
    assert results[0].run
    assert results[0].run.sessions == 2
    for i in range(8):
        assert ids(tmp_path / f"out{i}") == list(range(30))


def always_die(row: dict[str, int]) -> dict[str, int]:
    os._exit(3)


@pytest.mark.parametrize("action", ["write_parquet", "run"])
def test_a_job_that_always_kills_its_process_is_told(tmp_path: Path, action: str) -> None:
    source = make_input(tmp_path / "in", 5)
    deadly = hr.read_parquet(source).map(always_die)
    first = hr.Job(deadly.run) if action == "run" else hr.Job(deadly.write_parquet, str(tmp_path / "out0"))
    jobs = [first, *(hr.Job(hr.read_parquet(source).write_parquet, str(tmp_path / f"out{i}")) for i in range(1, 5))]
    with pytest.raises(hr.JobsFailed, match="1 of 5") as caught:
        hr.run_jobs(jobs, progress="quiet")
    assert isinstance(caught.value.results[0].error, hr.WorkerDied)
    assert ids(tmp_path / "out4") == list(range(5))


def test_large_jobs_and_jobs_with_a_device_get_the_whole_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubler:
        def __call__(self, x: object) -> object:
            return x * 2  # type: ignore[operator]

    table = pa.table({"id": pa.array(range(10_000_000))})  # 80 MB
    jobs = [
        hr.Job(hr.from_arrow(table).write_parquet, str(tmp_path / "large")),
        hr.Job(hr.range(10).predict(Doubler(), input="id", output="y", device="sim").write_parquet, str(tmp_path / "device")),
        hr.Job(hr.range(10).write_csv, str(tmp_path / "small")),
        hr.Job(hr.range(10).write_json, str(tmp_path / "small2"), engine="threads"),
        hr.Job(hr.range(10).evaluate(n=hr.metrics.Count()).run),
    ]
    results = hr.run_jobs(jobs, progress="quiet")
    engines = [r.run.engine for r in results if r.run]
    assert engines[0] != "inline"
    assert engines[1] != "inline"
    assert engines[2] == "inline"
    assert engines[3] == "threads"
    assert results[4].run
    assert results[4].run.metrics["n"] == 10
    assert pq.read_table(tmp_path / "large").num_rows == 10_000_000


def test_an_error_that_does_not_pickle_is_told(tmp_path: Path) -> None:
    source = make_input(tmp_path / "in", 3)

    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def odd(row: object) -> object:
        raise Odd(1, 2)

    jobs = [hr.Job(hr.read_parquet(source).map(odd).write_parquet, str(tmp_path / f"out{i}")) for i in range(2)]
    with pytest.raises(hr.JobsFailed, match="2 of 2") as caught:
        hr.run_jobs(jobs, progress="quiet")
    assert "1 and 2" in str(caught.value.results[0].error)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda out: [hr.Job(hr.range(3).write_parquet, out), hr.Job(hr.range(4).write_parquet, out + "/")],
            "the same destination",
        ),
        (
            lambda out: [hr.Job(hr.range(3).write_parquet, out), hr.Job(hr.range(4).write_parquet, out + "/eu")],
            "lies in another job's",
        ),
        (lambda out: [hr.range(3)], "no job"),
        (lambda out: [hr.Job(hr.range(3).count, out)], "a job is made of"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_is_no_job_is_refused_before_any_begins(tmp_path: Path, make: Callable[[str], list[hr.Job]], says: str) -> None:
    with pytest.raises(hr.PlanError, match=says):
        hr.run_jobs(make(str(tmp_path / "out")), progress="quiet")
    assert not (tmp_path / "out").exists()


def test_no_jobs_are_no_trouble() -> None:
    assert hr.run_jobs([], progress="quiet") == []


SAYS = """
import sys
import headrace as hr

class Settings:
    factor = 3

def times(row):
    print("seen", row["id"])
    return {"id": row["id"] * Settings.factor}

jobs = [hr.Job(hr.range(3).map(times).write_parquet, f"{sys.argv[1]}/out{i}") for i in range(8)]
hr.run_jobs(jobs, progress="quiet")
assert all(job.run(progress="quiet").already_done for job in jobs)
"""


def test_what_jobs_print_arrives_and_the_verb_itself_knows_their_runs(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SAYS)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seen 2") == 8


PROGRAM = """
import sys, time
import headrace as hr

def slow(row):
    time.sleep(0.02)
    return row

if __name__ == "__main__":
    jobs = [hr.Job(hr.range(20).map(slow).write_parquet, f"{sys.argv[1]}/out{i}") for i in range(20)]
    hr.run_jobs(jobs, progress="quiet")
"""


def test_killed_with_its_processes_it_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(command) as program:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out*/_SUCCESS")) and time.monotonic() < deadline:
            time.sleep(0.02)
        program.kill()
    assert len(list(tmp_path.glob("out*/_SUCCESS"))) < 20
    subprocess.run(command, check=True, timeout=120)
    for i in range(20):
        assert ids(tmp_path / f"out{i}") == list(range(20))


def test_jobs_need_no_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_input(tmp_path / "in", 10)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    jobs = [hr.Job(hr.read_parquet(source).map(double).write_parquet, str(tmp_path / f"out{i}")) for i in range(2)]
    hr.run_jobs(jobs, progress="quiet")
    assert [ids(tmp_path / f"out{i}") for i in range(2)] == 2 * [list(range(10))]
