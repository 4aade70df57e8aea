"""Destinations: a directory or an S3 prefix that outputs are published into.

What must not live here: formats, names of outputs, what may be deleted (sinks/files.py decides). Invariants: a name
appears with its whole content or not at all; `publish` without `replace` never overwrites. Survival of a power cut is
not promised yet: files are not fsynced one by one (0.3 ms each, more than writing a small one); fsync in groups belongs
to the run log.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from headrace.connectors import storage
from headrace.connectors.sinks import claims
from headrace.core.errors import DataError, DestinationError, HeadraceError

PRIVATE = "_headrace"


class Destination(Protocol):
    root: str

    def check(self) -> None:
        """Raise DestinationError unless outputs can be written here."""
        ...

    def claim(self, token: str, owner: object) -> None:
        """Before the first `staging`: hold that directory while `owner` lives, and remove those of processes that are gone."""
        ...

    def staging(self, token: str) -> str:
        """A local directory for files in the making."""
        ...

    def publish(self, staged: str, name: str, *, replace: bool) -> bool:
        """Move a staged file to its name. False (and the staged file gone) when it exists and may not be replaced."""
        ...

    def move(self, name: str, to: str) -> None: ...

    def names(self, folder: str = "") -> Iterator[str]:
        """Files directly in the root, or all below `folder`, relative to the root."""
        ...

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None:
        """Atomically, over what is there."""
        ...

    def delete(self, name: str) -> None: ...

    def clean(self, token: str) -> None:
        """Remove the staging directory of a run, and what it leaves empty."""
        ...


def destination(path: str) -> Destination:
    if storage.is_remote(path):
        return S3Destination(path)
    return LocalDestination(path)


_made: set[str] = set()  # staging folders that this process has made: one a run


class LocalDestination:
    def __init__(self, root: str) -> None:
        self.root = root

    def check(self) -> None:
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            where = (("destination", self.root),)
            raise DestinationError("the destination is a file", where=where, hint="name a directory, or remove the file")
        try:
            os.makedirs(os.path.join(self.root, PRIVATE, "staging"), exist_ok=True)
            with tempfile.TemporaryFile(dir=os.path.join(self.root, PRIVATE, "staging")):
                pass
        except OSError as e:
            where = (("destination", self.root),)
            raise DestinationError(f"can't write there: {e.strerror}", where=where, hint="check its permissions") from e

    def staging(self, token: str) -> str:
        # A folder a worker: creating files in one folder from several processes at once is slow on most file systems.
        path = os.path.join(self.root, PRIVATE, "staging", token, f"{os.getpid()}-{threading.get_ident()}")
        if path not in _made:
            os.makedirs(path, exist_ok=True)
            _made.add(path)
        return path

    def claim(self, token: str, owner: object) -> None:
        folder = os.path.join(self.root, PRIVATE, "staging")
        claims.remove_stale(folder)
        claims.claim(os.path.join(folder, token), owner)

    def publish(self, staged: str, name: str, *, replace: bool) -> bool:
        final = os.path.join(self.root, name)
        if "/" in name:
            os.makedirs(os.path.dirname(final), exist_ok=True)
        if replace:
            os.replace(staged, final)
            return True
        try:
            os.link(staged, final)
        except FileExistsError:
            os.unlink(staged)
            return False
        except OSError:  # no hard links on this file system: the check and the rename are two steps there
            if os.path.exists(final):
                os.unlink(staged)
                return False
            os.rename(staged, final)
            return True
        os.unlink(staged)
        return True

    def move(self, name: str, to: str) -> None:
        final = os.path.join(self.root, to)
        os.makedirs(os.path.dirname(final), exist_ok=True)
        os.replace(os.path.join(self.root, name), final)

    def names(self, folder: str = "") -> Iterator[str]:
        if not folder:
            if os.path.isdir(self.root):
                with os.scandir(self.root) as entries:
                    yield from (e.name for e in entries if e.is_file())
            return
        top = os.path.join(self.root, folder)
        for where, _, files in os.walk(top):
            for f in files:
                yield os.path.relpath(os.path.join(where, f), self.root).replace(os.sep, "/")

    def read(self, name: str) -> bytes | None:
        try:
            return Path(self.root, name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        temporary = os.path.join(self.root, f".{name}.tmp")
        Path(temporary).write_bytes(data)
        os.replace(temporary, os.path.join(self.root, name))

    def delete(self, name: str) -> None:
        Path(self.root, name).unlink(missing_ok=True)

    def clean(self, token: str) -> None:
        private = os.path.join(self.root, PRIVATE)
        folder = os.path.join(private, "staging", token)
        _made.difference_update([made for made in _made if made.startswith(folder + os.sep)])
        claims.release(os.path.join(private, "staging", token))
        for folder in (os.path.join(private, "staging"), private):
            try:
                os.rmdir(folder)
            except OSError:
                break  # another run's, or the log's


class S3Destination:
    """Staged on local disk, then put; large files go in parts, which S3 shows only when complete."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._bucket, self._prefix = storage.split_s3(self.root)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def check(self) -> None:
        import obstore

        probe = self._key(f"{PRIVATE}/probe")
        try:
            with storage.s3_errors(self.root):
                obstore.put(storage.s3_store(self._bucket), probe, b"")
                obstore.delete(storage.s3_store(self._bucket), probe)
        except DataError as e:
            where = (("destination", self.root),)
            raise DestinationError(f"can't write there: {e.message}", where=where, hint=e.hint) from e

    def staging(self, token: str) -> str:
        path = self._staging(token)
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def publish(self, staged: str, name: str, *, replace: bool) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        key = self._key(name)
        large = os.path.getsize(staged) > storage.REQUEST_BYTES
        try:
            with storage.s3_errors(f"{self.root}/{name}"):
                store = storage.s3_store(self._bucket)
                if not replace and large and storage.stat(f"{self.root}/{name}") is not None:
                    return False  # put in parts can't be conditional: the check comes first
                try:
                    if large:
                        obstore.put(store, key, Path(staged))
                    else:
                        obstore.put(store, key, Path(staged).read_bytes(), mode="overwrite" if replace else "create")
                except AlreadyExistsError:
                    return False
            return True
        except DataError as e:
            raise DestinationError(f"can't write: {e.message}", where=e.where, hint=e.hint) from e
        finally:
            os.unlink(staged)

    def move(self, name: str, to: str) -> None:
        import obstore

        with storage.s3_errors(f"{self.root}/{to}"):
            store = storage.s3_store(self._bucket)
            obstore.copy(store, self._key(name), self._key(to))
            obstore.delete(store, self._key(name))

    def names(self, folder: str = "") -> Iterator[str]:
        import obstore

        store = storage.s3_store(self._bucket)
        cut = len(self._prefix) + 1 if self._prefix else 0
        with storage.s3_errors(self.root):
            if folder:
                for page in obstore.list(store, self._key(folder), chunk_size=1000):
                    yield from (meta["path"][cut:] for meta in page)
            else:
                found = obstore.list_with_delimiter(store, self._prefix or None)
                yield from (meta["path"][cut:] for meta in found["objects"])

    def read(self, name: str) -> bytes | None:
        import obstore

        with storage.s3_errors(f"{self.root}/{name}"):
            try:
                return bytes(obstore.get(storage.s3_store(self._bucket), self._key(name)).bytes())
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        import obstore

        with storage.s3_errors(f"{self.root}/{name}"):
            obstore.put(storage.s3_store(self._bucket), self._key(name), data)

    def delete(self, name: str) -> None:
        import obstore

        with storage.s3_errors(f"{self.root}/{name}"):
            try:
                obstore.delete(storage.s3_store(self._bucket), self._key(name))
            except FileNotFoundError:
                return

    def clean(self, token: str) -> None:
        claims.release(self._staging(token))

    def claim(self, token: str, owner: object) -> None:
        claims.remove_stale(tempfile.gettempdir())
        claims.claim(self._staging(token), owner)

    def _staging(self, token: str) -> str:
        return os.path.join(tempfile.gettempdir(), f"headrace-staging-{token}")


def quietly(action: object, *args: object) -> None:
    """Call something whose failure must not hide the error that brought us here."""
    try:
        action(*args)  # type: ignore[operator]
    except (OSError, HeadraceError):
        return
