"""Two hundred small models, each with a file of its own, in one program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.contract import Arrays, Column, Model, Pipeline, Workload

FEATURES = tuple(f"f{i}" for i in range(8))


class Linear:
    """A scikit-learn pipeline, scaler and logistic regression."""

    def __init__(self, path: str) -> None:
        import joblib

        self._model = joblib.load(path)

    def __call__(self, batch: Arrays) -> Any:
        import numpy as np

        return self._model.predict_proba(np.column_stack([batch[name] for name in FEATURES]))[:, 1]


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    made: list[Pipeline] = []
    for i in range(params["jobs"]):
        path = f"{data}/jobs/{i:04d}/model.joblib"
        own = {"kind": "sklearn", "path": path}
        model = Model("model", Linear, args=(path,), input=FEATURES, writes={"p": Column("float64")}, rows=50_000, own=own)
        made.append(Pipeline(f"{i:04d}", f"{data}/jobs/{i:04d}/in", (model,)))
    return tuple(made)


def make(folder: Path, params: Mapping[str, Any]) -> None:
    import joblib
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = params["rows"]
    for i in range(params["jobs"]):
        random = np.random.default_rng(i)
        (folder / "jobs" / f"{i:04d}" / "in").mkdir(parents=True)
        x = random.normal(size=(rows, len(FEATURES))).astype(np.float32)
        y = (x @ random.normal(size=len(FEATURES)) + random.normal(size=rows) > 0).astype(np.int8)
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(x[:500], y[:500])
        joblib.dump(model, folder / "jobs" / f"{i:04d}" / "model.joblib")
        columns: dict[str, Any] = {"id": np.arange(i * rows, (i + 1) * rows)}
        columns |= {name: x[:, k] for k, name in enumerate(FEATURES)}
        columns["name"] = [f"row {n}" for n in range(rows)]
        pq.write_table(pa.table(columns), folder / "jobs" / f"{i:04d}" / "in" / "part.parquet")


WORKLOAD = Workload(
    "many-jobs",
    "200 small models, one file each",
    make=make,
    pipelines=pipelines,
    params={"jobs": 200, "rows": 2000},
    small={"jobs": 8},
    input_params=("jobs", "rows"),
    scaled="jobs",
    tolerance={"p": (1e-6, 1e-7)},
)
