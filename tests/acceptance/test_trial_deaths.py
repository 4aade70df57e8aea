"""engine="auto" and functions that end the process in which they are tried: the same command, run again, gets through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import headrace as hr

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")

SCRIPT = """
import json, os, sys, threading
import headrace as hr

poison, handle = int(sys.argv[2]), threading.Lock()

def work(row):
    if row["id"] == poison:
        os.kill(os.getpid(), 11)
    return {"id": row["id"]}

def unsent(row):
    return work(row) if not handle.locked() else row

rows = hr.range(int(sys.argv[3]))
action, options = sys.argv[1], json.loads(sys.argv[4])
if action == "write":
    run = rows.map(work).write_parquet(**options)
    print("wrote", run.engine, run.rows, run.tally.quarantined)
elif action == "write what can't be sent":
    rows.map(unsent).write_parquet(**options)
else:
    print("took", len(rows.map(work).to_arrow(**options)))
"""


class Command:
    """A program that is started again and again."""

    def __init__(self, folder: Path, poison: int, rows: int, action: str = "write") -> None:
        self.script = folder / "job.py"
        self.script.write_text(SCRIPT)
        self.out = folder / "out"
        self.arguments = [action, str(poison), str(rows)]
        self.cache = folder / "cache"

    def __call__(self, **options: object) -> tuple[int, str]:
        """(exit status, what it said)"""
        if self.arguments[0].startswith("write"):
            options = {"path": str(self.out), **options}
        command = [sys.executable, str(self.script), *self.arguments, json.dumps(options)]
        environment = {**os.environ, "HEADRACE_CACHE": str(self.cache)}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        return ended.returncode, ended.stdout + ended.stderr


def ids(out: Path) -> list[int]:
    return [i for file in sorted(out.glob("*.parquet")) for i in pq.read_table(file)["id"].to_pylist()]


def test_a_write_that_dies_of_its_first_rows_names_the_row_and_then_sets_it_aside(tmp_path: Path) -> None:
    run = Command(tmp_path, poison=3, rows=1000)
    run.cache = run.script  # no folder: the run log has to tell
    assert run()[0] == -signal.SIGSEGV
    status, said = run()
    assert status == 1, said
    assert "an earlier process died at work, maybe of map(work)" in said
    assert "row: 3 of range(1000)" in said
    status, said = run(on_error="quarantine")  # the session between ended in good order, and nothing is forgotten
    assert status == 0, said
    assert "wrote processes 999 1" in said
    assert ids(run.out) == [i for i in range(1000) if i != 3]
    assert hr.verify(str(run.out)).ok


def test_a_write_that_dies_half_way_in_threads_goes_on_in_processes(tmp_path: Path) -> None:
    run = Command(tmp_path, poison=1999, rows=2000)  # beyond the first block, which is all that is tried
    status, said = run(on_error="skip")
    assert status == -signal.SIGSEGV
    assert "started  threads" in said
    status, said = run(on_error="skip")
    assert status == 0, said
    assert "wrote processes 1999 0" in said
    assert ids(run.out) == list(range(1999))


def test_rows_for_the_caller_come_when_they_are_asked_for_again(tmp_path: Path) -> None:
    run = Command(tmp_path, poison=3, rows=1000, action="take")
    assert run()[0] == -signal.SIGSEGV
    status, said = run(on_error="skip")
    assert status == 0, said
    assert "took 999" in said


def test_functions_that_can_run_nowhere_else_are_told_of(tmp_path: Path) -> None:
    run = Command(tmp_path, poison=1999, rows=2000, action="write what can't be sent")
    assert run()[0] == -signal.SIGSEGV
    status, said = run()
    assert status == -signal.SIGSEGV
    assert "the plan can't be sent to them (it does not pickle)" in said


def test_heartbeats_go_on_while_functions_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may take minutes to load; on another machine only the heartbeat tells that this driver lives."""
    monkeypatch.setattr("headrace.runtime.committer.HEARTBEAT_S", 0.01)
    seen: set[bytes] = set()

    def work(row: dict[str, int]) -> dict[str, int]:
        for _ in range(500 if len(seen) < 3 else 0):
            seen.add((tmp_path / "out/_headrace/run-00000/heartbeat.json").read_bytes())
            if len(seen) >= 3:
                break
            time.sleep(0.01)
        return row

    hr.range(100_000).map(work).limit(1).write_parquet(tmp_path / "out", progress="quiet", cpus=1)
    assert len(seen) >= 3
