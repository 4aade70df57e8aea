"""A Ray worker's view of blocks: what it puts lies in its node's object store; what it gets is mapped from there, zero-copy.

A part's handle is an object reference, owned by the worker that made it: it is gone when that worker dies, and `get` then
raises BlockLost. The bytes of an object stay valid as long as any view of them lives.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError

from headrace.contracts.substrate import Crumb
from headrace.core.errors import BlockLost
from headrace.core.refs import PartRef
from headrace.substrates.blocks import own_copy

_PARTS_PER_WORKER = 1 << 40  # part ids are worker * this + a counter: unique in the run without asking anyone
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
        ref = ray.put(batch)
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


def fetch(part: PartRef) -> Any:
    """The batch of a part, zero-copy. Raises BlockLost when its node or worker is gone."""
    try:
        return ray.get(part.handle)
    except ObjectLostError as lost:
        raise block_lost(lost) from None


def block_lost(cause: BaseException) -> BlockLost:
    """The error for a block that died with its owner."""
    return BlockLost(f"a block is gone with the worker that held it ({type(cause).__name__})", hint="its split starts again")
