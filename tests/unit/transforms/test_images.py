"""Decoding: what every format gives, errors with their row, columns and their types. Closeness to Pillow's resizing on
photographs is measured in tests/acceptance/test_images_vs_pillow.py.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from headrace.contracts.transform import Transform
from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import is_ragged, ragged_to_numpy, tensor_to_numpy
from headrace.transforms import images


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 4 % 256, y * 5 % 256, (x + y) * 2 % 256], axis=2).astype(np.uint8)


def encoded(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or Image.fromarray(smooth())).save(buffer, kind, **options)
    return buffer.getvalue()


def batch(rows: Sequence[bytes | None], kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(rows, kind or pa.binary())], names=["image"])


def decoded(rows: Sequence[bytes], **options: Any) -> list[np.ndarray]:
    column = images.decode(**options).apply(batch(rows)).column("image")
    return list(ragged_to_numpy(column) if is_ragged(column.type) else tensor_to_numpy(column))


FORMATS = {
    "jpeg": encoded("JPEG", quality=95),
    "progressive jpeg": encoded("JPEG", quality=90, progressive=True),
    "grey jpeg": encoded("JPEG", Image.fromarray(smooth()).convert("L")),
    "cmyk jpeg": encoded("JPEG", Image.fromarray(smooth()).convert("CMYK")),
    "png": encoded("PNG"),
    "png with alpha": encoded("PNG", Image.fromarray(np.dstack([smooth(), np.full((40, 60), 99, np.uint8)]))),
    "palette png": encoded("PNG", Image.fromarray(smooth()).quantize(16)),
    "grey png": encoded("PNG", Image.fromarray(smooth()).convert("L")),
    "one-bit png": encoded("PNG", Image.fromarray(smooth()).convert("1")),
    "gif": encoded("GIF"),
    "webp": encoded("WEBP", lossless=True),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_what_pillow_gives(name: str, mode: Any) -> None:
    expected = np.asarray(Image.open(io.BytesIO(FORMATS[name])).convert(mode)).reshape(40, 60, -1).astype(int)
    (got,) = decoded([FORMATS[name]], mode=mode)
    assert got.shape == expected.shape
    difference = np.abs(got - expected)
    assert difference.max() <= (3 if "jpeg" in name else 1)  # decoders of JPEG may round differently
    assert difference.mean() < 0.6


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    deep = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    (got,) = decoded([encoded("PNG", Image.fromarray(deep))], mode="L")
    np.testing.assert_array_equal(got[:, :, 0], deep >> 8)


def test_orientation_tags_are_not_applied() -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    (jpeg, png) = decoded([encoded("JPEG", exif=tag), encoded("PNG", exif=tag)])
    assert jpeg.shape == png.shape == (40, 60, 3)


def test_fixed_size_output_is_a_tensor_column() -> None:
    transform = images.decode(resize=30, crop=24)
    made = transform.apply(batch([FORMATS["jpeg"], FORMATS["png"]]))
    assert made.schema == transform.schema(batch([]).schema)
    assert made.column("image").type == pa.fixed_shape_tensor(pa.uint8(), (24, 24, 3))
    assert transform.row_bytes == 24 * 24 * 3
    assert images.decode(resize=(10, 20), layout="CHW", mode="L").row_bytes == 200
    assert images.decode(resize=30).row_bytes is None


def test_output_of_any_size_is_a_ragged_column() -> None:
    transform = images.decode(resize=20, output="pixels")
    tall = encoded("PNG", Image.fromarray(smooth(90, 30)))
    made = transform.apply(batch([FORMATS["png"], tall]))
    assert made.schema == transform.schema(batch([]).schema)
    assert [row.shape for row in ragged_to_numpy(made.column("pixels"))] == [(20, 30, 3), (60, 20, 3)]
    assert transform.columns_in == ("image",)
    assert transform.columns_out == ("pixels",)


@pytest.mark.parametrize("options", [{"resize": 30, "crop": 20}, {"resize": (17, 23)}, {"crop": (50, 30)}, {}])
def test_chw_is_hwc_transposed(options: dict[str, Any]) -> None:
    rows = [FORMATS["png"], FORMATS["gif"]]
    for wide, deep in zip(decoded(rows, **options), decoded(rows, layout="CHW", **options), strict=True):
        np.testing.assert_array_equal(wide.transpose(2, 0, 1), deep)


def test_sizes_and_offsets_are_torchvisions() -> None:
    assert [decoded([FORMATS["png"]], resize=size)[0].shape[:2] for size in (25, 40, 41)] == [(25, 37), (40, 60), (41, 61)]
    (cropped,) = decoded([FORMATS["png"]], crop=(31, 17))  # tops at round(4.5) = 4 and round(21.5) = 22
    np.testing.assert_array_equal(cropped, smooth()[4:35, 22:39])
    (padded,) = decoded([FORMATS["png"]], crop=(45, 50))  # two black rows above, three below
    np.testing.assert_array_equal(padded[2:42], smooth()[:, 5:55])
    assert not padded[:2].any()
    assert not padded[42:].any()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_binary_columns_of_any_layout_and_slices(kind: pa.DataType) -> None:
    rows = batch([FORMATS["gif"], FORMATS["png"], FORMATS["bmp"]], kind).slice(1)
    transform = images.decode(crop=8)
    transform.schema(rows.schema)
    np.testing.assert_array_equal(tensor_to_numpy(transform.apply(rows).column("image"))[1], smooth()[16:24, 26:34])


def test_a_struct_with_bytes() -> None:
    rows = [{"bytes": FORMATS["gif"], "path": "a"}, {"bytes": FORMATS["png"], "path": None}]
    column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    transform = images.decode(crop=8)
    nested = pa.RecordBatch.from_arrays([column], names=["image"]).slice(1)
    transform.schema(nested.schema)
    np.testing.assert_array_equal(tensor_to_numpy(transform.apply(nested).column("image"))[0], smooth()[16:24, 26:34])
    missing = pa.RecordBatch.from_arrays([pa.array([*rows, None], column.type)], names=["image"])
    with pytest.raises(DataError, match="it is null") as caught:
        transform.apply(missing)
    assert ("row", "2") in caught.value.where


def test_it_is_a_transform_that_pickles() -> None:
    transform = images.decode("a", resize=[30, 40], crop=20)  # type: ignore[arg-type]
    assert isinstance(transform, Transform)
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert transform.apply(batch([]).rename_columns(["a"])).num_rows == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "it is null"),
        (b"", "it is empty"),
        (b"hello, world", "no image that Pillow knows"),
        (FORMATS["jpeg"][: len(FORMATS["jpeg"]) // 2], "(?i)truncated"),
        (FORMATS["png"][: len(FORMATS["png"]) // 2], "truncated"),
        (FORMATS["png"][:60] + b"\x00\x01\x02" + FORMATS["png"][63:], "can't be decoded"),
    ],
)
@pytest.mark.parametrize("options", [{"crop": 8}, {}])
def test_broken_images_name_their_row(data: bytes | None, reason: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        images.decode(**options).apply(batch([FORMATS["jpeg"], FORMATS["png"], data]))
    assert ("row", "2") in caught.value.where
    assert ("column", "image") in caught.value.where


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_images_beyond_max_pixels_are_refused_by_their_header(name: str) -> None:
    images.decode(max_pixels=2400).apply(batch([FORMATS[name]]))
    with pytest.raises(DataError, match="60 x 40 = 2,400 pixels, more than max_pixels=2,399"):
        images.decode(max_pixels=2399).apply(batch([FORMATS[name]]))


def test_a_png_that_claims_to_be_huge_is_refused_without_decoding() -> None:
    claim = FORMATS["png"][:16] + (1_000_000).to_bytes(4, "big") * 2 + FORMATS["png"][24:]
    with pytest.raises(DataError, match="1000000 x 1000000"):
        images.decode(crop=8).apply(batch([claim]))


def test_a_sliver_that_would_grow_huge_is_refused() -> None:
    out = io.BytesIO()
    Image.new("L", (20_000, 1)).save(out, "PNG")
    images.decode(crop=8).apply(batch([out.getvalue()]))
    with pytest.raises(DataError, match="pixels, more than max_pixels") as caught:
        images.decode(resize=256).apply(batch([FORMATS["png"], out.getvalue()]))
    assert ("row", "1") in caught.value.where


@pytest.mark.parametrize(
    "options",
    [{"mode": "CMYK"}, {"layout": "NCHW"}, {"resize": 0}, {"crop": (3, -1)}, {"crop": (1, 2, 3)}, {"max_pixels": 0}],
)
def test_senseless_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        images.decode(**options)


def test_other_column_types_are_refused() -> None:
    with pytest.raises(PlanError, match="column 'image' is string"):
        images.decode().schema(pa.schema([("image", pa.string())]))


def test_normalize_arrays() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    expected = ((pixels / 255 - images.IMAGENET_MEAN) / images.IMAGENET_STD).transpose(0, 3, 1, 2)
    made = images.normalize(pixels)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    np.testing.assert_allclose(made, expected, atol=1e-5)
    np.testing.assert_array_equal(images.normalize(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), layout="CHW"), made)
    assert images.normalize(pixels, dtype=np.float16).dtype == np.float16
    assert images.normalize(pixels[..., :1], mean=[0.5], std=[0.5]).shape == (2, 1, 5, 6)


def test_normalize_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    tensor = torch.from_numpy(pixels)
    made = images.normalize(tensor)
    assert made.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(made.numpy(), images.normalize(pixels), atol=1e-6)
    assert images.normalize(tensor, dtype=torch.bfloat16).dtype == torch.bfloat16
    planes = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)).contiguous(memory_format=torch.channels_last)
    before = planes.clone()
    np.testing.assert_allclose(images.normalize(planes, layout="CHW").numpy(), made.numpy(), atol=1e-6)
    assert torch.equal(planes, before)


def test_normalize_refuses_statistics_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1 channels"):
        images.normalize(np.zeros((1, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        images.normalize(np.zeros((4, 4, 3), np.uint8))
