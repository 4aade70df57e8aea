"""A cursor: one split (or block) on its way through the operators of a stage, suspended between steps.

Pieces are pushed depth first: what an operator makes goes all the way down before the operator makes more, so that a
cursor holds one piece per operator at most. The stack of half-used iterators is the whole suspended state; any move
between two pieces is a place to stop.

Invariants: for every cursor that ran to its end, over all its steps, rows_in or the rows of its inputs + expanded ==
rows of outputs or written + filtered + cut; a cursor that failed or was discarded has aborted what it wrote and closed
what it read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from headrace.contracts.sink import SplitWriter
from headrace.contracts.substrate import BlockStore
from headrace.core.errors import DataError, DestinationError, HeadraceError
from headrace.core.receipts import Receipt, Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.steps import Advance, OpTime
from headrace.worker.batching import Piece, join
from headrace.worker.casting import cast_batch, has_null_type
from headrace.worker.operators import Counts, EvaluateOp, LimitOp, Operator
from headrace.worker.results import make_batch
from headrace.worker.user_code import internal_error

READ, WRITE = -1, -2  # operator numbers in OpTime
UNTYPED_BYTES = 16 << 20  # rows held back for the sake of a column that was None so far
WIDE_ROW_BYTES = 1024  # from here on a column is images, documents or tensors
SMALL_BYTES = 1 << 20  # smaller outputs of one input block travel together: a block costs the scheduler a step or more


@dataclass(slots=True)
class Clock:
    """What each operator did in this step. Keys: plan operator, READ, WRITE; values: seconds, rows in, rows out."""

    ops: dict[int, list[float]] = field(default_factory=dict[int, list[float]])

    def add(self, op: int, seconds: float, rows_in: int, rows_out: int) -> None:
        entry = self.ops.get(op)
        if entry is None:
            self.ops[op] = [seconds, rows_in, rows_out]
        else:
            entry[0] += seconds
            entry[1] += rows_in
            entry[2] += rows_out

    def times(self) -> tuple[OpTime, ...]:
        return tuple(OpTime(op, s, int(i), int(o)) for op, (s, i, o) in sorted(self.ops.items()))


@dataclass(slots=True)
class Progress:
    """What one step made of a cursor."""

    outputs: list[BlockRef] = field(default_factory=list[BlockRef])
    output_bytes: int = 0
    finished: bool = False
    more: bool = False
    receipt: Receipt | None = None
    tally: Tally = field(default_factory=Tally)
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    taken: int = 0


class BlockOutput:
    """Where a stage's blocks go when another stage or the consumer takes them."""

    def __init__(self, store: BlockStore, transient: tuple[str, ...], delivers: bool) -> None:
        self._store = store
        self._transient = frozenset(transient)
        self._delivers = delivers
        self._held: list[Piece] = []
        self._held_bytes = 0

    def give(self, piece: Piece, progress: Progress) -> int:
        """Take a piece; returns the rows that count as written."""
        size = piece.batch.nbytes
        if self._held and (size >= SMALL_BYTES or not piece.batch.schema.equals(self._held[0].batch.schema)):
            self.flush(progress)
        self._held.append(piece)
        self._held_bytes += size
        if self._held_bytes >= SMALL_BYTES:
            self.flush(progress)
        return piece.batch.num_rows if self._delivers else 0

    def flush(self, progress: Progress) -> None:
        """Emit what is held: at input block boundaries, so that a shared split stays shared, and when a step ends."""
        if not self._held:
            return
        cuts = tuple(p.batch.num_rows for p in self._held) if len(self._held) > 1 else ()
        piece = join(self._held)
        self._held, self._held_bytes = [], 0
        groups = self._groups(piece.batch)
        parts = tuple(self._store.put(piece.batch if len(groups) == 1 else piece.batch.select(g)) for g in groups)
        block = BlockRef(piece.batch.num_rows, parts, piece.origin, cuts)
        progress.outputs.append(block)
        progress.output_bytes += block.bytes

    def _groups(self, batch: pa.RecordBatch) -> list[list[str]]:
        """The columns of each part. What the next stage alone reads, and what is wide, lies apart: a part's memory is free only
        when nobody holds a view of any of its columns, and a writer holds narrow ones for long. Columns keep their order.
        """
        groups: list[list[str]] = []
        last = ""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            wide = column.nbytes >= WIDE_ROW_BYTES * batch.num_rows
            kind = name if wide else "transient" if name in self._transient else "kept"
            if not groups or kind != last or wide:
                groups.append([])
            groups[-1].append(name)
            last = kind
        return groups or [[]]

    def close(self) -> Receipt | None:
        return None

    def abort(self) -> None:
        self._held = []


