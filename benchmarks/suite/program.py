"""A contestant's process: `python -m suite.program <peer> <job file>`. Prints `TOLD <json>` last."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from suite.contract import Job


def main() -> None:
    name, path = sys.argv[1:]
    told = import_module(f"suite.peers.{name.replace('-', '_')}").run(Job.read(path))
    print("TOLD " + json.dumps(told or {}), flush=True)


def run_peer(name: str, job: Job, env: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    """In a process, not measured, in this environment. Raises RuntimeError with what it said."""
    path = Path(job.out).with_suffix(".job")
    job.write(path)
    argv = [sys.executable, "-m", "suite.program", name, str(path)]
    done = subprocess.run(argv, env=dict(env), capture_output=True, text=True, timeout=timeout_s)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(lines[-1][5:])


if __name__ == "__main__":
    main()
