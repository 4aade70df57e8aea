"""Cutting batches, joining origins, and finding the batch size of a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.worker.fakes import column, numbers

from headrace.core.origins import join_origins
from headrace.core.refs import Origin, Segment
from headrace.worker.batching import Batcher, Piece
from headrace.worker.tuning import MAX_INPUT_BYTES, MAX_ROWS, BatchTuner


def tuned(rate, tuner=None):
    """The size that a tuner settles at when `rate(rows)` rows go a second."""
    tuner = tuner or BatchTuner()
    for _ in range(100):
        rows = tuner.fit(8)
        tuner.record(rows, rows / rate(rows))
    return tuner.rows


def test_it_doubles_while_that_is_faster():
    assert tuned(lambda n: min(n, 500)) == 512
    assert tuned(lambda n: 1000) == 32
    assert tuned(lambda n: n) == MAX_ROWS
    assert tuned(lambda n: n if n <= 128 else 10) == 128


def test_a_slow_first_batch_does_not_count():
    tuner = BatchTuner()
    tuner.record(32, 100.0)
    assert tuned(lambda n: min(n, 64), tuner) == 64


def test_shorter_batches_and_fixed_sizes_do_not_teach():
    tuner = BatchTuner()
    for _ in range(5):
        tuner.record(7, 1e-6)
    assert tuner.rows == 32
    assert tuned(lambda n: n, BatchTuner(100)) == 100


def test_wide_rows_make_small_batches():
    assert BatchTuner().fit(MAX_INPUT_BYTES / 4) == 4
    assert BatchTuner().fit(MAX_INPUT_BYTES * 2) == 1


def test_it_shrinks_for_good():
    tuner = BatchTuner()
    assert tuner.shrink(32)
    assert tuned(lambda n: n, tuner) == 16
    assert not tuner.shrink(1)


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
