"""JPEGs in Parquet -> decode, resize, crop -> a model on a device -> its answer beside the carried columns."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Devices, Map, Model, Pipeline, Workload

RESIZE, CROP = 256, 224
_SEEDED = threading.Lock()  # Torch's generator is the process's


def pillow(batch: Arrays) -> dict[str, Any]:
    """As one writes it: the shorter side to 256, the centre of 224 x 224, uint8."""
    import io

    import numpy as np
    from PIL import Image

    made: list[Any] = []
    for data in batch["image"]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = _size(*image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - CROP) // 2, (height - CROP) // 2
        made.append(np.asarray(image.crop((left, top, left + CROP, top + CROP))))
    return {"pixels": np.stack(made)}


def simplejpeg(batch: Arrays) -> dict[str, Any]:
    """The same with the quickest decoder there is for Python, and OpenCV."""
    import cv2
    import numpy as np
    import simplejpeg

    cv2.setNumThreads(0)
    made: list[Any] = []
    for data in batch["image"]:
        image = simplejpeg.decode_jpeg(data)
        width, height = _size(image.shape[1], image.shape[0])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        left, top = (width - CROP) // 2, (height - CROP) // 2
        made.append(image[top : top + CROP, left : left + CROP])
    return {"pixels": np.stack(made)}


def _size(width: int, height: int) -> tuple[int, int]:
    scale = RESIZE / min(width, height)
    return max(RESIZE, round(width * scale)), max(RESIZE, round(height * scale))


class Simulated:
    """A model on a device that does `rate` images a second; its answer depends on the pixels."""

    def __init__(self, rate: float, devices: int) -> None:
        self._devices = Devices(rate, devices)

    def __call__(self, pixels: Any) -> Any:
        self._devices.compute(len(pixels))
        return pixels[:, ::56, ::56].reshape(len(pixels), -1).sum(axis=1, dtype="int64")


class ResNet50:
    """The real one, in bfloat16, channels last; weights by a seed, as speed does not depend on them. The answer is the highest
    logit.

    `threads`: Torch's, which are the process's: several in a process share what the last one set. device: "cpu" or "cuda".
    """

    takes_threads = True

    def __init__(self, device: str, threads: int = 1) -> None:
        import torch
        from transformers import ResNetConfig, ResNetForImageClassification

        if device == "cpu":
            torch.set_num_threads(threads)
        with _SEEDED:
            torch.manual_seed(0)
            module = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
        self._module = module.to(device, dtype=torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1) * 255

    def __call__(self, pixels: Any) -> Any:
        import torch

        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of read-only arrays, which it could write to
            images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
            images = ((images - self._mean) / self._std).to(torch.bfloat16, memory_format=torch.channels_last)
            return self._module(images).logits.float().amax(dim=1).cpu().numpy()


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    decode = Map(
        "decode",
        {"pillow": pillow, "simplejpeg": simplejpeg}[params["decoder"]],
        reads=("image",),
        writes={"pixels": Column("uint8", (CROP, CROP, 3))},
        drops=("image",),
        rows=64,
        own={"kind": "decode", "resize": RESIZE, "crop": CROP},
    )
    on_device = {"device": True, "devices": params["devices"]}
    made, more = {
        "simulated": (Simulated, {"args": (params["rate"], params["devices"]), "rate": params["rate"], **on_device}),
        "resnet50": (ResNet50, {"args": ("cpu",)}),
        "resnet50-cuda": (ResNet50, {"args": ("cuda",), **on_device}),
    }[params["model"]]
    writes = {"answer": Column("int64")} if made is Simulated else {"score": Column("float32")}
    model = Model("model", made, input="pixels", writes=writes, drops=("pixels",), **more)  # type: ignore[arg-type]
    return (Pipeline("images", f"{data}/in", (decode, model)),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    maker = Path(__file__).parents[3] / "examples" / "photos.py"
    argv = [sys.executable, str(maker), str(folder / "in"), "--files", str(params["files"]), "--rows", str(params["rows"])]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


WORKLOAD = Workload(
    "images",
    "JPEGs decoded, resized and cropped for a model on a device",
    make=make,
    pipelines=pipelines,
    params={"files": 4, "rows": 1000, "decoder": "pillow", "model": "simulated", "rate": 2000.0, "devices": 1},
    small={"files": 2, "rows": 60},
    input_params=("files", "rows"),
    variants={
        "simplejpeg": {"decoder": "simplejpeg"},
        "slow-device": {"rate": 300.0},
        "resnet50": {"model": "resnet50", "rows": 250},
        "resnet50-cuda": {"model": "resnet50-cuda", "decoder": "simplejpeg"},
    },
    start_s=0.5,
    tolerance={"score": (0.05, 0.0)},
    own_tolerance={"answer": (0.2, 200.0), "score": (0.2, 0.0)},
)
