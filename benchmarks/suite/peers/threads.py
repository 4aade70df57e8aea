"""A script: ThreadPoolExecutor over the input. Each thread has its models, with one thread each."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from suite.contract import Job, Loaded, Peer, Pipeline
from suite.peers.by_file import finish, load, pieces, process

KNOBS = {
    "workers": None,  # threads; None: one a core, and one for each device, so that cores work while it computes
    "rows": None,  # a batch; None: what the first step asks for
}
SEARCH = (("workers", (2, 4)), ("rows", (16, 256, 8192)))
PEER = Peer(
    "threads",
    "ThreadPoolExecutor script",
    forms={"same": "a thread reads, computes and writes a piece of the input"},
    knobs=lambda workload: KNOBS,
    search=lambda workload: SEARCH,
)


def workers_of(job: Job, pipelines: Sequence[Pipeline]) -> int:
    waiting = sum(model.devices for model in pipelines[0].models if model.device)
    return job.knobs.get("workers") or job.cores + waiting


def run(job: Job) -> dict[str, Any]:
    pipelines = job.pipelines
    mine = threading.local()
    # Two threads that import scikit-learn or transformers at once meet a circular import: load one model before any.
    ready = [load(pipelines[0], 1)]

    def models_of(which: int) -> Mapping[str, Loaded]:
        if getattr(mine, "which", None) != which:
            mine.which = which
            mine.models = ready.pop() if which == 0 and ready else load(pipelines[which], 1)
        return mine.models

    workers = workers_of(job, pipelines)
    with ThreadPoolExecutor(workers) as pool:
        scores = pool.map(
            lambda piece: process(pipelines[piece.pipeline], piece, models_of(piece.pipeline), job.knobs.get("rows")),
            pieces(job, pipelines, workers),
        )
        return finish(pipelines, list(scores))
