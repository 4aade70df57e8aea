"""Cutting batches and joining origins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.worker.fakes import column, numbers

from headrace.core.origins import join_origins
from headrace.core.refs import Origin, Segment
from headrace.worker.batching import Batcher, Piece


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 6))
def test_batches_depend_on_rows_alone(sizes, rows):
    batcher, out, at = Batcher(rows), [], 0
    for size in sizes:
        out += batcher.push(Piece(numbers(size, at), Origin((Segment("a", at, size),))))
        at += size
    out += batcher.finish()
    full, rest = divmod(at, rows)
    assert [p.batch.num_rows for p in out] == [rows] * full + [rest] * bool(rest)
    assert column([p.batch for p in out], "x") == list(range(at))
    for i, piece in enumerate(out):
        assert piece.origin == Origin((Segment("a", i * rows, piece.batch.num_rows),))


def test_origins_are_joined():
    a, b, c = (Origin((Segment("a", k, 2),)) for k in (0, 2, 9))
    assert join_origins([a, b]) == Origin((Segment("a", 0, 4),))
    assert join_origins([a, c]).segments == (Segment("a", 0, 2), Segment("a", 9, 2))
    mixed = join_origins([a, b.inexact()])
    assert not mixed.exact
    same = join_origins([a.inexact(), a.inexact()])
    assert same.segments == a.segments
