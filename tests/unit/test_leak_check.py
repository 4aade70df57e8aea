"""The leak check that guards every test must itself see a leak. (What is opened here is closed again before it judges.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.conftest import holdings, leaks

linux_only = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


def test_sees_a_process() -> None:
    before = holdings()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert any(f"process {child.pid}" in leak for leak in leaks(before, holdings()))
        child.communicate(b"\n")
    assert leaks(before, holdings()) == []


@pytest.mark.parametrize(
    ("name", "daemon", "leak"), [("headrace-x", True, True), ("other", False, True), ("other", True, False)]
)
def test_sees_threads_that_matter(name: str, daemon: bool, leak: bool) -> None:
    before = holdings()
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name=name, daemon=daemon)
    thread.start()
    assert bool(leaks(before, holdings())) == leak
    over.set()
    thread.join()


@linux_only
def test_sees_descriptors_but_not_connections() -> None:
    before = holdings()
    fd = os.memfd_create("headrace-test")
    assert leaks(before, holdings()) == [f"descriptor {fd} -> /memfd:headrace-test (deleted)"]
    os.close(fd)
    a, b = socket.socketpair()
    assert len(leaks(before, holdings())) == 2
    a.close()
    b.close()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen()
        assert leaks(before, holdings()) == []
