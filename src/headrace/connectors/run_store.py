"""RunStore for directories and for S3 prefixes: where a run logs, stages and publishes.

What must not live here: what is logged, names of outputs, what may be removed (commit and sinks decide). Invariants:
- a name appears with its whole content or not at all, on disk also after a power cut: bytes are fsynced before the name is
  made, and the directory before it is relied on;
- `create` and `publish` never overwrite, but for names that `publish` is told to replace;
- no name leaves the root, by "..", as an absolute path or through a link to a directory elsewhere.

S3 needs no fsync: an answered put is durable. A file is published there by a copy inside the store, which keeps the metadata
in which the file's digest is noted. What an upload in parts leaves behind when its worker is killed is invisible, and not
removed by us: a lifecycle rule for incomplete uploads on the bucket does that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from headrace.commit.names import NO_SEGMENT, PRIVATE
from headrace.connectors import retries, storage
from headrace.connectors.redact import redact
from headrace.connectors.whole_disk import LEAST_FILES, WholeDisk
from headrace.core.errors import DataError, DestinationError, HeadraceError, TransientError
from headrace.core.receipts import OutputFile

T = TypeVar("T")

Pieces = Callable[[], Iterable[bytes]]
"""An object's bytes, piece by piece; called again when a try has failed."""

CHUNK_BYTES = 1 << 20
SYNC_THREADS = 8  # fsyncs at once: 80 us a file instead of 180 where the disk has a queue
FEW_SYNCS = 2  # done before a thread has started
COPY_THREADS = 16  # requests at once, each some 20 ms of waiting
COPY_MOST_BYTES = 5 << 30  # S3 copies no larger object in one request
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
PARTS = 9000  # of 10,000 that S3 allows
DIGEST = "headrace-digest"  # user metadata of staged objects
DELETE_AT_ONCE = 1000

