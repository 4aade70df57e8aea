"""LogLoss (CrossEntropy), Brier and CalibrationError: predicted probabilities against what happened."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.metrics import sums
from headrace.metrics.base import Metric, State, one_of, unique
from headrace.metrics.columns import classes_of, is_scalar, matrix, numbers, weights
from headrace.metrics.means import MeanMetric


@dataclass(frozen=True, slots=True)
class LogLoss(MeanMetric):
    """The mean of -log(probability given to the true class), natural logarithm; NaN of no rows. Also called CrossEntropy.

    probability: a float column (of label 1, labels being 0 and 1) or a tensor or list column with one probability per
    class (labels being 0, 1, ...). eps: probabilities are clipped to [eps, 1 - eps]; None for the machine epsilon
    of the column's float type, which is what scikit-learn does. logits: the column holds logits (log-odds of label 1, or
    a logit per class) instead; nothing is clipped then. weight: a column of weights.
    """

    probability: str
    label: str
    eps: float | None = None
    logits: bool = False

    def _reads(self) -> tuple[str, ...]:
        return (self.probability, self.label)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        if is_scalar(batch, self.probability):
            given = numbers(batch, self.probability)
            true = classes_of(batch, self.label, 2) == 1
            return self._add(state, batch, self._of_one(given, true))
        given = matrix(batch, self.probability)
        true = classes_of(batch, self.label, given.shape[1])
        return self._add(state, batch, self._of_many(given, true))

    def _of_one(self, given: np.ndarray, true: np.ndarray) -> np.ndarray:
        if self.logits:
            wide = given.astype(np.float64)
            return np.logaddexp(0.0, np.where(true, -wide, wide))
        check_range(given, self.probability, self._name)
        wide = self._clip(given)
        return -np.log(np.where(true, wide, 1.0 - wide))

    def _of_many(self, given: np.ndarray, true: np.ndarray) -> np.ndarray:
        rows = np.arange(len(given))
        if self.logits:
            wide = given.astype(np.float64)
            top = wide.max(axis=1)
            return np.log(np.exp(wide - top[:, None]).sum(axis=1)) + (top - wide[rows, true])
        check_range(given, self.probability, self._name)
        return -np.log(self._clip(given[rows, true]))

    def _clip(self, given: np.ndarray) -> np.ndarray:
        eps = self.eps
        if eps is None:
            eps = float(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
        return np.clip(given.astype(np.float64), eps, 1.0 - eps)


CrossEntropy = LogLoss


@dataclass(frozen=True, slots=True)
class Brier(MeanMetric):
    """The mean squared difference between probabilities and what happened; NaN of no rows.

    probability: a float column (of label 1): (p - y)**2, from 0 to 1; or a tensor or list column with one per class: the sum of
    (p_k - [y = k])**2 over classes, from 0 to 2 (Brier, 1950), as in scikit-learn. weight: a column of weights.
    """

    probability: str
    label: str

    def _reads(self) -> tuple[str, ...]:
        return (self.probability, self.label)

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        if is_scalar(batch, self.probability):
            given = numbers(batch, self.probability).astype(np.float64)
            off = given - classes_of(batch, self.label, 2)
            check_range(given, self.probability, self._name)
            return self._add(state, batch, off * off)
        given = matrix(batch, self.probability)
        label = classes_of(batch, self.label, given.shape[1])
        check_range(given, self.probability, self._name)
        off = given.astype(np.float64)
        off[np.arange(len(off)), label] -= 1.0
        return self._add(state, batch, (off * off).sum(axis=1))


@dataclass(frozen=True, slots=True)
class CalibrationError(Metric):
    """How far probabilities are from frequencies, in `bins` of equal width: the expected calibration error (Guo et al., 2017).

    probability: a float column (of label 1), whose bins' mean probability is compared with their share of label 1; or a tensor
    or list column with one per class, where the highest probability is compared with the share of rows whose class it
    names. norm: "l1" for the mean over rows of the bins' differences, "max" for the largest. NaN of no rows.
    A bin holds its upper edge. weight: a column of weights. Sums are exact.
    """

    probability: str
    label: str
    bins: int = 15
    norm: str = "l1"
    weight: str | None = None

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        one_of(self._name, "norm", self.norm, ("l1", "max"))
        if self.bins < 1:
            raise PlanError(f"CalibrationError: bins is {self.bins}", hint="give at least 1; the default is 15")

    def _reads(self) -> tuple[str, ...]:
        return unique((self.probability, self.label, self.weight))

    def _zero(self) -> State:
        """Totals by bin: rows, probabilities, hits."""
        return {"rows": {}, "given": {}, "hits": {}}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        given, hits = self._read(batch)
        bins = np.clip(np.ceil(given * self.bins).astype(np.int64) - 1, 0, self.bins - 1)
        weight = None if self.weight is None else weights(batch, self.weight)
        products = given if weight is None else given * weight
        for kind, found in (
            ("rows", sums.by_cell(bins, self.bins, weight)),
            ("given", sums.by_cell(bins, self.bins, products)),
            ("hits", sums.by_cell(bins[hits], self.bins, None if weight is None else weight[hits])),
        ):
            for cell, total in found:
                state[kind][str(cell)] = sums.plus(state[kind].get(str(cell), 0), total)
        return state

    def _read(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        if is_scalar(batch, self.probability):
            given = numbers(batch, self.probability)
            hits = classes_of(batch, self.label, 2) == 1
        else:
            each = matrix(batch, self.probability)
            guess = each.argmax(axis=1)
            hits = guess == classes_of(batch, self.label, each.shape[1])
            given = each[np.arange(len(each)), guess]
        check_range(given, self.probability, self._name)
        return np.clip(given.astype(np.float64), 0.0, 1.0), hits

    def _merge(self, a: State, b: State) -> State:
        for kind, cells in b.items():
            for cell, total in cells.items():
                a[kind][cell] = sums.plus(a[kind].get(cell, 0), total)
        return a

    def _result(self, state: State) -> float:
        rows: sums.Total = 0
        for total in state["rows"].values():
            rows = sums.plus(rows, total)
        gaps: list[tuple[float, float]] = []
        for cell, total in sorted(state["rows"].items()):
            gap = abs(sums.ratio(state["given"].get(cell, 0), total) - sums.ratio(state["hits"].get(cell, 0), total))
            gaps.append((sums.ratio(total, rows), 0.0 if math.isnan(gap) else gap))  # NaN: all weights of the bin are 0
        if not gaps or math.isnan(gaps[0][0]):
            return math.nan
        return max(gap for _, gap in gaps) if self.norm == "max" else math.fsum(share * gap for share, gap in gaps)


def check_range(given: np.ndarray, column: str, metric: str) -> None:
    """Raises DataError for what can be no probabilities."""
    # Half-precision softmaxes overshoot 1 by their rounding; logits overshoot by far more.
    low, high = float(given.min()), float(given.max())
    if low < -0.01 or high > 1.01:
        raise DataError(
            f"{metric} needs probabilities in {column!r}, which holds values from {low:.4g} to {high:.4g}",
            where=(("column", column),),
            hint="apply a softmax or a sigmoid in the model" + (", or say logits=True" if metric == "LogLoss" else ""),
        )
