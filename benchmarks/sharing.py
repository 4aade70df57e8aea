"""How well few splits are shared among workers: the wall of work that waits, beside what the workers could do at best.

    python benchmarks/sharing.py [--runs 3]

Each row waits for some milliseconds in a function that is called a row at a time, so that two cores can stand for eight, and
nothing is measured but who works when. `table`: one file in one row group. `files`: three files of unequal size.
`pipeline`: the table, then a second function.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, record

ROWS, ROW_S = 24_000, 0.002
PROGRAM = """
import sys, time
import headrace as hr

ROW_S = float(sys.argv[5])

def wait(row):
    time.sleep(ROW_S)
    return row

if __name__ == "__main__":
    ds = hr.read_parquet(sys.argv[1]).map(wait)
    if sys.argv[4] == "pipeline":
        ds = ds.filter("id >= 0").map(wait)
    ds.write_parquet(sys.argv[2], cpus=int(sys.argv[3]), progress="quiet")
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        rows = pa.table({"id": np.arange(ROWS), "x": np.random.default_rng(0).random(ROWS)})
        for name, cuts in {"table": [0, 1], "files": [0, 0.6, 0.9, 1]}.items():
            data = Path(folder, name)
            data.mkdir()
            for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
                part = rows.slice(round(start * ROWS), round((stop - start) * ROWS))
                pq.write_table(part, data / f"{i}.parquet", row_group_size=ROWS)
        for shape in ("table", "files", "pipeline"):
            for cpus in (2, 8):
                row_s = ROW_S / 2 if shape == "pipeline" else ROW_S
                data = Path(folder, "table" if shape == "pipeline" else shape)
                walls = [
                    _wall_s(program, data, Path(folder, f"out-{shape}-{cpus}-{i}"), cpus, shape, row_s) for i in range(runs)
                ]
                ideal = ROWS * ROW_S / cpus
                figures[f"{shape}, {cpus} workers"] = {
                    "wall_s": round(median(walls), 2),
                    "ideal_s": ideal,
                    "ratio": round(median(walls) / ideal, 3),
                    "all": [round(w, 2) for w in walls],
                }
    record("sharing", figures)


def _wall_s(program: Path, data: Path, out: Path, cpus: int, shape: str, row_s: float) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, program, data, out, str(cpus), shape, str(row_s)], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
