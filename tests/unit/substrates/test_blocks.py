"""Batches as bytes and as parts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import InternalError
from headrace.substrates.blocks import anonymous_bytes, decode, encode_into, encoded_bytes, own_copy, zip_parts


def rich_batch() -> pa.RecordBatch:
    n = 1000
    return pa.record_batch(
        {
            "i": pa.array(range(n), pa.int32()),
            "b": pa.array([None if i % 7 == 0 else i % 2 == 0 for i in range(n)]),
            "s": pa.array([f"text {i}" for i in range(n)]),
            "d": pa.array([f"k{i % 3}" for i in range(n)]).dictionary_encode(),
            "l": pa.array([[{"a": i}] * (i % 4) for i in range(n)]),
            "t": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3)),
            "v": pa.array([b"x" * (i % 50) for i in range(n)], pa.binary_view()),
        }
    ).replace_schema_metadata({"made by": "a test"})


@pytest.mark.parametrize("cut", [(0, 1000), (13, 500), (999, 1), (5, 0)])
def test_any_slice_survives(cut: tuple[int, int]) -> None:
    batch = rich_batch().slice(*cut)
    size = encoded_bytes(batch)
    buffer = pa.allocate_buffer(size)
    encode_into(buffer, batch)
    back = decode(buffer)
    assert back.equals(batch, check_metadata=True)
    back.validate(full=True)


def test_a_slice_takes_only_its_rows_along() -> None:
    batch = pa.record_batch({"x": np.zeros(1_000_000)})
    assert encoded_bytes(batch.slice(10, 10)) < 2000


def test_own_copy_shares_nothing() -> None:
    values = np.arange(10.0)
    copy = own_copy(pa.record_batch({"x": values}))
    values[:] = -1
    assert copy.column("x").to_pylist() == list(range(10))


def test_zip_selects_and_later_parts_replace() -> None:
    a = pa.record_batch({"x": [1, 2], "y": [3, 4]})
    b = pa.record_batch({"y": ["p", "q"], "z": [5, 6]})
    zipped = zip_parts([(("y", "x"), a), (("y", "z"), b)], 2)
    assert zipped.to_pydict() == {"y": ["p", "q"], "x": [1, 2], "z": [5, 6]}
    assert zip_parts([], 7).num_rows == 7
    with pytest.raises(InternalError, match="lacks column 'w'"):
        zip_parts([(("w",), a)], 2)


def test_anonymous_memory_of_the_gone_is_nothing() -> None:
    assert anonymous_bytes() > 1 << 20
