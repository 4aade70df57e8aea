"""Packing: objects that are divided."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.connectors import packing
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.storage import Stored
from headrace.core.errors import DataError
from headrace.core.splits import Fragment

LARGE = packing.DIVIDE_OVER_BYTES + 1


def objects(*sizes: int) -> list[Stored]:
    return [Stored(f"s3://b/{i:03d}", size, f'"{i}"', str(i)) for i, size in enumerate(sizes)]


def halves(o: Stored) -> list[Fragment]:
    return [Fragment(o.uri, o.size, o.version, start, start + 1, 10, o.name) for start in (0, 1)]


@pytest.mark.parametrize("sizes", [(), (1,), (LARGE,), (1, LARGE, 1, 1, LARGE, LARGE), (*[LARGE] * 40, *[1] * 40)])
def test_the_same_splits_as_one_after_the_other(sizes: tuple[int, ...]) -> None:
    there = objects(*sizes)
    assert list(packing.pack_remote(there, halves)) == list(packing.pack(there, halves))


def test_large_objects_are_divided_side_by_side() -> None:
    together = threading.Barrier(packing.DIVIDED_AHEAD)

    def divide(o: Stored) -> list[Fragment]:
        together.wait(timeout=30)  # breaks unless all of them are here at once
        return halves(o)

    there = objects(*[LARGE] * packing.DIVIDED_AHEAD)
    assert len(list(packing.pack_remote(there, divide))) == 2 * len(there)


def test_an_object_that_can_not_be_divided_is_told_in_its_turn() -> None:
    def divide(o: Stored) -> list[Fragment]:
        if o.name == "1":
            raise DataError("broken")
        return halves(o)

    found = packing.pack_remote(objects(LARGE, LARGE, LARGE), divide)
    assert [next(found).index, next(found).index] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(found)


def test_a_listing_given_up_leaves_no_thread() -> None:
    found = packing.pack_remote(objects(*[LARGE] * 30), halves)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-divide")]


@pytest.mark.parametrize(
    ("groups", "rows"),
    [
        ([50] * 40, [650, 700, 650]),
        ([900, *[10] * 30], [900, 300]),
        ([10] * 30 + [900], [300, 900]),
        ([400, 400, 400], [400, 400, 400]),
        ([1] * 7, [2, 3, 2]),
    ],
)
def test_row_groups_are_divided_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[int], rows: list[int]
) -> None:
    """No small part is left at the end, and what a split is said to hold is what it holds."""
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"x": pa.binary(100)}), compression="none", use_dictionary=False) as writer:
        for n in groups:
            writer.write_batch(pa.record_batch({"x": pa.array([bytes(100)] * n, pa.binary(100))}))
    size = path.stat().st_size
    metadata = pq.read_metadata(path)
    stored = sum(metadata.row_group(g).column(0).total_compressed_size for g in range(len(groups)))
    monkeypatch.setattr(packing, "DIVIDE_OVER_BYTES", 1)
    monkeypatch.setattr(packing, "DIVIDE_BYTES", -(-stored // 3))
    splits = list(ParquetSource(path).splits(per_input=False))
    assert [split.rows for split in splits] == rows
    assert [split.bytes for split in splits] == [int(size * n / sum(groups)) for n in rows]
