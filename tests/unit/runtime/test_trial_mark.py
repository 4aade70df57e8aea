"""What marks of earlier trials tell, and that trouble with their files is no trouble."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import headrace as hr
from headrace.api.planning import prepare
from headrace.core.options import RunOptions
from headrace.runtime.trial_mark import FOLDER, KEPT_S, died_of, key_of, mark

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


def left_by_the_dead(folder: Path, key: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-0123"
    path.touch()
    return path


def test_a_trial_under_way_is_no_death_and_leaves_nothing(folder: Path) -> None:
    with mark("k"):
        assert len(list(folder.iterdir())) == 1
        assert not died_of("k")
    assert list(folder.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), mark("k"):
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []


def test_a_mark_that_nobody_holds_tells_of_a_death(folder: Path) -> None:
    path = left_by_the_dead(folder, "k")
    with mark("k"):  # another one tries at the same time
        assert died_of("k")
    assert not died_of("other")
    old = time.time() - KEPT_S - 1
    os.utime(path, (old, old))
    assert not died_of("k")
    assert not path.exists()


def test_where_no_file_can_be_made(folder: Path) -> None:
    folder.parent.write_bytes(b"")
    with mark("k"):
        assert not died_of("k")


def key(fn: Callable[..., Any]) -> str:
    program = prepare(hr.range(3).map(fn)._plan, RunOptions(engine="inline")).program
    return key_of(program.source.describe(), program.ops)


def test_the_key_is_of_the_code() -> None:
    def work(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": row["id"] in {"a", "b"}}

    first = key(work)
    assert key(work) == first

    def work(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": row["id"] in {"a", "c"}}

    assert key(work) != first


@pytest.mark.parametrize("action", ["explain", "run", "iterate"])
def test_after_a_death_the_functions_are_not_tried_here(folder: Path, action: str) -> None:
    tried_in: list[int] = []

    def work(row: dict[str, Any]) -> dict[str, Any]:
        tried_in.append(row["id"])
        return row

    ds = hr.range(3).map(work)
    left_by_the_dead(folder, key_of("range(3)", prepare(ds._plan, RunOptions(engine="inline")).program.ops))
    if action == "explain":
        assert "an earlier process died at work, maybe of map(" in ds.explain()
    elif action == "run":
        assert ds.run(progress="quiet").engine == "processes"
    else:
        assert [b["id"].tolist() for b in ds.iter_batches()] == [[0, 1, 2]]
    assert tried_in == []


def test_trials_at_the_same_time_are_no_deaths(folder: Path) -> None:
    """Locks are of open files: threads are to each other as processes."""

    def trials(_: int) -> bool:
        found = False
        for _ in range(50):
            with mark("k"):
                found |= died_of("k")
        return found

    with ThreadPoolExecutor(8) as threads:
        assert not any(threads.map(trials, range(8)))
    assert list(folder.iterdir()) == []
