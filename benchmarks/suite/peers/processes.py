"""A script: ProcessPoolExecutor over the input. Each process has its models, with one thread each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from suite.contract import Job, Loaded, Peer, Pipeline
from suite.peers.by_file import Piece, Scores, finish, load, pieces, process
from suite.peers.threads import KNOBS, SEARCH, workers_of

PEER = Peer(
    "processes",
    "ProcessPoolExecutor script",
    forms={"same": "a process reads, computes and writes a piece of the input"},
    knobs=lambda workload: {**KNOBS, "chunk": None},  # pieces a task; None: an eighth of a worker's share
    search=lambda workload: SEARCH,
)

_pipelines: Sequence[Pipeline] = ()
_rows: int | None = None
_loaded: tuple[int, Mapping[str, Loaded]] = (-1, {})


def run(job: Job) -> dict[str, Any]:
    pipelines = job.pipelines
    workers = workers_of(job, pipelines)
    todo = pieces(job, pipelines, workers)
    chunk = job.knobs.get("chunk") or max(1, len(todo) // (8 * workers))
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(pipelines, job.knobs.get("rows"))) as pool:
        return finish(pipelines, list(pool.map(_work, todo, chunksize=chunk)))


def _begin(pipelines: Sequence[Pipeline], rows: int | None) -> None:
    global _pipelines, _rows
    _pipelines, _rows = pipelines, rows


def _work(piece: Piece) -> Scores:
    global _loaded
    if _loaded[0] != piece.pipeline:
        _loaded = (piece.pipeline, load(_pipelines[piece.pipeline], 1))
    return process(_pipelines[piece.pipeline], piece, _loaded[1], _rows)
