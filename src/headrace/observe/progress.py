"""Progress: one line that redraws in place in a terminal, plain log lines anywhere else, on stderr.

Invariants:
- The line is drawn by a thread of its own, at most eight times a second: the engine has no ticks, and a stalled run still
  shows that time goes by. The driver's thread only folds events.
- One write draws the line; the cursor is never hidden and no terminal mode is changed, so that a run that is killed at any
  moment leaves the terminal sane.
- Prints of the caller's process go above the line, whole: while it is shown, `sys.stdout` and `sys.stderr` are watched if
  they are terminals too. What a worker process prints by itself may overlay the line until the next redraw.
- Log lines are plain text: no control characters.
- What happens on the way (a lost worker, scarce memory, a stop) is told at once, in lines of its own, above the line. After
  `MOST_TOLD` of them only the counts go on: a run of a million bad splits must not fill a disk with its log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO

from headrace.contracts.observer import Observer
from headrace.core.events import Noted, RunEvent, RunStarted, SplitRetried, WorkerReplaced
from headrace.core.options import Progress
from headrace.observe import words
from headrace.observe.live import Live, Picture

REDRAW_S = 0.125
FIRST_DRAW_S = 0.2  # a run that is over sooner shows its last line only, without a flicker
LOG_EVERY_S = 10.0
CLEAR = "\r\x1b[K"
MOST_TOLD = 100
_NAME_CELLS = 32


def make_observers(progress: Progress, stream: TextIO | None = None) -> list[Observer]:
    """The observers that `progress` asks for. "auto": a line when the stream (stderr) is a terminal, else log lines."""
    stream = stream or sys.stderr
    progress = settled(progress, stream)
    if progress == "quiet":
        return []
    return [ProgressLine(stream) if progress == "line" else LogLines(stream)]


def settled(progress: Progress, stream: Any) -> Literal["line", "log", "quiet"]:
    """What "auto" is on this stream."""
    if progress == "auto":
        return "line" if _is_terminal(stream) else "log"
    return progress


def room(stream: Any) -> int:
    """Columns to draw in: one less than there are, or some terminals wrap."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return (columns or 100) - 1


