"""What all sources of stored objects share: listing, a schema resolved once, projection, opening fragments.

A subclass gives `_read_schema` (of one object), `divide` and `_pieces`. Invariant: a source pickles, schema included,
so that workers don't look it up again.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, ClassVar, Self

import pyarrow as pa
from msgspec.structs import replace

from headrace.connectors import packing
from headrace.connectors.blocks import Piece, rechunk
from headrace.connectors.listing import Listing, Paths
from headrace.connectors.sources.unreadable import is_bad
from headrace.connectors.storage import FetchAhead, Stored
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError, PlanError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin
from headrace.core.splits import Division, Fragment, Split

SCHEMA_OBJECTS = 32  # looked at for one that can be understood


class FileSource(ABC):
    """A dataset of stored objects of one format."""

    name: str = ""
    extensions: ClassVar[tuple[str, ...]] = ()
    compressed: ClassVar[bool] = False
    reads_to_divide: ClassVar[bool] = False  # does `divide` look into the object?
    file_cost_bytes: ClassVar[int] = packing.FILE_COST_BYTES

    def __init__(self, paths: Paths) -> None:
        self._listing = Listing.of(paths, self.extensions, compressed=self.compressed)
        self._division: Division | None = None
        self._full: pa.Schema | None = None
        self._columns: tuple[str, ...] | None = None
        self._projected: pa.Schema | None = None  # of those

    @property
    def remote(self) -> bool:
        return self._listing.remote

    def schema(self) -> pa.Schema:
        full = self._full_schema()
        if self._columns is None:
            return full
        if self._projected is None:  # asked for with every block, and wide tables have many fields
            self._projected = pa.schema([full.field(c) for c in self._columns], metadata=full.metadata)
        return self._projected

    def _full_schema(self) -> pa.Schema:
        """Of all columns; read once."""
        if self._full is None:
            self._full = self._first_schema()
        return self._full

    def _first_schema(self) -> pa.Schema:
        """Of the first object that can be understood: a run that sets bad input aside starts where the first one is broken, and
        any other ends when that one is read.
        """
        first: DataError | None = None
        for o in islice(self._listing.objects(), SCHEMA_OBJECTS):
            try:
                return self._read_schema(o)
            except DataError as error:
                if not is_bad(error):
                    raise
                first = first or error
        assert first is not None, "a listing holds an object or raises"
        raise first

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        objects = self._listing.objects()
        if per_input:
            return packing.one_each(objects)
        pack = packing.pack_remote if self.reads_to_divide and self.remote and self._listing.paged else packing.pack
        return pack(objects, self.divide, self._division, file_cost=self.file_cost_bytes)

    def divided(self, division: Division) -> Self:
        out = copy.copy(self)
        out._division = division
        return out

    @property
    def divide_bytes(self) -> int:
        """What a large object is divided to."""
        return packing.DIVIDE_BYTES if self._division is None else self._division.split_bytes

    def row_bytes(self) -> float:
        return 0.0

    @property
    def fetches(self) -> bool:
        """Does reading ask a store for whole objects?"""
        return self.remote

    def snapshot(self) -> Self:
        """The same source for one action: planning, trying and running list its input once, and see the same objects."""
        out = copy.copy(self)
        out._listing = self._listing.kept()
        return out

    def project(self, columns: tuple[str, ...]) -> Self:
        names = self._full_schema().names
        for c in columns:
            if c not in names:
                raise PlanError(f"column {c!r} is not in the input", hint=f"it has: {', '.join(names[:50])}")
        out = copy.copy(self)
        out._columns, out._projected = tuple(columns), None
        return out

    def prune(self, predicate: Any) -> tuple[FileSource, bool]:
        return self, False

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        self._full_schema()
        limits = replace(limits, inputs=len(split.fragments), index=split.index)
        with closing(self._split_pieces(split, limits, on_bad)) as pieces:
            yield from rechunk(pieces, limits)

    def _split_pieces(self, split: Split, limits: BlockLimits, on_bad: OnBad | None) -> Generator[Piece, None, None]:
        fetched = split.fragments if self.fetches and len(split.fragments) > 1 else ()
        objects = (Stored(f.uri, f.size_bytes, f.version) for f in fetched)
        with closing(FetchAhead(objects, limits.target_bytes)) as ahead:
            for fragment in split.fragments:
                ahead.go_on()
                yield from self._pieces(fragment, limits, on_bad)

    def count(self) -> int | None:
        return None

    def covers(self, uri: str) -> bool:
        """Would an object of this path be input?"""
        return self._listing.covers(uri)

    def describe(self) -> str:
        columns = "" if self._columns is None else f", columns: {', '.join(self._columns) or 'none'}"
        return f"{self.name} {self._listing.label}{columns}"

    @abstractmethod
    def _read_schema(self, first: Stored) -> pa.Schema:
        """Raises DataError for an object that can't be understood."""
        ...

    def divide(self, o: Stored) -> list[Fragment]:
        """The fragments of a large object; one when it can't be divided."""
        return [packing.whole(o)]

    @abstractmethod
    def _pieces(self, fragment: Fragment, limits: BlockLimits, on_bad: OnBad | None) -> Iterator[Piece]:
        """The rows of a fragment. on_bad: see Source.open."""
        ...
