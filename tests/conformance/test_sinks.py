"""Every sink, through the conformance kit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.testing.check_sink import check_per_input, check_sink

SINKS = [ParquetSink, CsvSink, JsonSink]


def reader(root: Path):
    def read(name: str) -> list[dict[str, Any]]:
        path = root / name
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        if path.suffix == ".csv":
            return pyarrow.csv.read_csv(path).to_pylist() if path.stat().st_size else []
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read


def lister(root: Path):
    return lambda: [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()] if root.exists() else []


@pytest.mark.parametrize("sink", SINKS)
def test_packed(tmp_path: Path, sink) -> None:
    root = tmp_path / "out"
    check_sink(lambda **options: sink(root, **options), files=lister(root), read=reader(root))


@pytest.mark.parametrize("sink", SINKS)
def test_per_input(tmp_path: Path, sink) -> None:
    root = tmp_path / "out"
    check_per_input(lambda **options: sink(root, **options), files=lister(root), read=reader(root))
