"""From process start to the first batch predicted, on a small Parquet file.

    python benchmarks/startup.py [--runs 9]

A fresh interpreter each time; the clock starts before the process does. To reach: 0.6 s with threads, 1.0 s with processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, record

PROGRAM = """
import sys, time
import headrace as hr

class Model:
    def __call__(self, batch):
        return batch["x"] * 2.0

for batch in hr.read_parquet(sys.argv[1]).predict(Model, input=["x"], output="y").iter_batches(engine=sys.argv[2]):
    print(time.time(), len(batch["y"]), flush=True)
    break
"""


def first_batch_s(program: Path, data: Path, engine: str) -> float:
    started = time.time()
    done = subprocess.run([sys.executable, program, data, engine], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0]) - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        data, program = Path(folder, "small.parquet"), Path(folder, "program.py")
        pq.write_table(pa.table({"id": np.arange(1000), "x": np.random.default_rng(0).random(1000)}), data)
        program.write_text(PROGRAM)
        figures = {}
        for engine in ("threads", "processes", "auto"):
            times = [first_batch_s(program, data, engine) for _ in range(runs + 1)][1:]
            figures[engine] = {"first_batch_s": round(median(times), 3), "all": [round(t, 3) for t in times]}
        bare = [_import_s() for _ in range(runs + 1)][1:]
        figures["interpreter, numpy, pyarrow and pyarrow.parquet imported"] = {"s": round(median(bare), 3)}
    record("startup", figures)


def _import_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy, pyarrow, pyarrow.parquet"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
