"""The run store of a directory: names appear whole, once, inside, and after their bytes are durable."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from headrace.connectors import run_store
from headrace.connectors.run_store import LocalRunStore
from headrace.core.errors import DestinationError
from headrace.core.receipts import OutputFile

STAGED = "_headrace/run-00000/staging/1/7-7"


@pytest.fixture
def store(tmp_path: Path) -> LocalRunStore:
    return LocalRunStore(str(tmp_path / "out"))


def staged(store: LocalRunStore, data: bytes, final: str, name: str = "000000-0.csv") -> OutputFile:
    path = store.begin(f"{STAGED}/{name}")
    Path(path).write_bytes(data)
    return OutputFile(final, 1, len(data), hashlib.sha256(data).hexdigest(), f"{STAGED}/{name}")


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture(params=["links", "no links"])
def any_store(request: pytest.FixtureRequest, store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> LocalRunStore:
    if request.param == "no links":
        no_links(monkeypatch)
    return store


def test_create_once(any_store: LocalRunStore) -> None:
    assert any_store.create("log/0.json", b"mine")
    assert any_store.create("log/0.json", b"mine"), "the same bytes: an answer that was lost"
    assert not any_store.create("log/0.json", b"other")
    assert any_store.conditional
    assert any_store.read("log/0.json") == b"mine"
    assert any_store.read("log/1.json") is None
    assert any_store.read("log") is None
    assert list(any_store.names("log")) == ["log/0.json"]


def test_of_many_creations_one_takes_effect(any_store: LocalRunStore) -> None:
    stores = [LocalRunStore(any_store.root) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for index in range(20):
            won = list(pool.map(lambda n, index=index: stores[n].create(f"log/{index}", b"%d" % n), range(8)))
            assert won.count(True) == 1
            assert any_store.read(f"log/{index}") == b"%d" % won.index(True)


def test_write_replaces_and_leaves_no_other_file(store: LocalRunStore) -> None:
    store.write("_manifest.json", b"1")
    store.write("_manifest.json", b"2")
    assert list(store.names("")) == ["_manifest.json"]
    assert store.read("_manifest.json") == b"2"


def test_objects_in_pieces(store: LocalRunStore) -> None:
    data = os.urandom(3 << 20)
    pieces = [data[at : at + 100_000] for at in range(0, len(data), 100_000)]
    store.write("large", b"before")
    store.write_pieces("large", lambda: iter(pieces))
    assert store.read("large") == data
    chunks = store.chunks("large")
    first = next(chunks)
    store.write("large", b"after")
    assert b"".join([first, *chunks]) == data, "it goes on with what it began"
    assert list(store.chunks("nothing")) == list(store.chunks("no/thing")) == []


def test_pieces_that_end_in_an_error_leave_what_was_there(store: LocalRunStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    store.write("large", b"before")
    with pytest.raises(KeyboardInterrupt):
        store.write_pieces("large", broken)
    assert {name: store.read(name) for name in store.names("")} == {"large": b"before"}


def test_names_are_those_below(store: LocalRunStore) -> None:
    names = ["a-b", "a.b", "a/b/c", "a/c", "a0", "b"]
    for name in reversed(names):
        store.write(name, b"")
    assert sorted(store.names("")) == names
    assert sorted(store.names("a")) == ["a/b/c", "a/c"]
    assert list(store.names("nowhere")) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "./a", "", "a\0b"])
def test_names_stay_inside(store: LocalRunStore, name: str) -> None:
    for action in (store.read, store.remove, lambda n: store.write(n, b""), lambda n: store.create(n, b"")):
        with pytest.raises(DestinationError, match="inside of the destination"):
            action(name)
    with pytest.raises(DestinationError, match="inside of the destination"):
        store.publish([OutputFile(name, 0, 0, "", f"{STAGED}/x")])


def test_links_that_lead_out_are_not_followed(store: LocalRunStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    store.write("inner/x", b"")
    os.symlink(tmp_path / "elsewhere", f"{store.root}/out")
    os.symlink(f"{store.root}/inner", f"{store.root}/fine")
    with pytest.raises(DestinationError, match="leads out"):
        store.write("out/deep/x", b"")
    with pytest.raises(DestinationError, match="leads out"):
        store.publish([staged(store, b"1", "out/x")])
    store.publish([staged(store, b"1", "fine/y")])
    assert not list((tmp_path / "elsewhere").iterdir())
    assert store.read("inner/y") == b"1"
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    store.remove("out")
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_publish_and_redo(any_store: LocalRunStore) -> None:
    files = [staged(any_store, b"%d" % i, f"deep/{i}.csv", f"{i}.csv") for i in range(3)]
    assert any_store.sync(files) == ()
    any_store.publish(files)
    any_store.publish(files)
    assert [any_store.read(f.name) for f in files] == [b"0", b"1", b"2"]
    assert list(any_store.names("_headrace/run-00000")) == []


def test_publish_after_a_crash_between_link_and_unlink(store: LocalRunStore) -> None:
    file = staged(store, b"1", "a.csv")
    os.link(f"{store.root}/{file.staged}", f"{store.root}/a.csv")
    store.publish([file])
    assert list(store.names("")) == ["a.csv"]


def test_publish_meets_equal_bytes(store: LocalRunStore) -> None:
    """Another attempt's file of the same content: nothing to do."""
    store.write("a.csv", b"1")
    store.publish([staged(store, b"1", "a.csv")])
    assert list(store.names("")) == ["a.csv"]


