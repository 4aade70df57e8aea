"""JSON lines: one object a line; types inferred once, from the beginning of the first file, and fixed for all.

An object over several lines is refused however small the file is, since files are cut at newlines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec
import numpy as np
import pyarrow as pa

from headrace.connectors import packing
from headrace.connectors.blocks import Piece, goes_into
from headrace.connectors.listing import Paths
from headrace.connectors.sources import lines
from headrace.connectors.sources.files import FileSource
from headrace.connectors.sources.sifting import Guess, line_starts
from headrace.connectors.sources.unreadable import halves
from headrace.connectors.storage import Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.splits import Fragment

MOST_BAD_LINES = 2000  # passed over while types are inferred: each costs a quarter of a millisecond
_ONE_A_LINE = "write one JSON object a line: json.dumps(row) without indent, or pandas' to_json(orient='records', lines=True)"
# Where Arrow may see two rows in a line, and a line that it sees as a row of nulls.
_TWO_ROWS = re.compile(rb"(?:\}|null)[ \t\r]*(?:\{|null)")
_NULL_FIRST, _NULL_LATER = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r]*null"), re.compile(rb"\n[ \t\r]*null")


class _Enough(Exception): ...


class JsonSource(FileSource):
    """JSON-lines files; compressed ones (.gz, .bz2, .zst) too.

    schema: fixes columns and types; otherwise inferred from the first 4 MiB. A line with a value of another type, or (while all
    columns are read) with a field that the schema lacks, is a DataError; a missing field is null.
    """

    name = "json"
    extensions = (".json", ".jsonl", ".ndjson")
    compressed = True

    def __init__(self, paths: Paths, *, schema: pa.Schema | None = None) -> None:
        super().__init__(paths)
        self._full = schema

    def _read_schema(self, first: Stored) -> pa.Schema:
        data = lines.beginning(packing.whole(first), lines.INFER_BYTES)
        if not data.strip():
            raise DataError("the file is empty, so its columns are unknown", where=(("file", first.uri),))
        return _inferred(data, (("file", first.uri),))

    def divide(self, o: Stored) -> list[Fragment]:
        return lines.divide_lines(o, self.divide_bytes)

    def row_bytes(self) -> float:
        return lines.row_bytes(self._listing.spread(lines.LOOKED_AT)[0])

    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        schema, full = self.schema(), self._full_schema()
        wanted, unexpected = schema, "error" if self._columns is None else "ignore"
        if not len(schema) and len(full):  # they are counted by one of the columns there are
            wanted = pa.schema([full.field(0)])

        def parse(chunk: bytes, at: int) -> pa.Table | None:
            if not chunk.strip():
                return None
            table = _parse(chunk, wanted, unexpected, (("file", fragment.uri), ("offset", str(at))))
            return table.select(schema.names)

        guess = _guess(wanted, unexpected)
        yield from lines.tables(fragment, lines.chunk_bytes(limits, fragment), parse, guess, limits, on_bad)


def _inferred(data: bytes, where: tuple[tuple[str, str], ...]) -> pa.Schema:
    """Columns and types of the lines that can be parsed: all, or those before too many bad ones. Whoever reads the others will
    say so, or set them aside.
    """
    try:
        return _parse(data, None, "error", where).schema
    except DataError:
        starts = line_starts(data)

        def read(start: int, stop: int) -> tuple[bytes, pa.Schema]:
            some = data[starts[start] : starts[stop]]
            return some, _parse(some, None, "error", where).schema

        bad = 0

        def passed_over(line: int, error: DataError) -> None:
            nonlocal bad
            bad += 1
            if bad > MOST_BAD_LINES:
                raise _Enough

        good: list[tuple[bytes, pa.Schema]] = []
        with suppress(_Enough):
            good.extend(pair for pair in halves(0, len(starts) - 1, read, passed_over) if pair[0].strip())
        if not good:
            raise
        try:
            return _parse(b"".join(some for some, _ in good), None, "error", where).schema
        except DataError:
            return _prevailing(good)


def _guess(schema: pa.Schema, unexpected: str) -> Guess:
    return Guess(_apart, _doubtful(schema, unexpected), blanks=b" \t\r\n\v\f")


def _apart(rest: bytes) -> bool:
    """Can no line hold more than one row? Two objects in a line can, and make up for one that goes on behind its line."""
    if lines.BOM in rest or _has_null_line(rest):
        return False
    decode = msgspec.json.Decoder(dict).decode
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        for found in _TWO_ROWS.finditer(rest):
            decode(rest[rest.rfind(b"\n", 0, found.start()) + 1 : _end_of_line(rest, found.end())])
        return True
    return False


def _has_null_line(data: bytes) -> bool:
    return bool(_NULL_FIRST.match(data) or _NULL_LATER.search(data))


def _end_of_line(data: bytes, at: int) -> int:
    end = data.find(b"\n", at)
    return len(data) if end < 0 else end


def _doubtful(schema: pa.Schema, unexpected: str) -> Callable[[bytes], bool]:
    """Is a line no JSON object, or one with a value of a kind that its column hasn't? A guess: it has to be quick."""
    decode = msgspec.json.Decoder().decode
    kinds = {f.name: _kinds(f.type) for f in schema}
    others = () if unexpected == "error" else None

    def doubtful(line: bytes) -> bool:
        if line.isspace():
            return False
        try:
            row = decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return True
        if type(row) is not dict:
            return True
        for name, value in row.items():
            fits = kinds.get(name, others)
            if value is not None and fits is not None and type(value) not in fits:
                return True
        return False

    return doubtful


