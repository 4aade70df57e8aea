"""CSV: types inferred once, from the beginning of the first file, and fixed for all.

Files are divided at newlines, so a quoted value may hold one only with `newlines_in_values=True`, which keeps files whole.
Where the first two lines end with "\r" alone (old Macs, some of Excel's exports), newlines are "\r".
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.connectors import packing
from headrace.connectors.blocks import Piece, measured
from headrace.connectors.listing import Paths
from headrace.connectors.sources import lines
from headrace.connectors.sources.files import FileSource
from headrace.connectors.sources.sifting import Guess
from headrace.connectors.sources.unreadable import Mismatch, reported
from headrace.connectors.storage import Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.splits import Fragment

LONG_LINE_BYTES = 16 << 20  # a row with newlines in values is no longer than this

_HINT = "give its type: read_csv(..., column_types={name: pa.string()})"
_FLOAT_HINT = "give its type: read_csv(..., column_types={name: pa.float64()})"
_NO_WHOLE_NUMBER = re.compile(r"conversion error to u?int\d+: invalid value '(.*)'")
_UTF8_HINT = "convert the file to UTF-8"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ROW = re.compile(r"Row #\d+: ")  # counted from the beginning of what was parsed, which nobody knows


class CsvSource(FileSource):
    """CSV files with a header line each, or `column_names` for files without. Compressed ones (.gz, .bz2, .zst) too.

    column_types: fixes the type of columns by name, the rest is inferred from the first 4 MiB. Columns are matched by name.
    """

    name = "csv"
    extensions = (".csv", ".tsv")
    compressed = True

    def __init__(
        self,
        paths: Paths,
        *,
        delimiter: str | None = None,
        column_names: list[str] | None = None,
        column_types: Mapping[str, pa.DataType] | None = None,
        newlines_in_values: bool = False,
    ) -> None:
        super().__init__(paths)
        self._delimiter = delimiter
        self._names = list(column_names) if column_names else None
        self._types = dict(column_types or {})
        self._newlines = newlines_in_values

    def _read_schema(self, first: Stored) -> pa.Schema:
        import pyarrow.csv as pc

        fragment = packing.whole(first)
        where = (("file", first.uri),)
        if self._newlines:
            data, all_of_it = lines.sample(fragment, lines.INFER_BYTES)
            _check_encoding(data.partition(b"\n")[0], where, header=self._names is None)
            cut = len(data) if all_of_it else lines.whole_lines(data) or len(data) // 2
            options = self._parse_options(first.uri)
            with _explained(where):
                reader = pc.open_csv(
                    io.BytesIO(data[:cut]),
                    read_options=pc.ReadOptions(column_names=self._names, block_size=max(1, cut)),
                    parse_options=options,
                )
            return self._typed(reader.schema)
        line_end = self._line_end(first.uri)
        data = lines.beginning(fragment, lines.INFER_BYTES, line_end)
        if not data.strip():
            raise DataError("the file is empty: it has no header line", where=where)
        _check_encoding(data.partition(line_end.byte)[0], where, header=self._names is None)
        parse_options = self._parse_options(first.uri)
        parse_options.invalid_row_handler = _skipped  # whoever reads the row will say so, or set it aside
        with _explained(where):
            table = pc.read_csv(
                pa.BufferReader(data),
                read_options=pc.ReadOptions(column_names=self._names, use_threads=False, block_size=len(data) + 1),
                parse_options=parse_options,
            )
        return self._typed(table.schema)

    def _typed(self, inferred: pa.Schema) -> pa.Schema:
        """With the types given, whatever values there are: whoever reads them will say so. Columns that were empty are text."""
        given = [f.with_type(self._types.get(f.name, f.type)) for f in inferred]
        return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in given])

    def divide(self, o: Stored) -> list[Fragment]:
        return [packing.whole(o)] if self._newlines else lines.divide_lines(o, self.divide_bytes)

    def row_bytes(self) -> float:
        return lines.row_bytes(self._listing.spread(lines.LOOKED_AT)[0])

    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        names, line_end = self._names, self._line_end(fragment.uri)
        if fragment.start > 0 or (names is None and self._newlines):
            try:
                first = lines.first_line(fragment, line_end)
                names = names or self._header(first, fragment.uri)
            except DataError as error:
                reported(on_bad, fragment.uri, -1, 0, error)
                return
        if self._newlines:
            yield from self._streamed(fragment, limits, self._convert_options(names or [], fragment.uri), on_bad)
        else:
            size = lines.chunk_bytes(limits, fragment)
            yield from lines.tables(fragment, size, *self._parser(fragment, names, line_end), limits, on_bad, line_end)

    def _line_end(self, uri: str) -> lines.LineEnd:
        return lines.LineEnd(_whole_line(self._parse_options(uri).delimiter))

    def _parser(self, fragment: Fragment, names: list[str] | None, line_end: lines.LineEnd) -> tuple[lines.Parse, Guess]:
        """Parses a chunk of whole lines by itself; and guesses which can't be. names: None when the first one tells."""
        import pyarrow.csv as pc

        parse_options = self._parse_options(fragment.uri)
        options: object = None
        doubts: Callable[[bytes], bool] | None = None

        def parse(chunk: bytes, at: int) -> pa.Table | None:
            nonlocal names, options
            where = (("file", fragment.uri), ("offset", str(at)))
            if at == 0:
                chunk = chunk.removeprefix(lines.BOM)
                if self._names is None:
                    head, _, chunk = chunk.partition(line_end.first)
                    names = names or self._header(head + line_end.first, fragment.uri)
            if not chunk.strip(b"\r\n"):
                return None
            if names is None:
                raise DataError("the file's header line can't be read, so neither can this one", where=where)
            options = options or self._convert_options(names, fragment.uri)
            with _explained(where):
                table = pc.read_csv(
                    pa.BufferReader(chunk),
                    read_options=pc.ReadOptions(column_names=names, use_threads=False, block_size=len(chunk) + 1),
                    parse_options=parse_options,
                    convert_options=options,
                )
            _check_lines(table.num_rows, chunk, line_end.byte, parse_options, where)
            return table.select(self.schema().names)

        def apart(rest: bytes) -> bool:
            ends_inside = b"\n" in rest if line_end.byte == b"\r" else rest.count(b"\r") > rest.count(b"\r\n")
            return names is not None and not ends_inside and lines.BOM not in rest

        def doubtful(line: bytes) -> bool:
            nonlocal doubts
            assert names is not None, "these lines are apart"
            doubts = doubts or _doubtful(names, self._convert_options(names, fragment.uri), parse_options.delimiter)
            return doubts(line)

        return parse, Guess(apart, doubtful, blanks=b"\r\n")

    def _streamed(self, fragment: Fragment, limits: BlockLimits, options: object, on_bad: OnBad | None) -> Iterator[Piece]:
        """The whole object through the incremental reader, which knows newlines in quotes. What comes after a bad row, or a
        fault, can't be told apart: the rest of the object is bad.
        """
        import pyarrow.csv as pc

        row = 0
        where = (("file", fragment.uri),)
        with lines.opened(fragment) as (reader, stream):
            whole = lines.WholeLines(fragment, stream) if lines.is_compressed(fragment.uri) else None
            batches = None
            while True:
                try:
                    with _explained((*where, ("after row", str(row)))):
                        if batches is None:
                            batches = pc.open_csv(
                                stream if whole is None else whole,
                                read_options=pc.ReadOptions(
                                    column_names=self._names,
                                    use_threads=False,
                                    block_size=max(lines.chunk_bytes(limits, fragment), LONG_LINE_BYTES),
                                ),
                                parse_options=self._parse_options(fragment.uri),
                                convert_options=options,
                            )
                        batch = next(batches, None)
                except (DataError, OSError) as e:
                    error = e if isinstance(e, DataError) else lines.cut_off(e, fragment.uri, ("after row", str(row)))
                    reported(on_bad, fragment.uri, row, 0, error)
                    break
                if batch is None:
                    if whole is not None and whole.error is not None:
                        reported(on_bad, fragment.uri, row, 0, whole.error)
                    break
                batch = batch.select(self.schema().names)
                yield measured(batch, lines.origin_of(fragment, row, batch.num_rows), limits)
                row += batch.num_rows
            reader.check()

    def _header(self, line: bytes, uri: str) -> list[str]:
        import pyarrow.csv as pc

        if not line.strip():
            raise DataError("the file is empty: it has no header line", where=(("file", uri),))
        _check_encoding(line, (("file", uri),), header=True)
        with _explained((("file", uri),)):
            table = pc.read_csv(pa.BufferReader(line.removeprefix(lines.BOM)), parse_options=self._parse_options(uri))
        return table.schema.names

    def _parse_options(self, uri: str) -> Any:
        import pyarrow.csv as pc

        tabs = any(uri.lower().endswith(f".tsv{c}") for c in ("", ".gz", ".bz2", ".zst"))
        delimiter = self._delimiter or ("\t" if tabs else ",")
        return pc.ParseOptions(delimiter=delimiter, newlines_in_values=self._newlines)

    def _convert_options(self, names: list[str], uri: str) -> Any:
        """Exactly the columns asked for; at least one, since rows of none can't be counted."""
        import pyarrow.csv as pc

        schema = self.schema()
        full = self._full_schema()
        wanted = schema.names or full.names[:1]
        for c in wanted:
            if c not in names:
                where = (("file", uri), ("column", c))
                raise Mismatch(f"column {c!r} is missing (there are: {', '.join(names[:20])})", where=where)
        types = {c: full.field(c).type for c in wanted}
        return pc.ConvertOptions(include_columns=wanted, column_types=types)


