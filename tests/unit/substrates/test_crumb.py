"""Breadcrumbs: what is written is read, and what a death tore or damaged is read as nothing."""

from __future__ import annotations

import mmap
import os
import sys

import pytest

from headrace.core.refs import Segment
from headrace.core.steps import Doing
from headrace.substrates.processes.crumb import CRUMB_MAX_BYTES, CrumbWriter, create_crumb, read_crumb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="crumbs are memfds")

PLAIN = Doing(3, "predict", (Segment("s3://b/part-0.parquet", 128, 64), Segment("s3://b/part-1.parquet", 0, 1 << 40)), "ab12")


@pytest.fixture
def crumb():
    fd = create_crumb(0)
    yield fd
    os.close(fd)


def writer(fd: int) -> CrumbWriter:
    return CrumbWriter(os.dup(fd))


@pytest.mark.parametrize(
    "doing",
    [
        PLAIN,
        Doing(-1, ""),
        Doing(0, "räume", (Segment("/data/\udcff.jpg", 0, 1),), "d", b"\0sample\xff"),
        Doing(1, "many", tuple(Segment(f"/images/{i}.jpg", i, 1) for i in range(5000))),
    ],
    ids=["plain", "empty", "odd names", "many segments"],
)
def test_what_is_written_is_read(crumb: int, doing: Doing) -> None:
    assert read_crumb(crumb) is None
    w = writer(crumb)
    w.write(PLAIN)
    w.write(doing)
    assert read_crumb(crumb) == doing
    w.clear()
    assert read_crumb(crumb) is None


def test_a_large_sample_is_kept_and_its_memory_given_back(crumb: int) -> None:
    w = writer(crumb)
    large = Doing(1, "f", (), "d", os.urandom(3 << 20))
    w.write(large)
    assert read_crumb(crumb) == large
    assert os.fstat(crumb).st_size > 3 << 20
    w.write(PLAIN)
    assert read_crumb(crumb) == PLAIN
    assert os.fstat(crumb).st_blocks * 512 <= 4096


def test_too_large_a_sample_is_left_out(crumb: int) -> None:
    w = writer(crumb)
    w.write(Doing(1, "f", PLAIN.segments, "d", bytes(CRUMB_MAX_BYTES)))
    assert read_crumb(crumb) == Doing(1, "f", PLAIN.segments, "d")


def test_more_segments_than_fit_are_left_out(crumb: int) -> None:
    segments = tuple(Segment("u" * (1 << 20), i, 1) for i in range(20))
    writer(crumb).write(Doing(1, "f", segments, "d"))
    said = read_crumb(crumb)
    assert said is not None
    assert said.segments == segments[:15]


class DyingMemory:
    """The writer's memory, until its n-th write: of that only the first half of a record, and nothing of a length, arrives."""

    def __init__(self, memory: mmap.mmap, writes: int) -> None:
        self._memory = memory
        self._left = writes

    def __len__(self) -> int:
        return len(self._memory)

    def __setitem__(self, at: slice, data: bytes) -> None:
        self._left -= 1
        if self._left:
            self._memory[at] = data
            return
        if len(data) > 4:
            self._memory[at.start : at.start + len(data) // 2] = data[: len(data) // 2]
        raise SystemExit


@pytest.mark.parametrize(("writes", "said"), [(1, PLAIN), (2, None), (3, None)])
def test_a_torn_record_says_nothing(crumb: int, writes: int, said: Doing | None) -> None:
    w = writer(crumb)
    w.write(PLAIN)
    w._map = DyingMemory(w._map, writes)
    with pytest.raises(SystemExit):
        w.write(Doing(4, "predict", PLAIN.segments, "cd34"))
    assert read_crumb(crumb) == said


def test_damage_is_never_an_error(crumb: int) -> None:
    """Native code may write anywhere: every byte of the record is flipped once, and every length is tried."""
    w = writer(crumb)
    w.write(Doing(1, "f", PLAIN.segments, "d", b"xyz"))
    data = os.pread(crumb, 200, 0)
    for at in range(len(data)):
        os.pwrite(crumb, bytes([data[at] ^ 0xFF]), at)
        said = read_crumb(crumb)
        assert said is None or isinstance(said, Doing)
        os.pwrite(crumb, data[at : at + 1], at)
    for length in [*range(200), 4092, 4093, 1 << 31, (1 << 32) - 1]:
        os.pwrite(crumb, length.to_bytes(4, "little"), 0)
        said = read_crumb(crumb)
        assert (said is not None) == (length == int.from_bytes(data[:4], "little"))
