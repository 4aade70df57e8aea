"""Readers: where a Dataset starts. Paths are local or s3://; a file, a directory, a glob, or a list of those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from headrace.api.dataset import Dataset, from_source
from headrace.core.errors import PlanError
from headrace.core.extras import require

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


def read_parquet(
    paths: Paths,
    *,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    hive_partitioning: bool = False,
) -> Dataset:
    """Rows of Parquet files. columns: read only these (the engine also leaves out what nothing later needs).

    schema: columns and types that all files are brought to, by safe casts; a column that a file lacks is null there, one that
    the schema lacks is not read, and all may hold nulls. Otherwise the footers of some files tell (the first, the last and some
    between them: 16, of a remote store 8): a column has the wider of its types, and is null in files without it if some of
    these lack it. Types that have nothing in common are a PlanError where their column is read; any other file that does not go
    into the schema is a DataError when it is read.

    hive_partitioning: folders below `paths` that are called "year=2020" make a column: int64 where the values of the first
    1,000 files are whole numbers, else string; `schema` may say otherwise. A column of that name in a file goes before. Of
    files that a filter on such columns rules out only the footer is read.
    """
    from headrace.connectors.sources.parquet import ParquetSource

    dataset = from_source(ParquetSource(paths, schema=schema, hive_partitioning=hive_partitioning))
    return dataset if columns is None else dataset.select(list(columns))


def read_csv(
    paths: Paths,
    *,
    delimiter: str = ",",
    newlines_in_values: bool = False,
    column_types: Mapping[str, pa.DataType] | None = None,
) -> Dataset:
    """Rows of CSV files with a header line, plain or compressed (.gz, .bz2, .zst). Types are inferred from the start of the
    first file and hold for all; column_types fixes those of some columns: {"zip": pa.string()}.
    """
    from headrace.connectors.sources.csv import CsvSource

    return from_source(CsvSource(paths, delimiter=delimiter, newlines_in_values=newlines_in_values, column_types=column_types))


def read_json(paths: Paths, *, schema: pa.Schema | None = None) -> Dataset:
    """Rows of JSON lines files (an object a line), plain or compressed. schema: columns and types; otherwise they are inferred
    from the start of the first file.
    """
    from headrace.connectors.sources.json import JsonSource

    return from_source(JsonSource(paths, schema=schema))


def read_text(paths: Paths) -> Dataset:
    """A row for each line, in column "text"."""
    from headrace.connectors.sources.text import TextSource

    return from_source(TextSource(paths))


def read_images(paths: Paths) -> Dataset:
    """A row for each image file: columns "bytes" (binary) and "path". Decode with `hr.images.decode("bytes")`."""
    from headrace.connectors.sources.images import ImageSource

    return from_source(ImageSource(paths))


def from_arrow(table: pa.Table | pa.RecordBatch) -> Dataset:
    """Rows of an Arrow table in memory."""
    from headrace.connectors.sources.memory import ArrowSource

    return from_source(ArrowSource(table))


def from_ray_dataset(dataset: Any) -> Dataset:
    """The rows of a `ray.data.Dataset`, which is executed now; runs over it are on its cluster (engine="ray")."""
    require("ray", "from_ray_dataset")
    from headrace.substrates.ray.tables import from_ray_dataset as source

    return from_source(source(dataset))


def from_pandas(frame: pd.DataFrame) -> Dataset:
    """Rows of a pandas frame; of its index, levels that have a name."""
    import pyarrow as pa

    from headrace.worker.results import with_index

    return from_arrow(pa.Table.from_pandas(with_index(frame), preserve_index=False))


def from_items(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Rows given as dicts of Python values, NumPy arrays or tensors. A key that some of them lack is null there.

    Columns are made as those of `map` are. Raises PlanError for values that don't make a column.
    """
    import pyarrow as pa

    from headrace.worker.python_values import values_column
    from headrace.worker.refused import Refused

    items = list(rows)
    for row in items:
        if not isinstance(row, Mapping):
            raise PlanError(
                f"from_items was given a row of type {type(row).__name__}",
                hint='give dicts of column names and values: {"x": 1}',
            )
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for row in items for name in row):
        if not isinstance(name, str):
            raise PlanError(f"from_items was given column {name!r}", hint="names of columns are texts")
        try:
            columns[name] = values_column([row.get(name) for row in items])
        except Refused as exc:
            raise PlanError(f"from_items was given column {name!r}, {exc}", hint=exc.hint) from None
    return from_arrow(pa.table(columns) if columns or not items else pa.table({"_": pa.nulls(len(items))}).select([]))


def range(rows: int) -> Dataset:
    """Rows 0..rows-1 in the int64 column "id"."""
    from headrace.connectors.sources.memory import RangeSource

    return from_source(RangeSource(rows))