class _Drawn:
    """What line and log share: a Live under a lock, the events' clock, and a thread that draws."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._lag_s: float | None = None  # this clock minus the events' clock
        self._live = Live()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = 0

    def on_event(self, event: RunEvent) -> None:
        lag_s = self._clock() - event.at_s
        with self._lock:
            if self._lag_s is None or lag_s < self._lag_s:
                self._lag_s = lag_s
            self._live.on_event(event)
        if isinstance(event, Noted | SplitRetried | WorkerReplaced):
            self._tell(event)
        if isinstance(event, RunStarted) and self._thread is None:
            self._begin(event)
            self._thread = threading.Thread(target=self._draw_until_over, name="headrace-progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._end()

    def picture(self) -> Picture:
        with self._lock:
            return self._live.picture(self._clock() - (self._lag_s or 0.0))

    def _write(self, text: str) -> None:
        """A terminal that is gone or a closed pipe must not end the run."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._over.set()

    def _tell(self, event: Noted | SplitRetried | WorkerReplaced) -> None:
        self._told += 1
        if self._told <= MOST_TOLD:
            for line in told_lines(event):
                self._say(line)
        elif self._told == MOST_TOLD + 1:
            self._say("and so on: from here on they are only counted")

    def _say(self, line: str) -> None:
        """Show a line that stays."""
        raise NotImplementedError

    def _begin(self, event: RunStarted) -> None:
        raise NotImplementedError

    def _draw_until_over(self) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class ProgressLine(_Drawn):
    """One line, redrawn in place; its last state, with the totals, stays."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(stream or sys.stderr, clock)
        self._drawing = threading.RLock()  # held while the terminal is written to
        self._shown = False
        self._text_open = False  # somebody's print has not ended its line yet
        self._watched: list[tuple[str, _Watched]] = []

    def _begin(self, event: RunStarted) -> None:
        if event.settled:
            self._say(resumed(event))
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is self._stream or _is_terminal(stream):
                watched = _Watched(stream, self)
                setattr(sys, name, watched)
                self._watched.append((name, watched))

    def _draw_until_over(self) -> None:
        self._over.wait(FIRST_DRAW_S)
        while not self._over.is_set():
            self.draw()
            self._over.wait(REDRAW_S)

    def draw(self) -> None:
        """Draw the line as of now."""
        line = words.cut(live_line(self.picture(), self._room()), self._room())
        with self._drawing:
            if not self._text_open:
                self._write(CLEAR + line)
                self._shown = True

    def _end(self) -> None:
        for name, watched in self._watched:
            if getattr(sys, name) is watched:
                setattr(sys, name, watched.stream)
        self._watched.clear()
        with self._drawing:
            start = "\n" if self._text_open else CLEAR if self._shown else ""
            picture = self.picture()
            self._write(start + words.cut(last_line(picture), self._room()) + "\n")
            self._shown = self._text_open = False
            if picture.bad_rows and picture.quarantine:
                self._say(set_aside(picture))

    def print_above(self, stream: TextIO, text: str) -> int:
        """Write somebody's text to the terminal, the line out of its way."""
        with self._drawing:
            if self._shown:
                self._write(CLEAR)
                self._shown = False
            written = stream.write(text)
            if text:
                self._text_open = not text.endswith("\n")
            if not self._text_open:
                stream.flush()  # or a buffered line would come out after the next redraw, over it
            return written

    def _say(self, line: str) -> None:
        with self._drawing:
            start = "\n" if self._text_open else CLEAR if self._shown else ""
            self._write(f"{start}headrace: {line}\n")
            self._shown = self._text_open = False

    def _room(self) -> int:
        return room(self._stream)


