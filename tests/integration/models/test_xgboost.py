"""XGBoost: boosters and scikit-learn models answer as they do when called directly, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pandas as pd
import pyarrow as pa
import pytest
import xgboost as xgb

import headrace as hr
from headrace.connectors import storage
from headrace.contracts.model import ModelAdapter, Place
from headrace.testing.s3 import S3Server

ROWS = 300
NAMES = ["age", "income", "score"]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"age": rng.integers(18, 90, ROWS).astype(float), "income": rng.normal(3e4, 1e4, ROWS), "score": rng.random(ROWS)}
    )
    frame.loc[::7, "age"] = np.nan
    return frame


@pytest.fixture(scope="module")
def labels(frame: pd.DataFrame) -> np.ndarray:
    return ((frame["age"].fillna(40) / 90 + frame["score"]) * 1.5).astype(int).to_numpy()


@pytest.fixture(scope="module")
def table(frame: pd.DataFrame) -> pa.Table:
    return pa.table({"id": range(ROWS), **{n: pa.array(frame[n], from_pandas=True) for n in reversed(NAMES)}})


@pytest.fixture(scope="module")
def booster(frame: pd.DataFrame, labels: np.ndarray) -> xgb.Booster:
    return xgb.train({"objective": "binary:logistic", "nthread": 1}, xgb.DMatrix(frame, labels > 0), 5)


def answer(table: pa.Table, model: Any, input: Any = None, engine: Any = "inline", **options: Any) -> np.ndarray:
    made = hr.from_arrow(table).predict(model, input=input, output="p", **options).to_arrow(engine=engine, progress="quiet")
    column = made["p"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    return column.to_numpy(zero_copy_only=False)


same = np.testing.assert_array_equal


@pytest.mark.parametrize("engine", ["inline", "processes"])
@pytest.mark.parametrize("suffix", ["json", "ubj"])
def test_a_saved_model(
    tmp_path: Path, table: pa.Table, frame: pd.DataFrame, booster: xgb.Booster, engine: str, suffix: str
) -> None:
    booster.save_model(tmp_path / f"m.{suffix}")
    model = hr.models.XGBoost(tmp_path / f"m.{suffix}")
    assert isinstance(model, ModelAdapter)
    assert model.name == f"XGBoost(m.{suffix})"
    expected = booster.predict(xgb.DMatrix(frame))
    same(answer(table, model, None, engine, batch_size=37), expected)
    if engine == "inline":
        same(answer(table, model, NAMES), expected)


def test_all_outputs_of_a_booster(table: pa.Table, frame: pd.DataFrame, booster: xgb.Booster) -> None:
    data = xgb.DMatrix(frame)
    for output, how in (("margin", "output_margin"), ("leaf", "pred_leaf"), ("contrib", "pred_contribs")):
        same(answer(table, hr.models.XGBoost(booster, output=output), NAMES), booster.predict(data, **{how: True}))  # type: ignore[arg-type]
    found = answer(table, hr.models.XGBoost(booster, iteration_range=(1, 3)), NAMES)
    same(found, booster.predict(data, iteration_range=(1, 3)))


def test_several_classes(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    data = xgb.DMatrix(frame, labels)
    booster = xgb.train({"objective": "multi:softprob", "num_class": 3}, data, 3)
    same(answer(table, hr.models.XGBoost(booster)), booster.predict(data))
    same(answer(table, hr.models.XGBoost(booster, output="contrib")), booster.predict(data, pred_contribs=True))


def test_a_linear_booster(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    data = xgb.DMatrix(frame.fillna(0), labels)
    booster = xgb.train({"booster": "gblinear", "updater": "coord_descent"}, data, 3)
    full = pa.Table.from_pandas(frame.fillna(0), preserve_index=False)
    same(answer(full, hr.models.XGBoost(booster)), booster.predict(data))


def test_models_of_the_scikit_learn_api(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    names = np.array(labels)
    model = xgb.XGBClassifier(n_estimators=20, early_stopping_rounds=2, learning_rate=1.0, n_jobs=2)
    model.fit(frame[:200], names[:200], eval_set=[(frame[200:], 2 - names[200:])], verbose=False)
    assert model.best_iteration < 15
    outputs: dict[Any, Any] = {
        "predict": model.predict(frame),
        "proba": model.predict_proba(frame),
        "margin": model.predict(frame, output_margin=True),
        "leaf": model.apply(frame),
        "contrib": model.get_booster().predict(
            xgb.DMatrix(frame), pred_contribs=True, iteration_range=(0, model.best_iteration + 1)
        ),
    }
    for output, expected in outputs.items():
        same(answer(table, hr.models.XGBoost(model, output=output)), expected)
    assert model.n_jobs == 2
    regressor = xgb.XGBRegressor(n_estimators=3).fit(frame.to_numpy(), labels)
    same(answer(table, hr.models.XGBoost(regressor), NAMES, "processes"), regressor.predict(frame.to_numpy()))


def test_categories_are_the_models(labels: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"a": rng.random(ROWS), "c": rng.choice(["x", "y", "z"], ROWS), "k": rng.choice([5, 7, 9], ROWS)})
    coded = frame.astype({"c": "category", "k": "category"})
    coded.loc[::5, "c"] = None
    target = (coded["a"] + (frame["c"] == "y") + (frame["k"] == 7) > 1).astype(int)
    booster = xgb.train({"objective": "binary:logistic"}, xgb.DMatrix(coded, target, enable_categorical=True), 5)
    expected = booster.predict(xgb.DMatrix(coded, enable_categorical=True))
    texts = pa.array(coded["c"].astype(object), pa.string(), from_pandas=True)
    backwards = pa.DictionaryArray.from_arrays(pa.array(2 - coded["c"].cat.codes, mask=coded["c"].isna()), ["z", "y", "x"])
    for column in (texts, texts.dictionary_encode(), backwards):
        for k in (pa.array(frame["k"]), pa.array(frame["k"]).dictionary_encode()):
            table = pa.table({"a": pa.array(frame["a"]), "c": column, "k": k})
            same(answer(table, hr.models.XGBoost(booster), batch_size=11), expected)
    table = pa.table({"a": pa.array(frame["a"]), "c": texts, "k": pa.array(frame["k"])})
    leaves = booster.predict(xgb.DMatrix(coded, enable_categorical=True), pred_leaf=True)
    same(answer(table, hr.models.XGBoost(booster, output="leaf")), leaves)
    classifier = xgb.XGBClassifier(n_estimators=3, enable_categorical=True).fit(coded, target)
    same(answer(table, hr.models.XGBoost(classifier, output="proba")), classifier.predict_proba(coded))
    unknown = table.set_column(1, "c", pa.array(["new"] * ROWS))
    missing = table.set_column(1, "c", pa.nulls(ROWS, pa.string()))
    same(answer(unknown, hr.models.XGBoost(booster)), answer(missing, hr.models.XGBoost(booster)))
    with pytest.raises(hr.PlanError, match="can't use the column 'c' of type int64: it wants categories of type string"):
        answer(table.set_column(1, "c", table["k"]), hr.models.XGBoost(booster))
    with pytest.raises(hr.PlanError, match="can't use the column 'a' of type string"):
        answer(table.set_column(0, "a", table["c"]), hr.models.XGBoost(booster))


def test_models_without_names_take_columns_as_declared(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    booster = xgb.train({}, xgb.DMatrix(frame.to_numpy(), labels), 3)
    expected = booster.predict(xgb.DMatrix(frame.to_numpy()))
    same(answer(table, hr.models.XGBoost(booster), NAMES), expected)
    vectors = pa.table({"v": pa.array(frame.to_numpy(np.float32).tolist(), pa.list_(pa.float32(), 3))})
    same(answer(vectors, hr.models.XGBoost(booster), "v"), expected)
    with pytest.raises(hr.PlanError, match="trained with 3 features, and the input has 4"):
        answer(table, hr.models.XGBoost(booster))


def test_what_does_not_fit_is_refused_before_the_run(tmp_path: Path, table: pa.Table, booster: xgb.Booster) -> None:
    booster.save_model(tmp_path / "m.json")
    model = hr.models.XGBoost(tmp_path / "m.json")
    times = pa.array([0] * ROWS, pa.timestamp("s"))
    for given, input, match in (
        (table, ["age", "score"], "trained with 'income', which the input lacks"),
        (table, [*NAMES, "id"], "does not know the feature 'id'"),
        (table.drop_columns("income"), None, "'income', which is not there"),
        (table.set_column(1, "score", times), None, r"can't use the column 'score' of type timestamp\[s\]"),
    ):
        with pytest.raises(hr.PlanError, match=match):
            answer(given, model, input)
    (tmp_path / "junk.json").write_text("junk")
    with pytest.raises(hr.PlanError, match="is no model of XGBoost"):
        answer(table, hr.models.XGBoost(tmp_path / "junk.json"))
    with pytest.raises(hr.PlanError, match='output="proba" is for live classifiers'):
        answer(table, hr.models.XGBoost(booster, output="proba"))
    with pytest.raises(hr.PlanError, match="a dict is no model"):
        answer(table, hr.models.XGBoost({}))
    late = hr.from_arrow(table).map_batches(lambda batch: batch).predict(model, input=["age", "score"])
    with pytest.raises(hr.DataError, match="which the input lacks"):
        late.to_arrow(engine="inline", progress="quiet")


def test_threads_of_the_place(booster: xgb.Booster) -> None:
    loaded = hr.models.XGBoost(booster).load(Place(threads=3))
    assert '"nthread":"3"' in loaded._booster.save_config().replace(" ", "")
    assert '"nthread":"3"' not in booster.save_config().replace(" ", "")


def test_a_model_on_s3(
    tmp_path: Path,
    strict: S3Server,
    table: pa.Table,
    frame: pd.DataFrame,
    booster: xgb.Booster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    obstore.put(storage.s3_store("b"), "m/a.ubj", bytes(booster.save_raw("ubj")))
    same(answer(table, hr.models.XGBoost("s3://b/m/a.ubj")), booster.predict(xgb.DMatrix(frame)))


def test_a_run_knows_a_live_model_by_its_content(
    tmp_path: Path, table: pa.Table, frame: pd.DataFrame, labels: np.ndarray, booster: xgb.Booster
) -> None:
    def write(model: Any) -> Any:
        ds = hr.from_arrow(table).predict(hr.models.XGBoost(model), output="p")
        return ds.write_parquet(str(tmp_path), engine="inline", progress="quiet")

    write(booster)
    assert write(copy.deepcopy(booster)).already_done
    with pytest.raises(hr.DestinationError, match="predict"):
        write(xgb.train({"objective": "binary:logistic"}, xgb.DMatrix(frame, labels > 0), 2))


@pytest.mark.parametrize("cities", [["Bonn", "Köln", "Ulm"], ["Ulm", "Kö"], ["東京", "Ulm"]])
def test_categories_that_xgboost_has_damaged_are_refused(cities: list[str]) -> None:
    frame = pd.DataFrame({"a": np.arange(ROWS) / ROWS, "c": pd.Categorical.from_codes(np.arange(ROWS) % len(cities), cities)})
    matrix = xgb.DMatrix(frame, frame["c"] == cities[-1], enable_categorical=True)
    booster = xgb.train({"objective": "binary:logistic"}, matrix, 2)
    table = pa.table({"a": pa.array(frame["a"]), "c": pa.array(frame["c"].astype(object), pa.string())})
    if xgb.__version__ < "3.3":
        with pytest.raises(hr.PlanError, match="the categories of 'c' hold letters beyond ASCII"):
            answer(table, hr.models.XGBoost(booster))
    else:
        same(answer(table, hr.models.XGBoost(booster)), booster.predict(matrix))
