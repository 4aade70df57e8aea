"""Peak memory of the process tree on 1x and 10x the data.

    python benchmarks/memory.py [--engine threads] [--rows 200000]

Two pipelines: a table with a function over batches, and small images with a device and an expansion. To reach: within 10%.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from common import record, run_timed

PROGRAM = """
import sys
import numpy as np
import headrace as hr

def work(batch):
    return {**batch, "y": batch["x0"] * 2.0}

def frames(row):
    for i in range(30):
        yield {"id": row["id"], "frame": i, "image": np.full((64, 64, 3), i, np.uint8)}

class Device:
    def __call__(self, images):
        return images.mean(axis=(1, 2, 3))

if __name__ == "__main__":
    ds = hr.read_parquet(sys.argv[1])
    if sys.argv[3] == "table":
        ds = ds.map_batches(work)
    else:
        ds = ds.select("id").flat_map(frames).predict(Device, input="image", output="mean", device="sim").drop("image")
    print(ds.write_parquet(sys.argv[2], progress="quiet", engine=sys.argv[4]).rows)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "program.py").write_text(PROGRAM)
        figures = {}
        for kind, rows in (("table", options.rows), ("expand", options.rows // 100)):
            small, large = make(folder / f"{kind}1", 4, rows), make(folder / f"{kind}10", 40, rows)
            for engine in ("threads", "processes"):
                peaks = [peak(folder, data, kind, engine) for data in (small, large)]
                figures[f"{kind}, {engine}"] = {
                    "peak_mb_1x": round(peaks[0] / 1e6),
                    "peak_mb_10x": round(peaks[1] / 1e6),
                    "ratio": round(peaks[1] / peaks[0], 3),
                }
        record("memory", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def peak(folder: Path, data: Path, kind: str, engine: str) -> int:
    shutil.rmtree(folder / "out", ignore_errors=True)
    return run_timed([sys.executable, str(folder / "program.py"), str(data), str(folder / "out"), kind, engine]).peak_bytes


def make(folder: Path, files: int, rows: int) -> Path:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(files):
        columns = {f"x{c}": random.random(rows) for c in range(20)}
        pq.write_table(pa.table({"id": np.arange(i * rows, (i + 1) * rows), **columns}), folder / f"{i:04d}.parquet")
    return folder


if __name__ == "__main__":
    main()
