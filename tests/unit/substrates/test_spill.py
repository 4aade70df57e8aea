"""Spilled blocks: what the disk takes, what comes back, and what is left of the file afterwards."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from headrace.core.errors import InternalError
from headrace.core.refs import BlockRef
from headrace.core.resources import WorkerSpec
from headrace.substrates import spill
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.spill import SpillFile
from headrace.substrates.threads import ThreadsSubstrate
from headrace.testing.check_substrate import Act, ScriptedBody, advance, running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at blocks of files as Linux tells them")

MB = 1 << 20


def on_disk(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@pytest.fixture
def file(tmp_path: Path):
    f = SpillFile(str(tmp_path))
    yield f
    f.close()


def fill_up(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The disk takes `room` more bytes, and writes at most 64 KiB at a time."""
    left = room
    write = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(fd, data[: min(left, 64 << 10)], offset)
        left -= done
        return done

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_blocks_are_written_whole_and_the_file_has_no_name(file: SpillFile, tmp_path: Path, monkeypatch) -> None:
    fill_up(monkeypatch, 10 * MB)
    blocks = [os.urandom(n) for n in (100_000, 1, 70_000)]
    offsets = file.store(blocks)
    assert [os.pread(file.fd, len(b), at) for b, at in zip(blocks, offsets, strict=True)] == blocks
    assert all(at % 4096 == 0 for at in offsets)
    assert list(tmp_path.iterdir()) == []


def test_freed_ranges_leave_the_disk_and_are_used_again(file: SpillFile) -> None:
    first, second = file.store([os.urandom(4 * MB), os.urandom(4 * MB)])
    assert on_disk(file.fd) >= 8 * MB
    file.free(first, 4 * MB)
    assert on_disk(file.fd) < 5 * MB
    assert file.store([os.urandom(4 * MB)]) == [first]
    file.free(first, 4 * MB)
    file.free(second, 4 * MB)
    assert file.used_bytes == 0
    assert on_disk(file.fd) < MB