class SinkOutput:
    """Where a stage's rows go when it ends in the sink. The first rows wait until every column has been seen with a type:
    a function that begins with Nones says nothing about what follows.
    """

    def __init__(self, writer: SplitWriter, schema: pa.Schema | None) -> None:
        self._writer = writer
        self._schema = schema
        self._begun = schema is not None
        self._held: list[Piece] = []
        self._held_bytes = 0
        self._untyped: set[str] = set()

    def give(self, piece: Piece, progress: Progress) -> int:
        batch = piece.batch
        if self._schema is not None:
            batch = cast_batch(batch, self._schema, piece.origin.label)
        if self._begun or not self._wait(piece):
            self._writer.write(batch)
        return batch.num_rows

    def flush(self, progress: Progress) -> None: ...

    def close(self) -> Receipt | None:
        self._begin()
        return self._writer.close()

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
        self._held.append(piece)
        self._held_bytes += piece.batch.nbytes
        if not self._untyped or self._held_bytes >= UNTYPED_BYTES:
            self._begin()
        return True

    def _begin(self) -> None:
        self._begun = True
        if self._held:
            held, self._held = self._held, []
            self._writer.write(join(held).batch)


class Cursor:
    """feed: the source's pieces for a stage that reads, else None. label: how messages name the split."""

    def __init__(
        self,
        operators: Sequence[Operator],
        counts: Counts,
        output: BlockOutput | SinkOutput,
        store: BlockStore,
        feed: Iterator[Piece] | None,
        label: str,
    ) -> None:
        self.label = label
        self._ops = operators
        self._counts = counts
        self._output = output
        self._store = store
        self._feed = feed
        self._inputs: deque[BlockRef] = deque()
        self._pieces: deque[Piece] = deque()  # of the block being read
        self._ended = feed is not None
        self._stack: list[tuple[Iterator[Piece], int]] = []  # what is being made, and the place of the maker
        self._closing = 0  # operators before this one have finished
        self._done = False
        self._balance = 0  # rows that came in and are not accounted for yet
        self._rows_in = 0
        self._written = 0

    def advance(self, step: Advance, clock: Clock) -> Progress:
        """Run until the credit is used up, the input is, or all is done. Raises HeadraceError."""
        progress = Progress()
        deadline = time.perf_counter() + step.credit_s
        self._inputs.extend(step.inputs)
        self._balance += sum(b.rows for b in step.inputs)
        self._ended = self._ended or step.end
        if self._closing:  # a limit has ended the cursor while these were on their way: they count as cut
            self._drop_inputs()
        self._allow(step.limit_left)
        while not self._done and self._move(progress, clock):
            if progress.outputs and progress.output_bytes >= step.credit_bytes:
                break
            if time.perf_counter() >= deadline:
                break
        if self._done:
            self._finish(progress, clock)
        else:
            self._guarded("writing a block", self._output.flush, progress)
            progress.more = bool(self._stack or self._pieces or self._inputs or self._ended)
        progress.tally = self._tally()
        progress.taken, self._counts.taken = self._counts.taken, 0
        return progress

    def abort(self) -> None:
        """Close what is read, remove what was written. Never raises."""
        for iterator, _ in reversed(self._stack):
            _close(iterator)
        self._stack.clear()
        self._drop_inputs()
        _close(self._feed)
        with contextlib.suppress(Exception):  # the reason for aborting says more
            self._output.abort()

    # --- moves -------------------------------------------------------------------------------------------------------

    def _move(self, progress: Progress, clock: Clock) -> bool:
        """One move; False when there is nothing to do until more input comes."""
        if self._stack:
            self._pull(progress, clock)
        elif self._pieces:
            self._hand(self._pieces.popleft(), 0, progress, clock)
        elif self._feed is not None:
            self._output.flush(progress)
            self._read(progress, clock)
        elif self._inputs:
            self._output.flush(progress)
            block = self._inputs.popleft()
            began = time.perf_counter()
            piece = Piece(read_block(self._store, block), block.origin)
            clock.add(READ, time.perf_counter() - began, block.rows, block.rows)
            self._pieces.extend(slices(piece, block.cuts))
        elif not self._ended:
            self._output.flush(progress)
            return False
        elif self._closing < len(self._ops):
            self._stack.append((self._ops[self._closing].finish(), self._closing))
            self._closing += 1
        else:
            self._guarded("writing a block", self._output.flush, progress)
            self._done = True
        return True

    def _read(self, progress: Progress, clock: Clock) -> None:
        assert self._feed is not None
        began = time.perf_counter()
        try:
            piece = next(self._feed, None)
        except Exception as exc:
            raise read_error(exc) from exc
        rows = 0 if piece is None else piece.batch.num_rows
        clock.add(READ, time.perf_counter() - began, rows, rows)
        if piece is None:
            self._feed = None
            return
        self._rows_in += rows
        self._balance += rows
        self._hand(piece, 0, progress, clock)

    def _pull(self, progress: Progress, clock: Clock) -> None:
        """Let the lowest operator at work make its next piece."""
        iterator, place = self._stack[-1]
        op = self._ops[place]
        began = time.perf_counter()
        try:
            piece = next(iterator, None)
        except HeadraceError as error:
            raise error.at(("stage", op.name)) from None
        except Exception as exc:
            raise internal_error(exc, op.name).at(("stage", op.name)) from exc
        made = 0 if piece is None else piece.batch.num_rows
        clock.add(op.index, time.perf_counter() - began, 0, made)
        if piece is None:
            self._stack.pop()
        if op.exhausted and self._closing <= place:
            self._stop_before(place)
        if piece is not None:
            self._hand(piece, place + 1, progress, clock)

    def _hand(self, piece: Piece, place: int, progress: Progress, clock: Clock) -> None:
        """Give a piece to operator `place`, or out."""
        rows = piece.batch.num_rows
        if rows == 0:
            return
        if place < len(self._ops):
            op = self._ops[place]
            clock.add(op.index, 0.0, rows, 0)
            self._stack.append((op.push(piece), place))
            return
        began = time.perf_counter()
        self._written += self._guarded("writing a block", self._output.give, piece, progress)
        self._balance -= rows
        clock.add(WRITE, time.perf_counter() - began, rows, rows)

    # --- limits and the end ------------------------------------------------------------------------------------------

    def _allow(self, limit_left: int | None) -> None:
        limits = [(i, op) for i, op in enumerate(self._ops) if isinstance(op, LimitOp)]
        if limits and limit_left is not None:
            limits[0][1].allow(limit_left)
        for place, op in reversed(limits):
            if op.exhausted and self._closing <= place:
                self._stop_before(place)
                return

    def _stop_before(self, place: int) -> None:
        """Operator `place` lets nothing more pass: whatever would feed it is dropped, unread."""
        for iterator, maker in self._stack:
            if maker < place:
                _close(iterator)
        self._stack = [entry for entry in self._stack if entry[1] >= place]
        self._closing = place + 1
        self._drop_inputs()
        self._ended = True
        _close(self._feed)
        self._feed = None

    def _drop_inputs(self) -> None:
        self._inputs.clear()
        self._pieces.clear()

    def _finish(self, progress: Progress, clock: Clock) -> None:
        began = time.perf_counter()
        progress.receipt = self._guarded("closing the output", self._output.close)
        if progress.receipt is not None:
            clock.add(WRITE, time.perf_counter() - began, 0, 0)
        progress.finished = True
        for op in self._ops:
            if isinstance(op, EvaluateOp):
                progress.metrics.update(op.states)

    def _tally(self) -> Tally:
        counts = self._counts
        self._balance += counts.expanded - counts.filtered - counts.cut
        if self._done:  # rows that a limit made useless before they were counted: held by operators, or never taken
            counts.cut += self._balance
            self._balance = 0
        tally = Tally(
            rows_in=self._rows_in,
            expanded=counts.expanded,
            written=self._written,
            filtered=counts.filtered,
            cut=counts.cut,
        )
        self._rows_in = self._written = counts.expanded = counts.filtered = counts.cut = 0
        return tally

    def _guarded(self, what: str, fn: Callable[..., Any], *args: Any) -> Any:
        try:
            return fn(*args)
        except HeadraceError:
            raise
        except (pa.ArrowException, OSError) as exc:
            raise DestinationError(f"{what} failed: {type(exc).__name__}: {exc}") from exc
        except Exception as exc:
            raise internal_error(exc, what) from exc


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


def slices(piece: Piece, cuts: Sequence[int]) -> Iterator[Piece]:
    """The pieces that travelled together in a block."""
    if not cuts:
        yield piece
        return
    start = 0
    for rows in cuts:
        yield piece.slice(start, rows)
        start += rows


def read_error(exc: Exception) -> HeadraceError:
    """What a source raised, as an error of ours."""
    if isinstance(exc, HeadraceError):
        return exc
    if isinstance(exc, (pa.ArrowException, OSError, UnicodeDecodeError)):
        return DataError(f"reading failed: {type(exc).__name__}: {exc}", hint="check that the input is whole and readable")
    return internal_error(exc, "reading")


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):  # it is dropped anyway
            close()
