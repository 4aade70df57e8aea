"""Byte ranges of line formats, cut at newlines, and what CSV, JSON lines and text share.

The rule for a range [a, b): reading starts after the first newline at or beyond a (at a itself when a is 0) and ends after the
first newline at or beyond b. So every line belongs to exactly one range, wherever the cuts fall, as long as all ranges of an
object agree on what a newline is (LineEnd).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace

from headrace.connectors import packing, storage
from headrace.connectors.blocks import BLOCKS_PER_SPLIT, Piece, least_rows, measured
from headrace.connectors.listing import COMPRESSED
from headrace.connectors.sources.sifting import Guess, Lines, adjacent, line_starts, sifted
from headrace.connectors.sources.unreadable import Mismatch, is_bad, reported
from headrace.connectors.storage import Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError, HeadraceError
from headrace.core.options import BlockLimits
from headrace.core.origins import chosen
from headrace.core.refs import Origin, Segment
from headrace.core.splits import Fragment

LOOKED_AT, ROW_LOOK_BYTES = 4, 64 << 10  # lines are measured in so many objects, and as much of each
INFER_BYTES = 4 << 20  # types are inferred from this much of the first object
COUNT_BYTES = 256 << 20  # for an error's line number no more than this is read again
MOST_BYTES = (1 << 31) - 2  # of lines that are parsed together: Arrow counts them, and one more, in 32 bits
_TELLING_BYTES = 64 << 10  # of an object, in which its line end is looked for
_STEP_BYTES = 1 << 20  # read size when looking for the end of a line
_SALVAGE_BYTES = 16 << 10  # as many single bytes are read in some milliseconds
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# What they begin with; no text does.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "zip": re.compile(rb"PK\x03\x04"),
}

Parse = Callable[[bytes, int], pa.Table | None]

BOM = b"\xef\xbb\xbf"


class LineEnd:
    """The byte that ends the lines of an object: "\\n". With `line`, a pattern of a line without its end, it is "\\r" where
    the first two lines end with that alone; this has to be looked at before anything is cut.

    first: what ends the first line; "\\r" before lines that end with "\\n" where a header was set before them.
    """

    def __init__(self, line: re.Pattern[bytes] | None = None) -> None:
        self.byte = self.first = b"\n"
        self._line = line

    def seen(self, beginning: bytes, *, all_of_it: bool) -> bool:
        """Whether this much of the beginning of the object tells. What it tells depends on no more than its first bytes."""
        if self._line is None:
            return True
        short = len(beginning) < _TELLING_BYTES
        data = beginning[:_TELLING_BYTES].removeprefix(BOM).lstrip(b"\r\n")
        newline = data.find(b"\n")
        lone = data.find(b"\r", 0, newline if newline >= 0 else len(data))
        if newline >= 0 and (lone < 0 or lone + 1 == newline):
            return True
        if short and not all_of_it:
            return False
        line = self._line.match(data) if lone >= 0 else None
        if line is None:  # a quote is still open, or no end was seen
            return True
        if line.end() + 1 == len(data):
            self.first = self.byte = b"\r" if short and data.endswith(b"\r") else b"\n"
            return True
        self.first = self.byte = _end_at(data, line.end())
        rest = data[line.end() :].lstrip(b"\r\n")
        second = self._line.match(rest) if self.byte == b"\r" else None
        if second is not None and (short or second.end() + 1 < len(rest)):
            self.byte = _end_at(rest, second.end())
        return True


def _end_at(data: bytes, at: int) -> bytes:
    return b"\n" if b"\n" in data[at : at + 2] else b"\r"


NEWLINE = LineEnd()


def is_compressed(uri: str) -> bool:
    return uri.lower().endswith(COMPRESSED)


def row_bytes(objects: Iterable[Stored]) -> float:
    """Of a line at their beginnings; 0.0 where all are compressed, whose lines take less than they tell, or broken."""
    size = rows = 0
    for o in objects:
        if is_compressed(o.uri):
            continue
        with suppress(DataError), opened(packing.whole(o)) as (_, stream):
            data = _read(stream, ROW_LOOK_BYTES, o.uri, 0)
            open_end = len(data) == o.size and not data.endswith((b"\n", b"\r"))
            size, rows = size + len(data), rows + max(data.count(b"\n"), data.count(b"\r")) + open_end
    return size / rows if rows else 0.0


def divide_lines(o: Stored, target: int) -> list[Fragment]:
    """Even byte ranges of about `target`; a compressed object stays whole."""
    if is_compressed(o.uri):
        return [packing.whole(o)]
    return [replace(packing.whole(o), start=a, stop=b) for a, b in packing.even_ranges(o.size, target)]


def chunk_bytes(limits: BlockLimits, fragment: Fragment) -> int:
    """Text parsed at a time: numbers take up to four times their text in Arrow, so a quarter of a block; less where the split
    would make only a few blocks.
    """
    stop = fragment.size_bytes if fragment.stop < 0 else fragment.stop
    few = least_rows(limits) == 1
    share = (stop - fragment.start) // BLOCKS_PER_SPLIT if few else limits.target_bytes
    return max(4 << 10 if few else 64 << 10, min(limits.target_bytes // 4, 8 << 20, share))


@contextmanager
def opened(fragment: Fragment) -> Iterator[tuple[storage.Reader, pa.NativeFile]]:
    """(reader, stream of the object's plain bytes)."""
    reader = storage.open_reader(fragment.uri, fragment.size_bytes, fragment.version)
    try:
        stream: pa.NativeFile = reader.native(storage.REQUEST_BYTES)
        for suffix, codec in _CODECS.items():
            if fragment.uri.lower().endswith(suffix):
                stream = pa.CompressedInputStream(stream, codec)
        yield reader, stream
    finally:
        reader.close()


def line_chunks(fragment: Fragment, size: int, line_end: LineEnd = NEWLINE) -> Generator[tuple[int, bytes], None, None]:
    """(byte offset, whole lines) of about `size` bytes each; a longer line comes alone. Offsets are of the plain bytes.
    Of a damaged object the whole lines before the fault come first.

    line_end: looks at the beginning here where that is in the range, and has done so before where it is not.
    """
    with opened(fragment) as (reader, stream):
        at, carry = _seek_line(stream, fragment.start, line_end.byte)
        told = fragment.start > 0
        end = fragment.stop
        if 0 <= end < at:
            return  # one line spans the range: it belongs to the range where it began
        begun: list[bytes] = []  # pieces of a line whose end was not seen; it begins at `at`
        behind = at  # where they end
        while True:
            try:
                read = _read(stream, size, fragment.uri, at)
            except DataError as error:
                if not is_bad(error) or not is_compressed(fragment.uri):
                    raise
                data = carry + _up_to_fault(fragment, behind + len(carry))
                if not told:
                    line_end.seen(data, all_of_it=True)
                cut = data.rfind(line_end.byte) + 1
                if cut:
                    yield at, b"".join((*begun, data[:cut]))
                raise
            if behind + len(carry) == 0:
                _check_plain(read, fragment.uri)
            data = carry + read
            if not told:
                told = line_end.seen(data, all_of_it=not read)
                if not told:
                    carry = data
                    continue
            carry = b""
            cut = -1
            if 0 <= end <= behind + len(data) - 1:
                # The last line of the range ends at the first newline at or beyond `end`.
                cut = data.find(line_end.byte, max(0, end - behind))
            last = cut >= 0 or not read
            if cut < 0:
                cut = data.rfind(line_end.byte) if read else len(data) - 1
            behind += len(data)
            begun.append(data[: cut + 1])
            if cut >= 0 or last:
                chunk = b"".join(begun)
                begun.clear()
                if chunk:
                    yield at, chunk
                at += len(chunk)
                del chunk
            if last:
                break
            begun.append(data[cut + 1 :])
        reader.check()


def _up_to_fault(fragment: Fragment, start: int, size: int = sys.maxsize) -> bytes:
    """The plain bytes of a compressed object from `start` up to where it is damaged, `size` at most. A read that fails gives
    nothing of what came before the fault, so the last ones are single bytes.
    """
    out = bytearray()
    for step in (_SALVAGE_BYTES, 1):
        with suppress(pa.ArrowException, OSError), opened(fragment) as (_, stream):
            left = start + len(out)
            while left and (passed := stream.read(min(left, _STEP_BYTES))):
                left -= len(passed)
            while len(out) < size and (data := stream.read(min(step, size - len(out)))):
                out += data
    return bytes(out)


class WholeLines:
    """A compressed object's plain bytes as a file to read from. Where they are damaged it ends with the last line before the
    fault that ends outside of quotes. error: the fault, once it was met.
    """

    closed = False

    def __init__(self, fragment: Fragment, stream: pa.NativeFile) -> None:
        self._fragment = fragment
        self._stream = stream
        self._at = 0  # of what was read
        self._rest: bytes | None = b""  # of it, behind the last whole line; None when it is not known where lines end
        self.error: DataError | None = None

    def read(self, size: int) -> bytes:
        """About so many bytes; none at the end. Raises DataError for what is no fault of the data, and at one when it is not
        known where lines end.
        """
        if self.error is not None:
            return b""
        try:
            read = _read(self._stream, size, self._fragment.uri, self._at)
        except DataError as error:
            if self._rest is None or not is_bad(error):
                raise
            self.error = error
            data = self._rest + _up_to_fault(self._fragment, self._at)
            return data[: whole_lines(data) or 0]
        self._at += len(read)
        if self._rest is None:
            return read
        data = self._rest + read
        cut = whole_lines(data) if read else len(data)  # the last line needs no end
        self._rest = None if cut is None else data[cut:]
        return data if cut is None else data[:cut]


def whole_lines(data: bytes) -> int | None:
    """Where the last newline outside of quotes ends, in data that begin with a line. None: it is not to be found near the end,
    as lines are long, or quotes don't come in pairs.
    """
    inside = data.count(b'"') % 2 == 1
    stop = len(data)
    while (cut := data.rfind(b"\n", max(0, len(data) - _STEP_BYTES), stop)) >= 0:
        inside ^= data.count(b'"', cut, stop) % 2 == 1
        if not inside:
            return cut + 1
        stop = cut
    return None


def beginning(fragment: Fragment, size: int, line_end: LineEnd = NEWLINE) -> bytes:
    """The whole lines of the first `size` bytes; a longer first line by itself. Of a shorter object the last line, too, whether
    or not a newline ends it.
    """
    with closing(line_chunks(fragment, size, line_end)) as chunks:
        _, data = next(chunks, (0, b""))
        if fragment.size_bytes < size:
            with suppress(DataError):  # whoever reads these rows will say so, or set them aside
                _, rest = next(chunks, (0, b""))
                data += rest if len(data) + len(rest) <= size else b""
    return data


def _seek_line(stream: pa.NativeFile, start: int, newline: bytes) -> tuple[int, bytes]:
    """Position after the first newline at or beyond `start`, and bytes already read from there."""
    if start == 0:
        return 0, b""
    stream.seek(start)
    at = start
    while data := stream.read(_STEP_BYTES):
        cut = data.find(newline)
        if cut >= 0:
            return at + cut + 1, data[cut + 1 :]
        at += len(data)
    return at, b""


def _read(stream: pa.NativeFile, size: int, uri: str, at: int) -> bytes:
    try:
        return stream.read(size)
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, DataError):
            raise
        raise cut_off(e, uri, ("offset", str(at)), at_once=at == 0) from e


