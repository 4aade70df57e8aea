"""Carried columns taken over from Parquet input as they are stored there: a row group of the input of which all rows come out,
in order, becomes one of the output; its chunks are copied, and only new columns are encoded.

Everything else (a row that is missing, a row group too small to be worth keeping, a file whose columns are stored in another
way than pyarrow's, new columns too wide to hold) is decoded and written as always. Invariants: what a reader gets is the same
either way, schema included, and row groups and their statistics are those of the input; what is copied has been decoded once,
here or on its way; what becomes of a row group depends on its rows alone (but for new columns of about HELD_BYTES, where it
depends on blocks, too); of new columns about HELD_BYTES wait, of carried ones a block or a piece of a chunk.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct

from headrace.connectors import storage
from headrace.connectors.parquet_footer import Footer, Refused
from headrace.connectors.parquet_splice import (
    ENOUGH_GROUP_BYTES,
    LEAST_CHUNK_BYTES,
    LEAST_GROUP_BYTES,
    LEAST_GROUP_ROWS,
    Source,
    Splicer,
    Template,
    encoded,
    footer_file,
    read_footer,
    worth_copying,
)
from headrace.connectors.redact import redact
from headrace.connectors.run_store import disk_error, quietly
from headrace.connectors.sinks.files import FileSplitWriter, Written
from headrace.connectors.sinks.parquet import Compression, ParquetEncoder, ParquetSink
from headrace.connectors.sources.parquet import GroupReader, ParquetSource
from headrace.core.carried import Carried
from headrace.core.errors import DataError, InternalError, PlanError, SchemaConflict
from headrace.core.options import BlockLimits
from headrace.core.receipts import LineageRun, Receipt
from headrace.core.refs import Origin
from headrace.core.splits import Fragment, Split
from headrace.core.tensors import numpy_to_array, texts_to_array

HELD_BYTES = 64 << 20  # of new columns that wait for their row group to be whole
# Footers are parsed in Python, some 6 MB/s: not those that would take a few percent of the time that their file takes.
FOOTER_SHARE = 256
LEAST_FOOTER_BYTES = 64 << 10
MOST_FOOTER_BYTES = 16 << 20


def copyable_columns(source: ParquetSource, columns: Sequence[str], compression: Compression) -> frozenset[str]:
    """Those of the source's columns whose chunks can be copied, judged by the first of its files; none where the source does
    not yield all rows, where reading waits for a network, or where row groups are too small.
    """
    if source.remote or source.filtered or not columns:
        return frozenset()
    first = source.first_object()
    if first.size < LEAST_GROUP_BYTES or not _works():
        return frozenset()
    try:
        footer = _footer(first.uri, first.size, first.version)
        schema = source.schema()
        template = Template(pa.schema([schema.field(name) for name in columns]))
        stored = arrow_schema(footer)
    except (Refused, pa.ArrowException, OSError, DataError):  # the run will tell what is wrong with it
        return frozenset()
    there = footer.by_name
    fitting = frozenset(
        name for name in columns if template.takes(name, there.get(name)) and stored.field(name).equals(schema.field(name))
    )
    group = next((g for g, found in enumerate(footer.groups) if found.rows), -1)
    worth = group >= 0 and _fits(footer, group, [there[name].leaves for name in fitting], compression)
    return fitting if worth else frozenset()


@functools.cache
def _works() -> bool:
    """Is what pyarrow writes here understood in full?"""
    try:
        column = pa.concat_arrays([texts_to_array(["a"]), pa.nulls(1, pa.string())])
        source = encoded(pa.Table.from_arrays([column], names=["x"]), {})
        return source.footer.chunks(0)[0].values == 2
    except (Refused, pa.ArrowException, OSError):
        return False


def _fits(footer: Footer, group: int, leaves: Sequence[range], compression: Compression) -> bool:
    """Is the row group large enough to be kept, and are these of its chunks to be understood and compressed as asked?"""
    try:
        found = footer.chunks(group)
        chunks = [found[at] for span in leaves for at in span]
    except (Refused, IndexError, KeyError):
        return False
    if compression != "auto" and any(c.codec != compression for c in chunks):
        return False
    stored, rows = sum(c.stored_bytes for c in chunks), footer.groups[group].rows
    return stored >= max(LEAST_GROUP_BYTES, LEAST_CHUNK_BYTES * len(chunks)) and (
        rows >= LEAST_GROUP_ROWS or stored >= ENOUGH_GROUP_BYTES
    )


def _footer(uri: str, size: int, version: str) -> Footer:
    """Of a file that several splits share, it is parsed once. Raises Refused, DataError, InputChanged."""
    return _read_footer(uri, size, version) if version else _read_footer.__wrapped__(uri, size, version)


@functools.lru_cache(maxsize=4)
def _read_footer(uri: str, size: int, version: str) -> Footer:
    with closing(storage.open_reader(uri, size, version)) as reader:
        return read_footer(_Checked(reader), size, min(MOST_FOOTER_BYTES, max(LEAST_FOOTER_BYTES, size // FOOTER_SHARE)))


def template_of(schema: pa.Schema) -> Template:
    """Splits of one run share it."""
    return _template(schema.serialize().to_pybytes())


@functools.lru_cache(maxsize=16)
def _template(schema: bytes) -> Template:
    return Template(pa.ipc.read_schema(pa.py_buffer(schema)))


@functools.lru_cache(maxsize=16)
def _arrow_schema(empty: bytes) -> pa.Schema:
    import pyarrow.parquet as pq

    return pq.read_schema(pa.BufferReader(empty))


def arrow_schema(footer: Footer) -> pa.Schema:
    """As pyarrow reads it; files of one kind share the answer."""
    return _arrow_schema(footer_file(footer))


class _Checked:
    """An input's bytes, with the errors that its reader would raise."""

    def __init__(self, reader: storage.Reader) -> None:
        self._uri = reader.uri
        self._file = reader.native()

    def seek(self, position: int, whence: int = 0) -> int:
        return self._file.seek(position, whence)

    def read(self, nbytes: int | None = None) -> bytes:
        with self._explained():
            return self._file.read(nbytes)

    def readinto(self, b: Any) -> int:
        with self._explained():
            return self._file.readinto(b)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise DataError(f"reading failed: {e}", where=(("file", redact(self._uri)),)) from e


