"""Daft on its native runner: batch UDFs between `read_parquet` and `write_parquet`.

Columns cross as Arrow; tensors are Daft's own tensor columns. UDFs run in the engine's threads, or by knobs in processes. Where
each file is a job of its own (one output per input, many small jobs), a UDF over paths does it: Daft's writers name and size
files as they like.
"""

from __future__ import annotations

import atexit
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from suite.contract import Column, Expand, Job, Map, Model, Peer, Pipeline, Step, note
from suite.peers.by_file import finish, load, pieces, process
from suite.peers.steps import arrow_of, metrics_of, numpy_of

KNOBS = {
    "map_process": False,  # use_process of UDFs that prepare
    "map_rows": None,  # their batch_size; None: what the step asks for; 0: none given
    "model_process": False,  # use_process of models
    "model_workers": None,  # max_concurrency of models: a pool of so many processes; None: in the engine's threads
    "model_rows": None,  # their batch_size, as map_rows
    "morsel": None,  # default_morsel_size; 131,072
    "scans": None,  # scantask_max_parallel; 8
    "split": False,  # enable_scan_task_split_and_merge
    "paths": 8,  # of a call, where files are jobs of their own
}


def _search(workload: str) -> list[tuple[str, Sequence[Any]]]:
    if workload == "many-jobs":
        return [("map_process", [True]), ("paths", [1, 64])]
    if workload == "text-embedding":  # never more texts a call than others have to sort
        return [("model_workers", [1, 2]), ("model_process", [True]), ("scans", [2])]
    if workload == "tabular":
        models: list[tuple[str, Sequence[Any]]] = [
            ("model_process", [True]),
            ("model_workers", [1, 2]),
            ("model_rows", [8192, 0]),
        ]
        return [*models, ("scans", [2, 4]), ("morsel", [16_384]), ("split", [True])]
    if workload in ("tiny-files", "big-file"):
        maps: list[tuple[str, Sequence[Any]]] = [("map_rows", [0, 8192, 1 << 20]), ("map_process", [True])]
        return [
            *maps,
            ("scans", [2, 32]),
            ("split", [True]),
            ("morsel", [16_384]),
            ("paths", [1, 64]),
        ]
    return [
        ("map_process", [True]),
        ("model_workers", [1, 2]),
        ("map_rows", [16, 32, 256]),
        ("model_rows", [32, 256]),
        ("morsel", [1024]),
        ("scans", [2]),
        ("split", [True]),
    ]


LOADING = threading.Lock()  # threads that import a library at once can meet half of it
OWN = ("decode", "sentence-transformer")


def _why_not(pipelines: Sequence[Pipeline], form: str, params: Mapping[str, Any]) -> str | None:
    if form == "own" and not any(step.own.get("kind") in OWN for step in pipelines[0].steps):
        return "has nothing of its own for it"
    return None


PEER = Peer(
    "daft",
    "Daft",
    forms={"same": "batch UDFs, native runner", "own": "its own image decoder and text embedder, native runner"},
    environment="daft",
    why_not=_why_not,
    knobs=lambda workload: KNOBS,
    search=_search,
)


def run(job: Job) -> dict[str, Any]:
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft
    import daft.functions

    daft.set_runner_native()
    daft.set_execution_config(
        default_morsel_size=job.knobs["morsel"],
        scantask_max_parallel=job.knobs["scans"],
        enable_scan_task_split_and_merge=job.knobs["split"],
    )
    if job.knobs["map_process"] or job.knobs["model_process"] or job.knobs["model_workers"]:
        # With UDFs in processes it now and then aborts while the interpreter ends, all being done.
        atexit.register(os._exit, 0)
    pipelines = job.pipelines
    if len(pipelines) > 1 or pipelines[0].per_input:
        return _by_path(daft, job, pipelines)
    _frame(daft, job, pipelines[0]).write_parquet(job.out)
    return {"metrics": metrics_of(pipelines[0], job.out)}


# -- a data frame


def _frame(daft: Any, job: Job, pipeline: Pipeline) -> Any:
    df = daft.read_parquet(pipeline.source.rstrip("/") + "/*.parquet", io_config=_io(daft, pipeline.source))
    for step in pipeline.steps:
        made = _made(daft, step, job)
        kept = [daft.col(name) for name in df.column_names if name not in step.drops and name not in step.writes]
        new = [name for name in step.writes if name not in step.drops]
        if isinstance(step, Expand):
            df = df.select(*kept, made.alias("_made")).explode("_made")
            kept = [daft.col(name) for name in df.column_names if name != "_made"]
            df = df.select(*kept, *(daft.col("_made").get(name).alias(name) for name in new))
        elif len(step.writes) > 1:
            df = df.select(*kept, made.alias("_made"))
            df = df.select(*kept, *(daft.col("_made").get(name).alias(name) for name in new))
        else:
            df = df.select(*kept, *(made.alias(name) for name in new))
    return df


def _io(daft: Any, source: str) -> Any:
    if not source.startswith("s3://"):
        return None
    from daft.io import IOConfig, S3Config

    config = S3Config(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        key_id=os.environ.get("AWS_ACCESS_KEY_ID"),
        access_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
    )
    return IOConfig(s3=config)


