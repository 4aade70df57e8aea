"""Where a stage's rows go when it ends in the sink: cast, written, and traced back to the input."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from headrace.contracts.sink import CarryingWriter, SplitWriter
from headrace.core.errors import SchemaConflict
from headrace.core.receipts import Receipt
from headrace.core.refs import BlockRef, Origin
from headrace.core.schemas import Conflict, unify
from headrace.worker.batching import Piece, join
from headrace.worker.casting import cast_batch, drift, has_null_type
from headrace.worker.lineage import Lineage

UNTYPED_BYTES = 16 << 20  # rows held back for the sake of a column that was None so far


class SinkOutput:
    """The first rows wait until every column has been seen with a type: a function that begins with Nones says nothing about
    what follows.
    """

    def __init__(self, writer: SplitWriter, schema: pa.Schema | None, carrying: CarryingWriter | None = None) -> None:
        """carrying: the writer, if blocks may lack columns that it takes from the input."""
        self._writer = writer
        self._carrying = carrying
        self._schema = schema
        self._begun = schema is not None
        self._held: list[Piece] = []
        self._held_schema = pa.schema([])
        self._held_bytes = 0
        self._untyped: set[str] = set()
        self._lineage = Lineage()

    def give(self, piece: Piece, emit: Callable[[BlockRef], None]) -> int:
        """The number of rows. Raises SchemaConflict, and has then done nothing, when they don't go with those before."""
        batch = piece.batch
        if self._schema is not None:
            batch = cast_batch(batch, self._schema, piece.origin.label)
        try:
            if self._begun or not self._wait(piece):
                self._write(batch, piece.origin)
        except SchemaConflict as conflict:
            raise conflict.at(("rows", piece.origin.label)) from None
        for origin, rows in piece.origins():
            self._lineage.add(origin, rows)
        return batch.num_rows

    def pause(self, emit: Callable[[BlockRef], None]) -> None: ...

    def flush(self, emit: Callable[[BlockRef], None]) -> None: ...

    def close(self) -> Receipt | None:
        self._begin()
        return self._writer.close(self._lineage.runs())

    def abort(self) -> None:
        self._held = []
        self._writer.abort()

    def _wait(self, piece: Piece) -> bool:
        """Hold the piece back, and all that are held if this one says what was missing. False: nothing is to be waited for."""
        untyped = {field.name for field in piece.batch.schema if has_null_type(field.type)}
        self._untyped = untyped if not self._held else self._untyped & untyped
        if not self._held and not untyped:
            self._begun = True
            return False
        if self._held:
            try:
                self._held_schema = unify(self._held_schema, piece.batch.schema)
            except Conflict as conflict:
                raise drift(conflict) from None
        else:
            self._held_schema = piece.batch.schema
        self._held.append(piece)
        self._held_bytes += piece.batch.nbytes
        if not self._untyped or self._held_bytes >= UNTYPED_BYTES:
            self._begin()
        return True

    def _begin(self) -> None:
        self._begun = True
        if self._held:
            held, self._held = self._held, []
            joined = join(held)
            self._write(joined.batch, joined.origin)

    def _write(self, batch: pa.RecordBatch, origin: Origin) -> None:
        if self._carrying is None:
            self._writer.write(batch)
        else:
            self._carrying.write_rows(batch, origin)
