"""What a consumer needs of whatever carries blocks to it, and fetching ahead of the consumer.

A Channel is how an iterator reaches the coordinator, and all that it takes along when it is pickled. There is one for the
process of the hub itself and one for other processes of the machine; another (for instance: ask an actor, and read pieces
straight from an object store) needs these few methods and no other change.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import pyarrow as pa


class Epoch(Protocol):
    """One consumer's share of one epoch."""

    def next(self) -> pa.RecordBatch | None:
        """The next rows, in memory of the caller's own; waits for them. None at the end, and after `leave`.

        Raises what the run raises, and WorkerDied when the process that runs it is gone.
        """
        ...

    def leave(self) -> None:
        """Give up what is left, and end a `next` that waits. From any thread, any number of times."""
        ...


class Channel(Protocol):
    """Pickles. ahead: blocks worth fetching before they are asked for; 0 where nothing has to travel."""

    ahead: ClassVar[int]

    def join(self, rank: int) -> Epoch:
        """Wait until all ranks have joined the next epoch. Raises PlanError when another consumer has the rank."""
        ...

    def close(self) -> None:
        """End the run and the serving, for all ranks; where this process is not the one that serves, do nothing."""
        ...


def blocks(channel: Channel, rank: int) -> Generator[pa.RecordBatch]:
    """The rank's rows of one epoch. Closing it leaves the epoch."""
    epoch = channel.join(rank)
    try:
        if channel.ahead:
            yield from _fetched_ahead(epoch, channel.ahead)
        else:
            while (block := epoch.next()) is not None:
                yield block
                del block
    finally:
        epoch.leave()


def _fetched_ahead(epoch: Epoch, most: int) -> Generator[pa.RecordBatch]:
    """The epoch's blocks, of which a thread keeps `most` at hand."""
    changed = threading.Condition()
    ready: deque[pa.RecordBatch] = deque()
    over: list[BaseException | None] = []  # at the end: its error, or None
    left = False

    def fetch() -> None:
        error: BaseException | None = None
        try:
            while (block := epoch.next()) is not None:
                with changed:
                    ready.append(block)
                    del block
                    changed.notify_all()
                    changed.wait_for(lambda: len(ready) < most or left)
                    if left:
                        break
        except BaseException as caught:
            error = caught
        with changed:
            over.append(error)
            changed.notify_all()

    thread = threading.Thread(target=fetch, name="headrace-ingest-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: ready or over)
                block = ready.popleft() if ready else None
                changed.notify_all()
            if block is None:
                break
            yield block
            del block
        if over[0] is not None:
            raise over[0]
    finally:
        with changed:
            left = True
            changed.notify_all()
        epoch.leave()
        thread.join()
