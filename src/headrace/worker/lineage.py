"""Lineage: which rows of the input the rows of an output came from, as runs.

Invariant: the runs of a split name every output row, in order; at most about MOST_RUNS of them, unless there are more objects.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np

from headrace.core.receipts import LineageRun
from headrace.core.refs import Origin

MOST_RUNS = 100_000  # of a split: some 10 MB while they are collected

_Run = tuple[int, int, str, int, int, bool]  # as LineageRun; tuples of such are nothing that the garbage collector looks at


class Lineage:
    """Of one split's output, as its rows are written."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._rows = 0
        self._most = MOST_RUNS

    def add(self, origin: Origin, rows: int) -> None:
        """The next rows of the output."""
        if origin.exact:
            for s in origin.segments:
                self._exact(s.uri, s.row, s.rows)
        elif origin.index is not None:
            self._indexed(origin)
        else:
            single = origin.rows == 1
            for s in origin.segments:
                self._runs.append((self._rows, rows, s.uri, s.row, s.rows, single))
            self._rows += rows
        if len(self._runs) > self._most:
            self._coarsen()
            if 4 * len(self._runs) > 3 * self._most:  # rows of that many objects: there is little to merge
                self._most *= 2

    def runs(self) -> tuple[LineageRun, ...]:
        return tuple(LineageRun(*run) for run in self._runs)

    def _exact(self, uri: str, row: int, rows: int) -> None:
        if self._runs:
            at, count, last_uri, source, sources, exact = self._runs[-1]
            if exact and last_uri == uri and count == sources and source + sources == row:
                self._runs[-1] = (at, count + rows, uri, source, count + rows, True)
                self._rows += rows
                return
        self._runs.append((self._rows, rows, uri, row, rows, True))
        self._rows += rows

    def _indexed(self, origin: Origin) -> None:
        """Rows that are listed one by one: consecutive ones make a run, and so do repetitions of one."""
        positions = np.asarray(origin.index)
        firsts = np.flatnonzero(np.diff(positions, prepend=-1))
        values = positions[firsts]
        counts = np.diff(firsts, append=len(positions))
        ends = np.cumsum([s.rows for s in origin.segments])
        owner = np.searchsorted(ends, values, side="right")
        joined = (counts[1:] == 1) & (counts[:-1] == 1) & (np.diff(values) == 1) & (np.diff(owner) == 0)
        begins = np.flatnonzero(np.concatenate(([True], ~joined)))
        lengths = np.diff(begins, append=len(values))
        repeats = counts[begins]  # 1 wherever rows were joined
        owner = owner[begins]
        places = np.asarray([s.row - stop + s.rows for s, stop in zip(origin.segments, ends.tolist(), strict=True)])
        sources = values[begins] + places[owner]
        made = lengths * repeats
        starts = np.cumsum(made) - made + self._rows
        uris = [s.uri for s in origin.segments]
        named = [uris[k] for k in owner.tolist()]
        runs: list[_Run] = list(
            zip(starts.tolist(), made.tolist(), named, sources.tolist(), lengths.tolist(), repeat(True), strict=False)
        )
        _, rows, uri, source, count, _ = runs[0]
        if rows == count:  # it may go on where the last one ended
            del runs[0]
            self._exact(uri, source, rows)
            self._rows -= rows
        self._runs += runs
        self._rows += len(positions)

    def _coarsen(self) -> None:
        """Halve the runs: neighbours of one object become one vague run."""
        out: list[_Run] = []
        merged = False  # the last one, already
        for run in self._runs:
            last = out[-1] if out else None
            if last is None or merged or last[2] != run[2] or last[0] == run[0]:
                out.append(run)
                merged = False
                continue
            start = min(last[3], run[3])
            stop = max(last[3] + last[4], run[3] + run[4])
            out[-1] = (last[0], run[0] + run[1] - last[0], last[2], start, stop - start, stop - start == 1)
            merged = True
        self._runs = out
