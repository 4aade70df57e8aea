"""The driver's side of the Ray substrate by what comes in, without a cluster: ends of calls that are hard to bring about."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

pytest.importorskip("ray")

from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from headrace.core.errors import BlockLost, InternalError, PlanError, TransientError
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Advance, RoomOffered, StepDone, StepFailed, WorkerLost, WorkerResting, WorkerUp
from headrace.substrates.ray import cluster, standing, store
from headrace.substrates.ray import pool as pool_module
from headrace.substrates.ray.actor import Presence, Vitals
from headrace.substrates.ray.cluster import HOLD_S, PATIENCE_S, Changed, Demand, Errands, Watch
from headrace.substrates.ray.placement import Node, Shape, budget_bytes
from headrace.substrates.ray.pool import RaySubstrate, _Site, _Worker
from headrace.substrates.ray.remains import Obituary, Remains
from headrace.substrates.ray.standing import Standing

OBJECT = "00" * 28


class Desk:
    """A substrate with workers that are up, on one node: {id: pool}."""

    def __init__(self, pools: dict[int, str], node: str = "") -> None:
        self.substrate = RaySubstrate()
        for id, pool in pools.items():
            handle: Any = SimpleNamespace()
            self.substrate._workers[id] = _Worker(WorkerSpec(id, pool, "cpu", node), handle, False, node, up=True)
        if node:
            self.substrate._sites[node] = _Site(Node(node, "id", {}), set(pools))

    def given(self, worker: int, *ids: int) -> list[Advance]:
        steps = [Advance(id, worker, stage=0, cursor=id, split_index=0, attempt=1) for id in ids]
        self.substrate._workers[worker].steps = {s.id: s for s in steps}
        return steps

    def answered(self, worker: int, steps: list[Advance], answer: Any) -> list[Any]:
        done: Future[Any] = Future()
        if isinstance(answer, BaseException):
            done.set_exception(answer)
        else:
            done.set_result(answer)
        self.substrate._inbox.put(("run", worker, steps, done))
        return self.substrate.wait(0.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActorDiedError(), "its process ended"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "its node ran out of memory"),
        (WorkerCrashedError(), "worker died unexpectedly"),
    ],
)
def test_whatever_ends_an_actor_is_a_lost_worker(error: BaseException, reason: str) -> None:
    desk = Desk({3: "cpu"})
    (lost,) = desk.answered(3, desk.given(3, 1, 2), error)
    assert isinstance(lost, WorkerLost)
    assert lost.worker == 3
    assert reason in lost.reason


@pytest.mark.parametrize("how", ["in the call", "in the worker"])
def test_an_input_that_is_lost_fails_the_steps_only(how: str) -> None:
    desk = Desk({3: "cpu"})
    lost: Any = (OwnerDiedError if how == "in the call" else ObjectLostError)(OBJECT, None, "")
    error = lost if how == "in the call" else RayTaskError("run", "frames", lost)
    events = desk.answered(3, desk.given(3, 1, 2), error)
    assert [(type(e), e.step, type(e.error)) for e in events] == [(StepFailed, 1, BlockLost), (StepFailed, 2, BlockLost)]
    assert 3 in desk.substrate._workers


def test_a_fault_of_ours_is_told_as_such() -> None:
    desk = Desk({3: "cpu"})
    (failed,) = desk.answered(3, desk.given(3, 1), RayTaskError("run", "frames", KeyError("oops")))
    assert isinstance(failed, StepFailed)
    assert isinstance(failed.error, InternalError)


def test_where_memory_is_short_one_worker_of_each_pool_goes_on() -> None:
    """The one that tells may belong to a pool which has nothing to do until the others have made something."""
    desk = Desk({0: "cpu", 1: "cpu", 2: "cpu", 3: "cuda", 4: "cuda"}, node="a")

    def told(tight: bool) -> dict[int, bool]:
        (step,) = desk.given(4, 1)
        events = desk.answered(4, [step], ((StepDone(1, 4),), Vitals(1, tight)))
        return {e.worker: e.resting for e in events if isinstance(e, WorkerResting)}

    assert told(True) == {0: False, 1: True, 2: True, 3: True, 4: False}
    assert told(True) == {}
    assert told(False) == dict.fromkeys(range(5), False)


def test_a_silent_head_ends_the_run_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's calls to a dead head take a minute, and then end the whole process."""
    desk = Desk({3: "cpu"})  # whose handle has no method that could be called
    watch = Watch((), lambda changed: None)
    desk.substrate._watch = watch
    assert desk.substrate.wait(0.0) == []
    monkeypatch.setattr(watch, "_since_s", time.monotonic() - PATIENCE_S)
    with pytest.raises(TransientError, match="not answered"):
        desk.substrate.wait(0.0)
    desk.substrate.stop()


