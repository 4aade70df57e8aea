"""Parquet output: encodings chosen per column from the first rows, memory bounded by one row group.

Figures behind the choices (one core of a 2-core machine): dictionary on floats 0.13 GB/s, off 0.28 and smaller; JPEG
bytes don't compress at all, so trying costs time for nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa

from headrace.connectors.blocks import concat, no_columns
from headrace.connectors.run_store import quietly
from headrace.connectors.sinks.files import Encoder, FileSink, Part, Written, cant_hold, close_broken, holds_intervals, written
from headrace.contracts.sink import CarryingWriter
from headrace.contracts.source import Source
from headrace.core.carried import Carried
from headrace.core.errors import InternalError
from headrace.core.options import Outputs
from headrace.core.schemas import bring
from headrace.core.splits import Split

Compression = Literal["auto", "zstd", "snappy", "none"]

# Rows are kept until they fill a row group, then encoded column by column: 32 MiB keeps that memory small and is still
# enough for a reader to skip and divide by.
GROUP_BYTES = 32 << 20
GROUP_ROWS = 1 << 20
PAGE_BYTES = 1 << 20
SAMPLE_ROWS = 16_384  # of fewer, a few thousand distinct values look like no repetition at all
TINY_BYTES = 256 << 10  # below this zstd's set-up (0.1 ms a file) costs more than it saves
WIDE_BYTES = 1024  # values from here on are documents or images, never worth a dictionary
DICTIONARY_SHARE = 0.3  # distinct values in the sample, below which a dictionary is smaller than plain values
INCOMPRESSIBLE = 0.95


class ParquetSink(FileSink):
    """compression: "auto" picks zstd (snappy for tiny files) and leaves columns that don't shrink as they are."""

    name = "parquet"
    extension = ".parquet"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        outputs: Outputs = "packed",
        fresh: bool = False,
        compression: Compression = "auto",
    ) -> None:
        super().__init__(path, outputs=outputs, fresh=fresh)
        self.compression: Compression = compression
        self._tiny: tuple[pa.Schema, dict[str, Any]] | None = None

    def carries(self, source: Source, columns: Sequence[str]) -> frozenset[str]:
        from headrace.connectors.sinks.parquet_copy import copyable_columns
        from headrace.connectors.sources.parquet import ParquetSource

        return copyable_columns(source, columns, self.compression) if isinstance(source, ParquetSource) else frozenset()

    def open_carrying(self, split: Split, attempt: int, carried: Carried, source: Source) -> CarryingWriter:
        from headrace.connectors.sinks.parquet_copy import CarryingSplitWriter, GivenBackWriter
        from headrace.connectors.sources.parquet import ParquetSource

        if not isinstance(source, ParquetSource):
            raise InternalError(f"columns can't be carried from {source.name}")
        writer = CarryingSplitWriter if carried.names is not None else GivenBackWriter
        return writer(self, split, attempt, carried, source)

    def _refuse(self, schema: pa.Schema) -> None:
        for f in schema:
            if holds_intervals(f.type):
                raise cant_hold("Parquet", f, "JSON lines")

    def _holds(self, field: pa.Field) -> bool:
        import pyarrow.parquet as pq

        try:
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except (pa.ArrowException, OSError):  # of a struct without fields, an interval, a union, binary of no bytes, ...
            return False
        return True

    def _written_schema(self, path: str) -> pa.Schema:
        from headrace.connectors.sources.parquet import ParquetSource

        return ParquetSource(path).schema()

    def _encoder(self, path: str, schema: pa.Schema, sample: pa.RecordBatch | None) -> Encoder:
        return ParquetEncoder(path, schema, functools.partial(self.encodings, schema))

    def _join(self, parts: Sequence[Part], path: str, schema: pa.Schema) -> tuple[int, Written | None]:
        encoder = self._encoder(path, schema, None)
        rows = 0
        try:
            for part in parts:
                for batch in _batches_of(part):
                    encoder.write(bring(batch, schema))
                    rows += batch.num_rows
                os.unlink(part.path)
            return rows, encoder.close()
        except BaseException:
            quietly(close_broken, encoder)
            raise

    def encodings(self, schema: pa.Schema, rows: Sequence[pa.RecordBatch]) -> dict[str, Any]:
        """Arguments for the writer. rows: of the file's first row group. Those of tiny files depend on the schema alone and are
        kept for the next one.
        """
        tiny = bool(rows) and sum(batch.nbytes for batch in rows) < TINY_BYTES
        if tiny and self._tiny is not None and self._tiny[0].equals(schema):
            return self._tiny[1]
        made = _encodings(schema, _head(rows), self.compression, tiny)
        if tiny:
            self._tiny = schema, made
        return made


def _batches_of(part: Part) -> Iterator[pa.RecordBatch]:
    if not len(part.schema):  # Parquet's reader gives no batch without columns
        yield no_columns(part.rows)
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.path) as file:
        yield from file.iter_batches()


