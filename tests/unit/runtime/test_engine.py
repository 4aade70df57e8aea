"""What a probe's numbers lead to."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import headrace as hr
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
