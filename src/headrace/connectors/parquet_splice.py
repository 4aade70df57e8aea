"""Parquet files put together from column chunks: those of other files, copied as they are, beside those of new columns.

Invariants: the schema, Arrow's included, is that of a file which pyarrow itself writes; a row group is there whole or not at
all; of a chunk that is copied, every page is found by its header, the values add up, and PIECE_BYTES at most are in memory;
nothing is copied of which the footer or the pages leave a doubt (Refused).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import IO, Any, Protocol

import pyarrow as pa
from msgspec import Struct

from headrace.connectors.parquet_footer import (
    MAGIC,
    TAIL_BYTES,
    Chunk,
    Column,
    Footer,
    Page,
    Refused,
    group_of,
    page_at,
)
from headrace.core.splits import Split

# Readers skip and divide by row groups, and pay for each: smaller ones are better decoded, to join others.
LEAST_GROUP_BYTES = 1 << 20  # stored, of the columns that are copied
LEAST_GROUP_ROWS = 5_000
ENOUGH_GROUP_BYTES = 8 << 20  # however few the rows
LEAST_CHUNK_BYTES = 32 << 10  # on the average: moving a chunk takes 0.15 ms of Python, in which as much is decoded and encoded

PIECE_BYTES = 4 << 20
MOST_HEADER_BYTES = 4 << 20  # of a page; statistics of long values are in it
USUAL_HEADER_BYTES = 256
FOOTER_GUESS_BYTES = 64 << 10


def worth_copying(split: Split) -> bool:
    """Are the split's inputs whole row groups, and large enough on the average? Who reads it and who writes it must agree."""
    large = split.bytes >= LEAST_GROUP_BYTES * max(1, len(split.fragments))
    return large and not any(fragment.by_rows for fragment in split.fragments)


class Bytes(Protocol):
    """A file: what `pa.NativeFile` and `pa.BufferReader` offer."""

    def seek(self, position: int, whence: int = 0) -> int: ...

    def read(self, nbytes: int | None = None) -> bytes: ...

    def readinto(self, b: Any) -> int: ...


class SplicedFile(Struct, frozen=True):
    """A whole file. digest: SHA-256."""

    bytes: int
    digest: str


def read_footer(file: Bytes, size: int, most_bytes: int = 1 << 62) -> Footer:
    """Raises Refused for a file that is none of Parquet's, not one that is understood, or with a footer longer than that."""
    tail = _read(file, max(0, size - FOOTER_GUESS_BYTES), min(size, FOOTER_GUESS_BYTES))
    if len(tail) < TAIL_BYTES + len(MAGIC) or tail[-4:] != MAGIC:
        raise Refused("the file does not end as Parquet does")
    length = int.from_bytes(tail[-TAIL_BYTES:-4], "little")
    if length + TAIL_BYTES + len(MAGIC) > size or length > most_bytes:
        raise Refused("the footer is too long")
    if length + TAIL_BYTES > len(tail):
        return Footer(_read(file, size - TAIL_BYTES - length, length))
    return Footer(tail[len(tail) - TAIL_BYTES - length : len(tail) - TAIL_BYTES])


def footer_file(footer: Footer) -> bytes:
    """An empty file of the same schema."""
    data = footer.with_groups([], 0)
    return b"".join((MAGIC, data, len(data).to_bytes(4, "little"), MAGIC))


def encoded(table: pa.Table, arguments: Mapping[str, Any]) -> Source:
    """The rows as a row group in memory. arguments: of pyarrow's writer."""
    import pyarrow.parquet as pq

    out = pa.BufferOutputStream()
    with pq.ParquetWriter(out, table.schema, **arguments) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
    data = out.getvalue()
    return Source(pa.BufferReader(data), data.size)


class Source:
    """A file whose chunks are copied. Raises Refused."""

    def __init__(self, file: Bytes, size: int, footer: Footer | None = None) -> None:
        self.file = file
        self.size = size
        self.footer = footer or read_footer(file, size)


