"""Lineage as columns: the same as a sequence of `LineageRun`, without an object for each of a hundred thousand runs.

Invariant: all columns are as long as each other; what is handed out is not changed afterwards.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import starmap
from typing import overload

import numpy as np

from headrace.core.receipts import LineageRun


class LineageColumns(Sequence[LineageRun]):
    """Runs, made into objects when they are looked at. uri: numbers of `uris`; the other columns as in LineageRun."""

    __slots__ = ("exact", "row", "rows", "source_row", "source_rows", "uri", "uris")

    def __init__(
        self,
        uris: Sequence[str],
        row: np.ndarray,
        rows: np.ndarray,
        uri: np.ndarray,
        source_row: np.ndarray,
        source_rows: np.ndarray,
        exact: np.ndarray,
    ) -> None:
        self.uris = uris
        self.row = row
        self.rows = rows
        self.uri = uri
        self.source_row = source_row
        self.source_rows = source_rows
        self.exact = exact

    @classmethod
    def of(cls, runs: Iterable[LineageRun]) -> LineageColumns:
        """The runs as columns; themselves if that is what they are."""
        if isinstance(runs, cls):
            return runs
        numbers: dict[str, int] = {}
        table = [(r.row, r.rows, numbers.setdefault(r.uri, len(numbers)), r.source_row, r.source_rows, r.exact) for r in runs]
        return cls(tuple(numbers), *columns(table))

    def __len__(self) -> int:
        return len(self.row)

    @overload
    def __getitem__(self, at: int) -> LineageRun: ...
    @overload
    def __getitem__(self, at: slice) -> LineageColumns: ...
    def __getitem__(self, at: int | slice) -> LineageRun | LineageColumns:
        if isinstance(at, slice):
            return LineageColumns(self.uris, *(column[at] for column in self._columns))
        row, rows, uri, source_row, source_rows, exact = (column[at].item() for column in self._columns)
        return LineageRun(row, rows, self.uris[int(uri)], source_row, source_rows, exact)

    def __iter__(self) -> Iterator[LineageRun]:
        row, rows, uri, source_row, source_rows, exact = (column.tolist() for column in self._columns)
        names = [self.uris[k] for k in uri]
        return starmap(LineageRun, zip(row, rows, names, source_row, source_rows, exact, strict=True))

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.row, self.rows, self.uri, self.source_row, self.source_rows, self.exact


def columns(runs: Sequence[tuple[int, int, int, int, int, bool]]) -> tuple[np.ndarray, ...]:
    """Columns of runs given as (row, rows, number of the uri, source_row, source_rows, exact)."""
    table = np.array(runs, np.int64).reshape(len(runs), 6)
    return (*(np.ascontiguousarray(table[:, k]) for k in range(5)), table[:, 5] != 0)
