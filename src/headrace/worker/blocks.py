"""Blocks between stages, seen from a worker: pieces packed into parts, parts zipped into pieces again.

Where each row came from travels with the rows: when it is neither "row i is row i" nor vague, a part holds the positions in a
hidden column. PartRef.columns does not name it, so that nobody meets it by accident: not user code, not sinks, not consumers,
and no rule about which columns to keep.

Invariant: `pieces_of(pack(pieces))` gives the pieces back, rows, cuts and origins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from msgspec import Struct
from msgspec.structs import replace

from headrace.contracts.substrate import BlockStore
from headrace.core.origins import join_origins
from headrace.core.receipts import Receipt
from headrace.core.refs import BlockRef, Origin, PartRef
from headrace.core.tensors import numpy_to_array, vector_to_numpy
from headrace.worker.batching import Piece
from headrace.worker.casting import concat
from headrace.worker.results import make_batch

WIDE_ROW_BYTES = 1024  # from here on a column is images, documents or tensors
SMALL_BYTES = 1 << 20  # smaller outputs of one input block travel together: a block costs the scheduler a step or more
HIDDEN = "\x00row"  # the hidden column of positions


class Packed(Struct):
    """Pieces as one block. origin: as it travels. positions: for the hidden column, None when there is none."""

    batch: pa.RecordBatch
    origin: Origin
    cuts: tuple[int, ...]
    positions: Any = None


def pack(pieces: Sequence[Piece]) -> Packed:
    """Pieces that travel together. All of them, or none, know where each row came from."""
    origins, rows = zip(*(found for p in pieces for found in p.origins()), strict=True)
    cuts = rows if len(rows) > 1 else ()
    batch = concat([p.batch for p in pieces], origins[0].label)
    if all(o.known for o in origins):
        origin = join_origins(origins)
        if origin.exact:
            return Packed(batch, origin, cuts)
        return Packed(batch, Origin(origin.segments, exact=False, listed=True), cuts, origin.index)
    groups = tuple(len(o.segments) for o in origins) if cuts else ()
    segments = tuple(s for o in origins for s in o.segments)
    kept = origins[0].kept if all(o.kept == origins[0].kept for o in origins) else ()
    return Packed(batch, Origin(segments, exact=False, groups=groups, kept=kept), cuts)


def put_part(store: BlockStore, batch: pa.RecordBatch, positions: Any = None) -> PartRef:
    """Keep a batch, with the hidden column if there are positions."""
    if positions is None:
        return store.put(batch)
    columns = [*batch.columns, numpy_to_array(positions)]
    names = [*batch.schema.names, HIDDEN]
    fields = [*batch.schema, pa.field(HIDDEN, pa.int64())]
    part = store.put(pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, metadata=batch.schema.metadata)))
    return replace(part, columns=tuple(names[:-1]))


def read_block(store: BlockStore, block: BlockRef, names: Sequence[str] | None = None) -> pa.RecordBatch:
    """The columns of a block's parts side by side, zero-copy; those called `names`, or all.

    Of a name that comes twice the later part's column counts, in the earlier one's place.
    """
    found: dict[str, tuple[PartRef, pa.Field, pa.Array]] = {}
    wanted = None if names is None else frozenset(names)
    for part in block.parts:
        columns = [c for c in part.columns if wanted is None or c in wanted]
        if not columns:
            continue
        batch = store.get(part)
        if len(block.parts) == 1 and columns == batch.schema.names:
            return batch
        for name in columns:
            index = batch.schema.get_field_index(name)
            found[name] = (part, batch.schema.field(index), batch.column(index))
    if names is not None:
        found = {n: found[n] for n in names if n in found}
    if not found:
        return make_batch({}, block.rows)
    schema = pa.schema([f for _, f, _ in found.values()])
    return pa.RecordBatch.from_arrays([a for _, _, a in found.values()], schema=schema)


def read_origin(store: BlockStore, block: BlockRef) -> Origin:
    """Where the block's rows came from, each by itself if that is known."""
    if not block.origin.listed:
        return block.origin
    for part in reversed(block.parts):  # a model's part is the last one, and never loses it
        batch = store.get(part)
        index = batch.schema.get_field_index(HIDDEN)
        if index >= 0:
            return Origin(block.origin.segments, exact=False, index=vector_to_numpy(batch.column(index)))
    return block.origin.inexact()


