"""Ray Data on a local cluster of its own, which is part of what is timed.

Batches are Arrow tables: as NumPy ones Ray Data would turn every carried struct and list into Python objects and back. A model
on CPUs is kept in the process of its tasks, so that reading, computing and writing fuse; a model on a device is an actor per
device, or, by a knob, kept in the tasks too. Where each file is a job of its own (one output per input, many small jobs), Ray
tasks do the files: Ray Data's writers name files as they like.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from suite.contract import Job, Loaded, Model, Peer, Pipeline, Step
from suite.peers.by_file import Piece, finish, load, pieces, process
from suite.peers.steps import apply, metrics_of

KNOBS = {
    "reader": "v1",  # DataContext.use_datasource_v2 off; "v2" starts up to 32 actors that read footers
    "blocks": None,  # override_num_blocks of read_parquet
    "block_mb": None,  # DataContext.target_max_block_size; 128
    "maps": "tasks",  # or "actors", one per core
    "map_rows": None,  # batch_size; None: what the step asks for; 0: whole blocks
    "map_cpus": 1.0,
    "models": "tasks",  # those on CPUs: "tasks" or "actors"
    "model_rows": None,  # batch_size of models, as map_rows
    "device": "actors",  # models on devices: an actor per device, or "tasks"
    "in_flight": None,  # max_tasks_in_flight_per_actor of those
    "write_cpus": 1.0,
    "file_rows": None,  # min_rows_per_file
    "reserve": None,  # DataContext.op_resource_reservation_ratio; 0.5
    "tasks": 4,  # per core, where files are jobs of their own
    "store_mb": 2048,  # of the object store
}


Search = list[tuple[str, Sequence[Any]]]


def _search(workload: str) -> Search:
    if workload == "many-jobs":
        return [("tasks", [1, 2, 16])]
    read: Search = [("reader", ["v2", "v2, 1 footer actor"])]
    if workload == "text-embedding":  # never more texts a call than others have to sort
        return [*read, ("models", ["actors"]), ("blocks", [2, 5, 10]), ("write_cpus", [0.25])]
    if workload == "tabular":
        models: Search = [("models", ["actors"]), ("model_rows", [0, 8192])]
        return [*read, *models, ("blocks", [2, 8, 16]), ("write_cpus", [0.25]), ("block_mb", [32, 512])]
    if workload in ("tiny-files", "big-file"):
        maps: Search = [("map_rows", [0, 8192, 1 << 20]), ("maps", ["actors"])]
        more: Search = [("write_cpus", [0.25]), ("block_mb", [32, 512]), ("file_rows", [100_000]), ("tasks", [1, 16])]
        return [*read, *maps, ("blocks", [2, 8, 16]), *more]
    return [
        *read,
        ("device", ["tasks"]),
        ("write_cpus", [0.1, 0.5]),
        ("map_rows", [16, 256]),
        ("blocks", [4, 8, 16, 32]),
        ("in_flight", [2, 8]),
        ("block_mb", [16, 32]),
        ("map_cpus", [0.5]),
        ("reserve", [0.1]),
        ("maps", ["actors"]),
    ]


PEER = Peer(
    "ray-data",
    "Ray Data",
    forms={"same": "map_batches on Arrow tables, a local cluster"},
    environment="ray_data",
    knobs=lambda workload: KNOBS,
    search=_search,
)


def run(job: Job) -> dict[str, Any]:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (its name); else all else on the machine would go before its workers
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if job.knobs["reader"] == "v2, 1 footer actor":
        os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    import ray

    pipelines = job.pipelines
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets need a short path
    ray.init(
        num_cpus=job.cores,
        resources={_resource(m): m.devices for m in pipelines[0].models if m.rate},
        object_store_memory=job.knobs["store_mb"] << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=folder,
    )
    try:
        if len(pipelines) > 1 or pipelines[0].per_input:
            return _as_tasks(ray, job, pipelines)
        _dataset(ray, job, pipelines[0]).write_parquet(
            job.out,
            ray_remote_args={"num_cpus": job.knobs["write_cpus"]},
            **({"min_rows_per_file": job.knobs["file_rows"]} if job.knobs["file_rows"] else {}),
        )
        return {"metrics": metrics_of(pipelines[0], job.out)}
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _resource(model: Model) -> str:
    """Each model on simulated devices has its own."""
    return f"device-of-{model.name}"


# -- Ray Data


def _dataset(ray: Any, job: Job, pipeline: Pipeline) -> Any:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    knobs = job.knobs
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = knobs["reader"] != "v1"
    if knobs["block_mb"] is not None:
        context.target_max_block_size = knobs["block_mb"] << 20
    if knobs["reserve"] is not None:
        context.op_resource_reservation_ratio = knobs["reserve"]
    ds = ray.data.read_parquet(pipeline.source, override_num_blocks=knobs["blocks"])
    for step in pipeline.steps:
        model = isinstance(step, Model)
        rows = knobs["model_rows" if model else "map_rows"]
        how: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": step.rows if rows is None else rows or None}
        if model and step.device and knobs["device"] == "actors":
            how["compute"] = ActorPoolStrategy(size=step.devices, max_tasks_in_flight_per_actor=knobs["in_flight"])
            how |= {"num_cpus": 0, "resources": {_resource(step): 1}} if step.rate else {"num_gpus": 1}
        elif not (model and step.device) and knobs["models" if model else "maps"] == "actors":
            how["compute"] = ActorPoolStrategy(size=job.cores)
            how["num_cpus"] = min(knobs["map_cpus"], 0.5)  # reading and writing need CPUs too
        else:
            how["num_cpus"] = knobs["map_cpus"]
        if "compute" in how:
            ds = ds.map_batches(Stage, fn_constructor_args=(step,), **how)
        else:
            ds = ds.map_batches(_in_task, fn_args=(step,), **how)
    return ds


class Stage:
    """A step in an actor."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._models = {step.name: step.load(1)} if isinstance(step, Model) else {}

    def __call__(self, table: Any) -> Any:
        return apply(self._step, table, self._models)


_MODELS: dict[str, Loaded] = {}  # of this process: tasks run in the same processes again and again


def _in_task(table: Any, step: Step) -> Any:
    if isinstance(step, Model) and step.name not in _MODELS:
        _MODELS[step.name] = step.load(1)
    return apply(step, table, _MODELS)


# -- a task per file


def _as_tasks(ray: Any, job: Job, pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    """A few tasks per core, each with its share of the files."""
    one = ray.remote(_process)
    todo = pieces(job, pipelines, job.cores)
    chunk = max(1, len(todo) // (job.knobs["tasks"] * job.cores))
    refs = [
        one.remote([(pipelines[piece.pipeline], piece) for piece in todo[at : at + chunk]]) for at in range(0, len(todo), chunk)
    ]
    return finish(pipelines, [scores for of in ray.get(refs) for scores in of])


def _process(todo: Sequence[tuple[Pipeline, Piece]]) -> list[Any]:
    name, models, done = None, {}, []
    for pipeline, piece in todo:
        if pipeline.name != name:
            name, models = pipeline.name, load(pipeline, 1)
        done.append(process(pipeline, piece, models))
    return done
