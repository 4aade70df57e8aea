"""Areas under curves: bounds that hold for any scores, widths, and states that any order of merges leaves the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from headrace import metrics
from headrace.metrics import curves, packing

Scores = Callable[[np.random.Generator, int], np.ndarray]

DISTRIBUTIONS: dict[str, Scores] = {
    "many ties": lambda rng, n: np.round(rng.random(n), 2),
    "half zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, rng.random(n)),
    "one score": lambda rng, n: np.full(n, 0.25),
    "denormals": lambda rng, n: rng.integers(0, 2**50, n) * 5e-324,
    "within 1e-12": lambda rng, n: 1e-3 + 1e-12 * rng.random(n),
    "neighbours": lambda rng, n: (np.int64(0x3FE0000000000000) + rng.integers(0, n, n)).view(np.float64),
    "negative": lambda rng, n: -rng.exponential(1e3, n),
    "huge range": lambda rng, n: rng.normal(size=n) * 10.0 ** rng.integers(-300, 300, n),
    "largest": lambda rng, n: np.finfo(float).max * rng.uniform(-1, 1, n),
    "logits": lambda rng, n: 6.0 * rng.normal(size=n),
    "confident": lambda rng, n: rng.beta(0.05, 0.05, n),
    "float32": lambda rng, n: rng.random(n).astype(np.float32),
    "float16": lambda rng, n: rng.random(n).astype(np.float16),
    "zeros of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "a crowd among outliers": lambda rng, n: np.where(rng.random(n) < 0.9, 0.5 + 1e-9 * rng.random(n), rng.lognormal(0, 90, n)),
    "whole numbers": lambda rng, n: rng.integers(-50_000, 50_000, n),
}


def labels(rng: np.random.Generator, scores: np.ndarray) -> np.ndarray:
    ranks = np.argsort(np.argsort(scores, kind="stable")) / len(scores)
    return (rng.random(len(scores)) < 0.1 + 0.6 * ranks).astype(np.int8)


def state_of(metric: Any, scores: np.ndarray, label: np.ndarray, rows: int = 1 << 30) -> Any:
    batch = pa.RecordBatch.from_pydict({"s": scores, "y": label})
    state = metric.zero()
    for start in range(0, len(scores), rows):
        state = metric.update(state, batch.slice(start, rows))
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
@pytest.mark.parametrize("bins", [5, 300, 1 << 16])
def test_the_area_lies_within_its_bounds(name: str, bins: int) -> None:
    rng = np.random.default_rng(17)
    for rows in (50, 5000, 150_000):
        scores = DISTRIBUTIONS[name](rng, rows)
        label = labels(rng, scores)
        exact = scores.astype(np.float64)
        for kind, reference in ((metrics.AUCROC, roc_auc_score), (metrics.AUCPR, average_precision_score)):
            metric = kind("s", "y", bins=bins)
            low, high = metric.interval(state_of(metric, scores, label, 60_000))
            area = reference(label, np.unique(exact, return_inverse=True)[1])  # scikit-learn's checks overflow on the largest
            assert low - 1e-11 <= area <= high + 1e-11
            if len(np.unique(exact)) <= bins:
                assert high == low


@pytest.mark.parametrize(
    "name", ["within 1e-12", "negative", "huge range", "logits", "confident", "float32", "denormals", "half zeros"]
)
def test_the_bounds_are_close(name: str) -> None:
    rng = np.random.default_rng(23)
    scores = DISTRIBUTIONS[name](rng, 400_000)
    label = labels(rng, scores)
    low, high = metrics.AUCROC("s", "y").interval(state_of(metrics.AUCROC("s", "y"), scores, label))
    assert high - low < 1e-4
    low, high = metrics.AUCPR("s", "y").interval(state_of(metrics.AUCPR("s", "y"), scores, label))
    assert high - low < 3e-4


def test_the_worst_order_within_bins_is_within_the_bounds() -> None:
    """Scores for which each bin has all its negatives above all its positives, and the other way round."""
    rng = np.random.default_rng(3)
    scores = np.sort(rng.random(4000))
    for upper in (0, 1):
        label = np.tile(np.repeat([1 - upper, upper], 5), 400)
        for kind, reference in ((metrics.AUCROC, roc_auc_score), (metrics.AUCPR, average_precision_score)):
            metric = kind("s", "y", bins=500)
            low, high = metric.interval(state_of(metric, scores, label))
            assert low < reference(label, scores) < high
            assert high - low > 1e-4


def test_exact_mode_keeps_all_scores() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random(200_000)
    label = labels(rng, scores)
    for kind, reference in ((metrics.AUCROC, roc_auc_score), (metrics.AUCPR, average_precision_score)):
        metric = kind("s", "y", exact=True, bounds=True)
        state = state_of(metric, scores, label, 30_000)
        found = metric.result(state)
        assert found["low"] == found["value"] == found["high"] == pytest.approx(reference(label, scores), abs=1e-12)
        assert len(json.dumps(state)) < 11 * len(scores)


def test_states_are_small() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random(500_000)
    label = labels(rng, scores)
    assert len(json.dumps(state_of(metrics.AUCROC("s", "y"), scores, label))) < 300_000
    assert len(json.dumps(state_of(metrics.AUCROC("s", "y"), np.round(scores, 1), label, 1000))) < 100_000


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(list(DISTRIBUTIONS)), weighted=st.booleans())
def test_any_order_of_merges_counts_the_same(seed: int, name: str, weighted: bool) -> None:
    """With limits so low that parts are merged, and lose bits, at different times."""
    rng = np.random.default_rng(seed)
    scores = DISTRIBUTIONS[name](rng, 400).astype(np.float64)
    positive = rng.random(400) < 0.4
    weights = rng.integers(0, 100, 400) / 8.0 if weighted else None
    limit = int(rng.integers(2, 60))

    def fold() -> curves.Curve:
        curve = curves.zero()
        order = rng.permutation(400)
        for part in np.array_split(order, int(rng.integers(1, 9))):
            other = curves.zero()
            curves.add(other, scores[part], positive[part], None if weights is None else weights[part], limit)
            if rng.random() < 0.5:
                curves._settle(other, limit)
            if rng.random() < 0.5:
                curve, other = other, curve
            curves.merge(curve, other, limit)
        return curve

    first, second = (curves.load(fold(), limit) for _ in range(2))
    assert len(first) <= limit
    for part in ("mixed", "negative", "positive"):
        assert getattr(first, part).tolist() == getattr(second, part).tolist()
    assert first.keys[~first.mixed].tolist() == second.keys[~second.mixed].tolist()
    unit = 1.0 if weights is None else 2.0**-curves.WEIGHT_BITS
    assert first.positive.sum() * unit == (positive.sum() if weights is None else weights[positive].sum())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(numbers=st.lists(st.integers(0, 2**64 - 1), max_size=40), bits=st.integers(0, 40), deflate=st.booleans())
def test_packing_gives_back_the_array(numbers: list[int], bits: int, deflate: bool) -> None:
    array = np.array([number >> bits << bits for number in numbers] * 20, np.uint64)
    text = packing.pack(array, deflate=deflate)
    assert packing.unpack(text, len(array)).tolist() == array.tolist()


def test_a_count_beyond_machine_words() -> None:
    """3 * 10**9 rows of each kind: their pairs are more than an int64 holds."""
    many = 3 * 10**9
    run = curves.Run(np.array([0, 1]), np.array([False, False]), np.array([many, many]), np.array([many, many]))
    assert metrics.AUCROC("s", "y")._bounds(run) == (0.5, 0.5)