def cut_off(e: Exception, uri: str, place: tuple[str, str], *, at_once: bool = False) -> DataError:
    """The error for an object that can't be read from that place on. at_once: nothing could be read."""
    hint = "the file is damaged or cut short" + (f", or no {_codec(uri)} data" if at_once and is_compressed(uri) else "")
    error = DataError(f"can't read on: {e}", where=(("file", uri), place), hint=hint)
    error.__cause__ = e
    return error


def sample(fragment: Fragment, size: int) -> tuple[bytes, bool]:
    """(the first `size` plain bytes, are they all?); of a damaged object those before the fault. Raises DataError."""
    with opened(fragment) as (_, stream):
        try:
            data = _read(stream, size, fragment.uri, 0)
        except DataError as error:
            data = _up_to_fault(fragment, 0, size) if is_bad(error) and is_compressed(fragment.uri) else b""
            if not data:
                raise
            return data, False
        return data, len(data) < size


def _codec(uri: str) -> str:
    return next(codec for suffix, codec in _CODECS.items() if uri.lower().endswith(suffix))


def _check_plain(beginning: bytes, uri: str) -> None:
    """Raise DataError where the text of an object begins as no text does, but compressed data."""
    for codec, magic in _MAGIC.items():
        if magic.match(beginning):
            suffix = next((suffix for suffix, known in _CODECS.items() if known == codec and not is_compressed(uri)), "")
            hint = f"let its name end with {suffix}" if suffix else "unpack it"
            raise DataError(f"this is {codec} data, not text", where=(("file", uri),), hint=hint)


