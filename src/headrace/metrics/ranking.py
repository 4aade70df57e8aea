"""AUCROC: the area under the ROC curve from histograms of whole numbers.

A score becomes a whole-number key that keeps the order of scores; rows are counted per key and label. When there are
more than `bins` keys, all keys lose their lowest bit, again and again. How many bits are lost is the least number that fits, a
function of the set of scores alone, so states merge exactly in any order. Scores that share a bin may be ordered either
way: `interval` gives the bounds, and the result is their middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.metrics.columns import classes_of, is_scalar, matrix, numbers, values

# 65,536 bins keep the interval's width below 1e-4 for continuous scores however many rows there are: the keys' density
# falls towards the middle of [0, 1] as s**(-3/4), so that a uniform score's width is 2 to 4 / bins.
_BINS = 1 << 16
# The keys' 16 lowest bits would tell apart scores that differ by 1e-11 of their size, and make states larger.
_KEY_SHIFT = 16


@dataclass(frozen=True, slots=True)
class AUCROC:
    """The area under the ROC curve; ties count half; NaN when there is only one class.

    score: a float column, higher for label 1 (label: booleans, or 0 and 1), or a tensor or list column with a score per
    class. Of the latter, `index=k` takes class k against the rest (label: booleans or 0 and 1 when k is 1, generally class
    indexes), and `classes=n` averages over n classes, each against the rest, those without rows of both kinds left out.
    bins: how many bins a state may have, for each class and label.
    """

    score: str
    label: str
    index: int | None = None
    classes: int | None = None
    bins: int = _BINS

    def __post_init__(self) -> None:
        if self.index is not None and self.classes is not None:
            raise PlanError("AUCROC takes either index= or classes=", hint="index: one class; classes: the average of all")
        if self.bins < 2:
            raise PlanError(f"AUCROC: bins is {self.bins}", hint="give at least 2; the default is 65,536")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.score, self.label)

    def zero(self) -> dict[str, Any]:
        return {"curves": [{"level": 0, "negative": {}, "positive": {}} for _ in range(self.classes or 1)]}

    def update(self, state: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
        if batch.num_rows == 0:
            return state
        scores, positives = self._read(batch)
        for curve, score, positive in zip(state["curves"], scores, positives, strict=True):
            keys = _keys(score)
            _add(curve, _histogram(keys[~positive]), _histogram(keys[positive]), self.bins)
        return state

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        for mine, other in zip(a["curves"], b["curves"], strict=True):
            _raise_level(mine, other["level"])
            down = mine["level"] - other["level"]
            for kind in ("negative", "positive"):
                _count(mine[kind], ((int(key) >> down, count) for key, count in other[kind].items()))
            _fit(mine, self.bins)
        return a

    def result(self, state: dict[str, Any]) -> float:
        low, high = self.interval(state)
        return (low + high) / 2.0

    def interval(self, state: dict[str, Any]) -> tuple[float, float]:
        """Bounds between which the area of the unbinned scores lies; NaN when there is only one class."""
        bounds = [b for b in (_bounds(curve) for curve in state["curves"]) if b is not None]
        if not bounds:
            return float("nan"), float("nan")
        return sum(low for low, _ in bounds) / len(bounds), sum(high for _, high in bounds) / len(bounds)

    def _read(self, batch: pa.RecordBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Scores and truth, one array for each curve."""
        if is_scalar(batch, self.score):
            if self.classes is not None or self.index is not None:
                raise DataError(
                    f"AUCROC got index= or classes=, but column {self.score!r} has one score per row",
                    where=(("column", self.score),),
                    hint="leave them out, or name a tensor column with a score per class",
                )
            return [numbers(batch, self.score)], [self._truth(batch, None) == 1]
        scores = matrix(batch, self.score)
        if self.classes is not None:
            if scores.shape[1] != self.classes:
                raise self._width(scores.shape[1], f"classes={self.classes}")
            labels = self._truth(batch, self.classes)
            return [scores[:, k] for k in range(self.classes)], [labels == k for k in range(self.classes)]
        if self.index is None or not 0 <= self.index < scores.shape[1]:
            raise self._width(scores.shape[1], f"index={self.index}")
        return [scores[:, self.index]], [self._truth(batch, scores.shape[1]) == self.index]

    def _truth(self, batch: pa.RecordBatch, classes: int | None) -> np.ndarray:
        if pa.types.is_boolean(values(batch, self.label).type):
            return numbers(batch, self.label)
        return classes_of(batch, self.label, 2 if classes is None else classes)

    def _width(self, width: int, given: str) -> DataError:
        return DataError(
            f"AUCROC: column {self.score!r} has {width} scores per row, and {given} does not fit",
            where=(("column", self.score),),
            hint=f"give index=k for class k against the rest, or classes={width} for the average over all",
        )


