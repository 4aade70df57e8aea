"""What safety costs: exactly once, as by default, beside the same pipeline with a sink that promises nothing (unsafe.py).

    python benchmarks/reliability/cost.py [--runs 7] [--record]

Whole processes, interleaved: 1,000 tiny files with an output each (to reach: 1.3x), and the image pipeline with a simulated
device of 2,000/s (to reach: 1.03x).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import images  # noqa: E402
import small_files  # noqa: E402
from common import Timed, interleave, median, record, run_timed, summary  # noqa: E402

UNSAFE = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from unsafe import UnsafeParquet
import headrace as hr
from headrace.api import session

def unsafe(ds, path, *, outputs="packed", **options):
    return session.write(ds._plan, UnsafeParquet(path, outputs), options)

hr.Dataset.write_parquet = unsafe
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    figures: dict[str, Any] = {}
    try:
        tiny = small_files.make(folder / "tiny", 1000, 100)
        photos = images.photographs(folder / "photos", 4, 1000)
        programs = {"tiny": small_files.OURS, "images": images.OURS}
        arguments = {"tiny": [str(tiny), str(folder / "out"), "per_input"]}
        arguments["images"] = [str(photos), str(folder / "out"), "2000", "headrace", "sim"]
        for name, program in programs.items():
            (folder / f"{name}-safe.py").write_text(program)
            (folder / f"{name}-unsafe.py").write_text(UNSAFE + program)

            def run(how: str, name: str = name) -> Timed:
                shutil.rmtree(folder / "out", ignore_errors=True)
                return run_timed([sys.executable, str(folder / f"{name}-{how}.py"), *arguments[name]])

            found = interleave({"safe": lambda run=run: run("safe"), "unsafe": lambda run=run: run("unsafe")}, options.runs)
            figures[name] = summary(found)
            pairs = [a.wall_s / b.wall_s for a, b in zip(found["safe"], found["unsafe"], strict=True)]
            figures[name]["ratio"] = round(figures[name]["safe"]["wall_s"] / figures[name]["unsafe"]["wall_s"], 3)
            figures[name]["ratio_of_pairs"] = round(median(pairs), 3)
            print(name, json.dumps(figures[name]), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.record:
        record("reliability-cost", figures)


if __name__ == "__main__":
    main()
