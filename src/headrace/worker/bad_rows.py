"""Rows that fail: whether a row is to blame for an exception, and where rows go that are: left out, or set aside as a table.

Invariants: only what a row can be blamed for is ever set aside; a row is counted once, when it is taken; of rows set aside
little memory is held, and nothing that a block's memory would have to wait for.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec import Struct, field

from headrace.contracts.sink import Sink
from headrace.contracts.source import BadRange
from headrace.core.errors import DataError, DestinationError, HeadraceError, InputChanged, StorageRefused, UserCodeError
from headrace.core.process import end_if_forked, is_interrupted
from headrace.core.receipts import OutputFile, Tally
from headrace.core.redact import redact
from headrace.core.tensors import numpy_to_array
from headrace.worker.batching import Piece
from headrace.worker.python_values import values_column
from headrace.worker.refused import BrokenModel, Refused
from headrace.worker.results import make_batch
from headrace.worker.user_code import exception_text, user_frames

STAGE_BYTES = 8 << 20  # rows of one operator held before they are staged
NOTE_BYTES = 1024  # about what an exception's text and frames take
MOST_TEXTS = 3  # of ranges without a row count that are told in a step

RowError = BaseException  # what user code may raise: panics of Rust extensions and asyncio's CancelledError are no Exceptions


class Failure(Struct, frozen=True):
    """Why a row was set aside: texts alone, so that no frame keeps a batch alive. They may hold what is no Unicode, as names of
    files do.
    """

    exception: str
    traceback: str = ""


Lost = tuple[int, Failure]  # a row's position, and why it failed


def blames_rows(exc: BaseException) -> bool:
    """Is this what a row may be to blame for? Not: storage, plans, faults of ours, answers that belong to no row, Ctrl-C of the
    person at the keyboard. A child that user code forked ends here.
    """
    end_if_forked()
    if isinstance(exc, KeyboardInterrupt):
        return not is_interrupted(exc)
    if isinstance(exc, HeadraceError):
        return isinstance(exc, (DataError, UserCodeError)) and not isinstance(exc, InputChanged | StorageRefused)
    return not isinstance(exc, BrokenModel)


def failure_of(exc: BaseException, op: str) -> Failure:
    """What is kept of an exception."""
    if isinstance(exc, HeadraceError):
        return Failure(redact(f"{type(exc).__name__}: {exc.message}"), redact(exc.frames))
    if isinstance(exc, Refused):
        return Failure(redact(f"UserCodeError: {op} {exc}"))
    return Failure(f"{type(exc).__name__}: {exception_text(exc)}", user_frames(exc))


class _Held(Struct):
    """Rows of one operator that wait for a file."""

    stage: str
    batches: list[pa.RecordBatch] = field(default_factory=list[pa.RecordBatch])
    notes: list[tuple[str | None, int | None, int, Failure]] = field(default_factory=list[Any])  # uri, row, rows
    bytes: int = 0


class BadRows:
    """The bad rows of one cursor, or of one owner in an Apply.

    found: ranges that the source can't read, in any thread; whoever runs the cursor hands them to `add_range`.
    count: rows since they were last told.
    """

    def __init__(self, keep: bool, sink: Sink | None, split: int, attempt: int) -> None:
        self.found: deque[BadRange] = deque()
        self.count = 0
        self._keep = keep
        self._sink = sink if keep else None
        self._split = split
        self._attempt = attempt
        self._held: dict[int, _Held] = {}
        self._files: list[OutputFile] = []
        self._uncounted: list[str] = []
        self._more = 0  # uncounted ranges beyond those

    def add(self, op: int, name: str, piece: Piece, lost: list[Lost]) -> None:
        """Rows of `piece`, with all columns that entered the operator."""
        self.count += len(lost)
        if self._sink is None:
            return
        for position, failure in lost:
            row = piece.slice(position, 1)
            uri, at = row.origin.locate(0) or (_common_uri(row), None)
            copy = row.batch.take(numpy_to_array(np.zeros(1, np.int64))) if row.batch.num_columns else row.batch
            self._hold(op, name, copy, (uri, at, 1, failure))

    def add_range(self, op: int, name: str, bad: BadRange) -> None:
        """A part of the input that can't be read."""
        self.count += bad.rows
        where = "; ".join(f"{label}: {value}" for label, value in bad.error.where)
        at = f" ({where})" if where else ""
        failure = Failure(redact(f"{type(bad.error).__name__}: {bad.error.message}{at}"))
        if not bad.rows:
            if len(self._uncounted) < MOST_TEXTS:
                self._uncounted.append(f"{self._became} input of which nobody can tell the rows: {failure.exception}")
            else:
                self._more += 1
        if self._sink is not None:
            self._hold(op, name, make_batch({}, 1), (bad.uri, bad.row if bad.row >= 0 else None, bad.rows, failure))

    def finish(self) -> None:
        """Stage what is held. Raises DestinationError."""
        for held in self._held.values():
            self._stage(held)
        self._held.clear()

    def take_files(self) -> tuple[OutputFile, ...]:
        """What has been staged and was not told yet."""
        files, self._files = tuple(self._files), []
        return files

    def take_unreadable(self) -> tuple[str, ...]:
        """The ranges without a row count that are bad and were not told yet: they are in no tally."""
        texts, self._uncounted = self._uncounted, []
        more, self._more = self._more, 0
        return (*texts, f"{self._became} {more} more such parts of the input") if more else tuple(texts)

    @property
    def _became(self) -> str:
        return "set aside" if self._keep else "skipped"

    def take_tally(self) -> Tally:
        """The rows that were not told yet."""
        count, self.count = self.count, 0
        return Tally(quarantined=count) if self._keep else Tally(skipped=count)

    def _hold(self, op: int, name: str, batch: pa.RecordBatch, note: tuple[str | None, int | None, int, Failure]) -> None:
        held = self._held.get(op)
        if held is not None and not held.batches[0].schema.equals(batch.schema):
            self._stage(held)
            held = None
        if held is None:
            held = self._held[op] = _Held(name)
        held.batches.append(batch)
        held.notes.append(note)
        held.bytes += batch.nbytes + NOTE_BYTES
        if held.bytes >= STAGE_BYTES:
            self._stage(held)
            del self._held[op]

    def _stage(self, held: _Held) -> None:
        assert self._sink is not None
        table = _table(held, self._attempt)
        try:
            self._files.append(self._sink.set_aside(self._split, self._attempt, table))
        except (pa.ArrowException, OSError) as exc:
            raise DestinationError(f"setting rows aside failed: {type(exc).__name__}: {exc}") from exc


