"""Parquet footers read and written field by field, so that column chunks can move to another file as they are.

pyarrow reads footers, but can neither move a chunk nor say what it does not know. Here lives Thrift's compact protocol, as far
as Parquet uses it, and the little of Parquet's metadata that moving takes (parquet.thrift in apache/parquet-format).

Invariants: a value that is not looked at stays the bytes that it was; whatever is not understood raises Refused, and nothing is
guessed. No I/O.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from msgspec import Struct, field

MAGIC = b"PAR1"
TAIL_BYTES = 8  # the footer's length and the magic

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)
_MOST_DEPTH = 64

Fields = dict[int, tuple[int, bytes]]  # of a struct: id -> (type, the value's bytes)


class Refused(Exception):
    """The file, or a part of it, is none that can be moved. It may be fine all the same: ordinary readers will tell."""


# --- the compact protocol --------------------------------------------------------------------------------------------


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise Refused("a number has more than 64 bits")


def _skip(data: bytes, at: int, kind: int, depth: int = 0) -> int:
    """Where the value that begins at `at` ends. Numbers and strings in structs are most of all, and not worth a call."""
    if kind == STRUCT:
        if depth > _MOST_DEPTH:
            raise Refused("structs are nested too deeply")
        while head := data[at]:
            at += 1
            if head < 0x10:  # the field's id in full
                while data[at] >= 0x80:
                    at += 1
                at += 1
            kind = head & 0x0F
            if I16 <= kind <= I64:
                while data[at] >= 0x80:
                    at += 1
                at += 1
            elif kind == BINARY:
                size, at = (data[at], at + 1) if data[at] < 0x80 else varint(data, at)
                at += size
            elif kind > FALSE:
                at = _skip(data, at, kind, depth + 1)
        return at + 1
    if kind in (LIST, SET):
        if depth > _MOST_DEPTH:
            raise Refused("lists are nested too deeply")
        element, count, at = _list_head(data, at)
        if count > len(data) - at:  # each takes a byte at least: else a damaged number would keep us busy
            raise IndexError(at)
        for _ in range(count):
            at = _skip(data, at, element, depth + 1)
        return at
    if I16 <= kind <= I64:
        while data[at] >= 0x80:
            at += 1
        return at + 1
    if kind == BINARY:
        size, at = varint(data, at)
        return at + size
    if kind in (TRUE, FALSE, I8):  # a boolean in a list takes a byte
        return at + 1
    if kind == DOUBLE:
        return at + 8
    if kind == UUID:
        return at + 16
    if kind == MAP:
        count, at = varint(data, at)
        if count:
            kinds = data[at]
            at += 1
            if 2 * count > len(data) - at:
                raise IndexError(at)
            for _ in range(count):
                at = _skip(data, _skip(data, at, kinds >> 4, depth + 1), kinds & 0x0F, depth + 1)
        return at
    raise Refused(f"a value of unknown type {kind}")


def _list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """(type of the elements, their number, where the first begins)."""
    head = data[at]
    if head < 0xF0:
        return head & 0x0F, head >> 4, at + 1
    count, at = varint(data, at + 1)
    return head & 0x0F, count, at


def struct_at(data: bytes, at: int = 0) -> tuple[Fields, int]:
    """(the fields of a struct, where it ends). Raises Refused, or IndexError where the data end too early."""
    fields: Fields = {}
    id = 0
    while head := data[at]:
        at += 1
        kind = head & 0x0F
        if head < 0x10:
            raw, at = varint(data, at)
            id = (raw >> 1) ^ -(raw & 1)
        else:
            id += head >> 4
        end = at
        if I16 <= kind <= I64:
            while data[end] >= 0x80:
                end += 1
            end += 1
        elif kind > FALSE:
            end = _skip(data, at, kind)
        if end > len(data):
            raise IndexError(end)
        if id in fields:
            raise Refused("a struct has a field twice")
        fields[id] = (kind, data[at:end])
        at = end
    return fields, at + 1


def structs(raw: bytes) -> Iterator[Fields]:
    """The elements of a list of structs."""
    element, count, at = _list_head(raw, 0)
    if element != STRUCT and count:
        raise Refused("a list of structs holds something else")
    for _ in range(count):
        fields, at = struct_at(raw, at)
        yield fields


def number(fields: Mapping[int, tuple[int, bytes]], id: int, default: int | None = None) -> int:
    """An integer. Raises Refused if it is missing and there is no default."""
    found = fields.get(id)
    if found is None:
        if default is None:
            raise Refused(f"field {id} is missing")
        return default
    if found[0] == I8:
        return found[1][0]
    raw, _ = varint(found[1], 0)
    return (raw >> 1) ^ -(raw & 1)


def text(fields: Mapping[int, tuple[int, bytes]], id: int) -> str:
    """A string; "" if it is missing."""
    found = fields.get(id)
    if found is None:
        return ""
    _, at = varint(found[1], 0)
    return found[1][at:].decode("utf-8", "surrogateescape")


def flag(fields: Mapping[int, tuple[int, bytes]], id: int) -> bool:
    return id in fields and fields[id][0] == TRUE


def part(fields: Mapping[int, tuple[int, bytes]], id: int) -> Fields:
    """A struct in a struct; {} if it is missing."""
    found = fields.get(id)
    return {} if found is None else struct_at(found[1])[0]


_BYTES = [bytes([value]) for value in range(256)]


def put_varint(value: int) -> bytes:
    if 0 <= value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def put_number(value: int) -> bytes:
    return put_varint(value << 1 if value >= 0 else (-value << 1) - 1)


def put_text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return put_varint(len(raw)) + raw


def put_list(kind: int, values: Sequence[bytes]) -> bytes:
    size = len(values)
    head = bytes([size << 4 | kind]) if size < 15 else bytes([0xF0 | kind]) + put_varint(size)
    return head + b"".join(values)


def put_struct(fields: Mapping[int, tuple[int, bytes]]) -> bytes:
    out: list[bytes] = []
    last = 0
    for id in sorted(fields):
        kind, raw = fields[id]
        step = id - last
        out.append(_BYTES[step << 4 | kind] if 0 < step < 16 else _BYTES[kind] + put_number(id))
        out.append(raw)
        last = id
    out.append(b"\0")
    return b"".join(out)


# --- Parquet's metadata ----------------------------------------------------------------------------------------------

# FileMetaData
_VERSION, _SCHEMA, _ROWS, _GROUPS, _KEY_VALUES, _CREATED_BY, _COLUMN_ORDERS, _ENCRYPTION, _SIGNING_KEY = range(1, 10)
# RowGroup
_COLUMNS, _TOTAL_BYTES, _GROUP_ROWS, _SORTING, _FILE_OFFSET, _COMPRESSED_BYTES, _ORDINAL = range(1, 8)
# ColumnChunk: besides file_path, file_offset and meta_data come the page indexes (4 to 7) and encryption (8, 9)
_FILE_PATH, _CHUNK_OFFSET, _META = range(1, 4)
_CHUNK_KNOWN, _CHUNK_REFUSED = frozenset(range(1, 10)), (_FILE_PATH, 8, 9)
# ColumnMetaData
_TYPE, _ENCODINGS, _PATH, _CODEC, _VALUES, _SIZE, _STORED, _META_KEYS, _DATA, _INDEX, _DICTIONARY, _STATISTICS = range(1, 13)
_BLOOM, _BLOOM_BYTES, _LAST_KNOWN = 14, 15, 17
# SchemaElement
_PHYSICAL, _LENGTH, _REPETITION, _NAME, _CHILDREN, _CONVERTED, _SCALE, _PRECISION, _FIELD_ID, _LOGICAL = range(1, 11)
REPEATED, _FIXED_LENGTH = 2, 7

CODECS = {0: "none", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}  # 3 and 5 (LZO, LZ4) differ by writer

_EARLY = re.compile(r"parquet-mr version 1\.\d\.|parquet-cpp version|impala version [0-3]\.")  # whose minima are in doubt

_STRING, _DECIMAL, _DATE, _TIME, _TIMESTAMP, _INTEGER = 1, 5, 6, 7, 8, 10
_Kind = tuple[object, ...]
_CONVERTED_KINDS: dict[int, _Kind] = {
    0: (_STRING,),
    4: (4,),
    6: (_DATE,),
    7: (_TIME, True, 1),
    8: (_TIME, True, 2),
    9: (_TIMESTAMP, True, 1),
    10: (_TIMESTAMP, True, 2),
    **{11 + i: (_INTEGER, 8 << i, False) for i in range(4)},
    **{15 + i: (_INTEGER, 8 << i, True) for i in range(4)},
    19: (12,),
    20: (13,),
}


class Leaf(Struct, frozen=True):
    """A column of chunks. path: names from the top-level field down. repeated: a row may have several values or none."""

    path: tuple[str, ...]
    repeated: bool


class Column(Struct, frozen=True):
    """A top-level field. layout: all that tells how the bytes of its chunks are read; names do not. leaves: their numbers."""

    name: str
    layout: tuple[object, ...]
    leaves: range


class Group(Struct, frozen=True):
    """A row group."""

    rows: int
    fields: Fields


class Chunks(Struct, frozen=True):
    """Of a row group, one for each leaf. fields: as they are stored."""

    fields: list[Fields]
    known: dict[int, Chunk] = field(default_factory=dict[int, "Chunk"])

    def __getitem__(self, leaf: int) -> Chunk:
        """Raises Refused for one that can't be moved, IndexError."""
        found = self.known.get(leaf)
        if found is None:
            found = self.known[leaf] = Chunk.of(self.fields[leaf])
        return found