@pytest.mark.parametrize(("full", "what"), [(ObjectStoreFullError, "object store"), (OutOfDiskError, "disk")])
def test_a_full_store_is_told_as_such(monkeypatch: pytest.MonkeyPatch, full: type[Exception], what: str) -> None:
    desk = Desk({3: "cpu"})
    for error in (full("page 1 of many"), RayTaskError("run", "frames", full("page 1 of many"))):
        (failed,) = desk.answered(3, desk.given(3, 1), error)
        assert isinstance(failed.error, TransientError)
        assert what in failed.error.message
    assert 3 in desk.substrate._workers

    def refuse(*_: Any, **__: Any) -> Any:
        raise full("page 1 of many")

    monkeypatch.setattr(store.ray, "put", refuse)
    monkeypatch.setattr(store.ray, "get", refuse)
    with pytest.raises(TransientError, match=what):
        store.RayStore(0, "a", None).put(pa.record_batch({"x": [1]}))
    with pytest.raises(TransientError, match=what):
        store.fetch(PartRef(1, 0, 8, ("x",), None))


def test_a_block_that_does_not_come_is_lost_in_the_end_and_the_head_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk({3: "cpu"})
    looks: list[float] = []

    def nothing_comes(part: PartRef, wait_s: float) -> Any:
        looks.append(wait_s)
        raise TimeoutError

    monkeypatch.setattr(pool_module, "fetch", nothing_comes)
    monkeypatch.setattr(pool_module, "FETCH_S", 0.0)
    block = BlockRef(1, (PartRef(1, 3, 8, ("x",), None, "a"),))
    with pytest.raises(BlockLost, match="from node a"):
        desk.substrate.fetch(block)
    assert looks == [pool_module.LOOK_UP_S]
    watch = desk.substrate._watch = Watch((), lambda changed: None)
    monkeypatch.setattr(watch, "_since_s", time.monotonic() - PATIENCE_S)
    with pytest.raises(TransientError, match="not answered"):
        desk.substrate.fetch(block)


def test_a_block_is_got_when_it_has_come_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops what has come of an object when a `get` for it gives up: one that takes longer than that never came."""
    coming = [([], ["ref"]), (["ref"], [])]
    got: list[Any] = []
    monkeypatch.setattr(store.ray, "wait", lambda refs, timeout: coming.pop(0))
    monkeypatch.setattr(store.ray, "get", lambda ref, timeout: got.append(ref) or "batch")
    part = PartRef(1, 3, 8, ("x",), "ref")
    with pytest.raises(TimeoutError):
        store.fetch(part, 2.0)
    assert got == []
    assert store.fetch(part, 2.0) == "batch"


# ---------------------------------------------------------------- deaths and nodes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(function, what it is told) of tasks for nodes, and ("kill", handle)."""
    found: list[tuple[str, Any]] = []

    def on_node(self: Any, worker: Any, function: Any) -> Any:
        future: Any = SimpleNamespace(future=Future)
        return SimpleNamespace(remote=lambda remains: found.append((function.__name__, remains)) or future)

    monkeypatch.setattr(RaySubstrate, "_on_node", on_node)
    monkeypatch.setattr(pool_module.ray, "kill", lambda handle: found.append(("kill", handle)))
    return found


