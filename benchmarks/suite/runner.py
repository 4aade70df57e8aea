"""Runs contestants against a workload: interleaved, each a process of its own, beside the machine's limits.

A *point* is one set of parameters (size, variant, scale, cores, devices). For each point every contestant first has a run in
which its memory is watched and its output compared with the reference in full; then come rounds of timed runs, all contestants
in turn, in an order that rotates, each round opened by measuring the machine's limits.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from suite import check, environments, inputs, limits
from suite.contract import Job, Peer, Pipeline, Workload, peer
from suite.notes import Notes

BENCHMARKS = Path(__file__).parents[1]
EVERY_S = 0.1
GRACE_S = 2.0  # what daemons that were told to end may take
KNOBS = BENCHMARKS / "results" / "suite" / "knobs"
KEEP = ("PATH", "HOME", "LANG", "LC_ALL", "JAVA_HOME", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "TZ")


LEAST_FREE_BYTES = 20 << 30  # of the disk: with less, what a run has left behind goes at once

SLOW, SLOW_RUNS = 4, 2  # contestants that take so many times as long as the quickest are timed so often only


class Failed(Exception):
    """A contestant ended badly, or not at all, or with another output. The first line says it, others are what it printed."""


@dataclass(frozen=True)
class Point:
    """What is measured at once. cores: which may be used. variant: whose parameters these are."""

    workload: Workload
    params: Mapping[str, Any]
    cores: tuple[int, ...]
    data: Path
    variant: str = ""


@dataclass(frozen=True)
class Contestant:
    peer: Peer
    form: str
    python: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return contestant_name(self.peer, self.form)


@dataclass(frozen=True)
class Measured:
    """One run. first_s: from process start to the first answer of the last stage. steady: rows per second between a quarter and
    three quarters of the rows, of the slowest stage. busy, busy_span: share of the devices' time, of the whole run and from
    their first call to their last. Memory is 0 unless it was watched.
    """

    wall_s: float
    cpu_s: float
    first_s: float | None
    steady_rows_per_s: float | None
    busy: float | None
    busy_span: float | None
    peak_bytes: int
    shared_bytes: int
    by_name: Mapping[str, int]
    left: Sequence[str]
    cpu_by: str
    told: Mapping[str, Any]


def contestant_name(peer: Peer, form: str) -> str:
    return peer.name if form == "same" else f"{peer.name}:{form}"


def all_peers() -> list[str]:
    """By the files that declare a PEER."""
    folder = Path(__file__).parent / "peers"
    names = [path.stem for path in folder.glob("[a-z]*.py") if "\nPEER = " in path.read_text()]
    first = ["headrace", "sequential", "threads", "processes"]
    return first + sorted(name for name in names if name not in first)


def all_workloads() -> list[str]:
    folder = Path(__file__).parent / "workloads"
    return sorted(path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py"))


def chosen(names: Sequence[str]) -> list[tuple[Peer, str]]:
    """`peer` stands for all of its forms, `peer:form` for one."""
    found: list[tuple[Peer, str]] = []
    for name in names:
        base, _, form = name.partition(":")
        declared = peer(base)
        if form and form not in declared.forms:
            raise SystemExit(f"{base} has no form {form!r}; it has {', '.join(declared.forms)}")
        found += [(declared, f) for f in ([form] if form else declared.forms)]
    return found


def prepare(
    of: Sequence[tuple[Peer, str]], point: Point, knobs: Mapping[str, Any] | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """Who can run, with an environment; and why the others can't. knobs: over what the search found."""
    pipelines = point.workload.pipelines(str(point.data), point.params)
    able: list[Contestant] = []
    reasons: dict[str, str] = {}
    for declared, form in of:
        name = contestant_name(declared, form)
        reason = declared.why_not(pipelines, form, point.params) or declared.needs()
        if reason:
            reasons[name] = reason
            continue
        try:
            python = environments.python(declared.environment)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reasons[name] = str(error)
            continue
        best = best_knobs(declared, form, point)
        given = {knob: value for knob, value in (knobs or {}).items() if knob in best}
        able.append(Contestant(declared, form, python, {**best, **given}))
    return able, reasons


def best_knobs(declared: Peer, form: str, point: Point) -> dict[str, Any]:
    """Its defaults, and over them what a search found: for this variant and form, for the variant, or for the workload."""
    path = KNOBS / f"{declared.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    name = point.workload.name
    keys = (knobs_key(point, form), knobs_key(point, "same"), name)
    best = next((found[key]["best"] for key in keys if key in found), {})
    return {**declared.knobs(name), **best}


def knobs_key(point: Point, form: str) -> str:
    """What a search's findings are kept by."""
    variant = f"/{point.variant}" if point.variant else ""
    return f"{point.workload.name}{variant}{'' if form == 'same' else ':' + form}"


# -- one run


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """A contestant's: nothing of ours that could steer it."""
    kept = {name: os.environ[name] for name in KEEP if name in os.environ}
    return {**kept, "PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1", **more}


