"""Sources without storage: an Arrow table in memory, and a range of numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

import pyarrow as pa

from headrace.connectors import packing
from headrace.connectors.blocks import Piece, no_columns, rechunk, shareable
from headrace.contracts.source import OnBad
from headrace.core.errors import PlanError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin, Segment
from headrace.core.schemas import decode, is_encoded
from headrace.core.splits import Division, Fragment, Split
from headrace.core.tensors import numpy_to_array

ARROW_SPLIT_BYTES = 16 << 20  # memory needs no reading: small splits balance better, and cost microseconds
RANGE_SPLIT_ROWS = 1 << 20
RANGE_ROW_BYTES = 8


class ArrowSource:
    """The rows of a pa.Table. It travels with the source to each worker process."""

    name = "arrow"
    remote = False
    _split_bytes = ARROW_SPLIT_BYTES

    def __init__(self, table: pa.Table, name: str = "arrow") -> None:
        self.name = name
        for i, field in enumerate(table.schema):
            if is_encoded(field.type):
                column = decode(table.column(i))
                table = table.set_column(i, field.with_type(column.type), column)
        self._table = table
        self._version = f"{table.num_rows}-{table.nbytes}"

    def schema(self) -> pa.Schema:
        return self._table.schema

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        rows, size = self._table.num_rows, self._table.nbytes
        parts = 1 if per_input else max(1, min(rows, -(-size // self._split_bytes)), -(-rows // packing.SPLIT_MAX_ROWS))
        for index in range(parts if rows else 0):
            start, stop = rows * index // parts, rows * (index + 1) // parts
            part = Fragment("table in memory", size, self._version, start, stop, stop - start, "table")
            yield Split(index, (part,), size // parts, stop - start)

    def divided(self, division: Division) -> Self:
        out = copy.copy(self)
        out._split_bytes = min(ARROW_SPLIT_BYTES, division.split_bytes)
        return out

    def row_bytes(self) -> float:
        return self._table.nbytes / max(1, self._table.num_rows)

    def project(self, columns: tuple[str, ...]) -> Self:
        for c in columns:
            if c not in self._table.schema.names:
                raise PlanError(f"column {c!r} is not in the input", hint=f"it has: {', '.join(self._table.schema.names)}")
        out = copy.copy(self)
        out._table = self._table.select(list(columns))  # _version stays: ids name the rows, not the columns
        return out

    def prune(self, predicate: Any) -> tuple[ArrowSource, bool]:
        return self, False

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        limits = shareable(limits, split.rows or 0, self._table.num_columns)
        yield from rechunk(self._pieces(split.fragments[0]), limits)

    def _pieces(self, f: Fragment) -> Iterator[Piece]:
        rows = f.stop - f.start
        if self._table.num_columns == 0:
            yield Piece(no_columns(rows), Origin((Segment(f.uri, f.start, rows),)), 1e-9)
            return
        at = f.start
        row_bytes = self._table.nbytes / max(1, self._table.num_rows)
        for batch in self._table.slice(f.start, rows).to_batches():
            yield Piece(batch, Origin((Segment(f.uri, at, batch.num_rows),)), row_bytes)
            at += batch.num_rows

    def count(self) -> int | None:
        return self._table.num_rows

    def describe(self) -> str:
        return f"{self.name} table of {self._table.num_rows} rows, columns: {', '.join(self._table.schema.names)}"


class RangeSource:
    """Rows 0..n-1 in an int64 column "id"."""

    name = "range"
    remote = False
    _split_rows = RANGE_SPLIT_ROWS

    def __init__(self, n: int) -> None:
        if n < 0:
            raise PlanError(f"range({n}) has no meaning", hint="give a number of rows, 0 or more")
        self._n = n
        self._empty = False

    def schema(self) -> pa.Schema:
        return pa.schema([] if self._empty else [("id", pa.int64())])

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        parts = 1 if per_input else max(1, -(-self._n // self._split_rows))
        for index in range(parts if self._n else 0):
            start, stop = self._n * index // parts, self._n * (index + 1) // parts
            part = Fragment(f"range({self._n})", 8 * self._n, str(self._n), start, stop, stop - start, "range")
            yield Split(index, (part,), RANGE_ROW_BYTES * (stop - start), stop - start)

    def divided(self, division: Division) -> Self:
        out = copy.copy(self)
        out._split_rows = max(1, min(RANGE_SPLIT_ROWS, division.split_bytes // RANGE_ROW_BYTES))
        return out

    def row_bytes(self) -> float:
        return RANGE_ROW_BYTES

    def project(self, columns: tuple[str, ...]) -> Self:
        unknown = [c for c in columns if c != "id"]
        if unknown:
            raise PlanError(f"column {unknown[0]!r} is not in the input", hint="it has: id")
        out = copy.copy(self)
        out._empty = not columns
        return out

    def prune(self, predicate: Any) -> tuple[RangeSource, bool]:
        return self, False

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        limits = shareable(limits, split.rows or 0, 1)
        yield from rechunk(self._pieces(split.fragments[0], limits), limits)

    def _pieces(self, f: Fragment, limits: BlockLimits) -> Iterator[Piece]:
        import numpy as np

        step = max(limits.rows_multiple, limits.max_rows - limits.max_rows % limits.rows_multiple)
        for at in range(f.start, f.stop, step):
            n = min(step, f.stop - at)
            ids = None if self._empty else numpy_to_array(np.arange(at, at + n, dtype=np.int64))
            batch = no_columns(n) if ids is None else pa.record_batch([ids], names=["id"])
            yield Piece(batch, Origin((Segment(f.uri, at, n),)), 8.0)

    def count(self) -> int | None:
        return self._n

    def describe(self) -> str:
        return f"range({self._n})"
