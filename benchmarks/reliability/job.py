"""The job that the reliability runs kill: known answers, every kind of operator, many small splits.

`python benchmarks/reliability/job.py INPUT OUTPUT [--engine E] [--address A] [--take-over] [--packed] [--model] [--pause S]`
runs it; the same command again goes on, on whatever engine.
`prepare(folder)` writes the input; `digest(rows)` is what a clean run and a run of many pieces must share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES = 120
ROWS = 50
PAUSE_S = 0.02  # per file: a run takes two seconds, so that kills fall everywhere


def prepare(folder: Path, files: int = FILES, rows: int = ROWS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        ids = np.arange(i * rows, (i + 1) * rows)
        table = pa.table(
            {"id": ids, "x": ids * 0.5, "label": (ids % 3 == 0).astype(np.int64), "text": [f"row {k}" for k in ids]}
        )
        pq.write_table(table, folder / f"f{i:03d}.parquet", row_group_size=50)


def slow(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time.sleep(PAUSE_S)
    return {**batch, "y": batch["x"] * 2}


def twins(row: dict[str, Any]) -> list[dict[str, Any]]:
    """No row for every 5th, two for every 7th, with a mark, one for the others; every 101st fails."""
    if row["id"] % 101 == 0:
        raise ValueError("a bad row")
    if row["id"] % 5 == 0:
        return []
    return [{**row, "twin": k} for k in range(2 if row["id"] % 7 == 0 else 1)]


def expected() -> list[tuple[int, int]]:
    """(id, twin) of every output row, in order."""
    out: list[tuple[int, int]] = []
    for i in range(FILES * ROWS):
        if i % 101 and i % 5 and i % 11:
            out += [(i, k) for k in range(2 if i % 7 == 0 else 1)]
    return out


def digest(rows: list[tuple[int, int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Third:
    """A model for a device, where there is one."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, x: np.ndarray) -> np.ndarray:
        time.sleep(PAUSE_S / 2)
        return x / 3


def run(source: str, out: str, options: dict[str, Any], outputs: str = "per_input", *, model: bool = False) -> Any:
    import headrace as hr

    read = hr.read_parquet(source)
    if model:
        read = read.predict(Third, input="x", output="third", batch_size=50)
    return (
        read.map_batches(slow, batch_size=50)
        .flat_map(twins)
        .filter(lambda row: row["id"] % 11 != 0)
        .evaluate(n=hr.metrics.Count(), mean=hr.metrics.Mean("y"), auc=hr.metrics.AUCROC("x", "label"))
        .write_parquet(out, outputs=outputs, on_error="quarantine", **options)
    )


def main() -> None:
    global PAUSE_S
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--engine", default="threads")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--take-over", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--address", help="of a Ray cluster, whose CPUs are all used")
    parser.add_argument("--model", action="store_true", help="one model, on devices where there are any")
    parser.add_argument("--pause", type=float, default=PAUSE_S, help="seconds per file, in each step")
    args = parser.parse_args()
    PAUSE_S = args.pause
    where = {"cpus": args.cpus} if args.address is None else {"address": args.address}
    options = {"engine": args.engine, "progress": "log", "take_over": args.take_over, **where}
    done = run(args.source, args.out, options, "packed" if args.packed else "per_input", model=args.model)
    print(json.dumps({"rows": done.rows, "bad": done.tally.bad, "metrics": dict(done.metrics)}))


if __name__ == "__main__":
    sys.exit(main())
