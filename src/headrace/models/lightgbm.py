"""LightGBM: boosters, and models of LightGBM's scikit-learn API.

Invariants: a feature is found by the name that the model has for it; categories are told by the model's own list of them, never
by how a batch happens to number them. Predictions are those of LightGBM itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from headrace.core.errors import PlanError
from headrace.models.base import Adapter, check_choice, check_columns
from headrace.models.matrix import (
    Batch,
    Features,
    Matrix,
    Selection,
    codes,
    is_category,
    is_feature,
    is_number,
    is_of_kind,
    is_vector,
    to_matrix,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.contracts.model import Place

Output = Literal["predict", "proba", "raw_score", "leaf", "contrib"]

_HOW: dict[str, dict[str, Any]] = {
    "raw_score": {"raw_score": True},
    "leaf": {"pred_leaf": True},
    "contrib": {"pred_contrib": True},
}


@dataclass(frozen=True, eq=False)
class LightGBM(Adapter):
    """A gradient-boosted model of LightGBM.

    model: the path or uri of one saved by save_model (text), read as a Booster; or a live Booster or LGBMClassifier,
    LGBMRegressor, LGBMRanker. output, float64 unless said otherwise, a tensor where a row has several:

    - "predict": what the model's own `predict` gives. A classifier of the scikit-learn API: its labels. A Booster: the
      objective's values, for binary the probability, for multiclass (classes,).
    - "proba": (classes,), only of a live classifier.
    - "raw_score": before the objective's transformation.
    - "leaf": the index of the leaf in each tree, (trees,).
    - "contrib": SHAP values (features + 1,), the last one the bias; of several classes one such run after the other.

    num_iteration: boosting rounds to use; None for those up to the best one where training stopped early, else all; 0 or less
    for all. Null is missing. Features that were categories of a frame come as texts or dictionaries; a category that the
    model does not know is missing, too.

    With input=None the columns are the model's features. Raises PlanError before the run for features that are missing or of
    no use.
    """

    model: Any
    _: KW_ONLY
    output: Output = "predict"
    num_iteration: int | None = None

    extra = "lightgbm"

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        check_choice(self.name, "output", self.output, ("predict", "proba", "raw_score", "leaf", "contrib"))
        model = self._open()
        self._check_model(model)
        if schema is not None:
            _Inputs(self.name, _booster(model)).choose(schema, inputs)

    def meaning(self) -> Mapping[str, Any]:
        """Of a live model its trees: the rest of its state differs from copy to copy."""
        said = super().meaning()
        if self.uri is not None or not hasattr(_booster(self.model), "model_to_string"):
            return said
        booster = _booster(self.model)
        trees = booster.model_to_string(num_iteration=-1).partition("\nend of trees")[0]
        classes = getattr(self.model, "classes_", None)
        return {**said, "model": [trees, booster.pandas_categorical, max(0, booster.best_iteration), classes]}

    def load(self, place: Place) -> Any:
        model = self._open()
        self._check_model(model)
        return _Loaded(self, model, place)

    def _open(self) -> Any:
        """The Booster in the artifact, or the live model."""
        if self.uri is None:
            return self.model
        import lightgbm

        path = self.local_path()
        with open(path, "rb") as file:
            begins = file.read(4)
        if begins != b"tree":  # or the library would print to stdout before it raises
            hint = "save it with booster.save_model(path)"
            raise PlanError(f"{self.name} is no text model of LightGBM", hint=hint)
        try:
            return lightgbm.Booster(model_file=path)
        except lightgbm.basic.LightGBMError as error:
            raise PlanError(f"{self.name} can't be read: {error}", hint="save it again with booster.save_model(path)") from None

    def _check_model(self, model: Any) -> None:
        import lightgbm

        if not isinstance(model, lightgbm.Booster | lightgbm.LGBMModel):
            hint = "give a path, a Booster, or a model of LightGBM's scikit-learn API"
            raise PlanError(f"{self.name}: a {type(model).__name__} is no model of LightGBM", hint=hint)
        classifier = hasattr(model, "classes_")
        if self.output == "proba" and not classifier:
            hint = 'use output="predict": a Booster answers with the values of its objective, such as probabilities'
            raise PlanError(f'{self.name}: output="proba" is for live classifiers of the scikit-learn API', hint=hint)
        if classifier and self.output in ("predict", "proba") and callable(getattr(model, "objective", None)):
            hint = 'use output="raw_score" and transform it yourself'
            raise PlanError(f"{self.name}: a classifier with an objective of its own has no probabilities", hint=hint)


def _booster(model: Any) -> Any:
    return model.booster_ if hasattr(model, "booster_") else model


# --- inputs ----------------------------------------------------------------------------------------------------------


class _Inputs:
    """A booster's features: which columns they are, and the matrix that they make."""

    def __init__(self, name: str, booster: Any) -> None:
        import pyarrow as pa

        names: list[str] = booster.feature_name()
        self._name = name
        self._names = None if names == [f"Column_{i}" for i in range(len(names))] else names
        self._count = len(names)
        self._categories: list[Any] = [pa.array(values) for values in list(booster.pandas_categorical or [])]

    def choose(self, schema: pa.Schema, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """The columns in the model's order. Raises PlanError."""
        # LightGBM writes _ for the spaces of a name.
        written = {n.replace(" ", "_"): n for n in (inputs or schema.names)}
        names = None if self._names is None else tuple(written.get(n, n) for n in self._names)
        accepts = is_feature if self._categories else is_number
        columns = Features(names, self._count).columns(self._name, schema, inputs, accepts)
        if len(columns) != 1 or not is_vector(schema.field(columns[0]).type):
            self._check_categories(schema, columns)
        return columns

    def _check_categories(self, schema: pa.Schema, columns: tuple[str, ...]) -> None:
        if not self._categories:
            return
        named = [c for c in columns if is_category(schema.field(c).type)]
        if len(named) != len(self._categories):
            there = f"{len(named)} ({', '.join(map(repr, named))})" if named else "none"
            trained = f"{self._name} was trained with {len(self._categories)} features that are categories"
            hint = "give exactly these as texts or dictionaries: pyarrow's dictionary_encode() makes one of any column"
            raise PlanError(f"{trained}, and the input has {there}", hint=hint)
        for name, categories in zip(named, self._categories, strict=True):
            self._check_category(schema, name, categories)

    def _check_category(self, schema: pa.Schema, column: str, categories: pa.Array) -> None:
        wanted = f"categories of type {categories.type}"
        check_columns(self._name, schema, [column], lambda t: is_of_kind(t, categories), wanted)

    def matrix(self, columns: list[pa.Array], names: tuple[str, ...]) -> Matrix:
        """float32 when all columns are, else float64, which is what LightGBM compares; categories as the model's codes."""
        if self._categories and (len(columns) > 1 or not is_vector(columns[0].type)):
            known = iter(self._categories)
            columns = [codes(c, next(known)) if is_category(c.type) else c for c in columns]
        return to_matrix(columns, names=names)


# --- calls -----------------------------------------------------------------------------------------------------------


class _Loaded:
    """The model in a worker: a batch in, an array of as many rows out."""

    def __init__(self, adapter: LightGBM, model: Any, place: Place) -> None:
        self._booster = _booster(model)
        self._inputs = _Inputs(adapter.name, self._booster)
        self._select = Selection(place.inputs, lambda schema: self._inputs.choose(schema, place.inputs))
        self._how = {**_HOW.get(adapter.output, {}), "num_iteration": adapter.num_iteration, "num_threads": place.threads}
        self._classes = getattr(model, "classes_", None) if adapter.output in ("predict", "proba") else None
        self._labels = adapter.output == "predict"

    def __call__(self, batch: Batch) -> Any:
        import numpy as np

        scores = self._booster.predict(self._inputs.matrix(*self._select(batch)), **self._how)
        if self._classes is None:
            return scores
        # As LGBMClassifier has it: the probability of the second of two classes, and labels by the largest.
        proba = np.column_stack((1.0 - scores, scores)) if scores.ndim == 1 else scores
        return np.asarray(self._classes)[np.argmax(proba, axis=1)] if self._labels else proba