class LogLines(_Drawn):
    """A line at the start, one every ten seconds, one at the end."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every_s: float = LOG_EVERY_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(stream or sys.stderr, clock)
        self._every_s = every_s

    def _begin(self, event: RunStarted) -> None:
        pools = ", ".join(f"{workers} {pool}" for pool, workers in event.pools.items())
        asked = "asked for " if event.engine == "ray" else ""  # of a cluster that may have none free for a while
        self._say(f"{_title(event.name)}  started  {event.engine}: {asked}{pools}")
        if event.settled:
            self._say(resumed(event))

    def _draw_until_over(self) -> None:
        while not self._over.wait(self._every_s):
            self._say(live_line(self.picture()))

    def _end(self) -> None:
        picture = self.picture()
        self._say(last_line(picture))
        if picture.bad_rows and picture.quarantine:
            self._say(set_aside(picture))

    def _say(self, line: str) -> None:
        self._write(f"headrace: {line}\n")


class _Watched:
    """A stream of the caller's process whose text goes above the line. All but writing is the stream's own."""

    def __init__(self, stream: TextIO, line: ProgressLine) -> None:
        self.stream = stream
        self._line = line

    def write(self, text: str) -> int:
        return self._line.print_above(self.stream, text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def live_line(picture: Picture, room: int | None = None) -> str:
    """images → out  62%  18,432 rows  7 bad  1,020 rows/s  ETA 0:12  cpu 97%  sim 41%  1 retry  mem 96 MB in flight, 410 MB

    Pieces that don't fit into `room` columns are left out, the least telling first.
    """
    pieces = [(9, _title(picture.name))]
    if picture.share is not None:
        pieces.append((8, words.share(picture.share)))
    elif picture.splits_done:
        pieces.append((5, f"{words.count(picture.splits_done)} splits"))
    pieces.append((7, f"{words.count(picture.rows)} rows"))
    if picture.bad_rows:
        pieces.append((6, f"{words.count(picture.bad_rows)} bad"))
    if picture.rows:
        pieces.append((6, f"{words.rate(picture.rows_per_s)} rows/s"))
    eta_s = picture.eta_s
    pieces.append((5, words.clock(picture.elapsed_s) if eta_s is None else f"ETA {words.clock(eta_s)}"))
    cluster = picture.cluster
    if cluster is not None:
        nodes = words.plural(cluster.nodes, "node")
        pieces.append((4, f"{nodes} ({cluster.leaving} leaving)" if cluster.leaving else nodes))
    for pool, busy in picture.busy.items():
        workers = f"{cluster.workers.get(pool, 0)} " if cluster is not None else ""
        pieces.append((4, f"{workers}{pool} {words.share(busy)}"))
    if picture.retries:
        pieces.append((3, words.plural(picture.retries, "retry", "retries")))
    if picture.in_flight_bytes or picture.rss_bytes:
        place = "in the object stores" if cluster is not None else "in flight"
        memory = f"{words.size(picture.in_flight_bytes)} {place}, {words.size(picture.rss_bytes)}"
        pieces.append((3, f"mem {memory}"))
    while room is not None and len(pieces) > 1 and words.cells(_join(pieces)) > room:
        pieces.remove(min(pieces, key=lambda piece: piece[0]))
    return _join(pieces)


def last_line(picture: Picture) -> str:
    """What stays: images → out  18,432 rows in 18.1 s  1,020 rows/s"""
    name = _title(picture.name)
    rows = f"{words.count(picture.rows)} rows"
    took = words.duration(picture.elapsed_s)
    if not picture.finished or stopped(picture.error):
        splits = f" ({words.count(picture.splits_done)} of {words.plural(picture.splits, 'split')})" if picture.splits else ""
        return f"{name}  stopped after {took}, {rows} done{splits}"
    if picture.error:
        return f"{name}  failed after {took}, {rows} done"
    if picture.earlier_rows:
        rows = f"{words.count(picture.rows - picture.earlier_rows)} of {rows}"
    pieces = [name, f"{rows} in {took}", f"{words.rate(picture.rows_per_s)} rows/s"]
    if picture.bad_rows:
        pieces.append(f"{words.count(picture.bad_rows)} bad")
    if picture.retries:
        pieces.append(words.plural(picture.retries, "retry", "retries"))
    return "  ".join(pieces)


def set_aside(picture: Picture) -> str:
    """Where the bad rows are."""
    are = "is" if picture.bad_rows == 1 else "are"
    return f"{words.plural(picture.bad_rows, 'bad row')} {are} set aside in {words.one_line(picture.quarantine)}"


def stopped(error: str) -> bool:
    """Somebody ended the run: it did not fail."""
    return error == "interrupted" or error.split(" ", 1)[0] == "stopped"


def resumed(event: RunStarted) -> str:
    """What earlier sessions leave to do."""
    done = f"{words.plural(event.settled, 'split')} ({words.plural(event.tally.written, 'row')})"
    return f"resumed: {done} {'was' if event.settled == 1 else 'were'} done"


def told_lines(event: Noted | SplitRetried | WorkerReplaced) -> list[str]:
    """The event in lines; those after the first are indented."""
    match event:
        case SplitRetried(_, index, attempt, why):
            text = f"split {index} starts again, attempt {attempt}: {why}"
        case WorkerReplaced(_, worker, pool, None, why, node):
            text = f"worker {worker} ({pool}) is added: {why}" + (f" ({node})" if node else "")
        case WorkerReplaced(_, worker, pool, replaces):
            text = f"worker {worker} ({pool}) takes the place of worker {replaces}"
        case Noted(_, text):
            pass
    first, *rest = text.splitlines() or [""]
    return [words.one_line(first), *(f"  {words.one_line(line)}" for line in rest)]


def _title(name: str) -> str:
    """A run that only hands rows to the caller may have no name."""
    return words.cut(words.one_line(name), _NAME_CELLS) or "headrace"


def _join(pieces: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in pieces if text)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False
