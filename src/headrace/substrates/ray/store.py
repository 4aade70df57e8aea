"""A Ray worker's view of blocks: what it puts lies in its node's object store; what it gets is mapped from there, zero-copy.

A part's handle is an object reference, owned by the worker that made it: it is gone when that worker dies, and `get` then
raises BlockLost. The bytes of an object stay valid as long as any view of them lives.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, ObjectStoreFullError, OutOfDiskError

from headrace.contracts.substrate import Crumb
from headrace.core.errors import BlockLost, TransientError
from headrace.core.refs import PartRef
from headrace.substrates.blocks import own_copy

_PARTS_PER_WORKER = 1 << 40  # part ids are worker * this + a counter: unique in the run without asking anyone
NO_ROOM = (ObjectStoreFullError, OutOfDiskError)
_SLACK_BYTES = 64 << 10  # a batch whose buffers hold so much more than its rows is a slice: only the rows travel


class RayStore:
    """The BlockStore of an actor. Used by one thread at a time."""

    def __init__(self, worker: int, node: str, crumb: Crumb | None) -> None:
        self.crumb = crumb
        self._worker = worker
        self._node = node
        self._ids = itertools.count(worker * _PARTS_PER_WORKER + 1)
        self._at_hand: dict[int, pa.RecordBatch] = {}  # of the running step: fetched once, however often it is read

    def put(self, batch: pa.RecordBatch) -> PartRef:
        size = batch.nbytes
        if batch.get_total_buffer_size() > size + max(_SLACK_BYTES, size // 8):
            batch = own_copy(batch)
        try:
            ref = ray.put(batch)
        except NO_ROOM as full:
            raise no_room(full) from None
        return PartRef(next(self._ids), self._worker, size, tuple(batch.schema.names), ref, self._node)

    def get(self, part: PartRef) -> pa.RecordBatch:
        batch = self._at_hand.get(part.id)
        if batch is None:
            batch = self._at_hand[part.id] = fetch(part)
        return batch

    def offer(self, part: int, batch: pa.RecordBatch) -> None:
        """Ray has brought this part's batch along with the step."""
        self._at_hand[part] = batch

    def forget(self) -> None:
        """The step has ended: what its cursor still reads it holds itself."""
        self._at_hand.clear()


def fetch(part: PartRef, wait_s: float | None = None) -> Any:
    """The batch of a part, zero-copy. Raises BlockLost when its node or worker is gone, TransientError when there is no room
    for it here, and TimeoutError when it has not come within `wait_s`: the next call goes on with what has come of it by then.
    """
    try:  # a `get` that gives up drops what has come: a block that takes longer than `wait_s` never would
        if wait_s is not None and not ray.wait([part.handle], timeout=wait_s)[0]:
            raise TimeoutError
        return ray.get(part.handle, timeout=wait_s)
    except GetTimeoutError:
        raise TimeoutError from None
    except ObjectLostError as lost:
        raise block_lost(lost) from None
    except NO_ROOM as full:
        raise no_room(full) from None


def no_room(cause: BaseException) -> TransientError:
    """The error for a store, or the disk that it spills to, that takes no more."""
    what = "the disk that Ray spills blocks to is full" if isinstance(cause, OutOfDiskError) else "Ray's object store is full"
    return TransientError(
        f"{what} ({type(cause).__name__})",
        hint="other programs of the cluster may fill it; give nodes more (ray start --object-store-memory, a larger /dev/shm, "
        "disk under Ray's temp dir), or the run less (memory_bytes=)",
    )


def block_lost(cause: BaseException) -> BlockLost:
    """The error for a block that died with its owner."""
    return BlockLost(f"a block is gone with the worker that held it ({type(cause).__name__})", hint="its split starts again")
