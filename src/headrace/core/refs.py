"""References to blocks: what the scheduler and messages carry instead of the data itself.

A block is one or several parts, zipped side by side: carry-over columns stay in the part where the reader left
them, and a model's output is a part of its own. All parts of a block have the same number of rows, or are taken
through an index column named by the part. Pure data: no pyarrow here.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Segment(Struct, frozen=True):
    """`rows` consecutive rows of input object `uri`, from row `row` (0-based) of that object."""

    uri: str
    row: int
    rows: int


class Origin(Struct, frozen=True, eq=False):
    """Where a block's rows came from. exact: row i of the block is row i of the concatenated segments.

    index: with exact=False, the rows' positions in the concatenated segments, ascending and maybe repeated: an array of
    integers that never leaves its worker. listed: it left, as a hidden column of the block. With neither, rows come from among
    the segments.
    groups: of a block of several pieces of that last kind, how many of the segments belong to each piece.
    kept: of that last kind: columns whose row i is that of row i of the segments all the same, because a function gave them
    back as it got them; of any other column nothing is known.
    """

    segments: tuple[Segment, ...] = ()
    exact: bool = True
    index: Any = None
    listed: bool = False
    groups: tuple[int, ...] = ()
    kept: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self._compared == other._compared

    def __ne__(self, other: object) -> bool:  # a struct has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[Any, ...]:
        """All but the positions."""
        return self.segments, self.exact, self.listed, self.groups, self.kept

    @property
    def known(self) -> bool:
        """Whether each row's own place can be told here."""
        return self.exact or self.index is not None

    @property
    def rows(self) -> int:
        """Of all segments."""
        return sum(s.rows for s in self.segments)

    def locate(self, row: int) -> tuple[str, int] | None:
        """(uri, row in that object) of block row `row`, or None when rows were added or mixed on the way."""
        if self.index is not None:
            row = int(self.index[row])
        elif not self.exact:
            return None
        for s in self.segments:
            if row < s.rows:
                return s.uri, s.row + row
            row -= s.rows
        return None

    def inexact(self) -> Origin:
        """The same place, for rows that a function may have dropped, added or reordered."""
        return Origin(self.segments, exact=False) if self.known or self.listed or self.kept else self

    def some(self) -> Origin:
        """The same place, for some of the rows, which are not known one by one."""
        return self.inexact() if self.kept else self

    def slice(self, start: int, rows: int) -> Origin:
        """The origin of block rows [start, start + rows); unchanged when rows are not known one by one."""
        if self.index is not None and rows:
            positions = self.index[start : start + rows]
            first = int(positions[0])
            return Origin(self._cut(first, int(positions[-1]) + 1 - first), exact=False, index=positions - first)
        return Origin(self._cut(start, rows)) if self.exact else self.some()

    def _cut(self, start: int, rows: int) -> tuple[Segment, ...]:
        """Positions [start, start + rows) of the concatenated segments."""
        if len(self.segments) == 1 and rows > 0:
            (only,) = self.segments
            return (Segment(only.uri, only.row + start, min(rows, only.rows - start)),) if start < only.rows else ()
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
        return tuple(out)

    @property
    def label(self) -> str:
        """How messages name these rows: "rows 0-127 of a.parquet"."""
        if not self.segments:
            return "rows of unknown origin"
        first, last = self.segments[0], self.segments[-1]
        if len(self.segments) == 1:
            return f"rows {first.row}-{first.row + first.rows - 1} of {first.uri}"
        return f"row {first.row} of {first.uri} to row {last.row + last.rows - 1} of {last.uri} ({len(self.segments)} pieces)"


class PartRef(Struct, frozen=True):
    """One record batch in a substrate's care.

    id: unique in the run. owner: the worker whose memory holds it. bytes: its size.
    columns: those of its columns that belong to the block, in order; a reader selects them by name and ignores the rest.
    handle: the substrate's own address of it (the batch itself for threads, an arena range for processes,
    an object reference for Ray); nobody else looks inside. The batch may hold columns that are not named (see Origin.listed).
    node: the machine of a cluster that holds it; "" on one machine.
    """

    id: int
    owner: int
    bytes: int
    columns: tuple[str, ...]
    handle: Any = None
    node: str = ""


class BlockRef(Struct, frozen=True):
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
