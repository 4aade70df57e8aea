"""Framing, back-pressure and descriptors on the control channel."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque

import pytest

from headrace.substrates.processes import wire

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="passed descriptors are received the Linux way")


def test_messages_survive_any_cut() -> None:
    messages = [(wire.FREE, tuple(range(n))) for n in (0, 1, 50, 3)]
    stream = b"".join(wire.frame(m) for m in messages)
    for step in (1, 2, 3, 7, 64, len(stream)):
        reader = wire.FrameReader()
        got = [m for i in range(0, len(stream), step) for m in reader.feed(stream[i : i + step])]
        assert got == messages


def test_a_full_socket_queues_in_order_and_passes_descriptors() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    out = wire.Outgoing(ours)
    read_end, write_end = os.pipe()
    big = (wire.STEP, (), "x" * 1_000_000)
    assert not out.send(wire.frame(big)), "a megabyte fits no socket buffer"
    assert not out.send(wire.frame((wire.ARENAS, [5])), (write_end,))
    assert not out.send(wire.frame((wire.STOP,)))
    reader, fds, got = wire.FrameReader(), deque[int](), []
    while len(got) < 3:
        out.flush()
        got += reader.feed(wire.receive(theirs, fds, block=True))
    assert got == [big, (wire.ARENAS, [5]), (wire.STOP,)]
    assert len(fds) == 1
    passed = fds.popleft()
    assert not os.get_inheritable(passed)
    os.write(passed, b"same pipe")
    assert os.read(read_end, 100) == b"same pipe"
    with pytest.raises(BlockingIOError):
        wire.receive(theirs, fds, block=False)
    ours.close()
    assert wire.receive(theirs, fds, block=True) == b""
    theirs.close()
    for fd in (passed, read_end, write_end):
        os.close(fd)


def test_too_many_descriptors_are_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="at most 253"):
        wire.Outgoing(ours).send(b"x", tuple(range(254)))
