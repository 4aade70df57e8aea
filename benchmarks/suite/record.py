"""Recorded results: benchmarks/results/suite/<workload>.json, raw runs with machine, versions, date and command."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from suite import environments
from suite.contract import Workload
from suite.runner import Contestant

FOLDER = Path(__file__).parents[1] / "results" / "suite"


def circumstances(able: Sequence[Contestant]) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["./dev bench", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "memory_gb": _memory_gb(), "system": platform.system()},
        "versions": {name or "project": environments.versions(name) for name in {one.peer.environment for one in able}},
    }


def keep(workload: Workload, key: Mapping[str, Any], entry: Mapping[str, Any], to: Path | None) -> None:
    """An entry with the same key is replaced."""
    path = to or FOLDER / f"{workload.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["points"] if path.exists() else []
    points = [point for point in before if any(point.get(name) != value for name, value in key.items())]
    told = {"workload": workload.name, "title": workload.title, "points": [*points, entry]}
    path.write_text(json.dumps(told, indent=1) + "\n")


def table(entry: Mapping[str, Any]) -> str:
    """For people at a terminal."""
    ideal, together = entry["ideal_s"], entry["ideal_together_s"]
    limit = f"ideal {ideal:.2f} s, {together:.2f} s by all cores at once" if ideal else "limits not measured"
    lines = [f"{entry['rows']} rows, {entry['input_mb']} MB, {entry['cores']} cores; {limit}"]
    heads = (("wall", 8), ("range", 16), ("ideal", 8), ("first", 8), ("rows/s", 10), ("CPU", 8), ("peak MB", 9), ("busy", 6))
    lines.append(" " * 22 + "".join(f"{head:>{width}}" for head, width in (*heads, ("span", 6))))
    ended = [(name, one) for name, one in entry["contestants"].items() if "summary" in one]
    for name, one in sorted(ended, key=lambda pair: pair[1]["summary"].get("wall_s", {}).get("median", 0)):
        found = one["summary"]
        wall = found.get("wall_s", {"median": 0, "least": 0, "most": 0})
        lines.append(
            f"{name:22}{wall['median']:8.2f}{wall['least']:8.2f}{wall['most']:8.2f}{found.get('share_of_ideal', 0):8.0%}"
            + _cell(found, "first_s", 8, ".2f")
            + _cell(found, "steady_rows_per_s", 10, ",.0f")
            + _cell(found, "cpu_s", 8, ".1f")
            + f"{one['peak_mb']:9}"
            + _cell(found, "busy", 6, ".0%")
            + _cell(found, "busy_span", 6, ".0%")
        )
    for name, one in entry["contestants"].items():
        if "summary" not in one:
            lines.append(f"{name:22}  {'failed: ' + one['failed'] if 'failed' in one else one['cannot']}")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], name: str, width: int, form: str) -> str:
    return f"{found[name]['median']:{width}{form}}" if name in found else " " * width


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gb() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
