"""Live: the running picture of a run, folded from its events, from which progress is drawn.

Pure: no clock (the moment is an argument, in the events' own time), no thread, no terminal. Cost per event is constant, and
memory depends on the number of workers alone.

- Rows count as done when they are written, or delivered to the consumer; those of earlier sessions of the run, too. Rates are
  of this session alone.
- What a retried split had told no longer counts.
- A worker is busy from the start of a step to its end. Steps wait in line at a worker, so that of a finished step the
  worker's own time counts, and of several under way only the foremost.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct, field

from headrace.core.events import (
    ClusterSampled,
    MemorySampled,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitRetried,
    SplitSettled,
    SplitsFound,
    StepFinished,
    StepStarted,
    WorkerGone,
)
from headrace.core.receipts import NO_ROWS, Tally

BUSY_WINDOW_S = 3.0
RATE_WINDOW_S = 10.0  # rows come in bursts, a split at a time
ETA_WINDOW_S = 60.0


class Picture(Struct, frozen=True):
    """One moment. share: of the input that is done, None when it can't be told. busy: pool -> share of its workers.

    earlier_rows: of `rows`, those of earlier sessions. bad_rows: left out, or set aside in `quarantine` where that is named.
    """

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
    earlier_rows: int = 0
    bad_rows: int = 0
    quarantine: str = ""
    retries: int = 0
    workers_lost: int = 0
    cluster: ClusterSampled | None = None  # on a Ray cluster


class _Worker(Struct):
    pool: str
    under_way: int = 0
    since_s: float = 0.0


class _Sample(Struct):
    at_s: float
    rows: int
    share: float
    busy_s: dict[str, float] = field(default_factory=dict[str, float])


class Live:
    """`on_event` folds, `picture(now_s)` reads. Not locked: the owner does that."""

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.finished: RunFinished | None = None
        self._tally = Tally()  # of this session
        self._before = NO_ROWS  # of earlier ones
        self._settled_before = 0
        self._retries = 0
        self._workers_lost: set[int] = set()
        self._cluster: ClusterSampled | None = None
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
            case ClusterSampled():
                self._cluster = event
            case SplitsFound():
                self._found_splits, self._found_bytes = event.count, event.bytes
                self._found_rows, self._listed = event.rows, event.complete
            case SplitRetried():
                self._retries += 1
                self._tally = minus(self._tally, event.tally)
            case WorkerGone():
                self._workers_lost.add(event.worker)
                self._workers.pop(event.worker, None)
            case RunStarted():
                self.started = event
                self._before, self._settled_before = event.tally, event.settled
            case RunFinished():
                self.finished = event
                self._tally = minus(event.tally, self._before)
            case _:
                pass

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
            rows=self._before.written + self._tally.written,
            rows_per_s=self._rows_per_s(now, start_s),
            share=share,
            eta_s=self._eta_s(now, share, start_s),
            splits_done=self._settled_before + self._settled_splits,
            splits=self._found_splits,
            busy=self._busy_share(now, start_s),
            in_flight_bytes=self._in_flight_bytes,
            rss_bytes=self._rss_bytes,
            finished=self.finished is not None,
            error=self.finished.error if self.finished else "",
            earlier_rows=self._before.written,
            bad_rows=self._before.bad + self._tally.bad,
            quarantine=self.started.quarantine if self.started else "",
            retries=self._retries,
            workers_lost=len(self._workers_lost),
            cluster=self._cluster,
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
        if self._cluster is not None:  # workers come and go
            pools = pools | self._cluster.workers
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
        return max(0, now.rows - rows) / (now.at_s - since_s) if now.at_s > since_s else 0.0

    def _eta_s(self, now: _Sample, share: float | None, start_s: float) -> float | None:
        if share is None or not self._listed or self.finished:
            return None
        since = self._sample_at(now.at_s - ETA_WINDOW_S)
        gained = share - (since.share if since else self._of_all(0.0))
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
        """Of all input, None while it is not known how much that is."""
        if self.finished and not self.finished.error:
            return 1.0
        if not self._listed:
            return None
        if self._settled_before and self._found_splits <= self._settled_before:
            return 1.0
        here = self._share_here()
        return None if here is None and not self._settled_before else self._of_all(here or 0.0)

    def _of_all(self, share: float) -> float:
        """The share of all input, from that of what earlier sessions left to do: a split counts as one of all splits."""
        if not self._settled_before or not self._found_splits:
            return share
        before = min(1.0, self._settled_before / self._found_splits)
        return before + share * (1.0 - before)

    def _share_here(self) -> float | None:
        """Of this session's input, from the best that is known: rows of the listing, else bytes of settled splits, to which
        open splits are added by the rows that they have given so far.
        """
        t = self._tally
        ended = t.written + t.filtered + t.skipped + t.quarantined + t.cut
        if self._found_rows:
            arrived = t.rows_in + t.expanded
            return min(1.0, ended / arrived * t.rows_in / self._found_rows) if arrived else 0.0
        if not self._found_bytes:
            here = self._found_splits - self._settled_before
            return self._settled_splits / here if here > 0 else None
        if not self._settled_splits:
            return None  # nothing tells yet how much of the bytes the first splits have got through
        done_bytes = float(self._settled_bytes)
        if self._rows_told and self._settled_rows:
            done_bytes = max(done_bytes, self._settled_bytes * t.written / self._settled_rows)
        return min(1.0, done_bytes / self._found_bytes)


def minus(a: Tally, b: Tally) -> Tally:
    """`a` without `b`."""
    return Tally(
        a.rows_in - b.rows_in,
        a.expanded - b.expanded,
        a.written - b.written,
        a.filtered - b.filtered,
        a.skipped - b.skipped,
        a.quarantined - b.quarantined,
        a.cut - b.cut,
    )
