"""Onnx: models in the ONNX format, run by onnxruntime.

Invariants: what the model takes is what it is given: columns go to its inputs by name, or all of them to its only input as a
matrix; types and shapes are compared before the run. A model of a fixed batch size sees batches of that size, filled up with
rows whose answers are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from headrace.core.errors import DataError, PlanError, UserCodeError
from headrace.core.tensors import is_tensor
from headrace.models.base import Adapter, check_columns
from headrace.models.matrix import Batch, Features, Matrix, Selection, is_number, is_text, is_vector, to_matrix

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.contracts.model import Place

# Element types of model inputs, as onnxruntime writes them.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
    "string": "object",
}
_GPU = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, eq=False)
class Onnx(Adapter):
    """A model in the ONNX format.

    model: the path or uri of a .onnx file, or of a folder that holds one and the files of its weights; or the bytes of one.
    outputs: the model's outputs to answer with, by name; None for all. providers: of onnxruntime, best first; None for CUDA in
    a worker with a GPU, else the CPU.

    Input: the columns that have the names of the model's inputs; else, for a model with one input, all columns of
    input=[...] as a matrix (rows, columns), or one column of lists or tensors as it is. Numbers are converted to the input's
    floats or wider integers, floats never to integers; null is NaN for floats and a DataError for others.
    Output: one array for one output, else a dict by the outputs' names; arrays (rows, 1) as one value a row; the maps of ZipMap
    as tensors (classes,), in their order; tensors of booleans as uint8.
    Raises PlanError before the run for inputs that don't fit.
    """

    model: Any
    _: KW_ONLY
    outputs: str | Sequence[str] | None = None
    providers: Sequence[Any] | None = None

    extra = "onnx"
    unsaid = ("providers",)

    @property
    def name(self) -> str:
        return super().name if self.uri is not None else "Onnx(bytes)"

    @property
    def devices(self) -> tuple[str, ...]:  # type: ignore[override]
        """A GPU is of use when onnxruntime was built for it; its package tells without being imported."""
        if self.providers is None:
            return ("cuda", "cpu") if _is_installed("onnxruntime-gpu") else ("cpu",)
        return ("cuda", "cpu") if _GPU in map(_provider_name, self.providers) else ("cpu",)

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        session = self._session(None)
        _output_names(self, session)
        chosen = _Inputs(self.name, session)
        if schema is not None:
            chosen.choose(schema, inputs)

    def load(self, place: Place) -> Any:
        return _Loaded(self, self._session(place), place)

    def _session(self, place: Place | None) -> Any:
        """place: where it is to run; None to look at the model only."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = 1 if place is None else place.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # workers share the cores
        options.use_deterministic_compute = place is not None and place.deterministic
        if place is None:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = self._providers(place, ort.get_available_providers())
        source = _file(self.name, self.local_path()) if self.uri is not None else self.model
        try:
            return ort.InferenceSession(source, options, providers=providers)
        except Exception as error:  # onnxruntime has an exception for each status, without a common base
            text = str(error).strip().splitlines()[0][:300]
            raise PlanError(f"{self.name} can't be opened: {text}", hint="check it with onnx.checker") from None

    def _providers(self, place: Place | None, available: Sequence[str]) -> list[Any]:
        if self.providers is not None:
            absent = [n for n in map(_provider_name, self.providers) if n not in available]
            if absent:
                raise PlanError(f"{self.name}: onnxruntime has no {absent[0]} here", hint=f"it has {', '.join(available)}")
            return [_CPU] if place is None else list(self.providers)
        if place is None or not place.device.startswith("cuda"):
            return [_CPU]
        if _GPU not in available:
            raise PlanError(
                f"{self.name}: onnxruntime can't use a GPU here", hint="pip install onnxruntime-gpu, or device='cpu'"
            )
        return [(_GPU, {"device_id": int(place.device.partition(":")[2] or 0)}), _CPU]


