"""Lineage: runs of output rows, merged where they go on, coarser where there are too many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.origins import chosen, join_origins
from headrace.core.receipts import LineageRun
from headrace.core.refs import Origin, Segment
from headrace.worker import lineage
from headrace.worker.lineage import Lineage

FILES = Origin((Segment("a", 10, 5), Segment("b", 0, 4)))


def test_exact_pieces_make_one_run_an_object():
    found = Lineage()
    found.add(FILES.slice(0, 3), 3)
    found.add(FILES.slice(3, 6), 6)
    assert list(found.runs()) == [LineageRun(0, 5, "a", 10, 5), LineageRun(5, 4, "b", 0, 4)]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30).map(sorted), st.integers(1, 29))
def test_listed_rows_are_traced_one_by_one(rows, cut):
    found = Lineage()
    for part in (rows[:cut], rows[cut:]):
        if part:
            found.add(chosen(FILES, np.array(part)), len(part))
    traced = []
    for run in found.runs():
        assert run.exact
        assert run.row == len(traced)
        assert run.source_rows in (1, run.rows)
        traced += [(run.uri, run.source_row + (i if run.source_rows > 1 else 0)) for i in range(run.rows)]
    assert traced == [FILES.locate(row) for row in rows]


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9).map(sorted), min_size=1, max_size=4))
def test_joined_origins_still_know_every_row(parts):
    origins = [chosen(FILES, np.array(part)) for part in parts]
    joined = join_origins(origins)
    rows = [row for part in parts for row in part]
    assert [joined.locate(i) for i in range(len(rows))] == [FILES.locate(row) for row in rows]
    half = joined.slice(len(rows) // 2, len(rows) - len(rows) // 2)
    assert [half.locate(i) for i in range(len(rows) - len(rows) // 2)] == [FILES.locate(r) for r in rows[len(rows) // 2 :]]


def test_too_many_runs_become_vague_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lineage, "MOST_RUNS", 20)
    found = Lineage()
    rows = np.arange(0, 1000, 2)
    for start in range(0, 500, 5):
        found.add(chosen(Origin((Segment("a", 0, 1000),)), rows[start : start + 5]), 5)
    runs = found.runs()
    assert len(runs) <= 20
    assert sum(r.rows for r in runs) == 500
    for run in runs:
        covered = range(run.source_row, run.source_row + run.source_rows)
        assert all(int(x) in covered for x in rows[run.row : run.row + run.rows])
    assert not all(r.exact for r in runs)
