"""hr.models.SentenceTransformers through the public API, beside the library itself."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.integration.models import tiny

import headrace as hr
from headrace.contracts.model import ModelAdapter, Place
from headrace.models.sentence_transformers import SentenceTransformers

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
TEXTS = [" ".join(np.random.default_rng(i).choice(tiny.WORDS[5:], 1 + i % 9)) for i in range(23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tiny BERT, then the mean over tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers.utils import logging

    logging.disable_progress_bar()
    top = tmp_path_factory.mktemp("st")
    words = modules.Transformer(tiny.bert("Model", top / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[words, modules.Pooling(16)], device="cpu").save(str(top / "model"))
    return str(top / "model")


@pytest.fixture
def texts() -> Any:
    return hr.from_arrow(pa.table({"id": np.arange(len(TEXTS)), "text": TEXTS}))


def embedded(ds: Any, adapter: Any, **options: Any) -> np.ndarray:
    made = ds.predict(adapter, input="text", output="e", batch_size=10).to_arrow(**(INLINE | options))
    assert made["id"].to_pylist() == list(range(len(TEXTS)))
    return made["e"].combine_chunks().to_numpy_ndarray()


def library(folder: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_the_library_s(normalize: bool, folder: str, texts: Any) -> None:
    adapter = SentenceTransformers(folder, normalize=normalize, batch_tokens=40)
    assert isinstance(adapter, ModelAdapter)
    made = embedded(texts, adapter)
    wanted = library(folder).encode(TEXTS, normalize_embeddings=normalize, show_progress_bar=False)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)
    assert np.allclose(np.linalg.norm(made, axis=1), 1.0) == normalize


def test_a_live_model_prompts_and_fewer_dimensions(folder: str, texts: Any) -> None:
    model = library(folder).train()
    made = embedded(texts, SentenceTransformers(model, prompt="very ", dimensions=5))
    assert model.training
    wanted = model.eval().encode(["very " + t for t in TEXTS], show_progress_bar=False)[:, :5]
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_padded_on_either_side(side: str, folder: str, texts: Any) -> None:
    model = library(folder)
    model.tokenizer.padding_side = side
    # Tokenised together, computed one by one: positions count from the left in this model, so that padding there moves them.
    made = embedded(texts, SentenceTransformers(model, batch_tokens=1))
    wanted = np.stack([model.encode(text, show_progress_bar=False) for text in TEXTS])
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


def test_prompts_are_those_that_the_library_takes(folder: str, texts: Any) -> None:
    model = library(folder)
    model.prompts = {"query": "very ", "none": ""}
    wanted = model.encode(TEXTS, prompt_name="query", show_progress_bar=False)
    np.testing.assert_allclose(embedded(texts, SentenceTransformers(model, prompt_name="query")), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(hr.HeadraceError, match="knows no prompt 'passage'"):
        embedded(texts, SentenceTransformers(model, prompt_name="passage"))
    model.default_prompt_name, model.truncate_dim = "query", 7
    np.testing.assert_allclose(embedded(texts, SentenceTransformers(model)), wanted[:, :7], rtol=1e-4, atol=1e-5)
    model.default_prompt_name = "passage"
    plain = model.encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(embedded(texts, SentenceTransformers(model)), plain, rtol=1e-4, atol=1e-5)


def loaded(model: Any, **options: Any) -> Any:
    return SentenceTransformers(model, **options).load(Place(inputs=("text",)))


def static() -> Any:
    """A model that pads nothing."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(tiny.WORDS)}, unk_token=tiny.WORDS[1]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[modules.StaticEmbedding(words, embedding_dim=6)], device="cpu")


def test_no_texts_make_no_rows_of_the_right_size(folder: str) -> None:
    for model, dimensions, size in ((library(folder), None, 16), (library(folder), 5, 5), (static(), None, 6)):
        with contextlib.closing(loaded(model, dimensions=dimensions)) as embedder:
            made = embedder(pa.array([], pa.string()))
            assert (made.shape, made.dtype) == ((0, size), np.float32)
            assert embedder(pa.array(TEXTS)).shape == (len(TEXTS), size)


def test_a_model_without_padding_is_the_library_s_alone(texts: Any) -> None:
    model = static()
    wanted = model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    made = embedded(texts, SentenceTransformers(model, normalize=True))
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


def test_texts_are_tokenised_twice_by_the_first_batch_at_most(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(model: Any) -> Any:
        preprocess = model.preprocess

        def count(texts: list[str], **options: Any) -> Any:
            seen.append(len(texts))
            return preprocess(texts, **options)

        monkeypatch.setattr(model, "preprocess", count)
        return model

    for model, expected in ((counted(static()), [5, 5, 5, 5]), (counted(library(folder)), [5, 5, 5])):
        with contextlib.closing(loaded(model)) as embedder:
            embedder._model = model  # the copy counts nothing
            for _ in range(3):
                embedder(pa.array(TEXTS[:5]))
        assert seen == expected
        seen.clear()


def test_what_can_not_work_is_refused(folder: str, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(adapter: Any, input: Any = "text") -> Any:
        with pytest.raises(hr.PlanError) as caught:
            texts.predict(adapter, input=input).take(**INLINE)
        return caught.value

    assert "hub" in refused(SentenceTransformers("all-MiniLM-L6-v2")).hint
    assert "can't use the column 'id'" in str(refused(SentenceTransformers(folder), "id"))
    assert "takes one column" in str(refused(SentenceTransformers(folder), ["text", "id"]))
    assert "no modules.json" in str(refused(SentenceTransformers(tmp_path)))
    for wrong in ({"batch_tokens": 0}, {"dimensions": 0}, {"prompt": "a", "prompt_name": "b"}):
        with pytest.raises(hr.PlanError):
            SentenceTransformers(folder, **wrong)
    import headrace.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert "needs sentence_transformers" in str(refused(SentenceTransformers(folder)))


@pytest.mark.parametrize("harm", ["module", "code", "pickle"])
def test_what_must_be_trusted(harm: str, folder: str, texts: Any, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    weights = next(model.rglob("*.safetensors"))
    if harm == "module":
        modules = json.loads((model / "modules.json").read_text())
        (model / "modules.json").write_text(json.dumps([*modules, {"idx": 2, "name": "2", "path": "", "type": "own.Own"}]))
    elif harm == "code":
        config = weights.parent / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "own.Own"}}))
    else:
        weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(hr.PlanError, match="any code"):
        texts.predict(SentenceTransformers(model), input="text").take(**INLINE)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes engine is for Linux")
def test_in_worker_processes(folder: str, texts: Any) -> None:
    made = embedded(texts, SentenceTransformers(folder), engine="processes", cpus=1)
    np.testing.assert_allclose(made, embedded(texts, SentenceTransformers(folder)), rtol=1e-4, atol=1e-5)
