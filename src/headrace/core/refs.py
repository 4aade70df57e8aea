"""References to blocks: what the scheduler and messages carry instead of the data itself.

A block is one or several parts, zipped side by side: carry-over columns stay in the part where the reader left
them, and a model's output is a part of its own. All parts of a block have the same number of rows, or are taken
through an index column named by the part. Pure data: no pyarrow here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.core.wire import travels


@travels
@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` consecutive rows of input object `uri`, from row `row` (0-based) of that object."""

    uri: str
    row: int
    rows: int


@travels
@dataclass(frozen=True, slots=True)
class Origin:
    """Where a block's rows came from. exact: row i of the block is row i of the concatenated segments."""

    segments: tuple[Segment, ...] = ()
    exact: bool = True

    def locate(self, row: int) -> tuple[str, int] | None:
        """(uri, row in that object) of block row `row`, or None when rows were dropped or added on the way."""
        if not self.exact:
            return None
        for s in self.segments:
            if row < s.rows:
                return s.uri, s.row + row
            row -= s.rows
        return None

    def inexact(self) -> Origin:
        return Origin(self.segments, exact=False) if self.exact else self

    def slice(self, start: int, rows: int) -> Origin:
        """The origin of block rows [start, start + rows); unchanged when not exact."""
        if not self.exact:
            return self
        out: list[Segment] = []
        for s in self.segments:
            if rows <= 0:
                break
            if start >= s.rows:
                start -= s.rows
                continue
            n = min(s.rows - start, rows)
            out.append(Segment(s.uri, s.row + start, n))
            rows -= n
            start = 0
        return Origin(tuple(out))

    @property
    def label(self) -> str:
        """How messages name these rows: "rows 0-127 of a.parquet"."""
        if not self.segments:
            return "rows of unknown origin"
        first, last = self.segments[0], self.segments[-1]
        if len(self.segments) == 1:
            return f"rows {first.row}-{first.row + first.rows - 1} of {first.uri}"
        return f"row {first.row} of {first.uri} to row {last.row + last.rows - 1} of {last.uri} ({len(self.segments)} pieces)"


@travels
@dataclass(frozen=True, slots=True)
class PartRef:
    """One record batch in a substrate's care.

    id: unique in the run. owner: the worker whose memory holds it. bytes: its size.
    columns: those of its columns that belong to the block, in order; a reader selects them by name and ignores the rest.
    handle: the substrate's own address of it (the batch itself for threads, an arena range for processes,
    an object reference for Ray); nobody else looks inside.
    """

    id: int
    owner: int
    bytes: int
    columns: tuple[str, ...]
    handle: Any = None


@travels
@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block on its way between stages. parts: zipped side by side, all `rows` long.

    cuts: rows of each of the pieces that travel together in it; () for one. What an operator sees is the pieces, which
    depend on the input alone; how many share a block may depend on time.
    """

    rows: int
    parts: tuple[PartRef, ...]
    origin: Origin = Origin()
    cuts: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parts)
