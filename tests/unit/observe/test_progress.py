from __future__ import annotations

import io
import sys

import pytest
from msgspec.structs import replace
from tests.unit.observe.script import (
    START_S,
    Terminal,
    finished,
    found,
    memory,
    noted,
    replaced,
    retried,
    settled,
    started,
    step,
)

from headrace.core.receipts import Tally
from headrace.observe.live import Picture
from headrace.observe.progress import MOST_TOLD, LogLines, ProgressLine, last_line, live_line, make_observers


class Clock:
    def __init__(self) -> None:
        self.now = START_S

    def __call__(self) -> float:
        return self.now


def under_way() -> list[object]:
    return [
        started(),
        found(0, 4, 400),
        *step(0, 10, worker=0, tally=Tally(rows_in=1234, written=1234)),
        *step(5, 10, worker=2, pool="sim", stage=1),
        settled(10, 0, 100, 1234),
        memory(10, 96_000_000, 410_000_000),
    ]


def feed(observer: ProgressLine | LogLines, clock: Clock, events: list[object]) -> None:
    for event in events:
        clock.now = event.at_s  # type: ignore[attr-defined]
        observer.on_event(event)  # type: ignore[arg-type]


PICTURE = Picture(
    name="images → out",
    elapsed_s=20.0,
    rows=18_432,
    rows_per_s=1020.0,
    share=0.62,
    eta_s=12.0,
    splits_done=5,
    splits=8,
    busy={"cpu": 0.97, "sim": 0.41},
    in_flight_bytes=96_000_000,
    rss_bytes=410_000_000,
    finished=False,
    error="",
)


def test_line_says_it_all() -> None:
    expected = "images → out  62%  18,432 rows  1,020 rows/s  ETA 0:12  cpu 97%  sim 41%  mem 96 MB in flight, 410 MB"
    assert live_line(PICTURE) == expected


@pytest.mark.parametrize("room", [12, 20, 40, 60, 80, 100, 200])
def test_line_fits(room: int) -> None:
    line = live_line(PICTURE, room)
    assert len(line) <= room
    assert line.startswith("images → out")


def test_narrow_line_drops_the_least_telling_first() -> None:
    assert live_line(PICTURE, 80) == "images → out  62%  18,432 rows  1,020 rows/s  ETA 0:12  cpu 97%  sim 41%"
    assert live_line(PICTURE, 30) == "images → out  62%  18,432 rows"


def test_line_counts_splits_while_the_total_is_not_known() -> None:
    assert live_line(replace(PICTURE, share=None, eta_s=None), 60) == "images → out  5 splits  18,432 rows  1,020 rows/s  0:20"


def test_one_line_only_and_the_totals_stay() -> None:
    terminal, clock = Terminal(), Clock()
    line = ProgressLine(terminal, clock=clock)
    feed(line, clock, under_way())
    line.draw()
    line.draw()
    assert terminal.screen == [live_line(line.picture())]
    assert terminal.screen[0].startswith("images → out  25%  1,234 rows  123 rows/s  ETA 0:30  cpu 50%")
    feed(line, clock, [finished(20, rows_in=5000, written=5000)])
    line.close()
    assert terminal.screen == ["images → out  5,000 rows in 20.0 s  250 rows/s", ""]


def test_prints_go_above_the_line_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    line = ProgressLine(clock=clock)
    feed(line, clock, under_way())
    line.draw()
    print("hello")
    line.draw()
    print("half a", end="")
    line.draw()
    assert terminal.screen == ["hello", "half a"]
    print(" line", file=sys.stderr)
    line.draw()
    assert terminal.screen == ["hello", "half a line", live_line(line.picture())]
    line.close()
    assert terminal.screen[:2] == ["hello", "half a line"]
    assert sys.stdout is terminal
    assert sys.stderr is terminal


def test_text_left_open_does_not_swallow_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    line = ProgressLine(clock=clock)
    feed(line, clock, under_way())
    print("open", end="")
    line.close()
    assert terminal.screen == ["open", "images → out  stopped after 10.0 s, 1,234 rows done (1 of 4 splits)", ""]


def test_an_output_that_is_not_a_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock, pipe = Terminal(), Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", pipe)
    line = ProgressLine(clock=clock)
    feed(line, clock, under_way())
    assert sys.stdout is pipe
    line.close()


def test_close_twice_and_close_unstarted() -> None:
    terminal, clock = Terminal(), Clock()
    line = ProgressLine(terminal, clock=clock)
    line.close()
    assert terminal.getvalue() == ""
    feed(line, clock, under_way())
    line.close()
    line.close()
    assert terminal.getvalue().count("stopped after") == 1


def test_a_closed_stream_does_not_end_the_run() -> None:
    terminal, clock = Terminal(), Clock()
    line = ProgressLine(terminal, clock=clock)
    feed(line, clock, under_way())
    terminal.close()
    line.draw()
    line.close()


def test_clocks_may_differ() -> None:
    """Events may be stamped by another clock than the one that redraws; a late event does not turn time back."""
    now = [7.0]
    line = ProgressLine(Terminal(), clock=lambda: now[0])
    line.on_event(started())
    now[0] = 9.5
    line.on_event(memory(2.0, 1, 1))
    assert line.picture().elapsed_s == pytest.approx(2.5)
    line.close()


def test_log_lines_are_plain() -> None:
    stream, clock = io.StringIO(), Clock()
    log = LogLines(stream, clock=clock)
    feed(log, clock, under_way())
    feed(log, clock, [finished(20, rows_in=5000, written=5000)])
    log.close()
    assert stream.getvalue().splitlines() == [
        "headrace: images → out  started  threads: 2 cpu, 1 sim",
        "headrace: images → out  5,000 rows in 20.0 s  250 rows/s",
    ]