def _kinds(t: pa.DataType) -> tuple[type, ...] | None:
    """The Python types of JSON values that may go into a column; None: any."""
    if pa.types.is_boolean(t):
        return (bool,)
    if pa.types.is_integer(t):
        return (int,)
    if pa.types.is_floating(t):
        return (int, float)
    if pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_timestamp(t):
        return (str,)
    if pa.types.is_struct(t):
        return (dict,)
    return (list,) if pa.types.is_list(t) else None


def _prevailing(parts: list[tuple[bytes, pa.Schema]]) -> pa.Schema:
    """Where types contradict each other, those of the longer parts."""
    fields: dict[str, pa.Field] = {}
    for _, schema in sorted(parts, key=lambda part: -len(part[0])):
        for f in schema:
            have = pa.schema([fields.get(f.name, f)])
            try:
                fields[f.name] = pa.unify_schemas([have, pa.schema([f])], promote_options="permissive").field(0)
            except pa.ArrowException:
                fields[f.name] = have.field(0)
    names = dict.fromkeys(name for _, schema in parts for name in schema.names)
    return pa.schema([fields[name] for name in names])


def _parse(data: bytes, schema: pa.Schema | None, unexpected: str, where: tuple[tuple[str, str], ...]) -> pa.Table:
    if not lines.is_utf8(data):  # Arrow doesn't look
        raise DataError("the JSON lines are not UTF-8", where=where, hint="convert the file to UTF-8")
    if _has_null_line(data):  # Arrow crashes where it comes first
        raise DataError("a line is null, no JSON object", where=where, hint=_ONE_A_LINE)
    try:
        table = _read(data, schema, unexpected)
    except pa.ArrowException as e:
        if _first_is_open(data):
            raise _open_line(where) from e
        hint = "one object a line, of one type a column; read_json(..., schema=...) fixes the types"
        column = _culprit(data, schema, unexpected)
        text = f"column {column}" if column else str(e)
        place = (*where, ("column", column.split("'")[1])) if column else where
        raise DataError(f"the JSON lines can't be parsed: {text}", where=place, hint=hint) from e

    ends = np.count_nonzero(np.frombuffer(data, np.uint8) == 10) + (not data.endswith(b"\n"))
    if table.num_rows < ends and table.num_rows < sum(1 for line in data.split(b"\n") if line.strip()):
        raise _open_line(where)
    return table


def _open_line(where: tuple[tuple[str, str], ...]) -> DataError:
    return DataError("a JSON object is not complete at the end of its line", where=where, hint=_ONE_A_LINE)


def _first_is_open(data: bytes) -> bool:
    """Does an object, or an array, go on behind the first line that is not blank?"""
    text = data.lstrip().partition(b"\n")[0].decode("utf-8-sig").rstrip()
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        return e.pos >= len(text)
    except RecursionError:
        return False
    return False


def _read(data: bytes, schema: pa.Schema | None, unexpected: str) -> pa.Table:
    import pyarrow.json as pj

    behavior = "infer" if schema is None else unexpected
    return pj.read_json(
        pa.BufferReader(data),
        read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behavior),
    )


def _culprit(data: bytes, schema: pa.Schema | None, unexpected: str) -> str:
    """The column that drifted and how, "" when the text itself is broken. Arrow's own message doesn't name it."""
    if schema is None:
        return ""
    try:
        found = _read(data, None, "infer").schema
    except pa.ArrowException:
        return ""  # broken, or two types in one chunk: then Arrow's message names the column
    for f in found:
        i = schema.get_field_index(f.name)
        if i < 0 and unexpected == "error":
            return f"{f.name!r} is unknown: the columns are {', '.join(schema.names[:20])}"
        if i >= 0 and not goes_into(f.type, schema.field(i).type):
            return f"{f.name!r} has type {f.type} here, {schema.field(i).type} was expected"
    return ""
