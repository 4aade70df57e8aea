"""A run whose devices only Ray's autoscaler can bring: nodes come for it, work, and go.

    python benchmarks/reliability/ray_autoscaler.py --idle
    python benchmarks/reliability/ray_autoscaler.py --v2 --idle       # Ray's second autoscaler: KubeRay's

The head has one CPU and no device. Ray's own autoscaler runs beside it, with a provider whose machines are raylets of this
one. The first node comes since a worker waits for it; the second one since the run asks for it (request_resources). The
output must be whole, the second node must have got a worker, and with `--idle` all of them must be gone soon after the run.
Prints what happened as JSON; fails when something of it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.cluster_utils import Cluster

import headrace as hr
from headrace.substrates.ray import cluster as wishes

STORE_BYTES = 80 << 20
IDLE_MINUTES = 0.1
GONE_S = 45.0  # idle nodes must be gone by then
HEAD = "ray.head.default"  # the provider tells of its head by this name


class Nodes(FakeMultiNodeProvider):
    """Ray's provider for tests. Its own node ids differ at their ends only, and people see how they begin."""

    def _next_hex_node_id(self) -> str:
        return secrets.token_hex(28)


def _config(gcs: str, nodes: int) -> dict[str, Any]:
    """What Ray's example.yaml for this provider says, which its wheel lacks; "external": it has no defaults to look for."""
    provider = {"type": "external", "module": f"{Path(__file__).stem}.Nodes", "use_node_id_as_ip": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True, "launch_multiple": True}
    provider |= {"gcs_address": gcs, "head_node_id": FAKE_HEAD_NODE_ID}
    device = {"CPU": 0, "rare": 1, "object_store_memory": STORE_BYTES}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "headrace",
        "max_workers": nodes,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": provider,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "device": {"resources": device, "node_config": {}, "min_workers": 0, "max_workers": nodes},
        },
        "head_node_type": HEAD,
        **{f"{command}_commands": [] for command in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


@contextlib.contextmanager
def autoscaling_cluster(nodes: int, *, v2: bool) -> Iterator[str]:
    """The address of a cluster whose autoscaler may start so many nodes with a device."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("", 0))
        port = free.getsockname()[1]
        config = Path(folder) / "cluster.json"
        config.write_text(json.dumps(_config(f"{ray._private.services.get_node_ip_address()}:{port}", nodes)))
        free.close()
        os.environ |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_NODE_TYPE_NAME": HEAD}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        if v2:
            os.environ["RAY_enable_autoscaler_v2"] = "1"  # noqa: SIM112 - the name that Ray looks for
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES, "gcs_server_port": port}
        known_as = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
        made = Cluster(True, head_node_args={**head, "autoscaling_config": str(config), "env_vars": known_as})
        del os.environ["RAY_NODE_TYPE_NAME"]  # the nodes have their own
        try:
            yield made.address
        finally:
            (monitor,) = made.head_node.all_processes["monitor"]
            started = psutil.Process(monitor.process.pid).children(recursive=True)
            made.shutdown()
            for process in started:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def slow(x: np.ndarray) -> np.ndarray:
    time.sleep(0.1)
    return x + 1


def started_nodes() -> list[str]:
    """Those that are alive, the head left out."""
    return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != FAKE_HEAD_NODE_ID]


def run_job(folder: Path, files: int, address: str) -> dict[str, Any]:
    source, out = folder / "in", folder / "out"
    source.mkdir()
    for i in range(files):
        pq.write_table(pa.table({"id": np.arange(i * 40, (i + 1) * 40)}), source / f"f{i:03d}.parquet")
    ds = hr.read_parquet(source).predict(slow, input="id", output="p", device="cpu", resources={"rare": 1}, batch_size=10)
    began = time.perf_counter()
    run = ds.write_parquet(out, engine="ray", address=address, outputs="per_input", progress="quiet")
    took_s = time.perf_counter() - began
    table = pa.concat_tables(pq.read_table(p) for p in sorted(out.glob("*.parquet")))
    return {
        "whole": table["id"].to_pylist() == list(range(files * 40)) and hr.verify(str(out)).ok,
        "rows": run.rows,
        "run_s": round(took_s, 1),
        "pools": {pool.name: pool.workers for pool in run.pools},
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2, help="the most that the autoscaler may start")
    parser.add_argument("--files", type=int, default=40, help="each is 0.4 s of work")
    parser.add_argument("--v2", action="store_true", help="Ray's second autoscaler")
    parser.add_argument("--idle", action="store_true", help="wait for the nodes to go")
    args = parser.parse_args()
    wishes.LOOK_S, wishes.ASK_S = 0.5, 0.5  # an autoscaler of this machine is as quick
    with tempfile.TemporaryDirectory() as folder, autoscaling_cluster(args.nodes, v2=args.v2) as address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="headrace")
        try:
            found = {"ray": ray.__version__, "autoscaler": 2 if args.v2 else 1, **run_job(Path(folder), args.files, address)}
            found["nodes_started"] = len(started_nodes())
            ended = time.monotonic()
            while args.idle and started_nodes() and time.monotonic() - ended < GONE_S:
                time.sleep(0.2)
            found["nodes_left"] = len(started_nodes())
        finally:
            ray.shutdown()
    print(json.dumps(found))
    good = found["whole"] and found["nodes_started"] == found["pools"]["cpu(rare=1)"] == args.nodes
    return 0 if good and not (args.idle and found["nodes_left"]) else 1


if __name__ == "__main__":
    sys.exit(main())
