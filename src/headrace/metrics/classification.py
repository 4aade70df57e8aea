"""Accuracy, TopKAccuracy, ConfusionMatrix, Precision, Recall and F1: predicted classes against true ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import vector_to_numpy
from headrace.metrics import sums
from headrace.metrics.base import Metric, State, one_of, unique
from headrace.metrics.columns import check_finite, classes_of, matrix, values, weights
from headrace.metrics.groups import encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share(Metric):
    """The share of rows, or of their weights, that are right. weight: a column of finite numbers, none negative."""

    weight: str | None = None

    def _zero(self) -> State:
        return {"rows": 0, "right": 0}

    def _add(self, state: State, batch: pa.RecordBatch, right: np.ndarray) -> State:
        if self.weight is None:
            return self._join(state, len(right), int(np.count_nonzero(right)))
        given = weights(batch, self.weight)
        return self._join(state, *(sums.encode(sums.scaled_sum(part)) for part in (given, given[right])))

    @staticmethod
    def _join(state: State, rows: sums.Total, right: sums.Total) -> State:
        state["rows"] = sums.plus(state["rows"], rows)
        state["right"] = sums.plus(state["right"], right)
        return state

    def _merge(self, a: State, b: State) -> State:
        return self._join(a, b["rows"], b["right"])

    def _result(self, state: State) -> float:
        return sums.ratio(state["right"], state["rows"])


@dataclass(frozen=True, slots=True)
class Accuracy(_Share):
    """The share of rows where `prediction` equals `label`; NaN of no rows. Numbers, strings, booleans, dates;
    beside numbers booleans are 0 and 1.

    weight: a column of weights, added exactly.
    """

    prediction: str
    label: str

    def _reads(self) -> tuple[str, ...]:
        return unique((self.prediction, self.label, self.weight))

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        import pyarrow.compute as pc

        names = (self.prediction, self.label)
        predicted, label = (values(batch, name) for name in names)
        if pa.types.is_boolean(predicted.type) != pa.types.is_boolean(label.type):
            predicted, label = map(_zero_or_one, (predicted, label))
        for name, array in zip(names, (predicted, label), strict=True):
            if pa.types.is_floating(array.type):
                check_finite(vector_to_numpy(array), name)
        try:
            equal = pc.equal(predicted, label)  # type: ignore[attr-defined]
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DataError(
                f"Accuracy can't compare {self.prediction!r} ({predicted.type}) with {self.label!r} ({label.type})",
                where=(("column", self.prediction),),
                hint="give both columns the same type",
            ) from error
        return self._add(state, batch, vector_to_numpy(equal))


def _zero_or_one(array: pa.Array) -> pa.Array:
    """Booleans as numbers; others as they are."""
    return array.cast(pa.int8()) if pa.types.is_boolean(array.type) else array


@dataclass(frozen=True, slots=True)
class TopKAccuracy(_Share):
    """The share of rows where the true class is among the `k` highest scores; NaN of no rows.

    scores: a tensor or list column with a score per class. label: class indexes 0, 1, ... Of equal scores the class of the
    higher index counts as higher, as in scikit-learn. weight: a column of weights, added exactly.
    """

    scores: str
    label: str
    k: int = 5

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        if self.k < 1:
            raise PlanError(f"TopKAccuracy: k is {self.k}", hint="give at least 1; the default is 5")

    def _reads(self) -> tuple[str, ...]:
        return unique((self.scores, self.label, self.weight))

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        scores = matrix(batch, self.scores)
        label = classes_of(batch, self.label, scores.shape[1])[:, None]
        own = np.take_along_axis(scores, label, axis=1)
        ahead = np.count_nonzero(scores > own, axis=1)
        ahead += np.count_nonzero((scores == own) & (np.arange(scores.shape[1]) > label), axis=1)
        return self._add(state, batch, ahead < self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Confusion(Metric):
    """Counts, or exact sums of weights, by (true class, predicted class).

    A state is {"cells": {JSON text of [true, predicted]: total}}.
    """

    weight: str | None = None
    max_classes: int = 1000

    def _pair(self) -> tuple[str, str]:
        """The columns of the prediction and of the label."""
        raise NotImplementedError

    def _reads(self) -> tuple[str, ...]:
        return unique((*self._pair(), self.weight))

    def _zero(self) -> State:
        return {"cells": {}}

    def _update(self, state: State, batch: pa.RecordBatch) -> State:
        prediction, label = self._pair()
        self._check_kinds(batch)
        predicted, predicted_classes = encoded(batch, prediction)
        true, true_classes = encoded(batch, label)
        width = len(predicted_classes)
        given = None if self.weight is None else weights(batch, self.weight)
        cells = state["cells"]
        for cell, total in sums.by_cell(true * width + predicted, width * len(true_classes), given):
            key = json.dumps([_class(true_classes[cell // width]), _class(predicted_classes[cell % width])], ensure_ascii=False)
            cells[key] = sums.plus(cells.get(key, 0), total)
        self._check(cells)
        return state

    def _check_kinds(self, batch: pa.RecordBatch) -> None:
        """Raises DataError where the columns' classes can't be equal."""
        prediction, label = self._pair()
        given, true = (values(batch, name).type for name in (prediction, label))
        if _is_number(given) != _is_number(true):
            raise DataError(
                f"{self._name} can't compare {prediction!r} ({given}) with {label!r} ({true})",
                where=(("column", prediction),),
                hint="give both columns the same type",
            )

    def _merge(self, a: State, b: State) -> State:
        cells = a["cells"]
        for key, total in b["cells"].items():
            cells[key] = sums.plus(cells.get(key, 0), total)
        self._check(cells)
        return a

    def _check(self, cells: State) -> None:
        if len(cells) > self.max_classes and len(_classes(cells)) > self.max_classes:
            raise DataError(
                f"{self._name}: {' and '.join(map(repr, self._pair()))} hold more than {self.max_classes:,} classes",
                where=(("column", self._pair()[0]),),
                hint="name columns of classes, or raise max_classes=",
            )


@dataclass(frozen=True, slots=True)
class ConfusionMatrix(_Confusion):
    """{"labels": [...], "matrix": [[...], ...]}: row i, column j counts rows of true class labels[i] predicted as labels[j].

    Classes are texts, whole numbers or booleans (as 0 and 1). labels: which, and in what order; a class beyond them is a
    DataError. None for those that occur, sorted. weight: a column of weights, whose exact sums take the place of counts.
    """

    prediction: str
    label: str
    labels: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(_class(x) for x in self.labels))

    def _pair(self) -> tuple[str, str]:
        return self.prediction, self.label

    def _check(self, cells: State) -> None:
        _Confusion._check(self, cells)
        if self.labels is not None and (other := set(_classes(cells)) - set(self.labels)):
            raise DataError(
                f"ConfusionMatrix: {self.prediction!r} or {self.label!r} holds the class {min(other, key=str)!r}, "
                "which labels= lacks",
                where=(("column", self.prediction),),
                hint="add it to labels=, or leave labels= out",
            )

    def _result(self, state: State) -> dict[str, Any]:
        labels = list(self.labels) if self.labels is not None else _classes(state["cells"])
        place = {name: i for i, name in enumerate(labels)}
        made: list[list[Any]] = [[0 if self.weight is None else 0.0] * len(labels) for _ in labels]
        for key, total in state["cells"].items():
            true, predicted = json.loads(key)
            made[place[true]][place[predicted]] = total if self.weight is None else sums.number(total)
        return {"labels": labels, "matrix": made}


@dataclass(frozen=True, slots=True)
class _PerClass(_Confusion):
    prediction: str
    label: str
    average: str | None = "binary"
    positive: Any = 1
    zero_division: float = math.nan

    def __post_init__(self) -> None:
        Metric.__post_init__(self)
        one_of(self._name, "average", self.average, ("binary", "macro", "micro", "weighted", None))
        object.__setattr__(self, "positive", _class(self.positive))

    def _pair(self) -> tuple[str, str]:
        return self.prediction, self.label

    def _check_kinds(self, batch: pa.RecordBatch) -> None:
        _Confusion._check_kinds(self, batch)
        kind = values(batch, self.label).type
        if self.average == "binary" and _is_number(kind) != isinstance(self.positive, int):
            raise DataError(
                f"{self._name}: positive is {self.positive!r}, and {self.label!r} is {kind}",
                where=(("column", self.label),),
                hint="name the positive class with positive=, or use average='macro', 'weighted', 'micro' or None",
            )

    def _result(self, state: State) -> Any:
        names = _classes(state["cells"])
        hits: dict[Any, sums.Total] = dict.fromkeys(names, 0)
        predicted, true = dict(hits), dict(hits)
        for key, total in state["cells"].items():
            truth, guess = json.loads(key)
            true[truth] = sums.plus(true[truth], total)
            predicted[guess] = sums.plus(predicted[guess], total)
            if truth == guess:
                hits[truth] = sums.plus(hits[truth], total)
        if self.average == "micro":
            return self._score(_all(hits), _all(predicted), _all(true))
        if self.average == "binary":
            return self._score(*(x.get(self.positive, 0) for x in (hits, predicted, true)))
        each = {name: self._score(hits[name], predicted[name], true[name]) for name in names}
        if self.average is None:
            return {str(name): value for name, value in each.items()}
        weight = {name: 1.0 if self.average == "macro" else sums.number(true[name]) for name in names}
        known = [name for name in names if not math.isnan(each[name])]
        below = math.fsum(weight[name] for name in known)
        return math.fsum(each[name] * weight[name] for name in known) / below if below else math.nan

    def _score(self, hits: sums.Total, predicted: sums.Total, true: sums.Total) -> float:
        value = sums.ratio(*self._fraction(hits, predicted, true))
        return float(self.zero_division) if math.isnan(value) else value

    def _fraction(self, hits: sums.Total, predicted: sums.Total, true: sums.Total) -> tuple[sums.Total, sums.Total]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Precision(_PerClass):
    """Of the rows predicted as a class, the share that are of it.

    average: "binary" for the class `positive` against the rest, "macro" for the mean over classes, "weighted" for that by how
    often each is true, "micro" over all rows, None for {class: value}. zero_division: what a class without such rows has;
    a NaN is left out of averages, and is the result where there is nothing else. (scikit-learn's default is 0.)
    weight: a column of weights, added exactly.
    """

    def _fraction(self, hits: sums.Total, predicted: sums.Total, true: sums.Total) -> tuple[sums.Total, sums.Total]:
        return hits, predicted


@dataclass(frozen=True, slots=True)
class Recall(_PerClass):
    """Of the rows of a class, the share that are predicted as it. Arguments as those of Precision."""

    def _fraction(self, hits: sums.Total, predicted: sums.Total, true: sums.Total) -> tuple[sums.Total, sums.Total]:
        return hits, true


@dataclass(frozen=True, slots=True)
class F1(_PerClass):
    """The harmonic mean of precision and recall: 2 * hits / (predicted + true). Arguments as those of Precision."""

    def _fraction(self, hits: sums.Total, predicted: sums.Total, true: sums.Total) -> tuple[sums.Total, sums.Total]:
        return sums.plus(hits, hits), sums.plus(predicted, true)


def _all(totals: dict[Any, sums.Total]) -> sums.Total:
    total: sums.Total = 0
    for each in totals.values():
        total = sums.plus(total, each)
    return total


def _classes(cells: State) -> list[Any]:
    """Whole numbers first, then texts, each in order."""
    return sorted({name for key in cells for name in json.loads(key)}, key=lambda name: (isinstance(name, str), name))


def _is_number(kind: pa.DataType) -> bool:
    """Are the classes of such a column whole numbers? See `_class`."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _class(value: Any) -> int | str:
    if isinstance(value, bool | int | np.integer):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value)