def _table(held: _Held, attempt: int) -> pa.Table:
    """The rows with what is known of each beside them."""
    notes = held.notes
    columns: dict[str, Any] = {}
    if held.batches[0].num_columns:
        table = pa.Table.from_batches(held.batches)
        columns = dict(zip(table.schema.names, table.columns, strict=True))
    added = {
        "_source_uri": values_column([uri for uri, _, _, _ in notes], pa.string()),
        "_source_row": values_column([row for _, row, _, _ in notes], pa.int64()),
        "_rows": values_column([rows for _, _, rows, _ in notes], pa.int64()),
        "_stage": values_column([held.stage] * len(notes), pa.string()),
        "_exception": values_column([_unicode(failure.exception) for *_, failure in notes], pa.string()),
        "_traceback": values_column([_unicode(failure.traceback) for *_, failure in notes], pa.string()),
        "_attempt": numpy_to_array(np.full(len(notes), attempt, np.int32)),
    }
    for name, column in added.items():
        while name in columns:
            name += "_"
        columns[name] = column
    return pa.table(columns)


def _unicode(text: str) -> str:
    """The text with halves of surrogate pairs spelled out: they can't be stored."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _common_uri(piece: Piece) -> str | None:
    """The one object that the rows come from; None when there are several."""
    uris = {s.uri for s in piece.origin.segments}
    return uris.pop() if len(uris) == 1 else None