def ended(value: Any) -> Future[Any]:
    done: Future[Any] = Future()
    if isinstance(value, BaseException):
        done.set_exception(value)
    else:
        done.set_result(value)
    return done


def hung() -> Desk:
    desk = Desk({3: "cpu"}, node="a")
    desk.substrate._workers[3].remains = Remains(7, "crumb", "report")
    return desk


def test_to_kill_a_worker_takes_no_time_and_its_stack_first(asked: list[tuple[str, Any]]) -> None:
    desk = hung()
    assert desk.substrate.kill(3, "no answer for 1 s")
    assert desk.substrate.kill(3, "again")
    assert desk.substrate.wait(0.0) == []
    desk.substrate._inbox.put(("stack", 3, ended("Thread 1")))
    assert desk.substrate.wait(0.0) == []
    desk.substrate._inbox.put(("bury", 3, ended(Obituary(None, ""))))
    (lost,) = desk.substrate.wait(0.0)
    assert (lost.reason, lost.stack, lost.untold) == ("no answer for 1 s", "Thread 1", False)
    desk.substrate._errands.close(5.0)
    assert sorted(name for name, _ in asked) == ["bury", "kill", "stack"]
    assert not desk.substrate.kill(3, "no such worker")


def test_what_a_worker_answers_while_its_stack_is_taken_does_not_count(asked: list[tuple[str, Any]]) -> None:
    """It would be given more, and the rows of that be blamed for its death."""
    desk = hung()
    (step,) = desk.given(3, 1)
    desk.substrate.kill(3, "no answer for 1 s")
    assert desk.answered(3, [step], ((StepDone(1, 3),), None)) == []
    assert desk.answered(3, [step], RayTaskError("run", "frames", KeyError("oops"))) == []
    desk.substrate.submit(Advance(2, 3, stage=0, cursor=2, split_index=1, attempt=1))  # its handle has no method for it
    assert desk.substrate.wait(0.0) == []
    desk.substrate._inbox.put(("stack", 3, ended("Thread 1")))
    desk.substrate._inbox.put(("bury", 3, ended(Obituary(None, ""))))
    (lost,) = desk.substrate.wait(0.0)
    assert (type(lost), lost.reason) == (WorkerLost, "no answer for 1 s")
    desk.substrate._errands.close(5.0)


