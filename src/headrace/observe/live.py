"""Live: the running picture of a run, folded from its events, from which progress is drawn.

Pure: no clock (the moment is an argument, in the events' own time), no thread, no terminal. Cost per event is constant, and
memory depends on the number of workers alone.

- Rows count as done when they are written, or delivered to the consumer.
- A worker is busy from the start of a step to its end. Steps wait in line at a worker, so that of a finished step the
  worker's own time counts, and of several under way only the foremost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from headrace.core.events import (
    MemorySampled,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitSettled,
    SplitsFound,
    StepFinished,
    StepStarted,
)
from headrace.core.receipts import Tally

BUSY_WINDOW_S = 3.0
RATE_WINDOW_S = 10.0  # rows come in bursts, a split at a time
ETA_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Picture:
    """One moment. share: of the input that is done, None when it can't be told. busy: pool -> share of its workers."""

    name: str
    elapsed_s: float
    rows: int
    rows_per_s: float
    share: float | None
    eta_s: float | None
    splits_done: int
    splits: int
    busy: dict[str, float]
    in_flight_bytes: int
    rss_bytes: int
    finished: bool
    error: str


@dataclass(slots=True)
class _Worker:
    pool: str
    under_way: int = 0
    since_s: float = 0.0


@dataclass(slots=True)
class _Sample:
    at_s: float
    rows: int
    share: float
    busy_s: dict[str, float] = field(default_factory=dict[str, float])


class Live:
    """`on_event` folds, `picture(now_s)` reads. Not locked: the owner does that."""

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.finished: RunFinished | None = None
        self._tally = Tally()
        self._found_splits = 0
        self._found_bytes = 0
        self._found_rows: int | None = None
        self._listed = False
        self._settled_splits = 0
        self._settled_bytes = 0
        self._settled_rows = 0
        self._rows_told = True  # every settled split said how many rows it wrote
        self._in_flight_bytes = 0
        self._rss_bytes = 0
        self._workers: dict[int, _Worker] = {}
        self._busy_s: dict[str, float] = {}
        self._samples: deque[_Sample] = deque()

    def on_event(self, event: RunEvent) -> None:
        match event:
            case StepFinished():
                self._step_finished(event)
            case StepStarted():
                worker = self._workers.setdefault(event.worker, _Worker(event.pool))
                if worker.under_way == 0:
                    worker.since_s = event.at_s
                worker.under_way += 1
            case SplitSettled():
                self._settled_splits += 1
                self._settled_bytes += event.bytes
                if event.receipt is None:
                    self._rows_told = False
                else:
                    self._settled_rows += event.receipt.rows
            case MemorySampled():
                self._in_flight_bytes, self._rss_bytes = event.in_flight_bytes, event.rss_bytes
            case SplitsFound():
                self._found_splits, self._found_bytes = event.count, event.bytes
                self._found_rows, self._listed = event.rows, event.complete
            case RunStarted():
                self.started = event
            case RunFinished():
                self.finished = event
                self._tally = event.tally

    def picture(self, now_s: float) -> Picture:
        start_s = self.started.at_s if self.started else now_s
        if self.finished:
            now_s = self.finished.at_s
        elapsed_s = max(0.0, now_s - start_s)
        share = self._share()
        now = _Sample(now_s, self._tally.written, share or 0.0, self._busy_until(now_s))
        samples = self._samples
        while len(samples) > 1 and samples[1].at_s <= now_s - ETA_WINDOW_S:
            samples.popleft()
        picture = Picture(
            name=self.started.name if self.started else "",
            elapsed_s=elapsed_s,
            rows=self._tally.written,
            rows_per_s=self._rows_per_s(now, start_s),
            share=share,
            eta_s=self._eta_s(now, share, start_s),
            splits_done=self._settled_splits,
            splits=self._found_splits,
            busy=self._busy_share(now, start_s),
            in_flight_bytes=self._in_flight_bytes,
            rss_bytes=self._rss_bytes,
            finished=self.finished is not None,
            error=self.finished.error if self.finished else "",
        )
        if not samples or now_s - samples[-1].at_s >= BUSY_WINDOW_S / 12:
            samples.append(now)
        return picture

    def _step_finished(self, event: StepFinished) -> None:
        worker = self._workers.setdefault(event.worker, _Worker(event.pool, 1, event.at_s))
        busy_s = event.timing.wall_s
        self._busy_s[event.pool] = self._busy_s.get(event.pool, 0.0) + busy_s
        worker.under_way = max(0, worker.under_way - 1)
        worker.since_s = event.at_s
        self._tally += event.tally

    def _busy_until(self, now_s: float) -> dict[str, float]:
        busy_s = dict(self._busy_s)
        for worker in self._workers.values():
            if worker.under_way:
                busy_s[worker.pool] = busy_s.get(worker.pool, 0.0) + max(0.0, now_s - worker.since_s)
        return busy_s

    def _busy_share(self, now: _Sample, start_s: float) -> dict[str, float]:
        pools = self.started.pools if self.started else {}
        since = self._sample_at(now.at_s - BUSY_WINDOW_S)
        since_s = since.at_s if since else start_s
        span_s = now.at_s - since_s
        if span_s <= 0:
            return dict.fromkeys(pools, 0.0)
        out: dict[str, float] = {}
        for pool, workers in pools.items():
            before_s = since.busy_s.get(pool, 0.0) if since else 0.0
            busy_s = now.busy_s.get(pool, 0.0) - before_s
            out[pool] = min(1.0, max(0.0, busy_s / (span_s * max(1, workers))))
        return out

    def _rows_per_s(self, now: _Sample, start_s: float) -> float:
        if self.finished:
            return now.rows / (now.at_s - start_s) if now.at_s > start_s else 0.0
        since = self._sample_at(now.at_s - RATE_WINDOW_S)
        rows, since_s = (since.rows, since.at_s) if since else (0, start_s)
        return (now.rows - rows) / (now.at_s - since_s) if now.at_s > since_s else 0.0

    def _eta_s(self, now: _Sample, share: float | None, start_s: float) -> float | None:
        if share is None or not self._listed or self.finished:
            return None
        since = self._sample_at(now.at_s - ETA_WINDOW_S)
        gained = share - (since.share if since else 0.0)
        if gained <= 0:
            return None
        return (now.at_s - (since.at_s if since else start_s)) * (1 - share) / gained

    def _sample_at(self, at_s: float) -> _Sample | None:
        """The newest sample that is no younger than `at_s`; None when the run is younger than that."""
        found: _Sample | None = None
        for sample in self._samples:
            if sample.at_s > at_s:
                break
            found = sample
        return found

    def _share(self) -> float | None:
        """Of all input, from the best that is known: rows of the listing, else bytes of settled splits, to which open
        splits are added by the rows that they have given so far.
        """
        if self.finished and not self.finished.error:
            return 1.0
        t = self._tally
        ended = t.written + t.filtered + t.skipped + t.quarantined + t.cut
        if not self._listed:
            return None
        if self._found_rows:
            arrived = t.rows_in + t.expanded
            return min(1.0, ended / arrived * t.rows_in / self._found_rows) if arrived else 0.0
        if not self._found_bytes:
            return self._settled_splits / self._found_splits if self._found_splits else None
        if not self._settled_splits:
            return None  # nothing tells yet how much of the bytes the first splits have got through
        done_bytes = float(self._settled_bytes)
        if self._rows_told and self._settled_rows:
            done_bytes = max(done_bytes, self._settled_bytes * t.written / self._settled_rows)
        return min(1.0, done_bytes / self._found_bytes)