def _keys(scores: np.ndarray) -> np.ndarray:
    """int64 keys in the order of the scores (equal scores have equal keys).

    The fourth root spreads scores near 0, and, mirrored, near 1, where classifiers crowd them: a fixed number of bins
    tells apart 1e-6 from 2e-6 as well as 0.3 from 0.301. Square roots and differences are correctly rounded and so
    monotone. A double's bits, read as a whole number, are in the order of its absolute value.
    """
    s = scores.astype(np.float64)
    half = _root(np.float64(0.5))
    spread = np.select(
        [s < 0.0, s <= 0.5, s <= 1.0],
        [-_root(np.abs(s)), _root(np.abs(s)), 2.0 * half - _root(np.abs(1.0 - s))],
        2.0 * half + _root(np.abs(s - 1.0)),
    )
    spread = spread + 0.0  # -0.0 and 0.0 are equal, and must be one key
    bits = spread.view(np.int64) if spread.flags.c_contiguous else np.ascontiguousarray(spread).view(np.int64)
    ordered = np.where(bits < 0, np.int64(np.iinfo(np.int64).min) - bits, bits)
    return ordered >> _KEY_SHIFT


def _root(x: Any) -> Any:
    return np.sqrt(np.sqrt(x))


def _histogram(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.unique(keys, return_counts=True)


def _add(
    curve: dict[str, Any],
    negative: tuple[np.ndarray, np.ndarray],
    positive: tuple[np.ndarray, np.ndarray],
    bins: int,
) -> None:
    """Count a batch's keys. Lowers its resolution first where the batch alone needs that: quicker than key by key."""
    level = curve["level"]
    while max(len(np.unique(keys >> level)) for keys, _ in (negative, positive)) > bins:
        level += 1
    _raise_level(curve, level)
    for kind, (keys, counts) in (("negative", negative), ("positive", positive)):
        _count(curve[kind], zip((keys >> level).tolist(), counts.tolist(), strict=True))
    _fit(curve, bins)


def _count(histogram: dict[str, int], pairs: Any) -> None:
    for key, count in pairs:
        name = str(key)  # JSON's keys are strings
        histogram[name] = histogram.get(name, 0) + count


def _fit(curve: dict[str, Any], bins: int) -> None:
    while max(len(curve["negative"]), len(curve["positive"])) > bins:
        _raise_level(curve, curve["level"] + 1)


def _raise_level(curve: dict[str, Any], level: int) -> None:
    down = level - curve["level"]
    if down <= 0:
        return
    for kind in ("negative", "positive"):
        coarse: dict[str, int] = {}
        _count(coarse, ((int(key) >> down, count) for key, count in curve[kind].items()))
        curve[kind] = coarse
    curve["level"] = level


def _bounds(curve: dict[str, Any]) -> tuple[float, float] | None:
    """The area when every bin's negatives rank above its positives, and the other way round. In whole numbers."""
    negative = {int(key): count for key, count in curve["negative"].items()}
    positive = {int(key): count for key, count in curve["positive"].items()}
    pairs = sum(negative.values()) * sum(positive.values())
    if pairs == 0:
        return None
    below = low = shared = 0
    for key in sorted(negative.keys() | positive.keys()):
        ups, downs = positive.get(key, 0), negative.get(key, 0)
        low += ups * below
        shared += ups * downs
        below += downs
    return low / pairs, (low + shared) / pairs