def test_a_full_disk_takes_what_fits(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_up(monkeypatch, 3 * MB)
    blocks = [os.urandom(MB + 1) for _ in range(4)]
    offsets = file.store(blocks)
    assert [os.pread(file.fd, MB + 1, at) for at in offsets] == blocks[:2]
    assert file.used_bytes == 2 * (MB + 4096)


def test_what_did_not_reach_the_disk_is_not_taken(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert file.store([b"x" * MB]) == []
    assert file.used_bytes == 0


def test_memory_file_systems_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spill._file_system("/proc") == "proc"
    monkeypatch.setattr(spill, "_file_system", lambda path: "tmpfs")
    with pytest.raises(OSError, match="in memory"):
        SpillFile(None)


KINDS = [InlineSubstrate, ThreadsSubstrate, ProcessesSubstrate]


def maker(kind: type, directory: Path) -> Callable[[], InlineSubstrate | ThreadsSubstrate | ProcessesSubstrate]:
    def make():
        substrate = kind(body_factory=ScriptedBody)
        substrate.spill_dir = str(directory)
        return substrate

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_can_be_written_nothing_is_moved(kind: type, tmp_path: Path) -> None:
    with running(maker(kind, tmp_path / "missing"), 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=800))
        assert s.substrate.spill(block.parts) == ()
        assert s.substrate.fetch(block).num_rows == 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_rest_in_memory(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(maker(kind, tmp_path), 1) as s:
        blocks = [s.run(advance(i, 0, Act.MAKE, nbytes=MB, n=i)) for i in range(3)]
        fill_up(monkeypatch, 2 * MB + MB // 2)
        moved = s.substrate.spill([b.parts[0] for b in blocks])
        assert [p.id for p in moved] == [b.parts[0].id for b in blocks[:2]]
        now = [*(BlockRef(b.rows, (p,)) for b, p in zip(blocks, moved, strict=False)), blocks[2]]
        assert [s.substrate.fetch(b).column("x")[0].as_py() for b in now] == [0, 1, 2]


def test_local_memory_and_disk_go_when_nothing_refers_to_them(tmp_path: Path) -> None:
    with running(maker(ThreadsSubstrate, tmp_path), 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=8 * MB, n=5))
        (part,) = s.substrate.spill(block.parts)
        file = s.substrate._spill._file
        view = part.handle.read().column("x").to_numpy()[10:20]
        s.substrate.release([part])
        del block, part
        s.answers.clear()
        gc.collect()
        other = s.run(advance(2, 0, Act.MAKE, nbytes=8 * MB, n=77))
        s.substrate.spill(other.parts)  # would overwrite what the view shows
        assert view.tolist() == list(range(15, 25))
        assert file.used_bytes >= 16 * MB
        del view
        gc.collect()
        s.substrate.release([])
        assert file.used_bytes < 9 * MB, "a range is freed with its last view, however that came to its end"


def test_processes_give_memory_back(tmp_path: Path) -> None:
    """The maker's range goes to the kernel at once; the file's, when the part is released; the maker goes on."""
    with running(maker(ProcessesSubstrate, tmp_path), 2) as s:
        ledger = s.substrate._ledger
        blocks = [s.run(advance(i, 0, Act.MAKE, nbytes=8 * MB, n=i)) for i in range(2)]
        s.run(
            advance(2, 1, Act.SUM, inputs=[s.run(advance(3, 1, Act.MAKE, nbytes=80))])
        )  # so that it has imported what it needs
        before = s.substrate.memory_bytes()
        assert s.substrate.worker_memory()[0] > 16 * MB
        moved = s.substrate.spill([b.parts[0] for b in blocks])
        assert ledger.arena_bytes(0) < MB
        assert s.substrate.memory_bytes() < before - 12 * MB
        on_spill = [BlockRef(b.rows, (p,)) for b, p in zip(blocks, moved, strict=True)]
        reader = s.substrate.worker_memory()[1]
        total = s.run(advance(10, 1, Act.SUM, inputs=on_spill))
        assert s.substrate.worker_memory()[1] < reader + 8 * MB, "pages of the file are not anonymous memory"
        rows = 8 * MB // 8
        assert s.substrate.fetch(total).column("x").to_pylist() == [2 * int(np.arange(rows).sum()) + rows]
        s.run(advance(11, 0, Act.MAKE, nbytes=8 * MB, n=9))
        s.substrate.release(moved)
        s.until(lambda: {p.id for p in moved} <= s.freed)
        assert ledger._spilled.used_bytes == 0
        assert on_disk(ledger._spilled.fd) < MB
        with pytest.raises(InternalError, match="free already"):
            s.substrate.fetch(on_spill[0])


def test_a_part_on_disk_is_not_read_where_it_was(tmp_path: Path) -> None:
    with running(maker(ProcessesSubstrate, tmp_path), 1) as s:
        block = s.run(advance(1, 0, Act.MAKE, nbytes=800))
        assert s.substrate.spill(block.parts)
        with pytest.raises(InternalError, match="before it went to disk"):
            s.submit(advance(2, 0, Act.SUM, inputs=[block]))


def test_parts_of_the_dead_are_spilled_and_outlive_them(tmp_path: Path) -> None:
    with running(maker(ProcessesSubstrate, tmp_path), 2) as s:
        alive, dead = (s.run(advance(i, 0, Act.MAKE, nbytes=MB, n=i)) for i in range(2))
        (early,) = s.substrate.spill(alive.parts)
        s.submit(advance(3, 0, Act.DIE))
        s.until(lambda: 0 in s.lost)
        (late,) = s.substrate.spill(dead.parts)
        assert 0 not in s.substrate._ledger._arenas, "nothing is left in memory of the dead worker"
        s.substrate.add_worker(WorkerSpec(2, "cpu", "cpu"))
        s.until(lambda: 2 in s.up)
        inputs = [BlockRef(alive.rows, (early,)), BlockRef(dead.rows, (late,))]
        total = s.run(advance(4, 2, Act.SUM, inputs=inputs))
        rows = MB // 8
        assert s.substrate.fetch(total).column("x").to_pylist() == [2 * int(np.arange(rows).sum()) + rows]
