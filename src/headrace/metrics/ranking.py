"""AUCROC and AUCPR: areas under the ROC curve and the precision-recall curve, with bounds.

Rows are counted by score and label (`curves`). While there are no more distinct scores than bins, and with exact=True always,
the area is exact. Otherwise the scores of a bin that holds several may be ordered in any way: the bounds are the areas of the
worst and the best, and the result is their middle. Ties, however many, widen nothing: a bin of one score is known as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.metrics import curves
from headrace.metrics.base import Metric, State, unique
from headrace.metrics.columns import classes_of, doubles, floats, is_scalar, numbers, values, vectors, weights

# 65,536 bins keep the width of the bounds below 1e-4 for continuous scores however many rows there are: that of uniform scores
# is 2 to 4 / bins.
_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Area(Metric):
    score: str
    label: str
    index: int | None = None
    classes: int | None = None
    bins: int = _BINS
    exact: bool = False
    bounds: bool = False
    weight: str | None = None

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        if self.index is not None and self.classes is not None:
            raise PlanError(
                f"{self._name} takes either index= or classes=", hint="index: one class; classes: the average of all"
            )
        if self.bins < 2:
            raise PlanError(f"{self._name}: bins is {self.bins}", hint="give at least 2, or leave it out")

    def _reads(self) -> tuple[str, ...]:
        return unique((self.score, self.label, self.weight))

    @property
    def _limit(self) -> int | None:
        return None if self.exact else self.bins

    def _zero(self) -> State:
        return {"curves": [curves.zero() for _ in range(self.classes or 1)]}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        given = None if self.weight is None else weights(batch, self.weight)
        scores, positives = self._read(batch)
        for curve, score, positive in zip(state["curves"], scores, positives, strict=True):
            curves.add(curve, score, positive, given, self._limit)
        return state

    def _merge(self, a: State, b: State) -> State:
        for mine, other in zip(a["curves"], b["curves"], strict=True):
            curves.merge(mine, other, self._limit)
        return a

    def _result(self, state: State) -> Any:
        low, high = self._interval(state)
        value = (low + high) / 2.0
        return {"value": value, "low": low, "high": high} if self.bounds else value

    def interval(self, state: State) -> Any:
        """(low, high), between which the area of the unbinned scores lies, up to the rounding of a float; NaN where it is
        undefined. With `by`, {group: (low, high)}.
        """
        return self._each_group(state, self._interval) if self.by else self._interval(state)

    def _interval(self, state: State) -> tuple[float, float]:
        each = [self._bounds(curves.load(curve, self._limit)) for curve in state["curves"]]
        known = [bounds for bounds in each if bounds is not None]
        if not known:
            return float("nan"), float("nan")
        return sum(low for low, _ in known) / len(known), sum(high for _, high in known) / len(known)

    def _bounds(self, run: curves.Run) -> tuple[float, float] | None:
        """The least and the largest area; None where it is undefined."""
        raise NotImplementedError

    def _read(self, batch: pa.RecordBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Scores and truth, one array for each curve."""
        if is_scalar(batch, self.score):
            if self.classes is not None or self.index is not None:
                raise DataError(
                    f"{self._name} got index= or classes=, but column {self.score!r} has one score per row",
                    where=(("column", self.score),),
                    hint="leave them out, or name a tensor column with a score per class",
                )
            return [doubles(numbers(batch, self.score), self.score)], [self._truth(batch, None) == 1]
        scores = vectors(batch, self.score)
        if self.classes is not None:
            if scores.shape[1] != self.classes:
                raise self._width(scores.shape[1], f"classes={self.classes}")
            scores = floats(scores, self.score)
            labels = self._truth(batch, self.classes)
            return [scores[:, k] for k in range(self.classes)], [labels == k for k in range(self.classes)]
        if self.index is None or not 0 <= self.index < scores.shape[1]:
            raise self._width(scores.shape[1], f"index={self.index}")
        return [floats(scores[:, self.index], self.score)], [self._truth(batch, scores.shape[1]) == self.index]

    def _truth(self, batch: pa.RecordBatch, classes: int | None) -> np.ndarray:
        if pa.types.is_boolean(values(batch, self.label).type):
            return numbers(batch, self.label)
        return classes_of(batch, self.label, 2 if classes is None else classes)

    def _width(self, width: int, given: str) -> DataError:
        return DataError(
            f"{self._name}: column {self.score!r} has {width} scores per row, and {given} does not fit",
            where=(("column", self.score),),
            hint=f"give index=k for class k against the rest, or classes={width} for the average over all",
        )


