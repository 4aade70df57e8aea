"""Serving a hub to other processes of this machine, over a Unix socket in a private folder; and the channel of its own process.

One thread accepts and notices who is gone; each connection (one consumer in one epoch) has a thread that copies its blocks into
the socket. Who does not know the token learns nothing.

The process that serves ends last: at its exit it waits for the consumers that are in an epoch, unless it ends by an error.

Invariants:
- A consumer's end, however it comes, is known to the hub before a connection that was made after it is looked at: so a consumer
  may leave and join again at once.
- A forked child holds none of these sockets, so that the end of either side is seen by the other.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import os
import secrets
import select
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from headrace.core.errors import HeadraceError, InternalError, PlanError
from headrace.runtime.ingest import private
from headrace.runtime.ingest.client import RemoteChannel, RemoteEpoch
from headrace.runtime.ingest.coordinator import Piece
from headrace.runtime.ingest.hub import PATIENCE_S, Hub
from headrace.runtime.ingest.wire import (
    BEGUN,
    BLOCK,
    END,
    ERROR,
    HELLO,
    MAGIC,
    NEXT,
    TOKEN_BYTES,
    pack_error,
    read_into,
    send_frame,
)
from headrace.substrates.blocks import encode_into, encoded_bytes

if TYPE_CHECKING:
    import pyarrow as pa

HELLO_S = 10.0  # for a peer to say who it is
EXIT_S = 5.0  # for user code to end when the process does


class LocalChannel:
    """The channel of the process that has the hub: threads take pieces as they are. It serves other processes from the moment
    it is pickled, or the process forks; in those it is a RemoteChannel.
    """

    ahead: ClassVar[int] = 0

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._pid = os.getpid()
        self._server: Server | None = None
        self._starting = threading.Lock()
        self._closed = False
        self._epochs: weakref.WeakSet[LocalEpoch] = weakref.WeakSet()
        self._at_close: list[Callable[[], None]] = []
        _channels.add(self)

    @property
    def serves(self) -> bool:
        """Whether this process serves others."""
        return os.getpid() == self._pid and self._server is not None and not self._closed

    def join(self, rank: int) -> LocalEpoch | RemoteEpoch:
        if os.getpid() != self._pid:
            return self.remote().join(rank)
        ticket = self._hub.ticket()
        self._hub.join(ticket, rank)
        try:
            self._hub.wait_begin(ticket)
        except BaseException:
            self._hub.leave(ticket)
            raise
        epoch = LocalEpoch(self._hub, ticket)
        self._epochs.add(epoch)
        return epoch

    def remote(self) -> RemoteChannel:
        """The channel for other processes; from now on they are served, until `close` or the end of this process."""
        if os.getpid() != self._pid:  # forked; the lock may be anybody's
            server = self._server
            if server is None:
                raise InternalError("this process was forked before its parent served the split")
            return server.channel
        with self._starting:
            if self._closed:
                raise PlanError("this streaming_split has been closed", hint="call streaming_split again")
            if self._server is None:
                self._server = Server(self._hub)
                _serving.add(self)
            return self._server.channel

    def at_close(self, call: Callable[[], None]) -> None:
        """Called when the channel is closed, or the process ends."""
        self._at_close.append(call)

    def close(self) -> None:
        self._end(None)

    def at_exit(self) -> None:
        """The process ends. Whoever is in an epoch may finish it, unless we end by an error: others may wait for us then, in
        some collective call, and not for rows.
        """
        if os.getpid() != self._pid or self._closed:
            return
        try:
            for epoch in list(self._epochs):  # loops of this process will not go on
                epoch.leave()
            if self._server is not None and getattr(sys, "last_value", None) is None:
                self._server.linger()
        finally:
            self._end(EXIT_S)

    def _end(self, timeout_s: float | None) -> None:
        """timeout_s: how long to wait for user code."""
        if os.getpid() != self._pid:
            return
        with self._starting:
            self._closed = True
        self._hub.close(timeout_s)
        if self._server is not None:
            self._server.close()
        while self._at_close:
            self._at_close.pop()()
        _serving.discard(self)

    def __reduce__(self) -> tuple[Callable[..., RemoteChannel], tuple[Any, ...]]:
        return self.remote().__reduce__()

    def before_fork(self) -> None:
        if os.getpid() == self._pid and not self._closed:
            with contextlib.suppress(HeadraceError, OSError):  # the child will say that it could not be done, if it needs it
                self.remote()

    def after_fork(self) -> None:
        """In the child: let go of what is the parent's."""
        if self._server is not None:
            self._server.forget()


