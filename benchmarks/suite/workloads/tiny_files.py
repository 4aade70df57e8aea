"""A thousand files of 100 rows, a column added. The output packed into few files, or one for each input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Map, Pipeline, Workload


def double(batch: Arrays) -> dict[str, Any]:
    return {"y": batch["x"] * 2.0}


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    step = Map("double", double, reads=("x",), writes={"y": Column("float64")})
    return (Pipeline("tiny-files", f"{data}/in", (step,), per_input=params["outputs"] == "per_input"),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    random = np.random.default_rng(0)
    for i in range(params["files"]):
        ids = np.arange(i * params["rows"], (i + 1) * params["rows"])
        table = pa.table({"id": ids, "x": random.random(len(ids)), "name": [f"row {n}" for n in ids]})
        pq.write_table(table, folder / "in" / f"{i:05d}.parquet")


WORKLOAD = Workload(
    "tiny-files",
    "1,000 files of 100 rows",
    make=make,
    pipelines=pipelines,
    params={"files": 1000, "rows": 100, "outputs": "packed"},
    small={"files": 40},
    input_params=("files", "rows"),
    variants={"per-input": {"outputs": "per_input"}},
    io_counts=True,
)
