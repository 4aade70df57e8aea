"""The batch size that is found beside the best of those that a sweep finds, on three models.

    python benchmarks/batch_size.py [--runs 3] [--seconds 8]

simulated: a device on which a call costs 8 ms, a row 20 us (sleeps). matmul: NumPy on CPUs. convolution: torch on CPUs.
The sweep runs sizes from 8 to 32,768 once each; then the best, its half, its double, and batch_size="auto" run in turn, over as
many rows as the best does in about --seconds. `auto` has nothing to
remember, so that its search is in the time; `auto again` is given what the run before remembered. To reach: 0.95 of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import median, record

SIZES = (8, 32, 128, 512, 2048, 8192, 32768)

PROGRAM = """
import sys, time
import numpy as np
import headrace as hr

class Simulated:
    def __call__(self, ids):
        time.sleep(0.008 + 20e-6 * len(ids))
        return ids % 10

class Matmul:
    def __init__(self):
        chance = np.random.default_rng(0)
        self.first = chance.normal(size=(64, 512)).astype(np.float32)
        self.second = chance.normal(size=(512, 16)).astype(np.float32)

    def __call__(self, ids):
        x = np.sin(ids[:, None].astype(np.float32) * np.arange(1, 65, dtype=np.float32))
        return np.maximum(x @ self.first, 0) @ self.second

class Convolution:
    def __init__(self):
        import torch
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU()]
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10)]
        self.net = torch.nn.Sequential(*layers, *head).eval()
        self.image = torch.rand(1, 3, 32, 32)

    def __call__(self, ids):
        import torch
        with torch.inference_mode():
            return self.net(self.image * (ids % 255).float().reshape(-1, 1, 1, 1) / 255)

MODELS = {
    "simulated": dict(model=Simulated, device="sim"),
    "matmul": dict(model=Matmul, device="cpu"),
    "convolution": dict(model=Convolution, device="cpu", batch_format="torch"),
}

if __name__ == "__main__":
    name, rows, size, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    if name == "convolution":
        import torch
    size = size if size == "auto" else int(size)
    ds = hr.range(rows).predict(input="id", output="p", batch_size=size, **MODELS[name])
    began = time.perf_counter()
    ds.write_parquet(out, engine="threads", progress="quiet")
    print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "program.py").write_text(PROGRAM)
        figures = {
            name: compare(folder, name, options.runs, options.seconds) for name in ("simulated", "matmul", "convolution")
        }
        record("batch_size", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, name: str, runs: int, seconds: float) -> dict[str, object]:
    """Rows per second of all contestants, and what the found size reaches of the best fixed one."""

    def rate(rows: int, size: int | str, cache: str) -> float:
        """Over one run, in a process of its own."""
        shutil.rmtree(folder / "out", ignore_errors=True)
        argv = [sys.executable, str(folder / "program.py"), name, str(rows), str(size), str(folder / "out")]
        env = {**os.environ, "HEADRACE_CACHE": str(folder / cache)}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        return rows / float(done.stdout.split()[-1])

    guess = rate(20_000, 512, "none")
    sweep: dict[int, float] = {}
    for size in SIZES:  # about --seconds / 2 for each: shorter runs are mostly start-up, and choose a wrong one
        probe = rate(int(min(guess * 2, 200 * size)), size, "none")
        sweep[size] = rate(int(probe * seconds / 2), size, "none")
    best = max(sweep, key=lambda size: sweep[size])
    rows = int(sweep[best] * seconds)
    contestants: dict[str, int | str] = {str(size): size for size in (best // 2, best, best * 2)}
    found: dict[str, list[float]] = {name: [] for name in (*contestants, "auto", "auto again")}
    for _ in range(runs):
        for label, size in contestants.items():
            found[label].append(rate(rows, size, "none"))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        found["auto"].append(rate(rows, "auto", "cache"))
        found["auto again"].append(rate(rows, "auto", "cache"))
    remembered = folder / "cache" / "batch-sizes.json"
    rates = {label: median(values) for label, values in found.items()}
    most = max(rates[label] for label in contestants)
    result: dict[str, object] = {
        "rows": rows,
        "sweep_rows_per_s": {str(size): round(value) for size, value in sweep.items()},
        "rows_per_s": {label: round(value) for label, value in rates.items()},
        "rows_per_s_all": {label: [round(value) for value in values] for label, values in found.items()},
        "remembered": json.loads(remembered.read_text())["sizes"] if remembered.exists() else {},
        "auto_of_best": round(rates["auto"] / most, 3),
        "auto_again_of_best": round(rates["auto again"] / most, 3),
    }
    print(name, json.dumps(result, indent=2), flush=True)
    return result


if __name__ == "__main__":
    main()
