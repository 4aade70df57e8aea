"""What the benchmarks share: timing whole processes with their children's memory, interleaving, and recording results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timed:
    """wall_s: from process start to its end. peak_bytes: highest sum of proportional set sizes over the process tree."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    out: str


def run_timed(argv: Sequence[str], **env: str) -> Timed:
    """Run a command to its end; raises when it fails."""
    with tempfile.TemporaryFile("w+") as out:
        before = os.times()
        started = time.perf_counter()
        child = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env})
        peak = _watch_memory(child)
        wall_s = time.perf_counter() - started
        after = os.times()
        out.seek(0)
        text = out.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed with {child.returncode}:\n{text[-4000:]}")
    cpu_s = after.children_user - before.children_user + after.children_system - before.children_system
    return Timed(wall_s, cpu_s, peak, text)


def _watch_memory(child: subprocess.Popen[bytes]) -> int:
    import psutil

    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        process = psutil.Process(child.pid)
        while not done.wait(0.1):
            peak = max(peak, tree_bytes(process))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    child.wait()
    done.set()
    watcher.join()
    return peak


def tree_bytes(process: Any) -> int:
    """Sum of proportional set sizes (shared pages counted once) of a process and its descendants."""
    import psutil

    total = 0
    try:
        for p in [process, *process.children(recursive=True)]:
            try:
                total += p.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def interleave(commands: dict[str, Callable[[], Timed]], runs: int) -> dict[str, list[Timed]]:
    """Each command once to warm up, then `runs` rounds of all in turn."""
    found: dict[str, list[Timed]] = {name: [] for name in commands}
    for round_ in range(runs + 1):
        for name, command in commands.items():
            timed = command()
            if round_:
                found[name].append(timed)
    return found


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def summary(found: dict[str, list[Timed]]) -> dict[str, Any]:
    return {
        name: {
            "wall_s": round(median([t.wall_s for t in runs]), 3),
            "wall_s_all": [round(t.wall_s, 3) for t in runs],
            "cpu_s": round(median([t.cpu_s for t in runs]), 3),
            "peak_mb": round(max(t.peak_bytes for t in runs) / 1e6),
        }
        for name, runs in found.items()
    }


def record(name: str, figures: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json with the machine, the versions, the date and the command."""
    import numpy
    import pyarrow

    import headrace

    result = {
        "name": name,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            "headrace": headrace.__version__,
            "pyarrow": pyarrow.__version__,
            "numpy": numpy.__version__,
        },
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
