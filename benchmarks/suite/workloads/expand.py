"""Video-shaped: each row becomes 300, and two models, each on a device of its own, look at every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Devices, Expand, Model, Pipeline, Workload

SIDE = 48


def frames(batch: Arrays, count: int) -> tuple[dict[str, Any], Any]:
    """Clips, deflated, -> their frames, numbered."""
    import zlib

    import numpy as np

    clips = [np.frombuffer(zlib.decompress(clip), np.uint8).reshape(count, SIDE, SIDE, 3) for clip in batch["clip"]]
    number = np.tile(np.arange(count, dtype=np.int32), len(clips))
    return {"frame": number, "pixels": np.concatenate(clips)}, np.repeat(np.arange(len(clips)), count)


class Simulated:
    """A model on a device: a weighted sum of some pixels."""

    def __init__(self, name: str, rate: float, devices: int, weight: int) -> None:
        self._devices = Devices(rate, devices, f"device-{name}")
        self._weight = weight

    def __call__(self, pixels: Any) -> Any:
        self._devices.compute(len(pixels))
        return pixels[:, ::12, ::12].reshape(len(pixels), -1).sum(axis=1, dtype="int64") * self._weight


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    cut = Expand(
        "frames",
        frames,
        reads=("clip",),
        writes={"frame": Column("int32"), "pixels": Column("uint8", (SIDE, SIDE, 3))},
        args=(params["frames"],),
        drops=("clip",),
        rows=1,
    )
    rate, devices = params["rate"], params["devices"]
    annotate, classify = (
        Model(
            name,
            Simulated,
            args=(name, rate, devices, weight),
            input="pixels",
            writes={name: Column("int64")},
            drops=drops,
            rows=256,
            device=True,
            devices=devices,
            rate=rate,
        )
        for name, weight, drops in (("annotate", 1, ()), ("classify", 3, ("pixels",)))
    )
    return (Pipeline("expand", f"{data}/in", (cut, annotate, classify)),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    """clips of moving gradients, which deflate to a part of their size as video would."""
    import zlib

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    count = params["frames"]
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for file in range(params["files"]):
        clips: list[bytes] = []
        for row in range(params["rows"]):
            random = np.random.default_rng([file, row])
            speed = random.uniform(0.1, 2, 3)
            t = np.arange(count)[:, None, None, None]
            clip = (x[None, :, :, None] * speed + y[None, :, :, None] * speed[::-1] + t * speed * 3).astype(np.uint8)
            clips.append(zlib.compress((clip >> 3).tobytes(), 1))
        ids = np.arange(file * params["rows"], (file + 1) * params["rows"])
        table = pa.table({"id": ids, "clip": pa.array(clips, pa.binary()), "title": [f"clip {i}" for i in ids]})
        pq.write_table(table, folder / "in" / f"{file:03d}.parquet", compression="none", row_group_size=10)


WORKLOAD = Workload(
    "expand",
    "video-shaped: each row becomes 300, two models on two devices",
    make=make,
    pipelines=pipelines,
    params={"files": 4, "rows": 100, "frames": 300, "rate": 15_000.0, "devices": 1},
    small={"files": 2, "rows": 3},
    input_params=("files", "rows", "frames"),
    key=("id", "frame"),
)
