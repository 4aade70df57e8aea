"""Lineage: runs of output rows, merged where they go on, coarser where there are too many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.lineage import LineageColumns
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


@pytest.mark.parametrize("waiting", [1, 1 << 16])
@given(st.lists(st.integers(0, 8), min_size=1, max_size=30).map(sorted), st.integers(1, 29))
def test_listed_rows_are_traced_one_by_one(waiting, rows, cut):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lineage, "WAITING_ROWS", waiting)
        check_listed(rows, cut)


def check_listed(rows, cut):
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


@pytest.mark.parametrize("waiting", [1, 1 << 16])
def test_rows_that_go_on_are_one_run_however_they_came(monkeypatch: pytest.MonkeyPatch, waiting: int):
    monkeypatch.setattr(lineage, "WAITING_ROWS", waiting)
    found = Lineage()
    whole = Origin((Segment("a", 0, 100),))
    found.add(whole.slice(0, 10), 10)
    found.add(Origin(whole.segments, exact=False, index=np.arange(10, 20)), 10)
    found.add(Origin(whole.segments, exact=False, index=np.arange(20, 30)), 10)
    found.add(whole.slice(30, 70), 70)
    assert list(found.runs()) == [LineageRun(0, 100, "a", 0, 100)]


def test_runs_before_listed_rows_and_after_keep_their_order():
    found = Lineage()
    vague = Origin((Segment("a", 5, 3), Segment("b", 0, 2)), exact=False)
    listed = Origin((Segment("a", 0, 9),), exact=False, index=np.array([1, 1, 4]))
    for origin, rows in ((vague, 4), (listed, 3), (vague, 1), (listed, 3)):
        found.add(origin, rows)
    assert list(found.runs()) == [
        LineageRun(0, 4, "a", 5, 3, exact=False),
        LineageRun(0, 4, "b", 0, 2, exact=False),
        LineageRun(4, 2, "a", 1, 1),
        LineageRun(6, 1, "a", 4, 1),
        LineageRun(7, 1, "a", 5, 3, exact=False),
        LineageRun(7, 1, "b", 0, 2, exact=False),
        LineageRun(8, 2, "a", 1, 1),
        LineageRun(10, 1, "a", 4, 1),
    ]


def test_one_of_several_places_is_never_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lineage, "MOST_RUNS", 4)
    found = Lineage()
    for _ in range(20):
        found.add(Origin((Segment("a", 7, 1), Segment("b", 7, 1)), exact=False), 2)
    assert not any(run.exact for run in found.runs())


def test_an_index_is_not_kept():
    """It may be a view of a block, whose memory is free only when nobody holds one."""
    index = np.arange(0, 10, 2)
    found = Lineage()
    found.add(Origin((Segment("a", 0, 10),), exact=False, index=index), 5)
    index[:] = 0
    assert [run.source_row for run in found.runs()] == [0, 2, 4, 6, 8]


def test_columns_are_a_sequence_of_runs():
    runs = [LineageRun(0, 2, "a", 4, 2), LineageRun(2, 3, "b", 0, 1), LineageRun(5, 4, "a", 9, 7, exact=False)]
    held = LineageColumns.of(runs)
    assert LineageColumns.of(held) is held
    assert (len(held), list(held), held[1], held[-1], list(held[1:])) == (3, runs, runs[1], runs[2], runs[1:])
    assert list(LineageColumns.of([])) == list(Lineage().runs()) == []
