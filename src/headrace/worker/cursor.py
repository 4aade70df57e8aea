"""A cursor: one split (or block) on its way through the operators of a stage, suspended between steps.

Pieces are pushed depth first: what an operator makes goes all the way down before the operator makes more, so that a
cursor holds one piece per operator at most. The stack of half-used iterators is the whole suspended state; any move
between two pieces is a place to stop.

Invariants: for every cursor that ran to its end, over all its steps, rows_in or the rows of its inputs + expanded ==
rows of outputs or written + filtered + skipped + quarantined + cut; a cursor that failed or was discarded has aborted what it
wrote and closed what it read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from msgspec import Struct, field

from headrace.contracts.substrate import BlockStore
from headrace.core.errors import DataError, DestinationError, HeadraceError, SchemaConflict
from headrace.core.receipts import NO_ROWS, OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef
from headrace.core.steps import Advance, OpTime
from headrace.worker.bad_rows import BadRows, failure_of
from headrace.worker.batching import Piece
from headrace.worker.blocks import BlockOutput, read_piece, slices
from headrace.worker.operators import Counts, LimitOp, Operator
from headrace.worker.sink_output import SinkOutput
from headrace.worker.user_code import internal_error

READ, WRITE = -1, -2  # operator numbers in OpTime


class Clock(Struct):
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


class Progress(Struct):
    """What one step made of a cursor."""

    outputs: list[BlockRef] = field(default_factory=list[BlockRef])
    output_bytes: int = 0
    finished: bool = False
    more: bool = False
    receipt: Receipt | None = None
    tally: Tally = field(default_factory=Tally)
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    taken: int = 0
    aside: tuple[OutputFile, ...] = ()
    unreadable: tuple[str, ...] = ()

    def emit(self, block: BlockRef) -> None:
        """An output is ready."""
        self.outputs.append(block)
        self.output_bytes += block.bytes


class Cursor:
    """feed: the source's pieces for a stage that reads, else None. label: how messages name the split. bad: where rows go that
    fail; None: they end the run.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        counts: Counts,
        output: BlockOutput | SinkOutput,
        store: BlockStore,
        feed: Iterator[Piece] | None,
        label: str,
        bad: BadRows | None = None,
    ) -> None:
        self.label = label
        self._bad = bad
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
        if isinstance(self._output, BlockOutput):
            self._output.join_bytes = step.join_bytes
        while not self._done and self._move(progress, clock):
            if progress.outputs and progress.output_bytes >= step.credit_bytes:
                break
            if time.perf_counter() >= deadline:
                break
        if self._done:
            self._finish(progress, clock)
        else:
            self._guarded("writing a block", self._output.flush, progress.emit)
            progress.more = bool(self._stack or self._pieces or self._inputs or self._ended)
        progress.tally = self._tally()
        if self._bad is not None:
            progress.aside = self._bad.take_files()
            progress.unreadable = self._bad.take_unreadable()
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
            self._output.pause(progress.emit)
            self._read(progress, clock)
        elif self._inputs:
            self._output.pause(progress.emit)
            block = self._inputs.popleft()
            began = time.perf_counter()
            piece = read_piece(self._store, block)
            clock.add(READ, time.perf_counter() - began, block.rows, block.rows)
            self._pieces.extend(slices(piece, block.cuts))
        elif not self._ended:
            self._output.flush(progress.emit)
            return False
        elif self._closing < len(self._ops):
            self._stack.append((self._ops[self._closing].finish(), self._closing))
            self._closing += 1
        else:
            self._guarded("writing a block", self._output.flush, progress.emit)
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
        self._count_unreadable()
        if piece is None:
            self._feed = None
            return
        self._rows_in += rows
        self._balance += rows
        self._hand(piece, 0, progress, clock)

    def _count_unreadable(self) -> None:
        """Ranges of the input that were passed over."""
        if self._bad is None:
            return
        while self._bad.found:
            bad = self._bad.found.popleft()
            self._rows_in += bad.rows
            self._balance += bad.rows
            self._bad.add_range(READ, "read", bad)

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
        self._guarded("writing a block", self._give, piece, progress)
        clock.add(WRITE, time.perf_counter() - began, rows, rows)

    def _give(self, piece: Piece, progress: Progress) -> None:
        """Give rows out. Those that don't go with the ones before them are bad rows, where such are set aside."""
        rows = piece.batch.num_rows
        try:
            self._written += self._output.give(piece, progress.emit)
            self._balance -= rows
            return
        except SchemaConflict as conflict:
            if self._bad is None:
                raise
            if rows == 1:
                self._bad.add(WRITE, "write", piece, [(0, failure_of(conflict, "write"))])
                return
        half = rows // 2
        self._give(piece.slice(0, half), progress)
        self._give(piece.slice(half, rows - half), progress)

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
        if self._bad is not None:
            self._bad.finish()
        for op in self._ops:
            progress.metrics.update(op.told())

    def _tally(self) -> Tally:
        counts = self._counts
        bad = NO_ROWS if self._bad is None else self._bad.take_tally()
        self._balance += counts.expanded - counts.filtered - counts.cut - bad.bad
        if self._done:  # rows that a limit made useless before they were counted: held by operators, or never taken
            counts.cut += max(0, self._balance)
            counts.expanded += max(0, -self._balance)  # of a row that was still being expanded
            self._balance = 0
        tally = Tally(
            rows_in=self._rows_in,
            expanded=counts.expanded,
            written=self._written,
            filtered=counts.filtered,
            skipped=bad.skipped,
            quarantined=bad.quarantined,
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
