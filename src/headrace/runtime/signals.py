"""What SIGTERM and Ctrl-C do to a run that an action drives in the main thread.

The first signal drains: open splits are finished within a grace period, what is settled is made durable, and the action ends
with SystemExit(143) or KeyboardInterrupt. A second one stops at once, and so does the first for a run that can't be resumed.
Either way the driver ends in its ordinary way: no worker, no memory and no half file is left.

A handler only posts to the driver's loop, which wakes it. It raises by itself only where the main thread may be inside code
that knows of no loop: user code of the inline engine (to which the grace period can't be held either), and waiting for storage.

Signals that the program ignores stay ignored. In other threads nothing is changed: only the main one may handle signals.
Processes that user code forks meanwhile handle signals as the program did before: whoever ends one waits for it to go.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from typing import Any, Protocol

GRACE_S = 20.0  # Kubernetes, Slurm and spot instances give 30 s from SIGTERM to SIGKILL
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(Exception):
    """The run was stopped from outside. Its text says why; splits that were settled until then stay settled."""


class Stoppable(Protocol):
    """A driver, as signals see it. All of it may be used inside a signal handler.

    interruptible: the main thread is where no loop hears of a stop, and an exception does no harm. over: the loop has ended.
    """

    interruptible: bool
    over: bool

    def drain(self, why: str, note: str, grace_s: float) -> None: ...

    def stop(self, why: str = "stopped") -> None: ...

    def progress(self) -> str:
        """ "N of M splits are committed" """
        ...


@contextlib.contextmanager
def handling_signals(driver: Stoppable, *, resumable: bool = True) -> Generator[None]:
    """Inside, signals do to the driver what the module says. The handlers that were there come back, whatever happens.

    Raises, at the end and if a signal came: SystemExit(143) for SIGTERM, KeyboardInterrupt for Ctrl-C; also when the run could
    still be finished. An error of the run itself goes first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = _Handler(driver, resumable)
    before = {s: signal.getsignal(s) for s in _NAMES}
    try:
        with _handled({s: handler for s, h in before.items() if h is not None and h is not signal.SIG_IGN}):
            yield
    except (Stopped, KeyboardInterrupt):
        if not handler.signals:
            raise
        _say(handler.farewell(finished=False))
        raise handler.exception() from None
    if handler.signals:
        _say(handler.farewell(finished=True))
        raise handler.exception()


@contextlib.contextmanager
def ending_at_once() -> Generator[None]:
    """Around an action whose driver is not there yet: SIGTERM ends it where it stands, by SystemExit(143).

    On the way there it is a KeyboardInterrupt: user code that is being tried lets that pass, and whoever tries it, too.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not main or not (before is signal.SIG_DFL or getattr(before, "__module__", "").startswith("ray.")):  # Ray's just exits
        yield
        return

    ended: list[int] = []

    def end(signum: int, frame: object) -> None:
        ended.append(signum)
        _say("stopped by SIGTERM while no split was open; resumable: run the same command again")
        raise KeyboardInterrupt

    try:
        with _handled({signal.SIGTERM: end}):
            yield
    except KeyboardInterrupt:
        if not ended:
            raise
        raise SystemExit(128 + ended[0]) from None


_before: dict[int, Any] = {}  # of signals that we handle now: what did so before any run began
_masks = threading.local()


@contextlib.contextmanager
def _handled(handlers: Mapping[int, Any]) -> Generator[None]:
    """Inside, these handle the signals, in this process but in none that is forked."""
    global _before
    _watch_forks()
    replaced = {s: signal.getsignal(s) for s in handlers}
    outer, _before = _before, {**replaced, **_before}
    try:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        yield
    finally:
        for s, handler in replaced.items():
            signal.signal(s, handler)
        _before = outer


@functools.cache
def _watch_forks() -> None:
    """What comes while a process is being forked waits until its handlers are right: a handler that is taken back first would
    take the signal with it.
    """
    if not hasattr(os, "register_at_fork"):
        return

    def before() -> None:
        _masks.held = signal.pthread_sigmask(signal.SIG_BLOCK, _before) if _before else None

    def after() -> None:
        if _masks.held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, _masks.held)

    def in_child() -> None:
        global _before
        for s, handler in _before.items():
            signal.signal(s, handler)
        _before = {}
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=in_child)


class _Handler:
    def __init__(self, driver: Stoppable, resumable: bool) -> None:
        self._driver = driver
        self._resumable = resumable
        self.signals: list[int] = []

    def __call__(self, signum: int, frame: object) -> None:
        del frame
        self.signals.append(signum)
        driver, name = self._driver, _NAMES[signum]
        if len(self.signals) == 1 and self._resumable:
            if not driver.over:
                again = "Ctrl-C again" if signum == signal.SIGINT else "a second signal"
                note = f"{name}: finishing what is open, for {GRACE_S:.0f} s at most; {again} stops at once"
                driver.drain(f"stopped by {name}", note, GRACE_S)
        elif driver.interruptible:
            raise KeyboardInterrupt  # for both: only this passes through user code unharmed
        else:
            driver.stop(f"stopped by {name}")

    def exception(self) -> BaseException:
        if signal.SIGTERM in self.signals:
            return SystemExit(128 + signal.SIGTERM)
        return KeyboardInterrupt()

    def farewell(self, *, finished: bool) -> str:
        name = _NAMES[self.signals[0]]
        if finished:
            return f"{name} came when the run was all but over: it is finished"
        if not self._resumable:
            return f"stopped by {name}"
        return f"stopped by {name}; {self._driver.progress()}; resumable: run the same command again"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr, or a closed one
        print(f"headrace: {text}", file=sys.stderr, flush=True)