@dataclass(frozen=True, slots=True)
class AUCROC(_Area):
    """The area under the ROC curve; ties count half; NaN when there is only one class.

    score: a float column, higher for label 1 (label: booleans, or 0 and 1), or a tensor or list column with a score per
    class. Of the latter, `index=k` takes class k against the rest (label: booleans or 0 and 1 when k is 1, generally class
    indexes), and `classes=n` averages over n classes, each against the rest, those without rows of both kinds left out.
    bins: how many distinct scores a state tells apart, for each class. Up to that many the area is exact; beyond, neighbours
    share bins, and the area is known within bounds less than 1e-4 apart for continuous scores. bounds: the result is
    {"value", "low", "high"} rather than the value alone. exact: keep all distinct scores, whatever their number: up to 10 bytes
    a row in states, receipts and the run log. weight: a column of weights, rounded to multiples of 2**-30 (so that sums are
    exact); those of a batch that are not 0 must be at least 2**-10 on average, and all together at most 2**32.
    Whole numbers beyond 2**53 are refused: doubles would not tell neighbours apart.
    """

    def _bounds(self, run: curves.Run) -> tuple[float, float] | None:
        negatives, positives = int(run.negative.sum()), int(run.positive.sum())
        pairs = negatives * positives
        if pairs == 0:
            return None
        negative, positive = run.negative, run.positive
        if 2 * pairs > np.iinfo(np.int64).max:  # beyond machine words: whole numbers of Python, slower
            negative, positive = negative.astype(object), positive.astype(object)
        below = np.cumsum(negative) - negative
        shared = negative * positive
        mixed = run.mixed
        low = 2 * int((positive * below).sum()) + int(shared[~mixed].sum())
        return low / (2 * pairs), (low + 2 * int(shared[mixed].sum())) / (2 * pairs)


@dataclass(frozen=True, slots=True)
class AUCPR(_Area):
    """The area under the precision-recall curve as average precision: the sum over thresholds of precision times the step in
    recall, without interpolation, as in scikit-learn; NaN without rows of label 1.

    Arguments as those of AUCROC; of several classes, those without rows are left out. The bounds of as many bins are wider, as
    precision among the highest scores rests on few rows: with twice as many, the default here, 1e-5 to 3e-4 apart.
    """

    bins: int = 2 * _BINS

    def _bounds(self, run: curves.Run) -> tuple[float, float] | None:
        total = int(run.positive.sum())
        if total == 0:
            return None
        negative, positive = (part[::-1].astype(np.float64) for part in (run.negative, run.positive))
        mixed = run.mixed[::-1]
        # Of a bin: positives and negatives in it, and those above it.
        p, n = positive[positive > 0], negative[positive > 0]
        p_above, n_above = (np.cumsum(part) - part for part in (positive, negative))
        p_above, n_above, mixed = p_above[positive > 0], n_above[positive > 0], mixed[positive > 0]
        tied = p * (p_above + p) / (p_above + p + n_above + n)
        # At best all positives share a score above the negatives. At worst each has its own, below all negatives: the
        # sum of (p_above + j) / (p_above + j + m) over j = 1 ... p, m negatives above. It grows with j: its integral is less.
        best = p * (p_above + p) / (p_above + p + n_above)
        m = n_above + n
        worst = p - m * np.log1p(np.divide(p, p_above + m, out=np.zeros_like(p), where=m > 0))
        low = float(np.where(mixed, np.maximum(worst, 0.0), tied).sum())
        high = float(np.where(mixed, best, tied).sum())
        return low / total, high / total