_Numbers = Any  # of rows, ascending: a range, or an array where some are missing


def _before(rows: _Numbers, stop: int) -> int:
    """How many of the numbers are less than `stop`."""
    if isinstance(rows, range):
        return max(0, min(len(rows), stop - rows[0]))
    return int(np.searchsorted(rows, stop))


class _Rows(Struct):
    """Rows of one input object. rows: where they are there."""

    uri: str
    rows: _Numbers
    batch: pa.RecordBatch

    def cut(self, stop: int) -> tuple[_Rows, _Rows | None]:
        """(those that come from before row `stop`, the others). An array of the former that is a range becomes one."""
        n = _before(self.rows, stop)
        rest = None if n >= len(self.rows) else _Rows(self.uri, self.rows[n:], self.batch.slice(n))
        rows = self.rows[:n]
        if not isinstance(rows, range) and bool((np.diff(rows) == 1).all()):
            rows = range(int(rows[0]), int(rows[0]) + n)
        return _Rows(self.uri, rows, self.batch.slice(0, n)), rest


def _runs(batch: pa.RecordBatch, origin: Origin) -> Iterator[_Rows]:
    """The rows of a block, by the input's segments that they come from."""
    if not origin.known:
        raise InternalError(f"it is not known which rows these are: {origin.label}")
    at = done = 0
    for segment in origin.segments:
        if origin.index is None:
            n = min(segment.rows, batch.num_rows - done)
            rows: _Numbers = range(segment.row, segment.row + n)
        else:
            n = int(np.searchsorted(origin.index, at + segment.rows)) - done
            rows = origin.index[done : done + n] - at + segment.row
        if n:
            yield _Rows(segment.uri, rows, batch.slice(done, n))
        done += n
        at += segment.rows


class _Group(Struct):
    """A row group of the input, rows [start, stop) of its file. whole: so far, all of its rows have come."""

    number: int
    start: int
    stop: int
    whole: bool


