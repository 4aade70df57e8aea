"""What this process is: a child that user code forked in the middle of a step, or one that nobody at a keyboard speaks to.

A forked child has its parent's cursors, descriptors and store, and whatever it did with them would be done twice: as soon as it
comes back from user code it must end. Whoever runs steps of its own in such a child, as a program may that forks, is no child
of theirs.
"""

from __future__ import annotations

import os
import threading

_step = threading.local()  # pid: of the process that began the step of this thread
_driven = False


def begin_step() -> int | None:
    """Note that this thread begins a step, in this process. What `end_step` is to be given."""
    before: int | None = getattr(_step, "pid", None)
    _step.pid = os.getpid()
    return before


def end_step(before: int | None) -> None:
    """The step is over. A child ends here at the latest."""
    end_if_forked()
    _step.pid = before


def end_if_forked() -> None:
    """End this process if it was forked in the step that this thread is at. Costs 0.1 us."""
    pid = getattr(_step, "pid", None)
    if pid is not None and pid != os.getpid():
        os._exit(1)


def leave_interrupts_to_the_driver() -> None:
    """A KeyboardInterrupt in this process is user code's own from now on."""
    global _driven
    _driven = True


def is_interrupted(exc: BaseException) -> bool:
    """Is it the person at the keyboard who speaks, who is heard in the main thread?"""
    return isinstance(exc, KeyboardInterrupt) and not _driven and threading.current_thread() is threading.main_thread()
