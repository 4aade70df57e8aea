"""hr.models.Transformers through the public API, beside the library's own pipelines."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.integration.models import tiny

import headrace as hr
from headrace.contracts.model import ModelAdapter
from headrace.models.token_cuts import TokenCosts, cuts_by_length
from headrace.models.transformers import Transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
TEXTS = [" ".join(np.random.default_rng(i).choice(tiny.WORDS[5:], 1 + i % 9)) for i in range(23)] + ["good " * 30]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The library's own bars and notes, of the calls that are compared with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        yield


@pytest.fixture
def texts() -> Any:
    return hr.from_arrow(pa.table({"id": np.arange(len(TEXTS)), "text": TEXTS}))


def column(made: pa.Table, name: str) -> np.ndarray:
    return made[name].combine_chunks().to_numpy_ndarray()


def test_cuts_are_by_length_and_hold_every_row_once() -> None:
    lengths = [3, 9, 1, 9, 4, 30, 2]
    cuts = list(cuts_by_length(lengths, TokenCosts(18, 100)))
    assert [c.tolist() for c in cuts] == [[5], [1, 3], [4, 0, 6, 2]]
    assert sorted(np.concatenate(cuts)) == list(range(7))
    assert [c.tolist() for c in cuts_by_length(lengths, TokenCosts(100, 2))] == [[5], [1, 3], [4, 0], [6, 2]]
    assert [len(c) for c in cuts_by_length([0, 0], TokenCosts(1, 0))] == [2]
    assert list(cuts_by_length([], TokenCosts(1, 0))) == []


@pytest.mark.parametrize("batch_tokens", [1, 40, 16_384])
def test_text_classification(batch_tokens: int, texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3)
    adapter = Transformers(folder, task="text-classification", batch_tokens=batch_tokens)
    assert isinstance(adapter, ModelAdapter)
    made = texts.predict(adapter, input="text", batch_size=10).to_arrow(**INLINE)
    pipe = transformers.pipeline("text-classification", folder, device="cpu")
    wanted = pipe(TEXTS, truncation=True, max_length=16)
    assert made["id"].to_pylist() == list(range(len(TEXTS)))
    assert made["label"].to_pylist() == [w["label"] for w in wanted]
    np.testing.assert_allclose(made["score"].to_numpy(), [w["score"] for w in wanted], rtol=1e-4)
    assert made["score"].type == pa.float32()
    assert len(set(made["label"].to_pylist())) > 1


def test_probabilities_are_by_the_model_s_problem(texts: Any, tmp_path: Path) -> None:
    for problem in ("multi_label_classification", "regression"):
        folder = tiny.bert("ForSequenceClassification", tmp_path / problem, num_labels=3, problem_type=problem)
        made = texts.predict(Transformers(folder, task="text-classification"), input="text").to_arrow(**INLINE)
        wanted = transformers.pipeline("text-classification", folder, device="cpu")(TEXTS, truncation=True, max_length=16)
        np.testing.assert_allclose(made["score"].to_numpy(), [w["score"] for w in wanted], rtol=1e-4)


def test_pairs(tmp_path: Path) -> None:
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3)
    ds = hr.from_arrow(pa.table({"a": ["good film", "the"], "b": ["bad", "film was very good"]}))
    made = ds.predict(Transformers(folder, task="text-classification"), input=["a", "b"], output=["score"]).to_arrow(**INLINE)
    pipe = transformers.pipeline("text-classification", folder, device="cpu")
    wanted = [pipe({"text": r["a"], "text_pair": r["b"]}) for r in ds.take(**INLINE)]
    np.testing.assert_allclose(made["score"].to_numpy(), [w["score"] for w in wanted], rtol=1e-4)


def test_features(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("Model", tmp_path / "m")
    wanted = transformers.pipeline("feature-extraction", folder, device="cpu")(
        TEXTS, tokenize_kwargs={"truncation": True, "max_length": 16}
    )
    for pooling, pool in (("mean", lambda t: t.mean(0)), ("cls", lambda t: t[0])):
        adapter = Transformers(folder, task="feature-extraction", pooling=pooling)
        made = texts.predict(adapter, input="text", output="e").to_arrow(**INLINE)
        np.testing.assert_allclose(column(made, "e"), [pool(np.array(w[0])) for w in wanted], rtol=1e-3, atol=1e-5)
    adapter = Transformers(folder, task="feature-extraction", pooling="none")
    rows = texts.predict(adapter, input="text", output="e").take(len(TEXTS), **INLINE)
    for row, each in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row["e"], each[0], rtol=1e-3, atol=1e-5)


def test_tokens(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("ForTokenClassification", tmp_path / "m", num_labels=3)
    pipe = transformers.pipeline("token-classification", folder, device="cpu")
    for options in ({}, {"aggregation_strategy": "simple"}):
        adapter = Transformers(folder, task="token-classification", options=options)
        some = texts.limit(10)
        made = some.predict(adapter, input="text", output="entities").to_arrow(**INLINE)
        for found, wanted in zip(made["entities"].to_pylist(), pipe(TEXTS[:10], **options), strict=True):
            assert [f["word"] for f in found] == [w["word"] for w in wanted]
            np.testing.assert_allclose([f["score"] for f in found], [w["score"] for w in wanted], rtol=1e-4)
    assert len(texts.limit(1).predict(adapter, input="text", output="e").take(**INLINE)) == 1


def test_zero_shot(texts: Any, tmp_path: Path) -> None:
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", **labels)
    options = {"candidate_labels": ["good", "bad", "film"]}
    adapter = Transformers(folder, task="zero-shot-classification", options=options)
    for rows in (1, 5):
        made = texts.limit(rows).predict(adapter, input="text").to_arrow(**INLINE)
        wanted = [transformers.pipeline("zero-shot-classification", folder, device="cpu")(t, **options) for t in TEXTS[:rows]]
        assert made["label"].to_pylist() == [w["labels"][0] for w in wanted]
    with pytest.raises(hr.PlanError, match="labels to choose from"):
        Transformers(folder, task="zero-shot-classification")


def test_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = image_processor()
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
    ds = hr.from_arrow(pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)}))
    made = ds.predict(Transformers(tmp_path, task="image-classification"), input="image").to_arrow(**INLINE)
    with torch.no_grad():
        wanted = model(**processor(images=list(pixels), return_tensors="pt")).logits.softmax(-1)
    np.testing.assert_allclose(made["score"].to_numpy(), wanted.max(-1).values, rtol=1e-5)
    assert made["label"].to_pylist() == [f"LABEL_{int(i)}" for i in wanted.argmax(-1)]


def image_processor() -> Any:
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return kind(size={"height": 16, "width": 16})


def test_generation(texts: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tiny.WORDS), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    words = tiny.tokenizer(eos_token="[SEP]", model_max_length=32)
    options = {"max_new_tokens": 5}
    adapter = Transformers(model, task="text-generation", tokenizer=words, options=options)
    made = texts.predict(adapter, input="text", output="more").to_arrow(**INLINE)
    for text, more in zip(TEXTS, made["more"].to_pylist(), strict=True):
        ids = words([text], truncation=True, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        said = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)[0, ids.shape[1] :]
        assert more == words.decode(said, skip_special_tokens=True)
    assert words.padding_side == "right"


def test_summaries(texts: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tiny.WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=3,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path)
    options = {"max_new_tokens": 4}
    made = texts.predict(Transformers(tmp_path, task="summarization", options=options), input="text").to_arrow(**INLINE)
    for text, short in zip(TEXTS, made["prediction"].to_pylist(), strict=True):
        encoded = words([text], truncation=True, return_tensors="pt")
        said = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=False, **options
        )
        assert short == words.decode(said[0], skip_special_tokens=True)


def test_a_live_model(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    live = Transformers(model, task="text-classification", tokenizer=tiny.tokenizer())
    saved = Transformers(folder, task="text-classification")
    made, wanted = (texts.predict(a, input="text", batch_size=8).to_arrow(**INLINE) for a in (live, saved))
    np.testing.assert_allclose(made["score"], wanted["score"], rtol=1e-5)
    assert model.training
    with pytest.raises(hr.PlanError, match="needs its tokenizer"):
        Transformers(model, task="text-classification")


def test_half_precision(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("Model", tmp_path / "m")
    exact, rough = (
        column(
            texts.predict(Transformers(folder, task="feature-extraction", dtype=d), input="text", output="e").to_arrow(
                **INLINE
            ),
            "e",
        )
        for d in (None, "bfloat16")
    )
    assert rough.dtype == np.float32
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, atol=0.2)


def test_what_can_not_work_is_refused(texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3)
    adapter = Transformers(folder, task="text-classification")

    def refused(adapter: Any, input: Any = "text") -> Any:
        with pytest.raises(hr.PlanError) as caught:
            texts.predict(adapter, input=input).take(**INLINE)
        return caught.value

    assert "hub" in refused(Transformers("bert-base-uncased", task="text-classification")).hint
    assert "can't use the column 'id' of type int64: it wants text" in str(refused(adapter, "id"))
    assert "takes 1 input column" in str(refused(Transformers(folder, task="token-classification"), ["text", "id"]))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in str(refused(Transformers(tmp_path / "empty", task="text-classification")))
    for wrong in ({"task": "chat"}, {"pooling": "max"}, {"dtype": "int8"}, {"batch_tokens": 0}, {"max_length": 0}):
        with pytest.raises(hr.PlanError):
            Transformers(folder, **({"task": "text-classification"} | wrong))
    import headrace.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "transformers" else 1)
    assert "needs transformers" in str(refused(adapter))


def test_what_must_be_trusted(texts: Any, tmp_path: Path) -> None:
    folder = Path(tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    wanted = texts.predict(Transformers(folder, task="text-classification"), input="text", batch_size=8).to_arrow(**INLINE)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(hr.PlanError, match="pickled weights"):
        texts.predict(Transformers(folder, task="text-classification"), input="text").take(**INLINE)
    adapter = Transformers(folder, task="text-classification", trust=True)
    trusted = texts.predict(adapter, input="text", batch_size=8).to_arrow(**INLINE)
    assert trusted["label"].equals(wanted["label"])
    np.testing.assert_allclose(trusted["score"], wanted["score"], rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Own"}}))
    with pytest.raises(hr.PlanError, match="Python code"):
        texts.predict(Transformers(folder, task="text-classification"), input="text").take(**INLINE)


def test_weights_that_are_not_there_are_no_random_numbers(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("Model", tmp_path / "m")
    with pytest.raises(hr.DataError, match="lacks weights for text-classification: classifier"):
        texts.predict(Transformers(folder, task="text-classification"), input="text").take(**INLINE)


def test_missing_texts_are_told(tmp_path: Path) -> None:
    folder = tiny.bert("Model", tmp_path / "m")
    ds = hr.from_arrow(pa.table({"text": ["good", None]}))
    with pytest.raises(hr.UserCodeError, match="column 'text' has 1 missing"):
        ds.predict(Transformers(folder, task="feature-extraction"), input="text").take(**INLINE)


@pytest.mark.skipif(sys.platform != "linux", reason="the processes engine is for Linux")
def test_in_worker_processes(texts: Any, tmp_path: Path) -> None:
    folder = tiny.bert("ForSequenceClassification", tmp_path / "m", num_labels=3)
    ds = texts.predict(Transformers(folder, task="text-classification"), input="text")
    made = ds.to_arrow(engine="processes", cpus=1, progress="quiet")
    wanted = ds.to_arrow(**INLINE)
    assert made["label"].to_pylist() == wanted["label"].to_pylist()
    np.testing.assert_allclose(made["score"].to_numpy(), wanted["score"].to_numpy(), rtol=1e-5)
