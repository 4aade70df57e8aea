"""Resize and centre crop, as torchvision does on Pillow images, but faster.

What lives here: the geometry of resize + crop, and the pixels of it. Decoding lives in `codecs`.

Pillow's bilinear filter, when it shrinks, is a triangle as wide as two output pixels. OpenCV has no such filter; its
INTER_LINEAR aliases and its INTER_AREA is a box, both several grey levels off on photographs. Where a cascade of OpenCV's
quick filters comes close to the triangle it is used (blur a little, interpolate linearly on a grid `grid` times as
fine, average); elsewhere Pillow itself. Only the window that the crop keeps is computed.

Invariants: the mean absolute difference from Pillow stays below one grey level on photographs
(tests/acceptance/test_images_vs_pillow.py); sizes and crop offsets are torchvision's exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from msgspec import Struct

from headrace.transforms.codecs import opencv

Size = int | tuple[int, int]

# How far to look for a grid line that falls on a source pixel's edge when only a window is interpolated. About one
# line in twenty falls within 1/40 of a pixel, and interpolating these few lines more costs little.
_ALIGN_LINES = 24
_ALIGNED_PIXELS = 0.03
# Lines beside the window that keep the border's clamping and the blur's edge out of it.
_MARGIN_LINES = 3
# Pixels repeated after a reduced image's end. Its last line may end within a pixel.
_EXTEND_PIXELS = 40


class Geometry(Struct, frozen=True):
    """Resize a (height, width) image to (rows, columns), then keep the window [top:bottom, left:right].

    The window may stick out of the resized image where that is smaller than the crop; what sticks out is black.
    """

    height: int
    width: int
    rows: int
    columns: int
    top: int
    left: int
    bottom: int
    right: int

    @property
    def out(self) -> tuple[int, int]:
        """(rows, columns) of the window."""
        return self.bottom - self.top, self.right - self.left


@lru_cache(maxsize=4096)
def geometry(height: int, width: int, resize: Size | None, crop: tuple[int, int] | None) -> Geometry:
    """torchvision's Resize (an int is the shorter side) and CenterCrop."""
    if resize is None:
        rows, columns = height, width
    elif isinstance(resize, tuple):
        rows, columns = resize
    elif width <= height:
        rows, columns = max(1, int(resize * height / width)), resize
    else:
        rows, columns = resize, max(1, int(resize * width / height))
    if crop is None:
        return Geometry(height, width, rows, columns, 0, 0, rows, columns)
    top, left = _centre(rows, crop[0]), _centre(columns, crop[1])
    return Geometry(height, width, rows, columns, top, left, top + crop[0], left + crop[1])