def test_a_node_that_gives_no_stack_is_not_waited_for(asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STACK_S", 0.0)
    monkeypatch.setattr(pool_module, "BURY_S", 0.0)
    desk = hung()
    desk.substrate.kill(3, "no answer for 1 s")
    (lost,) = desk.substrate.wait(None)
    assert (lost.reason, lost.stack, lost.untold) == ("no answer for 1 s", "", False)
    desk.substrate._errands.close(5.0)
    assert "kill" in [name for name, _ in asked]


@pytest.mark.parametrize(
    ("answer", "gone", "untold"),
    [
        (Obituary(None, ""), False, False),
        (WorkerCrashedError(), False, True),
        (TaskUnschedulableError("its node is dead"), True, False),
    ],
)
def test_a_death_that_its_node_can_not_tell_of(asked: list[tuple[str, Any]], answer: Any, gone: bool, untold: bool) -> None:
    desk = hung()
    assert desk.answered(3, desk.given(3, 1), ActorDiedError()) == []
    desk.substrate._inbox.put(("bury", 3, ended(answer)))
    (lost,) = desk.substrate.wait(0.0)
    assert (lost.gone, lost.untold) == (gone, untold)
    desk.substrate._errands.close(5.0)


def test_a_death_that_nobody_told_of_before_the_end_is_told_by_stop(asked: list[tuple[str, Any]]) -> None:
    """Others did the work anew meanwhile: the run need not wait for the node's answer."""
    desk = hung()
    assert desk.answered(3, desk.given(3, 1), ActorDiedError()) == []
    (lost,) = desk.substrate.stop()
    assert (lost.worker, lost.reason.split(" (")[0], lost.gone) == (3, "its process ended", False)
    assert desk.substrate.stop() == []


def test_a_worker_that_is_found_dead_as_it_is_to_close_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that dies as it closes: it has done its work."""
    desk = Desk({3: "cpu", 4: "cpu", 5: "cpu", 6: "cpu"})
    ends = {4: ActorDiedError(), 5: GetTimeoutError(), "close 6": ActorDiedError()}
    killed: list[Any] = []
    for id, worker in desk.substrate._workers.items():
        ready, close = SimpleNamespace(remote=lambda id=id: id), SimpleNamespace(remote=lambda id=id: f"close {id}")
        worker.handle = SimpleNamespace(__ray_ready__=ready, close=close)

    def get(ref: Any, timeout: float) -> None:
        if ref in ends:
            raise ends[ref]

    monkeypatch.setattr(pool_module.ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(pool_module.ray, "get", get)
    monkeypatch.setattr(pool_module.ray, "kill", killed.append)
    assert [(lost.worker, lost.pool) for lost in desk.substrate.stop()] == [(4, "cpu")]
    assert len(killed) == 4


def test_what_has_come_of_a_death_is_told_by_stop_if_nobody_looked_before(asked: list[tuple[str, Any]]) -> None:
    desk = hung()
    assert desk.answered(3, desk.given(3, 1), ActorDiedError()) == []
    desk.substrate._inbox.put(("bury", 3, ended(Obituary(None, "Fatal Python error: Segmentation fault"))))
    (lost,) = desk.substrate.stop()
    assert (lost.reason, lost.untold) == ("it crashed: Segmentation fault", False)


def two_nodes(most: int | None = 2) -> RaySubstrate:
    """A worker of pool "sim" on each, where there is room for two, and a store each."""
    substrate = RaySubstrate(shapes={"sim": Shape("sim:0", resources={"sim": 1.0}, most=most)})
    for id, name in enumerate("ab"):
        spec, handle = WorkerSpec(id, "sim", "sim:0", name), cast(Any, SimpleNamespace())
        substrate._workers[id] = _Worker(spec, handle, False, name, up=True)
        substrate._sites[name] = _Site(Node(name, name, {"sim": 2.0}, 1 << 30), {id})
    return substrate


def test_what_a_dead_node_leaves_undone_has_room_elsewhere_told_first() -> None:
    substrate = two_nodes()
    substrate._inbox.put(("changed", Changed(left=("a",))))
    offered, lost = substrate.wait(0.0)
    assert offered == RoomOffered("sim", "sim:0", "b", "a node is gone")
    assert isinstance(lost, WorkerLost)
    assert (lost.worker, lost.gone) == (0, True)


def test_room_is_offered_once_where_nodes_come_and_go_at_the_same_time() -> None:
    substrate = two_nodes()
    come = Node("c", "c", {"sim": 2.0}, 1 << 30)
    substrate._inbox.put(("changed", Changed(joined=(come,), left=("a",), leaving=("b",))))
    offered = [e.node for e in substrate.wait(0.0) if isinstance(e, RoomOffered)]
    assert offered == ["c", "c"], "no more than the two that the pool may have"


def test_workers_of_a_leaving_node_have_others_in_their_place() -> None:
    substrate = two_nodes()
    substrate._inbox.put(("changed", Changed(leaving=("a",))))
    assert substrate.wait(0.0) == [WorkerResting(0, True), RoomOffered("sim", "sim:0", "b", "a node is to leave")]
    substrate._inbox.put(("changed", Changed(leaving=("b",))))
    assert substrate.wait(0.0) == [WorkerResting(1, True), RoomOffered("sim", "sim:0", "", "a node is to leave")]


def test_the_budget_is_that_of_the_nodes_that_stay() -> None:
    substrate = two_nodes()
    assert substrate.cluster.budget_bytes == budget_bytes([site.node for site in substrate._sites.values()])
    substrate._sites["a"].leaving = True
    assert substrate.cluster.budget_bytes == budget_bytes([substrate._sites["b"].node])
    assert RaySubstrate(budget_follows=False).cluster.budget_bytes == 0


# ---------------------------------------------------------------- the cluster


def test_demand_that_comes_and_goes_is_one_request() -> None:
    demand = Demand()
    assert [demand.held("sim", n, float(s)) for s, n in enumerate((0, 2, 0, 3, 1))] == [0, 2, 2, 3, 3]
    assert demand.held("other", 1, 4.0) == 1
    assert demand.held("sim", 1, 3.0 + HOLD_S) == 1


def test_the_request_of_a_driver_that_was_killed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import state
    from ray.autoscaler import sdk
    from ray.experimental import internal_kv

    kept: dict[str, bytes] = {}
    requests: list[Any] = []
    monkeypatch.setattr(sdk, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda key, value: kept.update({key: value.encode()}))
    monkeypatch.setattr(internal_kv, "_internal_kv_get", kept.get)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key: kept.pop(key, None))
    monkeypatch.setattr(state, "job_table", lambda: [{"JobID": "01", "IsDead": True}, {"JobID": "02", "IsDead": False}])
    cluster._take_back_left()
    cluster._request([{"CPU": 1.0}], "02")
    cluster._take_back_left()
    assert requests == [[{"CPU": 1.0}]], "none was ours, then its job is at work"
    cluster._request([{"CPU": 2.0}], "01")
    cluster._take_back_left()
    cluster._take_back_left()
    assert requests[1:] == [[{"CPU": 2.0}], []]


def test_addresses_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    knocked: list[Any] = []

    def nobody(at: Any, timeout: float) -> Any:
        knocked.append(at)
        raise ConnectionRefusedError("nobody")

    monkeypatch.setattr(cluster.socket, "create_connection", nobody)
    for address in ("[::1]:6379", "10.0.0.1:6379", "head:6379"):
        with pytest.raises(PlanError, match="no Ray cluster at"):
            cluster._connect(address)
    assert knocked == [("::1", 6379), ("10.0.0.1", 6379), ("head", 6379)]


def test_the_ray_client_needs_a_package_that_ray_does_not_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(PlanError, match="lacks grpcio") as caught:
        cluster._connect("ray://head:10001")
    assert "ray[client]" in caught.value.hint


def test_a_server_for_clients_that_can_not_begin_is_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**options: Any) -> None:
        raise ConnectionAbortedError("Initialization failure from server:\nTraceback:\n  somewhere\nRuntimeError: no port\n")

    monkeypatch.setattr(cluster.socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(cluster.ray, "init", refuses)
    pytest.importorskip("grpc")
    with pytest.raises(PlanError, match=r"could not begin: Initialization failure from server: RuntimeError: no port"):
        cluster._connect("ray://head:10001")


def test_errands_do_not_hold_up_those_who_send_them() -> None:
    errands, gate, done = Errands(), threading.Event(), threading.Event()

    def fails() -> None:
        raise ValueError("lost")

    for errand in (gate.wait, fails, done.set):
        errands.add(errand)
    assert not done.is_set()
    gate.set()
    errands.close(5.0)
    assert done.is_set()


# ---------------------------------------------------------------- pools without a worker


class Kind:
    """What actors are asked for with; they never come up by themselves."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.calls: list[Future[Any]] = []

    def options(self, **options: Any) -> Kind:
        self.asked.append(options)
        return self

    def remote(self, *_: Any) -> Any:
        self.calls.append(Future())
        ref = SimpleNamespace(future=lambda call=self.calls[-1]: call)
        return SimpleNamespace(_actor_id=bytes([len(self.calls)]), up=SimpleNamespace(remote=lambda: ref))


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Shape], tuple[RaySubstrate, Kind, list[Any]]]:
    """A substrate with a worker that has waited for a minute for what its shape wants; and the actors that were ended."""

    def made(shape: Shape) -> tuple[RaySubstrate, Kind, list[Any]]:
        kind, ended_ones, substrate = Kind(), list[Any](), RaySubstrate(shapes={"p": shape})
        monkeypatch.setattr(pool_module.ray, "kill", ended_ones.append)
        substrate._kinds = (kind, kind)
        substrate._errands = cast(Any, SimpleNamespace(add=lambda errand: errand()))
        substrate._sites["a"] = _Site(Node("a", "00" * 28, {"CPU": 1, "GPU": 1}))
        substrate.add_worker(WorkerSpec(3, "p", "cpu", "a"))
        substrate._waits._since["p"] -= 60.0
        return substrate, kind, ended_ones

    monkeypatch.setattr(standing.Waits, "helped", False)
    return made


