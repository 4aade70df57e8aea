"""XGBoost: boosters, and models of XGBoost's scikit-learn API.

Invariants: a feature is found by the name that the model has for it; categories are told by the model's own list of them, never
by how a batch happens to number them; the user's own object is never changed. Predictions are those of XGBoost itself, bit for
bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from headrace.core.errors import PlanError
from headrace.models.base import Adapter, check_choice, check_columns
from headrace.models.matrix import (
    NUMBERS,
    Batch,
    Features,
    Matrix,
    Selection,
    codes,
    is_feature,
    is_number,
    is_of_kind,
    is_text,
    is_vector,
    to_matrix,
)

if TYPE_CHECKING:
    from headrace.contracts.model import Place

_COUNTS_BYTES = (3, 3)  # the first release in which categories beyond ASCII are whole

Output = Literal["predict", "proba", "margin", "leaf", "contrib"]


@dataclass(frozen=True, eq=False)
class XGBoost(Adapter):
    """A gradient-boosted model of XGBoost.

    model: the path or uri of one saved by save_model (.json, .ubj), read as a Booster; or a live Booster or XGBClassifier,
    XGBRegressor, XGBRanker. output, float32 unless said otherwise, a tensor where a row has several:

    - "predict": what the model's own `predict` gives. A classifier of the scikit-learn API: its labels. A Booster: the
      objective's values, for binary:logistic the probability, for multi:softprob (classes,).
    - "proba": (classes,), only of a live classifier.
    - "margin": before the objective's transformation.
    - "leaf": the index of the leaf in each tree, (trees,).
    - "contrib": SHAP values (features + 1,), the last one the bias; (classes, features + 1) of several classes.

    iteration_range: (first, end) of boosting rounds; None for all, or those up to the best one where a live model of the
    scikit-learn API stopped early. Null is missing. Features that are categories (enable_categorical) come as texts or
    dictionaries, or as the numbers that they were trained as; a category that the model does not know is missing, too. Texts
    beyond ASCII are refused before XGBoost 3.3, which damages them when it is trained from pandas.

    Runs on CPUs; on a GPU only with predict(device="cuda"). With input=None the columns are the model's features.
    Raises PlanError before the run for features that are missing or of no use.
    """

    model: Any
    _: KW_ONLY
    output: Output = "predict"
    iteration_range: tuple[int, int] | None = None

    extra = "xgboost"

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        check_choice(self.name, "output", self.output, ("predict", "proba", "margin", "leaf", "contrib"))
        model = self._open({})
        self._check_model(model)
        if schema is not None:
            _Inputs(self.name, _booster(model)).choose(schema, inputs)

    def load(self, place: Place) -> Any:
        settings = {"nthread": place.threads, "device": place.device if place.device.startswith("cuda") else "cpu"}
        model = self._open(settings) if self.uri is not None else _own(self.model, settings)
        self._check_model(model)
        return _Loaded(self, model, place)

    def _open(self, settings: Mapping[str, Any]) -> Any:
        """The Booster in the artifact, or the live model itself."""
        if self.uri is None:
            return self.model
        import xgboost

        try:
            return xgboost.Booster(params=dict(settings), model_file=self.local_path())
        except xgboost.core.XGBoostError as error:
            text = str(error).splitlines()[0][:300]
            raise PlanError(
                f"{self.name} is no model of XGBoost: {text}", hint="save it with save_model, as .json or .ubj"
            ) from None

    def _check_model(self, model: Any) -> None:
        import xgboost

        if not isinstance(model, xgboost.Booster | xgboost.XGBModel):
            hint = "give a path, a Booster, or a model of XGBoost's scikit-learn API"
            raise PlanError(f"{self.name}: a {type(model).__name__} is no model of XGBoost", hint=hint)
        if self.output == "proba" and not hasattr(model, "predict_proba"):
            hint = 'use output="predict": a Booster answers with the values of its objective, such as probabilities'
            raise PlanError(f'{self.name}: output="proba" is for live classifiers of the scikit-learn API', hint=hint)


def _booster(model: Any) -> Any:
    return model.get_booster() if hasattr(model, "get_booster") else model


def _own(model: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of the live model that may be set up for its place."""
    model = copy.deepcopy(model)
    if hasattr(model, "get_booster"):
        model.set_params(n_jobs=settings["nthread"], device=settings["device"])
    _booster(model).set_param(dict(settings))
    return model


# --- inputs ----------------------------------------------------------------------------------------------------------


