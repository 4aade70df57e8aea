"""Marks of functions being tried in this process: files that outlive a process which the functions end.

The run log tells later sessions of the same run as much. Marks are for what keeps no log (`take`, `to_arrow`, iterators), where
the same call would end every process that makes it.

A mark is an empty, locked file `<functions>-<random>` in the folder `trials` of the cache folder; it gets that name when it is
locked. The kernel drops the lock with its process: a mark that nobody holds is of a process that died, of the functions or of
whatever else ended it in those few milliseconds. Who looks takes a shared lock, so that several may look at once. Nothing but
the choice of an engine depends on marks, so trouble with files is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from headrace.connectors.environment import cache_folder
from headrace.plan.nodes import Op

FOLDER = "trials"
KEPT_S = 24 * 3600.0  # the functions may rely on what has been mended since: try them again


def key_of(source: str, ops: Sequence[Op]) -> str:
    """What is tried: these operators by their names and their functions' own code, on that input."""
    digest = hashlib.blake2b(source.encode(), digest_size=12)
    for op in ops:
        digest.update(op.name.encode())
        target: Any = getattr(getattr(op, "fn", None) or getattr(op, "model", None), "target", None)
        owner: Any = target if isinstance(target, type) else type(target)
        code = getattr(target, "__code__", None) or getattr(owner.__call__, "__code__", None)
        if code is not None:
            digest.update(marshal.dumps(code, 2))  # later formats depend on reference counts
    return digest.hexdigest()


def died_of(key: str) -> bool:
    """Has a process that tried this died meanwhile, not long ago? Removes old marks."""
    found = False
    with contextlib.suppress(OSError), os.scandir(_folder()) as marks:
        for entry in marks:
            with contextlib.suppress(OSError, ImportError):  # its process may remove it just now
                if time.time() - entry.stat().st_mtime > KEPT_S:
                    os.unlink(entry.path)
                elif entry.name.startswith(key):
                    found |= not _held(entry.path)
    return found


@contextlib.contextmanager
def mark(key: str) -> Iterator[None]:
    """Inside, a mark says that this process tries it."""
    name = f"{key}-{secrets.token_hex(4)}"
    path, unlocked = os.path.join(_folder(), name), os.path.join(_folder(), f".{name}")
    with contextlib.ExitStack() as leaving:
        with contextlib.suppress(OSError, ImportError):
            descriptor = _create(unlocked)
            leaving.callback(os.close, descriptor)
            leaving.callback(_remove, unlocked)
            _lock(descriptor, alone=True)
            leaving.callback(_remove, path)
            os.rename(unlocked, path)
        yield


def _folder() -> str:
    return os.path.join(cache_folder(), FOLDER)


def _create(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o600)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _held(path: str) -> bool:
    """Is or was it, to its end, held by a living process?"""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _lock(descriptor, alone=False)
        return os.fstat(descriptor).st_nlink == 0  # removed by its process just now, and only then let go
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, alone: bool) -> None:
    """Raises BlockingIOError when another process has it, ImportError where there are no such locks."""
    import fcntl

    fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
