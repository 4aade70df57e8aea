"""A pipeline on a piece of its input with pyarrow and NumPy: what the scripts share, as a good engineer writes them.

A piece is a file; or a row group, where there are fewer than four files a worker and no output is owed to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.contract import Job, Loaded, Pipeline
from suite.peers.steps import apply, files_of, metrics, numpy_of, opened, out_of

Scores = Mapping[str, Any]  # columns that metrics need


@dataclass(frozen=True)
class Piece:
    """pipeline: its number in the job. group: None for the whole file."""

    pipeline: int
    path: str
    group: int | None
    out: str


def pieces(job: Job, pipelines: Sequence[Pipeline], workers: int) -> list[Piece]:
    """Their folders are made."""
    import pyarrow.parquet as pq

    made: list[Piece] = []
    for i, pipeline in enumerate(pipelines):
        out = Path(out_of(job.out, pipelines, pipeline))
        out.mkdir(parents=True, exist_ok=True)
        paths = files_of(pipeline.source)
        for path in paths:
            name = Path(path).name
            if len(pipelines) > 1 or pipeline.per_input or len(paths) >= 4 * workers:
                made.append(Piece(i, path, None, str(out / name)))
                continue
            with pq.ParquetFile(opened(path)) as file:
                groups = file.num_row_groups
            made += [Piece(i, path, group, str(out / f"{group:05d}-{name}")) for group in range(groups)]
    return made


def load(pipeline: Pipeline, threads: int) -> dict[str, Loaded]:
    return {model.name: model.load(threads) for model in pipeline.models}


def process(pipeline: Pipeline, piece: Piece, models: Mapping[str, Loaded], rows: int | None = None) -> Scores:
    """Read a piece, run all steps batch by batch, write it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(opened(piece.path)) as file:
        whole = file.read(use_threads=False) if piece.group is None else file.read_row_group(piece.group, use_threads=False)
    size = rows or pipeline.steps[0].rows
    done: list[Any] = []
    for at in range(0, whole.num_rows, size):
        table = whole.slice(at, size)
        for step in pipeline.steps:
            table = apply(step, table, models)
        done.append(table)
    table = pa.concat_tables(done)
    pq.write_table(table, piece.out)
    return {name: numpy_of(table[name]) for pair in pipeline.metrics.values() for name in pair}


def finish(pipelines: Sequence[Pipeline], scores: Sequence[Scores]) -> dict[str, Any]:
    """What to tell: metrics over all pieces."""
    import numpy as np

    (*_, pipeline) = pipelines
    if not pipeline.metrics:
        return {"metrics": {}}
    return {"metrics": metrics(pipeline, {name: np.concatenate([part[name] for part in scores]) for name in scores[0]})}
