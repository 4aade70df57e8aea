"""Models of the transformers library, from a folder on this machine: no hub is ever asked.

What must not live here: how batches reach a device (`torch_device`). Invariants: weights that the folder lacks are an error,
never random numbers; the order of rows is the input's, though they are computed sorted by length; weights and code that
could run something of their author's are not opened without `trust`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import is_ragged, is_tensor
from headrace.models.base import Adapter, check_choice, check_columns, refuse_untrusted
from headrace.models.tensor_columns import is_text, text_columns
from headrace.models.token_cuts import DEVICE, TokenCosts, cuts_by_length, token_costs
from headrace.models.torch import all_their_own, same_weights
from headrace.models.torch_device import DevicePath, Pending, is_accelerator, torch_device, torch_threads

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

Task = Literal[
    "text-classification",
    "feature-extraction",
    "token-classification",
    "zero-shot-classification",
    "image-classification",
    "text-generation",
    "text2text-generation",
    "summarization",
]

UNSET_LENGTH = 1 << 20  # tokenizers that know no limit say 1e30

# task -> transformers' class that loads its model
_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "feature-extraction": "AutoModel",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "summarization": "AutoModelForSeq2SeqLM",
}
_BY_PIPELINE = ("token-classification", "zero-shot-classification")
_GENERATING = ("text-generation", "text2text-generation", "summarization")
_PAIRS = ("text-classification", "feature-extraction")


@dataclass(frozen=True)
class Transformers(Adapter):
    """A model of transformers.

    model: a folder made by save_pretrained (path or uri), or a live model. Nothing is downloaded from a hub. Safetensors are
        loaded as they are; pickled weights (pytorch_model.bin) and code in the folder need `trust=True`.
    task: what it does, and what comes out:
        - "text-classification": columns label, score (two text columns are a pair);
        - "feature-extraction": a float32 tensor, of `pooling` over the tokens (two text columns are a pair);
        - "token-classification": a list of entities, as structs: entity (or entity_group), word, score, start, end;
        - "zero-shot-classification": columns label, score of the best of options={"candidate_labels": [...]};
        - "image-classification": columns label, score, of uint8 images (rows, height, width, channels);
        - "text-generation", "text2text-generation", "summarization": the text that is generated, without the prompt.
    tokenizer: of a live model, or where it lies if not in the folder. Of images: the image processor.
    dtype: "bfloat16" or "float16" for the weights; None: as they were saved.
    max_length: in tokens, longer texts are cut; None: what the tokenizer says.
    pooling: "mean" over a text's tokens, "cls" (the first) or "none" (a ragged tensor: tokens, size).
    batch_tokens: how many tokens, padding included, go through the model at once; None: what suits the device. The rows of a
        batch are sorted by length and cut accordingly, and each cut is padded to its own longest text.
    options: of the task: arguments of generate() such as {"max_new_tokens": 20}, of the library's pipeline for tokens and
        zero-shot. Generation is greedy unless they say otherwise.
    trust: the files may run code of whoever made them.

    Raises PlanError, before the run, for what can't work.
    """

    model: Any
    task: Task = field(kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True)
    dtype: Literal["float16", "bfloat16"] | None = field(default=None, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)
    pooling: Literal["mean", "cls", "none"] = field(default="mean", kw_only=True)
    batch_tokens: int | None = field(default=None, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    trust: bool = field(default=False, kw_only=True)

    extra = "transformers"
    devices = ("cuda", "cpu")

    def __post_init__(self) -> None:
        check_choice("Transformers", "task", self.task, tuple(_CLASSES))
        check_choice("Transformers", "dtype", self.dtype, (None, "bfloat16", "float16"))
        check_choice("Transformers", "pooling", self.pooling, ("mean", "cls", "none"))
        if any(given is not None and given < 1 for given in (self.batch_tokens, self.max_length)):
            raise PlanError("Transformers: batch_tokens and max_length are at least 1", hint="leave them out")
        if self.uri is None and self.tokenizer is None:
            raise PlanError(
                f"Transformers: a live model for {self.task} needs its tokenizer or image processor too",
                hint="give tokenizer=, an object or the folder that holds it",
            )
        if self.task == "zero-shot-classification" and not self.options.get("candidate_labels"):
            hint = 'give options={"candidate_labels": ["sport", "politics"]}'
            raise PlanError("Transformers: zero-shot-classification needs labels to choose from", hint=hint)

    @property
    def batch_format(self) -> str:  # type: ignore[override]
        return "numpy" if self.task == "image-classification" else "pyarrow"

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        uri = self.uri
        if uri is not None and "://" not in uri and not os.path.exists(os.path.expanduser(uri)):
            hint = "nothing is downloaded from a hub: give a folder that save_pretrained made"
            raise PlanError(f"{self.name}: there is no folder {uri}", hint=hint)
        super().check(schema, inputs)

    def check_artifact(self) -> None:
        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        if not is_remote(self.uri):
            check_folder(self.name, self.local_path(), trust=self.trust)

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        columns = inputs or (() if schema is None else tuple(schema.names))
        if self.task == "image-classification":
            wanted, accepts = "images (tensors)", lambda t: is_tensor(t) or is_ragged(t)
        else:
            wanted, accepts = "text", is_text
        most = 2 if self.task in _PAIRS else 1
        if len(columns) > most:
            hint = "name it: input='text'" if most == 1 else "name one, or two for pairs of texts"
            raise PlanError(f"{self.name} takes {most} input column(s), and was given {len(columns)}", hint=hint)
        check_columns(self.name, schema, columns, accepts, wanted)

    def meaning(self) -> Mapping[str, Any]:
        said = dict(super().meaning())
        if isinstance(self.tokenizer, str | os.PathLike):
            from headrace.connectors.artifacts import identity

            said["tokenizer"] = identity(os.fspath(self.tokenizer))  # type: ignore[arg-type]
        return said

    def load(self, place: Place) -> Any:
        resources = contextlib.ExitStack()
        try:
            if not is_accelerator(place.device):
                resources.enter_context(torch_threads(place.threads))
            with quiet_transformers():
                model, tokenizer = self._model(place.device), self._tokenizer()
            if self.task in _BY_PIPELINE:
                return PipelineModel(self, model, tokenizer, place, resources)
            return HeadModel(self, model, tokenizer, place, resources)
        except BaseException:
            resources.close()
            raise

    def _model(self, device: str) -> Any:
        import torch

        where = torch_device(device)
        if self.uri is None:
            converts = where != "cpu" or self.dtype is not None
            model = all_their_own(self.model) if converts else same_weights(self.model)
        else:
            path = self.local_path()
            check_folder(self.name, path, trust=self.trust)
            model = self._from_folder(path)
        model = model.to(where)
        return (model if self.dtype is None else model.to(getattr(torch, self.dtype))).eval()

    def _from_folder(self, path: str) -> Any:
        import transformers

        kind = getattr(transformers, _CLASSES[self.task])
        model, told = kind.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=self.trust,
            use_safetensors=_has_safetensors(path),
            output_loading_info=True,
        )
        missing = sorted(key for key in told["missing_keys"] if not (self.task == "feature-extraction" and "pooler." in key))
        if missing:
            raise DataError(
                f"{self.name} lacks weights for {self.task}: {', '.join(missing[:4])}" + (" ..." if len(missing) > 4 else ""),
                hint="they would be random numbers: give a model that was trained for this task",
            )
        return model

    def _tokenizer(self) -> Any:
        """Or image processor."""
        import transformers

        given = self.tokenizer
        if given is not None and not isinstance(given, str | os.PathLike):
            return copy.deepcopy(given)  # it is given another padding side, and is not for several threads at once
        path = self.local_path()
        if given is not None:
            from headrace.connectors.artifacts import local_path

            path = local_path(os.fspath(given))  # type: ignore[arg-type]
        kind = transformers.AutoImageProcessor if self.task == "image-classification" else transformers.AutoTokenizer
        return kind.from_pretrained(path, local_files_only=True, trust_remote_code=self.trust)


# --- models that are loaded ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rows that go through the model at once. rows: their places in the batch."""

    rows: np.ndarray
    pending: Pending


