"""Sklearn: estimators and pipelines answer as they do when called directly."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import obstore
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import headrace as hr
from headrace.connectors import storage
from headrace.contracts.model import ModelAdapter, Place
from headrace.testing.s3 import S3Server

ROWS = 300


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"age": rng.integers(18, 90, ROWS), "income": rng.normal(3e4, 1e4, ROWS), "city": rng.choice(["a", "b", "c"], ROWS)}
    )
    frame["bought"] = (frame["age"] / 90 + (frame["city"] == "b") + rng.random(ROWS) > 1.3).astype(int)
    return frame


@pytest.fixture(scope="module")
def table(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False).append_column("id", pa.array(range(ROWS)))


@pytest.fixture(scope="module")
def forest(frame: pd.DataFrame) -> RandomForestClassifier:
    return RandomForestClassifier(5, random_state=0, n_jobs=-1).fit(frame[["age", "income"]].to_numpy(), frame["bought"])


@pytest.fixture(scope="module")
def pipeline(frame: pd.DataFrame) -> Pipeline:
    """Trained on a frame, with a column of texts."""
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    prepare = ColumnTransformer([("n", numbers, ["income", "age"]), ("c", OneHotEncoder(handle_unknown="ignore"), ["city"])])
    return make_pipeline(prepare, LogisticRegression()).fit(frame[["age", "income", "city"]], frame["bought"])


def answer(table: pa.Table, model: Any, input: Any = None, engine: Any = "inline", **options: Any) -> np.ndarray:
    made = hr.from_arrow(table).predict(model, input=input, output="p", **options).to_arrow(engine=engine, progress="quiet")
    column = made["p"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    return column.to_numpy(zero_copy_only=False)


def same(found: np.ndarray, expected: Any) -> None:
    """What BLAS computes depends on the number of rows in the last bit."""
    np.testing.assert_allclose(found, expected, rtol=1e-12 if found.dtype == np.float64 else 1e-6)


def test_an_adapter() -> None:
    model = hr.models.Sklearn("models/churn.joblib")
    assert isinstance(model, ModelAdapter)
    assert model.name == "Sklearn(churn.joblib)"


@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
@pytest.mark.parametrize("method", ["predict", "predict_proba"])
def test_a_saved_forest(
    tmp_path: Path, table: pa.Table, frame: pd.DataFrame, forest: RandomForestClassifier, engine: str, method: Any
) -> None:
    joblib.dump(forest, tmp_path / "forest.joblib")
    model = hr.models.Sklearn(tmp_path / "forest.joblib", method=method, trust=True)
    expected = getattr(forest, method)(frame[["age", "income"]].to_numpy())
    np.testing.assert_array_equal(answer(table, model, ["age", "income"], engine, batch_size=64), expected)


def test_one_column_of_the_probabilities(table: pa.Table, frame: pd.DataFrame, forest: RandomForestClassifier) -> None:
    expected = forest.predict_proba(frame[["age", "income"]].to_numpy())
    for options, column in (({"positive": True}, 1), ({"index": 0}, 0), ({"index": -1}, 1)):
        model = hr.models.Sklearn(forest, method="predict_proba", **options)
        np.testing.assert_array_equal(answer(table, model, ["age", "income"]), expected[:, column])
    for index in (2, -3):
        with pytest.raises(hr.PlanError, match=f"has no class {index}"):
            answer(table, hr.models.Sklearn(forest, method="predict_proba", index=index), ["age", "income"])
    with pytest.raises(hr.UserCodeError, match="no output column 1"):
        answer(table, hr.models.Sklearn(forest, method="predict", index=1), ["age", "income"])
    with pytest.raises(hr.PlanError, match="positive=True is for predict_proba"):
        answer(table, hr.models.Sklearn(forest, positive=True), ["age", "income"])


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_a_pipeline_on_named_columns(
    tmp_path: Path, table: pa.Table, frame: pd.DataFrame, pipeline: Pipeline, engine: str
) -> None:
    with open(tmp_path / "pipeline.pkl", "wb") as file:
        pickle.dump(pipeline, file)
    model = hr.models.Sklearn(str(tmp_path / "pipeline.pkl"), method="predict_proba", positive=True, trust=True)
    expected = pipeline.predict_proba(frame[["age", "income", "city"]])[:, 1]
    same(answer(table, model, ["city", "income", "age"], engine), expected)
    same(answer(table, model, None, engine), expected)  # the model knows its columns


def test_nulls_and_categories_as_pandas_has_them(frame: pd.DataFrame, pipeline: Pipeline) -> None:
    holes = frame[["age", "income", "city"]].astype({"age": float})
    holes.loc[::3, "age"] = np.nan
    holes.loc[::5, "city"] = None
    expected = pipeline.predict(holes)
    table = pa.table(
        {
            "income": pa.array(holes["income"]),
            "age": pa.array(holes["age"], from_pandas=True),
            "city": pa.array(holes["city"], from_pandas=True),
        }
    )
    assert table["age"].null_count == 100
    np.testing.assert_array_equal(answer(table, hr.models.Sklearn(pipeline)), expected)
    coded = table.set_column(2, "city", table["city"].dictionary_encode())
    np.testing.assert_array_equal(answer(coded, hr.models.Sklearn(pipeline)), expected)


def test_other_methods_and_outputs(table: pa.Table, frame: pd.DataFrame, pipeline: Pipeline) -> None:
    x = frame[["age", "income"]].to_numpy()
    pca = make_pipeline(StandardScaler(), PCA(2)).fit(x)
    same(answer(table, hr.models.Sklearn(pca, method="transform"), ["age", "income"]), pca.transform(x))
    scores = pipeline.decision_function(frame[["age", "income", "city"]])
    same(answer(table, hr.models.Sklearn(pipeline, method="decision_function")), scores)
    encoder = OneHotEncoder().fit(frame[["city"]])
    expected = encoder.transform(frame[["city"]]).toarray()
    same(answer(table, hr.models.Sklearn(encoder, method="transform")), expected)
    two = LinearRegression().fit(x, frame[["bought", "age"]])
    same(answer(table, hr.models.Sklearn(two), ["age", "income"]), two.predict(x))
    named = RandomForestClassifier(3, random_state=0).fit(x, frame["city"])
    assert answer(table, hr.models.Sklearn(named), ["age", "income"]).tolist() == named.predict(x).tolist()


def test_texts(frame: pd.DataFrame) -> None:
    texts = ["good river", "bad storm", "good storm", "bad river"] * 5
    labels = [1, 0, 1, 0] * 5
    table = pa.table({"text": texts})
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    assert answer(table, hr.models.Sklearn(model), "text").tolist() == labels
    assert answer(table, hr.models.Sklearn(model), ["text"], batch_size=1).tolist() == labels
    coder = OneHotEncoder(sparse_output=False).fit(np.array(texts, dtype=object).reshape(-1, 1))
    found = answer(table, hr.models.Sklearn(coder, method="transform"), ["text"])
    np.testing.assert_array_equal(found, coder.transform(np.array(texts, dtype=object).reshape(-1, 1)))


@pytest.mark.parametrize(
    "type", [pa.list_(pa.float32()), pa.list_(pa.float32(), 4), pa.fixed_shape_tensor(pa.float32(), (2, 2))]
)
def test_a_column_of_vectors_is_the_matrix(type: Any) -> None:
    x = np.random.default_rng(0).random((50, 4), np.float32)
    model = make_pipeline(StandardScaler(copy=False), LinearRegression()).fit(x.copy(), x[:, 0])
    storage_type = pa.list_(pa.float32(), 4) if isinstance(type, pa.FixedShapeTensorType) else type
    column = pa.array(x.tolist(), storage_type)
    column = pa.ExtensionArray.from_storage(type, column) if isinstance(type, pa.FixedShapeTensorType) else column
    for input in ("v", ["v"]):
        same(answer(pa.table({"v": column}), hr.models.Sklearn(model), input), model.predict(x.copy()))


def test_a_vector_for_a_model_with_names(frame: pd.DataFrame) -> None:
    model = LinearRegression().fit(frame[["age", "income"]], frame["bought"])
    x = frame[["age", "income"]].to_numpy(float)
    found = answer(pa.table({"v": pa.array(x.tolist())}), hr.models.Sklearn(model), "v")
    same(found, model.predict(frame[["age", "income"]]))


def test_an_untrusted_file_is_refused(tmp_path: Path, table: pa.Table) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(hr.PlanError, match="can run any code") as refused:
        answer(table, hr.models.Sklearn(tmp_path / "evil.pkl"), ["age"])
    assert "trust=True" in refused.value.hint
    with pytest.raises(hr.PlanError, match="can run any code"):
        hr.models.Sklearn(tmp_path / "evil.pkl").load(Place())
    assert not ran.exists()
    with pytest.raises(hr.PlanError, match="no file or folder"):
        answer(table, hr.models.Sklearn(tmp_path / "none.pkl", trust=True), ["age"])
    (tmp_path / "junk.pkl").write_bytes(b"junk")
    with pytest.raises(hr.PlanError, match="can't be loaded"):
        answer(table, hr.models.Sklearn(tmp_path / "junk.pkl", trust=True), ["age"])


def test_columns_that_do_not_fit_are_refused_before_the_run(
    tmp_path: Path, table: pa.Table, forest: RandomForestClassifier, pipeline: Pipeline
) -> None:
    joblib.dump(forest, tmp_path / "forest.joblib")
    for model in (hr.models.Sklearn(forest), hr.models.Sklearn(tmp_path / "forest.joblib", trust=True)):
        ds = hr.from_arrow(table)
        for inputs, match in (
            (["age", "city"], "can't use the column 'city' of type"),
            (["age"], "trained with 2 features, and the input has 1"),
        ):
            out = tmp_path / "out"
            with pytest.raises(hr.PlanError, match=match):
                ds.predict(model, input=inputs, output="p").write_parquet(str(out), engine="inline", progress="quiet")
            assert not [p for p in out.rglob("*") if p.is_file()]
    with pytest.raises(hr.PlanError, match="'income', which the input lacks"):
        answer(table, hr.models.Sklearn(pipeline), ["age", "city"])
    with pytest.raises(hr.PlanError, match="'income', which is not there"):
        answer(table.drop_columns("income"), hr.models.Sklearn(pipeline))
    with pytest.raises(hr.PlanError, match="has no transform"):
        answer(table, hr.models.Sklearn(forest, method="transform"), ["age", "income"])
    with pytest.raises(hr.PlanError, match="no method='fit'"):
        answer(table, hr.models.Sklearn(forest, method="fit"), ["age", "income"])  # type: ignore[arg-type]


def test_columns_that_only_running_tells(table: pa.Table, forest: RandomForestClassifier) -> None:
    ds = hr.from_arrow(table).map_batches(lambda batch: batch).predict(hr.models.Sklearn(forest), input=["age", "city"])
    with pytest.raises(hr.DataError, match="can't use the column 'city'"):
        ds.to_arrow(engine="inline", progress="quiet")


def test_the_users_own_object_is_not_changed(table: pa.Table, frame: pd.DataFrame, forest: RandomForestClassifier) -> None:
    search = GridSearchCV(RandomForestRegressor(2, n_jobs=2, random_state=0), {"max_depth": [2, 3]}, cv=2)
    search.fit(frame[["age", "income"]].to_numpy(), frame["bought"])
    found = answer(table, hr.models.Sklearn(search), ["age", "income"])
    np.testing.assert_array_equal(found, search.predict(frame[["age", "income"]].to_numpy()))
    assert (forest.n_jobs, search.estimator.n_jobs, search.best_estimator_.n_jobs) == (-1, 2, 2)


def test_threads_are_limited_during_a_call_and_only_then() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    class Tells:
        n_features_in_ = 1

        def predict(self, x: np.ndarray) -> np.ndarray:
            return np.full(len(x), max(lib["num_threads"] for lib in threadpool_info()))

    with threadpool_limits(3):
        before = [lib["num_threads"] for lib in threadpool_info()]
        model = hr.models.Sklearn(Tells()).load(Place(threads=2, inputs=("a",)))
        assert model(pa.table({"a": [1.0]})).tolist() == [2]
        assert [lib["num_threads"] for lib in threadpool_info()] == before


def test_n_jobs_is_one_in_a_worker(forest: RandomForestClassifier) -> None:
    from headrace.models.sklearn import _alone

    search = GridSearchCV(RandomForestRegressor(2, n_jobs=2), {"max_depth": [2]}, n_jobs=4)
    alone = _alone({"steps": [search]}, shared=True)["steps"][0]
    assert (alone.n_jobs, alone.estimator.n_jobs) == (1, 1)
    assert (search.n_jobs, search.estimator.n_jobs) == (4, 2)
    single = RandomForestRegressor(n_jobs=1)
    assert _alone(single, shared=True) is single


def test_a_model_on_s3(
    tmp_path: Path, strict: S3Server, table: pa.Table, frame: pd.DataFrame, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    obstore.put(storage.s3_store("b"), "models/churn.pkl", pickle.dumps(pipeline))
    with pytest.raises(hr.PlanError, match="can run any code"):
        answer(table, hr.models.Sklearn("s3://b/models/churn.pkl"))
    found = answer(table, hr.models.Sklearn("s3://b/models/churn.pkl", trust=True), engine="processes")
    np.testing.assert_array_equal(found, pipeline.predict(frame[["age", "income", "city"]]))
    with pytest.raises(hr.PlanError, match=r"no object s3://b/models/none\.pkl"):
        answer(table, hr.models.Sklearn("s3://b/models/none.pkl", trust=True))


def test_a_run_knows_its_model_by_content(tmp_path: Path, table: pa.Table, frame: pd.DataFrame) -> None:
    x = frame[["age", "income"]].to_numpy()
    path = tmp_path / "m.joblib"

    def write(method: Any = "predict", model: Any = None) -> Any:
        adapter = hr.models.Sklearn(model if model is not None else path, method=method, trust=True)
        ds = hr.from_arrow(table).predict(adapter, input=["age", "income"], output="p")
        return ds.write_parquet(str(tmp_path / ("live" if model is not None else "out")), engine="inline", progress="quiet")

    first = LogisticRegression(C=1.0).fit(x, frame["bought"])
    second = LogisticRegression(C=0.01).fit(x, frame["bought"])
    joblib.dump(first, path)
    write()
    joblib.dump(first, path)  # another time, the same content
    assert write().already_done
    joblib.dump(second, path)
    with pytest.raises(hr.DestinationError, match="predict"):
        write()
    write(model=first)
    assert write(model=first).already_done
    with pytest.raises(hr.DestinationError, match="predict"):
        write(model=second)


def test_gradient_boosting_takes_categories(frame: pd.DataFrame) -> None:
    coded = frame[["age", "city"]].astype({"city": "category"})
    model = HistGradientBoostingRegressor(max_iter=3, categorical_features="from_dtype").fit(coded, frame["bought"])
    table = pa.Table.from_pandas(coded, preserve_index=False)
    assert pa.types.is_dictionary(table.schema.field("city").type)
    np.testing.assert_array_equal(answer(table, hr.models.Sklearn(model)), model.predict(coded))


def test_an_array_of_objects_for_what_was_trained_on_one(frame: pd.DataFrame) -> None:
    x = frame[["age", "city"]].to_numpy(dtype=object)
    prepare = ColumnTransformer([("n", "passthrough", [0]), ("c", OneHotEncoder(), [1])])
    model = make_pipeline(prepare, RandomForestClassifier(3, random_state=0)).fit(x, frame["bought"])
    texts = pa.table({"city": frame["city"].astype(object), "age": frame["age"]})
    for table in (texts, texts.set_column(0, "city", texts["city"].dictionary_encode())):
        np.testing.assert_array_equal(answer(table, hr.models.Sklearn(model), ["age", "city"]), model.predict(x))
