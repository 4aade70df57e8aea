"""Onnx: models answer as onnxruntime does when it is called directly, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import obstore
import onnx
import onnxruntime as ort
import pyarrow as pa
import pytest
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier

import headrace as hr
from headrace.connectors import storage
from headrace.contracts.model import ModelAdapter, Place
from headrace.core.tensors import numpy_to_array
from headrace.testing.s3 import S3Server

ROWS = 200
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).random((ROWS, 3), np.float32)


@pytest.fixture(scope="module")
def table(x: np.ndarray) -> pa.Table:
    return pa.table({"id": range(ROWS), "c": x[:, 2].astype(float), "b": x[:, 1], "a": x[:, 0]})


@pytest.fixture(scope="module")
def forest(x: np.ndarray) -> bytes:
    model = RandomForestClassifier(5, random_state=0).fit(x, (x.sum(axis=1) * 2).astype(int))
    return to_onnx(model, x[:1], options={"zipmap": False}).SerializeToString()


def directly(model: bytes, feed: dict[str, Any], output: str | None = None) -> Any:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run([output or session.get_outputs()[0].name], feed)[0]


def answer(
    table: pa.Table, model: Any, input: Any = None, engine: Any = "inline", column: str = "p", **options: Any
) -> np.ndarray:
    output = "p" if column == "p" else None
    made = hr.from_arrow(table).predict(model, input=input, output=output, **options).to_arrow(engine=engine, progress="quiet")
    found = made[column].combine_chunks()
    found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
    if isinstance(found.type, pa.FixedShapeTensorType):
        return found.to_numpy_ndarray()
    return found.to_numpy(zero_copy_only=False)


def graph(node: Any, inputs: list[Any], outputs: list[Any]) -> bytes:
    made = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    onnx.checker.check_model(made)
    return made.SerializeToString()


def tensor(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


same = np.testing.assert_array_equal


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_a_matrix_of_declared_columns(tmp_path: Path, table: pa.Table, x: np.ndarray, forest: bytes, engine: str) -> None:
    (tmp_path / "m.onnx").write_bytes(forest)
    model = hr.models.Onnx(tmp_path / "m.onnx", outputs="probabilities")
    assert isinstance(model, ModelAdapter)
    assert (model.name, model.devices) == ("Onnx(m.onnx)", ("cpu",))
    same(answer(table, model, NAMES, engine, batch_size=37), directly(forest, {"X": x}, "probabilities"))


def test_several_outputs_have_their_names(table: pa.Table, x: np.ndarray, forest: bytes) -> None:
    model = hr.models.Onnx(forest)
    assert model.name == "Onnx(bytes)"
    same(answer(table, model, NAMES, column="label"), directly(forest, {"X": x}, "label"))
    same(answer(table, model, NAMES, column="probabilities"), directly(forest, {"X": x}, "probabilities"))
    same(answer(table, hr.models.Onnx(forest, outputs=["label"]), NAMES), directly(forest, {"X": x}, "label"))
    with pytest.raises(hr.PlanError, match="has no output 'proba'"):
        answer(table, hr.models.Onnx(forest, outputs="proba"), NAMES)


def test_maps_of_zipmap_are_tensors(table: pa.Table, x: np.ndarray) -> None:
    labels = np.array(["no", "yes"])[(x[:, 0] > 0.5).astype(int)]
    model = DecisionTreeClassifier(max_depth=3, random_state=0).fit(x, labels)
    mapped = to_onnx(model, x[:1], options={"zipmap": True}).SerializeToString()
    plain = to_onnx(model, x[:1], options={"zipmap": False}).SerializeToString()
    found = answer(table, hr.models.Onnx(mapped, outputs="output_probability"), NAMES)
    same(found, directly(plain, {"X": x}, "probabilities"))
    assert answer(table, hr.models.Onnx(mapped, outputs="output_label"), NAMES).tolist() == model.predict(x).tolist()


def test_one_column_of_answers_is_one_value_a_row(table: pa.Table, x: np.ndarray) -> None:
    made = to_onnx(GradientBoostingRegressor(n_estimators=3).fit(x, x[:, 0]), x[:1]).SerializeToString()
    expected = directly(made, {"X": x})
    assert expected.shape == (ROWS, 1)
    same(answer(table, hr.models.Onnx(made), NAMES), expected[:, 0])


def test_columns_go_to_inputs_of_their_names(x: np.ndarray) -> None:
    cities = np.random.default_rng(1).choice(["u", "v"], (ROWS, 1)).astype(object)
    prepare = ColumnTransformer([("n", "passthrough", [0, 1, 2]), ("c", OneHotEncoder(), [3])])
    model = make_pipeline(prepare, DecisionTreeClassifier(max_depth=3, random_state=0))
    model.fit(np.hstack([x.astype(object), cities]), (x[:, 0] > 0.5) ^ (cities[:, 0] == "u"))
    types = [("x", FloatTensorType([None, 3])), ("city", StringTensorType([None, 1]))]
    made = to_onnx(model, initial_types=types, options={"zipmap": False}).SerializeToString()
    table = pa.table({"city": cities[:, 0], "x": pa.array(x.astype(float).tolist()), "other": range(ROWS)})
    expected = directly(made, {"x": x, "city": cities}, "label")
    adapter = hr.models.Onnx(made, outputs="label")
    same(answer(table, adapter), expected)
    same(answer(table, adapter, ["x", "city"]), expected)
    with pytest.raises(hr.PlanError, match="has the inputs 'x', 'city', and the columns are city, z"):
        answer(table.rename_columns({"x": "z"}), adapter, ["city", "z"])
    with pytest.raises(hr.PlanError, match="can't use the column 'city' of type int64: it wants values for string"):
        answer(table.set_column(0, "city", table["other"]), adapter)
    with pytest.raises(hr.DataError, match="nulls in column 'city'"):
        answer(table.set_column(0, "city", pa.nulls(ROWS, pa.string())), adapter)


def test_tensors_keep_their_shape() -> None:
    images = np.random.default_rng(0).integers(0, 255, (ROWS, 2, 3), np.uint8)
    mean = graph(
        helper.make_node("ReduceMean", ["image"], ["y"], axes=[2], keepdims=0),
        [tensor("image", ["n", 2, 3])],
        [tensor("y", ["n", 2])],
    )
    expected = directly(mean, {"image": images.astype(np.float32)})
    table = pa.table({"image": numpy_to_array(images), "wide": numpy_to_array(np.zeros((ROWS, 3, 3), np.float32))})
    same(answer(table, hr.models.Onnx(mean), "image"), expected)
    same(answer(table, hr.models.Onnx(mean), None), expected)
    with pytest.raises(hr.PlanError, match=r"wants 'image' as \(rows, 2, 3\), and a row of 'wide' is \(3, 3\)"):
        answer(table, hr.models.Onnx(mean), "wide")


def test_scalars_and_integers() -> None:
    add = graph(
        helper.make_node("Add", ["i", "j"], ["k"]),
        [tensor("i", ["n"], TensorProto.INT64), tensor("j", ["n"], TensorProto.INT64)],
        [tensor("k", ["n"], TensorProto.INT64)],
    )
    table = pa.table({"j": pa.array([1, 2, 3], pa.int16()), "i": [2**60, 5, 6], "f": [0.5, 1.5, 2.5]})
    assert answer(table, hr.models.Onnx(add)).tolist() == [2**60 + 1, 7, 9]
    with pytest.raises(hr.PlanError, match="can't use the column 'j' of type double: it wants values for int64"):
        answer(table.select(["i", "f"]).rename_columns(["i", "j"]), hr.models.Onnx(add))
    with pytest.raises(hr.DataError, match="nulls in column 'j', which the model takes as int64"):
        answer(table.set_column(0, "j", pa.array([1, None, 3])), hr.models.Onnx(add))


def test_nulls_are_nan() -> None:
    is_nan = graph(helper.make_node("IsNaN", ["x"], ["y"]), [tensor("x", ["n", 2])], [tensor("y", ["n", 2], TensorProto.BOOL)])
    table = pa.table({"a": [1, None], "b": [0.5, 1.0]})
    assert answer(table, hr.models.Onnx(is_nan), ["a", "b"]).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("size", [1, 64])
def test_a_fixed_batch_is_filled_up(table: pa.Table, x: np.ndarray, size: int) -> None:
    double = graph(helper.make_node("Add", ["x", "x"], ["y"]), [tensor("x", [size, 3])], [tensor("y", [size, 3])])
    same(answer(table, hr.models.Onnx(double), NAMES), x + x)


def test_an_output_without_rows_is_refused(table: pa.Table) -> None:
    total = graph(helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0), [tensor("x", ["n", 3])], [tensor("y", [])])
    with pytest.raises(hr.UserCodeError, match=r"its output 'y' is \(\) for \d+ rows"):
        answer(table, hr.models.Onnx(total), NAMES)


def test_what_does_not_fit_is_refused_before_the_run(tmp_path: Path, table: pa.Table, forest: bytes) -> None:
    model = hr.models.Onnx(forest)
    texts = table.set_column(1, "c", pa.array(["t"] * ROWS))
    for given, input, match in (
        (table, ["a", "b"], r"wants 'X' as \(rows, 3\), and is given 2 columns"),
        (table, None, "is given 4 columns"),
        (texts, NAMES, "can't use the column 'c' of type string"),
        (table.append_column("v", pa.array([[1.0]] * ROWS)), ["a", "b", "v"], "can't join the column 'v'"),
    ):
        with pytest.raises(hr.PlanError, match=match):
            answer(given, model, input)
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(hr.PlanError, match="can't be opened"):
        answer(table, hr.models.Onnx(tmp_path / "junk.onnx"), NAMES)
    with pytest.raises(hr.PlanError, match="no file or folder"):
        answer(table, hr.models.Onnx(tmp_path / "none.onnx"), NAMES)
    (tmp_path / "two.onnx").write_bytes(forest)
    with pytest.raises(hr.PlanError, match=r"must hold one \.onnx file, and holds junk\.onnx, two\.onnx"):
        answer(table, hr.models.Onnx(tmp_path), NAMES)
    with pytest.raises(hr.PlanError, match="onnxruntime has no NoSuchProvider here"):
        answer(table, hr.models.Onnx(forest, providers=["NoSuchProvider"]), NAMES)
    late = hr.from_arrow(table).map_batches(lambda batch: batch).predict(model, input=["a", "b"])
    with pytest.raises(hr.DataError, match="is given 2 columns"):
        late.to_arrow(engine="inline", progress="quiet")


def test_a_gpu_that_is_not_there(forest: bytes) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    with pytest.raises(hr.PlanError, match="can't use a GPU here"):
        hr.models.Onnx(forest).load(Place(device="cuda:0"))
    assert hr.models.Onnx(forest, providers=["CUDAExecutionProvider"]).devices == ("cuda", "cpu")


def test_a_folder_on_s3(
    tmp_path: Path, strict: S3Server, table: pa.Table, x: np.ndarray, forest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    obstore.put(storage.s3_store("b"), "forest/model.onnx", forest)
    obstore.put(storage.s3_store("b"), "forest/notes.txt", b"")
    same(answer(table, hr.models.Onnx("s3://b/forest/", outputs="label"), NAMES), directly(forest, {"X": x}, "label"))
