"""Accumulators of the user's own, and what becomes of their faults: one error that names the metric, logged or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace as hr


class Rows:
    columns = ("id",)

    def zero(self) -> Any:
        return 0

    def update(self, state: Any, batch: Any) -> Any:
        return state + batch.num_rows

    def merge(self, a: Any, b: Any) -> Any:
        return a + b

    def result(self, state: Any) -> Any:
        return state


class OfNumPy(Rows):
    def update(self, state: Any, batch: Any) -> Any:
        return np.int64(state + batch.num_rows)


class OfSets(Rows):
    def update(self, state: Any, batch: Any) -> Any:
        return {1, 2}


class BadMerge(Rows):
    def merge(self, a: Any, b: Any) -> Any:
        raise ValueError("no two of them")


class BadResult(Rows):
    def result(self, state: Any) -> Any:
        raise ValueError("nothing to say")


class BadZero(Rows):
    def zero(self) -> Any:
        raise ValueError("nothing")


class OfNaN(Rows):
    def zero(self) -> Any:
        return [0, float("nan"), ("a", 1)]

    def update(self, state: Any, batch: Any) -> Any:
        return [state[0] + batch.num_rows, *state[1:]]

    def merge(self, a: Any, b: Any) -> Any:
        return [a[0] + b[0], *b[1:]]

    def result(self, state: Any) -> Any:
        return state[0]


class ByKey(Rows):
    def zero(self) -> Any:
        return {}

    def update(self, state: Any, batch: Any) -> Any:
        return {1: state.get(1, 0) + batch.num_rows}

    def merge(self, a: Any, b: Any) -> Any:
        return {k: a.get(k, 0) + b.get(k, 0) for k in a.keys() | b.keys()}


def act(how: str, accumulator: Any, tmp_path: Path, quiet: dict[str, Any]) -> Any:
    ds = hr.range(300_000).evaluate(m=accumulator)
    return (ds.run(**quiet) if how == "run" else ds.write_parquet(str(tmp_path / "out"), **quiet)).metrics["m"]


@pytest.mark.parametrize("how", ["run", "write"])
def test_states_are_what_the_log_keeps(how: str, tmp_path: Path, engine: str, quiet: dict[str, Any]) -> None:
    assert act(how, OfNumPy(), tmp_path, quiet) == 300_000
    assert act(how, OfNaN(), tmp_path / "nan", quiet) == 300_000


@pytest.mark.parametrize("how", ["run", "write"])
@pytest.mark.parametrize(
    ("accumulator", "message"),
    [
        (OfSets(), "evaluate\\(m\\): its state can't be kept as JSON: it holds a builtins.set"),
        (ByKey(), "the key 1 in state would come back as a string"),
        (BadZero(), "raised ValueError while making the state of no rows: nothing"),
        (BadMerge(), "merge raised ValueError: no two"),
        (BadResult(), "result raised ValueError: nothing"),
    ],
)
def test_faults_name_the_metric(
    how: str, accumulator: Any, message: str, tmp_path: Path, engine: str, quiet: dict[str, Any]
) -> None:
    if isinstance(accumulator, BadMerge):
        with pytest.raises(hr.UserCodeError, match=message) as caught:
            hr.range(3_000_000).evaluate(m=accumulator).run(**quiet)
    else:
        with pytest.raises(hr.UserCodeError, match=message) as caught:
            act(how, accumulator, tmp_path, quiet)
    assert {("metric", "m"), ("stage", "evaluate(m)")} & set(caught.value.where)
    if isinstance(accumulator, BadMerge | BadResult | BadZero):
        assert "raise ValueError" in caught.value.frames
        assert str(Path(hr.__file__).parent) not in caught.value.frames


def test_a_fault_that_a_stop_condition_meets_names_the_metric(engine: str, quiet: dict[str, Any]) -> None:
    for accumulator, message in ((BadMerge(), "merge raised"), (BadResult(), "result raised")):
        with pytest.raises(hr.UserCodeError, match=message):
            hr.range(3_000_000).evaluate(m=accumulator, stop_if={"m": lambda value: False}).run(**quiet)
