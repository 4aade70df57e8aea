"""CSV output: flat columns only, a header line in every file."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from headrace.connectors.sinks.files import Encoder, FileSink
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


class _CsvEncoder:
    def __init__(self, path: str, schema: pa.Schema) -> None:
        import pyarrow.csv as pc

        self._schema = pa.schema([f.with_type(_plain(f.type)) for f in schema])
        if len(schema):
            self._writer: Any = pc.CSVWriter(path, self._schema)
        else:  # no column was ever known: an empty file
            self._writer = open(path, "wb")  # noqa: SIM115

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch.cast(self._schema) if batch.schema != self._schema else batch)

    def close(self) -> None:
        self._writer.close()


def _plain(t: pa.DataType) -> pa.DataType:
    return t.value_type if pa.types.is_dictionary(t) else t
