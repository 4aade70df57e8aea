"""FileSpool gives back what it was given, wherever that lies; NameSet finds what was put in."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from headrace.connectors.name_set import NameList, NameSet
from headrace.connectors.spool import FileSpool
from headrace.core.errors import DestinationError


def filled(spool: FileSpool, count: int = 305) -> tuple[bytes, list[int]]:
    """What was appended, and where the spool says that each piece begins."""
    rng = random.Random(0)
    pieces = [rng.randbytes(rng.randrange(200)) for _ in range(count)]
    return b"".join(pieces), [spool.append(piece) for piece in pieces]


def check(spool: FileSpool, data: bytes, starts: list[int]) -> None:
    assert starts == sorted(starts)
    for start in starts:
        for size in (0, 7, 1500, len(data)):
            assert spool.read(start, size) == data[start : start + size]
    assert spool.read(len(data) + 10, 5) == b""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_bytes_come_back_from_file_and_memory(tmp_path: Path) -> None:
    spool = FileSpool(str(tmp_path), memory_bytes=1000)
    data, starts = filled(spool)
    assert 0 < len(spool._tail) < 1000 < spool._filed
    check(spool, data, starts)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_the_file_goes_with_the_spool(tmp_path: Path) -> None:
    before = descriptors()
    spool = FileSpool(str(tmp_path), memory_bytes=1000)
    assert descriptors() == before, "few bytes make no file"
    filled(spool)
    assert descriptors() == before + (before > 0)
    del spool
    assert descriptors() == before


def test_without_a_place_all_stays_in_memory(tmp_path: Path) -> None:
    spool = FileSpool(str(tmp_path / "nowhere"), memory_bytes=1000)
    check(spool, *filled(spool))
    assert spool._filed == 0


def test_what_a_full_disk_refuses_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [5000]

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(room[0], len(data), 700)  # in parts, the last of them before the disk is full
        room[0] -= taken
        return real(fd, data[:taken], at)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    spool = FileSpool(str(tmp_path), memory_bytes=1000)
    data, starts = filled(spool)
    assert 0 < spool._filed < 5000 < len(spool._tail)
    check(spool, data, starts)


def test_a_disk_that_does_not_give_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pread(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    spool = FileSpool(str(tmp_path), memory_bytes=1000)
    filled(spool)
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(DestinationError, match="can't be read") as caught:
        spool.read(0, 10)
    assert str(tmp_path) in str(caught.value)


def test_names_that_were_put_in_are_found() -> None:
    names = [f"part-00-{i:06d}.parquet" for i in range(0, 3000, 2)]
    found = NameSet(iter(names))
    assert len(found) == len(names)
    assert all(name in found for name in names)
    assert not any(f"part-00-{i:06d}.parquet" in found for i in range(1, 3000, 2))
    assert "x" not in NameSet(())


def test_names_in_the_order_in_which_they_came() -> None:
    names = [f"ä/part-00-{i:06d}.parquet" for i in range(4000, 0, -1)]
    found = NameList()
    assert not found
    assert list(found) == []
    found.extend(names[:3000])
    found.extend(["new", *names[2500:], "newer"])
    assert list(found) == [*names[:3000], "new", *names[3000:], "newer"]
    assert len(found) == 4002
    assert names[0] in found
    assert "newest" not in found
