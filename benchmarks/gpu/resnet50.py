"""ResNet-50 in bfloat16 on a GPU, end to end, beside the same model fed from memory: how much of the device the engine uses.

    python benchmarks/gpu/resnet50.py [--files 4] [--rows 1000] [--device cuda] [--batch 256]

Random weights: speed does not depend on them. Writes results/gpu-resnet50.json. `--device cpu --files 1 --rows 64` only tries
the script out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

from common import record  # noqa: E402
from photos import make_photos  # noqa: E402
from resnet50 import ResNet50  # noqa: E402

import headrace as hr  # noqa: E402


def engine_rate(folder: Path, out: Path, device: str, batch: int) -> tuple[float, float, Any]:
    """(images/s of the whole run, busy share of the device's pool, the Run)."""
    ds = hr.read_parquet(str(folder)).apply(hr.images.decode("image", resize=256, crop=224))
    ds = ds.predict(ResNet50, input="image", output=("class", "score"), batch_format="torch", batch_size=batch, device=device)
    started = time.perf_counter()
    run = ds.drop("image").write_parquet(str(out), fresh=True, progress="quiet")
    pool = next((p for p in run.pools if p.name == device.partition(":")[0]), run.pools[-1])
    return run.rows / (time.perf_counter() - started), pool.busy, run


def model_rate(device: str, batch: int, batches: int) -> float:
    """Images/s of the model alone on batches that are in memory, copies to the device included."""
    import torch

    model = ResNet50(device=device)
    images = torch.zeros((batch, 224, 224, 3), dtype=torch.uint8)
    model(images)
    started = time.perf_counter()
    for _ in range(batches):
        model(images)  # its answer comes back to the CPU, so that the device has finished
    return batch * batches / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_photos(Path(scratch, "in"), options.files, options.rows)
        rate, busy, run = engine_rate(folder, Path(scratch, "out"), options.device, options.batch)
    print(run)
    alone = model_rate(options.device, options.batch, max(2, options.files * options.rows // options.batch // 4))
    figures = {
        "device": options.device,
        "images_per_s_start_up_included": round(rate, 1),
        "device_busy_share": round(busy, 3),
        "model_alone_images_per_s": round(alone, 1),
    }
    record(f"gpu-resnet50{'' if options.device.startswith('cuda') else '-trial'}", figures)


if __name__ == "__main__":
    main()