class ParquetEncoder:
    """A file of at most TINY_BYTES is encoded in memory and written at once; a larger one as its row groups fill.

    settings: the writer's arguments for a file of such rows.
    """

    def __init__(self, path: str, schema: pa.Schema, settings: Callable[[Sequence[pa.RecordBatch]], dict[str, Any]]) -> None:
        self._schema = schema
        self._path = path
        self._held: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0
        self._memory: pa.BufferOutputStream | None = None
        self._settings = settings
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        at = 0
        row_bytes = max(1.0, batch.nbytes / max(1, batch.num_rows))
        while at < batch.num_rows:  # a block larger than a row group makes several
            room = min(int((GROUP_BYTES - self._bytes) / row_bytes), GROUP_ROWS - self._rows)
            part = batch.slice(at, max(1, room))
            self._held.append(part)
            self._rows += part.num_rows
            self._bytes += int(part.num_rows * row_bytes)
            at += part.num_rows
            if self._bytes + row_bytes > GROUP_BYTES or self._rows >= GROUP_ROWS:
                self._flush()

    def close(self) -> Written | None:
        if self._writer is None and self._bytes <= TINY_BYTES:
            self._memory = pa.BufferOutputStream()  # a small file is one write
        try:
            self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()
        return None if self._memory is None else written(self._path, self._memory.getvalue())

    def _flush(self) -> None:
        if self._writer is None:
            import pyarrow.parquet as pq

            self._writer = pq.ParquetWriter(self._memory or self._path, self._schema, **self._settings(self._held))
        if self._held:
            table = pa.Table.from_batches(self._held, self._schema)
            self._held, self._rows, self._bytes = [], 0, 0
            self._writer.write_table(table, row_group_size=GROUP_ROWS)


def _head(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch | None:
    """The first rows, SAMPLE_ROWS at most. None: there are none."""
    taken: list[pa.RecordBatch] = []
    left = SAMPLE_ROWS
    for batch in batches:
        taken.append(batch.slice(0, left))
        left -= taken[-1].num_rows
        if left <= 0:
            break
    return concat(taken) if taken else None


def _encodings(schema: pa.Schema, head: pa.RecordBatch | None, compression: Compression, tiny: bool) -> dict[str, Any]:
    """Arguments for the writer. head: some of the rows; None where there is no row."""
    tiny = tiny or head is None
    codec = ("snappy" if tiny else "zstd") if compression == "auto" else compression
    level = {"compression_level": 1} if codec == "zstd" else {}
    if head is None:
        return {"compression": codec, "use_dictionary": False}
    dictionary: list[str] = []
    stubborn: set[str] = set()
    widest = 1.0
    for f, column in zip(schema, head.columns, strict=True):
        width = column.nbytes / max(1, len(column))
        widest = max(widest, width)
        if _worth_dictionary(f.type, column, width, tiny):
            dictionary.append(f.name)
        elif not tiny and compression == "auto" and width >= WIDE_BYTES and not _shrinks(column):
            stubborn.add(f.name)
    out: dict[str, Any] = {"use_dictionary": dictionary or False, "compression": codec, **level}
    if stubborn:
        per_leaf = {leaf: "none" if f.name in stubborn else codec for f in schema for leaf in _leaf_paths(f.name, f.type)}
        out["compression"] = per_leaf
        if level:
            out["compression_level"] = {leaf: 1 for leaf, c in per_leaf.items() if c == "zstd"}
    if not tiny and widest > PAGE_BYTES / 1024:  # pages are closed between write batches of 1,024 values: smaller for wide ones
        out["write_batch_size"] = max(1, int(PAGE_BYTES / widest))
    return out


def _worth_dictionary(t: pa.DataType, column: pa.Array, width: float, tiny: bool) -> bool:
    kinds = pa.types
    text = kinds.is_string(t) or kinds.is_large_string(t) or kinds.is_binary(t) or kinds.is_large_binary(t)
    if kinds.is_dictionary(t):
        return True
    if width >= WIDE_BYTES or not (text or kinds.is_integer(t) or kinds.is_temporal(t)):
        return False
    if tiny:
        return text  # counting distinct values costs more than it could save
    import pyarrow.compute

    compute: Any = pyarrow.compute
    return compute.count_distinct(column).as_py() <= DICTIONARY_SHARE * len(column)


def _shrinks(column: pa.Array) -> bool:
    """Does a quick codec make the column's data smaller? Tried on at most 256 KiB from its middle."""
    buffers = [b for b in column.slice(len(column) // 2, 1).buffers() if b is not None]
    if not buffers:
        return True
    data = max(buffers, key=lambda b: b.size)
    data = data.slice(data.size // 2, min(256 << 10, data.size - data.size // 2))
    if data.size == 0:
        return True
    return len(pa.compress(data, codec="lz4", asbytes=True)) < INCOMPRESSIBLE * data.size


def _leaf_paths(path: str, t: pa.DataType) -> Iterator[str]:
    """Parquet's names of the leaf columns under an Arrow field."""
    if isinstance(t, pa.BaseExtensionType):
        t = t.storage_type
    if pa.types.is_struct(t):
        for i in range(t.num_fields):
            yield from _leaf_paths(f"{path}.{t.field(i).name}", t.field(i).type)
    elif pa.types.is_map(t):
        yield from _leaf_paths(f"{path}.key_value.key", t.key_type)
        yield from _leaf_paths(f"{path}.key_value.value", t.item_type)
    elif pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t):
        yield from _leaf_paths(f"{path}.list.element", t.value_type)
    else:
        yield path
