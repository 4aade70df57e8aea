"""The driver's side of the Ray substrate: starts actors, carries steps as calls, keeps account of blocks it never sees.

A call's end comes from a thread of Ray's into a queue, on which `wait` blocks. Block bytes stay in the nodes' object stores:
what passes through here are references, except for what `fetch` copies for the consumer (`fetched_bytes`).

Invariants: each worker that `start` or `add_worker` was given ends in one WorkerLost, or with `stop`; parts that a lost worker
made are told as lost; `stop` leaves no actor.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from msgspec import Struct, field
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.core.errors import BlockLost, HeadraceError, InternalError, PlanError, TransientError
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.stages import Stage
from headrace.core.steps import (
    Apply,
    Discard,
    PartsFreed,
    PartsLost,
    RoomOffered,
    Step,
    StepDone,
    StepFailed,
    SubstrateEvent,
    WorkerLost,
    WorkerResting,
    WorkerUp,
)
from headrace.substrates.blocks import anonymous_bytes, own_copy, zip_parts
from headrace.substrates.ray.actor import Presence, RayWorker, StreamingRayWorker, Surroundings, Vitals
from headrace.substrates.ray.cluster import Changed, Demand, Errands, Watch, actors_of, live_nodes, through_client
from headrace.substrates.ray.ingest import deliver
from headrace.substrates.ray.parcel import send
from headrace.substrates.ray.placement import Node, Shape, budget_bytes, place
from headrace.substrates.ray.remains import Obituary, Remains, bury, stack
from headrace.substrates.ray.standing import Standing, Waits, helped_out, standing, waits_for
from headrace.substrates.ray.store import NO_ROOM, block_lost, fetch, no_room

if TYPE_CHECKING:
    from headrace.substrates.bodies import BodyFactory

SHORT_STEP_S = 0.005  # steps of a worker whose last one was that short share a call
RISE, FALL = 0.90, 0.85  # share of a node's memory: above the first no new work there, until it is below the second
MANY_CALLS = 128  # of a worker with streaming models that may be under way
BURY_S = 30.0  # a node that has not told by then what a worker left is as dead as the worker; the head knows after 10 to 25 s
STOP_S = 5.0  # for workers without work to close cursors and models
STACK_S = 5.0  # a process may have to start for it
FETCH_S = 120.0  # for a block on its way to the consumer: that is a few hundred megabytes on a slow network
LOOK_UP_S = 2.0  # between two looks at the head while it comes

_GONE = (RayActorError, OutOfMemoryError, WorkerCrashedError)
_NO_SHAPE = Shape("cpu")
_TASKS: dict[Any, Any] = {bury: ray.remote(bury), stack: ray.remote(stack)}  # made once: each is known to all the cluster


class _Worker(Struct):
    """node: its name; "" until it is up, if Ray chose. steps: handed over and not answered. killed: why we ended it.
    beside: it asks for no CPU, see `_help_out`.
    """

    spec: WorkerSpec
    handle: Any
    streaming: bool
    node: str
    up: bool = False
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    killed: str = ""
    stack: str = ""
    step_s: float = 1.0
    reason: str = ""
    remains: Remains | None = None
    own_bytes: int = 0
    beside: bool = False


class _Site(Struct):
    """A node as we use it. workers: those that are on it, up or not."""

    node: Node
    workers: set[int] = field(default_factory=set[int])
    leaving: bool = False
    tight: bool = False


class ClusterState(Struct, frozen=True):
    """What people see of the cluster. workers: pool -> those that are up. store_bytes: blocks in the object stores.
    memory_bytes: anonymous memory of driver and workers, and those blocks. budget_bytes: what blocks may take on the nodes that
    there are now; 0: as when the run began.
    """

    nodes: int
    leaving: int
    workers: dict[str, int]
    store_bytes: int
    memory_bytes: int
    budget_bytes: int = 0


class RaySubstrate:
    """Workers are actors. shapes: what the workers of each pool hold. must_see: a folder that every node must see: else the
    run ends with PlanError. delivers_refs: `fetch` gives an ingest.RefBlock. budget_follows: the budget for blocks is that of
    the nodes, as they come and go.
    """

    name = "ray"

    def __init__(
        self,
        *,
        body_factory: BodyFactory | None = None,
        shapes: Mapping[str, Shape] | None = None,
        must_see: str | None = None,
        delivers_refs: bool = False,
        budget_follows: bool = True,
    ) -> None:
        self._factory = body_factory
        self._shapes = dict(shapes or {})
        self._must_see = must_see
        self._delivers_refs = delivers_refs
        self._budget_follows = budget_follows
        self._payload: Any = None
        self._stages: dict[int, Stage] = {}
        self._streaming: frozenset[str] = frozenset()
        self._around: Surroundings | None = None
        self._workers: dict[int, _Worker] = {}
        self._sites: dict[str, _Site] = {}
        self._dying: dict[int, tuple[_Worker, float]] = {}  # their nodes are asked what they left, until when
        self._condemned: dict[int, float] = {}  # their stacks are taken, until when; then they are killed
        self._gone_nodes: set[str] = set()
        self._outbox: dict[int, list[Step]] = {}
        self._parts: dict[int, int] = {}  # part -> the worker that owns it
        self._bytes: dict[int, int] = {}
        self._store_bytes = 0
        self._made: dict[int, set[int]] = {}  # worker -> its live parts
        self._inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()  # None: a wake
        self._events: deque[SubstrateEvent] = deque()
        self._here = ""  # the driver's node
        self._beacon = ""
        self._watch: Watch | None = None
        self._errands = Errands()
        self._demand = Demand()
        self._waits = Waits()
        self._kinds: tuple[Any, Any] = ray.remote(RayWorker), ray.remote(StreamingRayWorker)  # the head is told of each new one
        self._stopped = self._headless = False
        self.fetched_bytes = 0  # of blocks that came through this process, all for the consumer
        self.spill_dir: str | None = None

    # -- the contract

    def start(self, program: Any, workers: Sequence[WorkerSpec]) -> None:
        stages: Iterable[Stage] = getattr(program, "stages", ())
        self._stages = {s.id: s for s in stages}
        self._streaming = frozenset(s.pool for s in self._stages.values() if s.stream)
        self._around = Surroundings.here(self._light_beacon())
        self._payload = send((program, self._factory), "this pipeline")
        nodes = live_nodes()
        own = ray.get_runtime_context().get_node_id()
        self._here = "" if through_client() else next((n.name for n in nodes if n.id == own), "")
        for node in nodes:
            self._open_site(node)
        for spec in workers:
            self.add_worker(spec)
        named = {spec.node for spec in workers}
        late = [node for node in nodes if node.name not in named]
        if late and any(named):  # they have joined since the workers were planned
            self._offer(late, "a node has joined")
        self._watch = Watch(nodes, lambda changed: self._inbox.put(("changed", changed)))
        self._watch.start()

    def add_worker(self, worker: WorkerSpec) -> None:
        """Its id must be new in this run."""
        site = self._sites.get(worker.node)
        streaming = worker.pool in self._streaming
        made = _Worker(worker, None, streaming, worker.node if site is not None else "")
        self._workers[worker.id] = made
        if site is not None:
            site.workers.add(worker.id)
        self._start(made)
        if worker.pool not in self._waits:
            self._wait_for(worker.pool)

    def _start(self, worker: _Worker) -> None:
        """Ask for its actor. What was asked for before for the same worker is forgotten."""
        shape = self._shapes.get(worker.spec.pool, _NO_SHAPE)
        options: dict[str, Any] = {
            "num_cpus": 0.0 if worker.beside else shape.cpus,
            "num_gpus": shape.gpus,
            "memory": shape.resources.get("memory"),
            "resources": {k: v for k, v in shape.resources.items() if k != "memory"},
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        site = self._sites.get(worker.node)
        if site is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(site.node.id, soft=False)
        if worker.streaming:
            options["max_concurrency"] = MANY_CALLS
        worker.handle = self._kinds[worker.streaming].options(**options).remote(worker.spec, [self._payload], self._around)
        self._call(("up", worker.spec.id, worker.handle), worker.handle.up.remote())

    def submit(self, step: Step | Discard) -> None:
        """Handed over at once; a short step that others go before, at the next `wait`, with what else goes there."""
        worker = self._workers.get(step.worker)
        if worker is None or worker.killed or self._stopped:
            return  # it died, or is about to; WorkerLost has told, or will
        if isinstance(step, Discard):
            self._flush_to(worker)
            worker.handle.discard.remote(step.cursor)
            return
        queued = worker.step_s < SHORT_STEP_S and bool(worker.steps)
        worker.steps[step.id] = step
        self._outbox.setdefault(worker.spec.id, []).append(step)
        if not queued:
            self._flush_to(worker)

    def release(self, parts: Sequence[PartRef]) -> None:
        for part in parts:
            self._forget_part(part.id)
        if parts:
            self._inbox.put(("event", PartsFreed(tuple(p.id for p in parts))))

    def wait(self, timeout_s: float | None) -> list[SubstrateEvent]:
        if self._stopped:
            return []
        self._flush()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            woken = self._take_in(self._patience(deadline))
            self._end_overdue()
            self._look_around()
            self._check_head()
            if self._events or woken or (deadline is not None and time.monotonic() >= deadline):
                events = list(self._events)
                self._events.clear()
                return events
            self._flush()

    def wake(self) -> None:
        self._inbox.put(None)

    def fetch(self, block: BlockRef) -> Any:
        """Raises BlockLost when the node that held it is gone, or gives no answer for FETCH_S."""
        if self._delivers_refs:
            return deliver(block)
        batches = [(part.columns, self._fetch_part(part)) for part in block.parts]
        self.fetched_bytes += block.bytes
        return own_copy(zip_parts(batches, block.rows))

    def _fetch_part(self, part: PartRef) -> Any:
        until_s = time.monotonic() + FETCH_S
        while True:
            try:
                return fetch(part, LOOK_UP_S)
            except TimeoutError:
                self._check_head()
            if time.monotonic() >= until_s:
                raise BlockLost(
                    f"a block has not come from node {part.node} within {FETCH_S:g} s", hint="its split starts again"
                )

    def kill(self, worker: int, reason: str) -> bool:
        victim = self._workers.get(worker)
        if victim is None:
            return False
        if not victim.killed:
            victim.killed = reason
            self._outbox.pop(worker, None)
            if victim.remains is None or victim.node not in self._sites:
                self._end(victim)
            else:  # its node is asked for the stack meanwhile
                self._condemned[worker] = time.monotonic() + STACK_S
                task, remains = self._on_node(victim, stack), victim.remains
                self._errands.add(lambda: self._call(("stack", worker), task.remote(remains)))
        return True

    def spill(self, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        """Ray spills by itself when a store is full."""
        return ()

    def memory_bytes(self) -> int:
        """Of this machine: other nodes look after themselves (see Vitals)."""
        return anonymous_bytes() + sum(w.own_bytes for w in self._workers.values() if w.node and w.node == self._here)

    def stop(self) -> list[WorkerLost]:
        if self._stopped:
            return []
        self._stopped = True
        self._hear_last_words()
        if self._watch is not None:
            self._watch.close()
        with contextlib.suppress(Exception):
            self._errands.close(0.0 if self._headless else STOP_S)
        if self._beacon:
            with contextlib.suppress(OSError):
                os.unlink(self._beacon)
        if not self._headless:  # else Ray ends them by itself, and calls would wait for the head
            with contextlib.suppress(Exception):
                self._end_actors()
        for worker, _ in self._dying.values():  # the others have done the work before its node told of it
            self._told_lost(worker, None, gone=False, untold=True)
        self._dying.clear()
        untold = [event for event in self._events if isinstance(event, WorkerLost)]
        self._workers.clear()
        self._sites.clear()
        self._outbox.clear()
        self._parts.clear()
        self._made.clear()
        self._bytes.clear()
        self._payload = None
        self._inbox = queue.SimpleQueue()
        self._events.clear()
        return untold

    # -- for display, and the autoscaler

    @property
    def cluster(self) -> ClusterState:
        up = dict.fromkeys(self._shapes, 0)
        for worker in self._workers.values():
            if worker.up:
                up[worker.spec.pool] = up.get(worker.spec.pool, 0) + 1
        leaving = sum(1 for site in self._sites.values() if site.leaving)
        own = sum(worker.own_bytes for worker in self._workers.values())
        in_all = anonymous_bytes() + own + self._store_bytes
        return ClusterState(len(self._sites), leaving, up, self._store_bytes, in_all, self._budget())

    def _budget(self) -> int:
        used = [site.node for site in self._sites.values() if site.workers and not site.leaving and site.node.store_bytes]
        return budget_bytes(used) if used and self._budget_follows else 0

    def want(self, workers: Mapping[str, int]) -> None:
        """How many workers each pool could use now, for the autoscaler; what there is already is asked for, too, while it is
        needed.
        """
        if self._watch is None:
            return
        bundles: list[dict[str, float]] = []
        for pool, count in sorted(workers.items()):
            shape = self._shapes.get(pool, _NO_SHAPE)
            bundle = shape.wanted
            have = sum(1 for w in self._workers.values() if w.spec.pool == pool and not self._is_leaving(w))
            count = self._demand.held(pool, count, time.monotonic())
            if bundle and count > have and (shape.most is None or have < shape.most):
                bundles += [bundle] * min(count, 2 * max(1, have), shape.most or count)  # doubling: few steps, little waste
        self._watch.wish(tuple(bundles))

    # -- calls

    def _call(self, subject: tuple[Any, ...], ref: Any) -> None:
        inbox = self._inbox
        ref.future().add_done_callback(lambda done: inbox.put((*subject, done)))

    def _flush(self) -> None:
        for worker in [self._workers[i] for i in self._outbox if i in self._workers]:
            self._flush_to(worker)
        self._outbox.clear()

    def _flush_to(self, worker: _Worker) -> None:
        steps = self._outbox.pop(worker.spec.id, None)
        if not steps:
            return
        together = not worker.streaming and worker.step_s < SHORT_STEP_S
        for group in [steps] if together else [[s] for s in steps]:
            travelling = {p.id: p.handle for s in group for p in self._read_elsewhere(s, worker)}
            ref = worker.handle.run.remote(group, list(travelling), *travelling.values())
            self._call(("run", worker.spec.id, group), ref)

    def _read_elsewhere(self, step: Step, worker: _Worker) -> Iterable[PartRef]:
        """Parts of other nodes that the step will read: Ray brings those that are arguments while the worker is still busy."""
        stage = self._stages.get(step.stage)
        columns = stage.columns_in if stage is not None and isinstance(step, Apply) else None
        for block in step.inputs:
            for part in block.parts:
                if part.node != worker.node and (columns is None or not set(columns).isdisjoint(part.columns)):
                    yield part

    # -- what comes in

    def _check_head(self) -> None:
        if self._watch is not None:
            try:
                self._watch.check()
            except TransientError:
                self._headless = True
                raise

    def _patience(self, deadline: float | None) -> float | None:
        """How long to wait for the next message; 0 when there is something to tell already."""
        if self._events:
            return 0.0
        by = [until for _, until in self._dying.values()] + list(self._condemned.values())
        by += [t for t in (deadline, self._waits.look_s) if t is not None]
        return max(0.0, min(by) - time.monotonic()) if by else None

    def _take_in(self, timeout_s: float | None) -> bool:
        """Take what has come, waiting for the first of it. True: somebody called `wake`."""
        woken = False
        try:
            message = self._inbox.get(timeout=timeout_s) if timeout_s != 0.0 else self._inbox.get_nowait()
            while True:
                if message is None:
                    woken = True
                else:
                    self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return woken

    def _take(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "run":
            self._on_answers(message[1], message[2], message[3])
        elif kind == "event":
            self._events.append(message[1])
        elif kind == "up":
            self._on_up(message[1], message[2], message[3])
        elif kind == "standing":
            self._on_standing(message[1])
        elif kind == "bury":
            self._on_buried(message[1], message[2])
        elif kind == "stack":
            self._on_stack(message[1], message[2])
        elif kind == "changed":
            self._on_changed(message[1])

    def _on_answers(self, id: int, steps: Sequence[Step], done: Any) -> None:
        worker = self._workers.get(id)
        error = done.exception()
        raised = isinstance(error, RayTaskError)
        if worker is not None and worker.killed and (error is None or raised):
            return  # it comes too late: what the worker has at hand starts again, and no more is given to it
        if error is None:
            answers, vitals = done.result()
            for answer in answers:
                self._on_answer(worker, answer)
            if vitals is not None and worker is not None:
                self._on_vitals(worker, vitals)
            return
        if worker is None:
            return
        cause = error.cause if isinstance(error, RayTaskError) else error
        # Of Ray's many errors the others say that the actor is gone.
        if not raised and not isinstance(cause, (ObjectLostError, *NO_ROOM)):
            self._lose(worker, error)
            return
        for step in steps:
            if worker.steps.pop(step.id, None) is None:
                continue
            self._events.append(StepFailed(step.id, id, _told(error, cause)))

    def _on_answer(self, worker: _Worker | None, answer: StepDone | StepFailed) -> None:
        if worker is None or worker.steps.pop(answer.step, None) is None:
            return  # it was lost meanwhile, and its parts with it
        if isinstance(answer, StepDone):
            worker.step_s = answer.timing.wall_s
            for block in answer.outputs:
                for part in block.parts:
                    self._parts[part.id] = part.owner
                    self._bytes[part.id] = part.bytes
                    self._made.setdefault(part.owner, set()).add(part.id)
                    self._store_bytes += part.bytes
        self._events.append(answer)

    def _on_up(self, id: int, handle: Any, done: Any) -> None:
        worker = self._workers.get(id)
        if worker is None or worker.handle is not handle:
            return
        error = done.exception()
        if error is not None:
            self._lose(worker, error)
            return
        presence: Presence = done.result()
        worker.node, worker.remains = presence.node, presence.remains
        site = self._sites.get(presence.node) or self._open_site(Node(presence.node, presence.node_id, {}))
        site.workers.add(id)
        if not presence.sees:
            raise PlanError(
                f"node {site.node.name} does not see {self._must_see}",
                hint="write to a place that all nodes share: s3://, or a file system mounted on each at the same path",
            )
        worker.up = True
        self._waits.end(worker.spec.pool)
        self._events.append(WorkerUp(id, worker.spec.pool, worker.node))
        if site.leaving:
            self._events.append(WorkerResting(id, True))

    # -- pools without a worker

    def _wait_for(self, pool: str) -> None:
        """Note whether the pool waits for its first worker to come up, after one was asked for or lost."""
        ups = [w.up for w in self._workers.values() if w.spec.pool == pool]
        if ups and not any(ups):
            self._waits.begin(pool, time.monotonic())
        else:
            self._waits.end(pool)

    def _look_around(self) -> None:
        """Find out why pools have no worker, where that takes long."""
        look_s = self._waits.look_s
        if look_s is None or time.monotonic() < look_s:
            return
        self._waits.looks()
        inbox, own = self._inbox, {w.handle._actor_id.hex() for w in self._workers.values()}

        def look() -> None:
            inbox.put(("standing", standing(actors_of(ray.get_runtime_context().get_job_id()), own)))

        self._errands.add(look)

    def _on_standing(self, seen: Standing) -> None:
        now = time.monotonic()
        for pool in self._waits.seen(now):
            # Those without a node wait for one to come, and the run has said so.
            its = [w for w in self._workers.values() if w.spec.pool == pool and w.node in self._sites and not w.killed]
            if not its or any(w.handle._actor_id.hex() in seen.starting for w in its):
                continue
            shape = self._shapes.get(pool, _NO_SHAPE)
            beside = any(w.beside for w in its)
            if shape.cpus and not beside and ("CPU" in seen.held or not seen.known):
                self._help_out(its[0])
                if self._waits.tells_help():
                    _say(helped_out(pool))
                continue
            lacks = {k: v for k, v in shape.wanted.items() if not (beside and k == "CPU")}
            if lacks and self._waits.tells_of(pool, now):
                _say(waits_for(pool, lacks, seen))

    def _help_out(self, worker: _Worker) -> None:
        """Start it without a CPU of its own: who holds the CPUs may have to wait for this run before it can give any back."""
        self._errands.add(partial(ray.kill, worker.handle))
        worker.beside = True
        self._start(worker)

    def _light_beacon(self) -> str:
        """A new file in the folder that every node must see: a folder of that name may be there on a node of its own."""
        if self._must_see is not None:
            self._beacon = f"{self._must_see}/nodes-{secrets.token_hex(8)}"
            with open(self._beacon, "x"):
                pass
        return self._beacon

    def _on_vitals(self, worker: _Worker, vitals: Vitals) -> None:
        worker.own_bytes = vitals.own_bytes
        site = self._sites.get(worker.node)
        if site is None:
            return
        tight = vitals.share >= (FALL if site.tight else RISE)
        if tight == site.tight:
            return
        site.tight = tight
        self._tell_rest(site, worker)

    # -- deaths

    def _lose(self, worker: _Worker, error: BaseException) -> None:
        """It is gone, or as good as gone: ask its node what it left, then tell."""
        id = worker.spec.id
        if self._workers.pop(id, None) is None:
            return
        self._outbox.pop(id, None)
        self._condemned.pop(id, None)
        self._wait_for(worker.spec.pool)
        worker.reason = worker.killed or _reason(error)
        if isinstance(error, ActorUnavailableError):  # it may be alive behind a broken network: it must not come back
            self._errands.add(partial(ray.kill, worker.handle))
        site = self._sites.get(worker.node)
        if site is None or worker.node in self._gone_nodes:
            self._told_lost(worker, None, gone=bool(worker.node))
            return
        site.workers.discard(id)
        if worker.remains is None:  # it never came up; where its place died first, another one waits for a place
            self._told_lost(worker, None, gone=bool(worker.spec.node) and isinstance(error, ActorUnschedulableError))
            return
        self._dying[id] = (worker, time.monotonic() + BURY_S)
        task, remains = self._on_node(worker, bury), worker.remains
        self._errands.add(lambda: self._call(("bury", id), task.remote(remains)))

    def _on_node(self, worker: _Worker, function: Any) -> Any:
        """The function as a task that runs on the worker's node, and costs nothing there."""
        where = NodeAffinitySchedulingStrategy(self._sites[worker.node].node.id, soft=False)
        return _TASKS[function].options(num_cpus=0, max_retries=0, scheduling_strategy=where)

    def _on_buried(self, id: int, done: Any) -> None:
        found = self._dying.pop(id, None)
        if found is None:
            return
        worker, _ = found
        error = done.exception()
        if error is None:
            self._told_lost(worker, done.result(), gone=False)
        else:
            gone = isinstance(error, TaskUnschedulableError)
            self._told_lost(worker, None, gone=gone, untold=not gone)

    def _on_stack(self, id: int, done: Any) -> None:
        if self._condemned.pop(id, None) is not None:
            worker = self._workers[id]
            worker.stack = done.result() if done.exception() is None else ""
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self._errands.add(partial(ray.kill, worker.handle))
        self._lose(worker, RuntimeError(worker.killed))

    def _end_overdue(self) -> None:
        """Those whose node takes too long to answer."""
        now = time.monotonic()
        for id in [i for i, until in self._condemned.items() if now >= until]:
            del self._condemned[id]
            self._end(self._workers[id])
        for id in [i for i, (_, until) in self._dying.items() if now >= until]:
            worker, _ = self._dying.pop(id)
            self._told_lost(worker, None, gone=False, untold=True)

    def _told_lost(self, worker: _Worker, left: Obituary | None, *, gone: bool, untold: bool = False) -> None:
        """untold: its node could not be asked; of a worker that we ended we know why all the same."""
        id = worker.spec.id
        doing = left.doing if left is not None and not gone else None
        crash = left.crash if left is not None and not worker.killed else ""
        stack = worker.stack or crash
        if worker.killed:
            reason = worker.killed
        elif gone:
            reason = "its node is gone"
        else:
            reason = _crash(crash) or worker.reason
        untold = untold and not worker.killed
        self._events.append(WorkerLost(id, reason, doing, stack, worker.up, worker.spec.pool, gone, untold))
        lost = tuple(self._made.pop(id, ()))
        for part in lost:
            self._forget_part(part)
        if lost:
            self._events.append(PartsLost(lost, reason))

    def _forget_part(self, part: int) -> None:
        owner = self._parts.pop(part, None)
        self._store_bytes -= self._bytes.pop(part, 0)
        if owner is not None and owner in self._made:
            self._made[owner].discard(part)

    # -- nodes

    def _open_site(self, node: Node) -> _Site:
        site = self._sites[node.name] = _Site(node)
        self._gone_nodes.discard(node.name)
        return site

    def _on_changed(self, changed: Changed) -> None:
        for node in changed.leaving:
            self._let_rest(node, True)
        for node in changed.staying:
            self._let_rest(node, False)
        told, self._events = self._events, deque()
        for node in changed.left:
            self._close_site(node)
        lost, self._events = self._events, told
        for node in changed.joined:
            site = self._sites.get(node.name) or self._open_site(node)
            site.node = node
        if changed.left or changed.leaving:
            self._replace("a node is gone" if changed.left else "a node is to leave")
        elif changed.joined:
            self._offer(changed.joined, "a node has joined")
        self._events.extend(lost)  # after the room: of a pool that lost its last worker none else is asked for then

    def _is_leaving(self, worker: _Worker) -> bool:
        site = self._sites.get(worker.node)
        return site is not None and site.leaving

    def _replace(self, why: str) -> None:
        """Tell of the room on the nodes that stay, which pools with a bound on their workers have left; and for a pool that has
        workers on leaving nodes only, of a node to come.
        """
        self._offer([site.node for site in self._sites.values() if not site.leaving], why)
        staying = {w.spec.pool for w in self._workers.values() if not self._is_leaving(w)}
        staying.update(e.pool for e in self._events if isinstance(e, RoomOffered))
        for pool in sorted({w.spec.pool for w in self._workers.values()} - staying):
            shape = self._shapes.get(pool, _NO_SHAPE)
            self._events.append(RoomOffered(pool, shape.device, "", why))

    def _let_rest(self, node: str, leaving: bool) -> None:
        site = self._sites.get(node)
        if site is None:
            return
        site.leaving = leaving
        self._tell_rest(site)

    def _tell_rest(self, site: _Site, first: _Worker | None = None) -> None:
        """Where memory is short one worker of each pool goes on (`first` of its own), and tells when there is room again."""
        going = {} if first is None else {first.spec.pool: first.spec.id}
        for id in sorted(site.workers):
            worker = self._workers[id]
            if worker.up:
                goes_on = going.setdefault(worker.spec.pool, id) == id
                self._events.append(WorkerResting(id, site.leaving or (site.tight and not goes_on)))

    def _close_site(self, node: str) -> None:
        """The node is dead: so are its workers, whether or not their calls have failed yet."""
        self._gone_nodes.add(node)
        site = self._sites.pop(node, None)
        for worker in sorted(site.workers) if site is not None else ():
            found = self._workers.get(worker)
            if found is not None:
                self._lose(found, RuntimeError("its node is gone"))
        for id in [i for i, (w, _) in self._dying.items() if w.node == node]:
            worker, _ = self._dying.pop(id)
            self._told_lost(worker, None, gone=True)

    def _offer(self, nodes: Sequence[Node], why: str) -> None:
        """Tell of the room on nodes. Workers that wait for a node may find it there by themselves; who died by itself is
        replaced where it was.
        """
        have = dict.fromkeys(self._shapes, 0)
        waiting = dict(have)
        for worker in self._workers.values():
            if self._is_leaving(worker):
                continue
            have[worker.spec.pool] = have.get(worker.spec.pool, 0) + 1
            waiting[worker.spec.pool] = waiting.get(worker.spec.pool, 0) + (not worker.node)
        held = {n.name: [self._workers[w].spec.pool for w in self._sites[n.name].workers] for n in nodes}
        for worker, _ in self._dying.values():
            if worker.node in held:
                have[worker.spec.pool] = have.get(worker.spec.pool, 0) + 1
                held[worker.node].append(worker.spec.pool)
        for spec in place(self._shapes, nodes, have=have, held=held):
            if waiting[spec.pool] > 0:
                waiting[spec.pool] -= 1
            else:
                self._events.append(RoomOffered(spec.pool, spec.device, spec.node, why))

    # -- starting and ending

    def _hear_last_words(self) -> None:
        """What has come of deaths, and was not looked at yet."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if message is not None and message[0] in ("run", "bury"):
                    self._take(message)

    def _end_actors(self) -> None:
        """Let idle workers close what they have; end them all."""
        idle = [worker for worker in self._workers.values() if worker.up and not worker.steps]
        try:
            alive = [worker.handle.__ray_ready__.remote() for worker in idle]
            closed = [worker.handle.close.remote() for worker in idle]
            if closed:
                ray.wait(closed, num_returns=len(closed), timeout=STOP_S)
            for worker, ref in zip(idle, alive, strict=True):
                try:
                    ray.get(ref, timeout=0.0)
                except _GONE as error:  # who read its blocks may have found that, before any call told
                    worker.reason = worker.killed or _reason(error)
                    self._told_lost(worker, None, gone=False, untold=True)
                except GetTimeoutError:
                    continue
        finally:
            for worker in list(self._workers.values()):
                with contextlib.suppress(Exception):
                    ray.kill(worker.handle)


def _say(text: str) -> None:
    """Whatever the progress mode: nobody would know otherwise why nothing happens."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr, or a closed one
        print(f"headrace: {text}", file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    """Why an actor is gone, in a line. Ray's own text is a page."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if "creation task" in text:
        return f"it could not start: {lines[-1]}"
    if isinstance(error, OutOfMemoryError) or "memory pressure" in text or "running low on memory" in text:
        return "it was killed because its node ran out of memory"
    if isinstance(error, RayActorError):
        return "its process ended (killed, out of memory, or a crash in native code)"
    return lines[0]


def _crash(report: str) -> str:
    """What faulthandler calls a crash: "Segmentation fault"."""
    return f"it crashed: {report.splitlines()[0].partition(': ')[2]}" if report else ""


def _told(error: BaseException, cause: BaseException) -> HeadraceError:
    """Why a step failed outside the body that ran it."""
    if isinstance(cause, ObjectLostError):
        return block_lost(cause)
    if isinstance(cause, NO_ROOM):
        return no_room(cause)
    return InternalError(
        f"a step failed outside user code: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        frames=str(error),
        hint="this is a fault of Headrace; please report it with the frames above",
    )
