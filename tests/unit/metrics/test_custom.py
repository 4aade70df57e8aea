"""Custom metrics: a class with three methods, whose attributes ride as JSON; and metrics through the public API."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import headrace as hr
from headrace import metrics
from headrace.core.errors import DataError, PlanError, UserCodeError
from headrace.metrics.custom import decode, encode


class Hits:
    """Counts of scores above a threshold, by hour."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold
        self.hours = np.zeros(24, np.int64)
        self.seen: dict[int, int] = {}
        self.largest = -math.inf

    def update(self, batch: dict[str, np.ndarray]) -> None:
        hits = batch["score"] > self.threshold
        np.add.at(self.hours, batch["hour"][hits], 1)
        for hour in batch["hour"].tolist():
            self.seen[hour] = self.seen.get(hour, 0) + 1
        self.largest = max(self.largest, float(batch["score"].max()))

    def merge(self, other: Hits) -> None:
        self.hours += other.hours
        for hour, rows in other.seen.items():
            self.seen[hour] = self.seen.get(hour, 0) + rows
        self.largest = max(self.largest, other.largest)

    def result(self) -> dict[str, Any]:
        return {"hits": self.hours.sum(), "largest": self.largest, "seen": self.seen}


def rows(n: int = 100) -> pa.RecordBatch:
    rng = np.random.default_rng(1)
    return pa.RecordBatch.from_pydict({"score": rng.random(n), "hour": rng.integers(0, 24, n), "k": rng.integers(0, 2, n)})


def folded(metric: Any, batch: pa.RecordBatch) -> Any:
    total = metric.zero()
    for start in range(0, batch.num_rows, 13):
        state = metric.update(metric.zero(), batch.slice(start, 13))
        total = metric.merge(total, json.loads(json.dumps(state, allow_nan=False)))
    return metric.result(total)


def test_a_class_with_three_methods_is_a_metric() -> None:
    batch = rows()
    scores = batch.column("score").to_numpy()
    found = folded(metrics.Custom(Hits, columns=["score", "hour"], threshold=0.7), batch)
    assert (found["hits"], found["largest"]) == ((scores > 0.7).sum(), scores.max())
    assert sum(found["seen"].values()) == 100
    json.dumps(found)


def test_it_takes_groups_and_travels_to_other_processes() -> None:
    batch = rows()
    metric = cloudpickle.loads(cloudpickle.dumps(metrics.Custom(Hits, ["score", "hour"], by="k", threshold=0.2)))
    assert metric.columns == ("score", "hour", "k")
    kept = batch.column("k").to_numpy() == 1
    assert folded(metric, batch)["1"]["hits"] == (kept & (batch.column("score").to_numpy() > 0.2)).sum()


def test_batches_are_read_only_arrays() -> None:
    class Look:
        def __init__(self) -> None:
            self.kinds: list[str] = []

        def update(self, batch: dict[str, np.ndarray]) -> None:
            assert not any(array.flags.writeable for array in batch.values())
            self.kinds = [f"{array.dtype} {array.ndim}" for array in batch.values()]

        def merge(self, other: Any) -> None:
            self.kinds = other.kinds

        def result(self) -> list[str]:
            return self.kinds

    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3), np.float32))
    batch = pa.RecordBatch.from_pydict(
        {"a": [1, 2], "b": ["x", "y"], "c": tensor, "d": pa.array(["u", "u"]).dictionary_encode()}
    )
    metric = metrics.Custom(Look, ["a", "b", "c", "d"])
    assert metric.result(metric.update(metric.zero(), batch)) == ["int64 1", "object 1", "float32 2", "object 1"]


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | hnp.arrays(
        st.sampled_from([np.int8, np.uint64, np.float32, np.float64, np.bool_, np.complex64]), hnp.array_shapes(min_side=0)
    )
    | st.integers(0, 255).map(np.uint8)
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.just("$tuple")
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner), max_leaves=8
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(value=VALUES)
def test_attributes_come_back_as_they_were(value: Any) -> None:
    _same(decode(json.loads(json.dumps(encode(value, "x"), allow_nan=False))), value)


def _same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    else:
        assert a == b


def test_sets_and_nan_come_back() -> None:
    assert decode(encode({1, (2, "a")}, "x")) == {1, (2, "a")}
    assert decode(encode(frozenset("ab"), "x")) == frozenset("ab")
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, "x"), allow_nan=False))))


