"""The allocator of an arena, and arenas themselves."""

from __future__ import annotations

import itertools
import os
import random
import sys

import numpy as np
import pytest

from headrace.core.errors import InternalError
from headrace.substrates.processes.arena import (
    ALIGN,
    EPOCH_ALLOCATIONS,
    TRIM_MIN_BYTES,
    Allocator,
    Mapping,
    create_arena,
    punch,
    touched_bytes,
)

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="arenas are memfds")


def make(size: int = 1 << 40) -> tuple[Allocator, list[tuple[int, int]]]:
    punched: list[tuple[int, int]] = []
    return Allocator(size, lambda start, stop: punched.append((start, stop))), punched


def free_ranges(a: Allocator) -> list[tuple[int, int]]:
    return list(zip(a._starts, a._stops, strict=True))


def test_lowest_address_first() -> None:
    a, _ = make()
    offsets = [a.allocate(MB)[0] for _ in range(4)]
    assert offsets == [0, MB, 2 * MB, 3 * MB]
    a.free(offsets[2])
    a.free(offsets[0])
    assert a.allocate(MB)[0] == 0
    assert a.allocate(2 * MB)[0] == 4 * MB, "the hole of one MB is too small"
    assert a.allocate(MB)[0] == 2 * MB


def test_neighbours_join_in_any_order() -> None:
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        a, _ = make(3 * MB)
        offsets = [a.allocate(MB)[0] for _ in range(3)]
        assert free_ranges(a) == []
        for i in order:
            a.free(offsets[i])
        assert free_ranges(a) == [(0, 3 * MB)]
        assert a.used_bytes == 0


def test_cold_bytes_are_those_never_touched() -> None:
    a, _ = make()
    first, cold = a.allocate(MB)
    assert cold == MB
    a.free(first)
    assert a.fits_warm(MB)
    assert not a.fits_warm(MB + 1)
    assert a.allocate(2 * MB) == (0, MB)


def test_full_and_misused() -> None:
    a, _ = make(MB)
    a.allocate(MB)
    with pytest.raises(MemoryError, match="no room"):
        a.allocate(1)
    assert not a.fits_warm(1)
    with pytest.raises(InternalError, match="not in use"):
        a.free(64)


def test_random_traffic_keeps_the_invariants() -> None:
    rng = random.Random(7)
    size = 64 * MB
    a, _ = make(size)
    used: dict[int, int] = {}
    for _ in range(3000):
        if used and rng.random() < 0.5:
            offset = rng.choice(list(used))
            del used[offset]
            a.free(offset)
        else:
            length = rng.randint(1, MB)
            offset, _ = a.allocate(length)
            used[offset] = -(-length // ALIGN) * ALIGN
        ranges = sorted([(o, o + n, "used") for o, n in used.items()] + [(s, e, "free") for s, e in free_ranges(a)])
        assert ranges[0][0] == 0
        assert ranges[-1][1] == size
        for (_, end, kind), (start, _, next_kind) in itertools.pairwise(ranges):
            assert end == start, "ranges overlap or leave a gap"
            assert not kind == next_kind == "free", "two free ranges were not joined"
        assert a.used_bytes == sum(used.values())


def test_a_peak_goes_back_to_the_kernel_after_two_epochs() -> None:
    a, punched = make()
    peak = [a.allocate(16 * MB)[0] for _ in range(8)]
    for offset in peak:
        a.free(offset)
    for _ in range(3 * EPOCH_ALLOCATIONS):
        a.free(a.allocate(16 * MB)[0])
    assert punched == [(16 * MB, 128 * MB)], "the warm low range stays, the peak goes, once"
    assert a.touched_bytes == 16 * MB


def test_steady_traffic_is_never_given_back() -> None:
    a, punched = make()
    for _ in range(5 * EPOCH_ALLOCATIONS):
        offsets = [a.allocate(40 * MB)[0] for _ in range(3)]
        for offset in offsets:
            a.free(offset)
    assert punched == []
    assert a.touched_bytes == 120 * MB


def test_a_kept_high_range_does_not_hold_what_is_free_below() -> None:
    a, punched = make()
    offsets = [a.allocate(16 * MB)[0] for _ in range(8)]
    for offset in offsets[:-1]:
        a.free(offset)
    for _ in range(3 * EPOCH_ALLOCATIONS):
        a.free(a.allocate(16 * MB)[0])
    assert set(punched) == {(16 * MB, 112 * MB)}


def test_idle_trim_gives_all_free_memory_back() -> None:
    a, punched = make()
    offset, _ = a.allocate(2 * TRIM_MIN_BYTES)
    a.free(offset)
    a.trim()
    assert punched == []
    a.trim(idle=True)
    assert punched == [(0, 2 * TRIM_MIN_BYTES)]
    assert a.touched_bytes == 0


@linux
def test_memory_is_touched_read_and_given_back() -> None:
    fd = create_arena(1, 64 * MB)
    writer, reader = Mapping(os.dup(fd), writable=True), Mapping(os.dup(fd), writable=False)
    assert touched_bytes(fd) == 0, "an arena costs nothing until it is touched"
    writer.populate(0, 2 * MB)
    np.frombuffer(writer.buffer(0, 8 * MB), np.uint8)[:] = 7
    assert touched_bytes(fd) == 8 * MB
    view = reader.view(4 * MB, 10)
    assert view.tolist() == [7] * 10
    assert not view.flags.writeable
    punch(fd, 100, 8 * MB)
    assert touched_bytes(fd) == os.sysconf("SC_PAGESIZE"), "the page that is not free as a whole stays"
    punch(fd, 10, 20)
    del view
    writer.close()
    reader.close()
    os.close(fd)
