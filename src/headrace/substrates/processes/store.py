"""A worker's view of blocks: it writes into its own arena and reads anyone's, and knows which views still live.

The protocol with the driver is by leases. Each time a step names a part, its worker holds one more lease of it; the
worker gives all leases of a part back when nothing here refers to the part any more. The driver frees a part when the
run has released it and no lease is out. So a range is never reused under a view, whatever order messages take.

A part is referred to by a pin (a step or cursor that was given it and may still read it) and by views (anything
that shares its memory: Arrow buffers, NumPy arrays made of them). Pins of an Apply end with it; pins of an Advance
end when the cursor has read the part, or is closed. `get` of a part without a lease is refused.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.contracts.substrate import Crumb
from headrace.core.errors import InternalError
from headrace.core.refs import PartRef
from headrace.core.steps import Advance, Step, StepDone, StepFailed
from headrace.substrates.blocks import decode, encode_into, encoded_bytes
from headrace.substrates.processes.arena import Allocator, Mapping, punch

_PARTS_PER_WORKER = 1 << 40  # part ids are worker * this + a counter: unique in the run without asking anyone

Views = tuple[tuple[int, int], ...]  # (part id, leases given back)


class ArenaStore:
    """The BlockStore of a worker process. Used by the worker's main thread; views may die in any thread.

    fd: the worker's own arena. drain: takes in messages that wait at the socket, called before cold memory is used,
    because they may say that warm ranges are free. on_view_death: called, from any thread, after a view died.
    crumb: None outside a worker process.
    """

    def __init__(
        self,
        worker: int,
        fd: int,
        size: int,
        *,
        drain: Callable[[], None],
        on_view_death: Callable[[], None],
        crumb: Crumb | None = None,
    ) -> None:
        self.crumb = crumb
        self._worker = worker
        self._own_fd = fd
        self._pid = os.getpid()
        self._allocator = Allocator(size, lambda start, stop: punch(fd, start, stop))
        self._write_map: Mapping | None = None
        self._fds: dict[int, int] = {}  # arenas that were announced and not mapped yet
        self._maps: dict[int, Mapping] = {}
        self._ids = itertools.count(worker * _PARTS_PER_WORKER + 1)
        self._drain = drain
        self._on_view_death = on_view_death
        self._leases: dict[int, int] = {}
        self._pins: dict[int, set[int]] = {}  # part -> cursors (for an Apply: -1 - the step's id) that may read it
        self._read: set[int] = set()  # parts that the running step has got
        self._views: dict[int, weakref.ref[np.ndarray]] = {}
        self._dead: deque[int] = deque()  # parts whose view died, appended from any thread
        self._unreported: dict[int, tuple[int, int]] = {}  # part -> (offset, key of the cursor or step that made it)
        self._key = 0

    # -- what the body sees

    def put(self, batch: pa.RecordBatch) -> PartRef:
        if os.getpid() != self._pid:  # a child that user code forked has come back: the arena is its parent's
            os._exit(1)
        length = encoded_bytes(batch)
        if not self._allocator.fits_warm(length):
            self._drain()
        offset, cold = self._allocator.allocate(length)
        if self._write_map is None:
            self._write_map = Mapping(os.dup(self._own_fd), writable=True)
        if cold:
            self._write_map.populate(offset + max(0, length - cold), min(cold, length))
        try:
            encode_into(self._write_map.buffer(offset, length), batch)
        except BaseException:
            self._allocator.free(offset)
            raise
        part = PartRef(next(self._ids), self._worker, length, tuple(batch.schema.names), (self._worker, offset, length))
        self._unreported[part.id] = (offset, self._key)
        return part

    def get(self, part: PartRef) -> pa.RecordBatch:
        if part.id not in self._leases and part.id not in self._unreported:
            raise InternalError(
                f"part {part.id} was read by worker {self._worker}, which was not given it or has let go of it",
                hint="this is a fault of Headrace; please report it",
            )
        self._read.add(part.id)
        return decode(pa.py_buffer(self._view(part)))

    # -- what the worker's loop tells

    def add_arena(self, arena: int, fd: int) -> None:
        """The descriptor of another worker's arena, or of the file of spilled parts: mapped at its first read."""
        self._fds[arena] = fd

    def drop_arenas(self, arenas: Sequence[int]) -> None:
        """Nothing will be read from these again, and no view of them is left."""
        for arena in arenas:
            self._maps.pop(arena, None)
            fd = self._fds.pop(arena, None)
            if fd is not None:
                os.close(fd)

    def free(self, offsets: Sequence[int]) -> None:
        """These ranges of the own arena are free again."""
        for offset in offsets:
            self._allocator.free(offset)

    def begin(self, step: Step) -> None:
        """A step starts: its inputs are leased and pinned."""
        key = self._key = step.cursor if isinstance(step, Advance) else -1 - step.id
        for block in step.inputs:
            for part in block.parts:
                self._leases[part.id] = self._leases.get(part.id, 0) + 1
                self._pins.setdefault(part.id, set()).add(key)

    def pause(self) -> None:
        """The step that has begun goes on by itself: others may come before its end."""
        self._read.clear()

    def resume(self, step: Step) -> None:
        """Such a step comes to its end."""
        self._key = step.cursor if isinstance(step, Advance) else -1 - step.id

    def end(self, answer: StepDone | StepFailed) -> None:
        """The step is answered: its pins end, and what it left unreported is settled."""
        key = self._key
        failed = isinstance(answer, StepFailed)
        if isinstance(answer, StepDone):
            for block in answer.outputs:
                for part in block.parts:
                    self._unreported.pop(part.id, None)
        if failed or key < 0 or answer.finished:
            self.close_cursor(key)
        else:
            for part in self._read:
                self._unpin(part, key)
        self._read.clear()

    def close_cursor(self, key: int) -> None:
        """The cursor reads nothing more, and parts that it made and never reported are nobody's."""
        for part in [p for p, keys in self._pins.items() if key in keys]:
            self._unpin(part, key)
        for part, (offset, maker) in list(self._unreported.items()):
            if maker == key:
                del self._unreported[part]
                self._allocator.free(offset)

    def take_dead(self) -> Views:
        """Leases to give back: of parts that nothing here refers to any more."""
        back: list[tuple[int, int]] = []
        while self._dead:
            part = self._dead.popleft()
            view = self._views.get(part)
            if view is not None and view() is None:
                del self._views[part]
            if part not in self._pins and part not in self._views and part in self._leases:
                back.append((part, self._leases.pop(part)))
        return tuple(back)

    @property
    def has_leases(self) -> bool:
        """Something here still refers to a part, or may be asked to read it."""
        return bool(self._leases)

    @property
    def has_dead(self) -> bool:
        return bool(self._dead)

    @property
    def idle_bytes(self) -> int:
        """Memory of the own arena that holds no block."""
        return self._allocator.touched_bytes - self._allocator.used_bytes

    def trim(self) -> None:
        """Give all free memory of the own arena back to the kernel."""
        self._allocator.trim(idle=True)

    # -- helpers

    def _unpin(self, part: int, key: int) -> None:
        keys = self._pins.get(part)
        if keys is None:
            return
        keys.discard(key)
        if not keys:
            del self._pins[part]
            self._dead.append(part)  # take_dead looks whether views are left

    def _view(self, part: PartRef) -> np.ndarray:
        known = self._views.get(part.id)
        view = known() if known is not None else None
        if view is not None:
            return view
        arena, offset, length = part.handle
        mapping = self._maps.get(arena)
        if mapping is None:
            mapping = self._maps[arena] = self._map(arena)
        view = mapping.view(offset, length)
        self._views[part.id] = weakref.ref(view, self._death_of(part.id))
        return view

    def _map(self, arena: int) -> Mapping:
        if arena == self._worker:
            return Mapping(os.dup(self._own_fd), writable=False)
        fd = self._fds.pop(arena, None)
        if fd is None:
            raise InternalError(f"worker {self._worker} has no descriptor of the memory of worker {arena}")
        return Mapping(fd, writable=False)

    def _death_of(self, part: int) -> Callable[[Any], None]:
        dead, notify = self._dead, self._on_view_death

        def on_death(_: Any) -> None:
            dead.append(part)
            notify()

        return on_death
