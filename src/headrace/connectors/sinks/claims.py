"""Claims: which staging directory belongs to a run that is still alive.

A run holds a lock on its directory, which the kernel lets go when its process ends, however it ends; the next run removes those
that it can lock. Invariants: only directories called after a run's token are ever removed; where a file system has no locks
nothing is taken for stale.
"""

from __future__ import annotations

import os
import re
import shutil
import weakref

_NAME = re.compile(r"(headrace-staging-)?[0-9a-f]{12}")

_held: dict[str, int] = {}  # directory -> its descriptor, open while a run of this process uses it


def claim(directory: str, owner: object) -> None:
    """Make `directory`, whose name nobody else uses, and hold it until `release`, or until `owner` is gone."""
    while True:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # another run took it for stale, as nobody held it yet
            continue
        if not _lock(descriptor, wait=True) or _is_at(descriptor, directory):
            break
        os.close(descriptor)
    _held[directory] = descriptor
    weakref.finalize(owner, _let_go, directory).atexit = False


def release(directory: str) -> None:
    """Remove it and let go of it; also where it was never claimed."""
    shutil.rmtree(directory, ignore_errors=True)
    _let_go(directory)


def remove_stale(folder: str) -> None:
    """Remove the staging directories in `folder` whose processes are gone."""
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if _NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # just gone, or another user's
            continue
        if _lock(descriptor) and _is_at(descriptor, path):
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _let_go(directory: str) -> None:
    descriptor = _held.pop(directory, None)
    if descriptor is not None:
        os.close(descriptor)


def _is_at(descriptor: int, directory: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(directory))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """wait: for whoever has it, who then removes the directory."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