class HeadModel:
    """A model and the way from its outputs to columns. Like TorchModel, it can be kept one batch ahead."""

    def __init__(self, spec: Transformers, model: Any, tokenizer: Any, place: Place, resources: contextlib.ExitStack) -> None:
        self._spec = spec
        self._model: Any = model
        self._tokenizer = tokenizer
        self._columns = place.inputs
        self._path = DevicePath(place.device)
        self.ahead = self._path.uploads  # as TorchModel
        self._max_length = _max_length(spec, model, tokenizer)
        self._costs = token_costs(place.device, place.threads, spec.batch_tokens)
        if spec.task in _GENERATING:  # all weights are read for each new token, on any device: padding is cheap beside a call
            self._costs = TokenCosts(spec.batch_tokens or DEVICE.most_tokens, DEVICE.most_tokens)
        self._resources = resources
        resources.callback(self._path.close)
        if spec.task in _GENERATING:
            self._prepare_generation()

    def __call__(self, batch: Any) -> Any:
        return self.collect(self.submit(batch))

    def submit(self, batch: Any) -> list[_Cut]:
        """Start on a batch: texts or images by column, or a bare column. On a CPU it is computed here."""
        return [self._start(rows, inputs) for rows, inputs in self._inputs(batch)]

    def collect(self, submitted: list[_Cut]) -> Any:
        """The answer to a batch, in its order. Waits for the device."""
        order = np.concatenate([cut.rows for cut in submitted])
        found = [cut.pending.result() for cut in submitted]
        return self._answer(np.argsort(order, kind="stable"), found)

    def close(self) -> None:
        self._model = None
        self._resources.close()

    # ---------------------------------------------------------------- inputs

    def _inputs(self, batch: Any) -> Iterator[tuple[np.ndarray, Mapping[str, torch.Tensor]]]:
        """(places of rows, the tensors for them), cut by cut."""
        if self._spec.task == "image-classification":
            images = batch[self._columns[0]] if isinstance(batch, Mapping) else batch
            yield np.arange(len(images)), self._tokenizer(images=list(images), return_tensors="pt")
            return
        texts = text_columns(batch, self._columns)
        encoded = self._tokenizer(*texts, truncation=self._max_length is not None, max_length=self._max_length)
        for rows in cuts_by_length([len(ids) for ids in encoded["input_ids"]], self._costs):
            cut = {name: [values[i] for i in rows] for name, values in encoded.items()}
            yield rows, self._tokenizer.pad(cut, return_tensors="pt")

    def _start(self, rows: np.ndarray, inputs: Mapping[str, torch.Tensor]) -> _Cut:
        import torch

        with torch.inference_mode():
            there = dict(zip(inputs, self._path.upload(list(inputs.values())), strict=True))
            if self._spec.dtype is not None:
                dtype = getattr(torch, self._spec.dtype)
                there = {n: t.to(dtype) if t.is_floating_point() else t for n, t in there.items()}
            with self._path.compute():
                outputs = self._outputs(there)
            return _Cut(rows, self._path.download(outputs))

    # ---------------------------------------------------------------- outputs

    def _outputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._spec.task in _GENERATING:
            return {"ids": self._generate(inputs)}
        made = self._model(**inputs)
        if self._spec.task == "feature-extraction":
            return self._pooled(made.last_hidden_state, inputs["attention_mask"])
        return {"scores": self._probabilities(made.logits.float())}

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """states: (rows, tokens, size)."""
        states = states.float()
        if self._spec.pooling == "none":
            return {"states": states, "mask": mask}
        if self._spec.pooling == "cls":
            return {"pooled": states[:, 0]}
        weights = mask.unsqueeze(-1).to(states.dtype)
        return {"pooled": (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)}

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """As the library's pipeline has it: by the problem that the model was trained for."""
        config = self._model.config
        problem = getattr(config, "problem_type", None)
        if problem == "regression":
            return logits
        return logits.sigmoid() if problem == "multi_label_classification" or config.num_labels == 1 else logits.softmax(-1)

    def _answer(self, back: np.ndarray, found: Sequence[Mapping[str, np.ndarray]]) -> Any:
        """back: where each row of the batch is among the rows found."""
        if self._spec.task in _GENERATING:
            texts = [t for f in found for t in self._tokenizer.batch_decode(f["ids"], skip_special_tokens=True)]
            return [texts[i] for i in back]
        if "states" in found[0]:
            rows = [s[m.astype(bool)] for f in found for s, m in zip(f["states"], f["mask"], strict=True)]
            out = np.empty(len(rows), dtype=object)
            for i, at in enumerate(back):
                out[i] = rows[at]
            return out
        if "pooled" in found[0]:
            return np.concatenate([f["pooled"] for f in found])[back]
        scores = np.concatenate([f["scores"] for f in found])[back]
        best = scores.argmax(-1)
        names = self._model.config.id2label
        return {"label": [names[int(i)] for i in best], "score": np.take_along_axis(scores, best[:, None], -1)[:, 0]}

    # ---------------------------------------------------------------- generation

    def _prepare_generation(self) -> None:
        """A decoder goes on from a text's end: padding comes before it."""
        if self._spec.task == "text-generation":
            self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def _generate(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        options = {"do_sample": False, "pad_token_id": self._tokenizer.pad_token_id, **self._spec.options}
        known = {n: t for n, t in inputs.items() if n in ("input_ids", "attention_mask")}
        ids = self._model.generate(**known, **options)
        if not isinstance(ids, torch.Tensor):
            ids = ids.sequences
        return ids[:, inputs["input_ids"].shape[1] :] if self._spec.task == "text-generation" else ids


class PipelineModel:
    """A task that the library's own pipeline does: tokens with their places in the text, and zero-shot."""

    def __init__(self, spec: Transformers, model: Any, tokenizer: Any, place: Place, resources: contextlib.ExitStack) -> None:
        import transformers

        self._spec = spec
        self._columns = place.inputs
        self._resources = resources
        make: Callable[..., Any] = transformers.pipeline
        self._run = make(spec.task, model=model, tokenizer=tokenizer, device=torch_device(place.device))
        self._tokenizer = tokenizer
        self._max_length = _max_length(spec, model, tokenizer)
        self._costs = token_costs(place.device, place.threads, spec.batch_tokens)

    def __call__(self, batch: Any) -> Any:
        (texts,) = text_columns(batch, self._columns)
        answers: list[Any] = [None] * len(texts)
        encoded = self._tokenizer(texts, truncation=self._max_length is not None, max_length=self._max_length)
        for rows in cuts_by_length([len(ids) for ids in encoded["input_ids"]], self._costs):
            found = self._run([texts[i] for i in rows], batch_size=len(rows), **self._spec.options)
            for i, answer in zip(rows, found, strict=True):
                answers[i] = answer
        if self._spec.task == "zero-shot-classification":
            best = np.array([a["scores"][0] for a in answers], dtype=np.float32)
            return {"label": [a["labels"][0] for a in answers], "score": best}
        return _entities(answers, grouped=self._spec.options.get("aggregation_strategy", "none") != "none")

    def close(self) -> None:
        self._resources.close()


def _entities(answers: Sequence[Sequence[Mapping[str, Any]]], *, grouped: bool) -> pa.Array:
    """Their column; of one type, whether or not any entity was found."""
    import pyarrow as pa

    entity = pa.field("entity_group" if grouped else "entity", pa.string())
    numbers = [pa.field("score", pa.float32()), pa.field("start", pa.int64()), pa.field("end", pa.int64())]
    fields = [entity, pa.field("word", pa.string()), *numbers]
    plain = [[{f.name: _plain(found[f.name]) for f in fields} for found in answer] for answer in answers]
    return pa.array(plain, type=pa.list_(pa.struct(fields)))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


# --- texts -----------------------------------------------------------------------------------------------------------


def _max_length(spec: Transformers, model: Any, tokenizer: Any) -> int | None:
    """In tokens: what is asked for, what the tokenizer says, or how many positions the model has."""
    if spec.max_length is not None:
        return spec.max_length
    said = getattr(tokenizer, "model_max_length", None)
    if isinstance(said, int) and said < UNSET_LENGTH:
        return said
    return getattr(model.config, "max_position_embeddings", None)


# --- folders ---------------------------------------------------------------------------------------------------------


def check_folder(name: str, path: str, *, trust: bool) -> None:
    """Raise PlanError for a folder that holds no model, or one that would have to be trusted."""
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise PlanError(f"{name}: {path} holds no config.json", hint="give a folder that save_pretrained made")
    for file in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(os.path.join(path, file)):
            refuse_untrusted(name, "the Python code that its folder names", trust=trust)
    if not _has_safetensors(path):
        refuse_untrusted(name, "pickled weights", trust=trust, instead="save them again with safetensors")


def _has_safetensors(path: str) -> bool:
    return any(file.endswith((".safetensors", ".safetensors.index.json")) for file in os.listdir(path))


def _json(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise PlanError(f"{path} is no JSON: {error}", hint="save the model again") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars and its notes on weights, which are checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
