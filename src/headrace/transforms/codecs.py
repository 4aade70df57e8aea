"""Compressed image bytes to pixels, by the fastest well-kept decoder that gives what Pillow gives.

What lives here: one function from bytes to a uint8 array. Resizing lives in `resampling`, columns in `images`.

simplejpeg (libjpeg-turbo) reads JPEG, OpenCV reads PNG, Pillow all else: CMYK JPEG, GIF, WebP, BMP, TIFF, and whatever the
others refuse, so that a broken image's message is always Pillow's. All three release the GIL. Orientation tags are not
applied, as in `Image.open(...).convert(mode)`.

Invariant: no pixel memory is allocated before the size in the header has been checked.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np

Mode = Literal["RGB", "L"]

# Pillow refuses what is larger than twice its MAX_IMAGE_PIXELS (a quarter of a gigabyte of 24-bit pixels).
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)


@cache
def opencv() -> Any:
    """cv2, once its own threads are off: there is a worker per core already."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


class ImageRefused(Exception):
    """This image can't be decoded; the text says why. Callers say where it is."""


def decode_image(data: memoryview, mode: Mode, max_pixels: int) -> np.ndarray:
    """The pixels of one image: uint8 (height, width, 3 or 1), C-contiguous."""
    if len(data) == 0:
        raise ImageRefused("it is empty (0 bytes)")
    data = data.cast("B")  # Arrow's buffers are of signed bytes, which simplejpeg refuses
    head = bytes(data[:32])
    pixels = None
    if head.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg(data, mode, max_pixels)
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels = _png(data, head, mode, max_pixels)
    return _pillow(data, mode, max_pixels) if pixels is None else pixels


def _jpeg(data: memoryview, mode: Mode, max_pixels: int) -> np.ndarray | None:
    """None: not for libjpeg-turbo's quick path (CMYK), or broken."""
    import simplejpeg

    try:
        rows, columns, space, _ = simplejpeg.decode_jpeg_header(data)
        check_size(int(rows), int(columns), max_pixels)
        if space in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB" if mode == "RGB" else "GRAY", fastdct=False)
    except ValueError:
        return None


def _png(data: memoryview, head: bytes, mode: Mode, max_pixels: int) -> np.ndarray | None:
    """None: 16 bits a sample (Pillow's conversion differs), cut off, or broken."""
    cv2 = opencv()
    if len(head) < 26 or head[12:16] != b"IHDR":
        return None
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    check_size(height, width, max_pixels)
    # OpenCV gives a cut-off PNG back half empty without a word; Pillow refuses it. The last chunk tells.
    if head[24] == 16 or bytes(data[-8:-4]) != b"IEND":
        return None
    grey = mode == "L" and head[25] in (0, 4)
    flags = (cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB) | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if pixels is None or pixels.shape[:2] != (height, width):
        return None
    if mode == "L" and not grey:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _pillow(data: memoryview, mode: Mode, max_pixels: int) -> np.ndarray:
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image.height, image.width, max_pixels)
            if image.mode.startswith("I;16"):
                # Pillow clips 16-bit greys at 255; their high byte is the picture.
                pixels = (np.asarray(image) >> 8).astype(np.uint8)
                image = Image.fromarray(pixels)
            pixels = np.asarray(image.convert(mode))
    except UnidentifiedImageError:
        raise ImageRefused(f"it is no image that Pillow knows (begins with {bytes(data[:8])!r})") from None
    except ImageRefused:
        raise
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, ... for broken files
        raise ImageRefused(f"{type(error).__name__}: {error}") from error
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise ImageRefused for more pixels than that."""
    if height * width > max_pixels:
        raise ImageRefused(f"it is {width} x {height} = {width * height:,} pixels, more than max_pixels={max_pixels:,}")