_TEMPORARY = f"{PRIVATE}/tmp"  # how names of what is on its way begin: no folder, which nobody could remove in time
_OUTSIDE = re.compile(rf"\0|{NO_SEGMENT}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def open_store(root: str, *, scratch: str = "", probe: bool = False) -> LocalRunStore | S3RunStore:
    """The store at a directory or s3://bucket/prefix. scratch: a local directory for what is on its way to S3.

    probe: find out whether creation is atomic in that bucket; writes and removes two small objects.
    """
    if not storage.is_remote(root):
        return LocalRunStore(root)  # its first creation tells
    store = S3RunStore(root, scratch)
    if probe:
        store.probe()
    return store


def disk_error(e: OSError, path: str) -> DestinationError:
    """What a failed write means to whoever has to act."""
    where = (("file", redact(path)),)
    if e.errno in _FULL or "No space left" in str(e) or "quota exceeded" in str(e).lower():
        return DestinationError("the disk is full", where=where, hint="make space and run the same command again")
    hint = "check its permissions" if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
    if e.errno != errno.ELOOP and (link := _dangling(path)) is not None:
        text = f"can't write there: {redact(link)} is a symbolic link to {redact(os.readlink(link))}, which is not there"
        return DestinationError(text, where=where, hint="make that folder, or remove the link")
    if e.errno == errno.ENOENT and not os.path.isdir(os.path.dirname(path) or "."):
        hint = "was the destination removed, or a part of it? Then the same command begins anew"
        return DestinationError("can't write there: the folder is gone", where=where, hint=hint)
    return DestinationError(f"can't write there: {e.strerror or redact(str(e))}", where=where, hint=hint)


def _dangling(path: str) -> str | None:
    """The link on the way to `path` that leads nowhere; None when there is none."""
    while path and not os.path.lexists(path):
        path, before = os.path.dirname(path), path
        if path == before:
            return None
    return path if os.path.islink(path) and not os.path.exists(path) else None


def digest_of(path: str) -> str:
    """SHA-256 of a file, read in pieces: 1.7 GB/s out of the page cache."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(root: str, name: str) -> str:
    """The name, if it is one inside of the root by its text. Raises DestinationError."""
    if not _OUTSIDE.search(name):
        return name
    raise DestinationError(f"{redact(name)!r} is no name inside of the destination", where=(("destination", redact(root)),))


def _occupied(root: str, name: str) -> DestinationError:
    hint = "has something else written there? Move it away and run the same command again, or write to another path"
    where = (("file", redact(f"{root}/{name}")),)
    return DestinationError("the output's name is taken by something that this run did not write", where=where, hint=hint)


def _removed(folder: str) -> DestinationError:
    hint = "whatever was written there is gone, too; the same command begins anew"
    return DestinationError("the destination was removed while the run was at work", where=(("folder", folder),), hint=hint)


def _vanished(root: str, file: OutputFile) -> DestinationError:
    where = (("file", redact(f"{root}/{file.name}")), ("staged", file.staged))
    hint = "was the destination cleaned up? fresh=True begins a new run, another path keeps what is there"
    return DestinationError("an output that the run log names is neither published nor staged", where=where, hint=hint)


class LocalRunStore:
    """A directory. Where the file system has no hard links, `create` and `publish` rename under a lock of the kernel's; where
    it has no locks either, `conditional` is False from the first of these on.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.conditional = True
        self._links = True
        self._real = ""
        self._inside: set[str] = set()  # directories that were found to be inside
        self._durable: set[str] = set()  # directories whose own names are on disk
        self._count = itertools.count()
        self._disk: WholeDisk | None = None

    # -- RunStore

    def create(self, name: str, data: bytes, folders: Sequence[str] = ()) -> bool:
        self._check_there(os.path.dirname(name))
        path = self._path(name, make=True)
        needed = [os.path.dirname(self._path(f"{folder}/0", make=True, sync=False)) for folder in folders]
        with self._errors(path):
            temporary = self._written((data,))
            try:
                made = self._link(temporary, path)
            finally:
                _unlink(temporary)
            if not made and Path(path).read_bytes() != data:
                return False
            here = os.path.dirname(path)
            _sync_folder(here)  # also where it is there: whoever made it may not have come that far
            self._durable.update(folder for folder in needed if os.path.dirname(folder) == here)  # made before that
            for folder in needed:
                self._sync_above(folder)
            return True

    def read(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as e:
            raise DestinationError(f"can't read there: {e.strerror}", where=(("file", path),)) from e

    def chunks(self, name: str) -> Iterator[bytes]:
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                while data := file.read(CHUNK_BYTES):
                    yield data
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as e:
            raise DestinationError(f"can't read there: {e.strerror}", where=(("file", path),)) from e

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.write_pieces(name, lambda: (data,), durable=durable)

    def write_pieces(self, name: str, pieces: Pieces, *, durable: bool = True) -> None:
        """As `write`, for what is too large for memory."""
        path = self._path(name, make=True, sync=durable)
        with self._errors(path):
            temporary = self._written(pieces(), sync=durable)
            try:
                os.replace(temporary, path)
            except BaseException:
                _unlink(temporary)
                raise
            if durable:
                _sync_folder(os.path.dirname(path))

    def names(self, folder: str) -> Iterator[str]:
        top = self._path(folder) if folder else self.root
        return _walk(top, f"{folder}/" if folder else "")

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        paths = [self._path(f.staged) for f in files]
        folders = sorted({os.path.dirname(p) for p in paths})
        if len(files) >= LEAST_FILES and self._disk is not None and self._disk.sync():
            with self._errors(self.root):
                for folder in folders:
                    self._sync_above(folder)
            return tuple(f for f, path in zip(files, paths, strict=True) if not os.path.exists(path))
        with self._errors(self.root):
            good = _sync_files(paths)
            bad_folders = {f for f, ok in zip(folders, _sync_files(folders), strict=True) if not ok}
            for folder in folders:
                if folder not in bad_folders:
                    self._sync_above(folder)
        pairs = zip(files, paths, good, strict=True)
        return tuple(f for f, path, ok in pairs if not ok or os.path.dirname(path) in bad_folders)

    def publish(self, files: Sequence[OutputFile], replace: Container[str] = ()) -> None:
        """replace: final names that may be taken by older files."""
        files = [f for f in files if f.staged]
        made: set[str] = set()
        for f in files:
            final = self._path(f.name, make=f.name.rpartition("/")[0] not in made)
            made.add(f.name.rpartition("/")[0])
            with self._errors(final):
                self._publish(f, self._path(f.staged), final, replace=f.name in replace)
        with self._errors(self.root):
            for folder in sorted(f"{self.root}/{name}" if name else self.root for name in made):
                _sync_folder(folder)
                self._sync_above(folder)
            for f in files:
                _unlink(self._path(f.staged))

    def remove(self, name: str) -> None:
        path = self._path(name)
        with self._errors(path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
            except (IsADirectoryError, PermissionError):
                if not os.path.isdir(path) or os.path.islink(path):
                    raise
                self._forget(path)
                with contextlib.suppress(OSError):
                    os.rmdir(path)
                    return
                # Out of the way first: a worker of a driver that was given up may be making files there.
                gone = self._path(f"{_TEMPORARY}-{secrets.token_hex(8)}")
                os.rename(path, gone)
                _remove_tree(gone)
                self._forget(path)

    # -- for sinks

    def check(self) -> None:
        """Raise DestinationError unless files can be made here. Leaves nothing behind."""
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            where = (("destination", self.root),)
            raise DestinationError("the destination is a file", where=where, hint="name a directory, or remove the file")
        # Folders that are missing are not made to try it: to remove them again would take them from a run beside this one.
        missing = _missing(self.root)
        there = (os.path.dirname(missing[-1]) or ".") if missing else self.root
        path = os.path.join(there, f".headrace-{secrets.token_hex(8)}")
        try:
            for folder in missing:
                with contextlib.suppress(FileNotFoundError):
                    os.lstat(os.path.join(there, os.path.basename(folder)))  # raises for a name that can't be made
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.unlink(path)
        except ValueError as e:
            raise DestinationError(f"no folder can have this name: {e}", where=(("destination", self.root),)) from None
        except OSError as e:
            raise disk_error(e, self.root) from e

    def begin(self, name: str) -> str:
        """Where to write a file that is to be staged as `name`."""
        path = os.path.join(self.root, name)
        folder = os.path.dirname(path)
        if folder not in _made_folders:
            with self._errors(path):
                os.makedirs(self._path(name, make=False).rpartition("/")[0], exist_ok=True)
            _made_folders.add(folder)
        return path

    def stage(self, name: str, path: str, digest: str) -> None:
        """The file at `path`, which `begin` gave, is complete."""

    def drop(self, name: str, path: str) -> None:
        """Remove what `begin` or `stage` left of a file."""
        _unlink(path)

    def top(self) -> list[str]:
        """Files directly in the root."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(e.name for e in entries if e.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as e:
            raise DestinationError(f"can't list the directory: {e.strerror}", where=(("destination", self.root),)) from e

    def remove_all(self, names: Iterable[str], below: str = "") -> None:
        """Files, and the folders below `below` that they leave empty."""
        folders: set[str] = set()
        for name in names:
            self.remove(name)
            while (name := name.rpartition("/")[0]) and name != below:
                folders.add(name)
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(self._path(folder))
        self._inside.clear()
        self._durable.clear()
        forget_folders(self.root)

    def size_and_digest(self, name: str) -> tuple[int, str] | None:
        """Of the file's bytes, read; None when there is none."""
        path = self._path(name)
        try:
            size = os.stat(path).st_size
            return size, digest_of(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as e:
            raise DestinationError(f"can't read there: {e.strerror}", where=(("file", path),)) from e

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Meanwhile `sync` may do many files at once that are staged from now on. One at a time."""
        disk = None
        with contextlib.suppress(OSError):
            disk = WholeDisk(self.root)
        self._disk = disk
        try:
            yield
        finally:
            self._disk = None
            if disk is not None:
                disk.close()

    def uri(self, name: str) -> str:
        return self._path(name)

    # -- parts

    def _path(self, name: str, *, make: bool = False, sync: bool = True) -> str:
        """The file's path. make: with the folders that it needs, durable where `sync`."""
        folder, _, base = check_name(self.root, name).rpartition("/")
        where = f"{self.root}/{folder}" if folder else self.root
        if where not in self._inside or (make and not os.path.isdir(where)):
            self._check_inside(where)
            if make:
                with self._errors(where):
                    self._durable.difference_update(_missing(where))  # somebody removed what was made
                    os.makedirs(where, exist_ok=True)
                    self._check_inside(where)
            if os.path.isdir(where):
                self._inside.add(where)
        if make and sync and where not in self._durable:
            with self._errors(where):
                self._sync_above(where)
        return f"{where}/{base}"

    def _check_there(self, folder: str) -> None:
        """Raise DestinationError if the folder was there and is gone: what was begun in it can't be gone on with."""
        where = f"{self.root}/{folder}"
        if where in self._inside and not os.path.isdir(where):
            raise _removed(where)

    def _forget(self, folder: str) -> None:
        """The folder may be gone, with those below it."""
        below = folder + "/"
        for known in (self._inside, self._durable):
            known.difference_update([at for at in tuple(known) if at == folder or at.startswith(below)])

    def _check_inside(self, folder: str) -> None:
        """Raise DestinationError if a link on the way there from the root leads out of it."""
        parts = [part for part in folder[len(self.root) :].split("/") if part]
        if not any(map(os.path.islink, itertools.accumulate(parts, os.path.join, initial=self.root))):
            return
        self._real = self._real or os.path.realpath(self.root)
        real = os.path.realpath(folder)
        if real != self._real and not real.startswith(self._real.rstrip("/") + "/"):
            where = (("destination", self.root), ("folder", folder))
            hint = "remove the link, or write elsewhere"
            raise DestinationError("a link leads out of the destination", where=where, hint=hint)

    def _sync_above(self, folder: str) -> None:
        """Make the folder's own name durable, and those of the folders that it lies in, up to the root's."""
        at, above = folder, list[str]()
        while at not in self._durable:
            try:
                _sync_folder(os.path.dirname(at))
            except PermissionError:
                if at != self.root:  # what is above it may be another's, and was there before
                    raise
            above.append(at)
            if at == self.root or at in ("/", ""):
                break
            at = os.path.dirname(at)
        self._durable.update(above)

    def _written(self, pieces: Iterable[bytes], *, sync: bool = True) -> str:
        """A temporary file with these bytes; durable, too, where `sync`."""
        name = f"{_TEMPORARY}-{os.getpid()}-{threading.get_ident()}-{next(self._count)}-{secrets.token_hex(4)}"
        path = self._path(name, make=True, sync=sync)
        try:
            _write(path, pieces, sync=sync)
        except BaseException:
            _unlink(path)
            raise
        return path

    def _link(self, source: str, path: str) -> bool:
        """Give a file another name, unless that is taken: False then."""
        if self._links:
            try:
                os.link(source, path)
                return True
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in _NO_LINKS:
                    raise
                self._links = False
        with self._locked():
            if os.path.lexists(path):
                return False
            os.rename(source, path)
            return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other driver is between looking for a name and making it. Kernels drop the lock of a process that ends."""
        descriptor = os.open(self._path(f"{PRIVATE}/lock", make=True, sync=False), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except (ImportError, OSError):
                self.conditional = False
            yield
        finally:
            os.close(descriptor)

    def _publish(self, file: OutputFile, staged: str, final: str, *, replace: bool) -> None:
        try:
            if self._link(staged, final):
                return
        except FileNotFoundError:
            there = _regular(final)
            if there is None:
                raise _vanished(self.root, file) from None
            if there.st_size != file.bytes:
                raise _occupied(self.root, file.name) from None
            if replace and digest_of(final) != file.digest:  # it is what was to be replaced
                raise _vanished(self.root, file) from None
            return
        there, ours = _regular(final), _regular(staged)
        if there is not None and ours is not None and os.path.samestat(there, ours):
            return
        if there is not None and there.st_size == file.bytes and file.digest and digest_of(final) == file.digest:
            return
        if not replace or there is None:
            raise _occupied(self.root, file.name)
        if ours is not None:
            os.replace(staged, final)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            gone = e.errno == errno.ENOENT and not os.path.isdir(self.root)
            raise (_removed(self.root) if gone else disk_error(e, path)) from e


_made_folders: set[str] = set()  # staging folders that this process has made


def forget_folders(root: str) -> None:
    """Folders below the root may be gone."""
    _made_folders.difference_update([made for made in tuple(_made_folders) if made == root or made.startswith(f"{root}/")])


def write_whole(path: str, data: Any) -> None:
    """A file of these bytes."""
    _write(path, (data,))


def _write(path: str, pieces: Iterable[Any], *, sync: bool = False) -> None:
    """A write that a full disk cuts short goes on, and fails. sync: the bytes; an empty file has none that could be lost."""
    empty = True
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                view = view[os.write(descriptor, view) :]
                empty = False
        if sync and not empty:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.unlink(path)


def _regular(path: str) -> os.stat_result | None:
    """Of a file; None for nothing, and for what is no file (a link, a directory)."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _sync_file(path: str) -> bool:
    """False when the file (or folder) can't be made durable: its bytes may be lost, whatever a second fsync says."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno in _FULL:
            raise
        return e.errno == errno.EINVAL and os.path.isdir(path)  # file systems without fsync for directories
    finally:
        os.close(descriptor)
    return True


def _sync_files(paths: Sequence[str]) -> list[bool]:
    if len(paths) <= FEW_SYNCS:
        return [_sync_file(p) for p in paths]
    with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="headrace-sync") as pool:
        return list(pool.map(_sync_file, paths))


def _sync_folder(path: str) -> None:
    if not _sync_file(path):
        code = errno.EIO if os.path.isdir(path) else errno.ENOENT
        raise OSError(code, os.strerror(code), path)


def _missing(path: str) -> list[str]:
    """The folder and those above it that are not there, innermost first."""
    out: list[str] = []
    while path and not os.path.lexists(path):
        out.append(path)
        path = os.path.dirname(path)
    return out


def _remove_tree(path: str) -> None:
    def again(function: Callable[..., Any], at: str, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(path, onerror=again)


def _walk(top: str, prefix: str) -> Iterator[str]:
    """Files below. In the order of the directory: sorting would keep millions of names in memory."""
    folders: list[str] = []
    try:
        with os.scandir(top) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    yield prefix + entry.name
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        raise DestinationError(f"can't list the directory: {e.strerror}", where=(("folder", top),)) from e
    for name in folders:
        yield from _walk(f"{top}/{name}", f"{prefix}{name}/")


class S3RunStore:
    """A prefix of a bucket. A store that ignores If-None-Match is told by `probe`: conditional is False then."""

    def __init__(self, root: str, scratch: str = "") -> None:
        self.root = root.rstrip("/")
        self.conditional = True
        self._scratch = scratch
        self._bucket, self._prefix = storage.split_s3(self.root)

    # -- RunStore

    def create(self, name: str, data: bytes, folders: Sequence[str] = ()) -> bool:
        key = self._key(name)
        if not self.conditional:
            there = self.read(name)
            if there is None:
                self.write(name, data)
            return there is None or there == data
        for _ in range(retries.POLICY.attempts):
            if self._put_if_absent(key, data):
                return True
            there = self.read(name)
            if there is not None:
                return there == data
            # The store refused two writes at the same time, and neither has taken effect.
        raise TransientError("the storage neither takes an object nor has one there", where=(("file", self.uri(name)),))

    def read(self, name: str) -> bytes | None:
        import obstore

        key = self._key(name)
        return storage.found(self.uri(name), lambda: bytes(obstore.get(self._store(), key).bytes()))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        import obstore

        key = self._key(name)
        self._written(name, lambda: obstore.put(self._store(), key, data, use_multipart=False))

    def chunks(self, name: str) -> Iterator[bytes]:
        """Raises TransientError when the object is replaced meanwhile."""
        import obstore
        from obstore.exceptions import PreconditionError

        key, uri = self._key(name), self.uri(name)
        head: Any = {"head": True}
        there = storage.found(uri, lambda: obstore.get(self._store(), key, options=head))
        size, etag = (0, None) if there is None else (there.meta["size"], there.meta["e_tag"])

        def part(start: int) -> bytes | None:
            options: Any = {"range": (start, min(start + storage.REQUEST_BYTES, size)), "if_match": etag}
            try:
                return bytes(obstore.get(self._store(), key, options=options).bytes())
            except PreconditionError:
                return None

        for start in range(0, size, storage.REQUEST_BYTES):
            data = storage.found(uri, lambda start=start: part(start))
            if data is None:
                raise TransientError("the object was replaced while it was read", where=(("file", uri),))
            yield data

    def write_pieces(self, name: str, pieces: Pieces) -> None:
        """As `write`, for what is too large for memory."""
        import obstore

        first = bytearray()
        for piece in pieces():
            first += piece
            if len(first) > storage.REQUEST_BYTES:
                break
        else:
            return self.write(name, bytes(first))
        key, store = self._key(name), self._store(bulk=True)

        def put() -> None:
            try:
                obstore.put(store, key, iter(pieces()), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
            except FileNotFoundError as e:
                if "NoSuchUpload" not in str(e):
                    raise
                raise ConnectionError("an upload in parts is gone") from e  # or completed, and its answer lost

        return self._written(name, put)

    def names(self, folder: str) -> Iterator[str]:
        prefix = self._key(folder) if folder else self._prefix
        cut = len(self._prefix) + 1 if self._prefix else 0
        return (meta["path"][cut:] for meta in storage.list_keys(self._bucket, prefix))

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        return ()

    def publish(self, files: Sequence[OutputFile], replace: Container[str] = ()) -> None:
        """replace: final names that may be taken by older files."""
        files = [f for f in files if f.staged]
        with ThreadPoolExecutor(min(COPY_THREADS, max(1, len(files))), thread_name_prefix="headrace-copy") as pool:
            list(pool.map(lambda f: self._publish(f, replace=f.name in replace), files))
        self._delete([self._key(f.staged) for f in files])

    def remove(self, name: str) -> None:
        self._delete(itertools.chain([self._key(name)], map(self._key, self.names(name))))

    # -- for sinks

    def check(self) -> None:
        """Raise DestinationError unless objects can be made here. Leaves nothing behind."""
        name = f"{PRIVATE}/check-{secrets.token_hex(8)}"
        self.write(name, b"")
        self._delete([self._key(name)])

    def probe(self) -> None:
        key = self._key(f"{PRIVATE}/probe-{secrets.token_hex(8)}")
        try:
            self._put_if_absent(key, b"1")
            self.conditional = not self._put_if_absent(key, b"2")
        except DestinationError:  # plain writes work, says `check`
            self.conditional = False
        finally:
            self._delete([key])

    def begin(self, name: str) -> str:
        """Where to write a file that is to be staged as `name`."""
        folder = os.path.join(self._scratch, f"{os.getpid()}-{threading.get_ident()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return os.path.join(folder, name.rpartition("/")[2])

    def stage(self, name: str, path: str, digest: str) -> None:
        """The file at `path`, which `begin` gave, is complete: upload it and remove it."""
        import obstore

        key = self._key(name)
        size = os.path.getsize(path)
        noted: Any = {DIGEST: digest}
        if size <= storage.REQUEST_BYTES:
            data = Path(path).read_bytes()
            self._written(name, lambda: obstore.put(self._store(), key, data, attributes=noted, use_multipart=False))
        else:
            part = max(PART_BYTES, size // PARTS + 1)
            store = self._store(bulk=True)

            def put() -> None:
                try:
                    obstore.put(store, key, Path(path), attributes=noted, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
                except FileNotFoundError as e:
                    if "NoSuchUpload" not in str(e):
                        raise
                    if self._noted(name) != (size, digest):  # the upload was completed, and its answer lost
                        raise ConnectionError("an upload in parts is gone") from e

            self._written(name, put)
        os.unlink(path)

    def drop(self, name: str, path: str) -> None:
        """Remove what `begin` or `stage` left of a file."""
        _unlink(path)
        self._delete([self._key(name)])

    def top(self) -> list[str]:
        """Files directly in the root."""
        import obstore

        cut = len(self._prefix) + 1 if self._prefix else 0
        found = storage.requested(self.root, lambda: obstore.list_with_delimiter(self._store(), self._prefix or None))
        return sorted(meta["path"][cut:] for meta in found["objects"])

    def remove_all(self, names: Iterable[str], below: str = "") -> None:
        self._delete(map(self._key, names))

    def size_and_digest(self, name: str) -> tuple[int, str] | None:
        """Of the object's bytes, read; None when there is none."""
        import obstore

        key = self._key(name)

        def read() -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            for chunk in obstore.get(self._store(bulk=True), key).stream(min_chunk_size=1 << 20):
                digest.update(chunk)
                size += len(chunk)
            return size, digest.hexdigest()

        return storage.found(self.uri(name), read)

    def uri(self, name: str) -> str:
        return f"{self.root}/{name}"

    # -- parts

    def _store(self, *, bulk: bool = False) -> Any:
        return storage.s3_store(self._bucket, bulk=bulk)

    def _key(self, name: str) -> str:
        check_name(self.root, name)
        return f"{self._prefix}/{name}" if self._prefix else name

    def _written(self, name: str, action: Callable[[], T]) -> T:
        try:
            return storage.requested(self.uri(name), action)
        except DataError as e:
            raise DestinationError(f"can't write there: {e.message}", where=e.where, hint=e.hint) from None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """False: another object is there, or another write is under way."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def put() -> bool:
            try:
                obstore.put(self._store(), key, data, mode="create")
                return True
            except AlreadyExistsError:
                return False

        return self._written(key[len(self._prefix) :].lstrip("/"), put)

    def _publish(self, file: OutputFile, *, replace: bool) -> None:
        there = self._noted(file.name)
        if there is not None:
            if self._is(file, there):
                return
            if not replace:
                raise _occupied(self.root, file.name)
        if not self._copy(file):
            there = self._noted(file.name)
            if there is None:
                raise _vanished(self.root, file)
            if not self._is(file, there):
                raise _occupied(self.root, file.name)

    def _noted(self, name: str) -> tuple[int, str] | None:
        """Size of an object, and the digest that its metadata note."""
        import obstore

        key = self._key(name)
        options: Any = {"head": True}
        got = storage.found(self.uri(name), lambda: obstore.get(self._store(), key, options=options))
        return None if got is None else (got.meta["size"], got.attributes.get(DIGEST, ""))

    def _is(self, file: OutputFile, there: tuple[int, str]) -> bool:
        size, digest = there
        if size != file.bytes:
            return False
        if not digest:  # a store without metadata
            found = self.size_and_digest(file.name)
            digest = found[1] if found is not None else ""
        return digest == file.digest

    def _copy(self, file: OutputFile) -> bool:
        """False when there is nothing staged."""
        import obstore

        source, target = self._key(file.staged), self._key(file.name)
        if file.bytes > COPY_MOST_BYTES:
            return self._carry(file, source, target)
        store = self._store(bulk=file.bytes > storage.REQUEST_BYTES)

        def copy() -> bool:
            obstore.copy(store, source, target)
            return True

        return storage.found(self.uri(file.name), copy) is not None

    def _carry(self, file: OutputFile, source: str, target: str) -> bool:
        """Copy an object through this machine: too large for the store to copy in one request."""
        import asyncio

        import obstore

        async def carry() -> bool:
            store = self._store(bulk=True)
            got = await obstore.get_async(store, source)
            part = max(PART_BYTES, file.bytes // PARTS + 1)
            noted: Any = {DIGEST: file.digest}
            await obstore.put_async(
                store, target, got.stream(min_chunk_size=part), attributes=noted, chunk_size=part, max_concurrency=PARTS_AT_ONCE
            )
            return True

        return storage.found(self.uri(file.name), lambda: asyncio.run(carry())) is not None

    def _delete(self, keys: Iterable[str]) -> None:
        """Absent ones are no error."""
        import obstore

        left = iter(keys)
        while part := list(itertools.islice(left, DELETE_AT_ONCE)):
            with contextlib.suppress(FileNotFoundError):
                self._written(PRIVATE, lambda part=part: obstore.delete(self._store(), part))


def quietly(action: Callable[..., object], *args: Any) -> None:
    """Call something whose failure must not hide the error that brought us here."""
    try:
        action(*args)
    except (OSError, HeadraceError):
        return
