"""The cluster: how we get there, which nodes it has, which of them come, leave or are to leave, and asking for more.

Ray tells nobody when nodes come and go, so a thread looks every two seconds. It is the only thing here that polls.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from msgspec import Struct

from headrace.connectors import environment
from headrace.core.errors import PlanError, TransientError
from headrace.substrates.ray.placement import Node, node_name

LOOK_S = 2.0
PATIENCE_S = 20.0  # without an answer from the head
KNOCK_S = 5.0  # for a cluster to accept a connection
ASK_S = 5.0  # between two requests to the autoscaler
AGAIN_S = 60.0  # the same one again: a cluster has one request at a time, and another program may have replaced it
HOLD_S = 30.0  # demand that comes and goes within that is one request
_CLIENT = "ray://"
_OURS = "headrace-request"  # in the cluster's key-value store: the job whose request it has, if that is one of ours


class _Connection:
    """The connection that we made, if we did. users: who is inside `connected`. stays: until the process ends."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.address: str | None = None
        self.ours = self.stays = False
        self.users = 0


_CONNECTION = _Connection()


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected while inside: without an address through the connection that there is, to the cluster that RAY_ADDRESS
    names, to that of this machine, or to a new one; else to the one at `address` ("auto", "local", "host:port",
    "ray://host:port").

    A connection that was made here ends here, with the last one inside. Raises PlanError when there is no cluster at `address`,
    or when we are connected to another one.
    """
    _enter(address, stay=False)
    try:
        yield
    finally:
        with _CONNECTION.lock:
            _CONNECTION.users -= 1
            if _CONNECTION.ours and not _CONNECTION.users and not _CONNECTION.stays:
                _CONNECTION.ours = False
                ray.shutdown()


def connect_to_stay(address: str | None) -> None:
    """Be connected from now on. Raises PlanError as `connected`."""
    _enter(address, stay=True)


def _enter(address: str | None, *, stay: bool) -> None:
    with _CONNECTION.lock:
        if not ray.is_initialized():
            with _signals_kept():
                _connect(address)
            _CONNECTION.ours, _CONNECTION.address, _CONNECTION.stays = True, address, False
        elif address is not None and _CONNECTION.ours and _CONNECTION.address != address:
            raise PlanError(
                f"this process is connected to the cluster at {_CONNECTION.address or 'its default address'}, not to {address}",
                hint="a process talks to one cluster at a time: ray.shutdown() ends the connection",
            )
        _CONNECTION.stays = _CONNECTION.stays or stay
        _CONNECTION.users += not stay


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself as it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _connect(address: str | None) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True, "namespace": "headrace"}
    named = environment.ray_address()
    if address is None and named is None:
        try:
            ray.init(address="auto", **options)
            return
        except ConnectionError:
            address = "local"
    if (address or named or "").startswith(_CLIENT):
        _need_client(address or named or "")
    try:
        if address == "local":
            options["include_dashboard"] = False
        _knock(address or named or "")
        ray.init(address=address or named, **options)
    except (OSError, RuntimeError, ValueError) as error:
        text = f"there is no Ray cluster at {address or named}: {_in_short(error)}"
        hint = "ray start --head starts one; without an address Headrace starts one on this machine"
        if (address or named or "").startswith(_CLIENT):
            hint = "ray:// leads to the server for clients on the head (port 10001, unless ray start was told another one)"
            if isinstance(error, ConnectionAbortedError):  # it is there
                text = f"the server for clients at {address or named} could not begin: {_in_short(error)}"
                hint = "try again; the logs of the head tell more (ray_client_server*.err)"
        raise PlanError(text, hint=hint) from None


def _in_short(error: Exception) -> str:
    """The first line of what an error says; with the last one of a traceback that follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[-1]}"


def _need_client(address: str) -> None:
    try:
        importlib.import_module("grpc").StatusCode  # noqa: B018 - a folder of that name would do as a module
    except (ImportError, AttributeError):
        raise PlanError(
            f"{address} is reached through the Ray client, which lacks grpcio here",
            hint="pip install 'ray[client]'; or run the program in the cluster's network, or as a job of it, without ray://",
        ) from None


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at host:port or [host]:port: Ray itself would try for minutes, deaf to signals."""
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.removeprefix("[").removesuffix("]"), int(port)), timeout=KNOCK_S).close()


def through_client() -> bool:
    """Are we connected by ray://? This process is then on no node, and knows nothing of the cluster but what it asks."""
    from ray.util.client import ray as client

    return bool(client.is_connected())


