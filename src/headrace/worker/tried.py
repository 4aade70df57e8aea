"""What trying the user's functions before a run leaves behind: a thread, and what they constructed in it.

Loading a model may take a minute, so a worker of the run goes on where the trial ended. Objects may belong to the thread that
made them (SQLite connections, event loops): a worker takes both or neither. What must not live here: the trial.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from headrace.core.frames import with_room
from headrace.core.process import begin_step, end_step
from headrace.worker.loads import Loads
from headrace.worker.user_code import Functions, abandon_construction

T = TypeVar("T")
WAKE_S = 0.5


class _Thread(threading.Thread):
    """Does one call after the other, until None."""

    def __init__(self) -> None:
        super().__init__(name="headrace-trial", daemon=True)
        self.calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()

    def run(self) -> None:
        with_room(self._run)

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            before = begin_step()
            call()
            end_step(before)
            del call


def _answer(answers: queue.SimpleQueue[T]) -> T:
    """The first one. Wakes now and then: a signal that comes just before the waiting begins does not end it."""
    while True:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=WAKE_S)


class Tried:
    """Of one action, in the process that chose its engine; workers elsewhere have an empty one. All but `take` and `loads`
    belongs to the action's thread.
    """

    def __init__(self, loads: Loads | None = None) -> None:
        self.loads = loads or Loads()
        self._thread: _Thread | None = None
        self._worker: threading.Thread | None = None
        self._functions: Functions | None = None
        self._undo: Callable[[], None] | None = None
        self.left = False  # a call was left behind by an interrupt: the thread is of no more use

    def __reduce__(self) -> tuple[type[Tried], tuple[()]]:
        return Tried, ()

    def begin(self, undo: Callable[[], None]) -> None:
        """Before calls. undo: closes what they construct, unless it is kept."""
        self._undo = undo

    def call(self, function: Callable[[], T]) -> T:
        """The function's answer, or what it raises, from the thread. An interrupt does not end the call, but leaves it."""
        if self._thread is None:
            self._thread = _Thread()
            self._thread.start()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((function(), None))
            except BaseException as exc:
                answers.put((None, exc))

        self.left = True  # whenever an interrupt comes
        try:
            self._thread.calls.put(answer)
            made, error = _answer(answers)
        except BaseException:
            abandon_construction()
            raise
        self.left = False
        if error is None:
            return made
        try:
            raise error
        finally:
            del error

    def keep(self, functions: Functions) -> None:
        """What was constructed in calls, and may go on."""
        self._functions, self._undo = functions, None

    def go_on(self, run: Callable[[], None], name: str) -> threading.Thread | None:
        """Let a worker run in the thread, which is the worker's from now on, and ends with it. None: there is no thread."""
        if self._thread is None or self.left:
            return None
        thread, self._thread = self._thread, None
        self._worker = thread
        thread.name = name
        thread.calls.put(run)
        thread.calls.put(None)
        return thread

    def take(self) -> Functions | None:
        """What was constructed, once, for the worker that went on in this very thread."""
        if self._worker is not threading.current_thread():
            return None
        functions, self._functions = self._functions, None
        return functions

    def close(self) -> None:
        """End the thread, and close what was constructed, unless a worker has them. Idempotent."""
        thread, self._thread = self._thread, None
        functions = None
        if thread is not None or (self._worker is not None and not self._worker.is_alive()):
            functions, self._functions = self._functions, None
        if thread is None:
            if functions is not None:  # the worker ended before it took them
                functions.close()
            return
        undo = self._undo if functions is None else partial(functions.keep, ())
        if undo is not None:
            thread.calls.put(undo)
        thread.calls.put(None)
        if not self.left:
            thread.join()
