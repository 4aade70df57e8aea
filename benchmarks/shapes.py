"""Inputs of other sizes, row groups and compressions than the suite's own, beside the scripts: is anything tuned to those?

    python benchmarks/shapes.py [--runs 3] [--only tabular]

Each shape is a run of the suite (`./dev bench <workload> --set ...`), interleaved; raw runs go to results/suite/shapes/. Prints
wall and CPU-seconds of Headrace and of the best script, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "suite" / "shapes"
SCRIPTS = ("threads", "processes")

XGBOOST = "tabular --variant xgboost"
SHAPES = (
    (XGBOOST, "files=1 rows=1000000"),
    (XGBOOST, "files=1 rows=1000000 row_group=50000"),
    (XGBOOST, "files=16 rows=60000 row_group=2000"),
    (XGBOOST, "files=400 rows=2500"),
    (XGBOOST, "files=16 rows=60000 compression=zstd"),
    (XGBOOST, "files=3 rows=400000 compression=none"),
    ("images", "files=1 rows=2000"),
    ("images", "files=1 rows=2000 row_group=50"),
    ("images", "files=100 rows=20"),
    ("big-file", "rows=4000000 row_group=4000000"),
    ("big-file", "rows=4000000 row_group=10000"),
    ("big-file", "rows=30000000"),
    ("tiny-files", "files=3000 rows=10"),
    ("tiny-files", "files=150 rows=5000"),
    ("tiny-files --variant per-input", "files=150 rows=5000"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="shapes whose workload begins so")
    options = parser.parse_args()
    print(f"{'workload':32}{'input':40}{'Headrace':>10}{'CPU':>7}{'script':>10}{'CPU':>7}{'ratio':>7}")
    for which, shape in SHAPES:
        if which.startswith(options.only):
            _tell(which, shape, _measure(which, shape, options.runs))


def _measure(which: str, shape: str, runs: int) -> dict[str, Any]:
    """The contestants of a run of the suite."""
    out = RESULTS / f"{which.split()[0]}.json"
    sets = [part for pair in shape.split() for part in ("--set", pair)]
    peers = ",".join(("headrace", *SCRIPTS))
    argv = [sys.executable, "-m", "suite", *which.split(), *sets, "--peers", peers, "--runs", str(runs), "--out", str(out)]
    ended = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{which} {shape}: {ended.stderr.strip()}")
    return json.loads(out.read_text())["points"][-1]["contestants"]


def _tell(which: str, shape: str, contestants: dict[str, Any]) -> None:
    def median(of: str, name: str) -> float:
        return contestants[name]["summary"][of]["median"]

    script = min((name for name in contestants if name in SCRIPTS), key=lambda name: median("wall_s", name))
    own, best = median("wall_s", "headrace"), median("wall_s", script)
    cells = f"{own:10.2f}{median('cpu_s', 'headrace'):7.1f}{best:10.2f}{median('cpu_s', script):7.1f}{own / best:7.2f}"
    print(f"{which:32}{shape:40}{cells}", flush=True)


if __name__ == "__main__":
    main()
