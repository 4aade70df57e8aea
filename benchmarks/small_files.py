"""1,000 Parquet files of 100 rows; `map_batches` adds a column. Beside a hand-written ProcessPoolExecutor script.

    python benchmarks/small_files.py [--runs 5] [--files 1000] [--rows 100]

Whole processes, from start to end, interleaved. To reach: one output per input at most 1.2x the script; packed below it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from common import Timed, interleave, record, run_timed, summary

SCRIPT = """
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(sys.argv[2])

def work(path):
    table = pq.read_table(path)
    table = table.append_column("y", pa.array(table["x"].to_numpy() * 2.0))
    pq.write_table(table, OUT / path.name)
    return table.num_rows

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sys.argv[1]).glob("*.parquet"))
    with ProcessPoolExecutor(2) as pool:
        print(sum(pool.map(work, files, chunksize=16)))
"""

OURS = """
import sys
import headrace as hr

def work(batch):
    return {**batch, "y": batch["x"] * 2.0}

if __name__ == "__main__":
    run = hr.read_parquet(sys.argv[1]).map_batches(work).write_parquet(sys.argv[2], outputs=sys.argv[3], progress="quiet")
    print(run.rows)
    print(run)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = make(folder / "in", options.files, options.rows)
        (folder / "script.py").write_text(SCRIPT)
        (folder / "ours.py").write_text(OURS)

        def run(program: str, *more: str) -> Timed:
            shutil.rmtree(folder / "out", ignore_errors=True)
            timed = run_timed([sys.executable, str(folder / program), str(data), str(folder / "out"), *more])
            assert timed.out.split()[0] == str(options.files * options.rows), timed.out
            return timed

        found = interleave(
            {
                "script": lambda: run("script.py"),
                "per_input": lambda: run("ours.py", "per_input"),
                "packed": lambda: run("ours.py", "packed"),
            },
            options.runs,
        )
        figures = summary(found)
        for name in ("per_input", "packed"):
            figures[name]["ratio_to_script"] = round(figures[name]["wall_s"] / figures["script"]["wall_s"], 3)
        record("small_files", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make(folder: Path, files: int, rows: int) -> Path:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(files):
        ids = np.arange(i * rows, (i + 1) * rows)
        table = pa.table({"id": ids, "x": random.random(rows), "name": [f"row {n}" for n in ids]})
        pq.write_table(table, folder / f"{i:05d}.parquet")
    return folder


if __name__ == "__main__":
    main()