def read_piece(store: BlockStore, block: BlockRef, names: Sequence[str] | None = None) -> Piece:
    """The whole block, of these columns or all; `slices` cuts it."""
    return Piece(read_block(store, block, names), read_origin(store, block))


def slices(piece: Piece, cuts: Sequence[int]) -> Iterator[Piece]:
    """The pieces that travelled together in a block."""
    if not cuts:
        yield piece
        return
    start = at = 0
    for i, rows in enumerate(cuts):
        part = piece.slice(start, rows)
        if piece.origin.groups:
            segments = piece.origin.segments[at : at + piece.origin.groups[i]]
            at += piece.origin.groups[i]
            part = Piece(part.batch, Origin(segments, exact=False, kept=piece.origin.kept))
        yield part
        start += rows


class BlockOutput:
    """Where a stage's blocks go when another stage or the consumer takes them. emit: told each block."""

    def __init__(self, store: BlockStore, transient: tuple[str, ...], delivers: bool, feeds: tuple[str, ...] = ()) -> None:
        self._store = store
        self._transient = frozenset(transient)
        self._feeds = frozenset(feeds)
        self._delivers = delivers
        self._held: list[Piece] = []
        self._held_bytes = 0
        self.join_bytes = 0  # what is smaller goes on waiting at `pause`, up to this much

    def give(self, piece: Piece, emit: Callable[[BlockRef], None]) -> int:
        """Take a piece; returns the rows that count as written."""
        size = piece.batch.nbytes
        large = max(SMALL_BYTES, self.join_bytes)
        if self._held and (size >= large or not self._travels(piece)):
            self.flush(emit)
        self._held.append(piece)
        self._held_bytes += size
        if self._held_bytes >= large:
            self.flush(emit)
        return piece.batch.num_rows if self._delivers else 0

    def _travels(self, piece: Piece) -> bool:
        """May it share a block with those that are held?"""
        held = self._held[0]
        alike = piece.origin.known == held.origin.known and piece.origin.kept == held.origin.kept
        return alike and piece.batch.schema.equals(held.batch.schema)

    def pause(self, emit: Callable[[BlockRef], None]) -> None:
        """An input block is done with. Emit what is held, so that a shared split stays shared, unless it is to be joined."""
        if not self.join_bytes:
            self.flush(emit)

    def flush(self, emit: Callable[[BlockRef], None]) -> None:
        """Emit what is held: a step ends."""
        if not self._held:
            return
        packed = pack(self._held)
        self._held, self._held_bytes = [], 0
        groups = self._groups(packed.batch)
        batches = [packed.batch if len(groups) == 1 else packed.batch.select(g) for g in groups]
        positions = None if self._delivers else packed.positions
        parts = [self._store.put(batch) for batch in batches[:-1]]
        parts.append(put_part(self._store, batches[-1], positions))
        origin = packed.origin if positions is packed.positions else packed.origin.inexact()
        emit(BlockRef(packed.batch.num_rows, tuple(parts), origin, packed.cuts))

    def _groups(self, batch: pa.RecordBatch) -> list[list[str]]:
        """The columns of each part. What the next stage alone reads, and what is wide, lies apart: a part's memory is free only
        when nobody holds a view of any of its columns, and a writer holds narrow ones for long. Columns keep their order.
        """
        groups: list[list[str]] = []
        last = ""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            wide = column.nbytes >= WIDE_ROW_BYTES * batch.num_rows
            kind = name if wide else self._kind(name)
            if not groups or kind != last or wide:
                groups.append([])
            groups[-1].append(name)
            last = kind
        return groups or [[]]

    def _kind(self, name: str) -> str:
        return "transient" if name in self._transient else "fed" if name in self._feeds else "kept"

    def close(self) -> Receipt | None:
        return None

    def abort(self) -> None:
        self._held = []
