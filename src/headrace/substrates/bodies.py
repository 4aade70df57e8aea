"""What every substrate needs of its workers: a body's shape, how it is made, a guard around a step, a pause in which answers
gather, the cores.

No substrate imports the real body at its top: it is looked up when a run starts, and tests and plug-ins may pass a
factory of their own. Invariant: whatever a body raises, a step gets exactly one answer.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from headrace.contracts.substrate import BlockStore
from headrace.core.errors import HeadraceError, InternalError, UserCodeError
from headrace.core.process import begin_step, end_step
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Step, StepDone, StepFailed

GATHER_S = 0.002  # a turn of the driver takes a core, or the interpreter lock, from a worker: one for several answers
STEPS_AHEAD = 3  # so many steps of a worker outlast that: only short ones are queued, as many as take 5 ms


class Body(Protocol):
    """What runs a worker's steps, one at a time. A body may have `begin` and `warm` too: see `begins` and `warm`."""

    def run(self, step: Step) -> StepDone | StepFailed: ...

    def discard(self, cursor: int) -> None: ...

    def close(self) -> None: ...


BodyFactory = Callable[[Any, WorkerSpec, BlockStore], Body]


def default_body(program: Any, spec: WorkerSpec, store: BlockStore) -> Body:
    """The body that runs a `worker.program.Program`."""
    from headrace.worker.body import WorkerBody

    return WorkerBody(program, spec, store)


def begins(body: Body, step: Step, ready: Callable[[], None]) -> bool:
    """Start a step that goes on beside others, if the body has such: `run` is then to be called once `ready` was, which may
    happen in any thread, and at once. False: `run` does all of it.
    """
    begin: Callable[[Step, Callable[[], None]], bool] | None = getattr(body, "begin", None)
    return begin is not None and begin(step, ready)


def warm(body: Body, over: Callable[[], bool]) -> None:
    """Construct what steps will need, if the body can, before a step waits for it. over: it is too late for that."""
    warms: Callable[[Callable[[], bool]], None] | None = getattr(body, "warm", None)
    if warms is not None:
        warms(over)


def run_guarded(body: Body, step: Step, *, interruptible: bool = False) -> StepDone | StepFailed:
    """body.run, with anything that escapes it turned into StepFailed.

    interruptible: the step runs in the caller's own thread, where Ctrl-C belongs to the caller. A child that user code forked
    ends if it comes back to here: it must not answer in its parent's place.
    """
    before = begin_step()
    try:
        return body.run(step)
    except KeyboardInterrupt as exc:
        if interruptible:
            raise
        return StepFailed(step.id, step.worker, _as_error(exc))
    except BaseException as exc:
        return StepFailed(step.id, step.worker, _as_error(exc))
    finally:
        end_step(before)


def let_answers_gather(steps: Iterable[int], timeout_s: float | None) -> None:
    """Sleep for GATHER_S, if the caller has that long and no worker runs dry meanwhile. steps: of each worker, those whose
    answers have not been taken up.
    """
    if (timeout_s is None or timeout_s > GATHER_S) and min(steps, default=0) >= STEPS_AHEAD:
        time.sleep(GATHER_S)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_exception(exc: BaseException) -> str:
    """One line that names the exception."""
    return "".join(traceback.format_exception_only(exc)).strip()


def _as_error(exc: BaseException) -> HeadraceError:
    if isinstance(exc, HeadraceError):
        return exc
    frames = "".join(traceback.format_exception(exc))
    if isinstance(exc, Exception):
        return InternalError(
            f"a step failed outside user code: {describe_exception(exc)}",
            frames=frames,
            hint="this is a fault of Headrace; please report it with the frames above",
        )
    return UserCodeError(
        f"the code of this step tried to end its worker: {describe_exception(exc)}",
        frames=frames,
        hint="raise an ordinary exception instead of calling sys.exit() or raising KeyboardInterrupt",
    )