class _Inputs:
    """A booster's features: which columns they are, and the matrix that they make."""

    def __init__(self, name: str, booster: Any) -> None:
        names = booster.feature_names
        types = booster.feature_types or []
        self._name = name
        self._features = Features(tuple(names) if names else None, booster.num_features())
        self._categories = _categories(name, booster) if "c" in types else {}

    def choose(self, schema: pa.Schema, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """The columns in the model's order. Raises PlanError."""
        columns = self._features.columns(self._name, schema, inputs, is_feature)
        if len(columns) == 1 and is_vector(schema.field(columns[0]).type):
            return columns
        check_columns(self._name, schema, [c for i, c in enumerate(columns) if i not in self._categories], is_number, NUMBERS)
        for i, categories in self._categories.items():
            self._check_category(schema, columns[i], categories)
        return columns

    def _check_category(self, schema: pa.Schema, column: str, categories: pa.Array) -> None:
        wanted = f"categories of type {categories.type}"
        check_columns(self._name, schema, [column], lambda t: is_of_kind(t, categories), wanted)

    def matrix(self, columns: list[pa.Array], names: tuple[str, ...]) -> Matrix:
        """float32, which is what XGBoost computes with; categories as the model's codes."""
        import numpy as np

        if len(columns) > 1 or not is_vector(columns[0].type):
            columns = [codes(c, self._categories[i]) if i in self._categories else c for i, c in enumerate(columns)]
        return to_matrix(columns, np.float32, names)


def _categories(name: str, booster: Any) -> dict[int, pa.Array]:
    """Index of a feature -> its categories, of those that were trained by name. Before XGBoost 3.1 models do not hold them.

    Raises PlanError for categories that are not those of the training, or may not be.
    """
    if not hasattr(booster, "get_categories"):
        return {}
    held = booster.get_categories(export_to_arrow=True).to_arrow()
    found = {i: categories for i, (_, categories) in enumerate(held) if categories is not None}
    for i, categories in found.items():
        if is_text(categories.type) and _may_be_cut(categories):
            raise PlanError(
                f"{name}: the categories of {held[i][0]!r} hold letters beyond ASCII, or parts of them: XGBoost cuts them "
                "at the wrong places when it is trained from pandas, so that the model does not know them",
                hint="train it with categories of ASCII letters or of whole numbers",
            )
    return found


def _may_be_cut(categories: pa.Array) -> bool:
    """Up to 3.2 offsets counted letters where bytes were meant (dmlc/xgboost#12371): pieces of UTF-8, which by chance may be
    whole letters. What a later version read from a file may be that, too, but only pieces tell.
    """
    import pyarrow.compute as pc
    import xgboost

    try:
        categories.validate(full=True)
    except pa.ArrowInvalid:
        return True
    release = tuple(int(part) for part in xgboost.__version__.split(".")[:2])
    return release < _COUNTS_BYTES and not pc.call_function("all", [pc.call_function("string_is_ascii", [categories])]).as_py()


# --- calls -----------------------------------------------------------------------------------------------------------


class _Loaded:
    """The model in a worker: a batch in, an array of as many rows out."""

    def __init__(self, adapter: XGBoost, model: Any, place: Place) -> None:
        booster = _booster(model)
        self._booster = booster
        self._inputs = _Inputs(adapter.name, booster)
        self._select = Selection(place.inputs, lambda schema: self._inputs.choose(schema, place.inputs))
        self._in_place = not place.device.startswith("cuda") and _is_trees(booster)
        self._threads = place.threads
        rounds = adapter.iteration_range
        if model is booster or adapter.output in ("leaf", "contrib"):  # which the scikit-learn API has not, or only by name
            self._predict = self._of_booster(adapter.output, rounds or _best(model))
        else:
            self._predict = _of_wrapper(model, adapter.output, rounds)

    def __call__(self, batch: Batch) -> Any:
        return self._predict(self._inputs.matrix(*self._select(batch)))

    def _of_booster(self, output: Output, rounds: tuple[int, int]) -> Callable[[Matrix], Any]:
        booster = self._booster
        if output in ("predict", "margin") and self._in_place:
            kind = "margin" if output == "margin" else "value"
            return lambda x: booster.inplace_predict(x, iteration_range=rounds, predict_type=kind, validate_features=False)
        how = {"margin": {"output_margin": True}, "leaf": {"pred_leaf": True}, "contrib": {"pred_contribs": True}}.get(
            output, {}
        )
        return lambda x: booster.predict(self._dmatrix(x), iteration_range=rounds, validate_features=False, **how)

    def _dmatrix(self, x: Matrix) -> Any:
        import xgboost

        types = self._booster.feature_types
        return xgboost.DMatrix(x, nthread=self._threads, feature_types=types, enable_categorical=bool(types))


def _of_wrapper(model: Any, output: Output, rounds: tuple[int, int] | None) -> Callable[[Matrix], Any]:
    how: dict[str, Any] = {"iteration_range": rounds, "validate_features": False}  # they are found by name already
    if output == "proba":
        return lambda x: model.predict_proba(x, **how)
    return lambda x: model.predict(x, output_margin=output == "margin", **how)


def _best(model: Any) -> tuple[int, int]:
    """Of a model of the scikit-learn API that stopped early the rounds up to the best one; (0, 0) stands for all."""
    if not hasattr(model, "get_booster"):
        return (0, 0)
    try:
        return (0, int(model.best_iteration) + 1)
    except AttributeError:  # no early stopping
        return (0, 0)


def _is_trees(booster: Any) -> bool:
    """Linear boosters can't predict without a DMatrix."""
    import json

    return json.loads(booster.save_config())["learner"]["gradient_booster"]["name"] != "gblinear"