@contextlib.contextmanager
def serving(point: Point) -> Iterator[dict[str, str]]:
    if point.workload.serve is None:
        yield {}
        return
    with point.workload.serve(str(point.data), point.params) as env:
        yield env


def run_once(
    one: Contestant, point: Point, env: Mapping[str, str], *, timeout_s: float, watched: bool = False, full: bool = False
) -> Measured:
    """One process from start to end; its output is counted, and compared in full if `full`. Raises Failed."""
    with _scratch() as folder:
        for name in ("log", "tmp"):
            (folder / name).mkdir()
        job = Job(
            point.workload.name, point.params, str(point.data), str(folder / "out"), one.form, len(point.cores), dict(one.knobs)
        )
        job.write(folder / "job")
        places = {"SUITE_LOG": f"{folder}/log", "SUITE_SCRATCH": f"{folder}/tmp", "TMPDIR": f"{folder}/tmp"}
        order = {
            "argv": [one.python, "-m", "suite.program", one.peer.name, f"{folder}/job"],
            "env": environment({**env, **places}),
            "said": f"{folder}/said",
            "found": f"{folder}/found",
            "cores": list(point.cores),
            "timeout_s": timeout_s,
            "every_s": EVERY_S if watched else 0,
            "grace_s": GRACE_S,
        }
        (folder / "order").write_text(json.dumps(order))
        subprocess.run(
            [sys.executable, "-m", "suite.supervise", f"{folder}/order"], env=environment({}), cwd=folder, check=True
        )
        found = json.loads((folder / "found").read_text())
        told = _told(one, found, (folder / "said").read_text(errors="replace"), timeout_s)
        measured = _measured(point, found, told, Notes.read(folder / "log"))
        _check(one, point, folder / "out", told, full=full)
        return measured


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for one run. What is in it gets to the disk, and stays until `clear`: for minutes after files were removed ext4
    makes new ones at a tenth of its speed, which would be the next contestant's loss.
    """
    folder = Path(tempfile.mkdtemp(prefix="suite-"))
    _LEFT.append(folder)
    try:
        yield folder
    finally:
        os.sync()
        if shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
            clear()


_LEFT: list[Path] = []


@atexit.register
def clear() -> None:
    """Remove what runs have left behind."""
    while _LEFT:
        shutil.rmtree(_LEFT.pop(), ignore_errors=True)


def _told(one: Contestant, found: Mapping[str, Any], said: str, timeout_s: float) -> dict[str, Any]:
    if found["timed_out"]:
        raise Failed(f"did not end within {timeout_s:g} s\n{said[-1500:].strip()}")
    lines = [line for line in said.splitlines() if line.startswith("TOLD ")]
    if found["code"] or not lines:
        raise Failed(f"ended with {found['code']}: {_last_words(said)}\n{said[-1500:].strip()}")
    return json.loads(lines[-1][5:])


def _last_words(said: str) -> str:
    """The line that tells most of why a program ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("Extension modules:")]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return (fatal or lines or ["it said nothing"])[-1][:200]


def _measured(point: Point, found: Mapping[str, Any], told: Mapping[str, Any], notes: Notes) -> Measured:
    pipeline = point.workload.pipelines(str(point.data), point.params)[0]
    first = notes.first_answer(pipeline.steps[-1].name) or told.get("first_at")
    busy = notes.busy(found["wall_s"], sum(model.devices for model in pipeline.models if model.rate))
    return Measured(
        found["wall_s"],
        found["cpu_s"],
        None if first is None else first - found["begun"],
        notes.steady(),
        busy[0] if busy else None,
        busy[1] if busy else None,
        found["peak_bytes"],
        found["shared_bytes"],
        found["by_name"],
        found["left"],
        found["cpu_by"],
        told,
    )


def _check(one: Contestant, point: Point, out: Path, told: Mapping[str, Any], *, full: bool) -> None:
    workload = point.workload
    reference = inputs.reference(workload, point.params, point.data)
    pipelines = workload.pipelines(str(point.data), point.params)
    if not full:
        rows, wanted = check.count(out), reference.told["rows"]
        if rows != wanted:
            raise Failed(f"{rows} rows instead of {wanted}")
        return
    near = {**workload.tolerance, **(workload.own_tolerance if one.form != "same" else {})}
    different = reference.differences(out, workload.key, near, told.get("metrics", {}))
    different += _names_differ(pipelines, out)
    if different:
        raise Failed("another output: " + "; ".join(different))


def _names_differ(pipelines: Sequence[Pipeline], out: Path) -> list[str]:
    """Where each input owes an output of its name."""
    (first, *others) = pipelines
    if others or not first.per_input:
        return []
    wanted = {Path(path).name for path in first.files()}
    there = {path.name for path in check.parts(out)}
    return [] if wanted == there else [f"{len(there)} files, not one for each of {len(wanted)} inputs, or other names"]


