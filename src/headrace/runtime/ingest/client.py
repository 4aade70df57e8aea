"""A consumer in another process than the one that serves: connects for each epoch, and asks for block after block."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import headrace.core.tensors  # registers the type of ragged tensors, which may come  # noqa: F401
from headrace.core.errors import PlanError, WorkerDied
from headrace.runtime.ingest.coordinator import AHEAD
from headrace.runtime.ingest.wire import (
    BEGUN,
    BLOCK,
    END,
    HELLO,
    MAGIC,
    NEXT,
    TOKEN_BYTES,
    read_header,
    read_into,
    unpack_error,
)
from headrace.substrates.blocks import decode

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RemoteChannel:
    """All that another process of this machine and user needs. pid: of the process that serves."""

    ahead: ClassVar[int] = AHEAD

    address: str
    token: str = field(repr=False)
    pid: int

    def join(self, rank: int) -> RemoteEpoch:
        """As Channel. Raises WorkerDied when nobody serves there any more."""
        if not hasattr(socket, "AF_UNIX"):
            raise PlanError("this process can't be served: it needs Unix sockets", hint="use threads of the serving process")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _sockets.add(sock)
        try:
            try:
                sock.connect(self.address)
                sock.sendall(HELLO.pack(MAGIC, bytes.fromhex(self.token).ljust(TOKEN_BYTES), rank))
                header = read_header(sock)
            except OSError:
                header = None
            if header is None:
                raise self._gone(rank)
            if header[0] != BEGUN:
                raise _error(sock, header[1]) or self._gone(rank)
        except BaseException:
            sock.close()
            raise
        return RemoteEpoch(sock, lambda: self._gone(rank))

    def close(self) -> None:
        """The split is its server's to close."""

    def __reduce__(self) -> tuple[Callable[..., RemoteChannel], tuple[Any, ...]]:
        return RemoteChannel, (self.address, self.token, self.pid)

    def _gone(self, rank: int) -> WorkerDied:
        return WorkerDied(
            "the process that runs the pipeline of this streaming_split has ended, or closed it",
            where=(("rank", str(rank)), ("process", str(self.pid)), ("address", self.address)),
            hint="keep it running, on this machine, as long as its iterators are used; its own log says why it ended",
        )


class RemoteEpoch:
    """A consumer's share, over a connection. gone: makes the error for a server that has ended."""

    def __init__(self, sock: socket.socket, gone: Callable[[], WorkerDied]) -> None:
        self._sock = sock
        self._gone = gone
        self._using = threading.Lock()
        self._left = False

    def next(self) -> pa.RecordBatch | None:
        with self._using:
            try:
                answer = None if self._left else self._ask()
            except BaseException:
                if self._left:
                    return None
                self._left = True
                self._sock.close()
                raise
            if answer is None:
                self._left = True
                self._sock.close()
            return answer

    def leave(self) -> None:
        self._left = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # ends a recv in another thread, as closing would not
        with self._using:
            self._sock.close()

    def _ask(self) -> pa.RecordBatch | None:
        import pyarrow as pa

        try:
            self._sock.sendall(NEXT)
            header = read_header(self._sock)
            if header is None:
                raise self._gone()
            kind, size = header
            if kind == BLOCK:
                buffer = pa.allocate_buffer(size)
                if read_into(self._sock, memoryview(buffer)):
                    return decode(buffer)
                raise self._gone()
            if kind == END:
                return None
            raise _error(self._sock, size) or self._gone()
        except OSError:
            raise self._gone() from None


def _error(sock: socket.socket, size: int) -> Exception | None:
    """The error that the server sends; None when it is gone meanwhile."""
    body = bytearray(size)
    return unpack_error(bytes(body)) if read_into(sock, memoryview(body)) else None


# A child forked in the middle of an epoch would hold the connection, and the server would not hear of its parent's end.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _after_fork() -> None:
    for sock in list(_sockets):
        sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
