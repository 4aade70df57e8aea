"""PyTorch models: a live module, weights with a factory, TorchScript, an exported program, or a pickled module.

What must not live here: how batches reach a device (`torch_device`). Invariants:
- The user's own module is never changed: a live module is run as another tree of modules over the same parameters, or, where
  parameters are converted or moved, as a copy.
- What a file holds is found out without unpickling it. Only safetensors and state dicts are loaded without `trust`:
  torch says of `torch.jit.load` and `torch.export.load` that malicious files can run code, and to load only what one trusts.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from headrace.contracts.model import Place
from headrace.core.errors import DataError, PlanError
from headrace.core.own_copy import own_copy
from headrace.models.base import Adapter, check_choice, check_columns, refuse_untrusted
from headrace.models.tensor_columns import makes_tensor
from headrace.models.torch_device import DevicePath, Pending, is_accelerator, keeping, torch_device, torch_threads

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

Precision = Literal["float16", "bfloat16"]
Statistics = tuple[Sequence[float], Sequence[float]]

_WEIGHTS = ("state_dict", "model_state_dict", "model")  # where training scripts keep the weights in a checkpoint


@dataclass(frozen=True)
class Torch(Adapter):
    """A PyTorch model.

    model: an nn.Module, or the path or uri of
        - weights, .safetensors or a state dict saved by torch.save, with `factory`;
        - a TorchScript file, a torch.export program (.pt2), or a module pickled whole by torch.save: these need `trust=True`.
    factory: a callable without arguments that makes the module which the weights are for.
    kwargs: several input columns are passed as keyword arguments. By default they are positional, in the order declared.
    stack: the columns are passed as one matrix (rows, columns) of the weights' floating type, in the order declared; fixed-size
        columns take as many columns of it as they have values.
    normalize: (mean, std) per channel, or "imagenet": uint8 images (rows, height, width, channels) travel as they are and
        become floats (rows, channels, height, width) on the device, (x / 255 - mean) / std.
    dtype: "bfloat16" or "float16": compute under torch.autocast. None: in the types of the weights.
    channels_last: weights and 4-D inputs in channels-last memory, which convolutions on GPUs prefer.
    compile: True for torch.compile, or the name of a backend for it.
    output: names of a tuple's tensors, or which entries of a dict (or of a ModelOutput) to keep. None: all tensors.
    trust: the file may run code of whoever made it.

    Inputs: columns of numbers, bools, fixed-shape tensors and fixed-size lists. float64 becomes the weights' floating type.
    Outputs: a tensor, a tuple, a dict or a ModelOutput of tensors with a row for each row; bfloat16 becomes float32.
    The module runs in evaluation mode, under inference_mode. One that writes to its input in place is given copies; one
    that begins to after a batch that it left as it was ends the run.
    Raises PlanError, before the run, for what can't work.
    """

    model: Any
    _: KW_ONLY
    factory: Callable[[], Any] | None = None
    kwargs: bool = False
    stack: bool = False
    normalize: Statistics | Literal["imagenet"] | None = None
    dtype: Precision | None = None
    channels_last: bool = False
    compile: bool | str = False
    output: str | Sequence[str] | None = None
    trust: bool = False

    extra = "torch"
    devices = ("cuda", "cpu")
    batch_format = "torch"

    def __post_init__(self) -> None:
        check_choice("Torch", "dtype", self.dtype, (None, "bfloat16", "float16"))
        if self.kwargs and self.stack:
            raise PlanError("Torch: kwargs and stack exclude each other", hint="leave one out")
        if self.factory is not None and not callable(self.factory):
            raise PlanError("Torch: the factory can't be called", hint="give a class or function that makes the module")
        if self.factory is not None and self.uri is None:
            raise PlanError("Torch: a factory goes with a file of weights", hint="give the path of the weights, or no factory")
        if self.uri is None and not callable(self.model):
            raise PlanError(f"Torch: a {type(self.model).__name__} is no module", hint="give an nn.Module or a path")
        self._statistics()

    def check_artifact(self) -> None:
        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        if self.uri.endswith(".safetensors"):
            self._need_factory()
            if find_spec("safetensors") is None:
                raise PlanError(f"{self.name} needs safetensors, not installed here", hint="pip install 'headrace[torch]'")
        elif not is_remote(self.uri):
            self._check_file(self.local_path())

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        columns = inputs or (() if schema is None else tuple(schema.names))
        hint = "decode or encode it first, for example with hr.images.decode"
        check_columns(self.name, schema, columns, makes_tensor, "numbers, bools or tensors of one shape", hint)

    def load(self, place: Place) -> TorchModel:
        threads = contextlib.ExitStack()
        try:
            if not is_accelerator(place.device):
                threads.enter_context(torch_threads(place.threads))
            return TorchModel(self, self._module(place.device), place, threads)
        except BaseException:
            threads.close()
            raise

    # ---------------------------------------------------------------- loading

    def _module(self, device: str) -> Any:
        """The module on its device, in evaluation mode."""
        import torch

        where = torch_device(device)
        if self.uri is None:
            converts = where != "cpu" or self.channels_last
            module = all_their_own(self.model) if converts else same_weights(self.model)
        else:
            module = self._from_file(self.local_path(), where)
        if hasattr(module, "to"):
            module = module.to(where)
        if self.channels_last and hasattr(module, "to"):
            module = module.to(memory_format=torch.channels_last)
        if hasattr(module, "eval"):
            with contextlib.suppress(NotImplementedError):  # an exported program is what it was when it was exported
                module.eval()
        if self.compile:
            module = torch.compile(module, backend=self.compile if isinstance(self.compile, str) else "inductor")
        return module

    def _from_file(self, path: str, device: str) -> Any:
        import torch

        if path.endswith(".safetensors"):
            return self._filled_with_safetensors(path)
        kind = self._check_file(path)
        if kind == "script":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch would have everyone use torch.export
                return torch.jit.load(path, map_location=device)
        if kind == "export":
            return torch.export.load(path).module()
        loaded = torch.load(path, map_location="cpu", weights_only=kind == "weights")
        if self.factory is None:
            if not isinstance(loaded, torch.nn.Module):
                raise DataError(f"{self.name} holds a {type(loaded).__name__}, no module", hint="weights need a factory")
            return loaded
        module = self.factory()
        module.load_state_dict(_weights(loaded))
        return module

    def _filled_with_safetensors(self, path: str) -> Any:
        from safetensors.torch import load_model

        module = self._need_factory()()
        load_model(module, path)
        return module

    def _need_factory(self) -> Callable[[], Any]:
        if self.factory is None:
            raise PlanError(
                f"{self.name} holds weights, and no module to put them into",
                hint="give factory=, a callable that makes the module: Torch(path, factory=MyNet)",
            )
        return self.factory

    def _check_file(self, path: str) -> Literal["script", "export", "weights", "pickle"]:
        """What a file holds, by looking at it alone. Raises PlanError for what needs trust or a factory."""
        kind = _kind_of(path)
        if kind == "weights":
            self._need_factory()
            return kind
        what = {"script": "TorchScript", "export": "a torch.export program", "pickle": "a pickle"}[kind]
        refuse_untrusted(self.name, what, trust=self.trust, instead="save the weights as safetensors and give a factory")
        return kind

    def _statistics(self) -> Statistics | None:
        """(mean, std) per channel."""
        if self.normalize is None:
            return None
        if self.normalize == "imagenet":
            from headrace.transforms.images import IMAGENET_MEAN, IMAGENET_STD

            return IMAGENET_MEAN, IMAGENET_STD
        try:
            mean, std = self.normalize
            pair = [float(m) for m in mean], [float(s) for s in std]
        except (TypeError, ValueError):
            pair = [0.0], []
        if len(pair[0]) != len(pair[1]) or not pair[0] or 0.0 in pair[1]:
            raise PlanError(
                f"Torch: normalize={self.normalize!r} is no mean and standard deviation per channel",
                hint='for example normalize=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), or "imagenet"',
            )
        return pair


class TorchModel:
    """A loaded model in one worker.

    `model(batch)` is `model.collect(model.submit(batch))`. Whoever calls these two keeps one batch ahead: the copy of the next
    batch to the device goes on beside the computation of this one, and results travel back beside the next. Handles are
    collected in the order in which they were submitted. Both may raise torch.OutOfMemoryError; nothing is kept then.
    """

    batch_format = "torch"

    def __init__(self, spec: Torch, module: Any, place: Place, resources: contextlib.ExitStack) -> None:
        self._spec = spec
        self._module: Any = module
        self._columns = place.inputs
        self._deterministic = place.deterministic
        self._path = DevicePath(place.device)
        self._floats = _floating_type(module)
        self._statistics = spec._statistics()
        self._resources = resources
        self.uploads = self._path.uploads
        self.ahead = self._path.uploads  # else an answer is the module's own memory until it is collected
        resources.callback(self._path.close)

    def __call__(self, batch: Any) -> Any:
        return self.collect(self.submit(batch))

    def submit(self, batch: Any) -> Submitted:
        """Start on a batch: tensors by column, or a bare tensor. On a CPU it is computed here."""
        import torch

        names, tensors = self._tensors(batch)
        with torch.inference_mode(False):  # whose tensors do not tell that they were written to; user code may have left it on
            there = self._path.upload(tensors)
        with torch.inference_mode(), keeping(there):
            with self._path.compute(), self._precision(), self._repeatable():
                made = self._run(names, [self._prepared(t) for t in there])
                form, outputs = self._outputs(made)
            return Submitted(form, self._path.download(outputs))

    def collect(self, submitted: Submitted) -> Any:
        """The answer to a batch: an array, a tuple or a dict of arrays. Waits for the device."""
        arrays = submitted.pending.result()
        if submitted.form == "bare":
            return next(iter(arrays.values()))
        return tuple(arrays.values()) if submitted.form == "tuple" else arrays

    def close(self) -> None:
        self._module = None  # its memory goes with this object at the latest
        self._resources.close()

    # ---------------------------------------------------------------- inputs

    def _tensors(self, batch: Any) -> tuple[list[str], list[torch.Tensor]]:
        """The columns in the order declared."""
        import torch

        if not isinstance(batch, Mapping):
            batch = {self._columns[0] if self._columns else "input": batch}
        names = list(self._columns) or list(batch)
        for name in names:
            if not isinstance(batch[name], torch.Tensor):
                raise TypeError(f"column {name!r} has missing values, text or tensors that differ in shape: it makes no tensor")
        return names, [batch[name] for name in names]

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input as the module wants it, on the device."""
        import torch

        if self._statistics is not None and tensor.dtype is torch.uint8 and tensor.ndim == 4:
            from headrace.transforms.images import normalize

            dtype = self._floats if self._spec.dtype is None else getattr(torch, self._spec.dtype)
            return normalize(tensor, *self._statistics, dtype=dtype)
        if tensor.dtype is torch.float64 and self._floats is not None:
            tensor = tensor.to(self._floats)
        if self._spec.channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _run(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Any:
        import torch

        if self._spec.stack:
            dtype = self._floats or torch.float32
            return self._module(torch.cat([t.reshape(len(t), -1).to(dtype) for t in tensors], dim=1))
        if self._spec.kwargs:
            return self._module(**dict(zip(names, tensors, strict=True)))
        return self._module(*tensors)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._spec.dtype is None:
            return contextlib.nullcontext()
        import torch

        return torch.autocast(self._path.device.partition(":")[0], dtype=getattr(torch, self._spec.dtype))

    def _repeatable(self) -> contextlib.AbstractContextManager[Any]:
        """With deterministic: no convolution is chosen by how quick it happened to be."""
        if not self._deterministic or self._path.device == "cpu":
            return contextlib.nullcontext()
        import torch

        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)

    # ---------------------------------------------------------------- outputs

    def _outputs(self, made: Any) -> tuple[Form, dict[str, torch.Tensor]]:
        """What the module returned, as named tensors."""
        import torch

        wanted = self._spec.output
        names = None if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
        if isinstance(made, torch.Tensor):
            return ("bare", {"": made}) if names is None else ("dict", _named(names, [made]))
        if isinstance(made, Mapping) or hasattr(made, "keys"):
            return "dict", _chosen({str(k): made[k] for k in made.keys()}, names)  # noqa: SIM118 - a ModelOutput is enough
        if hasattr(made, "_fields"):  # a named tuple
            return "dict", _chosen(made._asdict(), names)
        if isinstance(made, (tuple, list)):
            if names is not None:
                return "dict", _named(names, made)
            return "tuple", {str(i): value for i, value in enumerate(made) if isinstance(value, torch.Tensor)}
        if hasattr(made, "__dataclass_fields__"):
            return "dict", _chosen({n: getattr(made, n) for n in made.__dataclass_fields__}, names)
        raise TypeError(f"the module returned a {type(made).__name__}: a tensor, a tuple or a dict of tensors is needed")


