"""Models and metrics that fail in odd ways: what is a row's fault, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

import headrace as hr

Batch = dict[str, np.ndarray]
QUIET: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
ROWS = 2000


def table() -> hr.Dataset:
    return hr.from_arrow(pa.table({"x": np.arange(float(ROWS)), "half": np.arange(ROWS) % 2}))


def plus_one(batch: Batch) -> np.ndarray:
    return batch["x"] + 1


def no_sevens(batch: Batch) -> np.ndarray:
    if (batch["x"] % 100 == 7).any():
        raise ValueError("seven")
    return batch["x"] * 2


class Unloadable:
    def __init__(self) -> None:
        raise RuntimeError("no weights")

    def __call__(self, batch: Batch) -> np.ndarray:
        return batch["x"]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_each_model_is_evaluated_over_the_rows_that_it_answered(device: str) -> None:
    models = {"good": plus_one, "some": no_sevens, "none": Unloadable}
    metrics = {
        "good": hr.metrics.Mean("good"),
        "some": hr.metrics.Mean("some", by="half"),
        "none": hr.metrics.Mean("none"),
        "both": hr.metrics.MSE("good", "some"),
        "rows": hr.metrics.Count(),
    }
    run = table().predict(models, input=["x"], device=device).evaluate(**metrics).run(on_error="skip", **QUIET)
    x = np.arange(float(ROWS))
    answered = x % 100 != 7
    assert run.tally.bad == 0
    assert run.metrics["rows"] == ROWS
    assert run.metrics["good"] == (x + 1).mean()
    assert run.metrics["some"] == {h: 2 * x[answered & (x % 2 == int(h))].mean() for h in "01"}
    assert run.metrics["both"] == pytest.approx(((1 - x[answered]) ** 2).mean())
    assert np.isnan(run.metrics["none"])
    assert {name: guard["failed"] for name, guard in run.guards.items()} == {"predict(some)": 20, "predict(none)": ROWS}


class Unmergeable:
    columns = ("x",)

    def zero(self) -> int:
        return 0

    def update(self, state: int, batch: pa.RecordBatch) -> int:
        return state + batch.num_rows

    def merge(self, a: int, b: int) -> int:
        raise ValueError("can't add")

    def result(self, state: int) -> int:
        return state


def test_a_metric_that_cannot_merge_is_no_rows_fault() -> None:
    with pytest.raises(hr.UserCodeError, match=r"evaluate\(odd\) raised ValueError while merging states: can't add"):
        table().evaluate(odd=Unmergeable()).run(on_error="skip", **QUIET)


def test_too_many_groups_are_no_rows_fault() -> None:
    with pytest.raises(hr.DataError, match="more than 1,000 groups"):
        table().evaluate(mean=hr.metrics.Mean("half", by="x")).run(on_error="skip", **QUIET)


class Stranger:
    async def stream(self, rows: Any) -> Any:
        async for key, row in rows:
            yield f"key {key}", {"y": row["x"]}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_stream_that_answers_keys_of_its_own_is_broken(on_error: str) -> None:
    with pytest.raises(hr.UserCodeError, match="answered key 'key 0', which it was not given"):
        table().predict(Stranger, input=["x"], output="y").run(on_error=on_error, **QUIET)


def test_masked_values_are_null() -> None:
    def masked(batch: Batch) -> dict[str, Any]:
        mask = batch["x"] % 3 == 0
        text = batch["x"].astype(int).astype(str)
        return {"n": np.ma.masked_array(batch["x"], mask), "t": np.ma.masked_array(text, mask)}

    made = table().predict(masked, input=["x"]).to_arrow(**QUIET)
    assert made["n"].to_pylist() == [None if i % 3 == 0 else float(i) for i in range(ROWS)]
    assert made["t"].to_pylist() == [None if i % 3 == 0 else str(i) for i in range(ROWS)]

    def matrix(batch: Batch) -> Any:
        return np.ma.masked_equal(np.stack([batch["x"], batch["x"]], axis=1), 5.0)

    with pytest.raises(hr.UserCodeError, match="with masked values"):
        table().predict(matrix, input=["x"]).to_arrow(**QUIET)


def test_booleans_are_compared_with_numbers() -> None:
    rows = pa.table({"guess": [True, False, True, True], "label": [1, 0, 0, 1]})
    for prediction, label in (("guess", "label"), ("label", "guess")):
        run = hr.from_arrow(rows).evaluate(m=hr.metrics.Accuracy(prediction, label)).run(**QUIET)
        assert run.metrics["m"] == 0.75


def test_a_few_light_rows_do_not_spoil_weights() -> None:
    rng = np.random.default_rng(0)
    label, weight = rng.integers(0, 2, ROWS), rng.random(ROWS)
    weight[:50] = 1e-6
    score = rng.normal(label)
    ds = hr.from_arrow(pa.table({"score": score, "label": label, "weight": weight}))
    run = ds.evaluate(auc=hr.metrics.AUCROC("score", "label", weight="weight")).run(**QUIET)
    assert run.metrics["auc"] == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-6)


def test_vectors_can_be_declared_as_lists() -> None:
    def two(batch: Batch) -> np.ndarray:
        return np.stack([batch["x"], -batch["x"]], axis=1)

    made = table().predict(two, input=["x"], output={"v": pa.list_(pa.float32())}).to_arrow(**QUIET)
    assert made["v"].type == pa.list_(pa.float32())
    assert made["v"].to_pylist() == [[float(i), -float(i)] for i in range(ROWS)]

    def square(batch: Batch) -> np.ndarray:
        return np.zeros((len(batch["x"]), 2, 2))

    with pytest.raises(hr.UserCodeError, match="is no kind of list"):
        table().predict(square, input=["x"], output={"v": pa.list_(pa.float32())}).to_arrow(**QUIET)


def test_outputs_with_one_name_are_refused() -> None:
    with pytest.raises(hr.PlanError, match="named twice"):
        table().predict(lambda b: (b["x"], -b["x"]), input=["x"], output=["y", "y"])
