"""The control channel between driver and worker: length-prefixed pickles over a Unix socket, descriptors beside them.

Messages are small tuples (kind, ...); block bytes never travel here. Both ends are the same user's processes on one
machine and of one version, so pickle is safe and there is no version to negotiate.

Driver to worker:  (HELLO, spec, driver_pid, cwd, sys_path, payload) first, with the worker's own arena and crumb, then
                   (ARENAS, ids) with a descriptor each, (GONE, ids), (STEP, freed, step), (DISCARD, freed, cursor),
                   (FREE, freed), (STOP,).
    payload: cloudpickle of (program, body factory or None). freed: offsets in the worker's own arena, free again.
    GONE: nothing will be read from these arenas again.
Worker to driver:  (UP,), (ANSWER, event, views), (VIEWS, views), (BROKEN, text).
    views: (part id, n) pairs: the last view of the part is gone, and with it n of the times it was sent here.
"""

from __future__ import annotations

import array
import pickle
import socket
import struct
from collections import deque
from typing import Any

HELLO, ARENAS, GONE, STEP, DISCARD, FREE, STOP, UP, ANSWER, VIEWS, BROKEN = range(11)

MAX_FDS = 253  # SCM_MAX_FD of Linux: descriptors that one message may carry

_HEADER = struct.Struct("<I")
_RECV_BYTES = 256 << 10


def frame(message: tuple[Any, ...]) -> bytes:
    """The message as bytes for the socket."""
    body = pickle.dumps(message, protocol=5)
    return _HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts received bytes into messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Messages that `data` completes, in order."""
        messages: list[Any] = []
        pending = self._pending
        if not pending and len(data) >= 4 and _HEADER.unpack_from(data)[0] == len(data) - 4:
            return [pickle.loads(memoryview(data)[4:])]  # the usual case: exactly one message
        pending += data
        start = 0
        while len(pending) - start >= 4:
            end = start + 4 + _HEADER.unpack_from(pending, start)[0]
            if len(pending) < end:
                break
            messages.append(pickle.loads(bytes(pending[start + 4 : end])))
            start = end
        del pending[:start]
        return messages


class Outgoing:
    """The sending half of a non-blocking socket: what the kernel does not take now waits here, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._queue: deque[tuple[memoryview, tuple[int, ...]]] = deque()

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Send or queue. False when something is left for `flush`. Raises OSError when the peer is gone.

        fds: at most 253; they must stay open until they are sent.
        """
        if len(fds) > MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors in one message, at most {MAX_FDS} are possible")
        if not self._queue and not fds:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return True
            self._queue.append((memoryview(data)[sent:], ()))
            return False
        self._queue.append((memoryview(data), fds))
        return self.flush()

    def flush(self) -> bool:
        """Send what waits. True when nothing is left."""
        while self._queue:
            data, fds = self._queue[0]
            try:
                sent = socket.send_fds(self._sock, [data], list(fds)) if fds else self._sock.send(data)
            except BlockingIOError:
                return False
            self._queue.popleft()
            if sent < len(data):  # the descriptors went with the first byte
                self._queue.appendleft((data[sent:], ()))
        return True


def receive(sock: socket.socket, fds: deque[int], *, block: bool) -> bytes:
    """Bytes from the socket; descriptors that came with them are appended to `fds`. b"" when the peer has closed.

    Raises BlockingIOError when block is false and nothing is there. New descriptors are not inherited by the
    processes that user code starts.
    """
    flags = socket.MSG_CMSG_CLOEXEC | (0 if block else socket.MSG_DONTWAIT)
    data, ancillary, _, _ = sock.recvmsg(_RECV_BYTES, socket.CMSG_LEN(MAX_FDS * 4), flags)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            fds.extend(received)
    return data