class Template:
    """The metadata of an empty file which pyarrow writes with this schema."""

    def __init__(self, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        empty = pa.BufferOutputStream()
        pq.ParquetWriter(empty, schema).close()
        data = empty.getvalue()
        self.footer = read_footer(pa.BufferReader(data), data.size)

    def takes(self, name: str, column: Column | None) -> bool:
        """Could the chunks of another file's column be those of column `name`?"""
        mine = self.footer.by_name.get(name)
        return column is not None and mine is not None and mine.layout == column.layout


class Splicer:
    """A file in the making, at `out`: empty, open for writing, and cut back where a row group is given up."""

    def __init__(self, out: IO[bytes], template: Template) -> None:
        self.template = template
        self._out = out
        self._at = 0
        self._digest = hashlib.sha256()
        self._groups: list[bytes] = []
        self._rows = 0
        self._piece = memoryview(b"")  # what chunks are copied by way of: new memory for each would cost as much as the copy
        self._write(MAGIC)

    def append(self, rows: int, columns: Mapping[str, tuple[Source, int, str]]) -> None:
        """Add a row group. columns: for each of the schema's, where it comes from: file, row group, name there.

        Raises Refused, and has then done nothing.
        """
        start, digest = self._at, self._digest.copy()
        try:
            chunks: list[bytes] = []
            moved: list[Chunk] = []
            for column in self.template.footer.columns:
                source, group, name = columns[column.name]
                if source.footer.groups[group].rows != rows:
                    raise Refused("the row groups differ in length")
                found = source.footer.chunks(group)
                from_column = source.footer.by_name[name]
                if from_column.layout != column.layout:
                    raise Refused(f"column {name!r} is stored in another way")
                for leaf, at in zip(column.leaves, from_column.leaves, strict=True):
                    chunk = found[at]
                    chunks.append(self._copy(source, chunk, rows, leaf))
                    moved.append(chunk)
        except BaseException as e:
            self._out.seek(start)
            self._out.truncate()
            self._at, self._digest = start, digest
            if isinstance(e, (IndexError, KeyError)):
                raise Refused("the metadata end too early") from e
            raise
        self._groups.append(group_of(chunks, moved, rows, start, len(self._groups)))
        self._rows += rows

    def close(self) -> SplicedFile:
        footer = self.template.footer.with_groups(self._groups, self._rows)
        self._write(footer + len(footer).to_bytes(4, "little") + MAGIC)
        return SplicedFile(self._at, self._digest.hexdigest())

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._out.write(data)
        self._at += len(data)

    def _copy(self, source: Source, chunk: Chunk, rows: int, leaf: int) -> bytes:
        """Copy a chunk's bytes; its metadata in this file."""
        start = self._at
        if chunk.start + chunk.stored_bytes > source.size:
            raise Refused("a chunk ends after its file")
        flat = not self.template.footer.leaves[leaf].repeated
        if flat and chunk.values != rows:
            raise Refused("a chunk has not as many values as rows")
        pages = _Pages()
        source.file.seek(chunk.start)
        left = chunk.stored_bytes
        if len(self._piece) < min(left, PIECE_BYTES):
            self._piece = memoryview(bytearray(PIECE_BYTES))
        while left:
            n = source.file.readinto(self._piece[: min(left, PIECE_BYTES)])
            if not n:
                raise Refused("a chunk ends before its time")
            piece = self._piece[:n]
            left -= n
            pages.see(piece)
            self._write(piece)
        pages.end(chunk.values)
        return chunk.moved(
            start, start + pages.first_data, self.template.footer.leaves[leaf].path, trusted=source.footer.trusted
        )


class _Pages:
    """Walks over a chunk's pages as its bytes go by."""

    def __init__(self) -> None:
        self.first_data = -1  # where the first data page begins
        self._values = 0
        self._dictionary = False
        self._at = 0
        self._head = b""  # of a page, as long as it is not whole
        self._body = 0  # bytes of the page that are still to come

    def see(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            if self._body:
                taken = min(self._body, len(data) - at)
                self._body -= taken
                at += taken
                continue
            page = _page(self._head + data[at : at + USUAL_HEADER_BYTES]) or _page(self._head + data[at:])
            if page is None:
                self._head += data[at:]
                if len(self._head) > MOST_HEADER_BYTES:
                    raise Refused("a page has no end to its header")
                break
            self._count(page, self._at + at - len(self._head))
            at += page.header_bytes - len(self._head)
            self._head, self._body = b"", page.body_bytes
        self._at += len(data)

    def end(self, values: int) -> None:
        """Raises Refused if the pages are not what the chunk's metadata say."""
        if self._head or self._body or self.first_data < 0 or self._values != values:
            raise Refused("a chunk's pages are not what its metadata say")

    def _count(self, page: Page, begun: int) -> None:
        if page.dictionary:
            if self._dictionary or self.first_data >= 0:
                raise Refused("a dictionary comes too late")
            self._dictionary = True
            return
        if self.first_data < 0:
            self.first_data = begun
        self._values += page.values


def _page(head: bytes) -> Page | None:
    """None: the header is longer."""
    try:
        return page_at(head)
    except IndexError:
        return None


def _read(file: Bytes, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise Refused("the file ends too early")
    return data
