"""`hr.images`: decode compressed images into uint8 tensors on the CPU, normalise them on the model's device.

What lives here: the public functions and the column handling. Pixels come from `codecs`, sizes from `resampling`.

Invariants: rows are independent, and the output is a function of the bytes and the arguments alone. Images travel as uint8:
a quarter of float32's bytes over every hop; `normalize` belongs inside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from msgspec import Struct

from headrace.core.errors import DataError, PlanError
from headrace.core.extras import require
from headrace.core.tensors import numpy_to_array, ragged_to_array, ragged_type
from headrace.transforms.codecs import MAX_PIXELS, ImageRefused, Mode, check_size, decode_image
from headrace.transforms.resampling import Size, geometry, resample

if TYPE_CHECKING:
    import torch

Layout = Literal["HWC", "CHW"]
BYTES = "bytes"  # of a struct: images lie so in Parquet files of Hugging Face's datasets, beside their "path"

# Per-channel statistics of ImageNet's training images, as used by torchvision and Transformers.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode(
    column: str = "image",
    *,
    resize: Size | None = None,
    crop: Size | None = None,
    mode: Mode = "RGB",
    layout: Layout = "HWC",
    output: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DecodeImages:
    """Decode a binary column of JPEG, PNG, GIF, WebP, BMP or TIFF images, resize, crop at the centre: uint8 tensors.

    The column may also be a struct with such a field "bytes", as Hugging Face's datasets have it.

    resize: the shorter side in pixels, or (height, width); antialiased bilinear; photographs are within one grey level on
    average of Pillow's and thus of torchvision's `Resize` on Pillow images. crop: a side, or (height, width); what a smaller
    image lacks is black. Sizes and offsets are torchvision's.
    mode: "RGB" or "L" (grey). layout: "HWC" or "CHW"; the channel axis is there for grey, too (its length is 1).
    output: the column to make, `column` itself if None. Orientation tags are not applied (as Pillow and torchvision).
    max_pixels: a larger image is refused before it is decoded.

    The column is a fixed-shape tensor column when all outputs have one size (crop, or resize to (height, width)),
    otherwise a ragged one. Use: `ds.apply(hr.images.decode("image", resize=256, crop=224))`.

    Raises PlanError for arguments that make no sense, and where the packages of headrace[images] are missing; DataError at
    run time, with the row and the decoder's reason.
    """
    require("images", "images.decode")
    if mode not in ("RGB", "L"):
        raise PlanError(f"images.decode: mode is {mode!r}", hint='use mode="RGB" or mode="L"')
    if layout not in ("HWC", "CHW"):
        raise PlanError(f"images.decode: layout is {layout!r}", hint='use layout="HWC" or layout="CHW"')
    if max_pixels < 1:
        raise PlanError(f"images.decode: max_pixels is {max_pixels}", hint="give a positive number of pixels")
    size, window = _size("resize", resize), _size("crop", crop)
    return DecodeImages(
        column=column,
        output=column if output is None else output,
        resize=size,
        crop=(window, window) if isinstance(window, int) else window,
        mode=mode,
        layout=layout,
        max_pixels=max_pixels,
    )


class DecodeImages(Struct, frozen=True):
    """The Transform that `decode` makes; see there."""

    column: str
    output: str
    resize: Size | None
    crop: tuple[int, int] | None
    mode: Mode
    layout: Layout
    max_pixels: int
    name: str = "images.decode"

    @property
    def columns_in(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def columns_out(self) -> tuple[str, ...]:
        return (self.output,)

    @property
    def fixed_shape(self) -> tuple[int, int, int] | None:
        """The shape of every output, None when it depends on the image."""
        size = self.crop if self.crop is not None else self.resize
        if not isinstance(size, tuple):
            return None
        return (*size, self._channels) if self.layout == "HWC" else (self._channels, *size)

    @property
    def row_bytes(self) -> int | None:
        shape = self.fixed_shape
        return None if shape is None else shape[0] * shape[1] * shape[2]

    def schema(self, schema: pa.Schema) -> pa.Schema:
        kind = schema.field(self.column).type
        if not _is_binary(kind) and not _holds_bytes(kind):
            raise PlanError(
                f"images.decode reads compressed image bytes, but column {self.column!r} is {kind}",
                hint=f"give a binary column, or a struct with one named {BYTES!r}; hr.read_images reads image files into one",
            )
        shape = self.fixed_shape
        made = ragged_type(pa.uint8()) if shape is None else pa.fixed_shape_tensor(pa.uint8(), shape)
        return pa.schema([pa.field(self.output, made)])

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        column = batch.column(self.column)
        if pa.types.is_struct(column.type):
            column = column.flatten()[column.type.get_field_index(BYTES)]  # null where the struct is
        made = self._fixed(column) if self.fixed_shape is not None else self._ragged(column)
        return pa.RecordBatch.from_arrays([made], names=[self.output])

    @property
    def _channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

    def _fixed(self, column: pa.Array) -> pa.Array:
        shape = self.fixed_shape
        assert shape is not None
        images = np.empty((len(column), *shape), np.uint8)
        for row in range(len(column)):
            self._one(column, row, images[row])
        return numpy_to_array(images)

    def _ragged(self, column: pa.Array) -> pa.Array:
        return ragged_to_array([self._one(column, row, None) for row in range(len(column))], pa.uint8())

    def _one(self, column: pa.Array, row: int, out: np.ndarray | None) -> np.ndarray:
        """Decode one row into `out`, or into an array of its own."""
        value = column[row]
        try:
            if not value.is_valid:
                raise ImageRefused("it is null")
            image = decode_image(memoryview(value.as_buffer()), self.mode, self.max_pixels)
            geo = geometry(image.shape[0], image.shape[1], self.resize, self.crop)
            check_size(*geo.out, self.max_pixels)  # a sliver of an image grows without bounds when its shorter side is resized
        except ImageRefused as error:
            raise DataError(
                f"an image in column {self.column!r} can't be decoded: {error}",
                where=(("column", self.column), ("row", str(row))),
                hint="mend or remove that row, for example with ds.filter(...) before the decoding",
            ) from error
        if self.layout == "HWC":
            target = np.empty((*geo.out, self._channels), np.uint8) if out is None else out
            resample(image, geo, target)
            return target
        pixels = np.empty((*geo.out, self._channels), np.uint8)
        resample(image, geo, pixels)
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)) if out is None else out
        if out is not None:
            planes[:] = pixels.transpose(2, 0, 1)
        return planes


def normalize(
    batch: Any,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    layout: Layout = "HWC",
    dtype: Any = None,
) -> Any:
    """(x / 255 - mean) / std of a batch of uint8 images, where the batch lives: call it inside the model.

    batch: torch tensor on any device, or NumPy array; uint8 (n, h, w, c) for layout "HWC", (n, c, h, w) for "CHW".
    Returns (n, c, h, w) of `dtype` (float32 if None): a torch tensor in channels_last memory on the batch's device, a NumPy
    array in C order. Computed in float32 whatever `dtype` is. Raises ValueError when shape and statistics don't fit.
    """
    if len(batch.shape) != 4:
        raise ValueError(f"normalize: the batch has shape {tuple(batch.shape)}; it must be (n, h, w, c) or (n, c, h, w)")
    channels = batch.shape[3 if layout == "HWC" else 1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"normalize: {channels} channels in layout {layout!r}, but {len(mean)} means and {len(std)} standard deviations"
        )
    scale = [1.0 / (255.0 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    if isinstance(batch, np.ndarray):
        images = batch.transpose(0, 3, 1, 2) if layout == "HWC" else batch
        made = images.astype(np.float32, order="C")
        made *= np.asarray(scale, np.float32)[:, None, None]
        made += np.asarray(shift, np.float32)[:, None, None]
        return made if dtype is None else made.astype(dtype, copy=False)
    return _normalize_torch(batch, scale, shift, layout, dtype)


def _normalize_torch(batch: torch.Tensor, scale: list[float], shift: list[float], layout: Layout, dtype: Any) -> Any:
    import torch

    images = batch.permute(0, 3, 1, 2) if layout == "HWC" else batch
    made = images.to(dtype=torch.float32, memory_format=torch.channels_last)
    if made is batch:
        made = made.clone()  # a float32 batch comes back from .to() as it is; the caller's pixels stay
    shape = (1, -1, 1, 1)
    made.mul_(torch.tensor(scale, device=made.device).view(shape)).add_(torch.tensor(shift, device=made.device).view(shape))
    return made if dtype is None else made.to(dtype)


def _size(name: str, size: Size | None) -> Size | None:
    """The size as an int or a tuple of two, checked."""
    if size is None:
        return None
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) > 2 or not sides or any(not isinstance(side, int) or side < 1 for side in sides):
        raise PlanError(f"images.decode: {name} is {size!r}", hint=f"give {name} as pixels, or as (height, width)")
    return size if isinstance(size, int) else (sides[0], sides[-1])


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(BYTES) >= 0 and _is_binary(kind.field(BYTES).type)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
