"""hr.models.Keras through the public API, beside Keras itself, with torch as its backend."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.contracts.model import ModelAdapter

pytest.importorskip("torch")
os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras is imported; worker processes inherit it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
INLINE: dict[str, Any] = {"engine": "inline", "progress": "quiet"}
ROWS = 23


@pytest.fixture
def rows() -> pa.Table:
    random = np.random.default_rng(0)
    return pa.table({n: random.normal(size=ROWS) for n in "ab"} | {"id": np.arange(ROWS), "word": ["x"] * ROWS})


def matrix(rows: pa.Table, names: str = "ab") -> np.ndarray:
    return np.stack([rows[n].to_numpy() for n in names], 1).astype(np.float32)


@pytest.fixture
def net() -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((2,)), keras.layers.Dense(4, "tanh"), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    return keras.Sequential(layers)


@pytest.fixture
def two() -> Any:
    """Two inputs, a and b, and two named outputs."""
    keras.utils.set_random_seed(0)
    a, b = keras.Input((1,), name="a"), keras.Input((1,), name="b")
    return keras.Model([a, b], {"difference": keras.layers.Subtract()([a, b]), "s": keras.layers.Dense(3)(a)})


def quietly(save: Callable[[str], None], path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(str(path))
    return str(path)


def predicted(adapter: Any, rows: pa.Table, **options: Any) -> np.ndarray:
    made = hr.from_arrow(rows).predict(adapter, input=["a", "b"], output="y", batch_size=10).to_arrow(**(INLINE | options))
    assert made["id"].to_pylist() == list(range(ROWS))
    return made["y"].combine_chunks().to_numpy_ndarray()


@pytest.mark.parametrize("kind", [".keras", ".h5", ""])
def test_a_model_gives_what_keras_gives(kind: str, net: Any, rows: pa.Table, tmp_path: Path) -> None:
    model = quietly(net.save, tmp_path / f"net{kind}") if kind else net
    adapter = hr.models.Keras(model, stack=True)
    assert isinstance(adapter, ModelAdapter)
    np.testing.assert_allclose(predicted(adapter, rows), net.predict_on_batch(matrix(rows)), rtol=1e-5, atol=1e-6)


def test_inputs_by_name_or_in_order(two: Any, rows: pa.Table) -> None:
    wanted = rows["a"].to_numpy().astype(np.float32) - rows["b"].to_numpy().astype(np.float32)
    renamed = rows.rename_columns({"a": "p", "b": "q"})
    for table, names in ((rows, ["a", "b"]), (rows, ["b", "a"]), (renamed, ["p", "q"])):
        made = hr.from_arrow(table).predict(hr.models.Keras(two), input=names).to_arrow(**INLINE)
        np.testing.assert_allclose(made["difference"].combine_chunks().to_numpy_ndarray()[:, 0], wanted, rtol=1e-6)
        assert made["s"].combine_chunks().to_numpy_ndarray().shape == (ROWS, 3)


def test_what_can_not_work_is_refused(net: Any, rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hr.PlanError, match="no file or folder"):
        predicted(hr.models.Keras("nowhere.keras"), rows)
    weights = quietly(net.save_weights, tmp_path / "net.weights.h5")
    with pytest.raises(hr.PlanError, match="file of a whole model"):
        predicted(hr.models.Keras(weights), rows)
    with pytest.raises(hr.PlanError, match="can't use the column 'word'"):
        hr.from_arrow(rows).predict(hr.models.Keras(net, stack=True), input=["a", "word"]).take(**INLINE)
    import headrace.core.extras as extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(hr.PlanError, match="needs keras"):
        predicted(hr.models.Keras(net), rows)


@pytest.mark.parametrize("kind", [".keras", ".h5"])
def test_code_in_a_file_must_be_trusted(kind: str, rows: pa.Table, tmp_path: Path) -> None:
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2)])
    path = quietly(keras.Sequential([keras.Input((2,)), inner]).save, tmp_path / f"net{kind}")
    with pytest.raises(hr.PlanError, match="a Lambda layer can run any code"):
        predicted(hr.models.Keras(path, stack=True), rows)
    np.testing.assert_allclose(predicted(hr.models.Keras(path, stack=True, trust=True), rows), 2 * matrix(rows), rtol=1e-6)


def test_a_live_model_means_the_same_every_time(net: Any, rows: pa.Table, tmp_path: Path) -> None:
    out = str(tmp_path / "out")

    def run() -> Any:
        return hr.from_arrow(rows).predict(hr.models.Keras(net, stack=True), input=["a", "b"]).write_parquet(out, **INLINE)

    run()
    assert run().already_done
    net.set_weights([w + 1 for w in net.get_weights()])
    with pytest.raises(hr.DestinationError, match="predict"):
        run()


@pytest.mark.skipif(sys.platform != "linux", reason="the processes engine is for Linux")
def test_in_worker_processes(net: Any, rows: pa.Table, tmp_path: Path) -> None:
    adapter = hr.models.Keras(quietly(net.save, tmp_path / "net.keras"), stack=True)
    made = predicted(adapter, rows, engine="processes", cpus=1)
    np.testing.assert_allclose(made, net.predict_on_batch(matrix(rows)), rtol=1e-5, atol=1e-6)
