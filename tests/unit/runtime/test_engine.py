"""What a probe's numbers lead to."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace as hr
from headrace.api.planning import prepare
from headrace.core.errors import PlanError
from headrace.core.options import Engine, RunOptions
from headrace.runtime.engine import Probe


def probe(*, wall_s: float, cpu_s: float, models_s: float) -> Probe:
    return Probe(held=0.0, rows=10, wall_s=wall_s, bytes=1000, cpu_s=cpu_s, models_s=models_s)


@pytest.mark.parametrize(
    ("wall_s", "cpu_s", "models_s", "waits"),
    [
        (1.0, 0.75, 0.25, True),  # decode, then sleep
        (1.0, 1.0, 0.9, False),  # a model that computes
        (1.0, 0.9, 0.9, False),  # the same on a machine with other work
        (1.0, 0.5, 0.0, False),  # slow storage, no model
        (1.0, 0.95, 0.05, False),  # a wait too short to matter
    ],
)
def test_models_that_wait(wall_s: float, cpu_s: float, models_s: float, waits: bool) -> None:
    assert probe(wall_s=wall_s, cpu_s=cpu_s, models_s=models_s).models_wait is waits


def test_a_sleeping_model_has_workers_of_its_own_and_the_same_answers(tmp_path: Path) -> None:
    def model(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return x + 1

    ds = hr.range(300).predict(model, input="id", output="y")
    run = ds.write_parquet(str(tmp_path / "out"), progress="quiet")
    assert "waiting" in {pool.name for pool in run.pools}
    assert ds.to_arrow()["y"].to_pylist() == list(range(1, 301))


def never_run(row: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("run in the driver's process")


def chosen(options: RunOptions, *, after_crash: bool = False, fn: Any = never_run) -> tuple[str, str]:
    prepared = prepare(hr.range(10).map(fn)._plan, options, after_crash=after_crash)
    return prepared.engine, prepared.notes[-1]


def test_a_timeout_needs_processes_and_no_probe() -> None:
    engine, note = chosen(RunOptions(timeout=2.5))
    assert engine == "processes"
    assert "timeout=2.5" in note
    assert chosen(RunOptions(engine="processes", timeout=2.5))[0] == "processes"


@pytest.mark.parametrize("engine", ["threads", "inline"])
def test_a_timeout_is_refused_where_nothing_can_be_ended(engine: Engine) -> None:
    with pytest.raises(PlanError, match=f'timeout=3 can\'t be kept with engine="{engine}"'):
        chosen(RunOptions(engine=engine, timeout=3))


def test_a_timeout_is_refused_for_a_plan_that_can_not_be_sent() -> None:
    lock = threading.Lock()
    with pytest.raises(PlanError, match="does not pickle"):
        chosen(RunOptions(timeout=3), fn=lambda row: {**row, "y": lock.locked()})


def test_after_a_crash_user_code_runs_in_processes() -> None:
    engine, note = chosen(RunOptions(), after_crash=True)
    assert engine == "processes"
    assert "map(never_run)" in note
    assert chosen(RunOptions(engine="threads"), after_crash=True)[0] == "threads"


def test_after_a_crash_a_plan_without_user_code_is_as_ever() -> None:
    prepared = prepare(hr.range(10).select("id")._plan, RunOptions(), after_crash=True)
    assert prepared.engine == "threads"
