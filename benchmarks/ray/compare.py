"""Headrace on Ray beside Ray Data: the same cluster, functions and inputs.

    python benchmarks/ray/compare.py [--runs 3] [--only images-2000,...] [--small] [--data DIR]
    python benchmarks/ray/compare.py --search     find Ray Data's best knobs, and write results/ray-data-knobs.json

A local cluster of one node: 2 CPUs, a custom resource "sim" for the device, an object store of 2 GiB; a fresh one for every
run, and the contestants in turn. A round is a run that writes Parquet, one on LONGER times the input, and one that only takes
the first batch. Headrace runs with default options; Ray Data with the knobs that the search found. Steady rate: the rows that
the longer input has more, over the seconds that it takes longer; so starting and ending, and work that is only piled up, don't
count, for any engine. First batch: from the driver's connection to the cluster, so that importing the engine counts; from the
call alone, too. Memory: proportional set sizes of driver, workers and object store on the longer input; daemons apart; a
run of its own.

To reach: twice Ray Data's steady rate or 95% of the machine's limit (the device's rate, or two processes that do the CPU work
without any engine, measured in every round), whichever is smaller; first batch sooner; half its peak memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(1, str(HERE.parent))

import inputs  # noqa: E402
import measure  # noqa: E402
import ray_data  # noqa: E402
from common import RESULTS, median, record  # noqa: E402

KNOBS = RESULTS / "ray-data-knobs.json"
STORE_BYTES = 2 << 30
CPUS = 2
TIMEOUT_S = 120
LONGER = 3
MODEL_STAGE = {"images": "device", "tabular": "score", "small_files": "double"}
PROGRAMS = {"headrace": "ours.py", "ray data": "ray_data.py"}


@dataclass(frozen=True)
class Case:
    """files, rows: of the input, rows a file; the longer one has LONGER times the files. rate: of the device, images a second.
    first_rows: of the first batch.
    """

    name: str
    workload: str
    files: int
    rows: int
    first_rows: int
    rate: float = 0.0


CASES = (
    Case("images-2000", "images", 6, 500, 64, 2000),
    Case("images-300", "images", 4, 500, 64, 300),
    Case("tabular", "tabular", 16, 50_000, 1024),
    Case("small_files", "small_files", 1000, 100, 100),
)
SMALL = (
    Case("images-2000", "images", 4, 250, 64, 2000),
    Case("images-300", "images", 2, 250, 64, 300),
    Case("tabular", "tabular", 8, 10_000, 1024),
    Case("small_files", "small_files", 200, 100, 100),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--small", action="store_true", help="small inputs, nothing recorded")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--data", type=Path, help="where inputs are kept for the next time")
    parser.add_argument("--engines", default=",".join(PROGRAMS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clusters end with us
    folder = Path(tempfile.mkdtemp())
    data = options.data or folder / "data"
    cases = [
        c
        for c in (SMALL if options.small or options.search else CASES)
        if not options.only or c.name in options.only.split(",")
    ]
    try:
        if options.search:
            search(cases, data, folder)
        else:
            compare(cases, data, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- comparing


def compare(cases: list[Case], data: Path, folder: Path, options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {}
    engines = options.engines.split(",")
    for case in cases:
        made = [inputs.make(data, case.workload, case.files * times, case.rows) for times in (1, LONGER)]
        knobs = {"headrace": {}, "ray data": best_knobs(case)}
        rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        bare: list[float] = []
        memory = {engine: memory_round(engine, case, made[1], folder, knobs[engine]) for engine in engines}
        for _ in range(options.runs):
            shutil.rmtree(folder / "bare", ignore_errors=True)
            bare.append(measure.limit(case.workload, made[1], folder / "bare", CPUS))
            for engine in engines:
                rounds[engine].append(one_round(engine, case, made, folder, knobs[engine]))
                print(case.name, engine, json.dumps(rounds[engine][-1]), flush=True)
        figures[case.name] = summarise(case, rounds, memory, bare, knobs["ray data"])
        print(case.name, json.dumps(figures[case.name].get("reached")), flush=True)
    if options.small or options.only or len(engines) < len(PROGRAMS):
        print(json.dumps(figures, indent=2))
        return
    import ray

    figures["cluster"] = {"ray": ray.__version__, "cpus": CPUS, "resources": {"sim": 1}, "object_store_mb": STORE_BYTES >> 20}
    record("ray-compare", figures)


def memory_round(engine: str, case: Case, data: Path, folder: Path, knobs: dict[str, Any]) -> dict[str, Any]:
    """Peaks of a run that writes. A run of its own, and the first: looking costs a twentieth of the machine."""
    with measure.cluster(CPUS, STORE_BYTES) as cluster:
        _, memory = run(engine, case, data, folder, knobs, cluster, "write", watched=True)
    return {
        "peak_mb": round(memory.both / 1e6),
        "peak_processes_mb": round(memory.work / 1e6),
        "peak_store_mb": round(memory.store / 1e6),
        "daemons_mb": round(memory.daemons / 1e6),
        "processes_at_peak_mb": {name: round(size / 1e6) for name, size in sorted(memory.by_name.items())},
    }


def one_round(engine: str, case: Case, data: list[Path], folder: Path, knobs: dict[str, Any]) -> dict[str, Any]:
    """Runs that write the input and the longer one, a run that takes the first batch. Each on a cluster of its own: Ray has
    workers ready for a cluster's first driver only, and starting must cost both the same to drop out of the steady rate.
    """
    at = (folder, knobs)
    with measure.cluster(CPUS, STORE_BYTES) as cluster:
        short, _ = run(engine, case, data[0], *at, cluster, "write")
    with measure.cluster(CPUS, STORE_BYTES) as cluster:
        long, _ = run(engine, case, data[1], *at, cluster, "write")
    with measure.cluster(CPUS, STORE_BYTES) as cluster:
        first, _ = run(engine, case, data[0], *at, cluster, "first")
    walls = [told["finished"] - told["called"] for told in (short, long)]
    answered = measure.first_answer(folder / "log-write", MODEL_STAGE[case.workload])
    rows, digest = measure.digest(folder / "out")
    return {
        "wall_s": walls[0],
        "wall_longer_s": walls[1],
        "process_s": short["ended"] - short["started"],
        "steady_rows_per_s": case.files * case.rows * (LONGER - 1) / (walls[1] - walls[0]),
        "first_model_answer_s": answered - long["called"],
        "first_batch_s": first["first"] - first["connected"],
        "first_batch_from_call_s": first["first"] - first["called"],
        "first_batch_from_process_start_s": first["first"] - first["started"],
        "output": f"{rows} rows, {digest}",
    }


def run(
    engine: str,
    case: Case,
    data: Path,
    folder: Path,
    knobs: dict[str, Any],
    cluster: measure.Cluster,
    mode: str,
    *,
    watched: bool = False,
) -> tuple[dict[str, Any], measure.Memory]:
    """One driver from start to end. Raises RuntimeError when it fails, or takes longer than TIMEOUT_S."""
    out, log = folder / "out", folder / f"log-{mode}"
    if mode == "write":
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir()
    job = {
        "address": cluster.address,
        "workload": case.workload,
        "data": str(data),
        "out": str(out),
        "log": str(log),
        "rate": case.rate,
        "first_rows": case.first_rows,
        "mode": mode,
        "knobs": knobs,
    }
    started = time.time()
    with open(folder / "said", "w+") as said:
        argv = [sys.executable, str(HERE / PROGRAMS[engine]), json.dumps(job)]
        child = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT)
        try:
            with measure.watching(cluster, child.pid, 0.2 if watched else 1e6) as memory:
                child.wait(TIMEOUT_S)
                ended = time.time()
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise RuntimeError(f"{engine} {case.name} {knobs} took longer than {TIMEOUT_S} s") from None
        said.seek(0)
        text = said.read()
    told = [line for line in text.splitlines() if line.startswith("TOLD ")]
    if child.returncode or not told:
        raise RuntimeError(f"{engine} {case.name} {knobs} failed:\n{text[-3000:]}")
    return {**json.loads(told[-1][5:]), "started": started, "ended": ended}, memory


def summarise(
    case: Case,
    rounds: dict[str, list[dict[str, Any]]],
    memory: dict[str, dict[str, Any]],
    bare: list[float],
    knobs: dict[str, Any],
) -> dict[str, Any]:
    limit = min([median(bare), case.rate] if case.rate else [median(bare)])
    found: dict[str, Any] = {
        "input": {"files": case.files, "rows_a_file": case.rows, "longer": LONGER},
        "limit_rows_per_s": round(limit, 1),
        "cpu_limit_rows_per_s_all": [round(b, 1) for b in bare],
        "ray_data_knobs": knobs,
    }
    for engine, done in rounds.items():
        of: dict[str, Any] = {}
        for name in (k for k, v in done[0].items() if isinstance(v, float)):
            values = [r[name] for r in done]
            of[name] = {"median": round(median(values), 3), "all": [round(v, 3) for v in values]}
        of["steady_share_of_limit"] = round(of["steady_rows_per_s"]["median"] / limit, 3)
        found[engine] = {**of, **memory[engine], "outputs": sorted({r["output"] for r in done})}
    if len(rounds) == len(PROGRAMS):
        found |= _beside(found["headrace"], found["ray data"])
    return found


def _beside(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ratios of Headrace to Ray Data, and what was reached."""

    def ratio(name: str) -> float:
        return round(ours[name]["median"] / theirs[name]["median"], 3)

    steady, first = ratio("steady_rows_per_s"), ratio("first_batch_s")
    memory = round(ours["peak_mb"] / theirs["peak_mb"], 3)
    return {
        "outputs_equal": ours["outputs"] == theirs["outputs"] and len(ours["outputs"]) == 1,
        "ratio": {"wall": ratio("wall_s"), "steady": steady, "first_batch": first, "peak_memory": memory},
        "reached": {
            "throughput": steady >= 2 or ours["steady_share_of_limit"] >= 0.95,
            "first_batch": first < 1,
            "memory": memory <= 0.5,
        },
    }