class LocalEpoch:
    """A consumer's share, of Arrow batches in this process."""

    def __init__(self, hub: Hub, ticket: int) -> None:
        self._hub = hub
        self._ticket = ticket

    def next(self) -> pa.RecordBatch | None:
        piece = self._hub.next(self._ticket)
        return None if piece is None else piece.block.slice(piece.start, piece.rows)

    def leave(self) -> None:
        self._hub.leave(self._ticket)


class _Connection:
    """One consumer in one epoch."""

    def __init__(self, sock: socket.socket, ticket: int) -> None:
        self.sock = sock
        self.ticket = ticket
        self.lost = False
        self.thread: threading.Thread | None = None


class Server:
    """Serves from its construction on. Raises PlanError where there are no Unix sockets."""

    def __init__(self, hub: Hub) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise PlanError("other processes can't be served here: it needs Unix sockets", hint="use threads of this process")
        self._hub = hub
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._listener, address = private.listen()
        self._waker, self._woken = socket.socketpair()
        self._connections: dict[int, _Connection] = {}  # by descriptor; the accepting thread's own, but for `forget`
        self._in_epoch = 0
        self._fewer = threading.Condition()
        self.channel = RemoteChannel(address, self._token.hex(), os.getpid())
        self._thread = threading.Thread(target=self._serve, name="headrace-ingest-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections. The hub has been closed before, so that none of their threads waits for it."""
        if self._waker.fileno() >= 0:
            self._waker.close()
        self._thread.join()

    def linger(self) -> None:
        """Wait until no consumer is in an epoch. One that dies is not."""
        with self._fewer:
            if not self._fewer.wait_for(self._idle, PATIENCE_S):
                text = f"streaming_split: this process ends when {self._in_epoch} consumer(s) have finished their epoch"
                print(f"headrace: {text}", file=sys.stderr, flush=True)
                self._fewer.wait_for(self._idle)

    def _idle(self) -> bool:
        """No consumer is in an epoch, nor about to be told that it has begun."""
        return not self._in_epoch and not any(self._hub.reads(c.ticket) for c in list(self._connections.values()))

    def forget(self) -> None:
        """In a forked child: close the descriptors, which says nothing to anybody."""
        for sock in [self._listener, self._waker, self._woken, *(c.sock for c in self._connections.values())]:
            sock.close()

    def _serve(self) -> None:
        poller = select.poll()
        listener, woken = self._listener.fileno(), self._woken.fileno()
        poller.register(listener, select.POLLIN)
        poller.register(woken, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll()}
                if woken in ready:
                    return
                fresh = self._listener.accept()[0] if listener in ready else None
                if fresh is not None:  # who was gone before this one came is seen now
                    ready |= {fd for fd, _ in poller.poll(0)}
                for fd in ready & self._connections.keys():
                    poller.unregister(fd)
                    self._lose(self._connections.pop(fd))
                if fresh is not None:
                    poller.register(fresh.fileno(), 0)  # 0: hang-ups alone
                    self._begin(fresh)
        finally:
            self._end()

    def _begin(self, sock: socket.socket) -> None:
        connection = _Connection(sock, self._hub.ticket())
        self._connections[sock.fileno()] = connection
        thread = threading.Thread(target=self._talk, args=(connection,), name="headrace-ingest-serve", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no new threads at the end of a process; those that are served go on
            _hang_up(sock)
        else:
            connection.thread = thread

    def _lose(self, connection: _Connection) -> None:
        """Either side has hung up."""
        connection.lost = True
        self._hub.leave(connection.ticket)
        _hang_up(connection.sock)
        if connection.thread is not None:
            connection.thread.join()
        connection.sock.close()

    def _end(self) -> None:
        for connection in self._connections.values():
            self._lose(connection)
        self._connections.clear()
        for sock in (self._listener, self._woken):
            sock.close()
        with contextlib.suppress(OSError):
            os.unlink(self.channel.address)

    def _talk(self, connection: _Connection) -> None:
        """The connection's own thread."""
        sock = connection.sock
        try:
            sock.settimeout(HELLO_S)
            rank = self._greet(sock)
            if rank is None:
                return
            sock.settimeout(None)
            try:
                self._serve_epoch(connection, rank)
            except HeadraceError as error:
                send_frame(sock, ERROR, pack_error(error))
        except OSError:
            pass  # gone
        finally:
            self._hub.leave(connection.ticket)
            _hang_up(sock)

    def _greet(self, sock: socket.socket) -> int | None:
        """The rank that the peer asks for; None for one that does not know the token."""
        hello = bytearray(HELLO.size)
        if not read_into(sock, memoryview(hello)):
            return None
        magic, token, rank = HELLO.unpack(hello)
        return rank if magic == MAGIC and hmac.compare_digest(token, self._token) else None

    def _serve_epoch(self, connection: _Connection, rank: int) -> None:
        sock, ticket = connection.sock, connection.ticket
        self._hub.join(ticket, rank)
        if connection.lost:  # before it had joined: nobody has said so since
            return
        epoch = self._hub.wait_begin(ticket)
        if not epoch:
            return
        with self._fewer:
            self._in_epoch += 1
        try:
            send_frame(sock, BEGUN)
            self._serve_blocks(sock, ticket, epoch)
        finally:
            with self._fewer:
                self._in_epoch -= 1
                self._fewer.notify_all()

    def _serve_blocks(self, sock: socket.socket, ticket: int, epoch: int) -> None:
        encoder = _Encoder()
        while sock.recv(1) == NEXT:
            piece = self._hub.next(ticket)
            if piece is None:
                send_frame(sock, END)
                return
            try:
                send_frame(sock, BLOCK, encoder.encode(piece))
            except OSError:
                self._hub.give_back(epoch, piece)
                raise


class _Encoder:
    """Pieces as bytes, in memory that is used again: its first touch costs more than the copy."""

    def __init__(self) -> None:
        self._buffer: Any = None

    def encode(self, piece: Piece) -> memoryview:
        import pyarrow as pa

        batch = piece.block.slice(piece.start, piece.rows)
        size = encoded_bytes(batch)
        if self._buffer is None or self._buffer.size < size:
            self._buffer = None
            self._buffer = pa.allocate_buffer(size)
        encode_into(self._buffer, batch)
        return memoryview(self._buffer)[:size]


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------- the process's end, and its forks

_channels: weakref.WeakSet[LocalChannel] = weakref.WeakSet()
_serving: set[LocalChannel] = set()  # others depend on these, whatever becomes of the iterators here


def _before_fork() -> None:
    for channel in list(_channels):
        channel.before_fork()


def _after_fork() -> None:
    for channel in list(_channels):
        channel.after_fork()


def _at_exit() -> None:
    if "multiprocessing" in sys.modules and any(channel.serves for channel in _serving):
        import multiprocessing

        for child in multiprocessing.active_children():  # it joins them at exit anyway; they need to be served until then
            if not child.daemon:
                child.join()
    for channel in list(_channels):
        channel.at_exit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
atexit.register(_at_exit)
