"""Where a worker's threads stand, when it hangs, and where they stood, when native code crashed.

Both are written by faulthandler, inside a signal handler in C, into the worker's report: a memfd that driver and worker share.
So they come even when native code never lets go of the interpreter lock, and they outlive the worker.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable

STACK_WAIT_S = 0.5  # a dump takes about a millisecond; a process that a busy machine does not run for so long gets none
STACK_MAX_BYTES = 64 << 10

_LOOK_S = 0.002
_CRASHES = frozenset({"SIGSEGV", "SIGFPE", "SIGABRT", "SIGBUS", "SIGILL"})  # those that faulthandler.enable() catches
_FATAL = b"Fatal Python error: "
_THREAD = re.compile(r"(Current thread|Thread) 0x")
_FRAME = re.compile(r'  File "(.*)", line (?:\d+|\?\?\?) in ')


def create_report(worker: int) -> int:
    """A descriptor of a new, empty report."""
    return os.memfd_create(f"headrace-report-{worker}", os.MFD_CLOEXEC)


def report_to(fd: int) -> None:
    """In a worker: crashes in native code and requests for a stack go to `fd`, which must stay open."""
    import faulthandler

    faulthandler.enable(fd, all_threads=True)
    faulthandler.register(stack_signal(), fd, all_threads=True, chain=False)


def stack_signal() -> int:
    """The signal that asks for a stack: a real-time one, which libraries leave alone."""
    return signal.SIGRTMAX - 2


def take_stack(pid: int, report: int) -> str:
    """The stacks of all threads of a live worker; where none can be taken, why, in words. Waits at most STACK_WAIT_S.

    pid: of a child that has not been waited for, so that the number is still its own.
    """
    number = stack_signal()
    start = os.fstat(report).st_size
    never = _blocking(pid, number)  # threads of libraries that take no signals
    if not _catches(pid, number):  # it has only just started, or user code changed it: the signal would end it
        return ""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return ""
    deadline = time.monotonic() + STACK_WAIT_S
    while os.fstat(report).st_size == start or _blocking(pid, number) - never:
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_S)
    text = _text(os.pread(report, STACK_MAX_BYTES, start))
    return text or f"no stack could be taken: the process is in state {_status(pid).get('State', '?')}"


def crash_stack(code: int, report: int) -> str:
    """What faulthandler wrote when native code crashed. code: the exit code, as subprocess tells it; "" for other endings."""
    with contextlib.suppress(ValueError):
        if code < 0 and signal.Signals(-code).name in _CRASHES:
            return last_crash(report)
    return ""


def last_crash(report: int) -> str:
    """The last crash that faulthandler wrote there; "" for none."""
    data = os.pread(report, STACK_MAX_BYTES, max(0, os.fstat(report).st_size - STACK_MAX_BYTES))
    last = data.rfind(_FATAL)
    return _text(data[last:]) if last >= 0 else ""


def user_stack(text: str) -> str:
    """What people need of such a text: the threads that run the user's code, from there inwards (the innermost frame is first).

    Where none does, the current thread: from the code of an installed package inwards; all of it, where that has none either.
    """
    from headrace.worker.user_code import is_library, is_ours

    parts = text.split("\n\n")
    threads = [part for part in parts if _THREAD.match(part)]
    shown = [inner for part in threads if (inner := _inwards(part, lambda f: not is_ours(f) and not is_library(f)))]
    if not shown:
        current = [part for part in threads if part.startswith("Current")] or threads
        shown = [_inwards(part, lambda f: "-packages/" in f and not is_ours(f)) or part for part in current]
    return "\n\n".join([part for part in parts if not _THREAD.match(part)] + shown)


def _inwards(thread: str, wanted: Callable[[str], bool]) -> str:
    """A thread's lines up to the outermost wanted frame; "" where no frame's file is."""
    lines = thread.splitlines()
    last = max((i for i, line in enumerate(lines) if (frame := _FRAME.match(line)) and wanted(frame[1])), default=0)
    return "\n".join(lines[: last + 1]) if last else ""


def _text(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text.partition("\nExtension modules:")[0].strip()  # a long list of everything that was imported


def _catches(pid: int, number: int) -> bool:
    return _has(_status(pid).get("SigCgt", "0"), number)


def _blocking(pid: int, number: int) -> set[str]:
    """Threads that have the signal blocked, as one has while it runs its handler."""
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
        return {thread for thread in threads if _has(_status(f"{pid}/task/{thread}").get("SigBlk", "0"), number)}
    return set()


def _has(mask: str, number: int) -> bool:
    return bool(int(mask, 16) >> (number - 1) & 1)


def _status(pid: int | str) -> dict[str, str]:
    """/proc/<pid>/status; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/status") as lines:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except (FileNotFoundError, ProcessLookupError):
        return {}
