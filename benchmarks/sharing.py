"""How well few splits are shared among workers: the wall of work that waits, beside a pool of threads that takes row by row.

    python benchmarks/sharing.py [--runs 3]

Each row waits for some milliseconds in a function that is called a row at a time, so that two cores can stand for eight, and
nothing is measured but who works when. `table`: one file in one row group. `files`: three files of unequal size.
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
from concurrent.futures import ThreadPoolExecutor
import pyarrow.parquet as pq
import headrace as hr

ROW_S = float(sys.argv[4])

def wait(row):
    time.sleep(ROW_S)
    return row

if __name__ == "__main__":
    if sys.argv[2] == "pool":
        rows = pq.read_table(sys.argv[1]).to_pylist()
        with ThreadPoolExecutor(int(sys.argv[3])) as pool:
            list(pool.map(wait, rows, chunksize=1))
        sys.exit()
    hr.read_parquet(sys.argv[1]).map(wait).write_parquet(sys.argv[2], cpus=int(sys.argv[3]), progress="quiet")
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
        for shape in ("table", "files"):
            for cpus in (2, 8):
                outs = [Path(folder, f"out-{shape}-{cpus}-{i}") for i in range(runs)]
                walls = [_wall_s(program, Path(folder, shape), out, cpus) for out in outs]
                pools = [_wall_s(program, Path(folder, shape), Path("pool"), cpus) for _ in outs]
                figures[f"{shape}, {cpus} workers"] = {
                    "wall_s": round(median(walls), 2),
                    "pool_s": round(median(pools), 2),
                    "ratio": round(median(walls) / median(pools), 3),
                    "all": [round(w, 2) for w in (*walls, *pools)],
                }
    record("sharing", figures)


def _wall_s(program: Path, data: Path, out: Path, cpus: int) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, program, data, out, str(cpus), str(ROW_S)], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
