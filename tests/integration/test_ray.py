"""The Ray engine on a cluster of unlike nodes, some of which die. What all engines share is in the feature suite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import BlockLost, DataError, PlanError, UserCodeError, WorkerDied

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="several nodes on one machine need Linux"),
    pytest.mark.xdist_group("ray nodes"),  # they share a cluster
]

STORE_BYTES = 80 << 20
SOON: dict[str, int] = {  # the head notices within two seconds that a node is dead
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}
CONNECTION: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "headrace"}
QUIET: dict[str, Any] = {"engine": "ray", "progress": "quiet"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU, and one with a GPU by name, two licenses and no CPU. Other clusters are left for as long."""
    from ray.cluster_utils import Cluster

    before = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
    ray.shutdown()
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "include_log_monitor": False,
        "object_store_memory": STORE_BYTES,
        "_system_config": SOON,
    }
    made = Cluster(True, head_node_args=head)
    try:
        made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        made.add_node(num_cpus=0, num_gpus=1, resources={"license": 2}, object_store_memory=STORE_BYTES)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        if before:
            ray.init(address=before, **CONNECTION)


@pytest.fixture
def connected(cluster: Any) -> Iterator[Any]:
    """As a user who called ray.init."""
    if not ray.is_initialized():
        ray.init(address=cluster.address, **CONNECTION)
    yield cluster
    assert ray.is_initialized(), "a run ended a connection that is not its own"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve files of 20 rows in two groups, ids 0..239."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(12):
        ids = np.arange(i * 20, (i + 1) * 20)
        table = pa.table({"id": ids, "x": ids * 0.5, "name": [f"row {k}" for k in ids]})
        pq.write_table(table, folder / f"f{i:02d}.parquet", row_group_size=10)
    return folder


def files(folder: Path) -> dict[str, pa.Table]:
    found = folder.rglob("*.parquet")
    shown = sorted(p for p in found if not any(part.startswith("_") for part in p.relative_to(folder).parts))
    return {str(p.relative_to(folder)): pq.read_table(p) for p in shown}


def ids(folder: Path) -> list[int]:
    return [i for table in files(folder).values() for i in table["id"].to_pylist()]


class Listed:
    """A model that lists where its instances run: files in `folder`."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        said = {"node": node, "device": device, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
        Path(folder, f"{os.getpid()}.json").write_text(json.dumps(said))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x + 1


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in folder.iterdir()]


def alive() -> dict[str, dict[str, Any]]:
    return {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}


def node_with(resource: str) -> str:
    return next(id for id, has in alive().items() if has.get(resource))


def test_output_equals_that_of_threads(connected: Any, data: Path, tmp_path: Path) -> None:
    def pipeline(on_ray: bool) -> hr.Dataset:
        device: dict[str, Any] = {"resources": {"GPU": 0.5}} if on_ray else {}
        licensed: dict[str, Any] = {"resources": {"license": 1}} if on_ray else {}
        shown = [tmp_path / name for name in ("gpu", "license")]
        for folder in shown:
            folder.mkdir(exist_ok=True)
        return (
            hr.read_parquet(data)
            .map_batches(lambda b: {**b, "z": b["x"] * 3}, batch_size=16)
            .filter(lambda row: row["id"] % 7 != 0)
            .predict(Listed, input="x", output="y", constructor_args=[str(shown[0])], **device)
            .predict(Listed, input="z", output="w", constructor_args=[str(shown[1])], device="cpu", **licensed)
        )

    pipeline(False).write_parquet(tmp_path / "threads", engine="threads", cpus=2, progress="quiet", outputs="per_input")
    for place in ("gpu", "license"):
        for file in (tmp_path / place).iterdir():
            file.unlink()
    pipeline(True).write_parquet(tmp_path / "ray", outputs="per_input", **QUIET)
    here, there = files(tmp_path / "threads"), files(tmp_path / "ray")
    assert list(here) == list(there)
    assert all(here[name].equals(there[name]) for name in here)
    on_gpu = told(tmp_path / "gpu")
    assert len(on_gpu) in (1, 2)
    assert {(m["node"], m["device"], m["visible"]) for m in on_gpu} == {(node_with("GPU"), "cuda:0", "0")}
    assert {m["node"] for m in told(tmp_path / "license")} == {node_with("license")}


@pytest.fixture
def substrates(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those of the test's runs."""
    from headrace.substrates.ray.pool import RaySubstrate

    made: list[Any] = []
    init = RaySubstrate.__init__

    def listing(self: Any, **options: Any) -> None:
        made.append(self)
        init(self, **options)

    monkeypatch.setattr(RaySubstrate, "__init__", listing)
    return made


