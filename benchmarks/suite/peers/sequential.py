"""Plain Python: a file after the other, a step after the other. The reference that all outputs are compared with."""

from __future__ import annotations

from typing import Any

from suite.contract import Job, Peer
from suite.peers.by_file import finish, load, pieces, process

PEER = Peer("sequential", "plain Python", forms={"same": "a loop over files; libraries may use all cores"})


def run(job: Job) -> dict[str, Any]:
    pipelines = job.pipelines
    loaded, models, scores = -1, {}, []
    for piece in pieces(job, pipelines, 1):
        if piece.pipeline != loaded:
            loaded, models = piece.pipeline, load(pipelines[piece.pipeline], job.cores)
        scores.append(process(pipelines[loaded], piece, models))
    return finish(pipelines, scores)
