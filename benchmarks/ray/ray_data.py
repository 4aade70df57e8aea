"""Ray Data's driver in the comparison, with all of its knobs in a dict. Called by compare.py, which also searches them.

The same functions as Headrace's, in Arrow batches: as NumPy batches Ray Data would turn every carried struct and list into
Python objects and back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import workloads as w

# Where the search begins: what the documentation and a careful reader of it would write.
DEFAULTS: dict[str, dict[str, Any]] = {
    "images": {
        "reader": "v1",  # DataContext.use_datasource_v2 off; it is on unless told, with 32 actors that read footers
        "blocks": None,  # override_num_blocks of read_parquet
        "block_mb": None,  # DataContext.target_max_block_size; 128
        "decode": "tasks",  # or actors, as many as CPUs
        "decode_rows": 64,  # batch_size of map_batches; None: whole blocks
        "decode_cpus": 1.0,
        "format": "pyarrow",
        "device_rows": 64,
        "device_in_flight": None,  # max_tasks_in_flight_per_actor
        "write_cpus": 1.0,
        "reserve": None,  # DataContext.op_resource_reservation_ratio; 0.5
    },
    "tabular": {
        "reader": "v1",
        "blocks": None,
        "block_mb": None,
        "model": "tasks",  # fused with reading and writing; or actors
        "model_rows": None,
        "model_cpus": 1.0,
        "write_cpus": 1.0,
    },
    "small_files": {
        "reader": "v1",
        "blocks": None,
        "block_mb": None,
        "rows": None,
        "format": "numpy",
        "write_cpus": 1.0,
        "file_rows": None,
    },
}
# What else each knob is tried at, in this order; the best so far stays.
SEARCH: dict[str, list[tuple[str, list[Any]]]] = {
    "images": [
        ("reader", ["v2", "v2, 1 footer actor"]),
        ("decode_rows", [256]),
        ("write_cpus", [0.1]),
        ("blocks", [8]),
        ("device_in_flight", [2]),
        ("block_mb", [16]),
        ("decode", ["actors"]),
        ("format", ["numpy"]),
    ],
    "tabular": [
        ("reader", ["v2", "v2, 1 footer actor"]),
        ("blocks", [2, 16]),
        ("model", ["actors"]),
        ("model_rows", [8192]),
        ("block_mb", [32]),
        ("write_cpus", [0.25]),
    ],
    "small_files": [
        ("reader", ["v2", "v2, 1 footer actor"]),
        ("blocks", [2, 16]),
        ("format", ["pyarrow"]),
        ("file_rows", [10_000]),
        ("write_cpus", [0.5]),
    ],
}


class DeviceStage:
    def __init__(self, rate: float, log: str) -> None:
        self._device = w.Device(rate, log)

    def __call__(self, table: pa.Table) -> pa.Table:
        labels = self._device(_images(table["image"]))
        return table.drop_columns(["image"]).append_column("out", pa.array(labels))


class DeviceStageOfArrays:
    def __init__(self, rate: float, log: str) -> None:
        self._device = w.Device(rate, log)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        labels = self._device(batch.pop("image"))
        return {**batch, "out": labels}


def _images(column: pa.ChunkedArray) -> np.ndarray:
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


class ScoreStage:
    def __init__(self, model: str, log: str) -> None:
        self._score = w.Scorer(model, log)

    def __call__(self, table: pa.Table) -> pa.Table:
        scores = self._score({name: table[name].to_numpy() for name in w.FEATURES})
        return table.append_column("out", pa.array(scores))


_STAGES: dict[str, ScoreStage] = {}


def score_in_task(table: pa.Table, model: str, log: str) -> pa.Table:
    """A task that keeps its model in the process, so that it fuses with reading and writing."""
    if model not in _STAGES:
        _STAGES[model] = ScoreStage(model, log)
    return _STAGES[model](table)


def double_table(table: pa.Table, log: str) -> pa.Table:
    start = time.time()
    done = table.append_column("y", pa.array(table["x"].to_numpy() * 2.0))
    w.calls("double", log).note(start, table.num_rows)
    return done


def build(ray: Any, job: dict[str, Any]) -> Any:
    """The dataset, not yet run."""
    from ray.data import ActorPoolStrategy, DataContext

    knobs, log = job["knobs"], job["log"]
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = knobs["reader"] != "v1"
    if knobs["block_mb"] is not None:
        context.target_max_block_size = knobs["block_mb"] << 20
    ds = ray.data.read_parquet(f"{job['data']}/in", override_num_blocks=knobs["blocks"])
    if job["workload"] == "images":
        if knobs["reserve"] is not None:
            context.op_resource_reservation_ratio = knobs["reserve"]
        arrays = knobs["format"] == "numpy"
        cpus = int(ray.cluster_resources()["CPU"])
        many = {"compute": ActorPoolStrategy(size=cpus)} if knobs["decode"] == "actors" else {}
        decode = w.decode_arrays if arrays else w.decode
        if many:  # a pool takes classes; it must leave CPUs to reading
            decode = _class_of(decode)
            knobs = {**knobs, "decode_cpus": min(knobs["decode_cpus"], 0.5)}
        ds = ds.map_batches(
            decode,
            fn_args=(log,),
            batch_size=knobs["decode_rows"],
            batch_format=knobs["format"],
            num_cpus=knobs["decode_cpus"],
            **many,
        )
        pool = ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=knobs["device_in_flight"])
        return ds.map_batches(
            DeviceStageOfArrays if arrays else DeviceStage,
            fn_constructor_args=(job["rate"], log),
            batch_size=knobs["device_rows"],
            batch_format=knobs["format"],
            compute=pool,
            num_cpus=0,
            resources={"sim": 1},
        )
    if job["workload"] == "tabular":
        model = f"{job['data']}/model.ubj"
        shared = {"batch_size": knobs["model_rows"], "batch_format": "pyarrow", "num_cpus": knobs["model_cpus"]}
        if knobs["model"] == "actors":
            size = int(ray.cluster_resources()["CPU"])
            pool = ActorPoolStrategy(size=size)
            shared["num_cpus"] = min(knobs["model_cpus"], 0.5)  # else reading would never get a CPU
            return ds.map_batches(ScoreStage, fn_constructor_args=(model, log), compute=pool, **shared)
        return ds.map_batches(score_in_task, fn_args=(model, log), **shared)
    function = w.double if knobs["format"] == "numpy" else double_table
    return ds.map_batches(function, fn_args=(log,), batch_size=knobs["rows"], batch_format=knobs["format"])


def _class_of(function: Any) -> Any:
    class Stage:
        def __call__(self, batch: Any, log: str) -> Any:
            return function(batch, log)

    return Stage


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["knobs"]["reader"] == "v2, 1 footer actor":
        os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    import ray

    ray.init(address=job["address"], logging_level="error", log_to_driver=False)
    import ray.data

    connected = time.time()
    ds = build(ray, job)
    told: dict[str, Any] = {"connected": connected, "called": time.time()}
    if job["mode"] == "first":
        batches = iter(ds.iter_batches(batch_size=job["first_rows"], batch_format=job["knobs"].get("format", "pyarrow")))
        next(batches)
        told["first"] = time.time()
        del batches
    else:
        more = {"min_rows_per_file": job["knobs"]["file_rows"]} if job["knobs"].get("file_rows") else {}
        ds.write_parquet(job["out"], ray_remote_args={"num_cpus": job["knobs"]["write_cpus"]}, **more)
    told["finished"] = time.time()
    print("TOLD " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
