"""The quick decoders are really used on what a reader hands over, not Pillow in their place."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from headrace.transforms import codecs, images


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_common_formats_do_not_fall_back_to_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)

    def refuse(*_: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(codecs, "_pillow", refuse)
    batch = pa.record_batch({"image": pa.array([out.getvalue()] * 3, pa.binary())})
    made = images.decode("image", resize=(40, 50)).apply(batch)
    assert made.num_rows == 3
