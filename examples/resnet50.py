"""The field's image benchmark: JPEG in Parquet -> resize 256, crop 224, normalise -> ResNet-50 -> top-1 -> Parquet.

    python examples/resnet50.py                                    200 photographs on this machine
    python examples/resnet50.py --files 8 --rows 1000 --weights resnet50.safetensors

Needs headrace[images,transformers], and headrace[test] for the photographs when --input is not given. Weights: a
safetensors file of Transformers' ResNetForImageClassification (microsoft/resnet-50); random with a fixed seed otherwise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headrace as hr

if TYPE_CHECKING:
    import torch


class ResNet50:
    """Top-1 class and its probability. bfloat16 autocast and channels_last, on the device that the worker holds."""

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        import torch
        from transformers import ResNetConfig, ResNetForImageClassification

        self.torch = torch
        self.device = torch.device(device)
        torch.manual_seed(0)
        # ResNetConfig's defaults are ResNet-50's; ImageNet has 1,000 classes.
        model: Any = ResNetForImageClassification(ResNetConfig.from_dict({"num_labels": 1000}))
        if weights is not None:
            from safetensors.torch import load_file

            model.load_state_dict(load_file(weights))
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """image: uint8 (rows, 224, 224, 3)."""
        torch = self.torch
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=torch.bfloat16):
            # uint8 goes to the device, a quarter of float32's bytes, and is normalised there.
            logits = self.model(hr.images.normalize(image.to(self.device))).logits
            score, label = logits.float().softmax(dim=1).max(dim=1)
        return {"class": label.cpu(), "score": score.cpu()}


def main() -> None:
    args = _arguments()
    folder = args.input
    if folder is None:
        from photos import make_photos

        folder = str(make_photos(Path(".headrace-demo") / f"photos-{args.files}x{args.rows}", args.files, args.rows))
    if args.weights is None:
        print("Weights: random with a fixed seed (--weights gives real ones), so the classes mean nothing.")
    started = time.perf_counter()
    run = (
        hr.read_parquet(folder)
        .apply(hr.images.decode("image", resize=256, crop=224))
        .predict(
            ResNet50,
            input="image",
            output=("class", "score"),
            batch_format="torch",
            batch_size=args.batch or "auto",
            device=args.device,
            constructor_kwargs={"weights": args.weights},
        )
        .drop("image")
        .write_parquet(args.output, fresh=True)
    )
    wall_s = time.perf_counter() - started
    hr.read_parquet(args.output).show(5)
    print(f"\n{run.rows:,} images in {wall_s:.1f} s, start-up included: {run.rows / wall_s:,.1f} img/s\n")
    print(run)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", help="Parquet with a binary column `image`; photographs are made if not given")
    parser.add_argument("--output", default=".headrace-demo/resnet50")
    parser.add_argument("--weights", help="safetensors file of ResNetForImageClassification")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--files", type=int, default=1, help="files of photographs to make")
    parser.add_argument("--rows", type=int, default=200, help="photographs in each")
    parser.add_argument("--batch", type=int, help="rows for each call of the model; found while running if not given")
    return parser.parse_args()


if __name__ == "__main__":
    main()
