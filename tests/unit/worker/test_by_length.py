"""Rows of like lengths in one batch: every row gets its own answer, whatever fails on the way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.worker.fakes import Bench, column, fn

from headrace.core.origins import join_origins
from headrace.core.refs import Origin, Segment
from headrace.core.stages import Order
from headrace.plan import nodes
from headrace.worker import batch_model, batch_sizes, by_length
from headrace.worker.bad_rows import Failure
from headrace.worker.batching import Piece
from headrace.worker.by_length import Window, have_lengths, window_rows

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(0, 200, 300)]


@pytest.fixture(autouse=True)
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as slow, and batches have 8 rows."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(batch_sizes, "recall", lambda key: 8)
    monkeypatch.setattr(batch_model, "SLOW_ROW_S", 0.0)


def texts(lengths: list[int], uri: str = "a") -> Piece:
    batch = pa.RecordBatch.from_arrays([pa.array(["x" * n for n in lengths])], names=["x"])
    return Piece(batch, Origin((Segment(uri, 0, len(lengths)),)))


class Lengths:
    """Answers with the length of each text. padded: characters of all batches, each row as long as the longest."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.padded = 0

    def __call__(self, x: Any) -> np.ndarray:
        found = np.array([len(text) for text in x])
        if self.bad is not None and self.bad in found:
            raise ValueError("can't read this one")
        self.padded += int(found.max()) * len(found)
        return found


class Ahead(Lengths):
    def submit(self, x: Any) -> np.ndarray:
        return self(x)

    def collect(self, handle: np.ndarray) -> np.ndarray:
        return handle


def bench(model: Any, *, batch_rows: int | None = None, **kwargs: Any) -> Bench:
    op = nodes.Predict(fn(model), ("x",), True, ("p",), batch_rows=batch_rows)
    return Bench([op], model=True, columns_in=("x",), order=Order.FREE, **kwargs)


@pytest.mark.parametrize("kind", [Lengths, Ahead])
def test_answers_are_in_the_order_of_the_rows_and_little_is_padding(kind: type[Lengths]) -> None:
    model, fixed = kind(), kind()
    steps, unsorted = bench(model), bench(fixed, batch_rows=8)
    for _ in range(3):
        blocks = [texts(LENGTHS[:100]).batch, texts(LENGTHS[100:101], "b").batch, texts(LENGTHS[101:], "c").batch]
        assert column(steps.applied(*blocks), "p") == LENGTHS
        assert column(unsorted.applied(*blocks), "p") == LENGTHS
    assert model.padded < 0.75 * fixed.padded


def test_rows_that_fail_are_set_aside_alone() -> None:
    bad = LENGTHS[150]
    steps = bench(Lengths(bad), on_error="skip")
    done = [n for n in LENGTHS if n != bad]
    for _ in range(2):
        (block,) = steps.apply(texts(LENGTHS).batch).outputs
        assert steps.batch(block)["p"].to_pylist() == done


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each window, while batches stay at 8 rows."""
    seen: list[int] = []

    class Seen(Window):
        def __init__(self, piece: Piece) -> None:
            super().__init__(piece)
            seen.append(self.rows)

    monkeypatch.setattr(batch_model, "Window", Seen)
    monkeypatch.setattr(batch_model.BatchTuner, "record", lambda *_: None)
    return seen


@pytest.mark.parametrize("kind", [Lengths, Ahead])
def test_windows_hold_few_answers(kind: type[Lengths], windows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_length, "ANSWER_BYTES", 20 * 8)
    steps = bench(kind())
    done = steps.apply(texts(LENGTHS).batch)
    assert windows == [64] + [16] * 14 + [12]  # nothing is known of answers at first
    assert column([steps.batch(b) for b in done.outputs], "p") == LENGTHS
    assert done.wanted_rows == (32 if kind is Ahead else 20)


def test_windows_take_no_longer_than_steps_may_gather(windows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_length, "WINDOW_S", 0.0)
    steps = bench(Lengths())
    done = steps.apply(texts(LENGTHS).batch)
    assert windows == [8] * 37 + [4]
    assert done.wanted_rows == 8
    assert column([steps.batch(b) for b in done.outputs], "p") == LENGTHS


def test_answers_of_other_columns_say_nothing_of_a_window(windows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_length, "ANSWER_BYTES", 20 * 8)
    steps = bench(Lengths())
    steps.apply(texts(LENGTHS[:64]).batch)
    steps.apply(texts(LENGTHS[:64]).batch.cast(pa.schema({"x": pa.large_string()})))
    steps.apply(texts(LENGTHS[:64]).batch.cast(pa.schema({"x": pa.large_string()})))
    assert windows == [64, 64, 16, 16, 16, 16]


def test_windows_put_every_row_where_it_was() -> None:
    pieces = texts([3, 1]), texts([2, 9, 2], "b")
    window = Window(Piece(pa.concat_batches([p.batch for p in pieces]), join_origins([p.origin for p in pieces])))
    first = window.next(2)
    assert first.batch["x"].to_pylist() == ["xxx", "x" * 9]
    assert first.origin.locate(1) == ("b", 1)
    second = window.next(9)
    assert second.batch["x"].to_pylist() == ["x", "xx", "xx"]
    assert window.left == 0
    assert not window.add(pa.record_batch({"p": [3, 9]}), [])
    assert window.add(pa.record_batch({"p": [1, 22]}), [(1, Failure("no"))])
    made, lost = window.answer(pa.concat_batches)
    assert made is not None
    assert made["p"].to_pylist() == [3, 1, 9, 22]
    assert lost == [(2, Failure("no"))]


def test_a_window_that_is_lost_altogether_has_no_answer() -> None:
    window = Window(texts([1, 2]))
    assert [window.next(1).batch.num_rows for _ in range(2)] == [1, 1]
    assert not window.add(None, [(0, Failure("long"))])
    assert window.add(None, [(0, Failure("short"))])
    assert window.answer(pa.concat_batches) == (None, [(0, Failure("short")), (1, Failure("long"))])


def test_nulls_and_lists_have_lengths_and_numbers_none() -> None:
    batch = pa.record_batch({"x": pa.array([None, "ab", "c"]), "n": [1, 2, 3], "l": pa.array([[1, 2, 3], None, []])})
    window = Window(Piece(batch, Origin((Segment("a", 0, 3),))))
    assert [window.next(1).batch["n"].to_pylist() for _ in range(3)] == [[1], [2], [3]]
    assert have_lengths(batch.schema)
    assert not have_lengths(pa.schema({"n": pa.int64(), "t": pa.list_(pa.float32(), 3)}))


def test_windows_are_a_few_batches_and_no_longer_than_they_may_take() -> None:
    assert window_rows(8, 1e-3, 0.0) == 8 * by_length.WINDOW_BATCHES
    assert window_rows(8, 0.1, 0.0) == 20
    assert window_rows(8, 1.0, 0.0) == 8
    assert window_rows(8, 1e-3, by_length.ANSWER_BYTES / 20.5) == 20
    assert window_rows(8, 1e-3, by_length.ANSWER_BYTES) == 8
    assert all(a <= b for a, b in itertools.pairwise(window_rows(n, 0.01, 8.0) for n in range(1, 300)))