def test_publish_never_overwrites_unless_told(any_store: LocalRunStore) -> None:
    any_store.write("a.csv", b"x")
    file = staged(any_store, b"1", "a.csv")
    with pytest.raises(DestinationError, match="is taken"):
        any_store.publish([file])
    assert any_store.read("a.csv") == b"x"
    any_store.publish([file], {"a.csv"})
    assert any_store.read("a.csv") == b"1"
    any_store.publish([file], {"a.csv"})
    any_store.write("a.csv", b"something else")
    with pytest.raises(DestinationError, match="is taken"):
        any_store.publish([file])
    any_store.remove("a.csv")
    with pytest.raises(DestinationError, match="neither published nor staged"):
        any_store.publish([file])


def test_a_link_is_no_output(store: LocalRunStore, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"1")
    file = staged(store, b"1", "a.csv")
    os.symlink(tmp_path / "mine", f"{store.root}/a.csv")
    with pytest.raises(DestinationError, match="is taken"):
        store.publish([file], {"a.csv"})
    assert (tmp_path / "mine").read_bytes() == b"1"


def test_everything_is_durable_before_it_is_relied_on(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of system calls: bytes, then names, then what rests on them."""
    calls: list[str] = []
    fsync, link, unlink = os.fsync, os.link, os.unlink
    file = staged(store, b"1", "deep/a.csv")

    def told(name: str, path: str) -> None:
        calls.append(f"{name} {os.path.relpath(path, store.root)}")

    def log_fsync(descriptor: int) -> None:
        told("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def log_link(source: str, path: str) -> None:
        told("link", path)
        link(source, path)

    def log_unlink(path: str) -> None:
        told("unlink", path)
        unlink(path)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "link", log_link)
    monkeypatch.setattr(os, "unlink", log_unlink)
    store.sync([file])
    assert calls[0] == f"fsync {file.staged}"
    assert {f"fsync {p}" for p in (STAGED, "_headrace/run-00000/staging", "_headrace/run-00000", "_headrace", ".")} <= set(
        calls
    )
    calls.clear()
    store.publish([file])
    assert calls.index("link deep/a.csv") < calls.index("fsync deep") < calls.index(f"unlink {file.staged}")
    assert "fsync ." in calls, "the new folder's own name"
    calls.clear()
    store.create("log/0", b"1")
    temporary = calls.index(next(c for c in calls if c.startswith("fsync _headrace/tmp-")))
    assert temporary < calls.index("link log/0") < len(calls) - 1 - calls[::-1].index("fsync log")


def log_fsyncs(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where paths in the store go that are synced from now on."""
    synced: list[str] = []
    fsync = os.fsync

    def log_fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), store.root))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", log_fsync)
    return synced


