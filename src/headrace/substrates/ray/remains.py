"""What a worker leaves behind on its node: a breadcrumb and a crash report, in files that outlive it.

After a death they are read by a task that Ray runs on that node: no process waits for deaths. Files of workers that nobody
asked after, because the driver died as well, are swept away by the next worker on the node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from msgspec import Struct

from headrace.core.steps import Doing
from headrace.runtime.ingest import private

_PREFIX = "headrace-remains"
OLD_S = 3600.0


class Remains(Struct, frozen=True):
    """Where on its node a worker keeps them. pid: its own. "" and 0 where there can be none."""

    pid: int = 0
    crumb: str = ""
    report: str = ""


class Obituary(Struct, frozen=True):
    """doing: the breadcrumb of a dead worker. crash: what faulthandler wrote of a fault in native code, or ""."""

    doing: Doing | None
    crash: str


def open_remains(worker: int) -> tuple[Remains, int, int]:
    """In a worker: (where they are, descriptor of the crumb, of the report). Sweeps away those of processes that are gone."""
    folder = Path(private.folder())
    for old in folder.glob(f"{_PREFIX}-*"):
        with contextlib.suppress(OSError, ValueError):
            gone = not os.path.exists(f"/proc/{int(old.name.split('-')[2])}")
            if gone and time.time() - old.stat().st_mtime > OLD_S:  # it may be of another container that shares the folder
                old.unlink()
    stem = f"{folder}/{_PREFIX}-{os.getpid()}-{worker}-{secrets.token_hex(4)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    crumb = os.open(f"{stem}-crumb", flags, 0o600)
    os.posix_fallocate(crumb, 0, os.sysconf("SC_PAGESIZE"))  # a full disk shows here, not as a fault at a write to memory
    report = os.open(f"{stem}-report", flags, 0o600)
    return Remains(os.getpid(), f"{stem}-crumb", f"{stem}-report"), crumb, report


def clear_away(remains: Remains) -> None:
    for path in (remains.crumb, remains.report):
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)


def bury(remains: Remains) -> Obituary:
    """On the node of a dead worker: what it left. Nothing is left after that."""
    from headrace.substrates.processes.crumb import read_crumb
    from headrace.substrates.processes.stacks import last_crash, user_stack

    doing, crash = None, ""
    with contextlib.suppress(OSError), open(remains.crumb, "rb") as file:
        doing = read_crumb(file.fileno())
    with contextlib.suppress(OSError), open(remains.report, "rb") as file:
        crash = last_crash(file.fileno())
    clear_away(remains)
    return Obituary(doing, user_stack(crash) if crash else "")


def stack(remains: Remains) -> str:
    """On the node of a live worker: the stacks of its threads; "" when they can't be had."""
    from headrace.substrates.processes.stacks import take_stack, user_stack

    try:
        with open(remains.report, "rb") as file:
            return user_stack(take_stack(remains.pid, file.fileno()))
    except OSError:
        return ""
