"""Tabular scoring: 30 features and 20 carried columns, nested ones among them -> gradient boosting -> AUC and log-loss."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Model, Pipeline, Workload

FEATURES = tuple(f"f{i:02d}" for i in range(30))
CARRIED = 20


class HistGradientBoosting:
    """scikit-learn's. `threads`: OpenMP's, in whatever thread it is called."""

    takes_threads = True

    def __init__(self, path: str, threads: int = 1) -> None:
        import joblib
        from threadpoolctl import ThreadpoolController

        self._model = joblib.load(path)
        self._threads = threads
        self._controller = ThreadpoolController()

    def __call__(self, batch: Arrays) -> Any:
        import numpy as np

        x = np.column_stack([batch[name] for name in FEATURES])
        with self._controller.limit(limits=self._threads, user_api="openmp"):
            return self._model.predict_proba(x)[:, 1]


class XGBoost:
    takes_threads = True

    def __init__(self, path: str, threads: int = 1) -> None:
        import xgboost

        self._model = xgboost.Booster(model_file=path)
        self._model.set_param({"nthread": threads})

    def __call__(self, batch: Arrays) -> Any:
        import numpy as np

        return self._model.inplace_predict(np.column_stack([batch[name] for name in FEATURES]))


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    which = params["model"]
    kind, path, dtype = {
        "hist": (HistGradientBoosting, f"{data}/hist.joblib", "float64"),
        "xgboost": (XGBoost, f"{data}/xgboost.ubj", "float32"),
    }[which]
    own = {"kind": {"hist": "sklearn", "xgboost": "xgboost"}[which], "path": path}
    model = Model("model", kind, args=(path,), input=FEATURES, writes={"p": Column(dtype)}, rows=50_000, own=own)
    return (Pipeline("tabular", f"{data}/in", (model,), metrics={"auc": ("p", "label"), "logloss": ("p", "label")}),)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    files, rows = params["files"], params["rows"]
    (folder / "in").mkdir()
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write, [folder / "in" / f"{i:03d}.parquet" for i in range(files)], [rows] * files, range(files)))
    _train(folder)


def _write(path: Path, rows: int, file: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.array(np.arange(file * rows, (file + 1) * rows))
    pq.write_table(table_of(rows, file).add_column(0, "id", ids), path)


def table_of(rows: int, seed: int) -> Any:
    """An Arrow table: float32 features, a label that depends on them, and the carried columns."""
    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(FEATURES), rows)).astype(np.float32)
    columns: dict[str, Any] = {name: pa.array(x[i]) for i, name in enumerate(FEATURES)}
    odds = 1 / (1 + np.exp(-(x[0] + x[1] * x[2] - 0.5 * np.abs(x[3]) + rng.normal(size=rows))))
    columns["label"] = pa.array((rng.random(rows) < odds).astype(np.int8))
    words = np.array([f"word{k:04d}" for k in range(2000)])
    columns |= {f"c{i:02d}": _carried(rng, rows, i, words) for i in range(CARRIED)}
    return pa.table(columns)


def _carried(rng: Any, rows: int, which: int, words: Any) -> Any:
    """Integers, words, floats, lists, structs, in turn."""
    import numpy as np
    import pyarrow as pa

    kind = which % 5
    if kind == 0:
        return pa.array(rng.integers(0, 1 << 40, rows))
    if kind == 1:
        return pa.array(words[rng.integers(0, len(words), rows)])
    if kind == 2:
        return pa.array(rng.random(rows))
    if kind == 3:
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, rows))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rng.integers(0, 1000, offsets[-1])))
    parts = [pa.array(rng.random(rows).astype(np.float32)), pa.array(words[rng.integers(0, 50, rows)])]
    return pa.StructArray.from_arrays(parts, names=["score", "kind"])


def _train(folder: Path) -> None:
    import joblib
    import numpy as np
    import pyarrow.parquet as pq
    import xgboost
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = pq.read_table(folder / "in" / "000.parquet", columns=[*FEATURES, "label"])
    x, y = np.column_stack([table[name].to_numpy() for name in FEATURES]), table["label"].to_numpy()
    joblib.dump(
        HistGradientBoostingClassifier(max_iter=100, random_state=0, early_stopping=False).fit(x, y), folder / "hist.joblib"
    )
    trees = xgboost.XGBClassifier(n_estimators=100, max_depth=6, learning_rate=0.1, random_state=0)
    trees.fit(x, y)
    trees.save_model(folder / "xgboost.ubj")


WORKLOAD = Workload(
    "tabular",
    "gradient boosting on 30 features, 20 carried columns, AUC and log-loss",
    make=make,
    pipelines=pipelines,
    params={"files": 64, "rows": 50_000, "model": "hist"},
    small={"files": 4, "rows": 2_000},
    input_params=("files", "rows"),
    variants={"xgboost": {"model": "xgboost"}},
    tolerance={"p": (1e-5, 1e-6)},
    io_counts=True,
)
