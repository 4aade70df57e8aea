"""CSV output: flat columns only, a header line in every file. Floats have a point or an exponent (1.0, 1e+20)."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa

from headrace.connectors.sinks.decimals import decimals, has_whole
from headrace.connectors.sinks.files import (
    SMALL_BYTES,
    Encoder,
    FileSink,
    Part,
    Written,
    cant_hold,
    holds_intervals,
    written,
)
from headrace.core.tensors import numpy_to_array, text_scalar

JOIN_BYTES = 1 << 20  # text held at once while files are joined
STEP_ROWS = 1 << 16  # encoded at a time: columns of text take several times the memory of their file
NULL_ROW = b'""\n'  # where there is but one column: readers pass over blank lines


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
            if holds_intervals(f.type):
                raise cant_hold("CSV", f, "JSON lines")
            if binary or pa.types.is_nested(t) or isinstance(t, pa.BaseExtensionType):
                raise cant_hold("CSV", f, "Parquet (or JSON lines)")

    def _joins_alone(self, schema: pa.Schema) -> bool:
        return len(schema) == 1  # its nulls are blank lines

    def _join(self, parts: Sequence[Part], path: str, schema: pa.Schema) -> tuple[int, Written]:
        """Each value keeps the very text it was written with: rows get commas for the columns that they lack, quotes where they
        are blank, and nothing is parsed.
        """
        rows, size = 0, 0
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for count, text in itertools.chain(((0, _header(schema)),), *(_padded(part, len(schema)) for part in parts)):
                file.write(text)
                digest.update(text)
                rows, size = rows + count, size + len(text)
        return rows, Written(size, digest.hexdigest())


def _header(schema: pa.Schema) -> memoryview:
    import pyarrow.csv as pc

    memory = pa.BufferOutputStream()
    pc.CSVWriter(memory, pa.schema([f.with_type(pa.null()) for f in schema])).close()
    return memoryview(memory.getvalue())


def _padded(part: Part, width: int) -> Iterator[tuple[int, memoryview]]:
    """The rows of a file, with nulls to be `width` columns: (rows ended in it, text). Then the file is removed."""
    missing = width - len(part.schema)
    if len(part.schema):
        yield from _with_commas(part.path, missing) if width > 1 else _with_quotes(part.path)
    else:  # the file is empty, however many rows there were
        step = max(1, JOIN_BYTES // width)
        row = b"," * (missing - 1) + b"\n" if missing > 1 else NULL_ROW
        for at in range(0, part.rows, step):
            count = min(step, part.rows - at)
            yield count, memoryview(row * count)
    os.unlink(part.path)


def _with_commas(path: str, missing: int) -> Iterator[tuple[int, memoryview]]:
    """The rows of a CSV file without its header, and with commas at their ends: (rows ended in it, text)."""
    for data, ends in _rows(path):
        padded = np.insert(data, np.repeat(ends, missing), ord(",")) if missing else data
        yield len(ends), padded.data


def _with_quotes(path: str) -> Iterator[tuple[int, memoryview]]:
    """The same of a single column: rows that are blank become NULL_ROW."""
    last = -1  # where the row before ended, seen from this piece
    for data, ends in _rows(path):
        blank = ends[np.diff(ends, prepend=last) == 1]
        last = (int(ends[-1]) if len(ends) else last) - len(data)
        quoted = np.insert(data, np.repeat(blank, 2), ord('"')) if len(blank) else data
        yield len(ends), quoted.data


def _rows(path: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bytes of a CSV file without its header, in pieces, and where rows end in each.

    A row ends with a line break after an even number of quotes: quotes in a value are written twice, and the value in quotes.
    """
    quotes_before = 0
    in_header = True
    with open(path, "rb") as file:
        while chunk := file.read(JOIN_BYTES):
            data = np.frombuffer(chunk, np.uint8)
            breaks, quotes = np.flatnonzero(data == ord("\n")), np.flatnonzero(data == ord('"'))
            ends = breaks[(quotes_before + np.searchsorted(quotes, breaks)) % 2 == 0]
            quotes_before += len(quotes)
            if in_header:
                if not len(ends):
                    continue
                start = ends[0] + 1
                data, ends, in_header = data[start:], ends[1:] - start, False
            yield data, ends


class _CsvEncoder:
    """A small file is kept in memory and written at once; a larger one goes out as it comes, hashed on the way."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._schema = pa.schema([f.with_type(_plain(f.type)) for f in schema])
        self._path = path
        self._held: list[memoryview] = []
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None
        if len(schema):  # otherwise no column was ever known: an empty file
            self._hold(_header(self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        batch = batch.cast(self._schema) if batch.schema != self._schema else batch
        for at in range(0, batch.num_rows if len(self._schema) else 0, STEP_ROWS):
            self._hold(_encoded(batch.slice(at, STEP_ROWS)))
            if self._bytes > SMALL_BYTES:
                self._flush()

    def close(self) -> Written | None:
        if self._file is None:
            return written(self._path, b"".join(self._held))
        self._flush()
        self._file.close()
        return Written(self._bytes, self._digest.hexdigest())

    def _hold(self, text: memoryview) -> None:
        self._held.append(text)
        self._bytes += len(text)
        self._digest.update(text)

    def _flush(self) -> None:
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115  closed by close()
        for text in self._held:
            self._file.write(text)
        self._held = []


def _encoded(batch: pa.RecordBatch) -> memoryview:
    """The rows as CSV. Arrow's writer does it in less time, but writes 1.0 as "1", which reads back as a whole number."""
    import pyarrow.csv

    if any(has_whole(c) for c in batch.columns):
        return _joined(batch)
    memory = pa.BufferOutputStream()
    with pyarrow.csv.CSVWriter(memory, batch.schema, write_options=pyarrow.csv.WriteOptions(include_header=False)) as writer:
        writer.write_batch(batch)
    return memoryview(memory.getvalue())


def _joined(batch: pa.RecordBatch) -> memoryview:
    """The same text as Arrow's, but for floats."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at import, type checkers don't see them
    comma, line_end = text_scalar(","), text_scalar("\n")
    texts = [_texts(pc, column) for column in batch.columns]
    rows = pc.binary_join_element_wise(*texts, comma, null_handling="replace", null_replacement="")
    (file,) = pc.binary_join(pa.LargeListArray.from_arrays(numpy_to_array(np.array([0, len(rows)], np.int64)), rows), line_end)
    return memoryview(file.as_buffer().to_pybytes() + b"\n")


def _texts(pc: Any, column: pa.Array) -> pa.Array:
    """Each value as it stands in the file (large_string); null stays null."""
    if pa.types.is_floating(column.type):
        return decimals(column)
    text = column.cast(pa.large_string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type)):
        return text
    quote = text_scalar('"')
    if pc.any(pc.match_substring(text, '"')).as_py():
        text = pc.replace_substring(text, '"', '""')
    return pc.binary_join_element_wise(quote, text, quote, text_scalar(""))


def _plain(t: pa.DataType) -> pa.DataType:
    return t.value_type if pa.types.is_dictionary(t) else t
