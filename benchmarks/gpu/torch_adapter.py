"""hr.models.Torch on a GPU: how near the engine comes to the model alone, and what keeping a batch ahead is worth.

    python benchmarks/gpu/torch_adapter.py [--files 4] [--rows 1000] [--device cuda] [--batch 256]

ResNet-50 with random weights (speed does not depend on them), bfloat16, channels_last, normalised on the device. Rates of
images a second: `resident` computes on a batch that is on the device already; `called` copies each batch there and waits for
its answer; `ahead` keeps one batch ahead (submit, collect); the engine's reads JPEG and writes Parquet. The device's busy share
is that of its pool; the share of `resident` that the engine reaches says the same by the clock. Writes
results/gpu-torch_adapter.json.
`--device cpu --files 1 --rows 32 --batch 8` only tries the script out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

import numpy as np  # noqa: E402
from common import record  # noqa: E402
from photos import make_photos  # noqa: E402

import headrace as hr  # noqa: E402
from headrace.contracts.model import Place  # noqa: E402


def resnet50() -> Any:
    """Top-1 class and its probability of normalised images."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    class ResNet50(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            # ResNetConfig's defaults are ResNet-50's; ImageNet has 1,000 classes.
            self.net = ResNetForImageClassification(ResNetConfig.from_dict({"num_labels": 1000}))

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            score, label = self.net(images).logits.float().softmax(dim=1).max(dim=1)
            return {"class": label, "score": score}

    return ResNet50()


def engine_rate(adapter: Any, folder: Path, out: Path, device: str, batch: int) -> tuple[float, float, Any]:
    """(images/s of the whole run, busy share of the device's pool, the Run)."""
    ds = hr.read_parquet(str(folder)).apply(hr.images.decode("image", resize=256, crop=224))
    ds = ds.predict(adapter, input="image", output=("class", "score"), batch_size=batch, device=device)
    started = time.perf_counter()
    run = ds.drop("image").write_parquet(str(out), fresh=True, progress="quiet")
    pool = next((p for p in run.pools if p.name == device.partition(":")[0]), run.pools[-1])
    return run.rows / (time.perf_counter() - started), pool.busy, run


def alone(adapter: Any, device: str, batch: int, batches: int) -> dict[str, float]:
    """Images/s of the model without the engine."""
    import torch

    model = adapter.load(Place(device, threads=torch.get_num_threads(), inputs=("image",)))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8))

    def called() -> None:
        for _ in range(batches):
            model(images)

    def ahead() -> None:
        under_way = model.submit(images)
        for _ in range(batches - 1):
            later = model.submit(images)
            model.collect(under_way)
            under_way = later
        model.collect(under_way)

    here = images.to(device)

    def resident() -> None:
        with torch.inference_mode(), model._precision():
            for _ in range(batches):
                made = model._module(model._prepared(here))
        made["score"].cpu()  # the device has finished

    rates = {
        name: _rate(work, batch * batches) for name, work in (("resident", resident), ("called", called), ("ahead", ahead))
    }
    model.close()
    return rates


def _rate(work: Callable[[], None], rows: int) -> float:
    """The best of three, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return round(rows / best, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    adapter = hr.models.Torch(resnet50(), normalize="imagenet", dtype="bfloat16", channels_last=True)
    device = "cuda:0" if options.device == "cuda" else options.device
    rates = alone(adapter, device, options.batch, max(2, options.files * options.rows // options.batch // 4))
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_photos(Path(scratch, "in"), options.files, options.rows)
        rate, busy, run = engine_rate(adapter, folder, Path(scratch, "out"), options.device, options.batch)
    print(run)
    figures = {
        "device": options.device,
        "images_per_s_alone": rates,
        "images_per_s_start_up_included": round(rate, 1),
        "device_busy_share": round(busy, 3),
        "share_of_resident": round(rate / rates["resident"], 3),
    }
    record(f"gpu-torch_adapter{'' if options.device.startswith('cuda') else '-trial'}", figures)


if __name__ == "__main__":
    main()