class Keeps(Hits):
    def __init__(self, what: Any = None) -> None:
        self.what = what


@pytest.mark.parametrize(
    "what", [object(), open, np.array([object()]), np.ma.masked_array([1.0], [True]), {"a": [1j]}, [Path("x")]]
)
def test_attributes_that_can_not_be_kept_are_named(what: Any) -> None:
    with pytest.raises(PlanError, match="attribute 'what' of Keeps holds a") as caught:
        metrics.Custom(Keeps, ["score"], what=what)
    assert "NumPy arrays" in caught.value.hint


def test_what_a_class_lacks_is_named() -> None:
    class NoMerge:
        def update(self, batch: Any) -> None: ...

        def result(self) -> None: ...

    class Slots:
        __slots__ = ()
        update = merge = result = print

    with pytest.raises(PlanError, match="NoMerge has no method merge"):
        metrics.Custom(NoMerge, ["x"])
    with pytest.raises(PlanError, match="__slots__"):
        metrics.Custom(Slots, ["x"])
    with pytest.raises(PlanError, match="needs a class"):
        metrics.Custom(Hits(), ["x"])  # type: ignore[arg-type]


def test_a_result_that_is_no_number_is_refused() -> None:
    class Odd(Hits):
        def result(self) -> Any:
            return object()

    metric = metrics.Custom(Odd, ["score", "hour"])
    with pytest.raises(UserCodeError, match="result of Odd"):
        metric.result(metric.zero())


# ---------------------------------------------------------------- the public API


@pytest.fixture
def data(tmp_path: Path) -> hr.Dataset:
    import pyarrow.parquet as pq

    for i in range(3):
        rng = np.random.default_rng(i)
        y = rng.integers(0, 2, 200)
        columns = {"y": y, "s": np.round(rng.normal(y), 2), "hour": rng.integers(0, 24, 200), "c": ["a", "b"] * 100}
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{i}.parquet")
    return hr.read_parquet(tmp_path / "in")


ALL = {
    "n": metrics.Count(by="c"),
    "auc": metrics.AUCROC("s", "y", bounds=True),
    "pr": metrics.AUCPR("s", "y"),
    "spread": metrics.Std("s", by=("c", "hour")),
    "words": metrics.ConfusionMatrix("c", "c"),
    "distinct": metrics.DistinctCount("s"),
    "bars": metrics.Histogram("s", low=-4, high=4),
    "own": metrics.Custom(Hits, ["score", "hour"], by="c"),
}


@pytest.mark.parametrize("engine", ["inline", "threads"])
def test_metrics_of_a_run_are_those_of_its_rows(data: hr.Dataset, engine: Any, tmp_path: Path) -> None:
    ds = data.rename({"s": "score"}).map_batches(lambda b: {**b, "s": b["score"]}).evaluate(**ALL)
    run = ds.write_parquet(str(tmp_path / "out"), engine=engine, progress="quiet")
    table = data.to_arrow(engine="inline", progress="quiet").combine_chunks()
    batch = table.append_column("score", table.column("s")).combine_chunks().to_batches()[0]
    assert dict(run.metrics) == {name: metric.result(metric.update(metric.zero(), batch)) for name, metric in ALL.items()}
    again = ds.write_parquet(str(tmp_path / "out"), engine=engine, progress="quiet")
    assert again.already_done
    assert again.metrics == run.metrics


def test_a_metric_that_meets_too_many_groups_ends_the_run(data: hr.Dataset) -> None:
    with pytest.raises(DataError, match="more than 5 groups"):
        data.evaluate(n=metrics.Count(by="hour", max_groups=5)).to_arrow(engine="inline", progress="quiet")


class Fails(Hits):
    def update(self, batch: dict[str, np.ndarray]) -> None:
        raise ZeroDivisionError("by the user")


def test_what_a_metric_raises_is_told_with_its_place(data: hr.Dataset) -> None:
    with pytest.raises(UserCodeError, match="ZeroDivisionError: by the user") as caught:
        data.evaluate(own=metrics.Custom(Fails, ["s"])).to_arrow(engine="inline", progress="quiet")
    assert "evaluate(own)" in str(caught.value)
    assert "raise ZeroDivisionError" in caught.value.frames
