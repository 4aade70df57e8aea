"""The driver's account of blocks: in which arena each part is, who holds leases of it, and when its range is free again.

No processes, sockets or messages here: the pool is told what to tell its workers.

Invariants: a range is free when the run has released its part, or moved it to disk, and no worker holds a lease of it (see
`store`), never before; the dead hold no leases; a dead worker's arena goes with its last part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from headrace.core.errors import InternalError
from headrace.core.refs import PartRef
from headrace.core.steps import Step, StepDone

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.substrates.processes.arena import Mapping
    from headrace.substrates.spill import SpillFile

SPILL_ARENA = -1  # stands in a handle where the number of the worker is whose arena holds the part


class Ledger:
    """on_free(worker, offset, bytes): a range of a live worker's arena is free. on_gone(arena): nothing is in it any more.

    spill_dir: where parts go that are moved to disk; None for a temporary directory.
    """

    def __init__(self, on_free: Callable[[int, int, int], None], on_gone: Callable[[int], None]) -> None:
        self.spill_dir: str | None = None
        self._on_free = on_free
        self._on_gone = on_gone
        self._parts: dict[int, _Part] = {}
        self._arenas: dict[int, _Arena] = {}
        self._spilled: SpillFile | None = None
        self._spill_map: Mapping | None = None
        self._freed: list[int] = []

    # -- workers

    def open_arena(self, worker: int, size: int) -> int:
        """Make a worker's arena. The descriptor stays the ledger's."""
        from headrace.substrates.processes.arena import create_arena

        fd = create_arena(worker, size)
        self._arenas[worker] = _Arena(fd)
        return fd

    def descriptor(self, arena: int) -> int:
        """Of an arena that holds a part, or whose worker lives."""
        if arena == SPILL_ARENA and self._spilled is not None:
            return self._spilled.fd
        return self._arenas[arena].fd

    def worker_died(self, worker: int) -> None:
        """Its leases end; its parts stay readable; what else it had of memory goes back now, as nobody else will."""
        for part_id, part in list(self._parts.items()):
            if part.leases.pop(worker, 0) and part.released and not part.leases:
                self._free(part_id, part)
        self._arenas[worker].alive = False
        self._reclaim(worker)

    # -- parts

    def register(self, answer: StepDone) -> None:
        """The parts that a worker made."""
        for block in answer.outputs:
            for ref in block.parts:
                if ref.id not in self._parts and ref.owner == answer.worker:
                    arena, offset, length = ref.handle
                    self._parts[ref.id] = _Part(arena, offset, length)
                    self._arenas[arena].parts += 1

    def lease(self, worker: int, step: Step) -> set[int]:
        """The step is about to be sent: its worker holds one more lease of each input. The arenas that it must know."""
        arenas: set[int] = set()
        parts = [self._find(ref) for block in step.inputs for ref in block.parts]  # all or none
        for part in parts:
            arenas.add(part.arena)
            part.leases[worker] = part.leases.get(worker, 0) + 1
        return arenas

    def give_back(self, worker: int, views: Sequence[tuple[int, int]]) -> None:
        """A worker returns leases: (part id, how many)."""
        for part_id, count in views:
            part = self._parts[part_id]
            part.leases[worker] -= count
            if not part.leases[worker]:
                del part.leases[worker]
                if part.released and not part.leases:
                    self._free(part_id, part)

    def release(self, parts: Sequence[PartRef]) -> None:
        """The run needs these parts no more. Those that are known no more are ignored."""
        for ref in parts:
            part = self._parts.get(ref.id)
            if part is not None:
                part.released = True
                if not part.leases:
                    self._free(ref.id, part)

    def take_freed(self) -> tuple[int, ...]:
        """Parts that were freed since the last call."""
        freed = tuple(self._freed)
        self._freed.clear()
        return freed

    @property
    def has_freed(self) -> bool:
        return bool(self._freed)

    def copy(self, ref: PartRef) -> pa.RecordBatch:
        """The part in new memory."""
        import numpy as np
        import pyarrow as pa

        from headrace.substrates.blocks import decode

        part = self._find(ref)
        copy = pa.allocate_buffer(part.length)
        np.frombuffer(copy, np.uint8)[:] = self._mapping(part.arena).view(part.offset, part.length)
        return decode(copy)

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        """Move parts without leases to disk. Those that were moved: as many, in order, as the disk took.

        Takes as long as the disk needs to have them; their memory goes back to the kernel.
        """
        waiting = [p for p in parts if (part := self._parts.get(p.id)) and part.arena != SPILL_ARENA and not part.leases]
        if not waiting:
            return ()
        if self._spilled is None:
            from headrace.substrates.spill import SpillFile

            try:
                self._spilled = SpillFile(self.spill_dir)
            except OSError:
                return ()
        offsets = self._spilled.store(self._contents(waiting))
        return tuple(self._move(ref, offset) for ref, offset in zip(waiting, offsets, strict=False))

    # -- memory

    @property
    def memory_bytes(self) -> int:
        """What all arenas hold, without what is on disk."""
        return sum(self.arena_bytes(arena) for arena in self._arenas)

    def arena_bytes(self, arena: int) -> int:
        """Memory that an arena holds, whether its ranges are in use or free."""
        from headrace.substrates.processes.arena import touched_bytes

        return touched_bytes(self._arenas[arena].fd)

    def close(self) -> None:
        """Forget all parts and free all memory. No worker may run any more."""
        for arena in self._arenas.values():
            arena.close()
        if self._spill_map is not None:
            self._spill_map.close()
            self._spill_map = None
        if self._spilled is not None:
            self._spilled.close()
            self._spilled = None
        self._arenas.clear()
        self._parts.clear()
        self._freed.clear()

    # -- helpers

    def _find(self, ref: PartRef) -> _Part:
        part = self._parts.get(ref.id)
        if part is None:
            raise InternalError(f"part {ref.id} is asked for, whose memory is free already")
        if ref.handle != (part.arena, part.offset, part.length):
            raise InternalError(f"part {ref.id} is asked for where it was before it went to disk")
        return part

    def _free(self, part_id: int, part: _Part) -> None:
        del self._parts[part_id]
        self._freed.append(part_id)
        self._vacate(part)

    def _vacate(self, part: _Part) -> None:
        """The part's range is free."""
        if part.arena == SPILL_ARENA:
            if self._spilled is not None:
                self._spilled.free(part.offset, part.length)
            return
        arena = self._arenas[part.arena]
        arena.parts -= 1
        if arena.alive:
            self._on_free(part.arena, part.offset, part.length)
            return
        self._punch(part)
        self._drop_if_empty(part.arena)

    def _contents(self, parts: Sequence[PartRef]) -> Iterator[Any]:
        for ref in parts:
            part = self._parts[ref.id]
            yield self._mapping(part.arena).view(part.offset, part.length)

    def _move(self, ref: PartRef, offset: int) -> PartRef:
        part = self._parts[ref.id]
        self._punch(part)  # also a live worker's, before it may write there again: its memory was wanted back now
        self._vacate(part)
        self._parts[ref.id] = moved = _Part(SPILL_ARENA, offset, part.length)
        moved.released = part.released
        return replace(ref, handle=(SPILL_ARENA, offset, part.length))

    def _punch(self, part: _Part) -> None:
        from headrace.substrates.processes.arena import punch

        punch(self._arenas[part.arena].fd, part.offset, part.offset + part.length)

    def _reclaim(self, dead: int) -> None:
        """Give back all memory of a dead worker's arena that holds no known part."""
        from headrace.substrates.processes.arena import punch

        fd, start = self._arenas[dead].fd, 0
        for part in sorted((p for p in self._parts.values() if p.arena == dead), key=lambda p: p.offset):
            punch(fd, start, part.offset)
            start = part.offset + part.length
        punch(fd, start, os.fstat(fd).st_size)
        self._drop_if_empty(dead)

    def _drop_if_empty(self, dead: int) -> None:
        """No part, so no lease: every worker that was sent the descriptor has received it, and has no view left."""
        if not self._arenas[dead].parts:
            self._arenas.pop(dead).close()
            self._on_gone(dead)

    def _mapping(self, arena: int) -> Mapping:
        from headrace.substrates.processes.arena import Mapping

        if arena == SPILL_ARENA:
            if self._spill_map is None:
                self._spill_map = Mapping(os.dup(self.descriptor(arena)), writable=False)
            return self._spill_map
        known = self._arenas[arena]
        if known.mapping is None:
            known.mapping = Mapping(os.dup(known.fd), writable=False)
        return known.mapping


class _Arena:
    """parts: how many are in it. alive: its worker is. mapping: when the driver has read it."""

    __slots__ = ("alive", "fd", "mapping", "parts")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.alive = True
        self.parts = 0
        self.mapping: Mapping | None = None

    def close(self) -> None:
        os.close(self.fd)
        if self.mapping is not None:
            self.mapping.close()


class _Part:
    """A range of an arena. leases: worker -> how often it was sent there and not given back."""

    __slots__ = ("arena", "leases", "length", "offset", "released")

    def __init__(self, arena: int, offset: int, length: int) -> None:
        self.arena = arena
        self.offset = offset
        self.length = length
        self.released = False
        self.leases: dict[int, int] = {}
