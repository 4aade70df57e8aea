"""PySpark on `local[cores]`.

    same       one job: every step in one Python function over Arrow batches, so that tensors never cross into the JVM. By a
               knob all columns pass through it (`mapInArrow`), or only those that it reads (`arrow_udf`, `predict_batch_udf`)
    two-jobs   preprocessing -> Parquet -> prediction, as it is done where the two run on different machines

Where each file is a job of its own (one output per input, many small jobs), files are the rows of an RDD: Spark's writers name
files as they like.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.contract import Column, Expand, Job, Loaded, Model, Peer, Pipeline, Step
from suite.peers.by_file import Piece, finish, load, pieces, process
from suite.peers.steps import apply, arrow_of, metrics_of, numpy_of

KNOBS = {
    "how": "mapInArrow",  # or "arrow_udf", or for one model on numbers "predict_batch_udf"
    "rows": None,  # spark.sql.execution.arrow.maxRecordsPerBatch; None: what the pipeline's steps ask for
    "read_rows": None,  # spark.sql.parquet.columnarReaderBatchSize; 4096
    "partition_mb": None,  # spark.sql.files.maxPartitionBytes; 128
    "open_cost_mb": None,  # spark.sql.files.openCostInBytes; 4
    "slots": None,  # of local[...]: tasks at once; None: one a core, and one for each device, as cores work while it computes
    "memory": "4g",  # spark.driver.memory
    "gc": "",  # options of the JVM
    "tasks": 4,  # per core, where files are jobs of their own
}


Search = list[tuple[str, Sequence[Any]]]


def _search(workload: str) -> Search:
    if workload == "many-jobs":
        return [("tasks", [1, 2, 16])]
    jvm: Search = [("gc", ["-XX:+UseParallelGC", "-XX:TieredStopAtLevel=1"])]
    if workload == "text-embedding":  # never more texts a call than others have to sort
        return [("how", ["arrow_udf", "predict_batch_udf"]), ("partition_mb", [8]), ("open_cost_mb", [0]), *jvm]
    if workload in ("tabular", "tiny-files", "big-file"):
        how: Search = [("how", ["mapInArrow", "predict_batch_udf"] if workload == "tabular" else ["arrow_udf"])]
        rows: Search = [("rows", [10_000, 50_000, 262_144]), ("read_rows", [16_384])]
        return [*how, *rows, ("partition_mb", [8, 32, 512]), ("open_cost_mb", [0, 1]), ("slots", [3]), *jvm, ("tasks", [1, 16])]
    return [
        ("read_rows", [64, 512]),
        ("how", ["arrow_udf"]),
        ("rows", [16, 256]),
        ("partition_mb", [8, 32, 512]),
        ("open_cost_mb", [0]),
        ("slots", [2, 4]),
        *jvm,
    ]


def _why_not(pipelines: Sequence[Pipeline], form: str, params: Mapping[str, Any]) -> str | None:
    if pipelines[0].source.startswith("s3://"):
        return "reads S3 with hadoop-aws, a Java package that does not come with pyspark"
    if form == "two-jobs" and (len(pipelines) > 1 or not _preprocessing(pipelines[0])):
        return "there is nothing to preprocess"
    if form == "two-jobs" and pipelines[0].per_input:
        return "its writers name files as they like"
    return None


def _preprocessing(pipeline: Pipeline) -> tuple[Step, ...]:
    """Steps before the first model; none where there is no model."""
    models = [i for i, step in enumerate(pipeline.steps) if isinstance(step, Model)]
    return pipeline.steps[: models[0]] if models else ()


def _needs() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return None if shutil.which("java") or (home and Path(home, "bin", "java").exists()) else "there is no Java on this machine"


PEER = Peer(
    "spark",
    "PySpark local[*]",
    forms={"same": "one job", "two-jobs": "a job that preprocesses to Parquet, a job that predicts"},
    environment="spark",
    why_not=_why_not,
    knobs=lambda workload: {**KNOBS, "how": "arrow_udf"} if workload == "tabular" else KNOBS,  # its carried columns are many
    search=_search,
    needs=_needs,
)


def run(job: Job) -> dict[str, Any]:
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    pipelines = job.pipelines
    spark = _session(job, pipelines)
    try:
        if len(pipelines) > 1 or pipelines[0].per_input:
            return _by_path(spark, job, pipelines)
        (pipeline,) = pipelines
        if job.form == "two-jobs":
            between = os.environ["SUITE_SCRATCH"] + "/preprocessed"
            before = _preprocessing(pipeline)
            made = [(name, column) for step in before for name, column in step.writes.items()]
            flat = {name: column for name, column in made if column.shape}
            _mapped(spark.read.parquet(pipeline.source), before, Flat(flat)).write.parquet(between)
            after = pipeline.steps[len(before) :]
            _mapped(spark.read.parquet(between), after, Flat({}), Flat(flat)).write.parquet(job.out)
        else:
            df = spark.read.parquet(pipeline.source)
            _one_job(df, pipeline, job.knobs["how"]).write.parquet(job.out)
        return {"metrics": metrics_of(pipeline, job.out)}
    finally:
        _end(spark)


def _session(job: Job, pipelines: Sequence[Pipeline]) -> Any:
    from pyspark.sql import SparkSession

    knobs = job.knobs
    scratch = os.environ["SUITE_SCRATCH"]
    rows = knobs["rows"] or min((step.rows for step in pipelines[0].steps), default=10_000)
    options = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        "spark.driver.memory": knobs["memory"],
        "spark.driver.extraJavaOptions": f"-Djava.io.tmpdir={scratch} {knobs['gc']}",
        "spark.local.dir": scratch,
        "spark.sql.warehouse.dir": f"{scratch}/warehouse",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.execution.arrow.maxRecordsPerBatch": rows,
        "spark.sql.parquet.columnarReaderBatchSize": knobs["read_rows"],
        "spark.sql.files.maxPartitionBytes": knobs["partition_mb"] and f"{knobs['partition_mb']}m",
        "spark.sql.files.openCostInBytes": None if knobs["open_cost_mb"] is None else f"{knobs['open_cost_mb']}m",
    }
    slots = knobs["slots"] or job.cores + sum(model.devices for model in pipelines[0].models if model.device)
    builder = SparkSession.builder.master(f"local[{slots}]").appName("suite")
    for name, value in options.items():
        if value is not None:
            builder = builder.config(name, value)
    return builder.getOrCreate()


def _end(spark: Any) -> None:
    """The JVM too, which else outlives us for a moment."""
    gateway = spark.sparkContext._gateway
    spark.stop()
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait()


# -- all columns pass through Python


class Flat:
    """Tensors as binary columns, which is what Spark stores and moves best: there are no tensors in it, nor unsigned bytes."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._columns = columns

    def flat(self, table: Any) -> Any:
        import pyarrow as pa

        for name in self._columns:
            if name in table.column_names:
                values = numpy_of(table[name])
                each = values.nbytes // max(1, len(values))
                offsets = pa.py_buffer((each * _range(len(values) + 1)).tobytes())
                column = pa.Array.from_buffers(pa.binary(), len(values), [None, offsets, pa.py_buffer(values)])
                table = table.set_column(table.schema.get_field_index(name), name, column)
        return table

    def deep(self, table: Any) -> Any:
        import numpy as np

        for name, column in self._columns.items():
            if name in table.column_names:
                flat = table[name].combine_chunks()
                flat = flat.chunk(0) if hasattr(flat, "chunks") else flat
                data = np.frombuffer(flat.buffers()[2], np.uint8)
                offsets = np.frombuffer(flat.buffers()[1], np.int32)[flat.offset : flat.offset + len(flat) + 1]
                values = data[offsets[0] : offsets[-1]].view(column.dtype).reshape(len(flat), *column.shape)
                table = table.set_column(table.schema.get_field_index(name), name, arrow_of(values, column))
        return table


