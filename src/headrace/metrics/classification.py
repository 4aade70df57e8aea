"""Accuracy and LogLoss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError
from headrace.metrics import sums
from headrace.metrics.columns import check_finite, classes_of, is_scalar, matrix, numbers, values


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of rows where `prediction` equals `label`; NaN of no rows. Numbers, strings, booleans, dates."""

    prediction: str
    label: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.prediction, self.label)

    def zero(self) -> dict[str, Any]:
        return {"rows": 0, "right": 0}

    def update(self, state: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
        import pyarrow.compute as pc

        predicted, label = (values(batch, name) for name in self.columns)
        for name, array in zip(self.columns, (predicted, label), strict=True):
            if pa.types.is_floating(array.type):
                check_finite(array.to_numpy(zero_copy_only=False), name)
        try:
            equal = pc.equal(predicted, label)  # type: ignore[attr-defined]
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DataError(
                f"Accuracy can't compare {self.prediction!r} ({predicted.type}) with {self.label!r} ({label.type})",
                where=(("column", self.prediction),),
                hint="give both columns the same type",
            ) from error
        state["right"] += equal.true_count
        state["rows"] += len(equal)
        return state

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        a["right"] += b["right"]
        a["rows"] += b["rows"]
        return a

    def result(self, state: dict[str, Any]) -> float:
        return state["right"] / state["rows"] if state["rows"] else float("nan")


@dataclass(frozen=True, slots=True)
class LogLoss(sums.MeanState):
    """The mean of -log(probability given to the true class), natural logarithm; NaN of no rows.

    probability: a float column (of label 1, labels being 0 and 1) or a tensor or list column with one probability per
    class (labels being 0, 1, ...). eps: probabilities are clipped to [eps, 1 - eps]; None for the machine epsilon
    of the column's float type, which is what scikit-learn does.
    """

    probability: str
    label: str
    eps: float | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.probability, self.label)

    def update(self, state: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
        if batch.num_rows == 0:
            return state
        if is_scalar(batch, self.probability):
            given = numbers(batch, self.probability)
            true = classes_of(batch, self.label, 2) == 1
            self._check_range(given)
            wide = self._clip(given)
            chosen = np.where(true, wide, 1.0 - wide)
        else:
            given = matrix(batch, self.probability)
            true = classes_of(batch, self.label, given.shape[1])
            self._check_range(given)
            chosen = self._clip(given[np.arange(len(given)), true])
        return self.add(state, -sums.scaled_sum(np.log(chosen)), len(chosen))

    def _clip(self, given: np.ndarray) -> np.ndarray:
        eps = self.eps
        if eps is None:
            eps = float(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
        return np.clip(given.astype(np.float64), eps, 1.0 - eps)

    def _check_range(self, given: np.ndarray) -> None:
        # Half-precision softmaxes overshoot 1 by their rounding; logits overshoot by far more.
        low, high = float(given.min()), float(given.max())
        if low < -0.01 or high > 1.01:
            raise DataError(
                f"LogLoss needs probabilities in {self.probability!r}, which holds values from {low:.4g} to {high:.4g}",
                where=(("column", self.probability),),
                hint="apply a softmax or a sigmoid in the model",
            )
