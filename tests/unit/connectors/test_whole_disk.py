"""Many files made durable at once: only while watched, only where that is known to hold, and never for a file that is gone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from headrace.connectors import whole_disk
from headrace.connectors.run_store import LocalRunStore
from headrace.connectors.whole_disk import LEAST_FILES, WholeDisk
from headrace.core.receipts import OutputFile

FOLDER = "_headrace/run-00000/staging/1"


@pytest.fixture
def files(tmp_path: Path) -> list[OutputFile]:
    (tmp_path / FOLDER).mkdir(parents=True)
    for i in range(LEAST_FILES):
        (tmp_path / FOLDER / f"{i}").write_bytes(b"x")
    return [OutputFile(f"{i}.csv", 1, 1, "", f"{FOLDER}/{i}") for i in range(LEAST_FILES)]


@pytest.fixture
def fsynced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: found.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]))
    return found


def synced_at_once(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[bool]:
    calls: list[bool] = []

    def sync(self: WholeDisk) -> bool:
        calls.append(answer)
        return answer

    monkeypatch.setattr(WholeDisk, "sync", sync)
    return calls


def test_a_group_is_one_call(
    tmp_path: Path, files: list[OutputFile], fsynced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = synced_at_once(monkeypatch, True)
    store = LocalRunStore(str(tmp_path))
    with store.watch():
        assert store.sync(files) == ()
        assert calls == [True]
        assert not {f"{i}" for i in range(LEAST_FILES)} & set(fsynced)
        assert "staging" in fsynced, "the new folder's own name"
        (tmp_path / files[3].staged).unlink()
        assert store.sync(files) == (files[3],)
        assert store.sync(files[:2]) == ()
        assert {"0", "1"} <= set(fsynced), "few files are synced by themselves"


@pytest.mark.parametrize("watched", [True, False])
def test_what_one_call_can_t_vouch_for_is_synced_one_by_one(
    tmp_path: Path, files: list[OutputFile], fsynced: list[str], monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    calls = synced_at_once(monkeypatch, False)
    store = LocalRunStore(str(tmp_path))
    if watched:
        with store.watch():
            assert store.sync(files) == ()
    else:
        with store.watch():
            pass
        assert store.sync(files) == ()
    assert len(calls) == watched
    assert {f"{i}" for i in range(LEAST_FILES)} <= set(fsynced)


@pytest.mark.skipif(sys.platform != "linux", reason="syncfs is Linux's")
def test_only_where_it_is_known_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_disk, "_kind", lambda _: 0xEF53)
    for kernel, dirty, fit in [((5, 8), 0, True), ((5, 7), 0, False), ((6, 1), whole_disk.MOST_DIRTY_BYTES + 1, False)]:
        monkeypatch.setattr(whole_disk, "_kernel", lambda kernel=kernel: kernel)
        monkeypatch.setattr(whole_disk, "_dirty_bytes", lambda dirty=dirty: dirty)
        disk = WholeDisk(str(tmp_path))
        assert disk.sync() is fit
        disk.close()
    monkeypatch.setattr(whole_disk, "_kernel", lambda: (6, 1))
    monkeypatch.setattr(whole_disk, "_dirty_bytes", lambda: 0)
    monkeypatch.setattr(whole_disk, "_kind", lambda _: 0x6969)  # NFS: the server's business
    disk = WholeDisk(str(tmp_path))
    assert not disk.sync()
    disk.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_machine_is_asked() -> None:
    assert whole_disk._kernel() >= (3, 0)
    assert 0 <= whole_disk._dirty_bytes() < sys.maxsize
    folder = os.open("/proc", os.O_RDONLY)
    try:
        assert whole_disk._kind(folder) == 0x9FA0
    finally:
        os.close(folder)
