"""Rows in flight: as many as are good, answered in the order in which they are done. For models that take requests.

Here is who waits for whom; what becomes of a request is a subclass's (`http.py`, `vllm.py`).

Invariants: each row that was pulled is answered once, with columns or an exception; rows are pulled only when they can go at
once; when a stream is closed, no task of it is left.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

Row = dict[str, Any]
LINGER_S = 0.005  # for more rows for a request that could take more
MOST_CONCURRENCY = 512
MOST_BATCH = 256
SAMPLES = 4  # answers that tell what a size takes; the second quickest of them does
SAVED = 0.8  # of the time per row, at most, that a larger batch may take
FIRST_PAUSE, MOST_PAUSE = 32, 1024  # answers between trials of a larger batch
GAIN = 1.05  # less is noise


class InFlight:
    """A StreamModel that asks for each group of rows by itself.

    concurrency: groups under way. batch_rows: rows in one. None for either: found out.
    """

    def __init__(self, concurrency: int | None, batch_rows: int | None = 1) -> None:
        self.outputs: tuple[str, ...] = ()
        self.concurrency = Concurrency(concurrency)
        self.batch = BatchSize(batch_rows)

    async def ask(self, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        """The answers to these rows. What it raises fails them all."""
        raise NotImplementedError

    def set_outputs(self, outputs: tuple[str, ...]) -> None:
        """The names in predict(output=...), () for none."""
        self.outputs = outputs

    async def stream(self, rows: AsyncIterator[tuple[Hashable, Row]]) -> AsyncIterator[tuple[Hashable, Row | Exception]]:
        done: asyncio.Queue[Sequence[tuple[Hashable, Row | Exception]] | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()
        feeding = asyncio.create_task(self._feed(rows, tasks, done))
        try:
            while (answered := await done.get()) is not None:
                for key, answer in answered:
                    yield key, answer
            await feeding
        finally:
            left = [feeding, *tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _feed(
        self,
        rows: AsyncIterator[tuple[Hashable, Row]],
        tasks: set[asyncio.Task[None]],
        done: asyncio.Queue[Sequence[tuple[Hashable, Row | Exception]] | None],
    ) -> None:
        """Pull rows as soon as a request may go, and send it."""

        async def send(batch: Sequence[tuple[Hashable, Row]]) -> None:
            asked = [row for _, row in batch]
            try:
                answers: Sequence[Row | Exception] = await self.ask(asked)
            except Exception as exc:
                answers = [exc] * len(asked)
            finally:
                self.concurrency.release()
            done.put_nowait([(key, answer) for (key, _), answer in zip(batch, answers, strict=True)])

        more = True
        try:
            while more:
                await self.concurrency.acquire()
                try:
                    batch, more = await _pull(rows, self.batch.rows)
                except BaseException:
                    self.concurrency.release()
                    raise
                if not batch:
                    self.concurrency.release()
                    break
                task = asyncio.create_task(send(batch))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            while tasks:
                await asyncio.wait(tasks)
        finally:
            done.put_nowait(None)


class Concurrency:
    """How many requests may be under way at once: a given number, or found out.

    Found out: it doubles while that brings more rows a second, then goes by one; a server that asks for less gets half.
    (Additive increase, multiplicative decrease: Chiu and Jain 1989.) Used in one event loop. clock: for tests.
    """

    def __init__(self, fixed: int | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit = fixed or 4
        self._fixed = fixed is not None
        self._clock = clock
        self._active = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._doubling = True
        self._best = 0.0  # rows a second
        self._rows = self._answers = 0
        self._since_s: float | None = None

    async def acquire(self) -> None:
        while self._active >= self.limit:
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                self._next()
                raise
        self._active += 1

    def release(self) -> None:
        self._active -= 1
        self._next()

    def answered(self, rows: int) -> None:
        """A request was answered. Only a full house says something."""
        if self._fixed:
            return
        if self._since_s is None or self._active < self.limit:
            self._restart()
            return
        self._rows += rows
        self._answers += 1
        if self._answers < 2 * self.limit:
            return
        rate = self._rows / max(1e-9, self._clock() - self._since_s)
        if rate > self._best * GAIN:
            self._best = rate
            self.limit = min(MOST_CONCURRENCY, self.limit * 2 if self._doubling else self.limit + 1)
        elif self._doubling:
            self._doubling = False
            self.limit = max(1, self.limit // 2)
        self._restart()
        self._next()

    def throttled(self) -> None:
        """The server asks for less. Once for all requests that were under way then."""
        if self._fixed:
            return
        self._doubling = False
        if self._answers or self._best == 0.0 or self._since_s is None:
            self.limit = max(1, self.limit // 2)
        self._best *= 0.5  # it may grow again
        self._restart()

    def _restart(self) -> None:
        self._rows = self._answers = 0
        self._since_s = self._clock()

    def _next(self) -> None:
        for _ in range(max(0, self.limit - self._active)):
            while self._queue and self._queue[0].done():
                self._queue.popleft()
            if not self._queue:
                return
            self._queue.popleft().set_result(None)


class BatchSize:
    """How many rows a request gets: a given number, or found out, by doubling while that saves a fifth of the time per row.

    Where it does not, the size stays, and the next one is tried again ever more rarely, against what the size takes by then: a
    server's first answers say little, if it then begins to throttle, or has more requests to work on.
    """

    def __init__(self, fixed: int | None) -> None:
        self.rows = fixed or 1
        self._settled = fixed is not None
        self._trying = False  # the size is a trial, against half of it
        self._least_s = 0.0  # a row, of half of it
        self._last_s: deque[float] = deque(maxlen=SAMPLES)  # a row, of this size
        self._left = 0  # answers until the next trial
        self._pause = FIRST_PAUSE

    def answered(self, rows: int, seconds: float) -> None:
        if self._settled or rows != self.rows:
            return
        self._last_s.append(seconds / rows)
        self._left -= 1
        if len(self._last_s) < SAMPLES or self._left > 0:
            return
        row_s = sorted(self._last_s)[1]
        self._last_s.clear()
        if self._trying and row_s >= SAVED * self._least_s:
            self._go_back()
            return
        if self._trying:
            self._pause = FIRST_PAUSE
        self._settled = self.rows >= MOST_BATCH
        if not self._settled:
            self._trying, self._least_s = True, row_s
            self.rows *= 2

    def refused(self, rows: int) -> None:
        """A request was not answered, and its rows are asked for in halves. A trial of that size is over."""
        if self._trying and not self._settled and rows == self.rows:
            self._last_s.clear()
            self._go_back()

    def _go_back(self) -> None:
        self._trying = False
        self.rows //= 2
        self._left, self._pause = self._pause, min(2 * self._pause, MOST_PAUSE)


async def _pull(rows: AsyncIterator[tuple[Hashable, Row]], most: int) -> tuple[list[tuple[Hashable, Row]], bool]:
    """The next rows, as many as are at hand, at least one; False when there will be no more."""
    batch: list[tuple[Hashable, Row]] = []
    try:
        batch.append(await anext(rows))
        while len(batch) < most:
            async with asyncio.timeout(LINGER_S):
                batch.append(await anext(rows))
    except StopAsyncIteration:
        return batch, False
    except TimeoutError:
        pass
    return batch, True
