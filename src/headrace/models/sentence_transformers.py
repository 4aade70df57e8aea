"""Embeddings by sentence-transformers, from a folder on this machine: no hub is ever asked.

Invariant: pickled weights and code in the folder are not opened without `trust`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import PlanError
from headrace.models.base import Adapter, check_columns, refuse_untrusted
from headrace.models.tensor_columns import is_text, text_columns
from headrace.models.token_cuts import cuts_by_length, token_costs
from headrace.models.torch import all_their_own, same_weights
from headrace.models.torch_device import DevicePath, Pending, is_accelerator, torch_device, torch_threads
from headrace.models.transformers import quiet_transformers

if TYPE_CHECKING:
    import pyarrow as pa

_OWN_MODULES = ("sentence_transformers.", "torch.nn.")
ENCODE_ROWS = 64  # that encode() computes at once
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class SentenceTransformers(Adapter):
    """Embeddings of texts.

    model: a folder made by SentenceTransformer.save (path or uri), or a live SentenceTransformer.
    normalize: to length 1, so that a dot product is the cosine.
    prompt: put before each text; or prompt_name, one of those that the model knows.
    dimensions: only so many numbers, for models that were trained to be cut (Matryoshka).
    batch_tokens: how many tokens, padding included, go through the model at once; None: what suits the device. The rows of a
        batch are sorted by length and cut accordingly, and each cut is padded to its own longest text.
    trust: the files may run code of whoever made them.

    Input: one text column. Output: a float32 tensor column, (size of the embedding,) a row.
    Raises PlanError, before the run, for what can't work.
    """

    model: Any
    normalize: bool = field(default=False, kw_only=True)
    prompt: str | None = field(default=None, kw_only=True)
    prompt_name: str | None = field(default=None, kw_only=True)
    dimensions: int | None = field(default=None, kw_only=True)
    batch_tokens: int | None = field(default=None, kw_only=True)
    trust: bool = field(default=False, kw_only=True)

    extra = "sentence-transformers"
    devices = ("cuda", "cpu")

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_name is not None:
            raise PlanError("SentenceTransformers: prompt and prompt_name exclude each other", hint="leave one out")
        if any(given is not None and given < 1 for given in (self.batch_tokens, self.dimensions)):
            raise PlanError("SentenceTransformers: batch_tokens and dimensions are at least 1", hint="leave them out")

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        uri = self.uri
        if uri is not None and "://" not in uri and not os.path.exists(os.path.expanduser(uri)):
            hint = "nothing is downloaded from a hub: give a folder that SentenceTransformer.save made"
            raise PlanError(f"{self.name}: there is no folder {uri}", hint=hint)
        super().check(schema, inputs)

    def check_artifact(self) -> None:
        from headrace.connectors.storage import is_remote

        assert self.uri is not None
        if not is_remote(self.uri):
            _check_folder(self.name, self.local_path(), trust=self.trust)

    def check_inputs(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        columns = inputs or (() if schema is None else tuple(schema.names))
        if len(columns) > 1:
            raise PlanError(f"{self.name} takes one column, and was given {len(columns)}", hint="name it: input='text'")
        check_columns(self.name, schema, columns, is_text, "text")

    def load(self, place: Place) -> Any:
        resources = contextlib.ExitStack()
        try:
            if not is_accelerator(place.device):
                resources.enter_context(torch_threads(place.threads))
            return Embedder(self, self._model(torch_device(place.device)), place, resources)
        except BaseException:
            resources.close()
            raise

    def _model(self, device: str) -> Any:
        if self.uri is None:
            model = all_their_own(self.model) if device != "cpu" else same_weights(self.model)
            return model.to(device).eval()
        from sentence_transformers import SentenceTransformer

        path = self.local_path()
        _check_folder(self.name, path, trust=self.trust)
        with quiet_transformers():
            return SentenceTransformer(path, device=device, local_files_only=True, trust_remote_code=self.trust).eval()


class Embedder:
    """A loaded model in one worker.

    Texts are tokenised once, all together, and go through the model in cuts of like lengths in tokens. encode() sorts by
    characters and cuts by rows, which on prose with tables computes two thirds more; it is for models that pad nothing, and
    for releases without `preprocess`.
    """

    def __init__(self, spec: SentenceTransformers, model: Any, place: Place, resources: contextlib.ExitStack) -> None:
        self._spec = spec
        self._model: Any = model
        self._columns = place.inputs
        self._path = DevicePath(place.device)
        self._costs = token_costs(place.device, place.threads, spec.batch_tokens)
        self._prompt = _prompt(spec, model)
        self._cuts = hasattr(model, "preprocess")  # until it turns out that it gives no mask by row
        self._dimensions = model.truncate_dim if spec.dimensions is None else spec.dimensions
        self._resources = resources
        resources.callback(self._path.close)

    def __call__(self, batch: Any) -> np.ndarray:
        (texts,) = text_columns(batch, self._columns)
        if not texts:
            return self._encoded(["text"])[:0]  # of the right size
        if not self._cuts:
            return self._encoded(texts)
        features = self._model.preprocess(texts, prompt=self._prompt)
        mask = features.get("attention_mask")
        if mask is None or mask.shape[:1] != (len(texts),):
            self._cuts = False
            return self._encoded(texts)
        cuts = list(cuts_by_length(mask.sum(1).tolist(), self._costs))
        pending = [self._start(_cut(features, mask, rows)) for rows in cuts]
        made = np.concatenate([p.result()["made"] for p in pending])
        return made[np.argsort(np.concatenate(cuts), kind="stable")].astype(np.float32, copy=False)

    def close(self) -> None:
        self._model = None
        self._resources.close()

    def _start(self, features: Mapping[str, Any]) -> Pending:
        """On a CPU it is computed here."""
        import torch

        tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        with torch.inference_mode():
            there = dict(zip(tensors, self._path.upload(list(tensors.values())), strict=True))
            with self._path.compute():
                made = self._model({**features, **there})["sentence_embedding"][:, : self._dimensions]
                if self._spec.normalize:
                    made = torch.nn.functional.normalize(made, p=2, dim=1)
            return self._path.download({"made": made})

    def _encoded(self, texts: list[str]) -> np.ndarray:
        made = self._model.encode(
            texts,
            prompt=self._prompt,
            batch_size=ENCODE_ROWS,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=self._spec.normalize,
            **({} if self._dimensions is None else {"truncate_dim": self._dimensions}),
        )
        return np.asarray(made, dtype=np.float32)


def _prompt(spec: SentenceTransformers, model: Any) -> str | None:
    """As encode() chooses it. Raises PlanError for a name asked for that the model does not know."""
    if spec.prompt is not None:
        return spec.prompt
    if spec.prompt_name is None:
        return model.prompts.get(model.default_prompt_name)
    if spec.prompt_name not in model.prompts:
        known = ", ".join(model.prompts) or "none"
        raise PlanError(f"{spec.name} knows no prompt {spec.prompt_name!r}", hint=f"its prompts: {known}")
    return model.prompts[spec.prompt_name]


def _cut(features: Mapping[str, Any], mask: Any, rows: np.ndarray) -> dict[str, Any]:
    """The features of some rows, without the columns that are padding in all of them, be it left or right."""
    import torch

    at = torch.from_numpy(rows)
    used = mask[at].any(0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    cut: dict[str, Any] = {}
    for name, value in features.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] == mask.shape[:1]:
            value = value[at, columns] if value.shape == mask.shape else value[at]
        cut[name] = value
    return cut


def _check_folder(name: str, path: str, *, trust: bool) -> None:
    """Raise PlanError for a folder that holds no model, or one that would have to be trusted."""
    listing = os.path.join(path, "modules.json")
    if not os.path.isfile(listing):
        raise PlanError(f"{name}: {path} holds no modules.json", hint="give a folder that SentenceTransformer.save made")
    modules: list[Mapping[str, Any]] = _read(listing)
    foreign = [m["type"] for m in modules if not str(m.get("type", "")).startswith(_OWN_MODULES)]
    if foreign:
        refuse_untrusted(name, f"modules of its own ({foreign[0]})", trust=trust)
    for top, _, files in os.walk(path):
        for file in files:
            if file == "config.json" and "auto_map" in _read(os.path.join(top, file)):
                refuse_untrusted(name, "the Python code that its folder names", trust=trust)
        safe = any(file.endswith((".safetensors", ".safetensors.index.json")) for file in files)
        if not safe and any(file.endswith(_PICKLED) for file in files):
            refuse_untrusted(name, "pickled weights", trust=trust, instead="save them again with safetensors")


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise PlanError(f"{path} is no JSON: {error}", hint="save the model again") from None
