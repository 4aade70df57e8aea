"""Reading ahead, for sources that wait for a network: a block of the split that is being read, and the first one of the next.

Invariants: when a `ReadAhead` is closed or has ended, its thread has ended too, and the source's iterator was closed in it;
what `Ahead` has begun is taken once or closed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from headrace.contracts.source import BadRange, OnBad, Source
from headrace.core.frames import with_room
from headrace.core.options import BlockLimits
from headrace.core.splits import Split

T = TypeVar("T")

MOSTLY = 0.75  # of a split's rows: what is left takes about as long as the first request of the next, or longer
MOST_TAKEN = 1024  # splits opened last that are remembered: more than can have been opened since a worker was told the next


class _End:
    """The last thing that a thread hands over. error: what ended it, None for the end of the source."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ReadAhead(Generic[T]):
    """The items of `source`; while one is being used, a thread reads the next. At most two items exist at a time."""

    def __init__(self, source: Iterator[T]) -> None:
        self._handed: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._stop = threading.Event()
        self._again: list[T] = []
        args = (_fill, source, self._handed, self._room, self._stop)
        self._thread = threading.Thread(target=with_room, args=args, name="headrace-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def give_back(self, item: T) -> None:
        """It comes again."""
        self._again.append(item)

    def __next__(self) -> T:
        if self._again:
            return self._again.pop()
        if self._stop.is_set():
            raise StopIteration
        item = self._handed.get()
        if not isinstance(item, _End):
            self._room.release()
            return item
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Idempotent."""
        self._again.clear()
        self._stop.set()
        self._room.release()
        self._thread.join()


def _fill(source: Iterator[Any], handed: queue.SimpleQueue[Any], room: threading.Semaphore, stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        while True:
            room.acquire()
            if stop.is_set():
                break
            item = next(source, stop)  # `stop` itself marks the end
            if item is stop:
                break
            handed.put(item)
            del item
    except BaseException as exc:
        error = exc
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):  # the items are what counts; the error above says more
                close()
        handed.put(_End(error))


class Told:
    """What a reading has to tell whoever opens its split, which may be later than it happens. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: list[BadRange] = []
        self._to: OnBad | None = None
        self._mostly = False
        self._on_mostly: Callable[[], None] | None = None

    def bad(self, bad: BadRange) -> None:
        with self._lock:
            if self._to is None:
                self._held.append(bad)
            else:
                self._to(bad)

    def mostly(self) -> None:
        """Most of the split has been read. Only the first time counts."""
        with self._lock:
            if not self._mostly and self._on_mostly is not None:
                self._on_mostly()
            self._mostly = True

    def hand_to(self, on_bad: OnBad, on_mostly: Callable[[], None]) -> None:
        with self._lock:
            self._to, self._on_mostly = on_bad, on_mostly
            for bad in self._held:
                on_bad(bad)
            self._held.clear()
            if self._mostly:
                on_mostly()


Begun = tuple[ReadAhead[Any], Told]


def begin_reading(source: Source, split: Split, limits: BlockLimits, *, fails: bool) -> Begun:
    """The split's blocks, from now on. fails: the first range that can't be read ends it; otherwise such are told."""
    told = Told()
    blocks: Any = source.open(split, limits) if fails else source.open(split, limits, told.bad)

    def counted() -> Iterator[Any]:
        rows = 0
        with contextlib.closing(blocks):
            for block in blocks:
                rows += block[0].num_rows
                if split.rows is not None and rows >= MOSTLY * split.rows:
                    told.mostly()
                yield block
        told.mostly()

    return ReadAhead(counted()), told


class Ahead:
    """Splits whose first blocks are being read before a worker opens them, by all workers of this process. Thread-safe.

    Another process begins with nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[int, tuple[Split, BlockLimits, Begun]] = {}
        self._taken: OrderedDict[int, None] = OrderedDict()

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()

    def begin(self, splits: Sequence[Split], limits: BlockLimits, read: Callable[[Split], Begun]) -> None:
        """The first of these that nobody has begun or opened."""
        with self._lock:
            for split in splits:
                if split.index not in self._begun and split.index not in self._taken:
                    self._begun[split.index] = split, limits, read(split)
                    return

    def take(self, split: Split, limits: BlockLimits) -> Begun | None:
        """What has come of the split, for the one who opens it; None if it is to be read from its start."""
        with self._lock:
            self._taken[split.index] = None
            if len(self._taken) > MOST_TAKEN:
                self._taken.popitem(last=False)
            found = self._begun.pop(split.index, None)
        if found is None or found[:2] == (split, limits):
            return None if found is None else found[2]
        found[2][0].close()  # begun before it was known how splits and blocks are cut
        return None

    def first(self, split: Split, limits: BlockLimits, read: Callable[[Split], Begun]) -> Any:
        """Begin a split; its first block, which comes again for whoever takes the split. None if there is no block. Raises what
        reading raises; whoever opens the split then reads it from its start.
        """
        begun = read(split)
        blocks, _ = begun
        try:
            found = next(blocks, None)
        except BaseException:
            blocks.close()
            raise
        if found is not None:
            blocks.give_back(found)
            with self._lock:
                self._begun[split.index] = split, limits, begun
        return found

    def close(self) -> None:
        """Close what nobody took, and what that has begun meanwhile."""
        while True:
            with self._lock:
                if not self._begun:
                    return
                _, (_, _, (blocks, _)) = self._begun.popitem()
            blocks.close()