def make_reference(point: Point, env: Mapping[str, str], timeout_s: float) -> None:
    """By plain Python, unless it is there."""
    workload = point.workload
    reference = inputs.reference(workload, point.params, point.data)
    if reference.there:
        return
    from suite.program import run_peer

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        job = Job(workload.name, point.params, str(point.data), str(out), "same", len(point.cores), {})
        told = run_peer("sequential", job, environment({**env, "SUITE_LOG": ""}), timeout_s)
        near = {**workload.tolerance, **workload.own_tolerance}
        reference.keep(out, workload.key, list(near), told["metrics"])


# -- rounds


def compare(
    able: Sequence[Contestant], point: Point, *, runs: int, timeout_s: float, touch_bytes: int, limit_s: float
) -> dict[str, Any]:
    """All contestants at a point. A contestant that fails is out, and says why."""
    with serving(point) as env:
        make_reference(point, env, timeout_s * 5)
        watched: dict[str, Measured] = {}
        failed: dict[str, str] = {}
        timed: dict[str, list[Measured]] = {one.name: [] for one in able}
        measured_limits: list[limits.Limits] = []
        inputs.warm(point.data, touch_bytes)
        for one in able:
            with _failing(one, failed):
                watched[one.name] = run_once(one, point, env, timeout_s=timeout_s, watched=True, full=True)
                say(f"{one.name}: {watched[one.name].wall_s:.2f} s while watched, {watched[one.name].peak_bytes >> 20} MiB")
        quickest = min((m.wall_s for m in watched.values()), default=0.0)
        slow = {name for name, m in watched.items() if m.wall_s > SLOW * quickest}
        for round_ in range(runs):
            inputs.warm(point.data, touch_bytes)
            measured_limits.append(_limits(point, env, limit_s))
            turn = round_ % max(1, len(able))
            for one in [*able[turn:], *able[:turn]]:
                if one.name in failed or (one.name in slow and round_ >= SLOW_RUNS):
                    continue
                with _failing(one, failed):
                    timed[one.name].append(run_once(one, point, env, timeout_s=timeout_s))
                    say(f"{one.name}: {timed[one.name][-1].wall_s:.2f} s")
    return _result(able, point, watched, timed, failed, measured_limits)


@contextlib.contextmanager
def _failing(one: Contestant, failed: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        failed[one.name] = str(error).splitlines()[0]
        say(f"{one.name}: {error}")


def _limits(point: Point, env: Mapping[str, str], seconds: float) -> limits.Limits:
    job = Job(point.workload.name, point.params, str(point.data), "", "same", 1)
    return limits.measure(job, point.cores, environment(env), seconds)


def _result(
    able: Sequence[Contestant],
    point: Point,
    watched: Mapping[str, Measured],
    timed: Mapping[str, Sequence[Measured]],
    failed: Mapping[str, str],
    measured: Sequence[limits.Limits],
) -> dict[str, Any]:
    cores, counts = len(point.cores), point.workload.io_counts
    models = point.workload.pipelines(str(point.data), point.params)[0].models
    start = point.workload.start_s if all(model.rate for model in models) else None
    alone = [one.ideal_s(cores, io_counts=counts, start_s=start) for one in measured]
    together = [one.ideal_s(cores, io_counts=counts, start_s=start, together=True) for one in measured]
    ideal = median(alone) if alone else None
    contestants: dict[str, Any] = {}
    for one in able:
        if one.name in failed:
            contestants[one.name] = {"title": one.peer.title, "failed": failed[one.name]}
            continue
        runs = timed[one.name]
        memory = watched[one.name]
        contestants[one.name] = {
            "title": one.peer.title,
            "form": one.peer.forms[one.form],
            "knobs": dict(one.knobs),
            "output": "equal",
            "summary": summary(runs, ideal),
            "peak_mb": round(memory.peak_bytes / 1e6),
            "memory": {"shared_mb": round(memory.shared_bytes / 1e6), "by_name": dict(memory.by_name)},
            "spilled_mb": round(memory.told.get("spilled_bytes", 0) / 1e6),
            "metrics": dict(memory.told.get("metrics", {})),
            "report": memory.told.get("report", ""),
            "runs": [{k: v for k, v in asdict(run).items() if k not in _OF_WATCHED} for run in runs],
        }
    return {
        "rows": measured[0].rows if measured else None,
        "input_mb": round(inputs.size_bytes(point.data) / 1e6),
        "ideal_s": ideal,
        "ideal_together_s": median(together) if together else None,
        "limits": [asdict(one) for one in measured],
        "contestants": contestants,
    }


_OF_WATCHED = ("peak_bytes", "shared_bytes", "by_name", "told")


def summary(runs: Sequence[Measured], ideal_s: float | None) -> dict[str, Any]:
    """Of each measure the median, and its least and most."""
    found: dict[str, Any] = {}
    for name in ("wall_s", "cpu_s", "first_s", "steady_rows_per_s", "busy", "busy_span"):
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        if values:
            found[name] = {"median": round(median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4)}
    if ideal_s and runs:
        found["share_of_ideal"] = round(ideal_s / median(run.wall_s for run in runs), 4)
    return found


def say(text: str) -> None:
    print(f"suite: {text}", file=sys.stderr, flush=True)
