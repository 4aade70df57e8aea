"""One file of ten million rows through a function that returns what it gets: what the engine itself costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Map, Pipeline, Workload

READ = ("a", "b", "c", "d")
GROUP_ROWS = 1 << 20


def identity(batch: Arrays) -> dict[str, Any]:
    return dict(batch)


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    step = Map("identity", identity, reads=READ, writes={name: Column("float32") for name in READ}, rows=65_536)
    return (Pipeline("big-file", f"{data}/in", (step,)),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    """Four float32, an id, a day, a word of 1,000."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    random = np.random.default_rng(0)
    words = pa.array([f"kind {i}" for i in range(1000)])
    writer = None
    for at in range(0, params["rows"], GROUP_ROWS):
        rows = min(GROUP_ROWS, params["rows"] - at)
        columns: dict[str, Any] = {"id": pa.array(np.arange(at, at + rows))}
        columns |= {name: pa.array(random.random(rows, np.float32)) for name in READ}
        columns["day"] = pa.array(random.integers(0, 3650, rows).astype(np.int32))
        columns["kind"] = words.take(pa.array(random.integers(0, 1000, rows)))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(folder / "in" / "big.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


WORKLOAD = Workload(
    "big-file",
    "one file of 10M rows, identity",
    make=make,
    pipelines=pipelines,
    params={"rows": 10_000_000},
    small={"rows": 100_000},
    input_params=("rows",),
    scaled="rows",
    io_counts=True,
)