def first_line(fragment: Fragment, line_end: LineEnd = NEWLINE) -> bytes:
    """The object's first line, newline included. line_end: looks at the beginning."""
    with opened(replace(fragment, start=0, stop=-1)) as (_, stream):
        out = b""
        while data := _read(stream, 64 << 10, fragment.uri, len(out)):
            if not out:
                _check_plain(data, fragment.uri)
            out += data
            if not line_end.seen(out, all_of_it=False):
                continue
            cut = out.find(line_end.first)
            if cut >= 0:
                return out[: cut + 1]
        line_end.seen(out, all_of_it=True)
        return out[: out.find(line_end.first) + 1] or out


def is_utf8(data: bytes) -> bool:
    """Whether all of it is UTF-8; a gigabyte or more a second, without a copy."""
    if data.isascii():
        return True
    offsets = pa.py_buffer(np.array([0, len(data)], dtype=np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(data)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def tables(
    fragment: Fragment,
    size: int,
    parse: Parse,
    guess: Guess,
    limits: BlockLimits,
    on_bad: OnBad | None,
    line_end: LineEnd = NEWLINE,
) -> Iterator[Piece]:
    """The rows of a fragment, a chunk of whole lines at a time.

    parse: (lines, the offset of the first) -> their rows, None for lines that hold none. When a chunk can't be parsed, its bad
    lines are told to on_bad, a row each, and the others are given as one piece. guess: see sifting.
    """
    parse = _bounded(parse, fragment.uri)
    row = bad = 0
    chunks = line_chunks(fragment, size, line_end)
    while True:
        try:
            at, chunk = next(chunks, (-1, b""))
        except DataError as error:  # the rest can't be read
            reported(on_bad, origin_of(fragment, row, 0).segments[0].uri, row, 0, error)
            return
        if at < 0:
            return
        try:
            table, total, index = parse(chunk, at), -1, None
        except Mismatch:
            raise
        except DataError as error:
            if on_bad is None:
                raise _first_bad(fragment, chunk, at, parse, error, line_end.byte) from error.__cause__
            some = Lines(chunk, at, line_end.byte)
            table, total, index = _good_lines(fragment, some, parse, row, on_bad, guess, bad)
            bad += total - (0 if table is None else table.num_rows)
        rows = 0 if table is None else table.num_rows
        total = rows if total < 0 else total
        if table is not None and rows:
            origin = origin_of(fragment, row, total)
            yield from _measured(table, origin if index is None else chosen(origin, index), limits)
        row += total


def _bounded(parse: Parse, uri: str) -> Parse:
    """Arrow's parsers and its text have no room for more."""

    def bounded(chunk: bytes, at: int) -> pa.Table | None:
        if len(chunk) > MOST_BYTES:
            where = (("file", uri), ("offset", str(at)))
            raise DataError("a line takes more than 2 GiB", where=where, hint="cut it, or leave the file out")
        return parse(chunk, at)

    return bounded


def _first_bad(
    fragment: Fragment,
    chunk: bytes,
    at: int,
    parse: Parse,
    error: DataError,
    newline: bytes,
) -> DataError:
    """The error of the first line that can't be parsed, with its number; the one given where no line is to blame alone."""
    starts = line_starts(chunk, newline)
    good, bad = 0, len(starts) - 1  # so many lines can be parsed together, so many can't
    try:
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                parse(chunk[: starts[middle]], at)
                good = middle
            except DataError:
                bad = middle
        parse(chunk[starts[good] : starts[bad]], at + starts[good])
    except DataError as found:
        number = _line_number(fragment, at + starts[good], newline)
        found.at(*((("line", str(number)),) if number else ()))
        return found
    return error


def _line_number(fragment: Fragment, offset: int, newline: bytes) -> int:
    """Of the line that begins there, from 1; 0 where it would take too long to count, or can't be read again."""
    if offset > COUNT_BYTES:
        return 0
    number, left = 1, offset
    with suppress(HeadraceError, OSError), opened(replace(fragment, start=0, stop=-1)) as (_, stream):
        while left and (data := stream.read(min(left, _STEP_BYTES))):
            number += data.count(newline)
            left -= len(data)
    return 0 if left else number


def _good_lines(
    fragment: Fragment,
    some: Lines,
    parse: Parse,
    row: int,
    on_bad: OnBad,
    guess: Guess,
    before: int,
) -> tuple[pa.Table | None, int, Any]:
    """(the rows of the lines that can be parsed, the number of rows with the bad ones, the good ones' positions). before: so
    many bad lines were found.
    """
    rows = np.zeros(len(some), dtype=np.int64)  # of each line
    found: list[tuple[Any, pa.Table]] = []
    bad: list[tuple[int, DataError]] = []
    filled: Any = None

    def read(which: Any) -> pa.Table | None:
        nonlocal filled
        table = parse(some.joined(which), some.offset(which[0]))
        made = 0 if table is None else table.num_rows
        if adjacent(which):  # no bad line is between them: it does not matter which of them has the rows
            rows[which[0]] = made
            return table
        filled = some.filled(guess.blanks) if filled is None else filled
        full = which[filled[which]]
        if made != len(full):
            raise _Unclear
        rows[full] = 1
        return table

    for which, table in sifted(some, read, lambda line, error: bad.append((line, error)), guess, before):
        if table is not None and table.num_rows:
            found.append((which, table))
    rows[[line for line, _ in bad]] = 1
    first = np.cumsum(rows) - rows  # row of each line
    uri = origin_of(fragment, row, 0).segments[0].uri
    for line, error in sorted(bad, key=itemgetter(0)):
        reported(on_bad, uri, row + int(first[line]), 1, error)
    if not found:
        return None, int(rows.sum()), None
    positions = np.concatenate([_each(first[which], rows[which]) for which, _ in found])
    table = pa.concat_tables([t for _, t in found])
    if (np.diff(positions) < 0).any():
        order = np.argsort(positions)
        table, positions = table.take(order), positions[order]
    return table.combine_chunks(), int(rows.sum()), positions


class _Unclear(DataError):
    """Lines from between which others were taken, whose rows can't be told apart by their number."""

    def __init__(self) -> None:
        super().__init__("lines and rows differ in number")


def _each(starts: Any, lengths: Any) -> Any:
    """start, start + 1, ..., so many of each."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _measured(table: pa.Table, origin: Origin, limits: BlockLimits) -> Iterator[Piece]:
    start = 0
    for batch in table.to_batches():
        yield measured(batch, origin.slice(start, batch.num_rows), limits)
        start += batch.num_rows


def origin_of(fragment: Fragment, row: int, rows: int) -> Origin:
    """Rows are counted from where the fragment starts; a fragment that starts inside the object says so in its name."""
    uri = fragment.uri if fragment.start == 0 else f"{fragment.uri} (from byte {fragment.start})"
    return Origin((Segment(uri, row, rows),))
