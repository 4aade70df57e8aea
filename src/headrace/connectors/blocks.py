"""Blocks: cutting record batches to the limits of a run; which types go into which.

Invariants: cuts are a function of the pieces and the limits alone; every block but the last of a split has a multiple of
`rows_multiple` rows; a piece that fits passes without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
from msgspec import Struct, field
from msgspec.structs import replace

from headrace.core.options import BlockLimits
from headrace.core.origins import join_origins
from headrace.core.refs import Origin


class Piece(Struct, frozen=True):
    """Rows as a reader got them. row_bytes: estimated Arrow size of a row, the same on every machine. most_rows: of the
    block that these rows join.
    """

    batch: pa.RecordBatch
    origin: Origin
    row_bytes: float
    most_rows: int = 1 << 62


SURPRISE = 1.5  # rows this many times larger than estimated are measured
# A split is cut into at least this many blocks, so that several workers can share it whatever its rows cost.
BLOCKS_PER_SPLIT = 16
# A split that packs this many inputs is one of many like it: workers take a split each, and blocks need not be that small.
MANY_INPUTS = 16
LEAST_ROWS_OF_MANY = 1024
# An input that is a split: small ones need not be shared, and there is ever less need after many others. A block costs a
# quarter of a millisecond; but a row of few bytes may name an image or a page, and take long.
LEAST_ROWS_OF_INPUT = 128
LEAST_BYTES_AFTER_MANY = 256 << 10
LEAST_BLOCKS_AFTER_MANY = 4
# A column costs some 10 us a block, however few its rows: those of wide tables are not cut as small. 80,000 rows of 800 columns
# took 2.9 s in blocks of 625 rows, and 1.8 in those of 2,048.
WIDE_COLUMNS = 64
LEAST_ROWS_A_COLUMN = 4  # of those beyond
LEAST_ROWS_OF_WIDE = 2048


def shareable(limits: BlockLimits, rows: int, columns: int, row_bytes: float = 0.0) -> BlockLimits:
    """The limits for a split of about `rows` rows. row_bytes: roughly; 0 if unknown."""
    of_wide = min(LEAST_ROWS_A_COLUMN * (columns - WIDE_COLUMNS), LEAST_ROWS_OF_WIDE)
    most = max(least_rows(limits, rows, row_bytes), of_wide, rows // BLOCKS_PER_SPLIT)
    return limits if most >= limits.max_rows else replace(limits, max_rows=most)


def least_rows(limits: BlockLimits, rows: int = 0, row_bytes: float = 0.0) -> int:
    """Of a block, by the limits and how many inputs there are; 1 where a split is to be shared whatever its size."""
    if limits.inputs >= MANY_INPUTS:
        return max(limits.least_rows, LEAST_ROWS_OF_MANY)
    if not limits.per_input:
        return limits.least_rows
    least = max(limits.least_rows, LEAST_ROWS_OF_INPUT)
    if not row_bytes:
        return least
    step = 1 + limits.index // MANY_INPUTS
    of_blocks = rows // max(BLOCKS_PER_SPLIT // step, LEAST_BLOCKS_AFTER_MANY)
    most = max(of_blocks, min(LEAST_ROWS_OF_INPUT * step, LEAST_ROWS_OF_MANY))
    return max(least, min(int(LEAST_BYTES_AFTER_MANY / row_bytes), most))


def rows_per_block(row_bytes: float, limits: BlockLimits) -> int:
    """How many rows of this size make a block: a multiple of rows_multiple, at least one."""
    fit = max(1, min(limits.max_rows, int(limits.target_bytes / max(row_bytes, 1e-9))))
    multiple = limits.rows_multiple
    return max(multiple, fit - fit % multiple)


def rechunk(pieces: Iterable[Piece], limits: BlockLimits) -> Iterator[tuple[pa.RecordBatch, Origin]]:
    """Join small pieces and slice large ones. rows_multiple counts from the first piece on."""
    held = _Held()
    for piece in pieces:
        batch, origin = piece.batch, piece.origin
        if batch.num_rows == 0:
            continue
        while batch.num_rows:
            most = min(limits.max_rows, piece.most_rows)
            room = held.room(piece.row_bytes, most, limits)
            if room < batch.num_rows and held.may_go(most, limits):
                yield held.take()
                continue
            n = min(room, batch.num_rows)
            held.add(batch.slice(0, n), origin.slice(0, n), piece.row_bytes)
            origin = origin.slice(n, batch.num_rows - n)
            batch = batch.slice(n)
            if n == room:
                yield held.take()
    if held.rows:
        yield held.take()


class _Held(Struct):
    """The block in the making."""

    rows: int = 0
    bytes: float = 0.0
    parts: list[tuple[pa.RecordBatch, Origin]] = field(default_factory=list)

    def room(self, row_bytes: float, most: int, limits: BlockLimits) -> int:
        """Rows of this size that still go in; at least one. Filling it all ends on a multiple."""
        fit = int(max(0.0, limits.target_bytes - self.bytes) / max(row_bytes, 1e-9))
        capacity = self.rows + max(0, min(fit, most - self.rows))
        m = limits.rows_multiple
        capacity -= capacity % m
        least = self.rows + 1
        return max(capacity, least + -least % m) - self.rows

    def may_go(self, most: int, limits: BlockLimits) -> bool:
        """Better to close this block than to slice the next piece: it is big enough, and its end is a place to cut."""
        if not self.rows or self.rows % limits.rows_multiple:
            return False
        return self.bytes * 4 >= limits.target_bytes or self.rows * 4 >= most

    def add(self, batch: pa.RecordBatch, origin: Origin, row_bytes: float) -> None:
        self.rows += batch.num_rows
        self.bytes += batch.num_rows * row_bytes
        self.parts.append((batch, origin))

    def take(self) -> tuple[pa.RecordBatch, Origin]:
        batches = [b for b, _ in self.parts]
        origin = join_origins([o for _, o in self.parts])
        batch = concat(batches)
        self.rows, self.bytes, self.parts = 0, 0.0, []
        return batch, origin


def concat(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    if batches[0].num_columns == 0:
        return no_columns(sum(b.num_rows for b in batches))
    return pa.concat_batches(batches)


def no_columns(rows: int) -> pa.RecordBatch:
    """A batch of rows without columns."""
    return pa.record_batch([pa.nulls(rows)], names=["_"]).select([])


def measured(batch: pa.RecordBatch, origin: Origin, limits: BlockLimits) -> Piece:
    """A piece whose row size is its own Arrow size; a block of its own when its split is to be shared."""
    most = 1 << 62 if limits.inputs >= MANY_INPUTS else max(least_rows(limits), batch.num_rows)
    return Piece(batch, origin, batch.nbytes / max(1, batch.num_rows), most)


def sized(piece: Piece, limits: BlockLimits) -> Iterator[Piece]:
    """The piece, when its rows are about as large as was estimated. Otherwise its rows in pieces of at most target_bytes (or
    one row), each with the size that its own rows have.
    """
    rows, real = piece.batch.num_rows, piece.batch.nbytes
    if real <= SURPRISE * rows * piece.row_bytes:
        yield piece
        return
    middle = rows // 2
    parts = [(0, middle), (middle, rows - middle)]
    batches = [piece.batch.slice(start, n) for start, n in parts]
    if rows > 1 and sum(b.nbytes for b in batches) > SURPRISE * real:
        yield piece  # what all rows share (dictionaries, views) counts for each part: it tells nothing of a row
    elif rows == 1 or real <= limits.target_bytes:
        yield replace(piece, row_bytes=real / rows)
    else:
        for (start, n), batch in zip(parts, batches, strict=True):
            yield from sized(replace(piece, batch=batch, origin=piece.origin.slice(start, n)), limits)


def goes_into(a: pa.DataType, b: pa.DataType) -> bool:
    """May values of type a become type b? Values are still checked by the cast (overflow, lost fractions)."""
    t = pa.types
    if a.equals(b) or t.is_null(a):
        return True
    if t.is_dictionary(a):
        return goes_into(a.value_type, b)
    if t.is_dictionary(b):
        return goes_into(a, b.value_type)
    if isinstance(a, pa.BaseExtensionType) or isinstance(b, pa.BaseExtensionType):
        return False
    if t.is_integer(a):
        return t.is_integer(b) or t.is_floating(b) or t.is_decimal(b)
    if t.is_floating(a):
        return t.is_floating(b) and b.bit_width >= a.bit_width
    if t.is_decimal(a):
        return t.is_decimal(b)
    if _is_text(a):
        return _is_text(b)
    if _is_binary(a):
        return _is_binary(b)
    if t.is_timestamp(a):
        return t.is_timestamp(b) and (a.tz is None) == (b.tz is None)
    for kind in (t.is_date, t.is_time, t.is_duration):
        if kind(a):
            return kind(b)
    if _is_list(a) and _is_list(b):
        return goes_into(a.value_type, b.value_type)
    if t.is_map(a) and t.is_map(b):
        return goes_into(a.key_type, b.key_type) and goes_into(a.item_type, b.item_type)
    return t.is_struct(a) and t.is_struct(b) and _fields_go_into(a, b)


def _fields_go_into(a: pa.StructType, b: pa.StructType) -> bool:
    """Has b all fields of a? Those that it has beyond them become null."""
    there = {b.field(i).name: b.field(i).type for i in range(b.num_fields)}
    fields = [a.field(i) for i in range(a.num_fields)]
    distinct = len(there) == b.num_fields and len({f.name for f in fields}) == len(fields)
    return distinct and all(f.name in there and goes_into(f.type, there[f.name]) for f in fields)


def _is_text(a: pa.DataType) -> bool:
    return pa.types.is_string(a) or pa.types.is_large_string(a) or pa.types.is_string_view(a)


def _is_binary(a: pa.DataType) -> bool:
    t = pa.types
    return t.is_binary(a) or t.is_large_binary(a) or t.is_binary_view(a) or t.is_fixed_size_binary(a)


def _is_list(a: pa.DataType) -> bool:
    return pa.types.is_list(a) or pa.types.is_large_list(a) or pa.types.is_fixed_size_list(a)
