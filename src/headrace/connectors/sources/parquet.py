"""Parquet: row groups divided or packed into splits, columns and rows chosen while reading.

Invariants: memory of a read is bounded by a block plus the pages under it (and read buffers), never by the file or the row
group; block cuts follow from the metadata in footers, and from the size of the rows where those say too little; row numbers
in origins are those of the file.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any, Self

import pyarrow as pa
from msgspec import Struct
from msgspec.structs import replace

from headrace.connectors import footers, hive, packing, storage
from headrace.connectors.blocks import Piece, no_columns, rows_per_block, shareable, sized
from headrace.connectors.listing import Paths
from headrace.connectors.parquet_schema import HINT, conform, constant, named, refused, unified
from headrace.connectors.parquet_splice import worth_copying
from headrace.connectors.redact import redact
from headrace.connectors.sources.files import FileSource
from headrace.connectors.sources.remarks import Remarks
from headrace.connectors.sources.unreadable import halves, is_bad, reported
from headrace.connectors.storage import Reader, Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError, InputChanged, PlanError, StorageRefused
from headrace.core.expressions import columns_of, passing
from headrace.core.options import BlockLimits
from headrace.core.origins import chosen
from headrace.core.refs import Origin, Segment
from headrace.core.schemas import decoded_schema
from headrace.core.splits import Fragment, Split
from headrace.core.tensors import vector_to_numpy

# Without a stream buffer Arrow reads whole column chunks: 521 MB for a 450 MB row group of 100 columns, 77 MB with 64 KiB
# buffers at the same speed (memory maps save a little less and count as resident).
LOCAL_BUFFER_BYTES = 64 << 10
# On S3 a row group is fetched ahead when its chosen columns fit in this; larger ones are streamed through buffers that
# share it, each at least a request worth making. The next row group is on its way when half of one is used, so that two of the
# former kind are held at most.
S3_AHEAD_BYTES = 32 << 20
S3_BUFFER_BYTES = 64 << 20
S3_BUFFER_LEAST_BYTES = 512 << 10
# A disk is asked for the next row group when half of one is used: what the kernel reads ahead by itself ends with the column
# chunk. Smaller ones come with their neighbours; larger ones would push others out of the page cache.
DISK_AHEAD_LEAST_BYTES = 1 << 20
DISK_AHEAD_BYTES = 128 << 20


TINY_BYTES = 1 << 20  # of a row group of fewer than PROBE_FROM_ROWS: its metadata is not worth a look
PROBE_ROWS = 64  # rows decoded to learn the width of dictionary-encoded strings, whose stored size says nothing
PROBE_FROM_ROWS = 256  # row groups below this are a block at most, or divided when their size is known
# Row groups are read together up to so many rows (and TINY_BYTES): of 100 rows of six columns each takes 0.17 ms alone,
# 0.04 in company. Not more rows, as their real size is not known before; and not more than they may decode to at worst.
TOGETHER_ROWS = 4 * PROBE_FROM_ROWS
TOGETHER_DECODED_BYTES = 16 << 20
OFFSET_BYTES = 4  # that a list or a string takes beside its values
WIDE_VALUE_BYTES = 1 << 10  # stored values of this size are no references into a dictionary; images are not decoded twice


# A range within a row group is read from the group's beginning: so many bytes in all, for one group, at most.
REREAD_BYTES = 4 << 30
BEFORE_ROWS = 64 << 10  # of a batch there: those before the range are decoded for nothing, and few at a time take long

# Footers that types are taken from: a tenth of a millisecond each; from a store they come at once, beside the first one.
LOOKED_AT = 16
LOOKED_AT_REMOTE = 8
FOLDERS_LOOKED_AT = 1000  # objects whose folders say which columns there are, and of which type: names cost next to nothing


class ParquetSource(FileSource):
    """Parquet files. columns: read only these. schema: rows are brought to its types by safe casts; a column that a file lacks
    is null there, and what it has beyond them is not read.

    Otherwise the schema is the one that rows of some files fit into, chosen by the listing alone; a column that some of them
    lack is null where it is missing. Where their types don't go together it has the first one, and can't be read. A file that
    does not go into the schema is a DataError.

    hive_partitioning: a column that a file lacks has the value that a folder's name says, if one does; without schema= such
    columns are in the schema, behind the others.
    """

    name = "parquet"
    extensions = (".parquet", ".pq", ".parq")
    reads_to_divide = True
    _left: frozenset[str] = frozenset()  # columns that splits worth copying are read without
    _chosen = False  # are some columns all that anyone wants?

    def __init__(
        self,
        paths: Paths,
        columns: tuple[str, ...] | list[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        hive_partitioning: bool = False,
    ) -> None:
        super().__init__(paths)
        self._hive = hive_partitioning
        self._schema = None if schema is None else named(schema)
        self._full = self._schema
        self._optional = frozenset(() if self._schema is None else self._schema.names)  # null in files that lack them
        self._conflicts: dict[str, str] = {}  # columns that can't be read, and why
        self._remarks = Remarks()
        self._predicate: Any = None
        self._predicate_columns: tuple[str, ...] = ()
        if columns is not None:
            self._full_schema()
            self._columns = self.project(tuple(columns))._columns

    def prune(self, predicate: Any) -> tuple[Self, bool]:
        full = self._full_schema()
        try:
            read = columns_of(predicate, full)
        except (pa.ArrowException, KeyError, TypeError, ValueError) as e:
            hint = f"columns are: {', '.join(f'{f.name} ({f.type})' for f in list(full)[:30])}"
            raise PlanError(f"the filter {predicate} can't be applied to the input: {e}", hint=hint) from e
        out = copy.copy(self)
        out._predicate = predicate if self._predicate is None else self._predicate & predicate
        out._predicate_columns = tuple(dict.fromkeys((*self._predicate_columns, *read)))
        return out, True

    def project(self, columns: tuple[str, ...]) -> Self:
        out = super().project(columns)
        out._chosen = True
        return out

    def snapshot(self) -> Self:
        out = super().snapshot()
        out._remarks = Remarks()
        return out

    def take_remarks(self) -> tuple[tuple[str, str], ...]:
        return self._remarks.take()

    def leave(self, columns: frozenset[str]) -> Self:
        out = copy.copy(self)
        out._left = self._left | columns
        return out

    def check_columns(self) -> None:
        self._full_schema()
        if not self._conflicts:
            return
        for name in self._read_columns(self.schema()).names:
            if name in self._conflicts:
                raise refused(name, self._conflicts[name])

    @property
    def filtered(self) -> bool:
        """Does it yield some rows only?"""
        return self._predicate is not None

    def first_object(self) -> Stored:
        """Raises DataError when there is no input."""
        return next(iter(self._listing.objects()))

    def count(self) -> int | None:
        if self._predicate is not None:
            return None
        from concurrent.futures import ThreadPoolExecutor

        total = 0
        objects = self._listing.objects()
        with ThreadPoolExecutor(16 if self.remote else 2, thread_name_prefix="headrace-count") as threads:
            while window := list(islice(objects, 1024)):
                total += sum(threads.map(_rows_of, window))
        return total

    def describe(self) -> str:
        folders = ", with the columns that folders say" if self._hive else ""
        types = "" if self._schema is None else f", schema: {', '.join(f'{f.name} {f.type}' for f in self._schema)}"
        where = "" if self._predicate is None else f", where {self._predicate}"
        return super().describe() + folders + types + where

    def _first_schema(self) -> pa.Schema:
        objects, all_there = self._listing.spread(LOOKED_AT_REMOTE if self.remote else LOOKED_AT)
        schemas = self._schemas(objects)
        if schemas[0] is None:  # it is broken: see there
            objects, schemas = [objects[0], *objects], [super()._first_schema(), *schemas]
        found = [(o.uri, schema) for o, schema in zip(objects, schemas, strict=True) if schema is not None]
        known = unified(found, all_there=all_there and None not in schemas)
        self._optional, self._conflicts = known.optional, known.conflicts
        if not self._hive:
            return known.schema
        names = (self._listing.relative(o.uri) for o in islice(self._listing.objects(), FOLDERS_LOOKED_AT))
        more = [f for f in hive.fields(names) if f.name not in known.schema.names]
        self._optional |= {f.name for f in more}
        return pa.schema([*known.schema, *more])

    def _told(self, uri: str) -> dict[str, pa.Scalar]:
        """What the folders of an object say of columns. Raises DataError for a value that is none of the column's type."""
        if not self._hive:
            return {}
        full, where = self._full_schema(), (("file", uri),)
        said = hive.told(self._listing.relative(uri))
        return {name: constant(text, full.field(name), where) for name, text in said.items() if name in full.names}

    def _schemas(self, objects: list[Stored]) -> list[pa.Schema | None]:
        """Of each; None where it can't be understood: whoever reads it will say so, or set it aside."""
        if not self.remote or len(objects) == 1:
            return [self._schema_of(o) for o in objects]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(objects), thread_name_prefix="headrace-footer") as threads:
            return list(threads.map(self._schema_of, objects))

    def _schema_of(self, o: Stored) -> pa.Schema | None:
        try:
            return self._read_schema(o)
        except DataError as error:
            if not is_bad(error):
                raise
            return None

    def _read_schema(self, first: Stored) -> pa.Schema:
        with _opened(first.uri, first.size, first.version, parts=True) as (_, file):
            return decoded_schema(file.schema_arrow.remove_metadata())

    def row_bytes(self) -> float:
        size = rows = 0
        for o in self._listing.spread(LOOKED_AT_REMOTE if self.remote else LOOKED_AT)[0]:
            try:
                size, rows = size + o.size, rows + _rows_of(o)
            except DataError:  # whoever reads it will say so, or set it aside
                continue
        return size / rows if rows else 0.0

    def divide(self, o: Stored) -> list[Fragment]:
        try:
            with _opened(o.uri, o.size, o.version) as (_, file):
                groups = [_measured(file.metadata.row_group(g)) for g in range(file.num_row_groups)]
        except (InputChanged, StorageRefused):
            raise
        except DataError:  # whoever reads it will say so, or set it aside
            return [packing.whole(o)]
        total = sum(group.stored for group in groups)
        target = total / max(1, -(-total // self.divide_bytes))
        by_rows = self._division is not None and self._division.by_rows
        whole = packing.whole(o, sum(group.rows for group in groups))
        parts = [replace(whole, start=a, stop=b, rows=rows) for a, b, rows in _even_runs(groups, target)]
        if by_rows:
            parts = list(_cut_by_rows(parts, groups, target))
        return [whole] if len(groups) < 2 and len(parts) < 2 else parts

    def _split_pieces(self, split: Split, limits: BlockLimits, on_bad: OnBad | None) -> Generator[Piece, None, None]:
        self.check_columns()
        if not self._left or not worth_copying(split):
            return super()._split_pieces(split, limits, on_bad)
        narrow = self.project(tuple(name for name in self.schema().names if name not in self._left))
        narrow._left, narrow._chosen = frozenset(), self._chosen
        return narrow._split_pieces(split, limits, on_bad)

    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        schema = self.schema()
        with ExitStack() as opened:
            try:
                reader, file = opened.enter_context(
                    _opened(fragment.uri, fragment.size_bytes, fragment.version, columns=len(schema))
                )
            except DataError as error:
                reported(on_bad, fragment.uri, -1, 0, error)
                return
            starts = [0, *accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))]
            start, stop = fragment.start, file.num_row_groups if fragment.stop < 0 else fragment.stop
            kept: range | None = None
            if fragment.by_rows:
                kept = range(start, stop)
                start, stop = bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, stop)
            wanted = set(range(start, stop))
            columns = _Columns(file, self._read_columns(schema), self._told(fragment.uri))
            if self._predicate is not None:
                wanted &= self._may_match(reader, columns)
            self._remark_on(columns.there, fragment.uri)
            following = dict(pairwise(sorted(wanted)))
            rows = starts[stop] - starts[start]
            row_bytes = sum(file.metadata.row_group(g).total_byte_size for g in range(start, stop)) / max(1, rows)
            limits = shareable(limits, (rows if kept is None else len(kept)) * limits.inputs, len(columns.schema), row_bytes)
            for run in _runs(reader, columns, sorted(wanted)) if kept is None else ([g] for g in sorted(wanted)):
                together = self._together(reader, columns, run, starts[run[0]], schema, limits) if len(run) > 1 else None
                if together is not None:
                    yield from together
                    continue
                for g in run:
                    pieces = self._group_pieces(
                        reader, columns, g, starts[g], schema, limits, on_bad, following.get(g), kept=kept
                    )
                    yield from pieces
            reader.check()

    def _together(
        self, reader: Reader, columns: _Columns, run: list[int], row: int, schema: pa.Schema, limits: BlockLimits
    ) -> list[Piece] | None:
        """The rows of several row groups, whose first is number `row` of the file. None when something is wrong with one of
        them: reading each by itself tells what.
        """
        where = (("file", reader.uri),)
        rows = sum(columns.file.metadata.row_group(g).num_rows for g in run)
        try:
            with _explained(where):
                (batch,) = columns.batches(run, rows, columns.names)
            if batch.num_rows != rows:
                return None
            origin = Origin((Segment(reader.uri, row, rows),))
            parts = list(self._conformed(batch, origin, columns, where, None))
        except DataError:
            return None
        row_bytes = batch.nbytes / rows
        return [
            p for part, of in parts for p in sized(Piece(part.select(schema.names), of, row_bytes, limits.max_rows), limits)
        ]

    def _remark_on(self, names: list[str], uri: str) -> None:
        """Columns of a file that nobody promised and nobody will see."""
        if self._chosen or self._schema is not None:
            return
        full = self._full_schema().names
        said = [name for name in hive.told(self._listing.relative(uri)) if name not in full]
        if said and not self._hive:
            text = f"names of folders say {', '.join(said[:20])}, which is not read; hive_partitioning=True makes columns of it"
            self._remarks.add("folders", text)
        if names != full and (left := [name for name in names if name not in full]):
            columns = ", ".join(left[:20])
            text = f"columns {columns} of {redact(uri)} are not in the schema and are left out; {HINT}"
            self._remarks.add(f"columns {columns}", text)

    def _group_pieces(
        self,
        reader: Reader,
        columns: _Columns,
        g: int,
        row: int,
        schema: pa.Schema,
        limits: BlockLimits,
        on_bad: OnBad | None,
        following: int | None = None,
        *,
        kept: range | None = None,
    ) -> Iterator[Piece]:
        """The rows of row group `g`, whose first is number `row` of the file. following: the row group to be read after it.
        kept: rows of the file; those before them are decoded for nothing.
        """
        where = (("file", reader.uri), ("row group", str(g)))
        metadata = columns.file.metadata.row_group(g)
        rows = range(row, row + metadata.num_rows)
        wanted = rows if kept is None else range(max(row, kept.start), min(rows.stop, kept.stop))
        if not len(columns.schema):
            yield from _counted(reader.uri, wanted.start, len(wanted), limits)
            return
        read = limits
        if kept is not None:
            read = replace(limits, max_rows=max(limits.max_rows, min(BEFORE_ROWS, wanted.stop - row)))
        batches, row_bytes, done = None, 0.0, 0
        while row + done < wanted.stop:
            try:
                if batches is None:
                    batches, row_bytes = self._group_batches(reader, columns, g, read, where)
                with _explained(where):
                    batch = next(batches, None)
                if batch is None:
                    raise DataError(f"the row group ends after {done} of {metadata.num_rows} rows", where=where)
            except DataError as error:  # what was given stays good; the rest of the group can't be reached
                if read is not limits:  # but what lies before the fault in so large a batch may be
                    wanted = range(max(row + done, wanted.start), wanted.stop)
                    batches, read, done = None, limits, 0
                    continue
                bad = max(row + done, wanted.start)
                reported(on_bad, reader.uri, bad, wanted.stop - bad, error)
                return
            at = row + done
            done += batch.num_rows
            if kept is not None:
                first = max(at, wanted.start)
                batch = batch.slice(min(first - at, batch.num_rows), max(0, wanted.stop - first))
                at = first
            if not batch.num_rows:
                continue
            origin = Origin((Segment(reader.uri, at, batch.num_rows),))
            if following is not None and 2 * done >= metadata.num_rows:
                _announce(reader, columns, g, following)
                following = None
            for part, of in self._conformed(batch, origin, columns, where, on_bad):
                yield from sized(Piece(part.select(schema.names), of, row_bytes, limits.max_rows), limits)

    def _read_columns(self, schema: pa.Schema) -> pa.Schema:
        """Those asked for, and those that the predicate reads."""
        names = list(schema.names)
        if self._predicate is not None:
            names += [n for n in self._predicate_columns if n not in names]
        full = self._full_schema()
        return pa.schema([full.field(n) for n in names])

    def _may_match(self, reader: Reader, columns: _Columns) -> set[int]:
        """Row groups that statistics, and folders, don't rule out. Those of values that will be cast say nothing of what comes
        of them.
        """
        full, file = self._full_schema(), columns.file
        stored = file.schema_arrow
        said = {name: value for name, value in columns.told.items() if name not in stored.names}
        for name in self._predicate_columns:
            i = stored.get_field_index(name)
            if name not in said and (i < 0 or not _ordered_alike(stored.field(i).type, full.field(name).type)):
                return set(range(file.num_row_groups))
        return _may_match(reader, file, self._predicate, said)

    def _group_batches(
        self, reader: Reader, columns: _Columns, g: int, limits: BlockLimits, where: tuple[tuple[str, str], ...]
    ) -> tuple[Iterator[pa.RecordBatch], float]:
        """(the row group's batches, estimated bytes of a row)."""
        metadata = columns.file.metadata.row_group(g)
        if reader.whole and metadata.num_rows < PROBE_FROM_ROWS and metadata.total_byte_size <= TINY_BYTES:
            row_bytes = metadata.total_byte_size / metadata.num_rows
        else:
            if storage.is_remote(reader.uri):
                ranges, size = _ranges(metadata, columns)
                if size <= S3_AHEAD_BYTES:
                    reader.prefetch(ranges)
            row_bytes = _row_bytes(columns, g, where)
        rows = rows_per_block(row_bytes, limits)
        with _explained(where):
            return columns.batches([g], rows, columns.names), row_bytes

    def _conformed(
        self,
        batch: pa.RecordBatch,
        origin: Origin,
        columns: _Columns,
        where: tuple[tuple[str, str], ...],
        on_bad: OnBad | None,
    ) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        """The batch in the types promised, without what the predicate rules out. A row whose value does not fit is bad."""

        def read(start: int, stop: int) -> tuple[pa.RecordBatch, Origin]:
            part, of = batch.slice(start, stop - start), origin.slice(start, stop - start)
            brought = conform(part, columns.schema, where, self._optional, by_user=self._schema is not None, known=columns.told)
            return self._filtered(brought, of, where)

        try:
            made = [read(0, batch.num_rows)]
        except DataError:
            if on_bad is None:
                raise
            read(0, 0)  # what fails without rows is no row's fault
            ((uri, first),) = [(s.uri, s.row) for s in origin.segments]
            made = list(halves(0, batch.num_rows, read, lambda i, error: reported(on_bad, uri, first + i, 1, error)))
        for part, of in made:
            if part.num_rows:
                yield part, of

    def _filtered(
        self, batch: pa.RecordBatch, origin: Origin, where: tuple[tuple[str, str], ...]
    ) -> tuple[pa.RecordBatch, Origin]:
        """The rows that satisfy the predicate."""
        if self._predicate is None:
            return batch, origin
        try:
            rows = passing(batch, self._predicate)
        except (pa.ArrowException, KeyError, TypeError) as e:
            raise DataError(f"the filter {self._predicate} failed: {e}", where=where) from e
        if len(rows) == batch.num_rows:
            return batch, origin
        return batch.take(rows), chosen(origin, vector_to_numpy(rows)) if len(rows) else origin