def test_log_lines_tell_failure() -> None:
    stream, clock = io.StringIO(), Clock()
    log = LogLines(stream, clock=clock)
    feed(log, clock, [started(name="evil\x1b[2J\nname"), finished(3, error="ValueError: no", rows_in=10, written=4)])
    log.close()
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1] == "headrace: evil [2J name  failed after 3.00 s, 4 rows done"


def test_a_run_without_a_name() -> None:
    assert live_line(replace(PICTURE, name=""), 20) == "headrace  62%"


def test_periodic_log_line() -> None:
    stream, clock = io.StringIO(), Clock()
    log = LogLines(stream, every_s=0.0, clock=clock)
    drawn = log._over.wait
    log._over.wait = lambda timeout=None: drawn(0) or "25%" in stream.getvalue()  # type: ignore[method-assign]
    feed(log, clock, under_way())
    thread = log._thread
    assert thread is not None
    thread.join(30)
    log.close()
    assert any(line.startswith("headrace: images → out  25%  1,234 rows") for line in stream.getvalue().splitlines())


def test_last_line_of_an_empty_run() -> None:
    assert "0 rows in" in last_line(Picture("x", 0.0, 0, 0.0, 1.0, None, 0, 0, {}, 0, 0, finished=True, error=""))


def test_make_observers() -> None:
    assert [type(o) for o in make_observers("auto", Terminal())] == [ProgressLine]
    assert [type(o) for o in make_observers("auto", io.StringIO())] == [LogLines]
    assert [type(o) for o in make_observers("line", io.StringIO())] == [ProgressLine]
    assert [type(o) for o in make_observers("log", Terminal())] == [LogLines]
    assert make_observers("quiet", Terminal()) == []


@pytest.mark.parametrize(("error", "said"), [("interrupted", "stopped after"), ("stopped", "stopped"), ("boom", "failed")])
def test_a_run_that_somebody_ended_did_not_fail(error: str, said: str) -> None:
    assert said in last_line(replace(PICTURE, finished=True, error=error))


MENDED = replace(PICTURE, bad_rows=7, retries=1)


def test_bad_rows_and_retries_are_on_the_line() -> None:
    whole = (
        "images → out  62%  18,432 rows  7 bad  1,020 rows/s  ETA 0:12  cpu 97%  sim 41%  1 retry  mem 96 MB in flight, 410 MB"
    )
    assert live_line(MENDED) == whole
    assert live_line(MENDED, 80) == "images → out  62%  18,432 rows  7 bad  1,020 rows/s  ETA 0:12  cpu 97%  sim 41%"


def test_last_lines() -> None:
    end = replace(MENDED, finished=True, elapsed_s=20.0, eta_s=None)
    assert last_line(end) == "images → out  18,432 rows in 20.0 s  1,020 rows/s  7 bad  1 retry"
    assert last_line(replace(end, earlier_rows=8432)).startswith("images → out  10,000 of 18,432 rows in 20.0 s")
    stopped = replace(PICTURE, finished=True, error="stopped by SIGTERM")
    assert last_line(stopped) == "images → out  stopped after 20.0 s, 18,432 rows done (5 of 8 splits)"


def test_what_happens_on_the_way_is_told_in_lines_of_the_log() -> None:
    stream, clock = io.StringIO(), Clock()
    log = LogLines(stream, clock=clock)
    resumed = started(settled=37, tally=Tally(rows_in=9, written=1234), quarantine="out/_headrace/run-00000/quarantine")
    events: list[object] = [
        resumed,
        noted(1, "worker 1 (cpu) is lost: no answer for 30 s, in map(f)\nThread 1:\n\x1b[2J  File x"),
        replaced(2, 3, 1),
        retried(2, 12),
        finished(4, rows_in=5000, written=4999, quarantined=1),
    ]
    feed(log, clock, events)
    log.close()
    assert stream.getvalue().splitlines() == [
        "headrace: images → out  started  threads: 2 cpu, 1 sim",
        "headrace: resumed: 37 splits (1,234 rows) were done",
        "headrace: worker 1 (cpu) is lost: no answer for 30 s, in map(f)",
        "headrace:   Thread 1:",
        "headrace:    [2J  File x",
        "headrace: worker 3 (cpu) takes the place of worker 1",
        "headrace: split 12 starts again, attempt 2: worker 1 died: killed by signal 9",
        "headrace: images → out  3,765 of 4,999 rows in 4.00 s  941 rows/s  1 bad  1 retry",
        "headrace: 1 bad row is set aside in out/_headrace/run-00000/quarantine",
    ]


def test_notes_go_above_the_line() -> None:
    terminal, clock = Terminal(), Clock()
    line = ProgressLine(terminal, clock=clock)
    feed(line, clock, under_way())
    line.draw()
    line.on_event(noted(10, "memory 14.2 of 16 GB: no new work until it falls"))
    line.draw()
    assert terminal.screen == [
        "headrace: memory 14.2 of 16 GB: no new work until it falls",
        live_line(line.picture()),
    ]
    line.close()


def test_a_log_does_not_grow_with_every_retry() -> None:
    stream, clock = io.StringIO(), Clock()
    log = LogLines(stream, clock=clock)
    feed(log, clock, [started(), *(retried(1, i) for i in range(10 * MOST_TOLD))])
    log.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == MOST_TOLD + 3
    assert lines[-2:] == [
        "headrace: and so on: from here on they are only counted",
        "headrace: images → out  stopped after 1.00 s, 0 rows done",
    ]