def _made(daft: Any, step: Step, job: Job) -> Any:
    """The expression of what a step makes."""
    columns = [daft.col(name) for name in step.reads]
    kind = step.own.get("kind") if job.form == "own" else None
    if kind == "decode":
        images = daft.functions.decode_image(*columns, mode="RGB")
        return _resize_and_crop(daft, step, job)(images)
    if kind == "sentence-transformer":
        rows = step.rows if job.knobs["model_rows"] is None else job.knobs["model_rows"] or None
        embedded = daft.functions.embed_text(*columns, provider="transformers", model=step.own["path"], batch_size=rows)
        return embedded.cast(_dtype_of(daft, step))
    return _udf(daft, step, job)(*columns)


def _resize_and_crop(daft: Any, step: Step, job: Job) -> Callable[..., Any]:
    """Daft resizes all images of a column to one size; the shorter side to one length is left to a function."""
    ((_, column),) = step.writes.items()
    rows = step.rows if job.knobs["map_rows"] is None else job.knobs["map_rows"] or None

    @daft.func.batch(return_dtype=_dtype_of(daft, step), batch_size=rows)
    def resize_and_crop(images: Any) -> Any:
        import cv2
        import numpy as np

        cv2.setNumThreads(0)
        begun, least, side, made = time.time(), step.own["resize"], step.own["crop"], list[Any]()
        for image in images.to_pylist():
            scale = least / min(image.shape[:2])
            height, width = (max(least, round(n * scale)) for n in image.shape[:2])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            left, top = (width - side) // 2, (height - side) // 2
            made.append(image[top : top + side, left : left + side])
        note(step.name, begun, len(made))
        return arrow_of(np.stack(made), column)

    return resize_and_crop


def _udf(daft: Any, step: Step, job: Job) -> Callable[..., Any]:
    """Of a step: columns -> its only column, a struct of several, or for an Expand a list of structs."""
    knobs = job.knobs
    model = isinstance(step, Model)
    rows = knobs["model_rows" if model else "map_rows"]
    rows = step.rows if rows is None else rows or None
    of_step = _dtype_of(daft, step)
    if not isinstance(step, Model):
        made = daft.func.batch(return_dtype=of_step, batch_size=rows, use_process=knobs["map_process"] or None)
        return made(_function(step))

    # In threads there are as many at once as cores.
    workers = knobs["model_workers"] or (step.devices if step.device and step.devices > job.cores else None)

    class Predictor:
        def __init__(self) -> None:
            from suite.peers.daft import LOADING  # by name: this class is pickled by value

            with LOADING:
                self._loaded = step.load(max(1, job.cores // (workers or job.cores)))

        @daft.method.batch(return_dtype=of_step, batch_size=rows)
        def predict(self, *series: Any) -> Any:
            return _answer(step, self._loaded(_given(step, series)))

    pool = {"max_concurrency": workers} if workers else {}
    on_gpu = {"gpus": 1} if step.device and step.rate is None else {}
    made = daft.cls(use_process=knobs["model_process"] or None, **pool, **on_gpu)(Predictor)
    return made().predict


def _function(step: Map | Expand) -> Callable[..., Any]:
    def function(*series: Any) -> Any:
        given = _given(step, series)
        if isinstance(step, Map):
            return _answer(step, step(given))
        import numpy as np
        import pyarrow as pa

        made, parents = step(given)
        offsets = np.searchsorted(parents, np.arange(len(series[0]) + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), _struct(step, made))

    function.__name__ = step.name
    return function


def _given(step: Step, series: Sequence[Any]) -> dict[str, Any]:
    return {name: numpy_of(column.to_arrow()) for name, column in zip(step.reads, series, strict=True)}


def _answer(step: Step, made: Mapping[str, Any]) -> Any:
    if len(step.writes) > 1:
        return _struct(step, made)
    ((name, column),) = step.writes.items()
    return arrow_of(made[name], column)


def _struct(step: Step, made: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    return pa.StructArray.from_arrays([arrow_of(made[name], column) for name, column in step.writes.items()], list(step.writes))


def _dtype_of(daft: Any, step: Step) -> Any:
    kinds = {name: _dtype(daft, column) for name, column in step.writes.items()}
    if isinstance(step, Expand):
        return daft.DataType.list(daft.DataType.struct(kinds))
    return daft.DataType.struct(kinds) if len(kinds) > 1 else next(iter(kinds.values()))


def _dtype(daft: Any, column: Column) -> Any:
    of = getattr(daft.DataType, column.dtype)()
    return daft.DataType.tensor(of, column.shape) if column.shape else of


# -- a path is a row


def _by_path(daft: Any, job: Job, pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    todo = pieces(job, pipelines, job.cores)

    @daft.func.batch(return_dtype=daft.DataType.binary(), batch_size=job.knobs["paths"], use_process=job.knobs["map_process"])
    def work(which: Any) -> list[bytes]:
        name, models, done = None, {}, list[bytes]()
        for at in which.to_pylist():
            pipeline = pipelines[todo[at].pipeline]
            if pipeline.name != name:
                name, models = pipeline.name, load(pipeline, 1)
            done.append(pickle.dumps(process(pipeline, todo[at], models)))
        return done

    df = daft.from_pydict({"which": list(range(len(todo)))})
    scores = df.select(work(daft.col("which")).alias("scores")).to_pydict()["scores"]
    return finish(pipelines, [pickle.loads(of) for of in scores])