Form = Literal["bare", "tuple", "dict"]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A batch that the device is at work on. form: of the answer."""

    form: Form
    pending: Pending


# --- outputs ---------------------------------------------------------------------------------------------------------


def _named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    if len(names) != len(values):
        raise ValueError(f"the module returned {len(values)} values for the {len(names)} names {list(names)} of output")
    return _chosen(dict(zip(names, values, strict=True)), names)


def _chosen(values: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """The tensors among the values: all of them, or those that are named."""
    import torch

    if names is None:
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    for name in names:
        if not isinstance(values.get(name), torch.Tensor):
            raise ValueError(f"the module returned no tensor {name!r}; there are {list(values)}")
    return {name: values[name] for name in names}


# --- modules ---------------------------------------------------------------------------------------------------------


def same_weights(module: Any) -> Any:
    """The same parameters in other modules, so that their mode can be set, and what they keep between calls is one worker's."""
    if not hasattr(module, "parameters"):
        return module
    with contextlib.suppress(Exception):  # what can't be pickled
        return own_copy(module)
    kept = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def all_their_own(module: Any) -> Any:
    """A copy that may be converted and moved."""
    with contextlib.suppress(Exception):
        return own_copy(module, weights=True)
    return copy.deepcopy(module)


def _floating_type(module: Any) -> Any:
    """The type of the floating-point weights, where they agree; None where there are none."""
    if not hasattr(module, "parameters"):
        return None
    found = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _weights(loaded: Any) -> Any:
    """The state dict in what was saved: itself, or an entry of a checkpoint."""
    for key in _WEIGHTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


# --- files -----------------------------------------------------------------------------------------------------------


def _kind_of(path: str) -> Literal["script", "export", "weights", "pickle"]:
    """What torch.save, torch.jit.save or torch.export.save wrote. weights: a pickle of nothing but tensors and containers."""
    if path.endswith(".pt2"):
        return "export"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return "script"
        if "models/model.json" in names or "archive_format" in names:
            return "export"
    return "weights" if not _unsafe(path) else "pickle"


def _unsafe(path: str) -> bool:
    """Does unpickling it take more than torch's `weights_only` allows? True where that can't be told."""
    from torch import serialization

    look = getattr(serialization, "get_unsafe_globals_in_checkpoint", None)
    if look is None:  # an old torch
        return not _loads_safely(path)
    try:
        return bool(look(path))
    except Exception:  # the format before torch 1.6, or no such file at all
        return not _loads_safely(path)


def _loads_safely(path: str) -> bool:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols: whether it loads is all there is to know
            torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return False
    return True
