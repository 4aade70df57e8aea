"""Row functions: filter, map and flat_map with a Python function of one row.

Invariant: at most a chunk of rows exists as Python objects at a time, whatever the size of the block; flat_map's rows
leave as soon as they fill a block, while its iterable is still running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.core.errors import HeadraceError
from headrace.core.tensors import numpy_to_array
from headrace.plan.nodes import UserFunction
from headrace.worker.batching import Piece
from headrace.worker.formats import Given, row_chunks, to_rows
from headrace.worker.operators import TARGET_BYTES, Counts, Operator
from headrace.worker.results import Refused, rows_batch
from headrace.worker.user_code import explain

FLAT_ROWS = 8192  # rows of a flat_map that leave together, however small they are


class RowOperator(Operator):
    """A function of one row, called in chunks of rows."""

    def __init__(self, fn: Callable[..., Any], spec: UserFunction, index: int, name: str, counts: Counts) -> None:
        super().__init__(index, name, counts)
        self._fn = fn
        self._args = spec.args
        self._kwargs = dict(spec.kwargs)

    def _chunks(self, piece: Piece) -> Iterator[tuple[Piece, list[dict[str, Any]]]]:
        rows = piece.batch.num_rows
        step = row_chunks(piece.batch)
        for start in range(0, rows, step):
            part = piece.slice(start, min(step, rows - start))
            yield part, to_rows(part.batch)

    def _call_all(self, part: Piece, rows: list[dict[str, Any]]) -> list[Any]:
        fn, args, kwargs = self._fn, self._args, self._kwargs
        out: list[Any] = []
        try:
            for row in rows:
                out.append(fn(row, *args, **kwargs))
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            raise self._blame(exc, part, len(out)) from None
        return out

    def _blame(self, exc: BaseException, part: Piece, row: int | None) -> HeadraceError:
        return explain(exc, self.name, part.origin, row=row, columns=part.batch.schema.names)

    def _batch(self, rows: list[Mapping[str, Any]], part: Piece) -> pa.RecordBatch:
        try:
            return rows_batch(rows, Given(part.batch.schema))
        except Refused as exc:
            raise self._blame(exc, part, None) from exc.__cause__


class FilterRowsOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        for part, rows in self._chunks(piece):
            try:
                keep = [bool(value) for value in self._call_all(part, rows)]
            except ValueError as exc:  # the truth of an array
                raise self._blame(Refused(f"returned what is neither true nor false: {exc}"), part, None) from None
            kept = sum(keep)
            self.counts.filtered += len(keep) - kept
            if kept == len(keep):
                yield part
            elif kept:
                yield Piece(part.batch.take(numpy_to_array(np.flatnonzero(keep))), part.origin.inexact())


class MapRowsOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        for part, rows in self._chunks(piece):
            made = self._call_all(part, rows)
            for i, row in enumerate(made):
                if not isinstance(row, Mapping):
                    raise self._blame(_no_row(row), part, i)
            yield Piece(self._batch(made, part), part.origin)


class FlatMapOp(RowOperator):
    def push(self, piece: Piece) -> Iterator[Piece]:
        made = 0
        for part, rows in self._chunks(piece):
            for batch in self._flat(part, rows):
                made += batch.num_rows
                yield Piece(batch, part.origin.inexact())
        self.counts.change(piece.batch.num_rows, made)

    def _flat(self, part: Piece, rows: list[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
        held: list[Mapping[str, Any]] = []
        size = 0
        for row in self._each(part, rows):
            held.append(row)
            size += estimated_bytes(row)
            if size >= TARGET_BYTES or len(held) >= FLAT_ROWS:
                full, held, size = held, [], 0
                yield self._batch(full, part)
        if held:
            yield self._batch(held, part)

    def _each(self, part: Piece, rows: list[dict[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows that the function makes, one by one. Only what the user's code raises is blamed on it."""
        for i, row in enumerate(rows):
            try:
                made = self._fn(row, *self._args, **self._kwargs)
                if made is None or isinstance(made, (Mapping, str, bytes)):
                    raise Refused(f"returned {_named(made)}", "return a list, or yield one dict a row")
                source = iter(made)
            except (Exception, KeyboardInterrupt, SystemExit) as exc:
                raise self._blame(exc, part, i) from None
            while True:
                try:
                    item = next(source)
                except StopIteration:
                    break
                except (Exception, KeyboardInterrupt, SystemExit) as exc:
                    raise self._blame(exc, part, i) from None
                if not isinstance(item, Mapping):
                    raise self._blame(_no_row(item), part, i)
                yield item


def estimated_bytes(row: Mapping[str, Any]) -> int:
    """About how much memory a row will take as columns."""
    return sum(_value_bytes(value) for value in row.values())


def _value_bytes(value: Any) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return len(value) + 4
    if isinstance(value, (list, tuple)):
        return sum(map(_value_bytes, value)) + 4
    if isinstance(value, Mapping):
        return estimated_bytes(value)
    size = getattr(value, "nbytes", None)  # arrays, tensors
    return size if isinstance(size, int) else 8


def _no_row(value: Any) -> Refused:
    return Refused(f"returned {_named(value)} for a row", "return a dict of {column: value}")


def _named(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
