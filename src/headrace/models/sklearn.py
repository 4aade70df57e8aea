"""Sklearn: estimators and pipelines of scikit-learn, and whatever has its methods.

Invariants: an estimator that was trained on a frame gets a frame with its columns, by their names and in its order; any other
gets a matrix in the order of input=[...]. The user's own object is never changed. Parallelism is the engine's: an estimator
uses no more than the threads of its place.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from headrace.core.errors import PlanError, UserCodeError
from headrace.core.extras import require
from headrace.models.base import Adapter, check_choice, refuse_untrusted
from headrace.models.matrix import (
    NUMBERS,
    Batch,
    Features,
    Matrix,
    Selection,
    is_feature,
    is_number,
    is_vector,
    to_frame,
    to_matrix,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.contracts.model import Place

Method = Literal["predict", "predict_proba", "decision_function", "transform"]

PEEK_BYTES = 16 << 20  # a trusted local artifact up to this size is loaded before the run, to compare its features


@dataclass(frozen=True, eq=False)
class Sklearn(Adapter):
    """An estimator or pipeline of scikit-learn.

    model: a fitted estimator, or the path or uri of one saved by joblib, pickle or skops (*.skops). method: what is asked of
    it. index: of several output columns only this one, as floats; positive=True: that of a binary classifier's second class.
    trust: joblib and pickle files can run code while they are loaded; say that you know who made this one.

    With input=None the columns are those of `feature_names_in_`, where the estimator has it. Output: one value a row, or a
    tensor (columns,) a row where the method gives several, as predict_proba does: float64 (classes,), in the order of
    `classes_`. Sparse output is made dense. Input: see models/matrix.py; a frame is what pandas.read_parquet would give.
    Raises PlanError before the run for columns that are missing or of no use.
    """

    model: Any
    _: KW_ONLY
    method: Method = "predict"
    index: int | None = None
    positive: bool = False
    trust: bool = False

    extra = "sklearn"

    def check_artifact(self) -> None:
        if not self._is_skops:
            refuse_untrusted(self.name, "a pickle or joblib file", trust=self.trust, instead="save it with skops (*.skops)")
        elif not self.trust:
            _check_skops(self.name, self.local_path())

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        check_choice(self.name, "method", self.method, ("predict", "predict_proba", "decision_function", "transform"))
        model = self._peek()
        if model is None:
            return
        self._check_model(model)
        if _names(model) is not None:
            require("pandas", f"{self.name}, trained on a frame,")
        if schema is not None:
            _choose(self.name, model, schema, inputs)

    def load(self, place: Place) -> Any:
        model = self.model if self.uri is None else self._read(self.local_path())
        self._check_model(model)
        return _Loaded(self, _alone(model, shared=self.uri is None), place)

    @property
    def _is_skops(self) -> bool:
        return self.uri is not None and self.uri.endswith(".skops")

    def _peek(self) -> Any:
        """The estimator, where it costs little and is safe to have it before the run."""
        uri = self.uri
        if uri is None:
            return self.model
        if not self.trust or "://" in uri or os.path.getsize(self.local_path()) > PEEK_BYTES:
            return None
        try:
            return self._read(self.local_path())
        except Exception as error:  # whatever unpickling raises
            hint = "load it by hand to see more; the same packages must be installed as where it was saved"
            raise PlanError(f"{self.name} can't be loaded: {type(error).__name__}: {error}", hint=hint) from error

    def _read(self, path: str) -> Any:
        if self._is_skops:
            import skops.io  # type: ignore[import-not-found]

            return skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path) if self.trust else None)
        refuse_untrusted(self.name, "a pickle or joblib file", trust=self.trust)
        import joblib

        return joblib.load(path)  # which reads plain pickles, too

    def _check_model(self, model: Any) -> None:
        if not callable(getattr(model, self.method, None)):
            has = [m for m in ("predict", "predict_proba", "decision_function", "transform") if hasattr(model, m)]
            hint = f"it has {', '.join(has)}" if has else "give a fitted estimator"
            raise PlanError(f"{self.name}: a {type(model).__name__} has no {self.method}", hint=hint)
        classes = getattr(model, "classes_", None)
        if self.index is not None and self.method == "predict_proba" and hasattr(classes, "shape"):
            count = len(classes)  # pyright: ignore[reportArgumentType]
            if not -count <= self.index < count:
                hint = f"it has {count} classes: {', '.join(map(str, classes[:20]))}"  # pyright: ignore[reportOptionalSubscript]
                raise PlanError(f"{self.name} has no class {self.index}", hint=hint)
        if not self.positive:
            return
        if self.method != "predict_proba" or self.index is not None or classes is None or len(classes) != 2:
            hint = "use index= for one column of several"
            raise PlanError(f"{self.name}: positive=True is for predict_proba of a classifier of two classes", hint=hint)


def _check_skops(name: str, path: str) -> None:
    """Raise PlanError for types that skops does not know to be harmless."""
    from importlib.util import find_spec

    if find_spec("skops") is None:
        raise PlanError(f"{name} needs skops, not installed here", hint="pip install skops")
    import skops.io  # type: ignore[import-not-found]

    unknown = skops.io.get_untrusted_types(file=path)
    if unknown:
        refuse_untrusted(name, f"types such as {unknown[0]}", trust=False)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _names(model: Any) -> tuple[str, ...] | None:
    found = getattr(model, "feature_names_in_", None)
    return None if found is None else tuple(map(str, found))


def _choose(name: str, model: Any, schema: pa.Schema, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The estimator's columns. Raises PlanError."""
    names, count = _names(model), getattr(model, "n_features_in_", None)
    features = Features(names, None if count is None else int(count))
    if _wants_numbers(model):
        return features.columns(name, schema, inputs, is_feature if _takes_categories(model) else is_number)
    if names is not None:
        return features.columns(name, schema, inputs, lambda t: not is_vector(t), "plain values")
    return features.columns(name, schema, inputs, is_feature, f"{NUMBERS}, or texts")


