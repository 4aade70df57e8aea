"""The work itself, the same functions for every contestant: decoding, a simulated device, scoring, doubling a column.

Nothing here knows an engine. Each function and model notes its calls (start, end, rows) in a file of its process under `log`,
named by its stage: when the first one ended, and what a rate looks like inside of a run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = [f"f{i:02d}" for i in range(30)]
SIZE = 224
WORKLOADS = ("images", "tabular", "small_files")


class Calls:
    """Notes of calls."""

    def __init__(self, stage: str, log: str) -> None:
        Path(log).mkdir(parents=True, exist_ok=True)
        self._file = open(f"{log}/{stage}-{os.getpid()}", "a", buffering=1)  # noqa: SIM115 (open as long as the worker)

    def note(self, start: float, rows: int) -> None:
        self._file.write(f"{start} {time.time()} {rows}\n")


_CALLS: dict[tuple[str, str], Calls] = {}


def calls(stage: str, log: str) -> Calls:
    """Of this process."""
    if (stage, log) not in _CALLS:
        _CALLS[stage, log] = Calls(stage, log)
    return _CALLS[stage, log]


# -- images


def decode_one(data: bytes) -> np.ndarray:
    """JPEG -> (224, 224, 3) uint8: shorter side to 256, centre crop."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)
    image = simplejpeg.decode_jpeg(data)
    height, width = image.shape[:2]
    scale = 256 / min(width, height)
    image = cv2.resize(image, (max(256, round(width * scale)), max(256, round(height * scale))), interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return image[top : top + SIZE, left : left + SIZE]


def decode(table: pa.Table, log: str) -> pa.Table:
    start = time.time()
    images = np.stack([decode_one(data.as_py()) for data in table["image"]])
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    calls("decode", log).note(start, len(images))
    return table.set_column(table.schema.get_field_index("image"), "image", column)


def decode_arrays(batch: dict[str, np.ndarray], log: str) -> dict[str, Any]:
    start = time.time()
    images = np.stack([decode_one(data) for data in batch["image"]])
    calls("decode", log).note(start, len(images))
    return {**batch, "image": images}


class Device:
    """An accelerator that does `rate` images a second: it sleeps."""

    def __init__(self, rate: float, log: str) -> None:
        self._rate = rate
        self._calls = calls("device", log)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        start = time.time()
        time.sleep(len(images) / self._rate)
        self._calls.note(start, len(images))
        return images[:, 0, 0, 0].astype(np.int64)


# -- tabular


class Scorer:
    """Gradient boosting on one thread."""

    def __init__(self, model: str, log: str) -> None:
        import xgboost

        self._model = xgboost.Booster(model_file=model)
        self._model.set_param({"nthread": 1})
        self._calls = calls("score", log)

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        start = time.time()
        scores = self._model.inplace_predict(np.column_stack([batch[name] for name in FEATURES]))
        self._calls.note(start, len(scores))
        return scores


# -- small files


def double(batch: dict[str, np.ndarray], log: str) -> dict[str, np.ndarray]:
    start = time.time()
    done = {**batch, "y": batch["x"] * 2.0}
    calls("double", log).note(start, len(batch["x"]))
    return done


# -- without any engine


def bare(workload: str, path: Path, out: Path, model: Any) -> int:
    """All CPU work on one file, in memory at once: what no engine can do without. Returns the rows."""
    table = pq.read_table(path, use_threads=False)
    if workload == "images":
        labels: list[np.ndarray] = []
        for at in range(0, table.num_rows, 64):
            images = np.stack([decode_one(data.as_py()) for data in table["image"].slice(at, 64)])
            labels.append(images[:, 0, 0, 0].astype(np.int64))
        table = table.drop_columns(["image"]).append_column("out", pa.array(np.concatenate(labels)))
    elif workload == "tabular":
        scores = model({name: table[name].to_numpy() for name in FEATURES})
        table = table.append_column("out", pa.array(scores))
    else:
        table = table.append_column("y", pa.array(table["x"].to_numpy() * 2.0))
    pq.write_table(table, out / path.name)
    return table.num_rows