def _centre(have: int, want: int) -> int:
    """Where the crop starts. torchvision pads an image that is too small first: (want - have) // 2 before it."""
    if want > have:
        return -((want - have) // 2)
    return round((have - want) / 2.0)


def resample(image: np.ndarray, geo: Geometry, out: np.ndarray) -> None:
    """Write the window of the resized image into `out`.

    image: uint8 (height, width, channels).
    out: uint8 (rows, columns, channels), C-contiguous.
    """
    top, left = max(geo.top, 0), max(geo.left, 0)
    bottom, right = min(geo.bottom, geo.rows), min(geo.right, geo.columns)
    if (top, left, bottom, right) == (geo.top, geo.left, geo.bottom, geo.right):
        _window(image, geo, (top, left, bottom, right), out)
        return
    inner = np.empty((bottom - top, right - left, image.shape[2]), np.uint8)
    _window(image, geo, (top, left, bottom, right), inner)
    out[:] = 0
    out[top - geo.top : bottom - geo.top, left - geo.left : right - geo.left] = inner


def _window(image: np.ndarray, geo: Geometry, window: tuple[int, int, int, int], out: np.ndarray) -> None:
    top, left, bottom, right = window
    if (geo.height, geo.width) == (geo.rows, geo.columns):
        out[:] = image[top:bottom, left:right]
        return
    y = _axis(geo.height, geo.rows, top, bottom)
    x = _axis(geo.width, geo.columns, left, right)
    if y is None or x is None or (y.reduce, y.grid) != (x.reduce, x.grid):
        _by_pillow(image, geo, window, out)
    else:
        _by_opencv(image, y, x, (bottom - top, right - left), out)


class _Recipe(Struct, frozen=True):
    """Average `reduce` pixels; blur with (blur, 1 - 2 blur, blur); interpolate `grid` times as fine; average `grid`."""

    reduce: int
    grid: int
    blur: float


# Blurs that come closest to Pillow, by scale: found by search over the photographs that scikit-image and scikit-learn
# bundle, for the smallest worst case. Between the ranges no recipe stays well below one grey level even in the sharpest parts.
_GRID_2_LOW = ((1.3, 1.4, 1.5, 1.6), (0.0, 0.02, 0.04, 0.06))
_GRID_1 = ((1.8, 1.9, 2.0, 2.1, 2.15), (0.2, 0.225, 0.25, 0.275, 0.288))
_GRID_2_HIGH = ((2.4, 2.6, 2.8, 3.0), (0.225, 0.275, 0.31, 0.333))


@lru_cache(maxsize=4096)
def _recipe(scale: float) -> _Recipe | None:
    """How to shrink by `scale` with OpenCV, or None: let Pillow do it."""
    if scale <= 1.0:
        return _Recipe(1, 1, 0.0)
    reduce = max(1, int(scale / 2.4))  # 2.4 and more pixels are left to the triangle, or the box would show
    rest = scale / reduce
    spread = (1.0 - 1.0 / reduce**2) / 24.0  # what averaging has blurred already: half its variance in reduced pixels
    for grid, (scales, blurs) in ((2, _GRID_2_LOW), (1, _GRID_1), (2, _GRID_2_HIGH)):
        if scales[0] <= rest < scales[-1]:
            return _Recipe(reduce, grid, float(np.interp(rest, scales, blurs)) - spread)
    return None


def _reduce(image: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of factor x factor pixels; a last partial block is filled up with its edge."""
    cv2 = opencv()
    below, beside = -image.shape[0] % factor, -image.shape[1] % factor
    if below or beside:
        image = _channels(cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_REPLICATE))
    size = (image.shape[1] // factor, image.shape[0] // factor)
    return _channels(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _extend(image: np.ndarray) -> np.ndarray:
    """Repeat the last row and column, so that a part of a reduced image may end where it suits `_lines`."""
    cv2 = opencv()
    return _channels(cv2.copyMakeBorder(image, 0, _EXTEND_PIXELS, 0, _EXTEND_PIXELS, cv2.BORDER_REPLICATE))


def _by_opencv(image: np.ndarray, y: _Axis, x: _Axis, size: tuple[int, int], out: np.ndarray) -> None:
    cv2 = opencv()
    rows, columns = size
    if y.reduce > 1:
        image = _extend(_reduce(image, y.reduce))
    part = image[y.start : y.stop, x.start : x.stop]
    if y.blur > 0.01 or x.blur > 0.01:
        part = cv2.sepFilter2D(part, -1, _taps(x.blur), _taps(y.blur), borderType=cv2.BORDER_REPLICATE)
    fine = cv2.resize(part, (x.lines, y.lines), interpolation=cv2.INTER_LINEAR)
    fine = fine[y.skip : y.skip + rows * y.grid, x.skip : x.skip + columns * x.grid]
    if y.grid == 1:
        out[:] = _channels(fine)
    else:
        cv2.resize(fine, (columns, rows), dst=out, interpolation=cv2.INTER_AREA)


class _Axis(Struct, frozen=True):
    """One axis of the way through OpenCV: average by `reduce`, blur, interpolate pixels [start, stop) to `lines` lines,
    skip `skip` of them, average by `grid`.
    """

    reduce: int
    grid: int
    blur: float
    start: int
    stop: int
    lines: int
    skip: int


@lru_cache(maxsize=8192)
def _axis(pixels: int, count: int, first: int, last: int) -> _Axis | None:
    """How to make outputs [first, last) of the `count` that `pixels` are resized to, or None: let Pillow do it.

    cv2.resize maps a whole array on a whole array, so the part must start and end where the edge of a grid line falls
    on the edge of a pixel. The best such place near the window is taken, else the end of the axis.
    """
    recipe = _recipe(pixels / count)
    if recipe is None:
        return None
    extent, total = pixels / recipe.reduce, count * recipe.grid
    step = extent / total

    def off(line: int) -> float:
        return round(abs(line * step - round(line * step)), 2)

    low = max(first * recipe.grid - _MARGIN_LINES, 0)
    start = min(range(max(low - _ALIGN_LINES, 0), low + 1), key=lambda line: (off(line), -line))
    high = last * recipe.grid + _MARGIN_LINES
    if recipe.reduce == 1:
        high, limit = min(high, total), total
    else:  # a reduced image goes on after its last line, see _extend
        limit = int((-(-pixels // recipe.reduce) + _EXTEND_PIXELS) / step)
    stop = min(range(high, min(high + _ALIGN_LINES, limit) + 1), key=lambda line: (off(line), line))
    if off(start) > _ALIGNED_PIXELS:
        start = 0
    if off(stop) > _ALIGNED_PIXELS:
        if recipe.reduce > 1:
            return None
        stop = total
    return _Axis(
        recipe.reduce,
        recipe.grid,
        recipe.blur,
        round(start * step),
        round(stop * step),
        stop - start,
        first * recipe.grid - start,
    )


@lru_cache(maxsize=1024)
def _taps(blur: float) -> np.ndarray:
    return np.array([blur, 1.0 - 2.0 * blur, blur], np.float32)


def _by_pillow(image: np.ndarray, geo: Geometry, window: tuple[int, int, int, int], out: np.ndarray) -> None:
    from PIL import Image

    top, left, bottom, right = window
    y, x = geo.height / geo.rows, geo.width / geo.columns
    box = (left * x, top * y, min(right * x, geo.width), min(bottom * y, geo.height))
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    resized = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    out[:] = _channels(np.asarray(resized))


def _channels(image: np.ndarray) -> np.ndarray:
    """OpenCV and Pillow drop the axis of a single channel; put it back."""
    return image if image.ndim == 3 else image[:, :, None]
