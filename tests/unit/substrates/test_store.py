"""Leases, pins and views of a worker's block store; two stores in one process stand for two workers."""

from __future__ import annotations

import os
import sys

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import InternalError, UserCodeError
from headrace.core.refs import BlockRef, PartRef
from headrace.core.steps import Advance, Apply, StepDone, StepFailed
from headrace.substrates.processes.arena import create_arena, touched_bytes
from headrace.substrates.processes.store import ArenaStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="arenas are memfds")


class Pair:
    """Store `a` makes blocks, store `b` reads them; notices counts views that died in `b`."""

    def __init__(self) -> None:
        self.fds = [create_arena(i, 1 << 30) for i in range(2)]
        self.notices = 0
        self.drained = 0
        self.a = ArenaStore(0, self.fds[0], 1 << 30, drain=self._drain, on_view_death=lambda: None)
        self.b = ArenaStore(1, self.fds[1], 1 << 30, drain=lambda: None, on_view_death=self._notice)
        self.b.add_arena(0, os.dup(self.fds[0]))

    def _notice(self) -> None:
        self.notices += 1

    def _drain(self) -> None:
        self.drained += 1

    def make(self, n: int = 1000) -> BlockRef:
        step = Advance(1, 0, 0, 7, 0, 0)
        self.a.begin(step)
        block = BlockRef(n, (self.a.put(pa.record_batch({"x": np.arange(n)})),))
        self.a.end(StepDone(1, 0, (block,)))
        return block


@pytest.fixture
def pair():
    p = Pair()
    yield p
    never_mapped = list(p.b._fds.values())
    del p.a, p.b  # and with them their mappings
    for fd in [*p.fds, *never_mapped]:
        os.close(fd)


def values(store: ArenaStore, part: PartRef) -> np.ndarray:
    return store.get(part).column(0).to_numpy()


def test_reads_share_the_arena_and_are_read_only(pair: Pair) -> None:
    block = pair.make()
    pair.b.begin(Apply(5, 1, 0, (block,), ((0, 0),)))
    x = values(pair.b, block.parts[0])
    assert x.tolist() == list(range(1000))
    assert not x.flags.writeable
    assert block.parts[0].handle[1] % 64 == 0
    assert pair.b.take_dead() == ()


def test_a_lease_ends_with_the_last_view(pair: Pair) -> None:
    block = pair.make()
    part = block.parts[0]
    step = Apply(0, 1, 0, (block,), ((0, 0),))
    pair.b.begin(step)
    x = values(pair.b, part)[10:20]
    pair.b.end(StepDone(0, 1))
    assert pair.b.take_dead() == (), "a slice of a view keeps the memory"
    del x
    assert pair.notices == 1
    assert pair.b.take_dead() == ((part.id, 1),)
    assert pair.b.take_dead() == ()
    with pytest.raises(InternalError, match="has let go of it"):
        pair.b.get(part)


def test_a_part_never_read_is_given_back_with_its_apply(pair: Pair) -> None:
    block = pair.make()
    pair.b.begin(Apply(3, 1, 0, (block,), ((0, 0),)))
    pair.b.end(StepDone(3, 1))
    assert pair.b.take_dead() == ((block.parts[0].id, 1),)


def test_a_part_sent_twice_is_given_back_twice_at_once(pair: Pair) -> None:
    block = pair.make()
    pair.b.begin(Apply(3, 1, 0, (block,), ((0, 0),)))
    x = values(pair.b, block.parts[0])
    pair.b.end(StepDone(3, 1))
    pair.b.begin(Apply(4, 1, 0, (block,), ((0, 0),)))
    pair.b.end(StepDone(4, 1))
    assert pair.b.take_dead() == ()
    del x
    assert pair.b.take_dead() == ((block.parts[0].id, 2),)


def test_a_cursor_may_read_its_input_in_a_later_step(pair: Pair) -> None:
    first, second = pair.make(), pair.make()
    pair.b.begin(Advance(1, 1, 0, 42, 0, 0, inputs=(first, second)))
    assert values(pair.b, first.parts[0])[3] == 3
    pair.b.end(StepDone(1, 1))
    assert pair.b.take_dead() == ((first.parts[0].id, 1),)
    pair.b.begin(Advance(2, 1, 0, 42, 0, 0, end=True))
    assert values(pair.b, second.parts[0])[4] == 4
    pair.b.end(StepDone(2, 1, finished=True))
    assert pair.b.take_dead() == ((second.parts[0].id, 1),)


def test_a_discarded_cursor_lets_go(pair: Pair) -> None:
    block = pair.make()
    pair.b.begin(Advance(1, 1, 0, 42, 0, 0, inputs=(block,)))
    pair.b.end(StepDone(1, 1))
    assert pair.b.take_dead() == ()
    pair.b.close_cursor(42)
    assert pair.b.take_dead() == ((block.parts[0].id, 1),)


def test_what_a_failed_step_made_is_free_again(pair: Pair) -> None:
    pair.a.begin(Advance(1, 0, 0, 9, 0, 0))
    made = pair.a.put(pa.record_batch({"x": [1]}))
    assert pair.a.get(made).num_rows == 1
    pair.a.end(StepFailed(1, 0, UserCodeError("no")))
    assert pair.make(1).parts[0].handle == made.handle


def test_freed_ranges_are_reused_and_the_socket_is_asked_before_cold_memory(pair: Pair) -> None:
    size = 8 * 1_000_000
    first = pair.make(1_000_000)
    touched = touched_bytes(pair.fds[0])
    drained = pair.drained
    for _ in range(20):
        pair.a.free([first.parts[0].handle[1]])
        first = pair.make(1_000_000)
    assert touched_bytes(pair.fds[0]) == touched < size + (1 << 20)
    assert pair.drained == drained
    pair.make(1_000_000)
    assert pair.drained == drained + 1


def test_idle_memory_goes_back(pair: Pair) -> None:
    block = pair.make(8_000_000)
    pair.a.free([block.parts[0].handle[1]])
    assert pair.a.idle_bytes == touched_bytes(pair.fds[0]) or pair.a.idle_bytes > 64_000_000
    pair.a.trim()
    assert pair.a.idle_bytes == 0
    assert touched_bytes(pair.fds[0]) < 1 << 20
