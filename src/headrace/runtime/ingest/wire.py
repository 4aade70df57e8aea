"""What server and client say to each other over a Unix socket. Nothing that arrives is ever executed: numbers, JSON, Arrow IPC.

Client to server:  a hello (magic, token, rank), then NEXT as often as it likes; it leaves by closing.
Server to client:  frames of kind, length, body: BEGUN once the epoch begins; for each NEXT one of BLOCK (an Arrow IPC stream of
                   one batch), END, ERROR (JSON: kind, message, where, hint, frames). After END and ERROR it closes.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Final

from headrace.core import errors
from headrace.core.errors import HeadraceError, InternalError

HELLO: Final = struct.Struct("<8s32sI")
MAGIC: Final = b"hr-in-01"
NEXT: Final = b"n"
BEGUN, BLOCK, END, ERROR = range(4)

_HEADER = struct.Struct("<BQ")
TOKEN_BYTES: Final = 32


def send_frame(sock: socket.socket, kind: int, body: Any = b"") -> None:
    """Raises OSError when the peer is gone."""
    sock.sendall(_HEADER.pack(kind, len(body)))
    if len(body):
        sock.sendall(body)


def read_header(sock: socket.socket) -> tuple[int, int] | None:
    """(kind, length of the body); None when the peer has closed."""
    data = bytearray(_HEADER.size)
    return _HEADER.unpack(data) if read_into(sock, memoryview(data)) else None


def read_into(sock: socket.socket, view: memoryview) -> bool:
    """Fill the view. False when the peer has closed before it was full."""
    at = 0
    while at < len(view):
        count = sock.recv_into(view[at:])
        if not count:
            return False
        at += count
    return True


def pack_error(error: HeadraceError) -> bytes:
    """The error as JSON. A class that is none of core.errors travels as the nearest one that it derives from."""
    kind = next(c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c)
    fields = {"message": error.message, "where": error.where, "hint": error.hint, "frames": error.frames}
    return json.dumps({"kind": kind, **fields}).encode()


def unpack_error(body: bytes) -> HeadraceError:
    try:
        told = json.loads(body)
        kind = getattr(errors, str(told["kind"]))
        if not issubclass(kind, HeadraceError):
            raise TypeError(kind)
        where = tuple((str(label), str(value)) for label, value in told["where"])
        return kind(told["message"], where=where, hint=told["hint"], frames=told["frames"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return InternalError(f"the server's error can't be read: {e}")