# -- searching


def best_knobs(case: Case) -> dict[str, Any]:
    """What the search found for the case, or for another one of its workload."""
    found = json.loads(KNOBS.read_text())["figures"] if KNOBS.exists() else {}
    of = {c.workload: found[c.name]["best"] for c in CASES if c.name in found}
    return {**ray_data.DEFAULTS[case.workload], **of.get(case.workload, {}), **found.get(case.name, {}).get("best", {})}


def search(cases: list[Case], data: Path, folder: Path) -> None:
    """One knob after the other, each value beside the best so far, in turns; it stays when it is 3% quicker twice."""
    for case in cases:
        made = inputs.make(data, case.workload, case.files, case.rows)
        with measure.cluster(CPUS, STORE_BYTES) as cluster:
            found = _search_case(case, lambda knobs, at=(case, made, cluster): _wall(*at, folder, knobs))
        print(case.name, "best", found["best"], flush=True)
        before = json.loads(KNOBS.read_text())["figures"] if KNOBS.exists() else {}
        record(KNOBS.stem, {**before, case.name: found})


def _search_case(case: Case, wall: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    best = dict(ray_data.DEFAULTS[case.workload])
    wall(best)  # warms the page cache and the cluster
    tried: list[dict[str, Any]] = []
    for knob, values in ray_data.SEARCH[case.workload]:
        for value in values:
            other = {**best, knob: value}
            before, with_it = [wall(best)], [wall(other)]
            if with_it[0] < before[0] * 0.97:
                before, with_it = [*before, wall(best)], [*with_it, wall(other)]
            better = all(b < a * 0.97 for a, b in zip(before, with_it, strict=True))
            tried.append({"knob": knob, "value": value, "wall_s": with_it, "best_so_far_s": before, "stays": better})
            print(case.name, tried[-1], flush=True)
            if better:
                best = other
    return {"best": best, "tried": tried}


def _wall(case: Case, made: Path, cluster: measure.Cluster, folder: Path, knobs: dict[str, Any]) -> float:
    try:
        told, _ = run("ray data", case, made, folder, knobs, cluster, "write")
    except RuntimeError as error:
        print(str(error)[-1500:], flush=True)
        return 1e9
    return round(told["finished"] - told["called"], 3)


if __name__ == "__main__":
    main()