class _Input:
    """A fragment of a split that is open: for the chunks of its row groups, and for their rows."""

    def __init__(
        self, fragment: Fragment, source: ParquetSource, carried: Carried, schema: pa.Schema, compression: Compression
    ) -> None:
        self._fragment = fragment
        self._carried = carried
        self._source = source.project(tuple(dict.fromkeys(carried.sources.values())))
        self._compression: Compression = compression
        self._reader = storage.open_reader(fragment.uri, fragment.size_bytes, fragment.version)
        self._groups: GroupReader | None = None
        self._proving: GroupReader | None = None
        self._pieces: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._decoding = -1  # the row group that they are of
        self._piece: tuple[int, pa.RecordBatch | None] = 0, None
        self._leaves: list[range] = []
        self.chunks: Source | None = None
        try:
            rows = self._look(schema)
        except BaseException:
            self.close()
            raise
        ends = list(itertools.accumulate(rows))
        self._bounds = list(zip([0, *ends], ends, strict=False))

    def _look(self, schema: pa.Schema) -> list[int]:
        """The rows of each row group."""
        fragment = self._fragment
        try:
            footer = _footer(fragment.uri, fragment.size_bytes, fragment.version)
            if self._alike(footer, schema):
                self._leaves = [footer.by_name[name].leaves for name in self._carried.sources.values()]
                self.chunks = Source(_Checked(self._reader), fragment.size_bytes, footer)
        except (Refused, pa.ArrowException, OSError):  # what pyarrow says of a broken footer
            return self._opened().rows
        return [group.rows for group in footer.groups]

    def _alike(self, footer: Footer, schema: pa.Schema) -> bool:
        """Are all columns stored as pyarrow would store those of the output?"""
        stored, template = arrow_schema(footer), template_of(schema)
        return all(
            template.takes(name, footer.by_name.get(source)) and stored.field(source).with_name(name).equals(schema.field(name))
            for name, source in self._carried.sources.items()
        )

    def _opened(self) -> GroupReader:
        if self._groups is None:
            self._groups = GroupReader(self._source, self._fragment)
        return self._groups

    def holds(self, row: int) -> bool:
        spans = self._bounds[self._fragment.start : self._fragment.stop if self._fragment.stop >= 0 else None]
        return bool(spans) and spans[0][0] <= row < spans[-1][1]

    def group(self, row: int) -> _Group:
        """The row group that holds the row."""
        number = bisect.bisect_right(self._bounds, row, key=lambda span: span[1])
        start, stop = self._bounds[number]
        whole = self.chunks is not None and _fits(self.chunks.footer, number, self._leaves, self._compression)
        return _Group(number, start, stop, whole)

    def decoded(self, group: _Group, rows: _Numbers) -> Iterator[tuple[int, list[pa.Array]]]:
        """The carried columns of these rows, in parts: (how many of the rows, their columns)."""
        done = 0
        first, piece = self._piece
        if self._decoding != group.number or piece is None or rows[0] < first:
            self._pieces = self._opened().batches(group.number, group.start, BlockLimits())
            self._decoding, first, piece = group.number, group.start, None
        while done < len(rows):
            n = 0 if piece is None else _before(rows[done:], first + piece.num_rows)
            if piece is not None and n:
                yield n, self._taken(piece, first, rows[done : done + n])
                done += n
                continue
            found = next(self._pieces, None)
            if found is None:
                raise DataError("rows that were there are gone", where=(("file", redact(self._fragment.uri)),))
            self._piece = first, piece = found

    def _taken(self, piece: pa.RecordBatch, first: int, rows: _Numbers) -> list[pa.Array]:
        whole = isinstance(rows, range)
        taken = piece.slice(rows[0] - first, len(rows)) if whole else piece.take(numpy_to_array(rows - first))
        return [taken.column(name) for name in self._carried.sources.values()]

    def prove(self, group: _Group, columns: Sequence[str]) -> None:
        """Decode columns that nobody has read, and keep nothing: damage must not be passed on. Raises DataError."""
        if self._proving is None:
            self._proving = GroupReader(self._source.project(tuple(columns)), self._fragment)
        for _ in self._proving.batches(group.number, group.start, BlockLimits()):
            pass

    def check(self) -> None:
        """Raises InputChanged."""
        self._reader.check()

    def close(self) -> None:
        for reader in (self._groups, self._proving):
            if reader is not None:
                reader.close()
        self._reader.close()