class Footer:
    """A file's metadata. Raises Refused for what is encrypted, of an unknown version, or not understood."""

    def __init__(self, data: bytes) -> None:
        try:
            self.fields, end = struct_at(data)
            if end != len(data) and any(data[end:]):
                raise Refused("something follows the metadata")
            if _ENCRYPTION in self.fields or _SIGNING_KEY in self.fields:
                raise Refused("the file is encrypted or signed")
            if number(self.fields, _VERSION) not in (1, 2):
                raise Refused("the format's version is unknown")
            self.elements = tuple(structs(self.fields[_SCHEMA][1]))
            self.leaves, self.columns = _tree(self.elements)
            self.groups = tuple(Group(number(g, _GROUP_ROWS), g) for g in structs(self.fields[_GROUPS][1]))
            self._last = -1, Chunks([])
        except (IndexError, KeyError, ValueError, RecursionError) as e:
            raise Refused("the metadata are damaged") from e

    def chunks(self, group: int) -> Chunks:
        """Those of the row group that was asked for last are kept: of all of a large file they would take hundreds of MB."""
        number, chunks = self._last
        if number != group:
            chunks = Chunks(list(structs(self.groups[group].fields[_COLUMNS][1])))
            self._last = group, chunks
        return chunks

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """Top-level fields whose name is no other's."""
        times = Counter(column.name for column in self.columns)
        return {column.name: column for column in self.columns if times[column.name] == 1}

    @cached_property
    def trusted(self) -> bool:
        """Are minima and maxima ordered as they should be? Readers tell by who wrote the file, and a chunk that moves has
        another writer from then on.
        """
        orders = self.fields.get(_COLUMN_ORDERS)
        if orders is None or any(1 not in order for order in structs(orders[1])):
            return False
        writer = text(self.fields, _CREATED_BY)
        return bool(writer) and _EARLY.match(writer) is None

    def with_groups(self, groups: Sequence[bytes], rows: int) -> bytes:
        """The same metadata, of other row groups."""
        return put_struct({**self.fields, _ROWS: (I64, put_number(rows)), _GROUPS: (LIST, put_list(STRUCT, groups))})


