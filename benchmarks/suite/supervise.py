"""Runs one contestant and measures it: `python -m suite.supervise <order file>`; writes what it found where the order says.

It is the reaper of all that the contestant leaves behind: what outlives the contestant is ended, and its CPU time counts. CPU
time is that of a cgroup of its own, where this machine lets one make it, else what the kernel told on reaping. With `every_s`
it looks at the memory of the whole tree meanwhile; that costs a part of the machine, so timed runs are others. Standard library
only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class Found:
    """begun: when the process was started (time.time()). wall_s: until it ended. peak_bytes: highest sum of proportional set
    sizes of the tree; by_name at that moment; shared_bytes: of it, shared memory. left: processes that outlived it. cpu_by: how
    cpu_s was found.
    """

    begun: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    cpu_by: str = ""
    code: int | None = None
    timed_out: bool = False
    peak_bytes: int = 0
    shared_bytes: int = 0
    by_name: dict[str, int] = field(default_factory=dict[str, int])
    left: list[str] = field(default_factory=list[str])


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    Path(order["found"]).write_text(json.dumps(asdict(supervise(order))))


def supervise(order: dict[str, Any]) -> Found:
    """order: argv, env, said (file for its output), cores (a list), timeout_s, every_s (0: don't look), grace_s."""
    found = Found()
    with _cgroup() as group, open(order["said"], "wb") as said:

        def prepare() -> None:
            os.sched_setaffinity(0, order["cores"])
            if group is not None:
                group.join()

        found.begun = time.time()
        start = time.perf_counter()
        child = subprocess.Popen(
            order["argv"], env=order["env"], stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=prepare
        )
        try:
            if order["every_s"]:
                _watch(child, found, start + order["timeout_s"], order["every_s"])
            found.code = child.wait(max(0.1, start + order["timeout_s"] - time.perf_counter()))
        except subprocess.TimeoutExpired:
            found.timed_out = True
        finally:
            found.wall_s = time.perf_counter() - start
            found.left = _end(child, order["grace_s"])
        if group is not None:
            found.cpu_s, found.cpu_by = group.cpu_s(), "cgroup"
        else:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            found.cpu_s, found.cpu_by = used.ru_utime + used.ru_stime, "rusage"
    return found


def _end(child: subprocess.Popen[bytes], grace_s: float) -> list[str]:
    """End all that is left of the tree. Returns their names, but of those that end by themselves within grace_s."""
    until = time.perf_counter() + grace_s
    while _reap() and time.perf_counter() < until and child.returncode is not None:
        time.sleep(0.02)
    left = [_name(pid) for pid in descendants()]
    for how in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        until = time.perf_counter() + grace_s
        while _reap() and time.perf_counter() < until:
            time.sleep(0.02)
    return sorted(left)


def _reap() -> bool:
    """Take what has ended. False when there is no child."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _watch(child: subprocess.Popen[bytes], found: Found, until: float, every_s: float) -> None:
    while child.poll() is None and time.perf_counter() < until:
        total, shared, names = 0, 0, dict[str, int]()
        for pid in descendants():
            anonymous_and_files, mine = _proportional(pid)
            total += anonymous_and_files + mine
            shared += mine
            name = _name(pid)
            names[name] = names.get(name, 0) + anonymous_and_files + mine
        if total > found.peak_bytes:
            found.peak_bytes, found.shared_bytes, found.by_name = total, shared, names
        time.sleep(every_s)


def descendants() -> list[int]:
    """Of this process, by the parents that /proc tells."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path(entry.path, "stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = list[int](), [os.getpid()]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "?"


def _proportional(pid: int) -> tuple[int, int]:
    """(anonymous and file-backed, shared memory), in bytes; pages that several share are divided among them."""
    sizes = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) << 10
    return sizes["Pss_Anon"] + sizes["Pss_File"], sizes["Pss_Shmem"]


@dataclass(frozen=True)
class _Group:
    folder: Path

    def join(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def cpu_s(self) -> float:
        v1 = self.folder / "cpuacct.usage"
        if v1.exists():
            return int(v1.read_text()) / 1e9
        stat = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(stat["usage_usec"]) / 1e6


@contextlib.contextmanager
def _cgroup() -> Iterator[_Group | None]:
    """A group for the contestant alone; None where this machine doesn't let us."""
    folder = (CGROUPS / "cpuacct" if (CGROUPS / "cpuacct").is_dir() else _own_v2()) / f"suite-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        yield _Group(folder)
    finally:
        for _ in range(50):  # busy until the kernel has buried the last process
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.02)


def _own_v2() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return CGROUPS / line[3:].strip().lstrip("/")
    return CGROUPS


if __name__ == "__main__":
    main()