Waiting = Callable[[Shape], tuple[RaySubstrate, Kind, list[Any]]]


@pytest.mark.parametrize("seen", [Standing(held=frozenset({"CPU"})), Standing(known=False)], ids=["held", "unknown"])
def test_who_waits_for_cpus_of_its_own_program_starts_without(
    waiting: Waiting, seen: Standing, capfd: pytest.CaptureFixture[str]
) -> None:
    substrate, kind, ended_ones = waiting(Shape("cpu", cpus=1.0, resources={"license": 1}))
    before = substrate._workers[3].handle
    for _ in range(3):
        substrate._on_standing(seen)
    first, second = kind.asked
    where = [options.pop("scheduling_strategy").node_id for options in kind.asked]
    assert where == ["00" * 28] * 2
    assert second == {**first, "num_cpus": 0.0}, "what else it asked for is still asked for"
    assert ended_ones == [before]
    kind.calls[0].set_exception(ActorDiedError())  # of the one that was ended
    assert substrate.wait(0.0) == []
    kind.calls[1].set_result(Presence("a", "00" * 28, Remains(), True))
    assert [type(e) for e in substrate.wait(0.0)] == [WorkerUp]
    told = capfd.readouterr().err
    assert told.count("this program holds some") == 1
    assert told.count("it needs 1 license, and") == 1


