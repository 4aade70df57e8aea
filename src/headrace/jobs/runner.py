"""Running jobs: small ones one per core, each whole in one process, all others one after the other with the whole machine.

A small run is over in milliseconds, most of which hold the interpreter's lock and none of which is worth workers of its own; so
processes are started once, and take job after job. What must not live here: what a run is and how it survives; a job is an
ordinary run, with its own log in its own destination.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from headrace.api.planning import parse_options
from headrace.connectors.sinks.files import normalise
from headrace.connectors.storage import is_remote
from headrace.core.errors import PlanError
from headrace.core.options import Progress
from headrace.jobs.crew import Crew
from headrace.jobs.job import Job, JobResult, JobsFailed
from headrace.jobs.member import is_small
from headrace.jobs.telling import Teller
from headrace.plan.nodes import Predict
from headrace.runtime.machine import block_budget_bytes, detect_machine

LEAST_MEMORY_BYTES = 64 << 20  # for the blocks of a job that shares the machine
OWN_MACHINE = ("engine", "address", "cpus", "devices", "timeout", "execution")  # a job that says so is run by itself


def run_jobs(jobs: Iterable[Job], *, progress: Progress = "auto") -> list[JobResult]:
    """Run all jobs, and return what became of them, in order.

    Small jobs (little input, no device) run at the same time, one per core, where there are as many; all others after them,
    each with the whole machine. Every job is a run of its own, exactly once: kill the program, make the same call again, and
    what was finished is passed over, what was begun goes on. A job that fails, or whose process dies, does not touch the
    others; one that died is tried again by itself, in worker processes, as any run after a crash.

    Raises JobsFailed, after all have ended, if any failed; PlanError, before any begins, when two have the same destination or
    one's lies in another's.
    """
    todo = list(jobs)
    _check(todo, progress)
    machine = detect_machine()
    shared = [i for i, job in enumerate(todo) if _may_share(job, bool(machine.devices))]
    results: dict[int, JobResult] = {}
    died: set[int] = set()  # their processes: their code must not run in this one
    with Teller(len(todo), progress) as teller:
        if len(shared) >= machine.cores > 1 and Crew.possible():
            memory = max(LEAST_MEMORY_BYTES, block_budget_bytes(machine) // machine.cores)
            with Crew(machine.cores, memory) as crew:
                for outcome in crew.run([(i, todo[i]) for i in shared]):
                    if outcome.ended:
                        result = JobResult(todo[outcome.job], outcome.run, outcome.error, outcome.wall_s)
                        results[outcome.job] = teller.told(result)
                    elif outcome.died:
                        died.add(outcome.job)
        for i, job in enumerate(todo):
            if i not in results:
                results[i] = teller.told(_alone(job, {"engine": "processes"} if i in died else {}))
    found = [results[i] for i in range(len(todo))]
    if not all(r.ok for r in found):
        raise JobsFailed.of(found)
    return found


def _check(jobs: Sequence[Job], progress: Progress) -> None:
    parse_options({"progress": progress})
    places: list[str] = []
    for job in jobs:
        if not isinstance(job, Job):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(f"this is no job: {job!r}", hint='make one of it: hr.Job(ds.write_parquet, "out/")')
        place = job.destination
        if place is None:
            continue
        place = normalise(place)
        places.append(f"{place if is_remote(place) else os.path.realpath(place)}/")
    for one, other in pairwise(sorted(places)):
        if one == other:
            raise PlanError("two jobs have the same destination", where=(("destination", one),), hint="give each its own")
        if other.startswith(one):
            where = (("destination", one), ("another one in it", other))
            hint = "give each a folder beside the others: whoever reads the outer one reads both"
            raise PlanError("a job's destination lies in another job's", where=where, hint=hint)


def _may_share(job: Job, has_devices: bool) -> bool:
    """May it run in a process that has one core and no device?"""
    if any(job.options.get(name) not in (None, "auto", "streaming") for name in OWN_MACHINE):
        return False
    plan = job.dataset._plan  # pyright: ignore[reportPrivateUsage]
    if not hasattr(plan.read.source, "covers"):  # what lies in memory is not sent to find out
        try:
            if not is_small(job):
                return False
        except Exception:  # the user's own source: the job fails by itself
            return False
    models = [op for op in plan.ops if isinstance(op, Predict)]
    return not any(m.device != "cpu" and (has_devices or m.device != "auto") for m in models)


def _alone(job: Job, more: Mapping[str, Any]) -> JobResult:
    began = time.perf_counter()
    try:
        run, error = job.run(progress="quiet", **more), None
    except Exception as e:
        run, error = None, e
    return JobResult(job, run, error, time.perf_counter() - began)
