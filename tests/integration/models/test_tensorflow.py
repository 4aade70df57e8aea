"""hr.models.TensorFlow through the public API, beside TensorFlow itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.contracts.model import ModelAdapter
from headrace.models.tensorflow import TensorFlow, pair

INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
ROWS = 23


@pytest.fixture
def rows() -> pa.Table:
    random = np.random.default_rng(0)
    vectors = pa.FixedShapeTensorArray.from_numpy_ndarray(random.normal(size=(ROWS, 3)))
    return pa.table({"v": vectors, "a": random.normal(size=ROWS), "t": [f"w{i}" for i in range(ROWS)], "id": np.arange(ROWS)})


@pytest.fixture
def tf() -> Any:
    return pytest.importorskip("tensorflow")


@pytest.fixture
def folder(tf: Any, tmp_path: Path) -> str:
    class Model(tf.Module):
        def __init__(self) -> None:
            self.weights = tf.Variable(np.arange(6, dtype=np.float32).reshape(3, 2))

        @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
        def serve(self, x: Any) -> Any:
            return {"y": x @ self.weights, "n": tf.reduce_sum(x, 1)}

        @tf.function(
            input_signature=[tf.TensorSpec([None, 1], tf.float32, name="a"), tf.TensorSpec([None], tf.string, name="t")]
        )
        def two(self, a: Any, t: Any) -> Any:
            return {"out": tf.strings.join([t, tf.strings.as_string(tf.cast(a[:, 0] * 100, tf.int32))])}

    class Reader(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="t")])
        def read(self, t: Any) -> Any:
            return {"out": tf.map_fn(tf.io.read_file, t)}

    model, reader = Model(), Reader()
    tf.saved_model.save(model, str(tmp_path / "m"), signatures={"serving_default": model.serve, "two": model.two})
    tf.saved_model.save(reader, str(tmp_path / "reads"), signatures={"serving_default": reader.read})
    return str(tmp_path / "m")


def test_inputs_are_paired() -> None:
    assert pair("m", ("x",), ("anything",)) == {"x": "anything"}
    assert pair("m", ("a", "b"), ("b", "c", "a")) == {"a": "a", "b": "b"}
    with pytest.raises(hr.PlanError, match="wants the inputs"):
        pair("m", ("a", "b"), ("a", "c"))


def test_a_live_object_is_refused() -> None:
    with pytest.raises(hr.PlanError, match="no path of a SavedModel"):
        TensorFlow(object())


def test_a_missing_library_is_told(tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    import headrace.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(hr.PlanError, match="needs tensorflow"):
        hr.from_arrow(rows).predict(TensorFlow(tmp_path), input="v").take(**INLINE)


def test_a_signature_gives_what_tensorflow_gives(tf: Any, folder: str, rows: pa.Table) -> None:
    assert isinstance(TensorFlow(folder), ModelAdapter)
    made = hr.from_arrow(rows).predict(TensorFlow(folder), input="v", batch_size=10).to_arrow(**INLINE)
    x = tf.constant(rows["v"].combine_chunks().to_numpy_ndarray().astype(np.float32))
    wanted = tf.saved_model.load(folder).signatures["serving_default"](x=x)
    np.testing.assert_allclose(made["y"].combine_chunks().to_numpy_ndarray(), wanted["y"].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made["n"], wanted["n"].numpy(), rtol=1e-5, atol=1e-6)


def test_another_signature_of_numbers_and_texts(folder: str, rows: pa.Table) -> None:
    adapter = TensorFlow(folder, signature="two")
    made = hr.from_arrow(rows).predict(adapter, input=["t", "a"], output="o").to_arrow(**INLINE)
    wanted = [
        f"{t}{int(np.float32(a) * np.float32(100))}".encode() for t, a in zip(*(rows[n].to_pylist() for n in "ta"), strict=True)
    ]
    assert made["o"].to_pylist() == wanted


def test_what_can_not_work_is_refused(folder: str, rows: pa.Table, tmp_path: Path) -> None:
    def refused(adapter: Any, input: Any = "v") -> str:
        with pytest.raises(hr.PlanError) as caught:
            hr.from_arrow(rows).predict(adapter, input=input).take(**INLINE)
        return str(caught.value)

    assert "no file or folder" in refused(TensorFlow("nowhere"))
    assert "no saved_model.pb" in refused(TensorFlow(tmp_path))
    assert "two" in refused(TensorFlow(folder, signature="other"))
    assert "wants the inputs" in refused(TensorFlow(folder, signature="two"), ["t", "v"])
    assert "a graph with ReadFile can run any code" in refused(TensorFlow(tmp_path / "reads"), "t")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "saved_model.pb").write_bytes(b"\xff\xfe no protobuf")
    assert "is no SavedModel" in refused(TensorFlow(tmp_path / "broken"))


def test_trusted_it_reads(folder: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    ds = hr.from_arrow(pa.table({"t": [str(tmp_path / "text")]}))
    made = ds.predict(TensorFlow(Path(folder).with_name("reads"), trust=True), input="t", output="o").to_arrow(**INLINE)
    assert made["o"].to_pylist() == [b"hello"]


@pytest.mark.skipif(sys.platform != "linux", reason="the processes engine is for Linux")
def test_in_worker_processes(folder: str, rows: pa.Table) -> None:
    ds = hr.from_arrow(rows).predict(TensorFlow(folder), input="v", output="n")
    made, wanted = ds.to_arrow(engine="processes", cpus=2, progress="quiet"), ds.to_arrow(**INLINE)
    np.testing.assert_allclose(made["n"], wanted["n"], rtol=1e-5, atol=1e-6)
