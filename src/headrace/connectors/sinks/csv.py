"""CSV output: flat columns only, a header line in every file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from headrace.connectors.sinks.files import SMALL_BYTES, Encoder, FileSink, Written, written
from headrace.core.errors import PlanError


class CsvSink(FileSink):
    """CSV files. Nested, tensor and binary columns are refused: CSV has no way to write them that reads back."""

    name = "csv"
    extension = ".csv"

    def _written_schema(self, path: str) -> pa.Schema:
        from headrace.connectors.sources.csv import CsvSource

        return CsvSource(path).schema()

    def _encoder(self, path: str, schema: pa.Schema, sample: pa.RecordBatch | None) -> Encoder:
        return _CsvEncoder(path, schema)

    def _refuse(self, schema: pa.Schema) -> None:
        for f in schema:
            t = _plain(f.type)
            binary = pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_fixed_size_binary(t)
            if binary or pa.types.is_nested(t) or isinstance(t, pa.BaseExtensionType):
                hint = f"drop({f.name!r}), or write Parquet (or JSON lines)"
                raise PlanError(f"CSV can't hold column {f.name!r} of type {f.type}", where=(("column", f.name),), hint=hint)

    def _read_again(self, path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        import pyarrow.csv as pc

        types = {f.name: _plain(f.type) for f in schema}
        as_written = pc.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        with pc.open_csv(path, parse_options=pc.ParseOptions(newlines_in_values=True), convert_options=as_written) as file:
            yield from file


class _CsvEncoder:
    """A small file is encoded in memory and written at once; a larger one as its rows come."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._schema = pa.schema([f.with_type(_plain(f.type)) for f in schema])
        self._path = path
        self._held: list[pa.RecordBatch] = []
        self._bytes = 0
        self._writer: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        batch = batch.cast(self._schema) if batch.schema != self._schema else batch
        if self._writer is not None:
            self._writer.write_batch(batch)
            return
        self._held.append(batch)
        self._bytes += batch.nbytes
        if self._bytes > SMALL_BYTES:
            self._flush(self._path)

    def close(self) -> Written | None:
        if self._writer is not None:
            self._writer.close()
            return None
        if not len(self._schema):  # no column was ever known: an empty file
            return written(self._path, b"")
        memory = pa.BufferOutputStream()
        self._flush(memory).close()
        return written(self._path, memory.getvalue())

    def _flush(self, to: Any) -> Any:
        import pyarrow.csv as pc

        self._writer = pc.CSVWriter(to, self._schema)
        for batch in self._held:
            self._writer.write_batch(batch)
        self._held = []
        return self._writer


def _plain(t: pa.DataType) -> pa.DataType:
    return t.value_type if pa.types.is_dictionary(t) else t