def test_carried_columns_visit_neither_the_device_nor_the_driver(
    connected: Any, data: Path, tmp_path: Path, substrates: list[Any]
) -> None:
    class Spy:
        """What its worker reads, by the columns of the parts."""

        def __init__(self, folder: str, device: str) -> None:
            from headrace.substrates.ray.store import RayStore

            get, offer = RayStore.get, RayStore.offer

            def listing_get(self: Any, part: Any) -> Any:
                Path(folder, f"got-{part.id}").write_text(" ".join(part.columns))
                return get(self, part)

            def listing_offer(self: Any, part: int, batch: Any) -> None:
                Path(folder, f"brought-{part}").write_text(" ".join(batch.schema.names))
                offer(self, part, batch)

            RayStore.get, RayStore.offer = listing_get, listing_offer  # type: ignore[method-assign]
            Path(folder, "node").write_text(ray.get_runtime_context().get_node_id())

        def __call__(self, x: np.ndarray) -> np.ndarray:
            time.sleep(0.05)  # so that more steps follow, which the spy sees
            return x + 1

    shown = tmp_path / "shown"
    shown.mkdir()
    ds = hr.read_parquet(data).map_batches(lambda b: {**b, "z": b["x"] * 3})
    ds = ds.predict(Spy, input="z", output="w", constructor_args=[str(shown)], batch_size=20)
    run = ds.write_parquet(tmp_path / "out", **QUIET)
    assert run.rows == 240
    assert (shown / "node").read_text() == node_with("GPU")
    read = {p.read_text() for p in shown.iterdir() if p.name != "node"}
    assert read == {"z"}
    assert substrates[0].fetched_bytes == 0
    blocks = list(ds.select("id", "w").iter_batches(**QUIET))
    assert sum(len(b["id"]) for b in blocks) == 240
    assert 0 < substrates[1].fetched_bytes < 240 * 64