def _wants_numbers(model: Any) -> bool:
    """Is it one of scikit-learn's own predictors, which compute with their input as it is? Others may convert texts."""
    top, _, rest = type(model).__module__.partition(".")
    if top != "sklearn" or not hasattr(model, "predict") or rest.startswith("dummy"):
        return False
    return not {"steps", "estimator", "estimators"} & model.get_params(deep=False).keys()


def _takes_categories(model: Any) -> bool:
    return hasattr(model, "categorical_features")


# --- threads ---------------------------------------------------------------------------------------------------------


class _Threads:
    """Limits the threads of BLAS and OpenMP in calls from any number of workers of this process.

    OpenMP's limit belongs to a thread and is put back after each call. BLAS's belongs to the process: the first call of several
    at once sets it, and the last puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._blas: Any = None

    @contextlib.contextmanager
    def limited(self, controller: Any, threads: int) -> Iterator[None]:
        with self._lock:
            if self._calls == 0:
                self._blas = controller.limit(limits=threads, user_api="blas")
            self._calls += 1
        try:
            with controller.limit(limits=threads, user_api="openmp"):
                yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0:
                    self._blas.restore_original_limits()


_threads = _Threads()


def _alone(model: Any, *, shared: bool) -> Any:
    """The estimator with n_jobs=1 wherever it has it. shared: it is the user's; a copy where something is to change."""
    parallel = [e for e in _estimators(model, set()) if getattr(e, "n_jobs", None) not in (None, 1)]
    if not parallel:
        return model
    if shared:
        return _alone(copy.deepcopy(model), shared=False)
    for estimator in parallel:
        estimator.n_jobs = 1
    return model


def _estimators(value: Any, seen: set[int]) -> Iterator[Any]:
    """It and the estimators inside it: steps, fitted copies, best ones of searches."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, list | tuple):
        for part in value:
            yield from _estimators(part, seen)
    elif isinstance(value, dict):
        yield from _estimators(list(value.values()), seen)
    elif hasattr(value, "get_params") and not isinstance(value, type):
        yield value
        yield from _estimators(list(vars(value).values()), seen)


# --- calls -----------------------------------------------------------------------------------------------------------


class _Loaded:
    """The estimator in a worker: a batch in, an array of as many rows out."""

    def __init__(self, adapter: Sklearn, model: Any, place: Place) -> None:
        from threadpoolctl import ThreadpoolController

        self._name = adapter.name
        self._method = getattr(model, adapter.method)
        self._index = 1 if adapter.positive else adapter.index
        self._framed = _names(model) is not None
        self._flat = not hasattr(model, "n_features_in_")  # such as pipelines that begin with a vectoriser of texts
        self._select = Selection(place.inputs, lambda schema: _choose(adapter.name, model, schema, place.inputs))
        self._threads = place.threads
        self._controller = ThreadpoolController()  # of the libraries that are loaded by now

    def __call__(self, batch: Batch) -> Any:
        x = self._input(batch)
        with _threads.limited(self._controller, self._threads):
            result = self._method(x)
        return self._output(result)

    def _input(self, batch: Batch) -> Any:
        columns, names = self._select(batch)
        if not is_vector(columns[0].type):
            if self._framed:
                return to_frame(columns, names)
            if not all(is_number(c.type) for c in columns):
                return self._texts(columns)
        matrix = to_matrix(columns, names=names)
        matrix = matrix if matrix.flags.writeable else matrix.copy()  # some transformers compute in place
        if not self._framed:
            return matrix
        import pandas as pd

        return pd.DataFrame(matrix, columns=self._method.__self__.feature_names_in_)

    def _texts(self, columns: list[pa.Array]) -> Any:
        """A list of documents, or a matrix of objects as categories are trained on."""
        import numpy as np

        if len(columns) == 1 and self._flat:
            return np.array([*columns[0].to_pylist(), None], dtype=object)[:-1]  # one more, so that it is never a matrix
        out = np.empty((len(columns[0]), len(columns)), dtype=object)
        for j, column in enumerate(columns):
            out[:, j] = column.to_pylist()
        return out

    def _output(self, result: Any) -> Matrix:
        import numpy as np

        if isinstance(result, list):
            hint = "ask for one output at a time: wrap the estimator of that output"
            raise UserCodeError(f"{self._name} answered with a list of {len(result)} arrays, one an output", hint=hint)
        if hasattr(result, "toarray"):
            result = result.toarray()
        result = np.asarray(result)
        if self._index is None:
            return result
        if result.ndim < 2 or not -result.shape[1] <= self._index < result.shape[1]:
            shape = " x ".join(map(str, result.shape[1:])) or "one"
            raise UserCodeError(f"{self._name} has no output column {self._index}", hint=f"a row's output is {shape}")
        return np.ascontiguousarray(result[:, self._index])
