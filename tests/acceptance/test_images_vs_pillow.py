"""Resizing stays within one grey level of Pillow's antialiased bilinear on average, on real photographs at many scales."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from headrace.core.tensors import tensor_to_numpy
from headrace.transforms import images
from headrace.transforms.resampling import geometry, resample

UP = (0.4, 0.7, 0.95)
DOWN = (1.05, 1.2, 1.35, 1.4648, 1.5, 1.502, 1.6, 1.7, 1.8, 2, 2.008, 2.2, 2.4, 2.7, 3, 3.5, 4, 5, 6.5, 7.5, 8, 10)


@cache
def photographs() -> dict[str, np.ndarray]:
    """Those that come inside the two packages, odd sizes and a grey one among them."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    found = {f"sklearn-{i}": np.ascontiguousarray(image) for i, image in enumerate(load_sample_images().images)}
    for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png"):
        if (folder / name).exists():
            found[name] = np.asarray(Image.open(folder / name).convert("RGB"))
    found["odd"] = np.ascontiguousarray(found["sklearn-0"][:411, :607])
    found["grey"] = np.asarray(Image.fromarray(found["sklearn-1"]).convert("L"))[:, :, None]
    return found


def pillow(photo: np.ndarray, rows: int, columns: int) -> np.ndarray:
    picture = Image.fromarray(photo if photo.shape[2] == 3 else photo[:, :, 0])
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BILINEAR)).reshape(rows, columns, -1).astype(int)


@pytest.mark.parametrize("scale", UP + DOWN)
def test_whole_and_cropped_photographs_at_every_scale(scale: float) -> None:
    for name, photo in photographs().items():
        height, width = photo.shape[:2]
        side = int(min(height, width) / scale)
        expected = None
        for crop in (None, (int(side * 0.875),) * 2, (side - 1, side)):
            geo = geometry(height, width, side, crop)
            if expected is None:
                expected = pillow(photo, geo.rows, geo.columns)
            got = np.empty((*geo.out, photo.shape[2]), np.uint8)
            resample(photo, geo, got)
            error = np.abs(got - expected[geo.top : geo.bottom, geo.left : geo.right]).mean()
            assert error < 1.0, (name, scale, crop, error)


@pytest.mark.parametrize("size", [(224, 224), (256, 171), (100, 600), (640, 427), (37, 53)])
def test_sizes_that_change_the_shape(size: tuple[int, int]) -> None:
    for name, photo in photographs().items():
        geo = geometry(*photo.shape[:2], size, None)
        got = np.empty((*geo.out, photo.shape[2]), np.uint8)
        resample(photo, geo, got)
        error = np.abs(got - pillow(photo, *size)).mean()
        assert error < 1.0, (name, size, error)


def test_random_sizes_never_shift_the_picture() -> None:
    """An offset of a tenth of a pixel in the part that is interpolated would show in the sharpest photograph."""
    photo = photographs()["sklearn-0"]
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.integers(200, photo.shape[0]), rng.integers(200, photo.shape[1])
        part = np.ascontiguousarray(photo[:height, :width])
        side = int(rng.integers(40, 300))
        geo = geometry(int(height), int(width), side, (int(side * rng.uniform(0.5, 1)), int(side * rng.uniform(0.5, 1))))
        got = np.empty((*geo.out, 3), np.uint8)
        resample(part, geo, got)
        expected = pillow(part, geo.rows, geo.columns)[geo.top : geo.bottom, geo.left : geo.right]
        assert np.abs(got - expected).mean() < 1.0, geo


def test_the_standard_pipeline_from_jpeg_bytes() -> None:
    photos = [photo for photo in photographs().values() if photo.shape[2] == 3]
    files = []
    for photo in photos:
        buffer = io.BytesIO()
        Image.fromarray(photo[:375, :500]).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    batch = pa.RecordBatch.from_arrays([pa.array(files, pa.binary())], names=["image"])
    got = tensor_to_numpy(images.decode("image", resize=256, crop=224).apply(batch).column("image"))
    for data, row in zip(files, got, strict=True):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        geo = geometry(picture.height, picture.width, 256, (224, 224))
        expected = pillow(np.asarray(picture), geo.rows, geo.columns)[geo.top : geo.bottom, geo.left : geo.right]
        assert np.abs(row - expected).mean() < 1.0
