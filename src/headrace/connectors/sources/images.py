"""Image folders and other files of bytes: one row a file, columns "bytes" and "path". Nothing is decoded here."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import ClassVar

import numpy as np
import pyarrow as pa
from msgspec.structs import replace

from headrace.connectors import storage
from headrace.connectors.blocks import BLOCKS_PER_SPLIT, Piece, no_columns
from headrace.connectors.listing import Paths
from headrace.connectors.sources.files import FileSource
from headrace.connectors.sources.unreadable import reported
from headrace.connectors.storage import Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin, Segment
from headrace.core.splits import Fragment, Split
from headrace.core.tensors import texts_to_array

MOST_BYTES = (1 << 31) - 1  # of a binary column, whose offsets are int32
_SCHEMA = pa.schema([("bytes", pa.binary()), ("path", pa.string())])


LOOKED_AT = 64  # files whose sizes tell how large a row is


class BinarySource(FileSource):
    """Files as they are: all files of a directory, or those that a glob names."""

    name = "binary"
    extensions: ClassVar[tuple[str, ...]] = ()
    file_cost_bytes = 64 << 10  # files are rows here, not outputs: the cost is one open() each

    def __init__(self, paths: Paths) -> None:
        super().__init__(paths)

    def _read_schema(self, first: Stored) -> pa.Schema:
        return _SCHEMA

    def schema(self) -> pa.Schema:
        if self._full is None:
            self._full = self._read_schema(self._listing.first())
        return super().schema()

    @property
    def fetches(self) -> bool:
        return super().fetches and "bytes" in self.schema().names

    def row_bytes(self) -> float:
        sizes = [o.size for o in islice(self._listing.objects(), LOOKED_AT)]
        return sum(sizes) / max(1, len(sizes))

    def _split_pieces(self, split: Split, limits: BlockLimits, on_bad: OnBad | None) -> Generator[Piece, None, None]:
        most = max(limits.least_rows, len(split.fragments) // BLOCKS_PER_SPLIT)
        with closing(super()._split_pieces(split, limits, on_bad)) as pieces:
            for piece in pieces:
                yield replace(piece, most_rows=most)

    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        """The object's row, or none if it can't be read."""
        names, data = self.schema().names, None
        if "bytes" in names:
            try:
                _check_size(fragment)
                data = _read(fragment)
            except DataError as error:
                reported(on_bad, fragment.uri, 0, 1, error)
                return
        yield _piece(fragment, data, names)


class ImageSource(BinarySource):
    """Image files: those of a directory with the usual extensions, or whatever a glob names."""

    name = "images"
    extensions: ClassVar[tuple[str, ...]] = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def _check_size(f: Fragment) -> None:
    if f.size_bytes > MOST_BYTES:
        raise DataError(
            f"the file has {f.size_bytes:,} bytes, more than the 2 GiB that a value of a column may have",
            where=(("file", f.uri),),
            hint="leave it out, or read only the paths (select) and open it in a function",
        )


def _read(f: Fragment) -> pa.Buffer:
    try:
        with closing(storage.open_reader(f.uri, f.size_bytes, f.version)) as reader:
            data = reader.native().read_buffer()
            reader.check()
            return data
    except OSError as e:
        raise DataError(f"the file can't be read: {e}", where=(("file", f.uri),), hint="replace it or leave it out") from e


def _piece(f: Fragment, data: pa.Buffer | None, names: list[str]) -> Piece:
    origin = Origin((Segment(f.uri, 0, 1),))
    columns = {"path": texts_to_array([f.uri])}
    if data is not None:
        offsets = pa.py_buffer(np.array([0, data.size], np.int32))
        columns["bytes"] = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data])
    batch = pa.record_batch([columns[n] for n in names], names=names) if names else no_columns(1)
    row_bytes = (f.size_bytes if "bytes" in names else 0) + len(f.uri) + 8
    return Piece(batch, origin, row_bytes)
