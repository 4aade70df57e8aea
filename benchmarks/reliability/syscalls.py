"""One small job, killed at every N-th system call that changes something on disk, then resumed; the same with errors.

    python benchmarks/reliability/syscalls.py [--every 1] [--engine inline] [--record]

strace injects: SIGKILL at the N-th call of each kind (counted in each thread), for every N that a clean run makes; then ENOSPC
and EIO instead. After each, the same command runs again, undisturbed, and its output must equal the known answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import job  # noqa: E402
from common import record  # noqa: E402
from kills import Findings, Local, check_output, told  # noqa: E402

FILES, ROWS = 4, 40
KINDS = {
    "fsync": "fsync,fdatasync,syncfs",
    "link": "link,linkat",
    "rename": "rename,renameat,renameat2",
    "unlink": "unlink,unlinkat,rmdir",
    "mkdir": "mkdir,mkdirat",
    "write": "write,pwrite64,writev",
}
ERRORS = {
    "fsync": ("EIO", "ENOSPC"),
    "link": ("ENOSPC", "EIO"),
    "rename": ("ENOSPC", "EIO"),
    "write": ("ENOSPC", "EIO"),
    "mkdir": ("ENOSPC",),
}


def run(source: Path, there: Local, engine: str, strace: list[str]) -> tuple[int, str]:
    command = [*strace, sys.executable, str(job.__file__), str(source), there.uri, "--engine", engine, "--cpus", "1"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    return done.returncode, done.stderr


def count_calls(source: Path, there: Local, engine: str) -> dict[str, int]:
    """The most calls of each kind that one thread of a clean run makes."""
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as log:
        names = ",".join(KINDS.values())
        code, err = run(source, there, engine, ["strace", "-f", "-qq", "-e", f"trace={names}", "-o", log.name])
        assert code == 0, err
        by_thread: Counter[tuple[str, str]] = Counter()
        for line in log:
            found = re.match(r"(\d+)\s+(\w+)\(", line)
            if found:
                for kind, calls in KINDS.items():
                    if found[2] in calls.split(","):
                        by_thread[kind, found[1]] += 1
    return {kind: max((n for (k, _), n in by_thread.items() if k == kind), default=0) for kind in KINDS}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="only every so many-th N")
    parser.add_argument("--engine", default="inline")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    job.FILES, job.ROWS = FILES, ROWS
    findings = Findings()
    figures: dict[str, Any] = {"engine": args.engine, "every": args.every}
    with tempfile.TemporaryDirectory() as folder:
        source, there = Path(folder) / "in", Local(Path(folder) / "out")
        job.prepare(source, FILES, ROWS)
        calls = count_calls(source, there, args.engine)
        metrics = json.loads(there.read("_manifest.json") or b"{}")["metrics"]
        check_output(there, findings, metrics)
        figures["calls"] = calls
        print(calls, flush=True)
        plan = [(kind, "signal=KILL") for kind in args.kinds.split(",")]
        if not args.no_errors:
            plan += [(kind, f"error={e}") for kind in args.kinds.split(",") for e in ERRORS.get(kind, ())]
        for kind, what in plan:
            cut = rounds = 0
            for n in range(1, calls[kind] + 1, args.every):
                there.clear()
                inject = f"inject={KINDS[kind]}:{what}:when={n}"
                code, err = run(source, there, args.engine, ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject])
                cut += code != 0
                rounds += 1
                if code not in (0, 137, -9) and what == "signal=KILL":
                    findings.notes.append(f"{kind} {n}: code {code}: {err[-500:]}")
                again, err = run(source, there, args.engine, [])
                if again:
                    findings.failed_runs += 1
                    findings.notes.append(f"{kind} {what} {n}: the resume failed: {err[-1500:]}")
                    continue
                before = findings.lost + findings.duplicates + findings.wrong_metrics + findings.left_processes
                check_output(there, findings, metrics)
                if findings.lost + findings.duplicates + findings.wrong_metrics + findings.left_processes != before:
                    findings.notes.append(f"^ after {kind} {what} {n}")
            figures[f"{kind} {what}"] = {"rounds": rounds, "cut_short": cut}
            print(kind, what, figures[f"{kind} {what}"], "" if findings.clean else told(findings), flush=True)
    figures |= told(findings)
    if args.record:
        record("reliability-syscalls", figures)
    print(json.dumps(figures, indent=1))
    return 0 if findings.clean else 1


if __name__ == "__main__":
    sys.exit(main())