def test_who_waits_for_others_is_patient_and_says_so_once(waiting: Waiting, capfd: pytest.CaptureFixture[str]) -> None:
    substrate, kind, ended_ones = waiting(Shape("cpu", cpus=1.0))
    for _ in range(3):
        substrate._on_standing(Standing(free={"CPU": 0.0}))
    assert len(kind.asked) == 1
    assert ended_ones == []
    told = capfd.readouterr().err
    assert told.count("no CPU left") == 1
    assert "this program" not in told


def test_a_device_that_the_program_holds_can_not_be_had(waiting: Waiting, capfd: pytest.CaptureFixture[str]) -> None:
    substrate, kind, _ = waiting(Shape("cuda:0", gpus=1.0))
    for _ in range(3):
        substrate._on_standing(Standing(held=frozenset({"CPU", "GPU"})))
    assert len(kind.asked) == 1
    told = capfd.readouterr().err
    assert told.count("no GPU left: this program holds some") == 1


def test_nothing_is_said_of_workers_that_start_or_wait_for_a_node(waiting: Waiting, capfd: pytest.CaptureFixture[str]) -> None:
    substrate, kind, _ = waiting(Shape("cpu", cpus=1.0))
    held = Standing(held=frozenset({"CPU"}), starting=frozenset({substrate._workers[3].handle._actor_id.hex()}))
    substrate._on_standing(held)
    substrate._workers[3].node = ""
    substrate._on_standing(Standing(held=frozenset({"CPU"})))
    assert len(kind.asked) == 1
    assert capfd.readouterr().err == ""
