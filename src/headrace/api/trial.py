"""The two ends of a rehearsal's pipeline: a source of rows held in memory, and a sink that keeps what it learns and no rows.

They run where the plan's own source and sink would, in workers of any substrate, so they pickle; what the sink learns travels
in receipts. Invariant: nothing is written anywhere.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from headrace.connectors.blocks import Piece, rechunk
from headrace.contracts.source import OnBad
from headrace.core.errors import SchemaConflict
from headrace.core.options import BlockLimits
from headrace.core.receipts import LineageRun, OutputFile, Receipt
from headrace.core.refs import Origin
from headrace.core.schemas import Conflict, bring, unify
from headrace.core.splits import Fragment, Split

if TYPE_CHECKING:
    import pyarrow as pa

MOST_NOTES = 20  # failures of a split that are told one by one
MOST_BYTES = 64 << 20  # of a split's output kept for a trial of writing it


class Rows(Struct, frozen=True):
    """Sampled rows that are rehearsed as one split. place: that they come from, by number. label: its object."""

    place: int
    label: str
    blocks: tuple[tuple[pa.RecordBatch, Origin], ...]

    @property
    def count(self) -> int:
        return sum(batch.num_rows for batch, _ in self.blocks)

    @property
    def bytes(self) -> int:
        return sum(batch.nbytes for batch, _ in self.blocks)


class TrialSource:
    """Serves sampled rows, a split for each `Rows`."""

    remote = False

    def __init__(self, name: str, schema: pa.Schema, rows: Sequence[Rows]) -> None:
        self.name = name
        self._schema = schema
        self._rows = tuple(rows)

    def schema(self) -> pa.Schema:
        return self._schema

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        for index, rows in enumerate(self._rows):
            part = Fragment(rows.label, rows.bytes, "sample", index, index + 1, rows.count)
            yield Split(index, (part,), max(1, rows.bytes), rows.count)

    def project(self, columns: tuple[str, ...]) -> TrialSource:
        rows = [replace(r, blocks=tuple((b.select(list(columns)), o) for b, o in r.blocks)) for r in self._rows]
        return TrialSource(self.name, self._schema, rows)

    def prune(self, predicate: Any) -> tuple[TrialSource, bool]:
        return self, False

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        rows = self._rows[split.fragments[0].start]
        row_bytes = rows.bytes / max(1, rows.count)
        yield from rechunk((Piece(batch, origin, row_bytes) for batch, origin in rows.blocks), limits)

    def count(self) -> int | None:
        return sum(r.count for r in self._rows)

    def describe(self) -> str:
        return f"{self.name}, {self.count():,} sampled rows"


class TrialReceipt(Receipt, frozen=True):
    """schema: serialised, of the split's output; b"" when no row came out. arrow_bytes: of its rows. row_bytes, row_s: what one
    more row costs in a Parquet file; the first one, with the footer, is not counted.
    """

    schema: bytes = b""
    arrow_bytes: int = 0
    row_bytes: float = 0.0
    row_s: float = 0.0


class TrialAside(OutputFile, frozen=True):
    """Rows that failed. notes: (stage, uri, row, rows, exception) of the first of them."""

    notes: tuple[tuple[str, str, int | None, int, str], ...] = ()


class TrialSink:
    """Keeps no row. Its receipts say what the output looks like and what writing it would cost."""

    name = "check"
    per_input = False
    fresh = False

    def check(self, schema: pa.Schema | None) -> None:
        pass

    def store(self) -> None:
        return None

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> TrialSink:
        return self

    def open(self, split: Split, attempt: int) -> _TrialWriter:
        return _TrialWriter(split, attempt)

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        """The sink's columns are the last ones, in the order of worker/bad_rows: uri, row, rows, stage, exception, ..."""
        uris, at, counts, stages, texts = (rows.column(rows.num_columns - 7 + i).to_pylist() for i in range(5))
        notes = tuple(zip(stages, (uri or "" for uri in uris), at, counts, texts, strict=True))
        return TrialAside("", sum(counts), 0, kind="quarantine", notes=notes[:MOST_NOTES])

    def finish(self, files: Sequence[OutputFile], summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        pass

    def release(self) -> None:
        pass

    def describe(self) -> str:
        return "nothing (a rehearsal)"


class _TrialWriter:
    """Collects a split's rows, which are few, and encodes them in memory when it is closed."""

    def __init__(self, split: Split, attempt: int) -> None:
        self._split = split
        self._attempt = attempt
        self._batches: list[pa.RecordBatch] = []
        self._schema: pa.Schema | None = None
        self._rows = 0
        self._bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        try:
            self._schema = batch.schema if self._schema is None else unify(self._schema, batch.schema)
        except Conflict as conflict:
            raise SchemaConflict(
                f"column {conflict.name!r} is {conflict.then} here, but {conflict.first} before",
                where=(("column", conflict.name),),
            ) from None
        if self._bytes < MOST_BYTES:
            self._batches.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        known = (self._split.index, self._split.id, self._attempt, (), self._rows)
        if self._schema is None:
            return TrialReceipt(*known)
        row_bytes, row_s = _row_cost([bring(b, self._schema) for b in self._batches], self._schema)
        return TrialReceipt(
            *known, schema=self._schema.serialize().to_pybytes(), arrow_bytes=self._bytes, row_bytes=row_bytes, row_s=row_s
        )

    def abort(self) -> None:
        self._batches = []


def _row_cost(batches: list[pa.RecordBatch], schema: pa.Schema) -> tuple[float, float]:
    """(bytes, seconds) of one more row: the difference between a file of all rows and one of the first alone."""
    import pyarrow as pa

    if not len(schema):
        return 0.0, 0.0
    table = pa.Table.from_batches(batches, schema)
    few_bytes, few_s = _encoded(table.slice(0, 1))  # also the first use of the codec
    few_bytes, few_s = min((few_bytes, few_s), _encoded(table.slice(0, 1)))
    if table.num_rows < 2:
        return float(table.nbytes), few_s
    all_bytes, all_s = min(_encoded(table), _encoded(table))
    more = table.num_rows - 1
    return max(0.0, (all_bytes - few_bytes) / more), max(0.0, (all_s - few_s) / more)


def _encoded(table: pa.Table) -> tuple[int, float]:
    """(bytes, seconds) of the table as a Parquet file in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    began = time.perf_counter()
    memory = pa.BufferOutputStream()
    pq.write_table(table, memory, compression="zstd", compression_level=1)
    return memory.getvalue().size, time.perf_counter() - began


def schema_of(receipt: TrialReceipt) -> pa.Schema:
    """Of the split's output; `receipt.schema` must not be empty."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(receipt.schema))


def common_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Of all; columns whose types have nothing in common keep the first one's."""

    def both(a: pa.Schema, b: pa.Schema) -> pa.Schema:
        try:
            return unify(a, b)
        except Conflict as conflict:
            index = b.get_field_index(conflict.name)
            return both(a, b.set(index, b.field(index).with_type(a.field(conflict.name).type)))

    return functools.reduce(both, schemas)
