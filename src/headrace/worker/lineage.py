"""Lineage: which rows of the input the rows of an output came from, as runs.

Rows that are listed one by one wait until there are many of them: arrays of a few rows cost as much as arrays of many.

Invariant: the runs of a split name every output row, in order; at most about MOST_RUNS of them, unless there are more objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.core.lineage import LineageColumns, columns
from headrace.core.receipts import LineageRun
from headrace.core.refs import Origin

MOST_RUNS = 100_000  # of a split: some 5 MB while they are collected
WAITING_ROWS = 1 << 16  # rows listed one by one that wait to become runs
TAIL_RUNS = 1 << 12  # runs that wait to become arrays
FEW_RUNS = 8  # not worth arrays

_Array = Any  # of NumPy
_Run = tuple[int, int, int, int, int, bool]  # as LineageRun, with the number of the uri


class Lineage:
    """Of one split's output, as its rows are written."""

    def __init__(self) -> None:
        self._uris: dict[str, int] = {}
        self._done: list[tuple[_Array, ...]] = []  # columns of runs
        self._done_runs = 0
        self._tail: list[_Run] = []  # the runs after those
        self._waiting: list[tuple[_Array, _Array]] = []  # where the rows after those came from
        self._waiting_rows = 0
        self._rows = 0  # without those that wait
        self._most = MOST_RUNS

    def add(self, origin: Origin, rows: int) -> None:
        """The next rows of the output."""
        if origin.index is not None:
            self._waiting.append(self._place(origin))
            self._waiting_rows += rows
            if self._waiting_rows >= WAITING_ROWS:
                self._list()
            return
        if self._waiting:
            self._list()
        if origin.exact:
            for s in origin.segments:
                self._exact(self._number(s.uri), s.row, s.rows)
        else:
            single = len(origin.segments) == 1 and origin.segments[0].rows == 1
            for s in origin.segments:
                self._tail.append((self._rows, rows, self._number(s.uri), s.row, s.rows, single))
            self._rows += rows
        if len(self._tail) >= TAIL_RUNS:
            self._store()

    def runs(self) -> Sequence[LineageRun]:
        """All that were added."""
        if self._waiting:
            self._list()
        if not self._done and len(self._tail) <= FEW_RUNS:
            uris = tuple(self._uris)
            return [LineageRun(row, rows, uris[uri], source, among, ok) for row, rows, uri, source, among, ok in self._tail]
        self._store()
        return LineageColumns(tuple(self._uris), *self._joined())

    def _number(self, uri: str) -> int:
        return self._uris.setdefault(uri, len(self._uris))

    def _exact(self, uri: int, row: int, rows: int) -> None:
        if self._tail:
            at, count, last_uri, source, sources, exact = self._tail[-1]
            if exact and last_uri == uri and count == sources and source + sources == row:
                self._tail[-1] = (at, count + rows, uri, source, count + rows, True)
                self._rows += rows
                return
        self._tail.append((self._rows, rows, uri, row, rows, True))
        self._rows += rows

    # --- rows that are listed one by one

    def _list(self) -> None:
        """Those that wait become runs: consecutive rows make one, and so do repetitions of one."""
        source, uri = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_rows = [], 0
        firsts = _starts((source[1:] == source[:-1]) & (uri[1:] == uri[:-1]))
        counts = np.diff(firsts, append=len(source))
        values, uris = source[firsts], uri[firsts]
        single = counts == 1
        begins = _starts(single[1:] & single[:-1] & (values[1:] - values[:-1] == 1) & (uris[1:] == uris[:-1]))
        lengths = np.diff(begins, append=len(values))
        made = lengths * counts[begins]  # one of them is 1
        rows = np.cumsum(made) - made + self._rows
        self._rows += len(source)
        self._add_listed(rows, made, uris[begins], values[begins], lengths)

    def _add_listed(self, row: _Array, rows: _Array, uri: _Array, source: _Array, sources: _Array) -> None:
        """Exact runs; the first may go on where the last one ended, and the last one stays open in turn."""
        if self._tail and rows[0] == sources[0]:
            at, count, last_uri, first, among, exact = self._tail[-1]
            if exact and count == among and last_uri == uri[0] and first + among == source[0]:
                self._tail.pop()
                row[0], source[0] = at, first
                rows[0] += count
                sources[0] += among
        self._store()
        last = len(row) - 1
        if last:
            self._append(row[:last], rows[:last], uri[:last], source[:last], sources[:last], np.ones(last, np.bool_))
        self._tail.append((int(row[last]), int(rows[last]), int(uri[last]), int(source[last]), int(sources[last]), True))

    def _place(self, origin: Origin) -> tuple[_Array, _Array]:
        """(row in its object, number of the object) of each row. New arrays: the index may be a view of a block."""
        index, segments = origin.index, origin.segments
        if len(segments) == 1:
            (segment,) = segments
            return index + segment.row, np.full(len(index), self._number(segment.uri))
        sizes = np.array([s.rows for s in segments])
        ends = np.cumsum(sizes)
        owner = np.searchsorted(ends, index, side="right")
        starts = np.array([s.row for s in segments]) - ends + sizes
        return index + starts[owner], np.array([self._number(s.uri) for s in segments])[owner]

    # --- runs as columns

    def _append(self, *chunk: _Array) -> None:
        self._done.append(chunk)
        self._done_runs += len(chunk[0])
        while self._done_runs > self._most:
            before = self._done_runs
            self._coarsen()
            if 4 * self._done_runs > 3 * before:  # rows of that many objects: there is little to merge
                self._most *= 2

    def _store(self) -> None:
        if self._tail:
            tail, self._tail = self._tail, []
            self._append(*columns(tail))

    def _joined(self) -> tuple[_Array, ...]:
        if not self._done:
            return columns(())
        return tuple(np.concatenate(parts) for parts in zip(*self._done, strict=True))

    def _coarsen(self) -> None:
        """Halve the runs: neighbours of one object become one vague run."""
        row, rows, uri, source, sources, exact = self._joined()
        starts = _starts((uri[1:] == uri[:-1]) & (row[1:] != row[:-1]))
        lengths = np.diff(starts, append=len(row))
        second = (np.arange(len(row)) - np.repeat(starts, lengths)) % 2 == 1
        b = np.flatnonzero(second)
        a = b - 1
        start = np.minimum(source[a], source[b])
        stop = np.maximum(source[a] + sources[a], source[b] + sources[b])
        rows[a] = row[b] + rows[b] - row[a]
        source[a] = start
        sources[a] = stop - start
        exact[a] &= exact[b] & (stop - start == 1)
        left = ~second
        self._done = [tuple(column[left] for column in (row, rows, uri, source, sources, exact))]
        self._done_runs = len(row) - len(b)


def _starts(continued: _Array) -> _Array:
    """Where runs begin. continued[i]: row i + 1 goes on where row i ends."""
    return np.concatenate(([0], np.flatnonzero(~continued) + 1))