def _range(count: int) -> Any:
    import numpy as np

    return np.arange(count, dtype=np.int32)


_MODELS: dict[str, Loaded] = {}  # of this Python worker, which Spark uses again


def _models(steps: Sequence[Step]) -> Mapping[str, Loaded]:
    for step in steps:
        if isinstance(step, Model) and step.name not in _MODELS:
            _MODELS[step.name] = step.load(1)
    return _MODELS


def _mapped(df: Any, steps: Sequence[Step], leaving: Flat, arriving: Flat | None = None) -> Any:
    """The steps on all columns, batch by batch."""
    schema = _schema_after(df.schema, steps, leaving)
    names = schema.names

    def function(parts: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        models = _models(steps)
        for part in parts:
            table = pa.Table.from_batches([part])
            if arriving is not None:
                table = arriving.deep(table)
            for step in steps:
                table = apply(step, table, models)
            yield from _lists(leaving.flat(table)).select(names).to_batches()

    return df.mapInArrow(function, schema)


def _schema_after(schema: Any, steps: Sequence[Step], leaving: Flat) -> Any:
    from pyspark.sql.types import BinaryType, StructField, StructType

    fields = {field.name: field for field in schema.fields}
    for step in steps:
        for name, column in step.writes.items():
            kind = BinaryType() if name in leaving._columns else _type(column)
            fields[name] = StructField(name, kind)
        fields = {name: field for name, field in fields.items() if name not in step.drops}
    return StructType(list(fields.values()))


def _type(column: Column) -> Any:
    from pyspark.sql import types as t

    kinds = {
        "string": t.StringType,
        "bool": t.BooleanType,
        "int8": t.ByteType,
        "uint8": t.ShortType,
        "int16": t.ShortType,
        "int32": t.IntegerType,
        "int64": t.LongType,
        "float32": t.FloatType,
        "float64": t.DoubleType,
    }
    kind = kinds[column.dtype]()
    return t.ArrayType(kind) if column.shape else kind


def _lists(table: Any) -> Any:
    """Tensor columns as lists, the only ones that Spark takes."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if isinstance(field.type, pa.FixedShapeTensorType):
            table = table.set_column(i, field.name, _as_list(table.column(i)))
    return table


def _as_list(column: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    values = numpy_of(column)
    each = values.size // max(1, len(values))
    return pa.ListArray.from_arrays(pa.array(_range(len(values) + 1) * each), pa.array(np.ascontiguousarray(values).ravel()))


# -- only what the steps read passes through Python


def _one_job(df: Any, pipeline: Pipeline, how: str) -> Any:
    steps = pipeline.steps
    if how == "mapInArrow" or any(isinstance(step, Expand) for step in steps):
        return _mapped(df, steps, Flat({}))
    from pyspark.sql.functions import col, struct

    reads, left = _reads_and_left(steps)
    (only, *more) = steps
    if how == "predict_batch_udf" and isinstance(only, Model) and not more:
        given = struct(*(col(name) for name in reads)) if len(reads) > 1 else col(reads[0])
        made = {only.output: _predict_batch_udf(only)(given)}
    else:
        together = _arrow_udf(steps, reads, left)(*(col(name) for name in reads))
        made = {name: together[name] for name in left} if len(left) > 1 else dict.fromkeys(left, together)
    dropped = {name for step in steps for name in step.drops}
    kept = [col(name) for name in df.columns if name not in dropped and name not in made]
    return df.select(*kept, *(column.alias(name) for name, column in made.items()))


def _reads_and_left(steps: Sequence[Step]) -> tuple[list[str], dict[str, Column]]:
    """Columns of the source that are read, and those that were made and are left in the end."""
    reads: list[str] = []
    made: set[str] = set()
    left: dict[str, Column] = {}
    for step in steps:
        reads += [name for name in step.reads if name not in made and name not in reads]
        made |= set(step.writes)
        left = {name: column for name, column in {**left, **step.writes}.items() if name not in step.drops}
    return reads, left


def _arrow_udf(steps: Sequence[Step], reads: Sequence[str], left: Mapping[str, Column]) -> Callable[..., Any]:
    import pyarrow as pa
    from pyspark.sql.functions import arrow_udf
    from pyspark.sql.types import StructField, StructType

    def function(parts: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        models = _models(steps)
        for part in parts:
            table = pa.table(dict(zip(reads, part if isinstance(part, tuple) else (part,), strict=True)))
            for step in steps:
                table = apply(step, table, models)
            arrays = [_whole(_lists(table.select([name])).column(0)) for name in left]
            yield arrays[0] if len(left) == 1 else pa.StructArray.from_arrays(arrays, list(left))

    if len(reads) == 1:
        function.__annotations__["parts"] = Iterator[pa.Array]
    else:
        function.__annotations__["parts"] = Iterator[tuple[pa.Array, ...]]
    function.__annotations__["return"] = Iterator[pa.Array]
    kinds = [StructField(name, _type(column)) for name, column in left.items()]
    return arrow_udf(function, kinds[0].dataType if len(kinds) == 1 else StructType(kinds))


def _whole(column: Any) -> Any:
    whole = column.combine_chunks()
    return whole.chunk(0) if hasattr(whole, "chunks") else whole


def _predict_batch_udf(model: Model) -> Callable[..., Any]:
    from pyspark.ml.functions import predict_batch_udf

    reads = model.reads

    def make() -> Callable[..., Any]:
        loaded = _models([model])[model.name]
        if isinstance(model.input, str):
            return lambda values: loaded.predict(values)
        if len(reads) == 1:
            return lambda values: loaded.predict({reads[0]: values})
        return lambda matrix: loaded.predict({name: matrix[:, i] for i, name in enumerate(reads)})

    return predict_batch_udf(make, return_type=_type(model.writes[model.output]), batch_size=model.rows)


# -- a path is a row


def _by_path(spark: Any, job: Job, pipelines: Sequence[Pipeline]) -> dict[str, Any]:
    todo = pieces(job, pipelines, job.cores)
    slices = min(len(todo), job.knobs["tasks"] * job.cores)
    rows = [(pipelines[piece.pipeline], piece) for piece in todo]
    return finish(pipelines, spark.sparkContext.parallelize(rows, slices).mapPartitions(_process).collect())


def _process(todo: Iterator[tuple[Pipeline, Piece]]) -> Iterator[Any]:
    name, models = None, {}
    for pipeline, piece in todo:
        if pipeline.name != name:
            name, models = pipeline.name, load(pipeline, 1)
        yield process(pipeline, piece, models)
