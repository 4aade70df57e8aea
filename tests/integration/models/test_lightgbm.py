"""LightGBM: boosters and scikit-learn models answer as they do when called directly, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import obstore
import pandas as pd
import pyarrow as pa
import pytest

import headrace as hr
from headrace.connectors import storage
from headrace.contracts.model import ModelAdapter
from headrace.testing.s3 import S3Server

ROWS = 300
NAMES = ["age", "income", "score"]


def train(x: Any, y: Any, rounds: int = 5, **params: Any) -> lgb.Booster:
    return lgb.train({"objective": "binary", "verbose": -1, "num_threads": 1, **params}, lgb.Dataset(x, y), rounds)


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
def booster(frame: pd.DataFrame, labels: np.ndarray) -> lgb.Booster:
    return train(frame, labels > 0)


def answer(table: pa.Table, model: Any, input: Any = None, engine: Any = "inline", **options: Any) -> np.ndarray:
    made = hr.from_arrow(table).predict(model, input=input, output="p", **options).to_arrow(engine=engine, progress="quiet")
    column = made["p"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    return column.to_numpy(zero_copy_only=False)


same = np.testing.assert_array_equal


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_a_saved_model(tmp_path: Path, table: pa.Table, frame: pd.DataFrame, booster: lgb.Booster, engine: str) -> None:
    booster.save_model(tmp_path / "m.txt")
    model = hr.models.LightGBM(tmp_path / "m.txt")
    assert isinstance(model, ModelAdapter)
    assert model.name == "LightGBM(m.txt)"
    expected = booster.predict(frame)
    same(answer(table, model, None, engine, batch_size=37), expected)
    if engine == "inline":
        same(answer(table, model, NAMES), expected)


def test_all_outputs_of_a_booster(table: pa.Table, frame: pd.DataFrame, booster: lgb.Booster) -> None:
    for output, how in (("raw_score", "raw_score"), ("leaf", "pred_leaf"), ("contrib", "pred_contrib")):
        same(answer(table, hr.models.LightGBM(booster, output=output), NAMES), booster.predict(frame, **{how: True}))  # type: ignore[arg-type]
    same(answer(table, hr.models.LightGBM(booster, num_iteration=2), NAMES), booster.predict(frame, num_iteration=2))


def test_several_classes(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    booster = train(frame, labels, objective="multiclass", num_class=3)
    same(answer(table, hr.models.LightGBM(booster)), booster.predict(frame))
    same(answer(table, hr.models.LightGBM(booster, output="contrib")), booster.predict(frame, pred_contrib=True))


def test_models_of_the_scikit_learn_api(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    for y in (np.array(["no", "yes"])[(labels > 0).astype(int)], labels + 10):
        model = lgb.LGBMClassifier(n_estimators=4, verbose=-1, n_jobs=1).fit(frame, y)
        outputs: dict[Any, Any] = {
            "predict": model.predict(frame),
            "proba": model.predict_proba(frame),
            "raw_score": model.predict(frame, raw_score=True),
            "leaf": model.predict(frame, pred_leaf=True),
        }
        for output, expected in outputs.items():
            same(answer(table, hr.models.LightGBM(model, output=output)), np.asarray(expected))
    regressor = lgb.LGBMRegressor(n_estimators=3, verbose=-1, n_jobs=1).fit(frame.to_numpy(), labels)
    same(answer(table, hr.models.LightGBM(regressor), NAMES, "processes"), regressor.predict(frame.to_numpy()))


def test_early_stopping(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    data = lgb.Dataset(frame[:200], labels[:200] > 0)
    held_out = lgb.Dataset(frame[200:], labels[200:] == 0, reference=data)
    stop = lgb.early_stopping(2, verbose=False)
    params = {"objective": "binary", "verbose": -1, "num_threads": 1}
    booster = lgb.train(params, data, 30, valid_sets=[held_out], callbacks=[stop], keep_training_booster=True)
    assert booster.best_iteration < booster.num_trees()
    same(answer(table, hr.models.LightGBM(booster)), booster.predict(frame))
    same(answer(table, hr.models.LightGBM(booster, num_iteration=-1)), booster.predict(frame, num_iteration=-1))


def test_categories_are_the_models() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"a": rng.random(ROWS), "c": rng.choice(["x", "y", "z"], ROWS), "k": rng.choice([5, 7, 9], ROWS)})
    coded = frame.astype({"c": "category", "k": "category"})
    coded.loc[::5, "c"] = None
    target = (coded["a"] + (frame["c"] == "y") + (frame["k"] == 7) > 1).astype(int)
    booster = train(coded, target)
    expected = booster.predict(coded)
    texts = pa.array(coded["c"].astype(object), pa.string(), from_pandas=True)
    k = pa.array(frame["k"]).dictionary_encode()
    backwards = pa.DictionaryArray.from_arrays(pa.array(2 - coded["c"].cat.codes, mask=coded["c"].isna()), ["z", "y", "x"])
    for column in (texts, texts.dictionary_encode(), backwards):
        table = pa.table({"a": pa.array(frame["a"]), "c": column, "k": k})
        same(answer(table, hr.models.LightGBM(booster), batch_size=11), expected)
    unknown = table.set_column(1, "c", pa.array(["new"] * ROWS))
    same(answer(unknown, hr.models.LightGBM(booster)), booster.predict(coded.assign(c=pd.Categorical(["new"] * ROWS))))
    with pytest.raises(hr.PlanError, match="trained with 2 features that are categories, and the input has 1"):
        answer(table.set_column(2, "k", pa.array(frame["k"])), hr.models.LightGBM(booster))
    with pytest.raises(hr.PlanError, match="can't use the column 'c' of type dictionary"):
        answer(table.set_column(1, "c", k), hr.models.LightGBM(booster))


def test_models_without_names_take_columns_as_declared(table: pa.Table, frame: pd.DataFrame, labels: np.ndarray) -> None:
    booster = train(frame.to_numpy(), labels > 0)
    expected = booster.predict(frame.to_numpy())
    same(answer(table, hr.models.LightGBM(booster), NAMES), expected)
    vectors = pa.table({"v": pa.array(frame.to_numpy().tolist(), pa.list_(pa.float64(), 3))})
    same(answer(vectors, hr.models.LightGBM(booster), "v"), expected)
    with pytest.raises(hr.PlanError, match="trained with 3 features, and the input has 4"):
        answer(table, hr.models.LightGBM(booster))


def test_single_precision_and_names_with_spaces(frame: pd.DataFrame, labels: np.ndarray) -> None:
    small = frame.astype(np.float32).rename(columns={"age": "age in years"})
    booster = train(small, labels > 0)
    assert "age_in_years" in booster.feature_name()
    table = pa.Table.from_pandas(small, preserve_index=False).append_column("id", pa.array(range(ROWS)))
    same(answer(table, hr.models.LightGBM(booster)), booster.predict(small))
    same(answer(table, hr.models.LightGBM(booster), ["score", "age in years", "income"]), booster.predict(small))


def test_what_does_not_fit_is_refused_before_the_run(
    tmp_path: Path, table: pa.Table, booster: lgb.Booster, capfd: pytest.CaptureFixture[str]
) -> None:
    booster.save_model(tmp_path / "m.txt")
    model = hr.models.LightGBM(tmp_path / "m.txt")
    times = pa.array([0] * ROWS, pa.timestamp("s"))
    for given, input, match in (
        (table, ["age", "score"], "trained with 'income', which the input lacks"),
        (table, [*NAMES, "id"], "does not know the feature 'id'"),
        (table.drop_columns("income"), None, "'income', which is not there"),
        (table.set_column(1, "score", times), None, r"can't use the column 'score' of type timestamp\[s\]"),
        (table.set_column(1, "score", pa.array(["a"] * ROWS)), None, "can't use the column 'score' of type string"),
    ):
        with pytest.raises(hr.PlanError, match=match):
            answer(given, model, input)
    (tmp_path / "junk.txt").write_text("junk")
    with pytest.raises(hr.PlanError, match="is no text model of LightGBM"):
        answer(table, hr.models.LightGBM(tmp_path / "junk.txt"))
    with pytest.raises(hr.PlanError, match='output="proba" is for live classifiers'):
        answer(table, hr.models.LightGBM(booster, output="proba"))
    with pytest.raises(hr.PlanError, match="a dict is no model"):
        answer(table, hr.models.LightGBM({}))
    assert capfd.readouterr().out == ""


def test_a_model_on_s3(
    tmp_path: Path,
    strict: S3Server,
    table: pa.Table,
    frame: pd.DataFrame,
    booster: lgb.Booster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    obstore.put(storage.s3_store("b"), "m/a.txt", booster.model_to_string().encode())
    same(answer(table, hr.models.LightGBM("s3://b/m/a.txt")), booster.predict(frame))


def test_a_run_knows_a_live_model_by_its_content(
    tmp_path: Path, table: pa.Table, frame: pd.DataFrame, labels: np.ndarray, booster: lgb.Booster
) -> None:
    def write(model: Any) -> Any:
        ds = hr.from_arrow(table).predict(hr.models.LightGBM(model), output="p")
        return ds.write_parquet(str(tmp_path), engine="inline", progress="quiet")

    write(booster)
    assert write(copy.deepcopy(booster)).already_done
    with pytest.raises(hr.DestinationError, match="predict"):
        write(train(frame, labels > 0, 2))
