"""Models' files: local paths, and copies of those on S3 kept on this machine.

What must not live here: formats of models, and what may be loaded. Invariants:
- A copy's name derives from the uri and the versions of all its objects: one that is there is complete and current, and a
  model that changes gets another.
- A copy is made under a temporary name and renamed into place. One process of a machine makes it; the others wait for it at a
  lock that the kernel lets go when its holder dies, and what a dead one left is removed by the next.

A uri is a local path, "file:///path", "s3://bucket/key", or "s3://bucket/folder" for all objects below it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from urllib.parse import unquote, urlsplit

from headrace.connectors import environment, storage
from headrace.connectors.redact import redact
from headrace.connectors.storage import Stored
from headrace.core.errors import DataError, PlanError
from headrace.plan.fingerprint.values import digest, file_digest, folder_digest

DOWNLOAD_BYTES = 64 << 20  # in memory at a time: enough for several concurrent requests

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def local_path(uri: str) -> str:
    """The path of a file or folder that holds what `uri` names; objects on S3 are downloaded unless that version is here.

    What is downloaded lies in environment.model_cache() under its own name, and is not to be written to. Raises DataError for
    what is not there, TransientError for storage trouble.
    """
    if not storage.is_remote(uri):
        path = _path(uri)
        if not os.path.exists(path):
            raise _missing(uri)
        return path
    objects, folder = _objects(uri)
    if not objects:
        raise _missing(uri)
    name = uri.rstrip("/").rpartition("/")[2]
    name = "model" if name in ("", ".", "..") else name
    home = environment.model_cache()
    copy = os.path.join(home, _key(uri, objects))
    if not os.path.isdir(copy):
        _download(home, copy, name, objects, folder)
    return os.path.join(copy, name)


def identity(uri: str) -> str:
    """What tells this content from any other, for fingerprints: a digest of local files, versions of objects on S3.

    Raises DataError for what is not there.
    """
    if storage.is_remote(uri):
        objects, folder = _objects(uri)
        if not objects:
            raise _missing(uri)
        if not folder:
            return f"version {objects[0].version}"
        return f"{len(objects)} objects, digest {digest(*_lines(objects))}"
    path = _path(uri)
    if os.path.isfile(path):
        return file_digest(path)
    if not os.path.isdir(path):
        raise _missing(uri)
    found = folder_digest(path)
    if not found:
        raise DataError(
            f"the folder {path} is no model: it is empty, or holds too many files", hint="name the model's own folder"
        )
    return found


def check_exists(uri: str, what: str) -> None:
    """Raise PlanError unless there is such a file, folder, object or prefix. what: that which needs it."""
    if not storage.is_remote(uri):
        if not os.path.exists(_path(uri)):
            raise PlanError(f"{what}: there is no file or folder {_path(uri)}", hint="check the path")
        return
    try:
        objects, _ = _objects(uri)
    except DataError as error:
        raise PlanError(f"{what}: {error.message}", where=error.where, hint=error.hint) from None
    if not objects:
        raise PlanError(f"{what}: there is no object {redact(uri)}, and none below it", hint="check the bucket and the key")


# --- what is there ---------------------------------------------------------------------------------------------------


def _path(uri: str) -> str:
    if uri.startswith("file://"):
        return unquote(urlsplit(uri).path)
    scheme = _SCHEME.match(uri)
    if scheme is not None:
        hint = "give a local path or s3://bucket/key"
        raise PlanError(f"models are not read from {scheme[0]}: {redact(uri)}", hint=hint)
    return os.path.expanduser(uri)


def _missing(uri: str) -> DataError:
    return DataError(f"there is no {redact(uri)}", hint="check the path, or the bucket and the key")


def _objects(uri: str) -> tuple[Sequence[Stored], bool]:
    """(the object, or all below the prefix by key, each with its name below it; whether it is a prefix)."""
    bucket, key = storage.split_s3(uri)
    if key and not key.endswith("/"):
        single = storage.stat(uri)
        if single is not None:
            return [single], False
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    found: list[Stored] = []
    for meta in storage.list_keys(bucket, prefix):
        path: str = meta["path"]
        name = path[len(prefix) :]
        if name and not name.endswith("/"):
            found.append(Stored(f"{storage.S3_PREFIX}{bucket}/{path}", meta["size"], storage.meta_version(meta), name))
    return found, True


def _lines(objects: Sequence[Stored]) -> list[str]:
    return [f"{o.name} {o.version} {o.size}\n" for o in objects]


def _key(uri: str, objects: Sequence[Stored]) -> str:
    return digest(uri.rstrip("/"), "\n", *_lines(objects))


# --- downloads -------------------------------------------------------------------------------------------------------


def _download(home: str, copy: str, name: str, objects: Sequence[Stored], folder: bool) -> None:
    """Make the directory `copy`, with the file or folder `name` in it, unless somebody else just did."""
    try:
        os.makedirs(home, exist_ok=True)
        with _locked(f"{copy}.lock"):
            if os.path.isdir(copy):
                return
            _remove_dead(home, os.path.basename(copy))
            made = tempfile.mkdtemp(prefix=f"{os.path.basename(copy)}.", suffix=".part", dir=home)
            try:
                for each in objects:
                    _fetch(each, _inside(os.path.join(made, name), each.name) if folder else os.path.join(made, name))
                _rename(made, copy)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        hint = "make room or give another folder by HEADRACE_CACHE"
        raise DataError(f"can't keep a copy of the model in {home}: {error.strerror or error}", hint=hint) from error


def _inside(top: str, name: str) -> str:
    """The path of `name` below `top`. Raises DataError for a key that would lead out of it."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise DataError(f"the object name {name!r} is no path within a folder", hint="rename it")
    return os.path.join(top, *parts)


def _fetch(stored: Stored, path: str) -> None:
    """One object, under the version that was listed, to a new file that survives a crash of the machine."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    reader = storage.open_reader(stored.uri, stored.size, stored.version)
    try:
        source = reader.native()
        with open(path, "xb") as file:
            for at in range(0, stored.size, DOWNLOAD_BYTES):
                stop = min(at + DOWNLOAD_BYTES, stored.size)
                if not reader.whole:
                    reader.prefetch([(at, stop)])
                file.write(source.read_buffer(stop - at))
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
    finally:
        reader.close()
    if written != stored.size:
        raise storage.changed(stored.uri)


def _rename(made: str, copy: str) -> None:
    try:
        os.rename(made, copy)
    except OSError:
        if not os.path.isdir(copy):  # where there are no locks, another process may have been first
            raise


def _remove_dead(home: str, key: str) -> None:
    """What processes left that died while they held the lock; whoever calls this holds it."""
    for name in os.listdir(home):
        if name.startswith(f"{key}.") and name.endswith(".part"):
            shutil.rmtree(os.path.join(home, name), ignore_errors=True)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Nobody else of this machine, threads of this process included, is inside. Where there are no locks: no wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
