"""Cutting blocks: a seeded sweep over pieces and limits."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from headrace.connectors.blocks import Piece, rechunk, rows_per_block
from headrace.connectors.packing import even_ranges, pack, whole
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


def test_rows_per_block() -> None:
    assert rows_per_block(1e12, BlockLimits()) == 1
    assert rows_per_block(1e12, BlockLimits(rows_multiple=128)) == 128
    assert rows_per_block(1, BlockLimits(target_bytes=1000, rows_multiple=64)) == 960


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