def _whole_line(delimiter: str) -> re.Pattern[bytes]:
    """A line without its end, in which quotes that are opened are closed."""
    split_at = re.escape(delimiter).encode()
    plain = b"[^%s\r\n]*" % split_at
    value = b'(?:"[^"]*(?:""[^"]*)*"(?!")|(?!"))' + plain  # Arrow knows quotes at the beginning of a value only
    return re.compile(b"%s(?:%s%s)*(?=[\r\n])" % (value, split_at, value))


def _doubtful(names: list[str], options: Any, delimiter: str) -> Callable[[bytes], bool]:
    """Has a line more or fewer values than there are columns, or one that is not of its column's type, or a quote that stays
    open? A guess: it has to be quick, and of lines with quotes it looks at nothing else.
    """
    whole = _whole_line(delimiter)
    split_at, nulls = delimiter.encode(), {text.encode() for text in options.null_values}
    checks = [(names.index(name), fits) for name, t in options.column_types.items() if (fits := _fits(t)) is not None]

    def doubtful(line: bytes) -> bool:
        text = line.strip(b"\r\n")
        if not text:
            return False
        if b'"' in text:
            return whole.match(text + b"\n") is None
        values = text.split(split_at)
        if len(values) != len(names):
            return True
        return any(not fits(values[i]) and values[i] not in nulls for i, fits in checks)

    return doubtful


