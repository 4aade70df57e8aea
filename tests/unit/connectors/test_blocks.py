"""Cutting blocks: a seeded sweep over pieces and limits."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.connectors.blocks import BLOCKS_PER_SPLIT, LEAST_ROWS_OF_WIDE, Piece, rechunk, rows_per_block, shareable, sized
from headrace.connectors.packing import even_ranges, pack, whole
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.storage import Stored
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin, Segment


@pytest.mark.parametrize("seed", range(200))
def test_rechunk_keeps_rows_order_and_limits(seed: int) -> None:
    rng = random.Random(seed)
    limits = BlockLimits(rng.choice([50, 1000, 1 << 20]), rng.choice([1, 10, 64]), rng.choice([1, 1, 4, 10]))
    pieces, at = [], 0
    for _ in range(rng.randrange(1, 20)):
        n = rng.randrange(0, 60)
        batch = pa.record_batch({"x": pa.array(range(at, at + n), pa.int64())})
        pieces.append(Piece(batch, Origin((Segment("u", at, n),)), rng.choice([1.0, 8.0, 100.0])))
        at += n
    seen: list[int] = []
    blocks = list(rechunk(iter(pieces), limits))
    for i, (batch, origin) in enumerate(blocks):
        values = batch.column(0).to_pylist()
        assert values
        assert len(values) <= max(limits.max_rows, limits.rows_multiple)
        if i < len(blocks) - 1:
            assert len(values) % limits.rows_multiple == 0
        assert [origin.locate(r) for r in range(len(values))] == [("u", v) for v in values]
        seen += values
    assert seen == list(range(at))


def piece_of(column: pa.Array, row_bytes: float) -> Piece:
    return Piece(pa.record_batch({"x": column}), Origin((Segment("a", 7, len(column)),)), row_bytes)


def test_rows_larger_than_estimated_are_divided_by_their_size() -> None:
    column = pa.array([b"small"] * 90 + [bytes(1000)] * 10)
    pieces = list(sized(piece_of(column, 8.0), BlockLimits(target_bytes=4000)))
    assert max(p.batch.nbytes for p in pieces) <= 4000
    assert pa.chunked_array([p.batch.column("x") for p in pieces]).to_pylist() == column.to_pylist()
    assert [p.origin.segments[0].row for p in pieces] == [7, *(7 + np.cumsum([p.batch.num_rows for p in pieces])[:-1])]
    assert 1000 < max(p.row_bytes for p in pieces) < 1010


@pytest.mark.parametrize("row_bytes", [8.0, 40.0])
def test_rows_about_as_large_as_estimated_stay_together(row_bytes: float) -> None:
    piece = piece_of(pa.array(range(100)), row_bytes)
    assert list(sized(piece, BlockLimits(target_bytes=10))) == [piece]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_what_all_rows_share_is_no_reason_to_divide_them(kind: pa.DataType) -> None:
    texts = pa.array([str(i) * 50 for i in range(100)])
    column = texts.cast(kind) if pa.types.is_string_view(kind) else texts.dictionary_encode().take(list(range(100)))
    piece = piece_of(column, 8.0)
    assert list(sized(piece, BlockLimits(target_bytes=1000))) == [piece]


def test_one_row_is_a_piece_whatever_its_size() -> None:
    (piece,) = sized(piece_of(pa.array([bytes(5000)]), 8.0), BlockLimits(target_bytes=100))
    assert piece.row_bytes > 5000


def test_rows_per_block() -> None:
    assert rows_per_block(1e12, BlockLimits()) == 1
    assert rows_per_block(1e12, BlockLimits(rows_multiple=128)) == 128
    assert rows_per_block(1, BlockLimits(target_bytes=1000, rows_multiple=64)) == 960


def test_a_split_is_cut_to_be_shared_but_for_the_sake_of_many_columns() -> None:
    limits = BlockLimits()
    assert shareable(limits, 800, 10).max_rows == 800 // BLOCKS_PER_SPLIT
    assert 128 < shareable(limits, 800, 100).max_rows < 200
    assert shareable(limits, 10_000, 5_000).max_rows == LEAST_ROWS_OF_WIDE
    assert shareable(limits, 160_000, 5_000).max_rows == 160_000 // BLOCKS_PER_SPLIT
    assert shareable(limits, 10**9, 5_000) == limits


@pytest.mark.parametrize(
    ("index", "rows", "row_bytes", "most"),
    [
        (3, 2000, 20.0, 128),  # among few inputs: to be shared
        (30, 2000, 20.0, 256),  # after some others, of few bytes
        (200, 2000, 20.0, 1024),  # after many: in two
        (30, 20_000, 20.0, 2500),  # in eight
        (200, 20_000, 20.0, 5000),  # in four
        (200, 2000, 0.0, 128),  # nobody knows of how many bytes
        (200, 2000, 30_000.0, 128),  # of images
        (200, 8000, 30_000.0, 500),
    ],
)
def test_inputs_after_many_others_are_shared_less(index: int, rows: int, row_bytes: float, most: int) -> None:
    limits = BlockLimits(per_input=True, index=index)
    assert shareable(limits, rows, 3, row_bytes).max_rows == most


def test_packing_by_size_and_cost() -> None:
    sizes = [1 << 20] * 100 + [40 << 20] + [1] * 40
    objects = [Stored(f"u{i}", size, "v", f"n{i}") for i, size in enumerate(sizes)]
    splits = list(pack(iter(objects), lambda o: [whole(o)]))
    assert [s.index for s in splits] == list(range(len(splits)))
    assert [f.uri for s in splits for f in s.fragments] == [o.uri for o in objects]
    assert [len(s.fragments) for s in splits] == [25, 25, 25, 25, 1, 31, 9]


def test_even_ranges_cover_everything() -> None:
    assert even_ranges(10, 100) == [(0, -1)]
    ranges = even_ranges(1000, 300)
    assert ranges == [(0, 250), (250, 500), (500, 750), (750, -1)]


def test_a_source_cuts_its_inputs_by_how_many_came_before(tmp_path: Path) -> None:
    for i in range(130):
        pq.write_table(pa.table({"id": np.arange(2000)}), tmp_path / f"{i:03d}.parquet")
    source = ParquetSource(tmp_path)
    splits = list(source.splits(per_input=True))

    def cut(index: int, limits: BlockLimits) -> list[int]:
        return [batch.num_rows for batch, _ in source.open(splits[index], limits)]

    assert cut(0, BlockLimits(per_input=True)) == [128] * 15 + [80]
    assert cut(129, BlockLimits(per_input=True)) == [1024, 976]
    assert cut(129, BlockLimits()) == [125] * 16