class _SplicingEncoder(ParquetEncoder):
    """An encoder that takes row groups of other files beside the rows that it is given."""

    def __init__(self, path: str, schema: pa.Schema, sink: ParquetSink) -> None:
        super().__init__(path, schema, functools.partial(sink.encodings, schema))
        self._sink = sink
        self._chosen: dict[bool, dict[str, Any]] = {}  # of the writer: for whole rows, and for new columns alone
        self._out = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._splicer = Splicer(self._out, template_of(schema))

    def splice(self, rows: int, carried: Mapping[str, tuple[Source, int, str]], made: Sequence[pa.RecordBatch]) -> bool:
        """Add a row group. made: all of its rows, with the columns that are not carried. False: it can't be copied."""
        self._flush()
        columns = dict(carried)
        if made[0].num_columns:
            columns |= self._encoded(pa.Table.from_batches(made).combine_chunks(), made, whole=False)
        try:
            self._splicer.append(rows, columns)
        except Refused:
            return False
        return True

    def close(self) -> Written:
        try:
            self._flush()
            done = self._splicer.close()
        finally:
            self._out.close()
        return Written(done.bytes, done.digest)

    def _flush(self) -> None:
        if not self._held:
            return
        table = pa.Table.from_batches(self._held, self._schema)
        columns = self._encoded(table, self._held, whole=True)
        self._held, self._rows, self._bytes = [], 0, 0
        try:
            self._splicer.append(table.num_rows, columns)
        except Refused as e:
            raise InternalError(f"what was encoded here is not understood: {e}") from e

    def _encoded(self, table: pa.Table, rows: Sequence[pa.RecordBatch], *, whole: bool) -> dict[str, tuple[Source, int, str]]:
        if whole not in self._chosen:  # by the first rows of the file, as always
            self._chosen[whole] = self._sink.encodings(table.schema, rows)
        source = encoded(table, self._chosen[whole])
        return {name: (source, 0, name) for name in table.schema.names}


