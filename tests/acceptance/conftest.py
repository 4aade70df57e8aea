"""One feature suite for every engine: `engine` runs through them all, `data` is a small dataset on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ENGINES = ["inline", "threads", *(["processes"] if sys.platform == "linux" else []), *(["ray"] if find_spec("ray") else [])]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.fixture
def quiet(engine: str) -> dict[str, Any]:
    return {"engine": engine, "progress": "quiet", "cpus": 2}


def table(start: int, rows: int) -> pa.Table:
    ids = np.arange(start, start + rows)
    return pa.table(
        {
            "id": ids,
            "x": ids * 0.5,
            "name": [f"row {i}" for i in ids],
            "label": (ids % 2).astype(np.int64),
            "nested": [{"a": int(i), "b": [str(i)] * int(i % 3)} for i in ids],
            "when": pa.array(ids * 1_000_000, pa.timestamp("us", "UTC")),
        }
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five files of 40 rows in groups of 15, ids 0..199."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        pq.write_table(table(i * 40, 40), folder / f"f{i}.parquet", row_group_size=15)
    return folder


def read_back(folder: Path) -> pa.Table:
    """Everything under a destination, in file order."""
    found = folder.rglob("*.parquet")
    files = sorted(p for p in found if not any(part.startswith("_") for part in p.relative_to(folder).parts))
    return pa.concat_tables([pq.read_table(f) for f in files])


def outputs(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith("_") for part in p.relative_to(folder).parts)
    )


Reader = Callable[[Path], pa.Table]
