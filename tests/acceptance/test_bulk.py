"""execution="bulk": stage after stage, what waits in between on disk if need be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import PlanError

from .conftest import outputs

Options = dict[str, Any]
ROWS = 20_000


def widened(batch: dict[str, Any], notes: str) -> dict[str, Any]:
    time.sleep(0.002)
    with open(f"{notes}/made", "a") as file:
        file.write(f"{time.time()}\n")
    return {**batch, "x": np.ones((len(batch["id"]), 200)) * batch["id"][:, None]}


class Summed:
    def __init__(self, notes: str) -> None:
        self._notes = notes

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with open(f"{self._notes}/taken", "a") as file:
            file.write(f"{time.time()}\n")
        return x.sum(axis=1)


@pytest.mark.parametrize("execution", ["streaming", "bulk"])
def test_a_stage_begins_when_the_one_before_it_has_ended(execution: str, tmp_path: Path, quiet: Options) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    ds = hr.range(ROWS).map_batches(widened, fn_args=(str(notes),), batch_size=500)
    ds = ds.predict(Summed, input="x", output="sum", device="sim", constructor_args=(str(notes),)).drop("x")
    run = ds.write_parquet(tmp_path / "out", execution=execution, memory_bytes=4 << 20, **quiet)
    times = {name: [float(line) for line in (notes / name).read_text().splitlines()] for name in ("made", "taken")}
    bulk = execution == "bulk"
    assert (max(times["made"]) <= min(times["taken"])) is bulk
    if quiet["engine"] != "ray":  # Ray spills by itself
        assert (run.spilled_bytes > ROWS * 200 * 8 // 2) is bulk
        assert ("went to disk" in str(run)) is bulk
    table = pq.ParquetDataset([tmp_path / "out" / name for name in sorted(outputs(tmp_path / "out"))]).read()
    assert table["id"].to_pylist() == list(range(ROWS))
    assert table["sum"].to_pylist() == [200.0 * i for i in range(ROWS)]
    assert ds.write_parquet(tmp_path / "out", **quiet).already_done, "how it is run does not change what it is"


def test_what_is_no_execution() -> None:
    with pytest.raises(PlanError, match="execution is 'batch'"):
        next(hr.range(3).iter_batches(execution="batch"))  # type: ignore[arg-type]
