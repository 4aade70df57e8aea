"""Metrics against scikit-learn, and the law of accumulators: any grouping in any order gives the same state."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headrace import metrics
from headrace.contracts.accumulator import Accumulator
from headrace.core.errors import DataError, PlanError
from headrace.metrics import curves
from headrace.metrics.columns import doubles

ROWS = 3000


def table() -> pa.RecordBatch:
    rng = np.random.default_rng(7)
    label = rng.integers(0, 2, ROWS)
    logits = rng.normal(label * 1.5, 2.0)
    classes = rng.integers(0, 4, ROWS)
    scores = rng.random((ROWS, 4)).astype(np.float32)
    scores[np.arange(ROWS), classes] += 0.5
    scores /= scores.sum(axis=1, keepdims=True)
    return pa.RecordBatch.from_pydict(
        {
            "label": pa.array(label, pa.int8()),
            "flag": pa.array(label == 1),
            "logit": pa.array(logits),
            "p": pa.array(1 / (1 + np.exp(-logits))),
            "p32": pa.array((1 / (1 + np.exp(-logits))).astype(np.float32)),
            "class": pa.array(classes),
            "scores": pa.FixedShapeTensorArray.from_numpy_ndarray(scores),
            "list": pa.array(scores.tolist(), pa.list_(pa.float32())),
            "guess": pa.array(scores.argmax(axis=1)),
            "wide": pa.array(rng.normal(size=ROWS) * 10.0 ** rng.integers(-300, 300, ROWS)),
            "whole": pa.array(rng.integers(-(2**62), 2**62, ROWS)),
        }
    )


ALL = [
    metrics.Count(),
    metrics.Mean("wide"),
    metrics.Mean("whole"),
    metrics.Mean("flag"),
    metrics.Accuracy("guess", "class"),
    metrics.LogLoss("p", "label"),
    metrics.LogLoss("scores", "class"),
    metrics.AUCROC("p", "label"),
    metrics.AUCROC("logit", "flag", bins=50),
    metrics.AUCROC("scores", "class", classes=4, bins=300),
]


def whole(metric: Any, batch: pa.RecordBatch) -> Any:
    return metric.update(metric.zero(), batch)


def settled(metric: Any, state: Any) -> Any:
    """What a state says, without what is open in it: which runs wait to be merged, and which key stands for a mixed bin."""
    if "curves" not in state:
        return state
    runs = [curves.load(curve, metric.bins) for curve in state["curves"]]
    return [[part.tolist() for part in (np.where(r.mixed, 0, r.keys), r.mixed, r.negative, r.positive)] for r in runs]


def value(metric: Any, batch: pa.RecordBatch) -> Any:
    return metric.result(whole(metric, batch))


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_any_grouping_in_any_order_gives_the_same_state(metric: Any) -> None:
    batch = table()
    expected = whole(metric, batch)
    rng = np.random.default_rng(11)
    for _ in range(4):
        cuts = [0, *sorted(rng.integers(0, ROWS, 9).tolist()), ROWS]
        states = [whole(metric, batch.slice(start, stop - start)) for start, stop in itertools.pairwise(cuts)]
        states = [json.loads(json.dumps(states[i])) for i in rng.permutation(len(states))]
        while len(states) > 1:  # merge neighbours in random association
            i = int(rng.integers(0, len(states) - 1))
            before = json.dumps(states[i + 1])
            merged = metric.merge(states[i], states[i + 1])
            assert json.dumps(states[i + 1]) == before
            states[i : i + 2] = [merged]
        assert settled(metric, states[0]) == settled(metric, expected)
        assert metric.result(states[0]) == metric.result(expected)


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_updating_one_state_equals_merging(metric: Any) -> None:
    batch = table()
    state = metric.zero()
    for start in range(0, ROWS, 700):
        state = metric.update(state, batch.slice(start, 700))
    assert settled(metric, state) == settled(metric, whole(metric, batch))


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_it_is_an_accumulator_that_pickles(metric: Any) -> None:
    assert isinstance(metric, Accumulator)
    assert pickle.loads(pickle.dumps(metric)) == metric


def test_count() -> None:
    assert value(metrics.Count(), table()) == ROWS


def test_mean_is_correctly_rounded() -> None:
    batch = table()
    assert value(metrics.Mean("wide"), batch) == float(sum(map(Fraction, batch["wide"].to_pylist())) / ROWS)
    assert value(metrics.Mean("whole"), batch) == sum(batch["whole"].to_pylist()) / ROWS
    assert value(metrics.Mean("flag"), batch) == sum(batch["flag"].to_pylist()) / ROWS
    tricky = pa.RecordBatch.from_pydict({"x": [1e308, 5e-324, 1.0, -1e308, -0.0, 5e-324]})
    assert whole(metrics.Mean("x"), tricky)["sum"] == format((1 << 1126) + 2 * (1 << 52), "x")
    top = pa.RecordBatch.from_pydict({"x": pa.array([2**64 - 1, 2**64 - 1], pa.uint64())})
    assert value(metrics.Mean("x"), top) == float(2**64 - 1)


def test_accuracy_matches_sklearn() -> None:
    from sklearn.metrics import accuracy_score

    batch = table()
    expected = accuracy_score(batch["class"].to_numpy(), batch["guess"].to_numpy())
    assert value(metrics.Accuracy("guess", "class"), batch) == expected


def test_null_among_the_values_of_a_dictionary_is_a_null() -> None:
    hidden = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array([None, 1]))
    batch = pa.RecordBatch.from_pydict({"a": hidden, "b": [1, 1, 1]})
    for metric in (metrics.Accuracy("a", "b"), metrics.DistinctCount("a"), metrics.Count(by="a")):
        with pytest.raises(DataError, match="2 null"):
            value(metric, batch)


def test_accuracy_compares_words_and_mixed_whole_numbers() -> None:
    words = pa.RecordBatch.from_pydict({"a": pa.array(["x", "y", "z"]).dictionary_encode(), "b": ["x", "q", "z"]})
    assert value(metrics.Accuracy("a", "b"), words) == 2 / 3
    mixed = pa.RecordBatch.from_pydict({"a": pa.array([1, 2], pa.int8()), "b": pa.array([1, 3], pa.int64())})
    assert value(metrics.Accuracy("a", "b"), mixed) == 0.5
    with pytest.raises(DataError, match="can't compare"):
        value(metrics.Accuracy("a", "b"), pa.RecordBatch.from_pydict({"a": ["x"], "b": [[1]]}))


def test_log_loss_matches_sklearn() -> None:
    from sklearn.metrics import log_loss

    batch = table()
    label = batch["label"].to_numpy()
    for name in ("p", "p32"):
        expected = log_loss(label, batch[name].to_numpy().astype(np.float64))
        assert value(metrics.LogLoss(name, "label"), batch) == pytest.approx(expected, rel=1e-6)
    scores = batch["scores"].to_numpy_ndarray().astype(np.float64)
    expected = log_loss(batch["class"].to_numpy(), scores / scores.sum(axis=1, keepdims=True))
    assert value(metrics.LogLoss("scores", "class"), batch) == pytest.approx(expected, rel=1e-6)
    assert value(metrics.LogLoss("list", "class"), batch) == value(metrics.LogLoss("scores", "class"), batch)


def test_log_loss_clips_certain_mistakes() -> None:
    batch = pa.RecordBatch.from_pydict({"p": [0.0, 1.0], "label": [1, 1]})
    assert value(metrics.LogLoss("p", "label", eps=1e-3), batch) == pytest.approx(-(math.log(1e-3) + math.log(1 - 1e-3)) / 2)
    assert value(metrics.LogLoss("p", "label"), batch) == pytest.approx(-math.log(np.finfo(float).eps) / 2)


def test_log_loss_refuses_logits() -> None:
    with pytest.raises(DataError, match="needs probabilities in 'logit'"):
        value(metrics.LogLoss("logit", "label"), table())


def _distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    n = 200_000
    return {
        "uniform": rng.random(n),
        "normal": rng.normal(size=n),
        "near one": 1.0 - 10.0 ** rng.uniform(-9, -1, n),
        "near zero": 10.0 ** rng.uniform(-30, -1, n),
        "float32 near one": (1.0 - 10.0 ** rng.uniform(-6, -1, n)).astype(np.float32),
        "narrow": 0.5 + 1e-7 * rng.normal(size=n),
        "wide": rng.normal(size=n) * 10.0 ** rng.integers(-300, 300, n),
        "both ends": np.concatenate([10.0 ** rng.uniform(-12, -1, n // 2), 1.0 - 10.0 ** rng.uniform(-12, -1, n // 2)]),
    }


@pytest.mark.parametrize("name", list(_distributions()))
def test_auc_matches_sklearn_within_its_interval(name: str) -> None:
    from sklearn.metrics import roc_auc_score

    scores = _distributions()[name]
    rng = np.random.default_rng(5)
    ranks = np.argsort(np.argsort(scores)) / len(scores)
    label = (rng.random(len(scores)) < 0.2 + 0.5 * ranks).astype(np.int8)
    metric = metrics.AUCROC("s", "y")
    state = whole(metric, pa.RecordBatch.from_pydict({"s": scores, "y": label}))
    expected = roc_auc_score(label, scores)
    low, high = metric.interval(state)
    assert low - 1e-12 <= expected <= high + 1e-12
    assert high - low < 1e-4
    assert metric.result(state) == pytest.approx(expected, abs=5e-5)
    assert len(curves.load(state["curves"][0], metric.bins)) <= metric.bins


def test_auc_is_exact_for_few_distinct_scores() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 500)
    scores = np.round(rng.random(500) + 0.3 * label, 1)
    batch = pa.RecordBatch.from_pydict({"s": scores, "y": label.astype(bool)})
    assert value(metrics.AUCROC("s", "y"), batch) == pytest.approx(roc_auc_score(label, scores), abs=1e-15)


def test_keys_and_places_keep_the_order_of_scores() -> None:
    rng = np.random.default_rng(2)
    edges = np.array([-np.finfo(float).max, -1.0, -5e-324, -0.0, 0.0, 5e-324, 0.5, np.nextafter(0.5, 1), 1.0, 1.5, 1e308])
    scores = np.sort(np.concatenate([edges, rng.normal(size=5000) * 10.0 ** rng.integers(-300, 300, 5000), rng.random(5000)]))
    keys = curves._keys(scores)
    assert ((np.diff(keys) > 0) == (np.diff(scores) > 0)).all()
    assert (curves._scores(keys) == scores).all()
    assert (np.diff(curves._places(keys)) >= 0).all()


def test_auc_of_several_classes() -> None:
    from sklearn.metrics import roc_auc_score

    batch = table()
    scores = batch["scores"].to_numpy_ndarray()
    classes = batch["class"].to_numpy()
    each = [roc_auc_score(classes == k, scores[:, k]) for k in range(4)]
    assert value(metrics.AUCROC("scores", "class", classes=4), batch) == pytest.approx(np.mean(each), abs=1e-4)
    assert value(metrics.AUCROC("list", "class", index=2), batch) == pytest.approx(each[2], abs=1e-4)
    with pytest.raises(DataError, match="has 4 scores per row"):
        value(metrics.AUCROC("scores", "class"), batch)
    with pytest.raises(DataError, match="one score per row"):
        value(metrics.AUCROC("p", "label", index=1), batch)
    with pytest.raises(PlanError):
        metrics.AUCROC("scores", "class", index=1, classes=4)


def test_of_no_rows_and_of_one_class() -> None:
    empty = table().slice(0, 0)
    for metric in ALL[1:]:
        assert math.isnan(value(metric, empty))
    assert value(metrics.Count(), empty) == 0
    one = pa.RecordBatch.from_pydict({"s": [0.1, 0.2], "y": [1, 1]})
    assert math.isnan(value(metrics.AUCROC("s", "y"), one))


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_missing_numbers_are_refused_by_name(bad: float | None) -> None:
    batch = pa.RecordBatch.from_pydict({"p": pa.array([0.5, bad, 0.25], pa.float64()), "y": [0, 1, 1]})
    for metric in (metrics.Mean("p"), metrics.AUCROC("p", "y"), metrics.LogLoss("p", "y"), metrics.Accuracy("p", "y")):
        with pytest.raises(DataError, match="column 'p'") as caught:
            value(metric, batch)
        assert "1" in str(caught.value)
        assert ("column", "p") in caught.value.where


def test_labels_outside_the_classes_are_refused() -> None:
    batch = pa.RecordBatch.from_pydict({"p": [0.5, 0.5], "y": [0, 2]})
    for metric in (metrics.AUCROC("p", "y"), metrics.LogLoss("p", "y")):
        with pytest.raises(DataError, match="label 2") as caught:
            value(metric, batch)
        assert ("row", "1") in caught.value.where
    with pytest.raises(DataError, match="needs numbers"):
        value(metrics.Mean("s"), pa.RecordBatch.from_pydict({"s": ["x"]}))
    with pytest.raises(DataError, match="1 to 2 entries"):
        value(metrics.LogLoss("v", "y"), pa.RecordBatch.from_pydict({"v": [[0.5], [0.5, 0.5]], "y": [0, 0]}))


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
@pytest.mark.parametrize("vectors", [False, True])
def test_scores_that_doubles_do_not_tell_apart_are_refused(kind: pa.DataType, vectors: bool) -> None:
    def area(last: int) -> Any:
        scores = pa.array([0, 1 << 53, last], kind)
        columns = pa.array([[s, 0] for s in scores.to_pylist()], pa.list_(kind)) if vectors else scores
        metric = metrics.AUCROC("s", "y", **({"index": 0} if vectors else {}))
        batch = pa.record_batch({"s": columns, "y": pa.array([1, 1, 0] if vectors else [0, 0, 1])})
        return metric.result(metric.update(metric.zero(), batch))

    with pytest.raises(DataError, match=r"'s'.*beyond 2\*\*53") as caught:
        area((1 << 53) + 1)
    assert ("row", "2") in caught.value.where
    assert area((1 << 53) - 1) == 0.5


@pytest.mark.parametrize("other", [(1 << 53) + 1, float("nan")])
def test_scores_of_other_classes_are_not_looked_at(other: float) -> None:
    vectors = [[0, 5], [1, other], [2, 5]]
    batch = pa.record_batch({"s": pa.array(vectors), "y": [1, 1, 0]})
    assert value(metrics.AUCROC("s", "y", index=0), batch) == 1.0
    for metric in (metrics.AUCROC("s", "y", index=1), metrics.AUCROC("s", "y", classes=2)):
        with pytest.raises(DataError):
            value(metric, batch)


def test_floats_are_not_copied() -> None:
    given = np.arange(3.0)
    assert doubles(given, "s") is given
