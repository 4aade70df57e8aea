"""Row functions as operators: filter(fn), map and flat_map.

Invariants: rows become Python objects a chunk at a time, never a whole block; flat_map's rows leave as soon as they fill a
block, while its iterable is still running. Where bad rows are set aside, flat_map holds what it makes of one row until its
iterable has ended: of a row that fails nothing is passed on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import HeadraceError
from headrace.core.origins import chosen
from headrace.core.process import end_if_forked
from headrace.plan.nodes import Types, UserFunction
from headrace.worker.bad_rows import Lost, RowError, blames_rows, failure_of
from headrace.worker.batching import Piece
from headrace.worker.declared import Declared
from headrace.worker.formats import Given, read_rows, row_chunks
from headrace.worker.operators import TARGET_BYTES, Counts, Operator
from headrace.worker.refused import Refused
from headrace.worker.results import fitting_rows, rows_batch
from headrace.worker.user_code import explain

FLAT_ROWS = 8192  # rows of a flat_map that leave together, however small they are
# Rows are taken from flat_map's iterable in runs of so many rows or bytes: what follows costs less than for each by itself.
RUN_ROWS = 32
RUN_BYTES = 64 << 10

Row = dict[str, Any]
_NUMBERS = frozenset((int, float, bool, type(None)))
_DICTS = frozenset((dict,))


class RowOperator(Operator):
    """A function of one row, called in chunks of rows."""

    def __init__(
        self, fn: Callable[..., Any], spec: UserFunction, index: int, name: str, counts: Counts, types: Types = ()
    ) -> None:
        super().__init__(index, name, counts)
        self._fn = fn
        self._declared = Declared(types)
        self._args = spec.args
        self._kwargs = dict(spec.kwargs)

    def _chunks(self, piece: Piece) -> Iterator[tuple[Piece, list[Row], Given]]:
        rows = piece.batch.num_rows
        step = row_chunks(piece.batch)
        for start in range(0, rows, step):
            part = piece.slice(start, min(step, rows - start))
            yield part, *read_rows(part.batch)

    def _call_all(self, part: Piece, rows: list[Row], lost: list[Lost]) -> list[Any]:
        """What fn makes of each row, without the rows that fail: those go to `lost`."""
        fn, args, kwargs = self._fn, self._args, self._kwargs
        out: list[Any] = []
        source = self._watched(part, rows, lost)
        while True:
            try:
                for row in source:
                    out.append(fn(row, *args, **kwargs))
                end_if_forked()
                return out
            except RowError as exc:
                self._fail(exc, part, len(out) + len(lost), lost)

    def _checked(self, values: list[Any], check: Callable[[Any], Any], part: Piece, lost: list[Lost]) -> list[Any]:
        """check(each of what fn made), without what it refuses: those rows go to `lost` as well."""
        out: list[Any] = []
        refused: list[Lost] = []
        for at, value in zip(_left(part.batch.num_rows, lost), values, strict=True):
            try:
                out.append(check(value))
            except RowError as exc:
                self._fail(exc, part, at, refused)
        lost += refused
        lost.sort(key=lambda pair: pair[0])
        return out

    def _watched(self, part: Piece, rows: list[Row], lost: list[Lost]) -> Iterator[Row]:
        """The rows that may be run, announced: all at once, or one by one where a worker has died before."""
        if not self.watch.doubts(self.index, part.origin):
            return self.watch.enter_rows(self.index, self.name, part.origin, rows)
        return self._one_by_one(part, rows, lost)

    def _one_by_one(self, part: Piece, rows: list[Row], lost: list[Lost]) -> Iterator[Row]:
        for i, row in enumerate(rows):
            failure = self.watch.condemned(self.index, self.name, part.slice(i, 1))
            if failure is None:
                yield row
            else:
                lost.append((i, failure))

    def _fail(self, exc: BaseException, part: Piece, row: int, lost: list[Lost]) -> None:
        """Row `row` of the chunk failed: it is set aside, or ends the run."""
        if self.bad is None or not blames_rows(exc):
            raise self._blame(exc, part, row) from None
        lost.append((row, failure_of(exc, self.name)))

    def _blame(self, exc: BaseException, part: Piece, row: int | None) -> HeadraceError:
        return explain(exc, self.name, part.origin, row=row, columns=part.batch.schema.names)

    def _batch(
        self, rows: list[Mapping[str, Any]], part: Piece, given: Given, parents: Sequence[int] | None = None
    ) -> pa.RecordBatch:
        """parents: of each row, the one that it was made of; None: the one in its place."""
        end_if_forked()
        source = given if parents is None else given.at(parents)
        try:
            return rows_batch(rows, source, self._declared)
        except Refused as exc:
            row = exc.row
            if row is None:  # of all of them: who says no is one that does not go with most
                _, odd = fitting_rows(rows, source, self._declared)
                row = min(odd, default=None)
            raise self._blame(exc, part, row if row is None or parents is None else parents[row]) from exc.__cause__

    def _fitting(
        self, rows: Sequence[Mapping[str, Any]], parents: Sequence[int], given: Given, lost: list[Lost]
    ) -> tuple[pa.RecordBatch | None, list[int]]:
        """(the rows that go together as a batch, each one's parent). A parent of one that does not is lost with all it made."""
        end_if_forked()
        while rows:
            made, refused = fitting_rows(rows, given.at(parents), self._declared)
            if not refused:
                return made, list(parents)
            failed: dict[int, Refused] = {}
            for i, exc in refused.items():
                failed.setdefault(parents[i], exc)
            lost += [(parent, failure_of(exc, self.name)) for parent, exc in failed.items()]
            kept = [i for i, parent in enumerate(parents) if parent not in failed]
            rows, parents = [rows[i] for i in kept], [parents[i] for i in kept]
        return None, []


def _left(count: int, lost: Sequence[Lost]) -> list[int]:
    """The positions of the rows that are not lost."""
    gone = {at for at, _ in lost}
    return [i for i in range(count) if i not in gone]


class FilterRowsOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        for part, rows, _ in self._chunks(piece):
            lost: list[Lost] = []
            keep = self._truths(self._call_all(part, rows, lost), part, lost)
            if lost:
                self.lose(part, lost)
            kept = sum(keep)
            self.counts.filtered += len(keep) - kept
            if kept == len(rows):
                yield part
            elif kept:
                positions = np.flatnonzero(keep)
                yield part.take(np.asarray(_left(len(rows), lost))[positions] if lost else positions)

    def _truths(self, values: list[Any], part: Piece, lost: list[Lost]) -> list[bool]:
        try:
            return list(map(bool, values))
        except RowError:  # the truth of an array: which row's?
            return self._checked(values, _truth, part, lost)


class MapRowsOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        for part, rows, given in self._chunks(piece):
            lost: list[Lost] = []
            made = self._call_all(part, rows, lost)
            if not _DICTS.issuperset(map(type, made)):
                made = self._checked(made, _row, part, lost)
            if self.bad is None:
                yield Piece(self._batch(made, part, given), part.origin)
                continue
            batch, kept = self._fitting(made, _left(len(rows), lost), given, lost)
            lost.sort(key=lambda pair: pair[0])
            self.lose(part, lost)
            if batch is not None:
                yield Piece(batch, chosen(part.origin, np.asarray(kept)) if lost else part.origin)


class FlatMapOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        for part, rows, given in self._chunks(piece):
            lost: list[Lost] = []
            made = parted = 0  # rows made, and of how many rows
            last = -1
            for batch, parents in self._made(part, rows, given, lost):
                made += batch.num_rows
                parted += len(set(parents)) - (parents[0] == last)  # one row's may leave in several batches
                last = parents[-1]
                for start in range(0, batch.num_rows, FLAT_ROWS):
                    some = batch.slice(start, FLAT_ROWS)
                    yield Piece(some, chosen(part.origin, np.asarray(parents[start : start + FLAT_ROWS])))
            self.counts.expanded += made - parted
            self.counts.filtered += len(rows) - len(lost) - parted
            if lost:
                self.lose(part, sorted(lost, key=lambda pair: pair[0]))

    def _made(self, part: Piece, rows: list[Row], given: Given, lost: list[Lost]) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
        return self._flat(part, rows, given) if self.bad is None else self._flat_whole(part, rows, given, lost)

    def _flat(self, part: Piece, rows: list[Row], given: Given) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
        """(rows made, each one's parent), as soon as there are enough."""
        held: list[Mapping[str, Any]] = []
        parents: list[int] = []
        size = 0
        for i, run, run_bytes in self._runs(part, rows):
            held += run
            parents += [i] * len(run)
            size += run_bytes
            if size >= TARGET_BYTES or len(held) > FLAT_ROWS - RUN_ROWS:
                full, held, size = held, [], 0
                yield self._batch(full, part, given, parents), parents
                parents = []
        if held:
            yield self._batch(held, part, given, parents), parents

    def _runs(self, part: Piece, rows: list[Row]) -> Iterator[tuple[int, list[Mapping[str, Any]], int]]:
        """(the row's position, some of what the function makes of it, their bytes). Only what the user's code raises is blamed
        on it.
        """
        for i, row in enumerate(self._watched(part, rows, [])):
            source: Iterator[Any] | None = None
            ended = False
            while not ended:
                try:
                    source = self._iterator(row) if source is None else source
                    run, size, ended = _taken(source, RUN_ROWS, RUN_BYTES)
                except RowError as exc:
                    raise self._blame(exc, part, i) from None
                if run:
                    yield i, run, size

    def _flat_whole(
        self, part: Piece, rows: list[Row], given: Given, lost: list[Lost]
    ) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
        """The same where bad rows are set aside: all that one row makes leaves together."""
        held: list[Mapping[str, Any]] = []
        parents: list[int] = []
        size = 0
        done = 0  # rows called; those of `lost` that were condemned come in between
        condemned: list[Lost] = []
        for row in self._watched(part, rows, condemned):
            i = done + len(condemned)
            done += 1
            try:
                made, made_bytes, _ = _taken(self._iterator(row))
            except RowError as exc:
                self._fail(exc, part, i, lost)
                continue
            held += made
            parents += [i] * len(made)
            size += made_bytes
            if size >= TARGET_BYTES or len(held) >= FLAT_ROWS:
                batch, of = self._fitting(held, parents, given, lost)
                held, parents, size = [], [], 0
                if batch is not None:
                    yield batch, of
        lost += condemned
        batch, of = self._fitting(held, parents, given, lost)
        if batch is not None:
            yield batch, of

    def _iterator(self, row: Row) -> Iterator[Any]:
        made = self._fn(row, *self._args, **self._kwargs)
        if type(made) is list:  # the usual, and much quicker to tell than what is no Mapping
            return iter(made)
        if made is None or isinstance(made, (Mapping, str, bytes)):
            raise Refused(f"returned {_named(made)}", "return a list, or yield one dict a row")
        return iter(made)


def _taken(
    source: Iterator[Any], rows: int = sys.maxsize, size: int = sys.maxsize
) -> tuple[list[Mapping[str, Any]], int, bool]:
    """(rows taken: so many, or until they have so many bytes; about how much memory they take as columns; has it ended?).
    Raises Refused for what is no row.
    """
    made: list[Mapping[str, Any]] = []
    taken = 0
    for row in source:
        made.append(row if type(row) is dict else _row(row))
        for value in row.values():
            kind = type(value)
            if kind is str:
                taken += len(value) + 4
            else:
                taken += 8 if kind in _NUMBERS else _value_bytes(value)
        if taken >= size or len(made) == rows:
            return made, taken, False
    return made, taken, True


def _value_bytes(value: Any) -> int:
    if type(value) in _NUMBERS:
        return 8
    if isinstance(value, (str, bytes, bytearray)):
        return len(value) + 4
    if isinstance(value, (list, tuple)):
        return sum(map(_value_bytes, value)) + 4
    if isinstance(value, Mapping):
        return sum(map(_value_bytes, value.values()))
    size = getattr(value, "nbytes", None)  # arrays, tensors
    return size if isinstance(size, int) else 8


def _truth(value: Any) -> bool:
    try:
        return bool(value)
    except Exception as exc:  # the truth of an array
        raise Refused(f"returned what is neither true nor false: {exc}") from None


def _row(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _no_row(value)
    return value


def _no_row(value: Any) -> Refused:
    return Refused(f"returned {_named(value)} for a row", "return a dict of {column: value}")


def _named(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