def _in_cluster(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process that is connected to the head: this one, or one of the cluster's."""
    if not through_client():
        return function(*arguments)
    return ray.get(_TASKS[function].options(num_cpus=0, max_retries=0).remote(*arguments), timeout=KNOCK_S)


def live_nodes() -> tuple[Node, ...]:
    """The nodes that are alive, by name."""
    nodes = [
        Node(
            node_name(n.get("NodeManagerAddress", "?"), n["NodeID"]),
            n["NodeID"],
            _plain(n.get("Resources", {})),
            int(n.get("Resources", {}).get("object_store_memory", 0)),
        )
        for n in ray.nodes()
        if n.get("Alive")
    ]
    return tuple(sorted(nodes, key=lambda n: n.name))


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in resources.items() if not k.startswith("node:") and k != "object_store_memory"}


def kinds_to_come() -> frozenset[str] | None:
    """Resources that an autoscaler may bring; None: some may come, and nobody tells which. (Ray tells them in no public place,
    and most clusters not at all; nodes that an autoscaler or KubeRay started have a group.)
    """
    most: Mapping[str, float] | None = None
    with contextlib.suppress(Exception):
        most = _in_cluster(_most_to_come)
    if most is None and any("ray.io/node-group" in n.get("Labels", {}) for n in ray.nodes() if n.get("Alive")):
        return None
    return frozenset(name for name, amount in (most or {}).items() if amount > 0)


def _most_to_come() -> Mapping[str, float] | None:
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config()


def _draining() -> frozenset[str] | None:
    """Nodes that are about to leave: preempted, or drained by people. As Ray Train asks; None where nobody answers."""
    try:
        return frozenset(_in_cluster(_draining_nodes))
    except Exception:
        return None


def _draining_nodes() -> list[str]:
    from ray._private.state import state

    return list(state.get_draining_nodes())


def actors_of(job: str) -> dict[str, tuple[bool, dict[str, float]]] | None:
    """The actors of a job: id -> (whether it has a process, what it holds then). None where nobody answers."""
    try:
        return _in_cluster(_actors_of, job)
    except Exception:
        return None


def _actors_of(job: str) -> dict[str, tuple[bool, dict[str, float]]]:
    from ray._private.state import state

    data: Any = importlib.import_module("ray.core.generated.gcs_pb2").ActorTableData
    found: dict[str, tuple[bool, dict[str, float]]] = {}
    accessor = state._connect_and_get_accessor()
    for standing in ("PENDING_CREATION", "ALIVE"):  # the dead would be many in a long program
        for row in accessor.get_actor_table(ray.JobID.from_hex(job), standing):
            actor = data.FromString(row)
            holds = {k.partition("_group_")[0]: v for k, v in actor.required_resources.items()}  # of a placement group, too
            found[actor.actor_id.hex()] = (actor.pid > 0, holds)
    return found


def _request(bundles: list[dict[str, float]], job: str) -> None:
    """Ask the autoscaler, for a job; for nothing: take it back."""
    from ray.autoscaler.sdk import request_resources
    from ray.experimental import internal_kv

    request_resources(bundles=bundles)
    if bundles:
        internal_kv._internal_kv_put(_OURS, job)
    else:
        internal_kv._internal_kv_del(_OURS)


def _take_back_left() -> None:
    """A driver that is killed takes no request back: the next one does. Requests of other programs stay."""
    from ray._private.state import state
    from ray.experimental import internal_kv

    job = internal_kv._internal_kv_get(_OURS)
    if job and all(j["IsDead"] for j in state.job_table() if j["JobID"] == job.decode()):
        _request([], "")


# Made once: both ends of a ray:// connection keep each that is made, and one is asked for every two seconds.
_TASKS: dict[Any, Any] = {f: ray.remote(f) for f in (_most_to_come, _draining_nodes, _actors_of, _request, _take_back_left)}


class Changed(Struct, frozen=True):
    """What has changed since the last look."""

    joined: tuple[Node, ...] = ()
    left: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    staying: tuple[str, ...] = ()  # that were leaving