def _tree(elements: Sequence[Fields]) -> tuple[tuple[Leaf, ...], tuple[Column, ...]]:
    """Leaves and top-level fields of a schema, which is a tree in depth-first order."""
    leaves: list[Leaf] = []

    def walk(at: int, path: tuple[str, ...], repeated: bool, layout: list[object]) -> int:
        element = elements[at]
        path = (*path, text(element, _NAME))
        repetition, children = number(element, _REPETITION, 0), number(element, _CHILDREN, 0)
        repeated = repeated or repetition == REPEATED
        physical = number(element, _PHYSICAL, -1)
        length = number(element, _LENGTH, 0) if physical == _FIXED_LENGTH else 0  # some name one where none is needed
        layout.append((repetition, children, physical, length))
        at += 1
        if children:
            for _ in range(children):
                at = walk(at, path, repeated, layout)
        elif _PHYSICAL in element:
            layout.append(_kind(element))
            leaves.append(Leaf(path, repeated))
        return at

    columns: list[Column] = []
    at = 1
    for _ in range(number(elements[0], _CHILDREN, 0)):
        first, layout, name = len(leaves), list[object](), text(elements[at], _NAME)
        at = walk(at, (), False, layout)
        columns.append(Column(name, tuple(layout), range(first, len(leaves))))
    if at != len(elements):
        raise Refused("the schema is no tree")
    return tuple(leaves), tuple(columns)


def _kind(element: Fields) -> _Kind:
    """What the values of a leaf mean, in one form for old and new annotations; () for nothing beyond the physical type."""
    kind: _Kind
    if _LOGICAL in element:
        ((id, (_, raw)),) = part(element, _LOGICAL).items() or ((0, (0, b"")),)
        inner = struct_at(raw)[0] if raw else {}
        if id in (_TIME, _TIMESTAMP):
            kind = (id, flag(inner, 1), next(iter(part(inner, 2)), 0))
        elif id == _INTEGER:
            kind = (id, number(inner, 1), flag(inner, 2))
        elif id == _DECIMAL:
            kind = (id, number(inner, 1), number(inner, 2))
        else:
            kind = (id,) if not inner else (id, raw)
    elif _CONVERTED in element:
        converted = number(element, _CONVERTED)
        if converted == _DECIMAL:
            kind = (_DECIMAL, number(element, _SCALE, 0), number(element, _PRECISION, 0))
        else:
            kind = _CONVERTED_KINDS.get(converted, ("converted", converted))
    else:
        kind = ()
    plain = kind == (_INTEGER, 32, True) or kind == (_INTEGER, 64, True)  # the physical type says as much
    return () if plain else kind


