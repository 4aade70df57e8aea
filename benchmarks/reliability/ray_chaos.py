"""Kill parts of a Ray cluster at work: nodes, the node with the GPU, actors, the driver, the head.

    python benchmarks/reliability/ray_chaos.py --rounds 30 --record
    python benchmarks/reliability/ray_chaos.py --rounds 2 --seed 7

The cluster is several raylets on this machine: a head with one CPU, a node with one CPU, and one without any that has a GPU by
name. Every round runs job.py there, whose answer is known, with a model that runs where the GPU is, and kills by what its
seed says, at a moment that its seed says. What was killed comes back, as an autoscaler would have it; a driver that ended is
followed by another one: on the cluster, on a new one when the head is dead, or on one machine with threads. The output must
then equal the known answer in rows, order and metrics, and no actor may be left. `--record` writes
benchmarks/results/reliability-ray_chaos.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import job  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
from common import record  # noqa: E402
from kills import Findings, Job, Local, Reader, check_output, outputs_of, say, told  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

KINDS = ("cpu node", "gpu node", "actors", "driver", "head")
PAUSE_S = 0.04  # per file and step: a run works for some seconds
PATIENCE_S = 90.0  # for a driver to notice that the head is gone, and to end
STORE_BYTES = 80 << 20
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
CPU_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
GPU_NODE: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1, "object_store_memory": STORE_BYTES}


class Machines:
    """A cluster; its nodes die and come back."""

    def __init__(self) -> None:
        head = {**CPU_NODE, "include_dashboard": False, "_system_config": SOON}
        self.cluster = Cluster(True, head_node_args=head)
        self.nodes = {"cpu node": self.cluster.add_node(**CPU_NODE), "gpu node": self.cluster.add_node(**GPU_NODE)}

    @property
    def address(self) -> str:
        return self.cluster.address

    def kill(self, kind: str) -> None:
        """A machine that is gone: all its processes at once."""
        node = self.nodes.pop(kind)
        workers = _children(node)
        self.cluster.remove_node(node, allow_graceful=False)
        _kill(workers)

    def kill_head(self) -> None:
        """The head's machine, with the driver's connection to the cluster."""
        workers = _children(self.cluster.head_node)
        self.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        _kill(workers)

    def restore(self) -> None:
        for kind, what in (("cpu node", CPU_NODE), ("gpu node", GPU_NODE)):
            if kind not in self.nodes:
                self.nodes[kind] = self.cluster.add_node(**what)

    def actors(self) -> list[psutil.Process]:
        """Our workers, by the names that Ray gives processes."""
        nodes = [self.cluster.head_node, *self.nodes.values()]
        found: list[psutil.Process] = []
        for process in (p for node in nodes for p in _children(node)):
            with contextlib.suppress(psutil.Error):
                if "RayWorker" in (process.cmdline() or [""])[0]:
                    found.append(process)
        return found

    def close(self) -> None:
        workers = [p for node in (self.cluster.head_node, *self.nodes.values()) if node for p in _children(node)]
        self.cluster.shutdown()
        _kill(workers)


def _children(node: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for raylet in node.all_processes.get("raylet", ()):
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(raylet.process.pid).children(recursive=True)
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


class Chaos:
    """Rounds of it; their findings add up. source: the job's input. there: its destination."""

    def __init__(self, seed: int, source: Path, there: Local) -> None:
        self.random = random.Random(seed)
        self.source = source
        self.there = there
        self.findings = Findings()
        self.machines = Machines()
        self.killed = Counter[str]()
        self.sessions = Counter[str]()
        self.early = 0
        self.metrics = self._clean_metrics()

    def close(self) -> None:
        self.machines.close()

    def round(self, kind: str) -> None:
        self.there.clear()
        run = self._begin("ray")
        reader = Reader(self.there, self.findings)
        try:
            if self._wait(run, self.random.randint(0, job.FILES * 2 // 3)):
                self._strike(kind, run)
            else:
                self.early += 1
            self._finish(run, kind)
        finally:
            if run.alive():
                run.kill()
            reader.close()
        self._nothing_left()

    def _strike(self, kind: str, run: Job) -> None:
        self.killed[kind] += 1
        if kind in ("cpu node", "gpu node"):
            self.machines.kill(kind)
            self.machines.restore()
        elif kind == "actors":
            for _ in range(self.random.randint(1, 2)):  # not three: a split that takes three workers with it ends the run
                if actors := self.machines.actors():
                    _kill([self.random.choice(actors)])
                    time.sleep(self.random.uniform(0.0, 0.5))
        elif kind == "driver":
            run.kill()
        else:
            self.machines.kill_head()

    def _finish(self, run: Job, kind: str) -> None:
        """Until the output is whole: sessions follow each other where one that was struck could not go on."""
        if kind == "driver" and not run.alive():
            code, err = 1, "killed"
        else:
            code, err = self._end(run)
        if kind == "head":
            self.machines.close()
            self.machines = Machines()
        if code and kind in ("driver", "head"):
            again = self._begin(self.random.choice(("ray", "threads")))
            code, err = self._end(again)
        if code:
            self._note("failed_runs", f"{kind}: {err[-2000:]}")
            return
        check_output(self.there, self.findings, self.metrics)

    def _end(self, run: Job) -> tuple[int, str]:
        try:
            code, _, err = run.end(PATIENCE_S)
        except subprocess.TimeoutExpired:
            run.kill()
            return 1, f"no end within {PATIENCE_S:g} s"
        return code, err

    def _begin(self, engine: str) -> Job:
        self.sessions[engine] += 1
        where = ["--address", self.machines.address] if engine == "ray" else []
        return Job(self.source, self.there, "--engine", engine, "--model", "--pause", str(PAUSE_S), *where)

    def _wait(self, run: Job, files: int) -> bool:
        """Until so many files of output are there; False: the run ended before."""
        while run.alive():
            if len(outputs_of(self.there.names())) >= files:
                time.sleep(self.random.uniform(0.0, 0.3))
                return run.alive()
            time.sleep(0.02)
        return False

    def _nothing_left(self) -> None:
        deadline = time.monotonic() + 10
        while left := self.machines.actors():
            if time.monotonic() > deadline:
                self._note("left_processes", f"actors outlive their driver: {[p.pid for p in left]}")
                _kill(left)
                return
            time.sleep(0.05)

    def _clean_metrics(self) -> dict[str, Any]:
        """Of a run that nobody disturbs, on one machine."""
        code, err = self._end(self._begin("threads"))
        assert code == 0, err
        metrics = json.loads(self.there.read("_manifest.json") or b"{}")["metrics"]
        check_output(self.there, self.findings, metrics)
        assert self.findings.clean, self.findings
        return metrics

    def _note(self, what: str, text: str) -> None:
        setattr(self.findings, what, getattr(self.findings, what) + 1)
        self.findings.notes.append(text)


def kinds(random_: random.Random) -> Iterator[str]:
    """Each as often as the others, in an order of the seed's."""
    while True:
        yield from random_.sample(KINDS, len(KINDS))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help="only this one")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        job.prepare(source)
        chaos = Chaos(args.seed, source, Local(Path(folder) / "out"))
        try:
            order = kinds(random.Random(args.seed))
            for i in range(args.rounds):
                chaos.round(args.kind or next(order))
                say(f"{i + 1} rounds, {dict(chaos.killed)}, {chaos.early} too late", chaos.findings)
        finally:
            chaos.close()
    figures = {
        "rounds": args.rounds,
        "seed": args.seed,
        "ray": ray.__version__,
        "killed": dict(sorted(chaos.killed.items())),
        "over_before_the_kill": chaos.early,
        "sessions": dict(sorted(chaos.sessions.items())),
    } | told(chaos.findings)
    print(json.dumps(figures, indent=1))
    if args.record:
        record("reliability-ray_chaos", figures)
    return 0 if chaos.findings.clean else 1


if __name__ == "__main__":
    sys.exit(main())
