"""A step on an Arrow table: what peers share that keep rows in Arrow. Tensors are `fixed_shape_tensor` columns.

Nothing here decides about batches, processes or files: that is each peer's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.contract import Column, Expand, Loaded, Map, Pipeline, Step


def numpy_of(column: Any) -> Any:
    """The array that a step gets for a column: (rows, *shape) for tensors, without a copy where there is one chunk."""
    import numpy as np
    import pyarrow as pa

    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if isinstance(column.type, pa.FixedShapeTensorType):
        arrays = [chunk.to_numpy_ndarray() for chunk in chunks]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if isinstance(column, pa.ChunkedArray):
        return column.to_numpy()
    return column.to_numpy(zero_copy_only=False)


def arrow_of(values: Any, column: Column) -> Any:
    import numpy as np
    import pyarrow as pa

    if not column.shape:
        return pa.array(values, pa.string() if column.dtype == "string" else pa.from_numpy_dtype(np.dtype(column.dtype)))
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def apply(step: Step, table: Any, models: Mapping[str, Loaded]) -> Any:
    """The table after the step: made columns appended (or put where one of that name was), dropped ones gone."""
    import pyarrow as pa

    given = {name: numpy_of(table[name]) for name in step.reads}
    if isinstance(step, Expand):
        made, parents = step(given)
        table = without(table, step.drops).take(pa.array(parents))
    else:
        made = step(given) if isinstance(step, Map) else models[step.name](given)
        table = without(table, step.drops)
    for name, column in step.writes.items():
        if name not in step.drops:
            at, values = table.schema.get_field_index(name), arrow_of(made[name], column)
            table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    return table


def without(table: Any, names: Sequence[str]) -> Any:
    return table.drop_columns([name for name in names if name in table.column_names])


def batches(table: Any, rows: int | None) -> list[Any]:
    """Its slices of at most `rows` rows; None: itself."""
    if rows is None or table.num_rows <= rows:
        return [table]
    return [table.slice(at, rows) for at in range(0, table.num_rows, rows)]


def plain(table: Any) -> Any:
    """Tensor columns as fixed-size lists: for engines without extension types."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if isinstance(field.type, pa.FixedShapeTensorType):
            chunks = [chunk.storage for chunk in table.column(i).chunks]
            table = table.set_column(i, field.name, pa.chunked_array(chunks, field.type.storage_type))
    return table


def files_of(source: str) -> list[str]:
    """The Parquet files of a folder or an s3:// prefix, sorted."""
    if not source.startswith("s3://"):
        return sorted(str(path) for path in Path(source).glob("*.parquet"))
    from pyarrow import fs

    system, folder = fs.FileSystem.from_uri(source)
    return sorted(f"s3://{i.path}" for i in system.get_file_info(fs.FileSelector(folder)) if i.path.endswith(".parquet"))


def opened(path: str) -> Any:
    """What pyarrow's ParquetFile takes."""
    if not path.startswith("s3://"):
        return path
    from pyarrow import fs

    system, key = fs.FileSystem.from_uri(path)
    return system.open_input_file(key)


def metrics_of(pipeline: Pipeline, out: str) -> dict[str, float]:
    """From the columns that were written: for engines that have no such metrics, or only slower ones."""
    import pyarrow.dataset

    if not pipeline.metrics:
        return {}
    names = sorted({name for pair in pipeline.metrics.values() for name in pair})
    table = pyarrow.dataset.dataset(out, format="parquet", exclude_invalid_files=False).to_table(columns=names)
    return metrics(pipeline, {name: numpy_of(table[name]) for name in names})


def metrics(pipeline: Pipeline, columns: Mapping[str, Any]) -> dict[str, float]:
    """By scikit-learn."""
    import numpy as np
    from sklearn.metrics import log_loss, roc_auc_score

    functions = {"auc": roc_auc_score, "logloss": log_loss}
    return {
        name: float(functions[name](columns[label], columns[score].astype(np.float64)))
        for name, (score, label) in pipeline.metrics.items()
    }


def out_of(job_out: str, pipelines: Sequence[Pipeline], pipeline: Pipeline) -> str:
    """As Job.out_of, which makes all pipelines anew each time."""
    return job_out if len(pipelines) == 1 else f"{job_out}/{pipeline.name}"
