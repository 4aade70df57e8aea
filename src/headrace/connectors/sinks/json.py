"""JSON-lines output: one object a line, every column of every type.

Numbers, booleans and text are formatted column-wise in Arrow; other types value by value. Conventions: floats have a point or
an exponent (1.0, 1e+20), tensors are nested lists, timestamps, dates and times ISO 8601, binary base64, NaN and infinities null
(JSON has none), decimals strings.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from typing import IO, Any

import pyarrow as pa

from headrace.connectors.sinks.decimals import decimals
from headrace.connectors.sinks.files import SMALL_BYTES, Encoder, FileSink, Written, written
from headrace.core.tensors import text_scalar, texts_to_array


class JsonSink(FileSink):
    """JSON-lines files. Tensors become nested lists, timestamps ISO 8601 text, binary base64 text, NaN null."""

    name = "json"
    extension = ".jsonl"
    widens = True  # a key that earlier rows lack is null

    def _encoder(self, path: str, schema: pa.Schema, sample: pa.RecordBatch | None) -> Encoder:
        return _JsonEncoder(path)


class _JsonEncoder:
    """A small file is kept in memory and written at once; a larger one goes out as it comes, hashed on the way."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: list[bytes | memoryview] = []
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        lines = encode_lines(batch)
        self._bytes += len(lines)
        self._digest.update(lines)
        self._held.append(lines)
        if self._bytes > SMALL_BYTES:
            self._flush()

    def close(self) -> Written | None:
        if self._file is None:
            return written(self._path, b"".join(self._held))
        self._flush()
        self._file.close()
        return Written(self._bytes, self._digest.hexdigest())

    def _flush(self) -> None:
        if self._file is None:
            self._file = open(self._path, "wb")  # noqa: SIM115  closed by close()
        for lines in self._held:
            self._file.write(lines)
        self._held = []


def encode_lines(batch: pa.RecordBatch) -> bytes | memoryview:
    """The rows as JSON lines."""
    pc = _compute()

    if batch.num_columns == 0:
        return b"{}\n" * batch.num_rows
    parts: list[Any] = []
    for i, (name, column) in enumerate(zip(batch.schema.names, batch.columns, strict=True)):
        parts.append(text_scalar(("{" if i == 0 else ",") + json.dumps(name, ensure_ascii=False) + ":"))
        parts.append(pc.fill_null(_values(column), text_scalar("null")))
    parts.append(text_scalar("}\n"))
    lines = pc.binary_join_element_wise(*parts, text_scalar(""))
    offsets, data = lines.buffers()[1:]
    first, last = lines.offset, lines.offset + len(lines)
    spans = memoryview(offsets).cast("q")
    return memoryview(data)[spans[first] : spans[last]]


def _values(column: pa.Array) -> pa.Array:
    """Each value's JSON text (large_string); null stays null."""
    pc = _compute()

    t = column.type
    kinds = pa.types
    if kinds.is_dictionary(t):
        return _values(column.cast(t.value_type))
    if kinds.is_null(t):
        return pa.nulls(len(column), pa.large_string())
    if kinds.is_integer(t) or kinds.is_boolean(t):
        return column.cast(pa.large_string())
    if kinds.is_floating(t):
        column = column.cast(pa.float32()) if kinds.is_float16(t) else column
        return decimals(pc.if_else(pc.is_finite(column), column, pa.nulls(1, column.type)[0]))
    if kinds.is_string(t) or kinds.is_large_string(t) or kinds.is_string_view(t):
        text = column.cast(pa.large_string())
        if pc.any(pc.match_substring_regex(text, r'["\\\x00-\x1f]')).as_py():
            return texts_to_array([json.dumps(v, ensure_ascii=False) for v in text.to_pylist()], large=True)
        return _quoted(text)
    if kinds.is_timestamp(t):
        text = column.cast(pa.large_string())
        return _quoted(pc.replace_substring(text, " ", "T", max_replacements=1))
    if kinds.is_date(t) or kinds.is_time(t):
        return _quoted(column.cast(pa.large_string()))
    values = _python_values(column)
    text = [None if v is None else json.dumps(v, ensure_ascii=False, default=_other, allow_nan=False) for v in values]
    return pa.array(text, pa.large_string())


def _compute() -> Any:
    import pyarrow.compute

    return pyarrow.compute  # Any: its functions are made at import, type checkers don't see them


def _quoted(text: pa.Array) -> pa.Array:
    pc = _compute()

    quote = text_scalar('"')
    return pc.binary_join_element_wise(quote, text, quote, text_scalar(""))


def _python_values(column: pa.Array) -> list[Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        rows = column.to_numpy_ndarray().tolist() if len(column) else []
        if column.null_count:
            rows = [r if ok else None for r, ok in zip(rows, column.is_valid().to_pylist(), strict=True)]
        return [_finite(r) for r in rows]
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return [_finite(v) for v in column.to_pylist()]


def _finite(value: Any) -> Any:
    """NaN and infinities inside nested values become null; map entries become pairs."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def _other(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    return str(value)
