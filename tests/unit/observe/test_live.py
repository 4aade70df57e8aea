from __future__ import annotations

import pytest
from tests.unit.observe.script import START_S, finished, found, memory, replaced, retried, settled, started, step

from headrace.core.events import RunEvent, StepStarted, WorkerGone
from headrace.core.receipts import Tally
from headrace.observe.live import Live


def live(*events: RunEvent) -> Live:
    out = Live()
    for event in events:
        out.on_event(event)
    return out


def test_busy_counts_finished_and_running_steps() -> None:
    view = live(started(), *step(0.0, 1.0, worker=0), StepStarted(START_S + 1.0, 1, "cpu", 0))
    busy = view.picture(START_S + 2.0).busy
    assert busy == {"cpu": pytest.approx(0.5), "sim": 0.0}  # 1 s finished + 1 s under way, of 2 workers x 2 s


def test_steps_in_line_at_one_worker_are_not_counted_twice() -> None:
    begin = [StepStarted(START_S, 2, "sim", 1), StepStarted(START_S, 2, "sim", 1)]
    assert live(started(), *begin).picture(START_S + 2.0).busy["sim"] == pytest.approx(1.0)
    first_done = step(0.0, 1.0, worker=2, pool="sim", stage=1)[1]
    assert live(started(), *begin, first_done).picture(START_S + 2.0).busy["sim"] == pytest.approx(1.0)


def test_busy_looks_at_the_last_seconds_only() -> None:
    view = live(started(), *step(0.0, 10.0, worker=0), *step(0.0, 10.0, worker=1))
    assert view.picture(START_S + 10.0).busy["cpu"] == pytest.approx(1.0)
    assert view.picture(START_S + 14.0).busy["cpu"] == pytest.approx(0.0)


def test_share_by_rows_of_the_listing() -> None:
    tally = Tally(rows_in=500, written=200, filtered=50)
    view = live(started(), found(0, 10, 1000, rows=1000), *step(0, 1, tally=tally))
    assert view.picture(START_S + 1).share == pytest.approx(0.25)


def test_share_by_rows_where_rows_multiply() -> None:
    tally = Tally(rows_in=10, expanded=2990, written=1500)  # half of what 10 of 100 rows became
    view = live(started(), found(0, 1, 1000, rows=100), *step(0, 1, tally=tally))
    assert view.picture(START_S + 1).share == pytest.approx(0.05)


def test_share_by_bytes_adds_what_open_splits_gave() -> None:
    view = live(started(), found(0, 10, 1000), *step(0, 1, tally=Tally(rows_in=150, written=150)), settled(1, 0, 100, 100))
    assert view.picture(START_S + 1).share == pytest.approx(0.15)


def test_share_is_unknown_while_the_listing_goes_on() -> None:
    picture = live(started(), found(0, 10, 1000, complete=False), settled(1, 0, 100, 10)).picture(START_S + 1)
    assert picture.share is None
    assert picture.eta_s is None


def test_share_of_splits_when_nothing_has_a_size() -> None:
    assert live(started(), found(0, 4, 0), settled(1, 0, 0, None)).picture(START_S + 1).share == pytest.approx(0.25)


def test_eta_and_rate() -> None:
    view = live(started(), found(0, 4, 400), *step(0, 10, tally=Tally(rows_in=100, written=100)), settled(10, 0, 100, 100))
    picture = view.picture(START_S + 10)
    assert picture.eta_s == pytest.approx(30.0)
    assert picture.rows_per_s == pytest.approx(10.0)


def test_rate_follows_a_change_of_pace() -> None:
    view = live(started(), *step(0, 10, tally=Tally(written=1000)))
    assert view.picture(START_S + 10).rows_per_s == pytest.approx(100.0)
    assert view.picture(START_S + 20).rows_per_s == pytest.approx(0.0)


def test_the_end_is_final() -> None:
    view = live(started(), found(0, 1, 10), memory(1, 5, 6), finished(4.0, rows_in=80, written=80))
    picture = view.picture(START_S + 99)
    assert (picture.elapsed_s, picture.rows, picture.rows_per_s, picture.share) == (4.0, 80, 20.0, 1.0)
    assert (picture.in_flight_bytes, picture.rss_bytes, picture.finished) == (5, 6, True)


def test_memory_does_not_grow_with_the_run() -> None:
    view = live(started(), found(0, 10_000, 10_000))
    for i in range(2_000):
        for event in step(i, i + 1, tally=Tally(written=1)):
            view.on_event(event)
        view.on_event(settled(i + 1, i, 1, 1))
        view.picture(START_S + i + 1)
    assert len(view._samples) < 300
    assert len(view._workers) == 1


def test_a_resumed_run_shows_all_rows_but_only_its_own_pace() -> None:
    before = Tally(rows_in=600, written=600, quarantined=2)
    view = live(
        started(settled=6, tally=before),
        found(0, 10, 400, rows=400),  # rows and bytes of the four that are left
        *step(0, 10, tally=Tally(rows_in=100, written=100)),
        settled(10, 6, 100, 100),
    )
    picture = view.picture(START_S + 10)
    assert (picture.rows, picture.earlier_rows, picture.bad_rows, picture.splits_done) == (700, 600, 2, 7)
    assert picture.rows_per_s == pytest.approx(10.0)
    assert picture.share == pytest.approx(0.6 + 0.4 * 0.25)
    assert picture.eta_s == pytest.approx(30.0)
    view.on_event(finished(40, rows_in=1000, written=1000))
    end = view.picture(START_S + 99)
    assert (end.rows, end.rows_per_s, end.share) == (1000, 10.0, 1.0)


def test_a_resumed_run_knows_its_share_before_anything_is_done() -> None:
    assert live(started(settled=3), found(0, 12, 0)).picture(START_S + 1).share == pytest.approx(0.25)
    assert live(started(settled=3), found(0, 12, 900)).picture(START_S + 1).share == pytest.approx(0.25)
    assert live(started(settled=3), found(0, 3, 0)).picture(START_S + 1).share == 1.0


def test_what_a_retried_split_had_told_is_taken_back() -> None:
    told = Tally(rows_in=80, written=80, skipped=1)
    view = live(started(), *step(0, 1, tally=told), *step(1, 2, tally=Tally(written=20)), retried(2, 0, told))
    picture = view.picture(START_S + 2)
    assert (picture.rows, picture.bad_rows, picture.retries) == (20, 0, 1)
    assert picture.rows_per_s >= 0


def test_a_lost_worker_is_not_busy_for_ever() -> None:
    gone = WorkerGone(START_S + 1.0, 0, "cpu")
    view = live(started(), StepStarted(START_S, 0, "cpu", 0), gone, replaced(1.0, 7, 0))
    picture = view.picture(START_S + 4.0)
    assert (picture.busy["cpu"], picture.workers_lost) == (0.0, 1)


def test_workers_that_went_with_their_node_are_lost_once() -> None:
    gone = [WorkerGone(START_S + 1.0, worker, "cpu") for worker in (0, 1)]
    view = live(started(), StepStarted(START_S, 0, "cpu", 0), *gone, replaced(1.0, 7, 1))
    picture = view.picture(START_S + 4.0)
    assert (picture.busy["cpu"], picture.workers_lost) == (0.0, 2)
