"""Leak checks after every test: no process, thread, descriptor or shared memory may outlive it.

The check compares what is there before and after a test. A difference is judged again after a garbage collection and a
short grace (a collection costs 0.1 s once large libraries are loaded, so it runs only on suspicion). A test that
failed is not judged: its traceback keeps its objects alive. Fixtures of module or session scope are set up before
this one, so what they hold is part of "before".

Allowed: what libraries open once and keep for the life of the interpreter, named one by one in `_lasting`.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

_FAILED = pytest.StashKey[bool]()
_GRACE_S = 2.0  # how long a suspected leak may take to go: a thread past its last line, a child being reaped
_RETRY_S = 0.01
_OWN_THREADS = "headrace"
_OWN_MEMORY = b"/memfd:headrace"


@dataclass(frozen=True)
class Holdings:
    """What the process holds. descriptors: number -> what it points to. Each is empty where the platform can't tell."""

    children: frozenset[int]
    threads: frozenset[threading.Thread]
    descriptors: dict[int, str] = field(default_factory=dict)
    mappings: int = 0
    shared: frozenset[str] = frozenset()


def holdings() -> Holdings:
    return Holdings(_children(), frozenset(threading.enumerate()), _descriptors(), _mappings(), _shared())


def leaks(before: Holdings, after: Holdings) -> list[str]:
    """What `after` holds that it should not, in words."""
    found = [f"process {pid} ({_command(pid)})" for pid in sorted(after.children - before.children) if not _kept(pid)]
    for thread in after.threads - before.threads:
        if thread.is_alive() and (not thread.daemon or thread.name.startswith(_OWN_THREADS)):
            found.append(f"thread {thread.name!r}")
    fresh = {fd: to for fd, to in after.descriptors.items() if before.descriptors.get(fd) != to}
    fresh = {fd: to for fd, to in fresh.items() if not _lasting(fd, to)}
    found += [f"descriptor {fd} -> {to}" for fd, to in sorted(fresh.items())]
    if after.mappings > before.mappings:
        found.append(f"{after.mappings - before.mappings} mapping(s) of block memory")
    found += [f"/dev/shm/{name}" for name in sorted(after.shared - before.shared)]
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


def pytest_configure() -> None:
    """A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: tests send it. Ray starts
    workers at niceness 15: beside other tests, which are at 0, an actor took minutes to start.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "all of the feature suite on Ray, too (a run takes seconds), and its autoscaler"
    parser.addoption("--ray", action="store_true", help=what)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks at groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the feature suite only tests marked `on_ray` run on Ray, unless --ray is given. Where tests run in several processes,
    all that need the cluster run in one, and so do those of an adapter, whose library takes seconds to import.
    """
    for item in items:
        if item.path.parent.match("integration/models"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        params = getattr(item, "callspec", None)
        if "ray_cluster" in getattr(item, "fixturenames", ()) or (params is not None and params.params.get("engine") == "ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    if config.getoption("--ray"):
        return
    left: list[pytest.Item] = []
    for item in items:
        params = getattr(item, "callspec", None)
        on_ray = params is not None and params.params.get("engine") == "ray"
        if on_ray and item.get_closest_marker("on_ray") is None:
            left.append(item)
    if left:
        gone = set(left)
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def ray_cluster() -> Generator[None]:
    """Two nodes of one CPU each, the second with two simulated devices, and a connection to them."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store = 100 << 20
    cluster = Cluster(
        True,
        head_node_args={"num_cpus": 1, "include_log_monitor": False, "object_store_memory": store, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=1, resources={"sim": 2}, object_store_memory=store)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", namespace="headrace")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(request: pytest.FixtureRequest) -> Generator[None]:
    before = holdings()
    yield
    if request.node.stash.get(_FAILED, False):
        return
    if _connected_to_ray():
        if found := _ray_leaks(before):
            pytest.fail("outlived the test: " + "; ".join(found), pytrace=False)
        return
    found = leaks(before, holdings())
    if found:
        found = _judge_again(before)
    if found:
        pytest.fail("outlived the test: " + "; ".join(found), pytrace=False)


def _connected_to_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _ray_leaks(before: Holdings) -> list[str]:
    """Actors and threads. Ray's own processes and descriptors come and go as it likes."""
    from ray._private.state import state

    deadline = time.monotonic() + _GRACE_S
    while True:
        actors = [a for a in state.actor_table(None, None, None).values() if a["State"] not in ("DEAD",)]
        threads = [t for t in threading.enumerate() if t not in before.threads and t.name.startswith(_OWN_THREADS)]
        found = [f"actor {a['ActorClassName']}" for a in actors] + [f"thread {t.name!r}" for t in threads]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_RETRY_S)


def _judge_again(before: Holdings) -> list[str]:
    deadline = time.monotonic() + _GRACE_S
    gc.collect()
    while found := leaks(before, holdings()):
        if time.monotonic() > deadline:
            return found
        time.sleep(_RETRY_S)
        gc.collect()
    return []


def _children() -> frozenset[int]:
    """Direct children, zombies included. (psutil walks all of the machine's processes; the kernel's own list is quick.)"""
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:
        import psutil

        return frozenset(child.pid for child in psutil.Process().children())
    pids: set[int] = set()
    for task in tasks:
        try:
            with open(f"/proc/self/task/{task}/children") as listing:
                pids.update(int(pid) for pid in listing.read().split())
        except OSError:
            continue  # the thread is gone
    return frozenset(pids)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return line.read().replace(b"\0", b" ").decode(errors="replace").strip() or "ended, never waited for"
    except OSError:
        return "?"


def _kept(pid: int) -> bool:
    """The standard library's resource tracker stays until the interpreter ends, by design."""
    return "resource_tracker" in _command(pid)


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the listing's own descriptor
    return found


@pytest.fixture(scope="session", autouse=True)
def _opened_once() -> None:
    """What libraries open at their first use and keep for the life of the process is open before anything is counted: a pipe
    for Ctrl-C of pyarrow's CSV reader, two epolls and an eventfd of obstore's runtime.
    """
    import obstore
    import pyarrow as pa
    import pyarrow.csv
    from obstore.store import MemoryStore

    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))
    obstore.put(MemoryStore(), "first", b"")


def _lasting(fd: int, to: str) -> bool:
    """Opened by a library once and kept on purpose."""
    if to in ("/dev/urandom", "/dev/random"):
        return True
    if to.startswith("socket:["):
        # Kept-alive connections to an object store, or a test server's end of them. Headrace itself opens none.
        return to[len("socket:[") : -1] in _internet_sockets()
    if to.startswith("pipe:[") and "multiprocessing.resource_tracker" in sys.modules:
        tracker = sys.modules["multiprocessing.resource_tracker"]
        return fd == getattr(getattr(tracker, "_resource_tracker", None), "_fd", None)
    return False


def _internet_sockets() -> set[str]:
    """Inode numbers of this network namespace's TCP sockets."""
    inodes: set[str] = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            with open(table) as lines:
                next(lines, None)
                inodes.update(line.split()[9] for line in lines)
        except OSError:
            continue
    return inodes


def _mappings() -> int:
    """Mappings of headrace's block memory. Reading the table costs 3 ms once torch is loaded: only when there can be one."""
    if "headrace.substrates.processes" not in sys.modules:
        return 0
    try:
        with open("/proc/self/maps", "rb") as table:
            return table.read().count(_OWN_MEMORY)
    except OSError:
        return 0


def _shared() -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir("/dev/shm") if "headrace" in name)
    except OSError:
        return frozenset()