class GroupReader:
    """Row groups of one object, in any order, with the columns and types of `source`."""

    def __init__(self, source: ParquetSource, fragment: Fragment) -> None:
        self._source = source
        self._schema = source.schema()
        self._stack = ExitStack()
        opened = _opened(fragment.uri, fragment.size_bytes, fragment.version, columns=len(self._schema))
        self._reader, self._file = self._stack.enter_context(opened)
        self._columns = _Columns(self._file, source._read_columns(self._schema), source._told(fragment.uri))

    @property
    def rows(self) -> list[int]:
        """Of each row group."""
        return [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]

    def batches(self, group: int, first_row: int, limits: BlockLimits) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of the first row, batch), in order. first_row: that of the row group. Raises DataError."""
        pieces = self._source._group_pieces(self._reader, self._columns, group, first_row, self._schema, limits, None)
        for piece in pieces:
            yield piece.origin.segments[0].row, piece.batch

    def close(self) -> None:
        self._stack.close()


def _rows_of(o: Stored) -> int:
    with _opened(o.uri, o.size, o.version, parts=True) as (_, file):
        return file.metadata.num_rows


@contextmanager
def _opened(uri: str, size: int, version: str, columns: int = 1, *, parts: bool = False) -> Iterator[tuple[Reader, Any]]:
    """(reader, pyarrow.parquet.ParquetFile); both closed in the end. parts: see open_reader."""
    import pyarrow.parquet as pq

    reader = storage.open_reader(uri, size, version, parts=parts)
    try:
        native = reader.native()
        with _explained((("file", uri),), "this is not a readable Parquet file"):
            metadata, buffer = None, 0
            if not reader.whole and storage.is_remote(uri):
                metadata = _remote_metadata(native, uri, size, version)
                buffer = _remote_buffer_bytes(metadata, columns)
            elif not reader.whole:
                buffer = LOCAL_BUFFER_BYTES
            file = pq.ParquetFile(native, metadata=metadata, pre_buffer=False, buffer_size=buffer)
        yield reader, file
    finally:
        reader.close()


def _remote_metadata(native: pa.NativeFile, uri: str, size: int, version: str) -> Any:
    """What this process knows of the file, or reads now."""
    import pyarrow.parquet as pq

    footer = footers.remembered.find(uri, version)
    if footer is not None:
        return pq.read_metadata(pa.BufferReader(footer))
    metadata = pq.read_metadata(native)
    native.seek(size - 8)
    length = int.from_bytes(native.read(4), "little") + 8
    if length <= storage.FOOTER_BYTES:  # the reader holds that much
        native.seek(size - length)
        footers.remembered.keep(uri, version, bytes(native.read(length)))
    return metadata


def _remote_buffer_bytes(metadata: Any, columns: int) -> int:
    """Of the stream that a column chunk is read through, when so many columns are read."""
    if all(metadata.row_group(g).total_byte_size <= S3_AHEAD_BYTES for g in range(metadata.num_row_groups)):
        return S3_BUFFER_LEAST_BYTES  # it comes from what was fetched ahead: small buffers stay in the cores' caches
    return min(storage.REQUEST_BYTES, max(S3_BUFFER_LEAST_BYTES, S3_BUFFER_BYTES // max(1, columns)))


@contextmanager
def _explained(where: tuple[tuple[str, str], ...], text: str = "broken Parquet data") -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        hint = "the file is damaged or still being written; replace it or leave it out"
        raise DataError(f"{text}: {e}", where=where, hint=hint) from e


class _Group(Struct, frozen=True):
    """What a footer says of a row group. stored: compressed; bytes: encoded."""

    rows: int
    stored: int
    bytes: int


def _measured(group: Any) -> _Group:
    stored = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    return _Group(group.num_rows, stored, group.total_byte_size)


def _even_runs(groups: Sequence[_Group], target: float) -> Iterator[tuple[int, int, int]]:
    """(first row group, the one after the last, rows) of parts of about `target` bytes."""
    start, rows, size, part = 0, 0, 0, 0
    for g, group in enumerate(groups):
        # A group goes to the even part of the file in which its middle lies: no small one is left at the end.
        before, part = part, int((size + group.stored / 2) / max(target, 1.0))
        if g > start and (part > before or rows + group.rows > packing.SPLIT_MAX_ROWS):
            yield start, g, rows
            start, rows = g, 0
        rows += group.rows
        size += group.stored
    yield start, len(groups), rows


def _cut_by_rows(parts: Sequence[Fragment], groups: Sequence[_Group], target: float) -> Iterator[Fragment]:
    """Parts that are one row group, and several times as large as they should be, in ranges of rows; the others as they are."""
    starts = [0, *accumulate(group.rows for group in groups)]
    for part in parts:
        group = groups[part.start] if part.stop == part.start + 1 else None
        shares = 1
        if group is not None:
            shares = min(round(group.stored / max(target, 1.0)), group.rows, REREAD_BYTES // max(1, group.bytes))
        if shares < 2:
            yield part
            continue
        first, rows = starts[part.start], starts[part.stop] - starts[part.start]
        for a, b in pairwise(first + rows * i // shares for i in range(shares + 1)):
            yield replace(part, start=a, stop=b, rows=b - a, by_rows=True)


class _Columns:
    """Columns that are read of one file. schema: theirs, as promised; there: names of all that the file has; names: of those
    that are read, too. told: what its folders say of columns.
    """

    def __init__(self, file: Any, schema: pa.Schema, told: Mapping[str, pa.Scalar]) -> None:
        self.file = file
        self.told = told
        self.schema = schema
        self.there: list[str] = file.schema_arrow.names
        known = frozenset(self.there)
        self.names = self.there if schema.names == self.there else [n for n in schema.names if n in known]

    @cached_property
    def leaves(self) -> list[tuple[int, str, float]]:
        """(index, top-level column, Arrow bytes of a value) of each leaf column under them, in the file's order."""
        chosen = frozenset(self.names)
        every = [(f.name, width) for f in self.file.schema_arrow for width in _leaf_bytes(f.type)]
        return [(i, name, width) for i, (name, width) in enumerate(every) if name in chosen]

    @cached_property
    def swelling(self) -> list[tuple[int, float]]:
        """(index, Arrow bytes of a value; 0 for texts and binaries) of each leaf column of `leaves` whose values may take far
        more memory than the pages that they are encoded in.
        """
        stored = [(i, width, self.file.schema.column(i)) for i, _, width in self.leaves]
        return [
            (i, 0 if leaf.physical_type == "BYTE_ARRAY" else width)
            for i, width, leaf in stored
            if leaf.physical_type == "BYTE_ARRAY" or leaf.max_repetition_level or width >= WIDE_VALUE_BYTES
        ]

    def decoded_bytes(self, group: Any) -> float:
        """The most that values of `swelling` columns in a row group may take: all of them the largest of their dictionary."""
        most = group.num_rows * group.total_byte_size
        if most <= TOGETHER_DECODED_BYTES / 16 and not any(width for _, width in self.swelling):
            return most  # no value is larger than the group: its chunks are not worth a look
        out = 0.0
        for i, width in self.swelling:
            chunk = group.column(i)
            if width:
                out += chunk.num_values * width
            elif chunk.has_dictionary_page:
                out += chunk.num_values * chunk.total_uncompressed_size
        return out

    def batches(self, groups: list[int], rows: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Row groups in batches of so many rows."""
        return self.file.iter_batches(batch_size=rows, row_groups=groups, columns=names, use_threads=False)


def _runs(reader: Reader, columns: _Columns, wanted: list[int]) -> Iterator[list[int]]:
    """The row groups, those together that lie side by side and are small. Far away each is asked for by itself."""
    apart = len(wanted) < 2 or not columns.names or (storage.is_remote(reader.uri) and not reader.whole)
    run: list[int] = []
    rows, size, decoded = 0, 0, 0.0
    for g in wanted:
        group = columns.file.metadata.row_group(g)
        tiny = not apart and group.num_rows <= TOGETHER_ROWS and group.total_byte_size <= TINY_BYTES
        more = columns.decoded_bytes(group) if tiny else 0.0
        rows, size, decoded = rows + group.num_rows, size + group.total_byte_size, decoded + more
        full = rows > TOGETHER_ROWS or size > TINY_BYTES or decoded > TOGETHER_DECODED_BYTES
        if run and (apart or full or g > run[-1] + 1):
            yield run
            run, rows, size, decoded = [], group.num_rows, group.total_byte_size, more
        run.append(g)
    if run:
        yield run


def _ranges(group: Any, columns: _Columns) -> tuple[list[tuple[int, int]], int]:
    """(where the chunks of these columns are; the bytes that come with them, those of small gaps too)."""
    ranges = [_chunk_range(group.column(i)) for i, _, _ in columns.leaves]
    return ranges, sum(stop - start for start, stop in storage.coalesce(ranges))


def _announce(reader: Reader, columns: _Columns, g: int, following: int) -> None:
    """Row group `following` is on its way while the rest of `g` is used, if both fit in what a reader may buffer."""
    (_, held), (ranges, size) = (_ranges(columns.file.metadata.row_group(i), columns) for i in (g, following))
    if not storage.is_remote(reader.uri):
        fits = DISK_AHEAD_LEAST_BYTES <= size <= DISK_AHEAD_BYTES
    else:
        fits = size <= S3_AHEAD_BYTES and min(held, S3_AHEAD_BYTES) + size <= S3_BUFFER_BYTES
    if fits:
        reader.announce(ranges)


def _chunk_range(chunk: Any) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _row_bytes(columns: _Columns, g: int, where: tuple[tuple[str, str], ...]) -> float:
    """Estimated Arrow bytes of a row, from metadata; dictionary-encoded strings are measured on a few rows."""
    group = columns.file.metadata.row_group(g)
    rows = max(1, group.num_rows)
    sizes = {f.name: (OFFSET_BYTES if _is_list(f.type) else 0) * rows for f in columns.schema}
    hidden: set[str] = set()
    for i, name, width in columns.leaves:
        chunk = group.column(i)
        stored, values = chunk.total_uncompressed_size, chunk.num_values
        sizes[name] += max(stored, values * width)
        if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page and stored < values * WIDE_VALUE_BYTES:
            hidden.add(name)
    estimated = {f.name: max(sizes[f.name] / rows, _fixed_bytes(f.type)) for f in columns.schema}
    probe = [n for n in columns.names if n in hidden and not pa.types.is_dictionary(columns.schema.field(n).type)]
    if probe and rows >= PROBE_FROM_ROWS:
        with _explained(where):
            for batch in islice(columns.batches([g], PROBE_ROWS, probe), 1):
                estimated |= {n: max(estimated[n], batch.column(n).nbytes / batch.num_rows) for n in probe}
    return sum(estimated.values())


def _leaf_bytes(t: pa.DataType) -> list[float]:
    """Arrow bytes of a value of each leaf column that Parquet stores a column of this type in."""
    if isinstance(t, pa.BaseExtensionType):
        return _leaf_bytes(t.storage_type)
    if pa.types.is_map(t):
        return [*_leaf_bytes(t.key_type), *_leaf_bytes(t.item_type)]
    if _is_list(t) or pa.types.is_fixed_size_list(t):
        return _leaf_bytes(t.value_type)
    if pa.types.is_struct(t):
        return [width for i in range(t.num_fields) for width in _leaf_bytes(t.field(i).type)]
    return [_fixed_bytes(t)]


def _is_list(t: pa.DataType) -> bool:
    kinds = pa.types
    return kinds.is_list(t) or kinds.is_large_list(t) or kinds.is_list_view(t) or kinds.is_large_list_view(t)


def _fixed_bytes(t: pa.DataType) -> float:
    """Arrow bytes of a value of fixed width; OFFSET_BYTES for a variable one."""
    if isinstance(t, pa.BaseExtensionType):
        return _fixed_bytes(t.storage_type)
    if pa.types.is_fixed_size_list(t):
        return t.list_size * _fixed_bytes(t.value_type)
    if pa.types.is_struct(t):
        return sum(_fixed_bytes(t.field(i).type) for i in range(t.num_fields))
    try:
        return t.bit_width / 8
    except ValueError:
        return OFFSET_BYTES


def _counted(uri: str, row: int, rows: int, limits: BlockLimits) -> Iterator[Piece]:
    """Rows without columns."""
    step = max(limits.max_rows, limits.rows_multiple)
    for at in range(0, rows, step):
        n = min(step, rows - at)
        yield Piece(no_columns(n), Origin((Segment(uri, row + at, n),)), 1e-9, limits.max_rows)


def _ordered_alike(a: pa.DataType, b: pa.DataType) -> bool:
    return a.equals(b) or (pa.types.is_integer(a) and pa.types.is_integer(b))


def _may_match(reader: Reader, file: Any, predicate: Any, said: Mapping[str, pa.Scalar]) -> set[int]:
    """Row groups that statistics don't rule out. When they can't be used (types differ between files) all of them. said: values
    that columns have in all rows, which the file lacks.
    """
    from headrace.core.arrow_dataset import ds

    every = set(range(file.num_row_groups))
    if not said and len(every) < 2 and not any(_has_statistics(file, g) for g in every):
        return every
    footer = footers.remembered.find(reader.uri, reader.version)
    data = pa.BufferReader(_footer_of(file) if footer is None else footer)
    try:
        fragment = ds.ParquetFileFormat().make_fragment(data, partition_expression=hive.equal_to(said))
        schema = pa.schema([*fragment.physical_schema, *(pa.field(name, value.type) for name, value in said.items())])
        kept = fragment.subset(filter=predicate, schema=schema).row_groups
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError):
        return every  # the filter itself will be applied, and explain, row by row
    return {group.id for group in kept}


def _footer_of(file: Any) -> pa.Buffer:
    """A file of nothing but what the footer says. The file itself was fetched, and is not to be asked for again."""
    out = pa.BufferOutputStream()
    file.metadata.write_metadata_file(out)
    return out.getvalue()


def _has_statistics(file: Any, g: int) -> bool:
    group = file.metadata.row_group(g)
    return any(group.column(i).is_stats_set for i in range(group.num_columns))
