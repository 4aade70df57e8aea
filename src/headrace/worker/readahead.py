"""Reading one block ahead, for sources that wait for a network.

Invariant: when the generator is closed or ends, its thread has ended too, and the source's iterator was closed in it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class _End:
    """The last thing that a thread hands over. error: what ended it, None for the end of the source."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def read_ahead(source: Iterator[T]) -> Iterator[T]:
    """The items of `source`; while one is being used, a thread reads the next. At most two items exist at a time."""
    handed: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(1)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(source, handed, room, stop), name="headrace-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = handed.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item
            del item
    finally:
        stop.set()
        room.release()
        thread.join()


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
