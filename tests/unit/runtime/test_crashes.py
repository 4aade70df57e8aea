from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from headrace.core.errors import WorkerDied
from headrace.core.steps import Doing
from headrace.runtime.crashes import CrashSamples

DOING = Doing(3, "map_batches(f)", digest="abc123", sample=b"arrow")


def test_a_row_is_kept_once_under_its_digest(tmp_path: Path) -> None:
    samples = CrashSamples(str(tmp_path / "run" / "crashes"))
    path = samples.keep(DOING)
    assert path == str(tmp_path / "run" / "crashes" / "3-abc123.arrow")
    assert Path(path).read_bytes() == b"arrow"
    assert samples.keep(DOING) == path


def test_nothing_is_made_before_there_is_a_row(tmp_path: Path) -> None:
    assert CrashSamples(str(tmp_path / "crashes")).keep(Doing(3, "f")) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [None, "s3://bucket/out/_headrace/run-00000/crashes", "/proc/no/such/place"])
def test_without_a_local_folder_it_is_a_temporary_one_of_our_own(
    folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Path(CrashSamples(folder).keep(DOING))
    assert kept.name == "3-abc123.arrow"
    assert kept.parent.parent == tmp_path
    assert kept.parent.stat().st_mode & 0o077 == 0, "nobody else may put anything there"


def test_the_error_names_the_file_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", "-W", "error", "my job.py", "--all"])
    error = CrashSamples(None).point_out(WorkerDied("it died", hint="look at dmesg"), "/tmp/a b.arrow")
    assert ("sample", "/tmp/a b.arrow") in error.where
    command = "HEADRACE_REPRODUCE='/tmp/a b.arrow' /usr/bin/python3 -X faulthandler -W error 'my job.py' --all"
    assert error.hint == f"look at dmesg; see it again with: {command}"


def test_other_errors_are_left_as_they_are() -> None:
    error = CrashSamples(None).point_out(WorkerDied("it died", hint="look at dmesg"), "")
    assert (error.where, error.hint) == ((), "look at dmesg")
