"""Text: one row a line, in a column "text", without its line end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from headrace.connectors.blocks import Piece
from headrace.connectors.sources import lines
from headrace.connectors.sources.files import FileSource
from headrace.connectors.sources.sifting import Guess
from headrace.connectors.storage import Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.splits import Fragment

_SCHEMA = pa.schema([("text", pa.string())])


class TextSource(FileSource):
    """UTF-8 text files; a directory is read for .txt, .text, .log and .md. Empty lines are rows too."""

    name = "text"
    extensions = (".txt", ".text", ".log", ".md")
    compressed = True

    def _read_schema(self, first: Stored) -> pa.Schema:
        return _SCHEMA

    def schema(self) -> pa.Schema:
        self._listing.first()  # an input that is not there is refused before any work
        return super().schema()

    def divide(self, o: Stored) -> list[Fragment]:
        return lines.divide_lines(o, self.divide_bytes)

    def row_bytes(self) -> float:
        return lines.row_bytes(self._listing.spread(lines.LOOKED_AT)[0])

    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        bare = self._columns == ()

        def parse(chunk: bytes, at: int) -> pa.Table:
            array = split_lines(chunk.removeprefix(lines.BOM) if at == 0 else chunk)
            try:
                array.validate(full=True)
            except pa.ArrowInvalid as e:
                where = (("file", fragment.uri), ("offset", str(at)))
                raise DataError("the text is not UTF-8", where=where, hint="convert it to UTF-8") from e
            table = pa.Table.from_batches([pa.RecordBatch.from_arrays([array], schema=_SCHEMA)])
            return table.select([]) if bare else table

        guess = Guess(apart=lambda rest: True, doubtful=lambda line: not lines.is_utf8(line), blanks=b"")
        yield from lines.tables(fragment, lines.chunk_bytes(limits, fragment), parse, guess, limits, on_bad)


def split_lines(data: bytes) -> pa.StringArray:
    """The lines of `data`, without "\\n" or "\\r\\n"; a last line may lack its end. Not validated."""
    raw = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(raw == 10)
    stops = ends if data.endswith(b"\n") else np.append(ends, len(raw))
    lengths = np.diff(stops, prepend=-1) - 1
    if b"\r\n" in data:
        lengths[: len(ends)] -= (ends > 0) & (raw[ends - 1] == 13)
        data = data.replace(b"\r\n", b"\n")
    offsets = np.zeros(len(stops) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.StringArray.from_buffers(len(stops), pa.py_buffer(offsets), pa.py_buffer(data.replace(b"\n", b"")))
