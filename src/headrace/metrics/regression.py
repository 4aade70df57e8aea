"""MSE, RMSE, MAE and R2: predicted numbers against true ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrace.metrics import sums
from headrace.metrics.base import State
from headrace.metrics.columns import checked, numbers, weights
from headrace.metrics.means import MeanMetric
from headrace.metrics.spread import Variance


@dataclass(frozen=True, slots=True)
class _Errors(MeanMetric):
    prediction: str
    label: str

    def _reads(self) -> tuple[str, ...]:
        return (self.prediction, self.label)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        with np.errstate(over="ignore"):
            lost = self._loss(difference(batch, self.prediction, self.label))
        return self._add(state, batch, checked(lost, f"{self._name}: the loss of a row"))

    def _loss(self, off: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class MSE(_Errors):
    """The mean of (prediction - label)**2 over numeric columns; NaN of no rows. weight: a column of weights.

    Raises DataError for nulls, NaN and infinite values, and for squares beyond the range of doubles.
    """

    def _loss(self, off: np.ndarray) -> np.ndarray:
        return off * off


@dataclass(frozen=True, slots=True)
class RMSE(MSE):
    """The square root of MSE, with the same arguments."""

    def _result(self, state: State) -> float:
        return math.sqrt(MSE._result(self, state))


@dataclass(frozen=True, slots=True)
class MAE(_Errors):
    """The mean of abs(prediction - label) over numeric columns; NaN of no rows. weight: a column of weights.

    Raises DataError for nulls, NaN and infinite values.
    """

    def _loss(self, off: np.ndarray) -> np.ndarray:
        return np.abs(off)


@dataclass(frozen=True, slots=True)
class R2(MeanMetric):
    """The coefficient of determination, 1 - (sum of squared errors) / (sum of squared differences of labels from their mean).

    NaN of fewer than two rows, and where all labels are equal. weight: a column of weights.
    The denominator comes from exact sums, as in Variance. Raises DataError for nulls, NaN and infinite values.
    """

    prediction: str
    label: str

    def _reads(self) -> tuple[str, ...]:
        return (self.prediction, self.label)

    def _labels(self) -> Variance:
        return Variance(self.label, weight=self.weight)

    def _zero(self) -> State:
        return {"rows": 0, "sum": "0", "count": 0, "labels": self._labels().zero()}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        with np.errstate(over="ignore"):
            off = difference(batch, self.prediction, self.label)
            lost = checked(off * off, "R2: the loss of a row")
        state = self._add(state, batch, lost)
        state["count"] += len(lost) if self.weight is None else int(np.count_nonzero(weights(batch, self.weight)))
        state["labels"] = self._labels().update(state["labels"], batch)
        return state

    def _merge(self, a: State, b: State) -> State:
        a = MeanMetric._merge(self, a, b)
        a["count"] += b["count"]
        a["labels"] = self._labels().merge(a["labels"], b["labels"])
        return a

    def _result(self, state: State) -> float:
        spread = self._labels().result(state["labels"])
        if state["count"] < 2 or not spread > 0:
            return math.nan
        return 1.0 - sums.ratio(state["sum"], state["rows"]) / spread


def difference(batch: pa.RecordBatch, prediction: str, label: str) -> np.ndarray:
    """prediction - label, float64; whole numbers are subtracted as such where both are."""
    predicted, true = (numbers(batch, name) for name in (prediction, label))
    if predicted.dtype == true.dtype == np.int64 and max(map(_size, (predicted, true))) < 1 << 62:
        return (predicted - true).astype(np.float64)
    return predicted.astype(np.float64) - true.astype(np.float64)


def _size(whole: np.ndarray) -> int:
    return max(abs(int(whole.min())), abs(int(whole.max())))