class Watch:
    """Tells of changes from a thread of its own, and carries wishes to the autoscaler. known: the nodes there are."""

    def __init__(self, known: tuple[Node, ...], tell: Callable[[Changed], None]) -> None:
        self._known = {n.name for n in known}
        self._leaving: frozenset[str] = frozenset()
        self._tell = tell
        self._end = threading.Event()
        self._since_s: float | None = None  # when the head was asked what it has not answered yet
        self._wish: tuple[dict[str, float], ...] = ()
        self._asked: tuple[dict[str, float], ...] = ()
        self._asked_s = float("-inf")
        self._job = ""
        self._thread = threading.Thread(target=self._look, name="headrace-cluster", daemon=True)

    def start(self) -> None:
        with contextlib.suppress(Exception):
            self._job = ray.get_runtime_context().get_job_id()
        self._thread.start()

    def check(self) -> None:
        """Raises TransientError when the head is silent. (A call to it waits for a minute; then Ray ends the whole process.)"""
        since_s = self._since_s  # a process that was stopped meanwhile has asked nothing
        silent_s = 0.0 if since_s is None else time.monotonic() - since_s
        if silent_s >= PATIENCE_S:
            raise TransientError(
                f"the head of the Ray cluster has not answered for {silent_s:.0f} s",
                hint="the same command goes on from here, on this cluster, another one, or one machine",
            )

    def wish(self, bundles: tuple[dict[str, float], ...]) -> None:
        """What the cluster should be able to hold, in resources of one worker each; () for no more than there is."""
        self._wish = bundles

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_S)
        if self._asked and not self._thread.is_alive():
            self._ask(())

    def _look(self) -> None:
        self._since_s = time.monotonic()
        with contextlib.suppress(Exception):
            _in_cluster(_take_back_left)
            self._since_s = None
        while not self._end.wait(LOOK_S):
            self._since_s = self._since_s or time.monotonic()
            try:
                changed = self._changes()
                self._since_s = None
            except Exception:
                continue  # whoever asks `check` knows
            if changed != Changed():
                self._tell(changed)
            wish = self._wish
            if time.monotonic() - self._asked_s >= (ASK_S if wish != self._asked else AGAIN_S) and (wish or self._asked):
                self._ask(wish)

    def _changes(self) -> Changed:
        nodes = {n.name: n for n in live_nodes()}
        draining = _draining()
        leaving = self._leaving & nodes.keys()
        if draining is not None:
            leaving = frozenset(name for name, n in nodes.items() if n.id in draining)
        changed = Changed(
            tuple(n for name, n in nodes.items() if name not in self._known and name not in leaving),
            tuple(sorted(self._known - nodes.keys())),
            tuple(sorted(leaving - self._leaving)),
            tuple(sorted((self._leaving - leaving) & nodes.keys())),
        )
        self._known = (self._known & nodes.keys()) | {n.name for n in changed.joined}
        self._leaving = leaving
        return changed

    def _ask(self, bundles: tuple[dict[str, float], ...]) -> None:
        self._asked, self._asked_s = bundles, time.monotonic()
        with contextlib.suppress(Exception):  # a cluster without an autoscaler: a wish is a hint
            _in_cluster(_request, [dict(b) for b in bundles], self._job)


class Demand:
    """How many workers each pool could use, as asked for: it rises at once and falls when it was lower for HOLD_S. Queues are
    empty now and then, also where one more worker would help, and a request that comes and goes brings nothing.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, float]] = {}  # pool -> (workers, until when)

    def held(self, pool: str, count: int, now_s: float) -> int:
        """What to ask for, when the pool could use `count` just now."""
        most, until_s = self._held.get(pool, (0, 0.0))
        if count < most and now_s < until_s:
            return most
        self._held[pool] = (count, now_s + HOLD_S)
        return count


class Errands:
    """Calls that wait for the head, which may be dead: made in a thread of their own, in order, so that nobody else waits."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, errand: Callable[[], object]) -> None:
        """What it raises is lost."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="headrace-errands", daemon=True)
            self._thread.start()
        self._queue.put(errand)

    def close(self, patience_s: float) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(patience_s)

    def _run(self) -> None:
        while (errand := self._queue.get()) is not None:
            with contextlib.suppress(Exception):
                errand()
