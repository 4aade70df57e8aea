"""Two models in one pass beside two passes: the image pipeline with simulated devices.

    python benchmarks/two_models.py [--runs 3] [--files 4] [--rows 1000] [--rate 2000]

One pass: predict({"a": Device, "b": Device}) on two simulated devices. Two passes: the pipeline of images.py twice, one after
the other, in one process. To reach: 0.65x. `one device`: both models on the same device, which then works twice as long.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import Timed, interleave, record, run_timed, summary
from images import photographs

PROGRAM = """
import sys, time
import numpy as np
import headrace as hr

RATE = float(sys.argv[3])

class Device:
    def __call__(self, images):
        time.sleep(len(images) / RATE)
        return images[:, 0, 0, 0].astype(np.int64)

def decoded():
    return hr.read_parquet(sys.argv[1]).apply(hr.images.decode("image", resize=256, crop=224))

if __name__ == "__main__":
    how = sys.argv[4]
    if how == "two passes":
        for name in ("a", "b"):
            ds = decoded().predict(Device, input="image", output=name, device="sim").drop("image")
            print(ds.write_parquet(f"{sys.argv[2]}/{name}", progress="quiet"))
    else:
        devices = {"a": "sim:0", "b": "sim:1"} if how == "one pass" else "sim"
        ds = decoded().predict({"a": Device, "b": Device}, input="image", device=devices).drop("image")
        print(ds.write_parquet(sys.argv[2], progress="quiet"))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2000)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = photographs(folder / "in", options.files, options.rows)
        (folder / "program.py").write_text(PROGRAM)

        def run(how: str) -> Timed:
            shutil.rmtree(folder / "out", ignore_errors=True)
            argv = [sys.executable, str(folder / "program.py"), str(data), str(folder / "out"), str(options.rate), how]
            return run_timed(argv)

        ways = ("one pass", "one pass, one device", "two passes")
        found = interleave({way: (lambda way=way: run(way)) for way in ways}, options.runs)
        figures = summary(found)
        for way in ways[:2]:
            figures[way]["ratio_to_two_passes"] = round(figures[way]["wall_s"] / figures["two passes"]["wall_s"], 3)
        print(found["one pass"][-1].out)
        print(json.dumps(figures, indent=2))
        record("two_models", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