class CarryingSplitWriter(FileSplitWriter):
    """See CarryingWriter."""

    def __init__(self, sink: ParquetSink, split: Split, attempt: int, carried: Carried, source: ParquetSource) -> None:
        super().__init__(sink, split, attempt)
        self._parquet = sink
        self._carried = carried
        self._source = source
        self._fragments = split.fragments
        self._fragment = -1  # the place of the one that is open, or was last
        self._input: _Input | None = None
        self._group: _Group | None = None
        self._next = 0  # the row of the input after the last one
        self._waiting: list[_Rows] = []  # of the row group, all of its rows so far
        self._waiting_bytes = 0
        self._unread: list[str] = []  # columns of the input that will be copied, and that no block has
        self._copies = worth_copying(split)

    def write_rows(self, batch: pa.RecordBatch, origin: Origin) -> None:
        if not batch.num_rows:
            return
        if self._copies and self._fits(batch.schema):
            for rows in _runs(batch, origin):
                left: _Rows | None = rows
                while left is not None:
                    group = self._at(left.uri, int(left.rows[0]))
                    now, left = left.cut(group.stop)
                    self._take(group, now)
            return
        self._settle()
        self._copies = False
        place = self._fragment, self._next
        try:
            self.write(self._completed(batch, origin))
        except SchemaConflict:  # the rows come again, in parts
            if self._fragment != place[0]:
                self._leave_input()
            self._fragment, self._next = place
            raise

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        self._settle()
        self._leave_input()
        return super().close(lineage)

    def abort(self) -> None:
        if self._input is not None:
            quietly(self._input.close)
            self._input = None
        super().abort()

    # --- the file

    def _fits(self, schema: pa.Schema) -> bool:
        """Is the file one of such rows? Begins it. Otherwise new columns are not what they were, and the file gets wider."""
        full = self._full(schema)
        if self._schema is None:
            try:
                self._sink._refuse(full)
            except PlanError as e:
                raise DataError(e.message, where=(("output", self._name), *e.where), hint=e.hint) from e
            self._begin(full, None)
        return full.equals(self._schema)

    def _full(self, schema: pa.Schema) -> pa.Schema:
        """The output's schema where the rows that come have this one."""
        there, given = set(schema.names), self._source.schema()
        fields: list[pa.Field] = []
        for name in self._carried.names or ():
            if name in self._carried.sources:
                fields.append(given.field(self._carried.sources[name]).with_name(name))
            elif name in there:
                fields.append(schema.field(name))
        known = set(self._carried.names or ())
        return pa.schema([*fields, *(f for f in schema if f.name not in known)])

    def _begin(self, schema: pa.Schema, sample: pa.RecordBatch | None) -> None:
        if not self._copies:
            super()._begin(schema, sample)
            return
        self._schema = schema
        try:
            self._path = self._there.begin(self._staged)
            self._encoder = _SplicingEncoder(self._path, schema, self._parquet)
        except OSError as e:
            raise disk_error(e, self._path) from e

    # --- where the rows come from

    def _at(self, uri: str, row: int) -> _Group:
        """The row group of the input that the next row comes from."""
        if self._input is None or self._fragments[self._fragment].uri != uri or row < self._next or not self._input.holds(row):
            self._find(uri, row)
        assert self._input is not None
        if self._group is None or not self._group.start <= row < self._group.stop:
            self._settle()
            self._group = self._input.group(row)
        return self._group

    def _find(self, uri: str, row: int) -> None:
        """Open the next fragment that holds the row; or this one again."""
        self._settle()
        again = self._input is None and self._fragment >= 0 and row >= self._next
        self._leave_input()
        for place in range(self._fragment + (0 if again else 1), len(self._fragments)):
            if self._fragments[place].uri == uri:
                assert self._schema is not None
                found = _Input(self._fragments[place], self._source, self._carried, self._schema, self._parquet.compression)
                if found.holds(row):
                    self._input, self._fragment, self._next = found, place, row
                    return
                found.close()
        raise InternalError(f"row {row} of {redact(uri)} is none of the split's")

    def _leave_input(self) -> None:
        self._group = None
        if self._input is not None:
            try:
                self._input.check()
            finally:
                self._input.close()
                self._input = None

    # --- what becomes of them

    def _take(self, group: _Group, rows: _Rows) -> None:
        """Rows of one row group: they wait until it is whole, unless it can't be any more."""
        expected = group.start if not self._waiting else self._next
        self._next = int(rows.rows[-1]) + 1
        if not group.whole or rows.rows[0] != expected or not isinstance(rows.rows, range):
            group.whole = False
            self._settle()
            self._write_decoded(group, rows)
            return
        there = set(rows.batch.schema.names)
        self._unread = [source for name, source in self._carried.sources.items() if name not in there]
        self._wait(group, rows, [name for name in rows.batch.schema.names if name not in self._carried.sources])

    def _wait(self, group: _Group, rows: _Rows, new: list[str]) -> None:
        """The next rows of a group that is whole so far. new: columns that are not carried."""
        self._next = int(rows.rows[-1]) + 1
        made = rows.batch.select(new)
        self._waiting.append(_Rows(rows.uri, rows.rows, made))
        self._waiting_bytes += made.nbytes
        if self._next == group.stop:
            self._splice(group)
        elif self._waiting_bytes > HELD_BYTES:
            self._settle()

    def _splice(self, group: _Group) -> None:
        """The row group is whole."""
        assert self._input is not None
        assert self._input.chunks is not None
        if not isinstance(self._encoder, _SplicingEncoder):
            raise InternalError("the file takes no chunks")
        rows = group.stop - group.start
        carried = {name: (self._input.chunks, group.number, source) for name, source in self._carried.sources.items()}
        if self._unread:
            self._input.prove(group, self._unread)
        try:
            copied = self._encoder.splice(rows, carried, [w.batch for w in self._waiting])
        except pa.ArrowException as e:
            raise DataError(f"the rows can't be written as parquet: {e}", where=(("output", self._name),)) from e
        except OSError as e:
            self.abort()
            raise disk_error(e, self._path) from e
        if copied:
            self._input.check()
            self._waiting, self._waiting_bytes = [], 0
            self._rows += rows
        else:
            self._settle()

    def _settle(self) -> None:
        """Write the rows that wait for a row group which will not be whole."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if waiting:
            assert self._group is not None
            self._group.whole = False
            for rows in waiting:
                self._write_decoded(self._group, rows)

    def _write_decoded(self, group: _Group, rows: _Rows) -> None:
        for batch in self._decoded(group, rows):
            self.write(batch)

    def _decoded(self, group: _Group, rows: _Rows) -> Iterator[pa.RecordBatch]:
        """The rows with all columns."""
        schema = self._full(rows.batch.schema)
        there = set(rows.batch.schema.names)
        if all(name in there for name in schema.names):
            yield pa.RecordBatch.from_arrays([rows.batch.column(name) for name in schema.names], schema=schema)
            return
        assert self._input is not None
        at = 0
        for n, columns in self._input.decoded(group, rows.rows):
            part = rows.batch.slice(at, n)
            carried = dict(zip(self._carried.sources, columns, strict=True))
            arrays = [carried[name] if name in carried else part.column(name) for name in schema.names]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
            at += n

    def _completed(self, batch: pa.RecordBatch, origin: Origin) -> pa.RecordBatch:
        """The rows with all columns, as one batch."""
        there = set(batch.schema.names)
        if all(name in there for name in self._carried.sources):
            return batch
        if self._schema is None:
            raise InternalError("columns are missing that no file was begun for")
        out: list[pa.RecordBatch] = []
        for rows in _runs(batch, origin):
            left: _Rows | None = rows
            while left is not None:
                group = self._at(left.uri, int(left.rows[0]))
                now, left = left.cut(group.stop)
                self._next = int(now.rows[-1]) + 1
                out += self._decoded(group, now)
        return pa.concat_batches(out)


class GivenBackWriter(CarryingSplitWriter):
    """Of rows that a function made, which gives some of its columns back as it got them: the first rows tell which. Where it
    does not do so with later ones, nothing is copied from there on.
    """

    def __init__(self, sink: ParquetSink, split: Split, attempt: int, carried: Carried, source: ParquetSource) -> None:
        super().__init__(sink, split, attempt, carried, source)
        self._possible = carried.sources
        self._kept: tuple[str, ...] = ()
        self._new: list[str] = []

    def write_rows(self, batch: pa.RecordBatch, origin: Origin) -> None:
        if not batch.num_rows:
            return
        if self._schema is None:
            sources = self._given_back(batch.schema, origin.kept)
            self._carried = Carried(tuple(batch.schema.names), sources)
            self._copies = self._copies and bool(sources)
            self._kept, self._new = origin.kept, [name for name in batch.schema.names if name not in sources]
        elif (group := self._continued(batch, origin)) is not None:
            (segment,) = origin.segments
            self._wait(group, _Rows(segment.uri, range(segment.row, segment.row + segment.rows), batch), self._new)
            return
        if self._copies and self._carried.sources.keys() <= set(origin.kept):
            super().write_rows(batch, Origin(origin.segments))  # what is copied of them is exactly that
            return
        self._settle()
        self._copies = False
        self.write(batch)

    def _given_back(self, schema: pa.Schema, kept: Sequence[str]) -> dict[str, str]:
        """Columns to take from the input: a function's columns may have nulls, and are of one type with those that may, too."""
        given = self._source.schema()
        sources = {name: self._possible[name] for name in kept if name in self._possible}
        return {n: source for n, source in sources.items() if given.field(source).with_name(n).equals(schema.field(n))}

    def _continued(self, batch: pa.RecordBatch, origin: Origin) -> _Group | None:
        """The group at work, where the rows are just the next ones of it. (A function's batches are small: most end here.)"""
        group = self._group
        if group is None or not self._waiting or origin.kept != self._kept or len(origin.segments) != 1:
            return None
        (segment,) = origin.segments
        next_one = segment.row == self._next and segment.row + segment.rows <= group.stop
        same = segment.uri == self._fragments[self._fragment].uri and batch.schema.equals(self._schema)
        return group if next_one and same and self._copies and group.whole else None

    def _full(self, schema: pa.Schema) -> pa.Schema:
        if self._schema is None:
            return schema.remove_metadata()
        begun, there = self._schema, set(schema.names)
        carried = (begun.field(name) for name in self._carried.sources if name not in there)
        fields = {f.name: f for f in (*schema, *carried)}
        order = [name for name in begun.names if name in fields]
        return pa.schema([fields[name] for name in (*order, *(n for n in fields if n not in begun.names))])