def _provider_name(provider: Any) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _is_installed(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def _file(name: str, path: str) -> str:
    """The model's file: the path itself, or the only .onnx file in the folder."""
    if not os.path.isdir(path):
        return path
    found = sorted(f for f in os.listdir(path) if f.endswith(".onnx"))
    if len(found) != 1:
        there = ", ".join(found) or "none"
        raise PlanError(f"{name}: the folder must hold one .onnx file, and holds {there}", hint="name the file itself")
    return os.path.join(path, found[0])


def _output_names(adapter: Onnx, session: Any) -> list[str]:
    """Raises PlanError for outputs that the model does not have."""
    there = [o.name for o in session.get_outputs()]
    if adapter.outputs is None:
        return there
    asked = [adapter.outputs] if isinstance(adapter.outputs, str) else list(adapter.outputs)
    for name in asked:
        if name not in there:
            raise PlanError(f"{adapter.name} has no output {name!r}", hint=f"its outputs are {', '.join(there)}")
    return asked


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Input:
    """An input of the model. shape: sizes after the rows, None where any will do."""

    name: str
    element: str
    batch: int | None
    shape: tuple[int | None, ...]

    @property
    def dtype(self) -> str:
        return _DTYPES[self.element]

    def accepts(self, type: pa.DataType) -> bool:
        """Can a column of this type be this input, or a column of its matrix?"""
        import pyarrow as pa

        if self.element == "string":
            return is_text(type)
        if is_vector(type):
            type = type.value_type
        if not is_number(type):
            return False
        if self.element in ("float", "double", "float16"):
            return True
        return pa.types.is_boolean(type) or (self.element != "bool" and pa.types.is_integer(type))

    def takes_shape(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(want in (None, n) for want, n in zip(self.shape, shape, strict=True))


def _inputs(name: str, session: Any) -> tuple[_Input, ...]:
    """Raises PlanError for inputs that no column can be."""
    out: list[_Input] = []
    for each in session.get_inputs():
        element = each.type.removeprefix("tensor(").removesuffix(")")
        if element not in _DTYPES or not each.shape:
            raise PlanError(f"{name}: its input {each.name!r} is a {each.type}{each.shape}, no batch of rows")
        sizes = [n if isinstance(n, int) and n > 0 else None for n in each.shape]
        out.append(_Input(each.name, element, sizes[0], tuple(sizes[1:])))
    return tuple(out)


class _Inputs:
    """A model's inputs: which columns they are, and the arrays that they make."""

    def __init__(self, name: str, session: Any) -> None:
        self._name = name
        self.all = _inputs(name, session)
        self.batch = next((i.batch for i in self.all if i.batch is not None), None)

    def choose(self, schema: pa.Schema, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """The columns: those of the inputs' names, else all for the only input. Raises PlanError."""
        given = inputs or tuple(schema.names)
        if self._by_name(given):
            columns = tuple(i.name for i in self.all)
            if inputs:
                Features(columns).check_names(self._name, given)
            pairs = list(zip(self.all, columns, strict=True))
        elif len(self.all) == 1:
            columns = given
            pairs = [(self.all[0], c) for c in columns]
        else:
            wanted = ", ".join(repr(i.name) for i in self.all)
            hint = "name columns as the model names its inputs: rename(...) does it"
            raise PlanError(f"{self._name} has the inputs {wanted}, and the columns are {', '.join(given)}", hint=hint)
        for each, column in pairs:
            check_columns(self._name, schema, [column], each.accepts, f"values for {each.element}")
            self._check_shape(each, schema, column, len(columns) if len(self.all) == 1 else 1)
        return columns

    def _by_name(self, columns: Sequence[str]) -> bool:
        return all(i.name in columns for i in self.all)

    def _check_shape(self, each: _Input, schema: pa.Schema, column: str, together: int) -> None:
        import pyarrow as pa

        type = schema.field(column).type
        wanted = f"({', '.join(['rows', *(str(n or 'any') for n in each.shape)])})"
        if not is_vector(type):
            fits = each.takes_shape(()) if together == 1 and not each.shape else each.takes_shape((together,))
            if not fits:
                columns = "1 column" if together == 1 else f"{together} columns"
                hint = "name the features in the order of the training data: input=[...]"
                raise PlanError(f"{self._name} wants {each.name!r} as {wanted}, and is given {columns} of numbers", hint=hint)
            return
        if together > 1:
            hint = "give numbers only, or one column of lists or tensors"
            raise PlanError(f"{self._name} can't join the column {column!r} of type {type} with others", hint=hint)
        known = is_tensor(type) or pa.types.is_fixed_size_list(type)
        shape = tuple(type.shape) if is_tensor(type) else (type.list_size,) if known else ()
        if known and not each.takes_shape(shape):
            hint = "give tensors of the model's own shape"
            raise PlanError(f"{self._name} wants {each.name!r} as {wanted}, and a row of {column!r} is {shape}", hint=hint)

    def feed(self, columns: list[pa.Array], names: tuple[str, ...]) -> dict[str, Matrix]:
        """The arrays of all inputs, by their names."""
        if len(self.all) == 1:
            return {self.all[0].name: _array(self.all[0], columns, names)}
        return {i.name: _array(i, [c], (n,)) for i, c, n in zip(self.all, columns, names, strict=True)}


def _array(each: _Input, columns: list[pa.Array], names: tuple[str, ...]) -> Matrix:
    """(rows, *shape) in the input's dtype."""
    import numpy as np

    if each.element == "string":
        texts = [_texts(c, n) for c, n in zip(columns, names, strict=True)]
        return np.stack(texts, axis=1) if each.shape else texts[0]
    made = to_matrix(columns, each.dtype, names)
    if is_tensor(columns[0].type):
        return made.reshape((len(made), *columns[0].type.shape))
    return made if each.shape else made.reshape(-1)


def _texts(column: pa.Array, name: str) -> Matrix:
    import numpy as np

    if column.null_count:
        raise DataError(f"there are nulls in column {name!r}, which the model takes as texts", hint="fill them before")
    return np.array(column.to_pylist(), dtype=object)


# --- calls -----------------------------------------------------------------------------------------------------------


class _Loaded:
    """The model in a worker: a batch in, an array of as many rows out, or a dict of them."""

    def __init__(self, adapter: Onnx, session: Any, place: Place) -> None:
        self._name = adapter.name
        self._session = session
        self._outputs = _output_names(adapter, session)
        self._inputs = _Inputs(adapter.name, session)
        self._select = Selection(place.inputs, lambda schema: self._inputs.choose(schema, place.inputs))

    def __call__(self, batch: Batch) -> Any:
        feed = self._inputs.feed(*self._select(batch))
        rows = len(next(iter(feed.values())))
        made = self._run(feed) if self._inputs.batch is None else _in_batches(self._run, feed, rows, self._inputs.batch)
        for name, values in zip(self._outputs, made, strict=True):
            if values.ndim == 0 or len(values) != rows:
                hint = "predict needs an answer for every row: name the outputs that have them in outputs=[...]"
                raise UserCodeError(f"{self._name}: its output {name!r} is {values.shape} for {rows} rows", hint=hint)
        return made[0] if len(made) == 1 else dict(zip(self._outputs, made, strict=True))

    def _run(self, feed: dict[str, Matrix]) -> list[Matrix]:
        return [_output(values) for values in self._session.run(self._outputs, feed)]


def _in_batches(
    run: Callable[[dict[str, Matrix]], list[Matrix]], feed: dict[str, Matrix], rows: int, size: int
) -> list[Matrix]:
    """The answers of a model that takes `size` rows at a time; the last ones are repeated to fill the last batch up."""
    import numpy as np

    parts: list[list[Matrix]] = []
    for start in range(0, rows, size):
        at = np.minimum(np.arange(start, start + size), rows - 1)
        made = run({name: values[at] for name, values in feed.items()})
        parts.append([values[: min(size, rows - start)] for values in made])
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _output(values: Any) -> Matrix:
    """An output as an array: the maps of ZipMap as (rows, classes), (rows, 1) as (rows,), tensors of booleans as uint8."""
    import numpy as np

    if isinstance(values, list) and values and isinstance(values[0], dict):
        classes = list(values[0])
        values = np.array([[row[c] for c in classes] for row in values], dtype=np.float32)
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    return values.view(np.uint8) if values.dtype == np.bool_ and values.ndim > 1 else values  # columns have no such tensors
