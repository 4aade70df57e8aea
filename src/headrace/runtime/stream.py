"""BlockStream: a run whose blocks go to the caller's own loop. The driver works in a thread of its own, so that workers stay
busy while the caller does; inline runs are driven by the caller's `next`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from headrace.core.frames import with_room
from headrace.runtime.driver import Driver
from headrace.runtime.signals import Stopped


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def stream_blocks(make_driver: Callable[[Callable[[Any], None]], Driver], *, inline: bool) -> Iterator[Any]:
    """Yield record batches in order. make_driver: given what to call with each delivered batch.

    Closing the iterator stops the run: no worker, thread or block outlives it. Raises what the run raises.
    """
    return _stream_inline(make_driver) if inline else _stream_threaded(make_driver)


def _stream_threaded(make_driver: Callable[[Callable[[Any], None]], Driver]) -> Iterator[Any]:
    queue: SimpleQueue[Any] = SimpleQueue()  # bounded by the scheduler's credits
    driver = make_driver(queue.put)

    def work() -> None:
        try:
            driver.run()
        except BaseException as error:
            queue.put(_End(error))
        else:
            queue.put(_End(None))

    thread = threading.Thread(target=with_room, args=(work,), name="headrace-driver", daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            driver.took(1)
            yield item
            del item
    finally:
        if thread.is_alive():
            driver.stop()
            thread.join()


def _stream_inline(make_driver: Callable[[Callable[[Any], None]], Driver]) -> Iterator[Any]:
    """Inline: workers run in the caller's thread anyway, so the whole loop is turned between two yields."""
    ready: deque[Any] = deque()
    driver = make_driver(ready.append)
    turns = driver.turns()
    try:
        for _ in turns:
            while ready:
                batch = ready.popleft()
                driver.took(1)
                yield batch
                del batch
        yield from ready
    except Stopped:
        return
    finally:
        turns.close()
