"""A worker as an actor. Steps come as calls, and each call's result is their answers.

Ordinary workers have one thread, the actor's main one, which runs step after step. Where there are streaming models, whose
steps overlap, calls come in many threads and one more runs the body: a body is used by one thread at a time.

An actor dies with its driver: Ray ends what a job leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from msgspec import Struct

from headrace.contracts.substrate import Crumb
from headrace.core.errors import HeadraceError
from headrace.core.frames import with_room
from headrace.core.paths import working_directory
from headrace.core.process import leave_interrupts_to_the_driver
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Step, StepDone, StepFailed
from headrace.runtime.governor import MachineRooms
from headrace.substrates.blocks import anonymous_bytes
from headrace.substrates.bodies import Body, begins, run_guarded
from headrace.substrates.malloc import keep_large_allocations
from headrace.substrates.ray.parcel import receive
from headrace.substrates.ray.placement import node_name
from headrace.substrates.ray.remains import Remains, clear_away, open_remains
from headrace.substrates.ray.store import RayStore

LOOK_S = 0.5  # between two looks at the memory


class Surroundings(Struct, frozen=True):
    """What an actor takes over from the driver where it is there, too. sys_path: added behind what the actor has.
    must_see: a file that every node must see; "" for none.
    """

    cwd: str
    sys_path: tuple[str, ...]
    version: str
    must_see: str = ""

    @staticmethod
    def here(must_see: str = "") -> Surroundings:
        """Those of this process."""
        import headrace

        cwd = working_directory()
        paths = (*(os.path.normpath(os.path.join(cwd, p)) for p in sys.path if p and (cwd or os.path.isabs(p))), cwd)
        return Surroundings(cwd, paths, headrace.__version__, must_see)


class Presence(Struct, frozen=True):
    """What an actor says of itself when it is up. node_id: Ray's. sees: the file that it must see."""

    node: str
    node_id: str
    remains: Remains
    sees: bool


class Vitals(Struct, frozen=True):
    """own_bytes: anonymous memory of the worker. share: of its node's memory, what is in use."""

    own_bytes: int
    share: float


Answers = tuple[tuple[StepDone | StepFailed, ...], Vitals | None]


class _VitalSigns:
    """Call it as often as you like: it looks now and then, and gives None in between."""

    def __init__(self) -> None:
        self._rooms = MachineRooms()
        self._due_s = 0.0

    def __call__(self) -> Vitals | None:
        now = time.monotonic()
        if now < self._due_s:
            return None
        self._due_s = now + LOOK_S
        own_bytes = anonymous_bytes()
        return Vitals(own_bytes, max(room.share for room in self._rooms(own_bytes)))


def _end_on_sigterm() -> None:
    """Ray's handler raises SystemExit in whatever runs, as if the row at work had done it. The process ends instead, and what
    it was at is done again.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class RayWorker:
    """One worker. payload: [parcel of (program, body factory)], opened when its modules can be found."""

    def __init__(self, spec: WorkerSpec, payload: list[Any], around: Surroundings) -> None:
        _end_on_sigterm()
        leave_interrupts_to_the_driver()
        context = ray.get_runtime_context()
        self._node = node_name(ray.util.get_node_ip_address(), context.get_node_id())
        self._actor = context.get_actor_id() or ""
        keep_large_allocations()
        settle_in(around)
        self._remains, crumb = _leave_remains(spec.id)
        self._sees = not around.must_see or os.path.exists(around.must_see)
        self._vitals = _VitalSigns()
        self._store = RayStore(spec.id, self._node, crumb)
        program, factory = receive(payload[0])
        if factory is None:
            from headrace.substrates.bodies import default_body

            factory = default_body
        self._body: Body = factory(program, spec, self._store)
        self._inbox: queue.SimpleQueue[Any] | None = None

    def up(self) -> Presence:
        return Presence(self._node, ray.get_runtime_context().get_node_id(), self._remains, self._sees)

    def run(self, steps: Sequence[Step], parts: Sequence[int], *batches: Any) -> Answers:
        """Run steps in order. parts, batches: blocks that Ray has brought from other nodes meanwhile."""
        for part, batch in zip(parts, batches, strict=True):
            self._store.offer(part, batch)
        try:
            return tuple(self._run(step) for step in steps), self._vitals()
        finally:
            self._store.forget()

    def discard(self, cursor: int) -> None:
        self._body.discard(cursor)

    def close(self) -> None:
        """Close cursors, functions and models."""
        self._body.close()
        clear_away(self._remains)

    def _run(self, step: Step) -> StepDone | StepFailed:
        return self._placed(with_room(run_guarded, self._body, step))

    def _placed(self, answer: StepDone | StepFailed) -> StepDone | StepFailed:
        if isinstance(answer, StepFailed):
            self._point_out(answer.error)
        return answer

    def _point_out(self, error: HeadraceError) -> None:
        error.at(("node", self._node), ("actor", self._actor))


class StreamingRayWorker(RayWorker):
    """A worker whose steps may overlap: made with max_concurrency."""

    def __init__(self, spec: WorkerSpec, payload: list[Any], around: Surroundings) -> None:
        super().__init__(spec, payload, around)
        self._inbox = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="headrace-body", daemon=True).start()

    def run(self, steps: Sequence[Step], parts: Sequence[int], *batches: Any) -> Answers:
        return tuple(self._ask(("run", step, parts, batches)) for step in steps), self._vitals()

    def discard(self, cursor: int) -> None:
        self._ask(("discard", cursor))

    def close(self) -> None:
        self._ask(("close",))
        clear_away(self._remains)

    def _ask(self, message: tuple[Any, ...]) -> Any:
        assert self._inbox is not None
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._inbox.put((message, answer))
        return answer.get()

    def _serve(self) -> None:
        inbox = self._inbox
        assert inbox is not None
        while True:
            message, answer = inbox.get()
            if message[0] == "run":
                _, step, parts, batches = message
                for part, batch in zip(parts, batches, strict=True):
                    self._store.offer(part, batch)
                ready = (("ready", step), answer)
                if begins(self._body, step, lambda ready=ready: inbox.put(ready)):
                    self._store.forget()
                else:
                    answer.put(self._run(step))
                    self._store.forget()
            elif message[0] == "ready":
                answer.put(self._run(message[1]))
                self._store.forget()
            elif message[0] == "discard":
                answer.put(self._body.discard(message[1]))
            else:
                answer.put(self._body.close())
            del message, answer  # they must not keep inputs alive while the worker is idle


def settle_in(around: Surroundings) -> None:
    """Find the user's modules and relative paths as the driver does, on nodes that have them. Raises RuntimeError when this
    node has another version of Headrace.
    """
    known = set(sys.path)
    sys.path.extend(p for p in around.sys_path if p not in known and os.path.exists(p))
    if not ray.get_runtime_context().runtime_env.get("working_dir"):
        with contextlib.suppress(OSError):
            os.chdir(around.cwd)
    import headrace

    if headrace.__version__ != around.version:
        raise RuntimeError(f"this node has headrace {headrace.__version__}, and the driver has {around.version}")


def _leave_remains(worker: int) -> tuple[Remains, Crumb | None]:
    """Files of this worker that tell its node what it was at when it died."""
    if sys.platform != "linux":
        return Remains(), None
    from headrace.substrates.processes import stacks
    from headrace.substrates.processes.crumb import CrumbWriter

    remains, crumb, report = open_remains(worker)
    stacks.report_to(report)
    return remains, CrumbWriter(crumb)
