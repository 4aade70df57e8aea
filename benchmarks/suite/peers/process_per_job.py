"""What a scheduler of batch jobs does with many small ones: a process for each, as many at once as there are cores."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from suite.contract import Job, Peer
from suite.peers.by_file import Piece, load, process

PEER = Peer(
    "process-per-job",
    "a process per job",
    forms={"same": "plain Python, each job a process of its own"},
    why_not=lambda pipelines, form, params: None if len(pipelines) > 1 else "is for many jobs, and there is one",
)


def run(job: Job) -> dict[str, Any]:
    path = Path(job.out).with_suffix(".each")
    job.write(path)
    argv = [sys.executable, "-m", "suite.peers.process_per_job", str(path)]
    with ThreadPoolExecutor(job.cores) as pool:
        ended = pool.map(lambda i: subprocess.run([*argv, str(i)], check=True), range(len(job.pipelines)))
        return {"metrics": {}, "jobs": len(list(ended))}


def main() -> None:
    job, which = Job.read(sys.argv[1]), int(sys.argv[2])
    pipeline = job.pipelines[which]
    models = load(pipeline, 1)
    folder = Path(job.out, pipeline.name)
    folder.mkdir(parents=True, exist_ok=True)
    for path in pipeline.files():
        process(pipeline, Piece(which, path, None, str(folder / Path(path).name)), models)


if __name__ == "__main__":
    main()
