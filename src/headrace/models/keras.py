"""Keras 3 models, with whatever backend Keras is set to.

Invariants: a Lambda layer, which is code, is not loaded without `trust`; the backend is the user's choice (KERAS_BACKEND) and
is not touched.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import PlanError
from headrace.models.base import Adapter, check_columns, refuse_untrusted
from headrace.models.tensor_columns import is_text, makes_tensor
from headrace.models.torch_device import is_accelerator, torch_threads

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Keras(Adapter):
    """A Keras model.

    model: a .keras or .h5 file (path or uri) that holds a whole model, or a live model.
    stack: the columns are passed as one float32 matrix (rows, columns), in the order declared. By default each column is an
        input: by name where the model's inputs are called as the columns are, else in the order declared.
    custom_objects: {name: class or function} of layers that are not Keras's own.
    trust: the file may run code of whoever made it: needed for Lambda layers.

    Inputs: columns of numbers, bools, text, fixed-shape tensors. Outputs: an array, a tuple or a dict of arrays.
    Raises PlanError, before the run, for what can't work.
    """

    model: Any
    stack: bool = field(default=False, kw_only=True)
    custom_objects: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    trust: bool = field(default=False, kw_only=True)

    extra = "keras"
    devices = ("cuda", "cpu")
    batch_format = "numpy"

    def check_artifact(self) -> None:
        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        if not is_remote(self.uri):
            _check_file(self.name, self.local_path(), trust=self.trust)

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        columns = inputs or (() if schema is None else tuple(schema.names))
        accepts = makes_tensor if self.stack else lambda t: makes_tensor(t) or is_text(t)
        check_columns(self.name, schema, columns, accepts, "numbers, bools" + ("" if self.stack else ", text") + " or tensors")

    def meaning(self) -> Mapping[str, Any]:
        said = dict(super().meaning())
        if self.uri is None:  # pickled, it would hold the time of day
            config = _without_ids(json.loads(self.model.to_json()))
            said["model"] = {"config": config, "weights": [np.asarray(w) for w in self.model.get_weights()]}
        return said

    def load(self, place: Place) -> KerasModel:
        resources = contextlib.ExitStack()
        try:
            import keras

            if keras.backend.backend() == "torch" and not is_accelerator(place.device):
                resources.enter_context(torch_threads(place.threads))
            with _device(place.device):
                return KerasModel(self, self.model if self.uri is None else self._from_file(), place, resources)
        except BaseException:
            resources.close()
            raise

    def _from_file(self) -> Any:
        import keras

        path = self.local_path()
        _check_file(self.name, path, trust=self.trust)
        return keras.saving.load_model(path, custom_objects=dict(self.custom_objects), compile=False, safe_mode=not self.trust)


class KerasModel:
    """A loaded model in one worker."""

    def __init__(self, spec: Keras, model: Any, place: Place, resources: contextlib.ExitStack) -> None:
        self._spec = spec
        self._model = model
        self._place = place
        self._resources = resources

    def __call__(self, batch: Any) -> Any:
        import keras

        with _device(self._place.device):
            made = self._model.predict_on_batch(self._inputs(batch))
        made = keras.tree.map_structure(np.asarray, made)
        return tuple(made) if isinstance(made, list) else made

    def _inputs(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return self._array(batch)
        columns = list(self._place.inputs) or list(batch)
        if self._spec.stack:
            return stacked([batch[name] for name in columns])
        arrays = {name: self._array(batch[name]) for name in columns}
        if len(arrays) == 1:
            return next(iter(arrays.values()))
        wanted = [tensor.name for tensor in getattr(self._model, "inputs", None) or ()]
        return [arrays[name] for name in (wanted if set(wanted) == set(columns) else columns)]

    @staticmethod
    def _array(values: np.ndarray) -> np.ndarray:
        """Of its own memory: backends warn of arrays that can't be written to."""
        return np.array(values, dtype=np.float32 if values.dtype == np.float64 else None)

    def close(self) -> None:
        self._resources.close()


def stacked(columns: list[np.ndarray]) -> np.ndarray:
    """One float32 matrix, a row each; columns of tensors take as many of its columns as they have values."""
    return np.concatenate([np.asarray(c, dtype=np.float32).reshape(len(c), -1) for c in columns], axis=1)


def _device(device: str) -> contextlib.AbstractContextManager[Any]:
    """Keras's name of a worker's device."""
    import keras

    kind, _, index = device.partition(":")
    if kind == "cuda":
        return keras.device(f"gpu:{index or 0}")
    # Of "cpu:0" torch makes another device than the one where its tensors are, and Keras then takes seeds for weights.
    return keras.device("cpu" if keras.backend.backend() == "torch" else "cpu:0")


# --- files -----------------------------------------------------------------------------------------------------------


def _check_file(name: str, path: str, *, trust: bool) -> None:
    """Raise PlanError for a file that holds no model, or one that would have to be trusted."""
    config = _config(name, path)
    if any(part.get("class_name") in ("Lambda", "__lambda__") for part in _parts(config)):
        refuse_untrusted(name, "a Lambda layer", trust=trust, instead="replace it by a layer class in custom_objects")


def _config(name: str, path: str) -> Any:
    """The model's description in a .keras or .h5 file. Nothing is made of it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "config.json" in archive.namelist():
                return json.loads(archive.read("config.json"))
    elif path.endswith((".h5", ".hdf5", ".keras")):
        import h5py

        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                if (found := file.attrs.get("model_config")) is not None:
                    return json.loads(found)
    raise PlanError(
        f"{name} is no .keras or .h5 file of a whole model",
        hint="save it with model.save('model.keras'); weights alone are not enough",
    )


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """All dicts within."""
    if isinstance(config, Mapping):
        yield config
    if isinstance(config, Mapping | list):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from _parts(value)


def _without_ids(config: Any) -> Any:
    """Without the addresses that Keras writes into descriptions."""
    if isinstance(config, Mapping):
        return {k: _without_ids(v) for k, v in config.items() if k != "shared_object_id"}
    return [_without_ids(v) for v in config] if isinstance(config, list) else config