def killed_once(marker: Path, by: signal.Signals) -> Any:
    path = str(marker)

    def fn(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if 77 in batch["id"] and not os.path.exists(path):
            Path(path).touch()
            os.kill(os.getpid(), by)
            time.sleep(1.0)
        return {**batch, "y": batch["x"] * 2}

    return fn


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_actor_is_replaced(connected: Any, data: Path, tmp_path: Path, by: signal.Signals) -> None:
    """SIGTERM is what `ray stop` and containers that end send; no row is to blame."""
    ds = hr.read_parquet(data).map_batches(killed_once(tmp_path / "marker", by), batch_size=10)
    run = ds.evaluate(n=hr.metrics.Count(), m=hr.metrics.Mean("y")).write_parquet(tmp_path / "out", **QUIET)
    assert ids(tmp_path / "out") == list(range(240))
    assert (run.workers_lost, run.metrics["n"], run.metrics["m"]) == (1, 240, 119.5)
    assert run.tally.balanced


def poisoned(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if 77 in batch["id"]:
        import ctypes

        ctypes.string_at(0)
    return {**batch, "y": batch["x"] * 2}


class Poisoned:
    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return poisoned(batch)["y"]


@pytest.mark.parametrize("model", [False, True])
def test_a_poison_row_is_found_and_set_aside(connected: Any, data: Path, tmp_path: Path, model: bool) -> None:
    ds = hr.read_parquet(data)
    ds = ds.predict(Poisoned, input=["id", "x"], output="y") if model else ds.map_batches(poisoned, batch_size=50)
    run = ds.write_parquet(tmp_path / "out", on_error="quarantine", **QUIET)
    assert ids(tmp_path / "out") == [i for i in range(240) if i != 77]
    assert run.tally.quarantined == 1
    aside = pq.read_table(next((tmp_path / "out" / "_headrace").rglob("quarantine/*.parquet")))
    assert aside["id"].to_pylist() == [77]
    assert "Segmentation fault" in aside["_exception"][0].as_py()


def test_a_hang_is_ended_and_told_by_the_users_frames(connected: Any, data: Path, tmp_path: Path) -> None:
    def hangs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(1000)
        return batch

    ds = hr.read_parquet(data / "f00.parquet").map_batches(hangs, batch_size=1000)
    with pytest.raises(WorkerDied, match="no answer for 1 s") as caught:
        ds.write_parquet(tmp_path / "out", timeout=1, **QUIET)
    assert __file__ in caught.value.frames
    assert os.path.dirname(hr.__file__) not in caught.value.frames
    assert {"node", "stage"} <= {label for label, _ in caught.value.where}


class Fatal:
    def __init__(self, device: str) -> None:
        import ctypes

        ctypes.string_at(0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x


def test_a_model_that_dies_as_it_is_made_is_named(connected: Any, data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data / "f00.parquet").predict(Fatal, input="x", output="y")
    with pytest.raises(WorkerDied, match=r"while predict\(Fatal\) was constructed") as caught:
        ds.write_parquet(tmp_path / "out", on_error="skip", **QUIET)
    assert "in __init__" in caught.value.frames


def test_an_error_names_node_and_actor(connected: Any, data: Path, tmp_path: Path) -> None:
    def raises(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise ValueError("no good")

    with pytest.raises(UserCodeError, match="no good") as caught:
        hr.read_parquet(data).map_batches(raises).write_parquet(tmp_path / "out", **QUIET)
    where = dict(caught.value.where)
    host, _, node = where["node"].partition("/")
    assert any(id.startswith(node) for id in alive())
    assert host
    assert where["actor"]


# ---------------------------------------------------------------- nodes that come and go


class Gate:
    """Rows below 60 pass at once; who gets others waits until it is open, which `during` does after its act. So there is work
    in hand at the act, and work to come after it, however slow the machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def open(self) -> None:
        (self.folder / "open").touch()

    def pass_through(self, ids: np.ndarray) -> None:
        if ids.max() < 60:
            return
        (self.folder / ray.get_runtime_context().get_node_id()).touch()
        end = time.monotonic() + 60
        while not (self.folder / "open").exists():
            assert time.monotonic() < end, "nobody opened"
            time.sleep(0.01)

    def worked_on(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begun = np.full(len(batch["x"]), time.time())
        self.pass_through(batch["id"])
        time.sleep(0.1)  # of short steps a worker has several ahead
        node = ray.get_runtime_context().get_node_id()
        return {**batch, "y": batch["x"] * 2, "node": np.array([node] * len(batch["x"])), "begun": begun}

    def predicted(self, x: np.ndarray) -> np.ndarray:
        self.pass_through(x * 2)
        return x + 1


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def kill(cluster: Any, node: Any) -> None:
    """All of its processes at once, as when a machine is gone."""
    import psutil

    (raylet,) = node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def during(run: Callable[[], Any], gate: Gate, act: Callable[[], None], on: Any = None) -> Any:
    """What `run` returns. `act` is done when somebody waits at the gate (on a node: `on`), in this thread: only a main thread
    may start nodes. Then the gate opens.
    """
    waiting = "[!o]*" if on is None else on.node_id
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(run)
        try:
            while not list(gate.folder.glob(waiting)):
                assert not result.done(), result.exception() or "it was over before"
                time.sleep(0.01)
            act()
            assert not result.done(), result.exception() or "it was over too early"
        finally:
            gate.open()
        return result.result()


@pytest.mark.parametrize("what", ["cpu", "device"])
def test_a_node_dies(connected: Any, data: Path, tmp_path: Path, gate: Gate, what: str) -> None:
    here = {"num_cpus": 1} if what == "cpu" else {"num_cpus": 0, "resources": {"sim": 1}}
    node = connected.add_node(**here, object_store_memory=STORE_BYTES)
    if what == "device":
        other = connected.add_node(num_cpus=0, resources={"sim": 1}, object_store_memory=STORE_BYTES)
    try:
        ds = hr.read_parquet(data)
        if what == "cpu":
            ds = ds.map_batches(gate.worked_on, batch_size=10)
        else:
            ds = ds.map_batches(lambda batch: batch, batch_size=10).predict(
                gate.predicted, input="x", output="w", device="sim", batch_size=10
            )
        ds = ds.evaluate(n=hr.metrics.Count())
        out = tmp_path / "out"
        run = during(
            lambda: ds.write_parquet(out, outputs="per_input", **QUIET),
            gate,
            lambda: kill(connected, node),
            node,
        )
    finally:
        if what == "device":
            connected.remove_node(other)
    assert ids(out) == list(range(240))
    assert run.metrics["n"] == 240
    assert run.tally.balanced
    assert hr.verify(str(out)).ok
    assert run.retries >= 1
    assert run.workers_lost == 1


def test_a_node_that_joins_gets_work(connected: Any, data: Path, tmp_path: Path, gate: Gate) -> None:
    """While those that were there are still busy."""
    out = tmp_path / "out"
    added: list[Any] = []

    def join() -> None:
        added.append(connected.add_node(num_cpus=2, object_store_memory=STORE_BYTES))
        end = time.monotonic() + 30
        while not (gate.folder / added[0].node_id).exists():
            assert time.monotonic() < end, "it got none"
            time.sleep(0.01)

    ds = hr.read_parquet(data).map_batches(gate.worked_on, batch_size=10)
    try:
        during(lambda: ds.write_parquet(out, outputs="per_input", **QUIET), gate, join)
    finally:
        for node in added:
            connected.remove_node(node)
    assert ids(out) == list(range(240))
    assert added[0].node_id in {n for table in files(out).values() for n in table["node"].to_pylist()}


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.substrates.ray import cluster

    monkeypatch.setattr(cluster, "LOOK_S", 0.2)


def preempt(cluster: Any, node: Any) -> None:
    """A notice that the machine will be gone in ten minutes."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = (time.time_ns() // 1_000_000) + 600_000
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = False, ""
    end = time.monotonic() + 60
    while not accepted:  # on a busy machine the head does not always answer in Ray's time
        assert time.monotonic() < end, why
        try:
            accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", deadline_ms)
        except ray.exceptions.RpcError as error:
            why = str(error)


def heard_of(substrates: list[Any]) -> None:
    """When the driver knows of the notice."""
    end = time.monotonic() + 30
    while not substrates[0].cluster.leaving:
        assert time.monotonic() < end, "no notice came"
        time.sleep(0.01)
    time.sleep(0.5)  # its scheduler is told in the same turn


def test_a_node_with_a_preemption_notice_gets_no_new_work(
    connected: Any, data: Path, tmp_path: Path, looking_often: None, substrates: list[Any], gate: Gate
) -> None:
    """Its workers finish the splits that they have, and that is all."""
    node = connected.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    out = tmp_path / "out"
    noticed = 0.0

    def notice() -> None:
        nonlocal noticed
        preempt(connected, node)
        heard_of(substrates)
        noticed = time.time()

    ds = hr.read_parquet(data).map_batches(gate.worked_on, batch_size=5)
    try:
        run = during(lambda: ds.write_parquet(out, outputs="per_input", **QUIET), gate, notice, node)
    finally:
        connected.remove_node(node)
    assert ids(out) == list(range(240))
    assert (run.retries, run.workers_lost) == (0, 0)
    begun = [min(table["begun"].to_pylist()) for table in files(out).values()]
    there = [node.node_id in table["node"].to_pylist() for table in files(out).values()]
    assert any(there)
    assert any(begin > noticed for begin in begun)
    assert not any(here for begin, here in zip(begun, there, strict=True) if begin > noticed)


def test_the_only_device_node_gets_a_preemption_notice(
    connected: Any, data: Path, tmp_path: Path, looking_often: None, substrates: list[Any], gate: Gate
) -> None:
    """Its work goes on on another one, while it is still there."""
    here: dict[str, Any] = {"num_cpus": 0, "resources": {"spot": 1}, "object_store_memory": STORE_BYTES}
    nodes = [connected.add_node(**here)]
    out, shown = tmp_path / "out", tmp_path / "shown"
    shown.mkdir()

    class Gated(Listed):
        def __call__(self, x: np.ndarray) -> np.ndarray:
            return gate.predicted(x)

    def exchange() -> None:
        preempt(connected, nodes[0])
        heard_of(substrates)
        nodes.append(connected.add_node(**here))

    ds = hr.read_parquet(data).predict(
        Gated, input="x", output="w", constructor_args=[str(shown)], device="cpu", resources={"spot": 1}, batch_size=10
    )
    try:
        run = during(lambda: ds.write_parquet(out, outputs="per_input", **QUIET), gate, exchange)
    finally:
        for node in nodes:
            connected.remove_node(node)
    assert ids(out) == list(range(240))
    assert (run.retries, run.workers_lost) == (0, 0)
    assert {m["node"] for m in told(shown)} == {node.node_id for node in nodes}


def test_the_only_device_node_dies_and_another_one_comes(connected: Any, data: Path, tmp_path: Path, gate: Gate) -> None:
    node = connected.add_node(num_cpus=0, resources={"rare": 1}, object_store_memory=STORE_BYTES)
    out = tmp_path / "out"

    def exchange() -> None:
        nonlocal node
        kill(connected, node)
        node = connected.add_node(num_cpus=0, resources={"rare": 1}, object_store_memory=STORE_BYTES)

    ds = hr.read_parquet(data)
    ds = ds.predict(gate.predicted, input="x", output="w", device="cpu", resources={"rare": 1}, batch_size=10)
    try:
        during(lambda: ds.write_parquet(out, outputs="per_input", **QUIET), gate, exchange)
    finally:
        connected.remove_node(node)
    assert ids(out) == list(range(240))


# ---------------------------------------------------------------- drivers


SCRIPT = """
import os, sys, time
import headrace as hr

def slow(batch, gate):
    time.sleep(0.1)
    end = time.monotonic() + 60
    while batch["id"].max() >= 120 and not os.path.exists(gate):
        assert time.monotonic() < end, "nobody opened"
        time.sleep(0.01)
    return {**batch, "y": batch["x"] * 2}

if __name__ == "__main__":
    where = {"address": sys.argv[4]} if sys.argv[3] == "ray" else {"cpus": 2}
    ds = hr.read_parquet(sys.argv[1]).map_batches(slow, batch_size=20, fn_kwargs={"gate": sys.argv[2] + ".open"})
    ds = ds.evaluate(n=hr.metrics.Count(), m=hr.metrics.Mean("y"))
    run = ds.write_parquet(sys.argv[2], outputs="per_input", engine=sys.argv[3], progress="log", **where)
    print("done", run.rows, run.metrics["n"], run.metrics["m"])
"""


class Jobs:
    """Drivers in processes of their own, all for the same run, which does not get beyond half of the rows before `finish`, or
    `let_go`.
    """

    def __init__(self, data: Path, address: str) -> None:
        self.script = data.parent / "job.py"
        self.script.write_text(textwrap.dedent(SCRIPT))
        self.arguments = [str(data), str(data.parent / "out")]
        self.out = data.parent / "out"
        self.address = address

    def begin(self, engine: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script), *self.arguments, engine, self.address]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def wait_for_files(self, least: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.out.glob("f*.parquet"))) < least:
            assert time.monotonic() < deadline, "no output came"
            time.sleep(0.01)

    def let_go(self) -> None:
        self.out.with_name("out.open").touch()

    def finish(self, engine: str) -> str:
        self.let_go()
        job = self.begin(engine)
        said, err = job.communicate(timeout=60)
        assert job.returncode == 0, err
        assert "done 240 240 119.5" in said
        assert ids(self.out) == list(range(240))
        assert hr.verify(str(self.out)).ok
        return err


@pytest.fixture
def jobs(cluster: Any, data: Path) -> Jobs:
    return Jobs(data, cluster.address)


@pytest.mark.parametrize(("first", "second"), [("ray", "threads"), ("threads", "ray")])
def test_a_killed_driver_resumes_on_another_engine(jobs: Jobs, first: str, second: str) -> None:
    job = jobs.begin(first)
    jobs.wait_for_files(2)
    job.kill()
    job.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in jobs.out.glob("f*.parquet")}
    assert "resumed" in jobs.finish(second)
    after = {p.name: p.stat().st_mtime_ns for p in jobs.out.glob("f*.parquet")}
    assert before.items() <= after.items()


def test_sigterm_drains(jobs: Jobs) -> None:
    job = jobs.begin("ray")
    jobs.wait_for_files(1)
    job.terminate()
    time.sleep(1.0)
    jobs.let_go()
    _, err = job.communicate(timeout=60)
    assert job.returncode == 143, err
    assert "resumable" in err
    assert not (jobs.out / "_SUCCESS").exists()
    jobs.finish("ray")


# ---------------------------------------------------------------- connections


@pytest.fixture
def not_connected(cluster: Any) -> Iterator[Any]:
    ray.shutdown()
    yield cluster
    assert not ray.is_initialized(), "a run left its connection behind"
    ray.init(address=cluster.address, **CONNECTION)  # Ray keeps some descriptors: no leaks of ours


def test_a_connection_of_our_own_ends_with_the_run(not_connected: Any, data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data)
    assert ds.write_parquet(tmp_path / "out", address=not_connected.address, **QUIET).rows == 240
    assert not ray.is_initialized()
    batches = ds.iter_batches(batch_size=10, address=not_connected.address, **QUIET)
    assert next(batches)["id"].tolist() == list(range(10))
    batches.close()


def test_a_cluster_of_our_own(data: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray can't come back to an earlier cluster after it (its actors are cancelled)."""
    code = (
        "import headrace as hr, ray, sys; run = hr.read_parquet(sys.argv[1]).write_parquet(sys.argv[2], engine='ray', cpus=1, "
    )
    code += "address='local', progress='quiet'); print(run.rows, ray.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code, str(data), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "240 False", done.stderr


CLIENT = """
import sys
import headrace as hr

data, out, address = sys.argv[1:]
ds = hr.read_parquet(data).map_batches(lambda b: {**b, "y": b["x"] * 2}).evaluate(total=hr.metrics.Sum("id"))
options = {"engine": "ray", "address": address, "progress": "quiet"}
run = ds.write_parquet(out, **options)
print("wrote", run.rows, run.metrics["total"])
streamed = sum(len(batch["id"]) for batch in ds.iter_batches(batch_size=50, **options))
again = ds.write_parquet(out, **options)
print("streamed", streamed, "again", again.already_done)

import ray

print("connected", ray.is_initialized())
"""


@contextlib.contextmanager
def client_server(cluster: Any, log: Path) -> Iterator[str]:
    """The address of a server for one Ray client. The proxy in front of such servers on a head is left out: it forks beside
    threads of gRPC, and sometimes hangs.
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "ray.util.client.server", "--address", cluster.address, "--host", "127.0.0.1"]
    argv += ["--port", str(port), "--mode", "specific-server"]
    with log.open("w") as said:
        server = subprocess.Popen(argv, stdout=said, stderr=said, start_new_session=True)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"ray://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        with contextlib.suppress(ProcessLookupError):  # the servers that it began, one a client
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_program_outside_of_the_cluster(cluster: Any, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    with client_server(cluster, tmp_path / "server.log") as address:
        argv = [sys.executable, "-c", CLIENT, str(data), str(tmp_path / "out"), address]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["wrote 240 28680", "streamed 240 again True", "connected False"], done.stderr
    assert ids(tmp_path / "out") == list(range(240))
    for table in files(tmp_path / "out").values():
        assert np.array_equal(table["y"], table["x"].to_numpy() * 2)


def test_there_is_no_cluster(not_connected: Any, data: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        for address in (nobody, "no-such-host.invalid:6379", "neither"):
            with pytest.raises(PlanError, match=f"no Ray cluster at {address}"):
                hr.read_parquet(data).write_parquet(tmp_path / "out", address=address, **QUIET)
    assert not (tmp_path / "out").exists()


def test_ray_is_not_installed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r"headrace\[ray\]"):
        hr.read_parquet(data).write_parquet(tmp_path / "out", **QUIET)


# ---------------------------------------------------------------- what can't be, and streams


def test_nodes_do_not_see_the_destination(connected: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.substrates.ray.actor import Surroundings

    here = Surroundings.here
    monkeypatch.setattr(Surroundings, "here", lambda must_see: here("/no/such/place"))
    with pytest.raises(PlanError, match="does not see") as caught:
        hr.read_parquet(data).write_parquet(tmp_path / "out", **QUIET)
    assert "s3://" in caught.value.hint


def test_a_function_that_can_not_travel(connected: Any, data: Path, tmp_path: Path) -> None:
    lock = threading.Lock()

    def locked(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with lock:
            return batch

    with pytest.raises(PlanError, match="can't be sent to the cluster"):
        hr.read_parquet(data).map_batches(locked).write_parquet(tmp_path / "out", **QUIET)


@pytest.mark.parametrize("resources", [{"CPU": 1}, {"memory": 1_000_000}])
def test_a_model_gets_the_cpus_and_the_memory_that_it_asks_for(connected: Any, data: Path, resources: dict[str, float]) -> None:
    ds = hr.read_parquet(data).predict(np.negative, input="x", output="y", resources=resources, replicas=2)
    rows = ds.to_arrow(**QUIET)  # on two nodes of one CPU
    assert rows["y"].to_pylist() == [-x for x in rows["x"].to_pylist()]


def test_models_that_hold_all_cpus_leave_a_reader(connected: Any, data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(np.negative, input="x", output="y", resources={"CPU": 1})
    ds = ds.predict(np.negative, input="y", output="z", resources={"CPU": 0.5})
    assert "nothing that Ray counts" in ds.explain(**QUIET)
    ds.write_parquet(tmp_path / "out", **QUIET)
    rows = hr.read_parquet(tmp_path / "out").to_arrow(progress="quiet")
    assert len(rows) == 240
    assert rows["z"].equals(rows["x"])


def test_a_resource_that_no_node_has(connected: Any, data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(np.negative, input="x", output="y", resources={"license": 5})
    with pytest.raises(PlanError, match="5 license") as caught:
        ds.write_parquet(tmp_path / "out", **QUIET)
    assert any("2 license" in value for _, value in caught.value.where)


def test_leaving_a_stream_early(connected: Any, data: Path) -> None:
    batches = hr.read_parquet(data).map_batches(lambda batch: batch, batch_size=10).iter_batches(batch_size=10, **QUIET)
    assert next(iter(batches))["id"].tolist() == list(range(10))
    batches.close()


@pytest.mark.timeout(60)
def test_a_run_inside_of_another_ones_loop(connected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's workers hold every CPU until its consumer has finished, which waits for the second."""
    from headrace.substrates.ray import standing

    monkeypatch.setattr(standing, "LOOK_S", 0.2)
    train, val = (hr.range(rows).map(lambda row: row) for rows in (50_000, 1000))
    batches = train.iter_batches(batch_size=1000, **QUIET)
    assert next(iter(batches))["id"][0] == 0
    assert val.count(**QUIET) == 1000
    both = zip(batches, val.iter_batches(batch_size=100, **QUIET), strict=False)
    assert [len(b["id"]) for _, b in both] == [100] * 10
    batches.close()


@pytest.mark.timeout(60)
def test_two_streaming_splits_at_a_time(connected: Any) -> None:
    """They are driven by actors, which know nothing of each other."""
    train, val = (hr.range(rows).map(lambda row: row).streaming_split(1, engine="ray")[0] for rows in (50_000, 1000))
    first = train.iter_batches(batch_size=1000)
    assert len(next(first)["id"]) == 1000
    assert sum(len(b["id"]) for b in val.iter_batches()) == 1000
    for split in (val, train):
        split.close()


def test_a_block_that_is_lost_on_its_way_to_the_consumer(connected: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.substrates.ray import pool

    fetch, seen = pool.fetch, []

    def fetch_or_lose(part: Any, wait_s: float) -> Any:
        seen.append(part)
        if len(seen) == 5:
            raise BlockLost("its node is gone")
        return fetch(part, wait_s)

    monkeypatch.setattr(pool, "fetch", fetch_or_lose)
    batches = hr.read_parquet(data).map_batches(lambda b: {**b, "y": b["x"] * 2}).iter_batches(batch_size=10, **QUIET)
    assert [i for b in batches for i in b["id"]] == list(range(240))
    assert len(seen) > 5


class Streaming:
    """Rows may overtake each other; it tells how many were under way at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def answer(self, key: Any, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02 if row["x"] % 2 else 0.01)
        self.now -= 1
        return key, {"y": row["x"] * 2, "most": self.most}

    async def stream(self, rows: Any) -> Any:
        tasks = [asyncio.ensure_future(self.answer(key, row)) async for key, row in rows]
        for task in asyncio.as_completed(tasks):
            yield await task


def test_a_streaming_model(connected: Any, data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(Streaming, input=["x"], output=["y", "most"], device="cpu", replicas=1)
    ds.write_parquet(tmp_path / "out", **QUIET)
    table = pa.concat_tables(files(tmp_path / "out").values())
    assert table["id"].to_pylist() == list(range(240))
    assert table["y"].to_pylist() == list(range(240))
    assert max(table["most"].to_pylist()) > 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_chaos(tmp_path: Path) -> None:
    """Two rounds: the node with the GPU dies, and the one without. benchmarks/results has many more."""
    script = Path(__file__).parents[2] / "benchmarks" / "reliability" / "ray_chaos.py"
    command = [sys.executable, str(script), "--rounds", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "{'gpu node': 1, 'cpu node': 1}, 0 too late" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_autoscaler_brings_the_nodes_and_takes_them_away(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The script fails unless the output is whole, both nodes had a worker, and none of them is left."""
    if not request.config.getoption("--ray"):
        pytest.skip("an autoscaler takes a minute: with --ray")
    script = Path(__file__).parents[2] / "benchmarks" / "reliability" / "ray_autoscaler.py"
    command = [sys.executable, str(script), "--files", "25", "--idle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


class Blocks:
    """As a Ray Dataset, without the actors that outlive its execution."""

    def __init__(self, *columns: pa.Array) -> None:
        self._tables = [pa.table({"id": np.arange(len(c)), "a": c}) for c in columns]

    def to_arrow_refs(self) -> list[Any]:
        return [ray.put(table) for table in self._tables]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's of its own options
def test_blocks_of_ray_data_meet_in_one_type(connected: Any) -> None:
    from ray.data.extensions import ArrowTensorArray

    def column(*parts: pa.Array) -> tuple[pa.DataType, list[Any]]:
        found = hr.from_ray_dataset(Blocks(*parts)).to_arrow(**QUIET)["a"]
        return found.type, found.to_pylist()

    numbers = pa.array(range(75))
    assert column(pa.nulls(25), numbers) == (pa.int64(), [None] * 25 + list(range(75)))
    assert column(numbers, pa.array([0.5])) == (pa.float64(), [*map(float, range(75)), 0.5])
    tensors = ArrowTensorArray.from_numpy(np.ones((3, 2, 2)))
    type, values = column(pa.nulls(2), tensors)
    assert list(type.shape) == [2, 2]
    assert values[:2] == [None, None]
    with pytest.raises(DataError, match=r"'a' .* string in block 1, and int64"):
        hr.from_ray_dataset(Blocks(numbers, pa.array(["x"])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's of its own options
def test_texts_in_arrays_of_ray_data_are_lists(connected: Any) -> None:
    from ray.data.extensions import ArrowTensorArray

    texts = np.array([[["a", "bb"], ["c", "d\u00e9"]]] * 3)
    found = hr.from_ray_dataset(Blocks(ArrowTensorArray.from_numpy(texts))).to_arrow(**QUIET)
    assert found["a"].to_pylist() == texts.tolist()


def test_few_tasks_at_once_look_at_many_blocks(connected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task that asks for no CPU has a process of its own, as long as others are at work."""
    most = 0
    wait = ray.wait

    def counted(refs: list[Any], **options: Any) -> Any:
        nonlocal most
        most = max(most, len(refs))
        return wait(refs, **options)

    monkeypatch.setattr(ray, "wait", counted)
    assert hr.from_ray_dataset(Blocks(*[pa.array([1])] * 20)).to_arrow(**QUIET).num_rows == 20
    assert 2 <= most <= max(2, int(ray.cluster_resources()["CPU"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray Data's of its own options
def test_a_ray_dataset_is_made_though_this_program_holds_all_cpus(connected: Any) -> None:
    """Which it gives back when it has been made."""

    @ray.remote(num_cpus=0.5)
    class Holder:
        def up(self) -> bool:
            return True

    holders = [Holder.remote() for _ in range(2 * int(ray.cluster_resources()["CPU"]))]
    ray.get([holder.up.remote() for holder in holders])
    try:
        made = hr.range(100).map_batches(lambda batch: batch).to_ray_dataset()
    finally:
        for holder in holders:
            ray.kill(holder)
    assert made.count() == 100
    assert [row for block in ray.get(made.to_arrow_refs()) for row in block["id"].to_pylist()] == list(range(100))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray Data's of its own options
def test_no_rows_of_permuted_tensors_reach_ray_data(connected: Any) -> None:
    table = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((4, 2, 3)))})
    (empty,) = ray.get(hr.from_arrow(table.slice(0, 0)).to_ray_dataset().to_arrow_refs())
    assert (empty.num_rows, empty.column_names) == (0, ["x"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data's of its own options
def test_tensors_of_ray_data_keep_their_shape(connected: Any) -> None:
    from ray.data.extensions import ArrowTensorArray

    fixed = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    for array in (fixed, fixed.astype(np.uint8), fixed % 3 == 0):
        ds = hr.from_ray_dataset(Blocks(ArrowTensorArray.from_numpy(array[:3]), ArrowTensorArray.from_numpy(array[3:])))
        got = np.concatenate([b["a"] for b in ds.iter_batches(batch_size=2, **QUIET)])
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert (got == array).all()
    ragged = np.array([*(np.full((i + 1, 2), i) for i in range(3)), None], dtype=object)[:-1]
    of_shapes = hr.from_ray_dataset(Blocks(ArrowTensorArray.from_numpy(ragged))).map(
        lambda row: {"id": row["id"], "shape": list(row["a"].shape), "sum": row["a"].sum()}
    )
    told = of_shapes.to_arrow(**QUIET).to_pylist()
    assert told == [{"id": i, "shape": [i + 1, 2], "sum": i * (i + 1) * 2} for i in range(3)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray Data's of its own options
def test_tensors_reach_ray_data_and_come_back(connected: Any) -> None:
    """Bools of one shape, and tensors of several; both with nulls among them, too."""

    from headrace.core.tensors import numpy_to_array, ragged_to_array

    def tensors(batch: pa.Table) -> pa.Table:
        ids = batch["id"].to_numpy()
        bools = [np.array([[i, 0], [1, i]]) > 1 for i in ids]
        ragged = [np.full((i + 1, 2), i, np.float32) for i in ids]
        columns = {"bool": numpy_to_array(np.stack(bools)), "ragged": ragged_to_array(ragged)}
        some = pa.array([None if i == 2 else k for k, i in enumerate(ids)])
        return pa.table({"id": batch["id"], **columns, **{f"{n}_null": c.take(some) for n, c in columns.items()}})

    def shown(rows: Any) -> list[Any]:
        return [
            {k: (v.dtype.kind, v.tolist()) if isinstance(v, np.ndarray) else v for k, v in row.items() if k != "id"}
            for row in rows
        ]

    ds = hr.range(5).map_batches(tensors, batch_format="pyarrow", batch_size=4)
    there = ds.to_ray_dataset()
    blocks: list[pa.Table] = ray.get(there.to_arrow_refs())  # to execute it would leave actors
    rows = shown(row for block in blocks for row in block.to_pylist())
    for i, row in enumerate(rows):
        bools, ragged = ("b", [[i > 1, False], [False, i > 1]]), ("f", np.full((i + 1, 2), i, float).tolist())
        assert (row["bool"], row["ragged"]) == (bools, ragged)
        assert (row["bool_null"], row["ragged_null"]) == ((None, None) if i == 2 else (bools, ragged))
    assert [t.shape for t in blocks[0]["ragged_null"].chunk(0).to_numpy()] == [(1, 2), (2, 2), (0, 0), (4, 2)]
    back = hr.from_ray_dataset(there).map(lambda row: {"id": row["id"], "kinds": [str(np.shape(v)) for v in row.values()]})
    kinds = [r["kinds"][1:] for r in back.to_arrow(**QUIET).to_pylist()]
    assert kinds[3] == ["(2, 2)", "(4, 2)"] * 2
    assert kinds[2] == ["(2, 2)", "(3, 2)", "()", "()"]
