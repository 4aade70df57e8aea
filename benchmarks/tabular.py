"""Tabular scoring: Parquet of 30 features and 20 carry-over columns -> gradient boosting, AUC and log-loss -> Parquet.

    python benchmarks/tabular.py [--runs 3] [--files 64] [--rows 50000]

Beside it a hand-written script: a ProcessPoolExecutor of one process per core, a file a task, the whole table read, predicted
with the same booster on one thread, written with the same codec; scikit-learn's AUC and log-loss over all scores at the end. To
reach: 1.05x of its wall. `carry`: the same pipeline without the 20 carry-over columns, and a script that only reads and writes
those: carrying them may cost no more than that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import Timed, interleave, record, run_timed, summary
from suite.workloads.tabular import table_of

FEATURES = 30

OURS = """
import sys
import headrace as hr

FEATURES = [f"f{i:02d}" for i in range(30)]

if __name__ == "__main__":
    ds = hr.read_parquet(sys.argv[1])
    if sys.argv[4] == "narrow":
        ds = ds.select(*FEATURES, "label")
    ds = ds.predict(hr.models.XGBoost(sys.argv[3]), input=FEATURES, output="p")
    ds = ds.evaluate(auc=hr.metrics.AUCROC("p", "label"), loss=hr.metrics.LogLoss("p", "label"))
    run = ds.write_parquet(sys.argv[2], progress="quiet")
    print(run)
    print("RESULT", run.rows, run.metrics["auc"], run.metrics["loss"])
"""

SCRIPT = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xgboost

FEATURES = [f"f{i:02d}" for i in range(30)]
OUT = Path(sys.argv[2])
NARROW = sys.argv[4] == "narrow"

def start(path):
    global MODEL
    pa.set_cpu_count(1)
    MODEL = xgboost.Booster(model_file=path)
    MODEL.set_param({"nthread": 1})

def work(path):
    table = pq.read_table(path, columns=[*FEATURES, "label"] if NARROW else None, use_threads=False)
    x = np.column_stack([table[name].to_numpy() for name in FEATURES])
    p = MODEL.inplace_predict(x)
    pq.write_table(table.append_column("p", pa.array(p)), OUT / path.name)
    return table["label"].to_numpy(), p

if __name__ == "__main__":
    from sklearn.metrics import log_loss, roc_auc_score
    OUT.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sys.argv[1]).glob("*.parquet"))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=start, initargs=(sys.argv[3],)) as pool:
        parts = list(pool.map(work, files))
    y, p = (np.concatenate(column) for column in zip(*parts))
    print("RESULT", len(y), roc_auc_score(y, p), log_loss(y, p.astype(np.float64)))
"""

CARRY = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(sys.argv[2])

def work(path):
    names = [name for name in pq.read_schema(path).names if name.startswith("c")]
    pq.write_table(pq.read_table(path, columns=names, use_threads=False), OUT / path.name)

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=pa.set_cpu_count, initargs=(1,)) as pool:
        list(pool.map(work, sorted(Path(sys.argv[1]).glob("*.parquet"))))
"""


def write_file(path: Path, rows: int, seed: int) -> None:
    """30 float32 features, a label that depends on them, and 20 carry-over columns: numbers, texts, floats, lists, structs."""
    import pyarrow.parquet as pq

    pq.write_table(table_of(rows, seed), path)


def make(folder: Path, files: int, rows: int) -> Path:
    import xgboost

    folder.mkdir(parents=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(write_file, [folder / f"{i:03d}.parquet" for i in range(files)], [rows] * files, range(files)))
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "000.parquet")
    x = np.column_stack([table[f"f{i:02d}"].to_numpy() for i in range(FEATURES)])
    model = xgboost.XGBClassifier(n_estimators=100, max_depth=6, learning_rate=0.1)
    model.fit(x, table["label"].to_numpy())
    model.save_model(folder.parent / "model.ubj")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = make(folder / "in", options.files, options.rows)
        programs = {"ours": OURS, "script": SCRIPT, "carry": CARRY}
        for name, text in programs.items():
            (folder / f"{name}.py").write_text(text)

        def run(program: str, width: str) -> Timed:
            shutil.rmtree(folder / "out", ignore_errors=True)
            model = str(folder / "model.ubj")
            return run_timed([sys.executable, str(folder / f"{program}.py"), str(data), str(folder / "out"), model, width])

        found = interleave(
            {
                "headrace": lambda: run("ours", "wide"),
                "script": lambda: run("script", "wide"),
                "headrace, without carry-over columns": lambda: run("ours", "narrow"),
                "script, without carry-over columns": lambda: run("script", "narrow"),
                "reading and writing the carry-over columns": lambda: run("carry", "wide"),
            },
            options.runs,
        )
        figures = summary(found)
        wall = {name: figures[name]["wall_s"] for name in figures}
        figures["ratio_to_script"] = round(wall["headrace"] / wall["script"], 3)
        carrying = wall["headrace"] - wall["headrace, without carry-over columns"]
        figures["carrying_to_reading_and_writing"] = round(carrying / wall["reading and writing the carry-over columns"], 3)
        figures["results"] = {
            name: next(line for line in found[name][-1].out.splitlines() if line.startswith("RESULT"))
            for name in ("headrace", "script")
        }
        figures["input"] = {
            "files": options.files,
            "rows": options.rows,
            "mb": sum(f.stat().st_size for f in data.iterdir()) >> 20,
        }
        print(found["headrace"][-1].out)
        print(json.dumps(figures, indent=2))
        record("tabular", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
