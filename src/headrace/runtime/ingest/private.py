"""This user's private folder for sockets, and for notes that say where one is: kept, and swept by whoever comes next.

Invariant: a socket has its final name only once somebody listens at it, so that one that does not answer is nobody's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import stat
import tempfile

from headrace.core.errors import PlanError

_LONGEST = 60  # of the folder's path: with a file in it, it must fit a socket's address, 104 bytes on macOS
_SOCKET, _NOTE = ".sock", ".json"


def folder() -> str:
    """The folder; it is there. Raises PlanError when somebody else could enter it."""
    name = f"headrace-{os.getuid()}"
    path = os.path.join(tempfile.gettempdir(), name)
    if len(path) > _LONGEST:
        path = os.path.join("/tmp", name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PlanError(
            "the folder for sockets is not this user's alone",
            where=(("folder", path),),
            hint="remove it, or set TMPDIR to a folder of your own",
        )
    return path


def listen() -> tuple[socket.socket, str]:
    """A listening socket, and its address."""
    place = folder()
    _sweep(place)
    name = os.path.join(place, secrets.token_hex(8))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(128)
        os.rename(name, name + _SOCKET)
    except BaseException:
        listener.close()
        raise
    return listener, name + _SOCKET


def answers(address: str) -> bool:
    """Does a server listen there?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(address)
        except OSError:
            return False
        return True


def note(name: str) -> str:
    """The path of a note of that name, whether it is there or not."""
    return os.path.join(folder(), name + _NOTE)


def read_note(path: str) -> dict[str, str] | None:
    """What it says; None when it is not there, or makes no sense."""
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("address"), str) else None


def write_note(path: str, said: dict[str, str]) -> None:
    fresh = f"{path}.{os.getpid()}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(said, file)
    os.replace(fresh, path)


def _sweep(place: str) -> None:
    """Remove what processes that were killed have left."""
    for name in sorted(os.listdir(place), reverse=True):  # sockets before the notes about them
        path = os.path.join(place, name)
        said = read_note(path) if name.endswith(_NOTE) else None
        address = path if name.endswith(_SOCKET) else said["address"] if said is not None else None
        if address is not None and not answers(address):
            with contextlib.suppress(OSError):
                os.unlink(path)
