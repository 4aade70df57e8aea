"""The image pipeline: JPEGs in Parquet -> decode, resize, crop -> a simulated device -> label beside carry-over columns.

    python benchmarks/images.py [--runs 3] [--files 4] [--rows 1000] [--rate 2000] [--decoder headrace|pillow]

The device sleeps n/rate seconds for n images. Beside it a hand-written script of two processes that does the same with the same
decoder, its device being a lock that one process holds at a time. The ideal is max(decode CPU / cores, device time).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Timed, interleave, median, record, run_timed, summary

SHARED = """
import io, sys, time
import numpy as np

RATE = float(sys.argv[3])
DECODER = sys.argv[4]

def pillow(data):
    from PIL import Image
    image = Image.open(io.BytesIO(data)).convert("RGB")
    w, h = image.size
    s = 256 / min(w, h)
    image = image.resize((max(256, round(w * s)), max(256, round(h * s))), Image.BILINEAR)
    w, h = image.size
    left, top = (w - 224) // 2, (h - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)))
"""

OURS = (
    SHARED
    + '''
import headrace as hr

class Device:
    """Sleeps n/RATE seconds for n images, and notes when it was busy."""
    def __init__(self):
        self.first = self.last = None
        self.busy = 0.0
    def __call__(self, images):
        start = time.perf_counter()
        self.first = self.first or start
        time.sleep(len(images) / RATE)
        self.last = time.perf_counter()
        self.busy += self.last - start
        return images[:, 0, 0, 0].astype(np.int64)
    def close(self):
        print("DEVICE", self.busy, self.last - self.first, flush=True)

def decode(batch):
    return {**{k: v for k, v in batch.items() if k != "image"}, "image": np.stack([pillow(b) for b in batch["image"]])}

if __name__ == "__main__":
    ds = hr.read_parquet(sys.argv[1])
    if DECODER == "pillow":
        ds = ds.map_batches(decode)
    else:
        ds = ds.apply(hr.images.decode("image", resize=256, crop=224))
    ds = ds.predict(Device, input="image", output="label", device=sys.argv[5]).drop("image")
    run = ds.write_parquet(sys.argv[2], progress="quiet")
    print("ROWS", run.rows)
    print(run)
'''
)

SCRIPT = (
    SHARED
    + """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Lock
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(sys.argv[2])

def start(lock):
    global LOCK
    LOCK = lock

def fast(data):
    import cv2, simplejpeg
    cv2.setNumThreads(0)
    image = simplejpeg.decode_jpeg(data)
    h, w = image.shape[:2]
    s = 256 / min(w, h)
    image = cv2.resize(image, (max(256, round(w * s)), max(256, round(h * s))), interpolation=cv2.INTER_AREA)
    h, w = image.shape[:2]
    left, top = (w - 224) // 2, (h - 224) // 2
    return image[top:top + 224, left:left + 224]

def work(task):
    path, batch = task
    rows, decode = 0, pillow if DECODER == "pillow" else fast
    table = pq.read_table(path)
    labels = []
    for at in range(0, table.num_rows, batch):
        piece = table["image"].slice(at, batch)
        images = np.stack([decode(b.as_py()) for b in piece])
        with LOCK:
            time.sleep(len(images) / RATE)
        labels.append(images[:, 0, 0, 0].astype(np.int64))
    table = table.drop_columns(["image"]).append_column("label_out", pa.array(np.concatenate(labels)))
    pq.write_table(table, OUT / path.name)
    return table.num_rows

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sys.argv[1]).glob("*.parquet"))
    with ProcessPoolExecutor(2, initializer=start, initargs=(Lock(),)) as pool:
        print("ROWS", sum(pool.map(work, [(f, 64) for f in files])))
"""
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2000)
    parser.add_argument("--decoder", choices=["headrace", "pillow"], default="headrace")
    parser.add_argument("--device", default="sim")
    parser.add_argument("--data", type=Path, help="a folder of Parquet files with an image column, instead of made ones")
    parser.add_argument("--name", help="record under this name")
    parser.add_argument("--no-script", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        data = options.data or photographs(folder / "in", options.files, options.rows)
        (folder / "script.py").write_text(SCRIPT)
        (folder / "ours.py").write_text(OURS)

        def run(program: str) -> Timed:
            shutil.rmtree(folder / "out", ignore_errors=True)
            argv = [sys.executable, str(folder / program), str(data), str(folder / "out")]
            return run_timed([*argv, str(options.rate), options.decoder, options.device])

        commands = {"headrace": lambda: run("ours.py")}
        if not options.no_script:
            commands["script"] = lambda: run("script.py")
        found = interleave(commands, options.runs)
        rows = options.files * options.rows
        figures = summary(found)
        for name, runs in found.items():
            assert all(f"ROWS {rows}" in t.out for t in runs), runs[0].out
            figures[name]["images_per_s_whole_process"] = round(rows / figures[name]["wall_s"])
        lines = [line for t in found["headrace"] for line in t.out.splitlines() if "DEVICE" in line]
        spans = [[float(x) for x in line.split()[1:]] for line in lines]
        figures["headrace"]["device_busy_first_to_last"] = round(median([busy / span for busy, span in spans]), 4)
        figures["headrace"]["images_per_s_first_to_last"] = round(median([rows / span for _, span in spans]))
        per_core = decode_rate(data, options.decoder)
        ideal = max(rows / per_core / 2, rows / options.rate)
        limit = {"decode_images_per_s_core": round(per_core), "device_s": rows / options.rate, "ideal_s": round(ideal, 2)}
        figures["limit"] = limit
        figures["headrace"]["wall_over_ideal"] = round(figures["headrace"]["wall_s"] / ideal, 3)
        print(found["headrace"][-1].out)
        record(options.name or f"images-{options.decoder}-{options.rate:.0f}", figures)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def photographs(folder: Path, files: int, rows: int) -> Path:
    made = Path(__file__).parents[1] / "examples" / "photos.py"
    argv = [sys.executable, made, folder, "--files", str(files), "--rows", str(rows)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return folder


def decode_rate(data: Path, decoder: str) -> float:
    """Images per second of one core that does nothing but decode, measured in this run."""
    code = (
        SHARED
        + """
from pathlib import Path
import pyarrow.parquet as pq
import headrace as hr
batch = next(pq.ParquetFile(sorted(Path(sys.argv[1]).glob("*.parquet"))[0]).iter_batches(300, columns=["image"]))
decode = hr.images.decode("image", resize=256, crop=224)
def work(b):
    if DECODER == "pillow":
        return np.stack([pillow(x) for x in b.column(0).to_pylist()])
    return decode.apply(b)
work(batch.slice(0, 50))
start = time.process_time()
work(batch)
print(batch.num_rows / (time.process_time() - start))
"""
    )
    done = subprocess.run([sys.executable, "-c", code, data, "-", "1", decoder], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


if __name__ == "__main__":
    main()