def _fits(t: pa.DataType) -> Callable[[bytes], bool] | None:
    """May a value that is no null be of this type? None: hard to say."""
    if pa.types.is_integer(t):
        return lambda value: value.strip().removeprefix(b"-").isdigit()
    if pa.types.is_floating(t):
        return _is_number
    if pa.types.is_date(t) or pa.types.is_timestamp(t):
        return lambda value: value.strip()[:4].isdigit()
    return None


def _is_number(value: bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _skipped(row: Any) -> str:
    return "skip"


def _check_encoding(line: bytes, where: tuple[tuple[str, str], ...], *, header: bool) -> None:
    """Raise DataError where the first line shows that the file is not UTF-8. Other values are binary, names can't be."""
    if line.startswith(_UTF16) or (header and (b"\0" in line or not lines.is_utf8(line))):
        which = "UTF-16" if line.startswith(_UTF16) or b"\0" in line else "not UTF-8"
        raise DataError(f"the CSV is {which}", where=where, hint=_UTF8_HINT)


def _check_lines(rows: int, chunk: bytes, newline: bytes, options: Any, where: tuple[tuple[str, str], ...]) -> None:
    """Raise DataError when a quote that is not closed has made the lines behind it part of a value, or is in the last line.

    Without quotes it costs nothing, with them a fiftieth of what parsing costs.
    """
    if b'"' not in chunk:
        return
    ends = np.count_nonzero(np.frombuffer(chunk, np.uint8) == newline[0]) + (not chunk.endswith(newline))
    swallowed = rows < ends and rows < sum(1 for line in chunk.split(newline) if line.strip(b"\r\n"))
    if swallowed or _is_open(_last_line(chunk, newline), options):
        raise DataError(
            "a quoted value goes on behind the end of its line",
            where=where,
            hint="close the quote; or say newlines_in_values=True, if values hold line ends",
        )


def _last_line(chunk: bytes, newline: bytes) -> bytes:
    """The last that is not empty."""
    stop = len(chunk)
    while stop and chunk[stop - 1] in b"\r\n":
        stop -= 1
    return chunk[chunk.rfind(newline, 0, stop) + 1 : stop]


def _is_open(line: bytes, options: Any) -> bool:
    """Does a quoted value go on behind the line? Then two such lines are no two rows."""
    import pyarrow.csv as pc

    if b'"' not in line:
        return False
    read_options = pc.ReadOptions(autogenerate_column_names=True, use_threads=False, block_size=2 * len(line) + 3)
    try:
        return pc.read_csv(pa.BufferReader(line + b"\n" + line), read_options=read_options, parse_options=options).num_rows < 2
    except pa.ArrowInvalid:
        return True


class _explained:
    """Arrow's parse errors as DataError with the place; reused as a context manager."""

    def __init__(self, where: tuple[tuple[str, str], ...]) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, e: BaseException | None, trace: object) -> None:
        if isinstance(e, pa.ArrowException | KeyError) and not isinstance(e, DataError):
            text = _ROW.sub("", str(e))
            raise DataError(f"the CSV can't be parsed: {text}", where=self._where, hint=_hint(str(e))) from e


def _hint(text: str) -> str:
    if "invalid UTF8" in text:
        return _UTF8_HINT
    value = _NO_WHOLE_NUMBER.search(text)
    if value and _is_number(value[1].encode()):
        return _FLOAT_HINT
    return "mend that line, or leave the file out" if "Expected" in text and "columns, got" in text else _HINT