def test_folders_that_somebody_removed_are_made_durable_again(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("a/b/1", b"1")
    shutil.rmtree(f"{store.root}/a")
    synced = log_fsyncs(store, monkeypatch)
    store.write("a/b/2", b"2", durable=False)
    assert synced == []
    store.write("a/b/3", b"3")
    assert {"a/b", "a", "."} <= set(synced)


def test_folders_that_a_run_needs_are_made_durable_with_its_first_object(
    store: LocalRunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = log_fsyncs(store, monkeypatch)
    run = "_headrace/run-00000"
    assert store.create(f"{run}/plan.json", b"1", (f"{run}/log", f"{run}/staging", "elsewhere"))
    assert all(os.path.isdir(f"{store.root}/{name}") for name in (f"{run}/log", f"{run}/staging", "elsewhere"))
    assert synced.count(run) == 1, "one for the object's name and those of the folders beside it"
    assert synced[-1] == ".", "the name of the folder that lies elsewhere"
    synced.clear()
    store.create(f"{run}/log/0", b"1")
    assert synced[1:] == [f"{run}/log"], "after the bytes' own"
    file = OutputFile("a.csv", 1, 1, hashlib.sha256(b"1").hexdigest(), f"{run}/staging/1-000000-0.csv")
    Path(store.begin(file.staged)).write_bytes(b"1")
    synced.clear()
    assert store.sync([file]) == ()
    assert synced == [file.staged, f"{run}/staging"]
    store.publish([file])
    store.remove(f"{run}/staging")
    synced.clear()
    store.write(f"{run}/staging/x", b"1")
    assert run in synced, "a folder that was removed is made durable again"


def test_an_empty_file_has_no_bytes_to_make_durable(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("_manifest.json", b"{}")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    store.write("_SUCCESS", b"")
    assert synced == [store.root], "its name"


def test_a_file_whose_fsync_fails_is_condemned(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [staged(store, b"%d" % i, f"{i}.csv", f"{i}.csv") for i in range(4)]
    fsync = os.fsync

    def broken(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/2.csv"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    os.unlink(f"{store.root}/{files[0].staged}")
    monkeypatch.setattr(os, "fsync", broken)
    assert store.sync(files) == (files[0], files[2])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    file = staged(store, b"1", "a.csv")

    def full(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    for action in (lambda: store.sync([file]), lambda: store.create("x", b"1"), lambda: store.write("x", b"1")):
        with pytest.raises(DestinationError, match="the disk is full") as caught:
            action()
        assert "run the same command again" in caught.value.hint
    monkeypatch.undo()
    assert list(store.names("")) == [file.staged], "no temporary file is left"


FULL = """
import os, sys
from headrace.connectors.sinks.json import JsonSink
from headrace.core.errors import DestinationError
from headrace.testing.check_sink import Session, a_batch, a_split
session = Session(JsonSink(sys.argv[1]))
session.write(a_split(0), [a_batch(0, 10)])
try:
    session.stage(a_split(1), [a_batch(0, 60_000)] * 2)
except DestinationError as e:
    print(e.message)
session.write(a_split(2), [a_batch(20, 10)])
print(sorted(os.listdir(sys.argv[1])))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The file that did not fit is gone again, so that there is room for the log."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} -c "$0" {tmp_path}/out'
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mounts for this user")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, FULL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the disk is full",
        "['_headrace', 'part-00-000000.jsonl', 'part-00-000002.jsonl']",
    ]


def test_nothing_is_left_beside_what_was_written(tmp_path: Path) -> None:
    store = LocalRunStore(str(tmp_path))
    store.create("a", b"1")
    assert not store.create("a", b"2")
    store.write("_headrace/b", b"3")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["_headrace", "_headrace/b", "a"]


def test_check_leaves_nothing(tmp_path: Path) -> None:
    store = LocalRunStore(str(tmp_path / "a/b/c"))
    store.check()
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    store.check()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "x" * 300 + "/y", "nul\0", "file/x"])
def test_check_finds_names_that_can_not_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError):
        LocalRunStore(str(tmp_path / name)).check()
    assert os.listdir(tmp_path) == ["file"]


def test_check_makes_no_folder_that_a_run_beside_it_might_rely_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(os, "mkdir", made.append)
    LocalRunStore(str(tmp_path / "a/b")).check()
    assert not made


def test_without_locks_and_links_there_is_one_writer(store: LocalRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    no_links(monkeypatch)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert store.create("first", b"1")
    assert not store.conditional


def test_removal_leaves_others_files_and_no_empty_folders(store: LocalRunStore) -> None:
    for name in ("a/x/1.csv", "a/2.csv", "b/3.csv"):
        store.write(name, b"")
    store.remove_all(["a/x/1.csv", "b/3.csv", "c/never.csv"])
    assert list(store.names("")) == ["a/2.csv"]
    assert sorted(os.listdir(store.root)) == ["_headrace", "a"]
    store.write("a/x/1.csv", b"again")
    assert store.read("a/x/1.csv") == b"again"


def test_whole_writes_survive_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    run_store.write_whole(str(tmp_path / "x"), b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_nothing_is_appended_where_the_destination_is_gone(store: LocalRunStore) -> None:
    assert store.create("_headrace/run-00000/log/0.json", b"0")
    shutil.rmtree(store.root)
    with pytest.raises(DestinationError, match="was removed while the run was at work"):
        store.create("_headrace/run-00000/log/1.json", b"1")
    assert not os.path.exists(store.root)


@pytest.mark.parametrize("moment", ["run_store._write", "os.link", "run_store._sync_folder"])
def test_a_destination_that_is_removed_in_the_middle_of_a_write_is_called_so(
    store: LocalRunStore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store.write("a/0.json", b"0")
    module, _, name = moment.rpartition(".")
    at = {"run_store": run_store, "os": os}[module]
    call = getattr(at, name)

    def removed_before(*args: Any, **options: Any) -> Any:
        shutil.rmtree(store.root, ignore_errors=True)
        return call(*args, **options)

    monkeypatch.setattr(at, name, removed_before)
    with pytest.raises(DestinationError, match="was removed while the run was at work"):
        store.create("a/1.json", b"1")


def test_a_missing_file_is_not_called_a_missing_folder(tmp_path: Path) -> None:
    for path, text in ((tmp_path / "a", "No such file or directory"), (tmp_path / "b" / "a", "the folder is gone")):
        with pytest.raises(FileNotFoundError) as caught:
            path.read_bytes()
        assert text in str(run_store.disk_error(caught.value, str(path)))


@pytest.mark.parametrize("place", ["link", "link/a/b"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError) as caught:
        (tmp_path / place).mkdir()
    text = str(run_store.disk_error(caught.value, str(tmp_path / place)))
    assert f"{tmp_path / 'link'} is a symbolic link to {tmp_path / 'gone'}, which is not there" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_above_that_may_not_be_read(tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "out").mkdir(parents=True)
    os.chown(above / "out", 65534, 65534)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(folder, 0o755)
    os.chmod(above, 0o711)
    os.seteuid(65534)
    try:
        assert LocalRunStore(str(above / "out")).create("_headrace/plan.json", b"x", ("_headrace/log",))
    finally:
        os.seteuid(0)


def test_release_leaves_the_staging_folder_to_who_has_taken_over(store: LocalRunStore) -> None:
    theirs = store.begin("_headrace/run-00000/staging/2-000000-1.csv")
    mine = store.begin("_headrace/run-00000/staging/1/7-7/000000-1.csv")
    Path(mine).write_bytes(b"x")
    LocalRunStore(store.root).remove_all(["_headrace/run-00000/staging/1/7-7/000000-1.csv"], "_headrace/run-00000/staging")
    Path(theirs).write_bytes(b"y")
    assert os.listdir(os.path.dirname(theirs)) == ["2-000000-1.csv"]
