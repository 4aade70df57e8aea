"""TensorFlow SavedModels, by one of their signatures.

Invariant: a graph with operations that reach files, Python or other machines is not loaded without `trust`. TensorFlow itself
says that models are programs: what is left can still use up memory and time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import PlanError
from headrace.models.base import Adapter, check_columns, refuse_untrusted
from headrace.models.tensor_columns import is_text, makes_tensor

if TYPE_CHECKING:
    import pyarrow as pa

# SaveV2 and RestoreV2 are in every SavedModel, for its variables.
# fmt: off
_REACHING_OUT = frozenset((
    "ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "PyFuncStateless", "EagerPyFunc", "PrintV2", "DebugIdentityV2",
    "WholeFileReaderV2", "TextLineReaderV2", "TFRecordReaderV2", "TFRecordDataset", "TFRecordDatasetV2", "TextLineDataset",
))
# fmt: on


@dataclass(frozen=True)
class TensorFlow(Adapter):
    """A TensorFlow SavedModel.

    model: the folder that holds saved_model.pb (path or uri).
    signature: which of the model's signatures to call.
    trust: the files may run code of whoever made them: needed for graphs that read or write files, or call Python.

    Inputs: columns of numbers, bools, text, binary, fixed-shape tensors, called as the signature's inputs are; one column for
    one input may have any name. Numbers take the input's type; a number becomes a vector of one where the input wants that.
    Outputs: a dict of arrays by the signature's names; the array itself, where there is only one. Texts are bytes.
    Threads are TensorFlow's own setting (TF_NUM_INTRAOP_THREADS, TF_NUM_INTEROP_THREADS). Raises PlanError, before the run, for
    what can't work.
    """

    model: Any
    signature: str = "serving_default"
    trust: bool = field(default=False, kw_only=True)

    extra = "tensorflow"
    devices = ("cuda", "cpu")
    batch_format = "numpy"

    def __post_init__(self) -> None:
        if self.uri is None:
            hint = "for a live model give its function to predict, or use hr.models.Keras"
            raise PlanError(f"TensorFlow: a {type(self.model).__name__} is no path of a SavedModel", hint=hint)

    def check_artifact(self) -> None:
        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        if not is_remote(self.uri):
            self._inputs_of(self.local_path())

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        import pyarrow as pa

        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        columns = inputs or (() if schema is None else tuple(schema.names))
        accepts = lambda t: makes_tensor(t) or is_text(t) or pa.types.is_binary(t) or pa.types.is_large_binary(t)  # noqa: E731
        check_columns(self.name, schema, columns, accepts, "numbers, bools, text, binary or tensors")
        if columns and not is_remote(self.uri):
            pair(self.name, self._inputs_of(self.local_path()), columns)

    def load(self, place: Place) -> SavedModel:
        import tensorflow as tf

        path = self.local_path()
        self._inputs_of(path)
        kind, _, index = place.device.partition(":")
        device = f"/GPU:{index or 0}" if kind == "cuda" else "/CPU:0"
        with tf.device(device):
            return SavedModel(self, tf.saved_model.load(path), device, place)

    def _inputs_of(self, path: str) -> tuple[str, ...]:
        """The names of the signature's inputs. Raises PlanError for what is no SavedModel, or would have to be trusted."""
        if not os.path.isfile(os.path.join(path, "saved_model.pb")):
            raise PlanError(f"{self.name}: {path} holds no saved_model.pb", hint="give a folder that tf.saved_model.save made")
        from tensorflow.core.protobuf import saved_model_pb2

        description = saved_model_pb2.SavedModel()
        with open(os.path.join(path, "saved_model.pb"), "rb") as file:
            try:
                description.ParseFromString(file.read())
            except Exception as error:  # protobuf's own, of a type that changes with its version
                raise PlanError(f"{self.name}: {path} is no SavedModel: {error}", hint="save it again") from None
        for graph in description.meta_graphs:
            nodes = [*graph.graph_def.node, *(n for f in graph.graph_def.library.function for n in f.node_def)]
            if found := sorted({n.op for n in nodes} & _REACHING_OUT):
                refuse_untrusted(self.name, f"a graph with {', '.join(found)}", trust=self.trust)
        signatures = {name: s for graph in description.meta_graphs for name, s in graph.signature_def.items()}
        if self.signature not in signatures:
            there = sorted(name for name in signatures if not name.startswith("__"))
            raise PlanError(f"{self.name} has no signature {self.signature!r}", hint=f"there are: {', '.join(there) or 'none'}")
        return tuple(signatures[self.signature].inputs)


class SavedModel:
    """A loaded model in one worker."""

    def __init__(self, spec: TensorFlow, loaded: Any, device: str, place: Place) -> None:
        self._loaded = loaded  # its variables live as long as it does
        self._call = loaded.signatures[spec.signature]
        self._specs: Mapping[str, Any] = self._call.structured_input_signature[1]
        self._name = spec.name
        self._device = device
        self._columns = place.inputs

    def __call__(self, batch: Any) -> Any:
        import tensorflow as tf

        if not isinstance(batch, Mapping):
            batch = {self._columns[0] if self._columns else "input": batch}
        names = pair(self._name, tuple(self._specs), self._columns or tuple(batch))
        with tf.device(self._device):
            made = self._call(**{to: _tensor(batch[column], self._specs[to]) for to, column in names.items()})
        arrays = {name: tensor.numpy() for name, tensor in made.items()}
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def pair(name: str, wanted: tuple[str, ...], columns: tuple[str, ...]) -> dict[str, str]:
    """Input -> column. Raises PlanError when they don't fit."""
    if len(wanted) == 1 and len(columns) == 1:
        return {wanted[0]: columns[0]}
    if set(wanted) - set(columns):
        hint = f"rename columns, or name them: input={sorted(wanted)}"
        raise PlanError(f"{name} wants the inputs {sorted(wanted)}, and gets {list(columns)}", hint=hint)
    return {each: each for each in wanted}


def _tensor(values: np.ndarray, spec: Any) -> Any:
    """The values in the input's own type; a number a row as (rows, 1) where it wants that."""
    import tensorflow as tf

    if values.dtype.hasobject and any(v is None for v in values):
        raise ValueError("a column has missing values: it makes no tensor")
    if spec.dtype is not tf.string:
        values = values.astype(spec.dtype.as_numpy_dtype, copy=False)
    made = tf.convert_to_tensor(values, dtype=spec.dtype)
    rank = spec.shape.rank
    return tf.expand_dims(made, -1) if rank is not None and rank == made.shape.rank + 1 else made