# --- chunks ----------------------------------------------------------------------------------------------------------


class Chunk(Struct, frozen=True):
    """A column chunk that can be moved: bytes [start, start + stored_bytes) of its file. values: with nulls. codec: a name."""

    start: int
    stored_bytes: int
    bytes: int
    values: int
    codec: str
    meta: Fields

    @classmethod
    def of(cls, fields: Fields) -> Chunk:
        """Raises Refused for one that lies in another file, is encrypted, or has fields that may hold an offset."""
        try:
            if not fields.keys() <= _CHUNK_KNOWN or any(id in fields for id in _CHUNK_REFUSED):
                raise Refused("the chunk is in another file, encrypted, or of a kind that is not known")
            meta = part(fields, _META)
            if not meta or max(meta) > _LAST_KNOWN or _INDEX in meta:
                raise Refused("the chunk's metadata are missing, or not known in full")
            codec = CODECS.get(number(meta, _CODEC))
            if codec is None:
                raise Refused("the codec is not known")
            start = data = number(meta, _DATA)
            dictionary = number(meta, _DICTIONARY, 0)
            if 0 < dictionary < data:
                start = dictionary
            size = number(meta, _STORED)
            values = number(meta, _VALUES)
            if start < len(MAGIC) or size <= 0 or values < 0:
                raise Refused("the chunk's place is no place")
            return cls(start, size, number(meta, _SIZE), values, codec, meta)
        except IndexError as e:
            raise Refused("the chunk's metadata end too early") from e

    def moved(self, start: int, data: int, path: Sequence[str], *, trusted: bool) -> bytes:
        """The ColumnChunk for the same bytes from `start` on, their first data page at `data`. Page indexes and bloom filters
        stay behind. path: of the leaf. trusted: keep minima and maxima.
        """
        meta = {id: value for id, value in self.meta.items() if id not in (_DICTIONARY, _BLOOM, _BLOOM_BYTES)}
        meta[_PATH] = (LIST, put_list(BINARY, [put_text(name) for name in path]))
        meta[_DATA] = (I64, put_number(data))
        if data > start:
            meta[_DICTIONARY] = (I64, put_number(start))
        if _STATISTICS in meta:
            kept = _statistics(part(meta, _STATISTICS), trusted)
            del meta[_STATISTICS]
            if kept:
                meta[_STATISTICS] = (STRUCT, put_struct(kept))
        return put_struct({_CHUNK_OFFSET: (I64, put_number(0)), _META: (STRUCT, put_struct(meta))})


def _statistics(fields: Fields, trusted: bool) -> Fields:
    """Null and distinct counts; if trusted, minima and maxima: 5 to 8, not the old 1 and 2, whose order nobody knows."""
    return {id: value for id, value in fields.items() if id in (3, 4) or (trusted and 5 <= id <= 8)}


def group_of(chunks: Sequence[bytes], moved: Sequence[Chunk], rows: int, start: int, ordinal: int) -> bytes:
    """A RowGroup."""
    fields: Fields = {
        _COLUMNS: (LIST, put_list(STRUCT, chunks)),
        _TOTAL_BYTES: (I64, put_number(sum(c.bytes for c in moved))),
        _GROUP_ROWS: (I64, put_number(rows)),
        _FILE_OFFSET: (I64, put_number(start)),
        _COMPRESSED_BYTES: (I64, put_number(sum(c.stored_bytes for c in moved))),
    }
    if ordinal < 1 << 15:
        fields[_ORDINAL] = (I16, put_number(ordinal))
    return put_struct(fields)


# --- pages -----------------------------------------------------------------------------------------------------------

_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)


class Page(Struct, frozen=True):
    """header_bytes: of the header; body_bytes: what follows it. values, rows: of a data page; rows -1 when it does not say."""

    header_bytes: int
    body_bytes: int
    dictionary: bool
    values: int = 0
    rows: int = -1


def page_at(data: bytes) -> Page:
    """The page whose header begins the data. Raises IndexError when the header is not whole, Refused for one not understood."""
    fields, end = struct_at(data)
    kind, size = number(fields, 1), number(fields, 3)
    if size < 0 or number(fields, 2) < 0:
        raise Refused("a page has no size")
    if kind == _DICTIONARY_PAGE:
        return Page(end, size, True)
    if kind == _DATA_PAGE:
        return Page(end, size, False, number(part(fields, 5), 1))
    if kind == _DATA_PAGE_V2:
        inner = part(fields, 8)
        return Page(end, size, False, number(inner, 1), number(inner, 3))
    raise Refused(f"a page of kind {kind}")
