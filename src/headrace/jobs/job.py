"""A job: one action of a dataset, to be run later; and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from headrace.api.dataset import Dataset
from headrace.core.errors import HeadraceError, PlanError
from headrace.observe.run import Run

P = ParamSpec("P")
ACTIONS = ("write_parquet", "write_csv", "write_json", "run")
MOST_NAMED = 10  # failed jobs that an error names


class Job:
    """A write of a dataset that `run_jobs` will call: `Job(ds.write_parquet, "out/eu", outputs="per_input")`.

    name: the destination, or what is called where there is none. Raises PlanError for anything but `write_parquet`,
    `write_csv`, `write_json` or `run` of a Dataset.
    """

    def __init__(self, action: Callable[P, Run], *args: P.args, **kwargs: P.kwargs) -> None:
        owner = getattr(action, "__self__", None)
        name = getattr(action, "__name__", "")
        if not isinstance(owner, Dataset) or name not in ACTIONS:
            raise PlanError(
                f"a job is made of a dataset's {', '.join(ACTIONS)}, and this is {action!r}",
                hint='give the method, not its result: hr.Job(ds.write_parquet, "out/")',
            )
        self.dataset = owner
        self.action = name
        self.args: tuple[Any, ...] = args
        self.options: dict[str, Any] = dict(kwargs)

    @property
    def destination(self) -> str | None:
        """Where it writes; None when nothing is kept."""
        if self.action == "run":
            return None
        found = self.args[0] if self.args else self.options.get("path")
        return None if found is None else str(found)

    @property
    def name(self) -> str:
        return self.destination or f"{self.dataset!r}.{self.action}"

    def run(self, **more: Any) -> Run:
        """Run it now. more: options where the job gives none."""
        return getattr(self.dataset, self.action)(*self.args, **{**more, **self.options})

    def __repr__(self) -> str:
        return f"Job({self.action}, {self.name!r})"


@dataclass(frozen=True, slots=True)
class JobResult:
    """What became of a job: either `run` or `error` is there. wall_s: of the attempt that ended it."""

    job: Job
    run: Run | None
    error: Exception | None
    wall_s: float

    @property
    def ok(self) -> bool:
        return self.error is None


class JobsFailed(HeadraceError):
    """Some jobs failed; all others are done. results: of all jobs, in the order in which they were given."""

    results: Sequence[JobResult] = ()

    @classmethod
    def of(cls, results: Sequence[JobResult]) -> JobsFailed:
        failed = [r for r in results if not r.ok]
        where = tuple((r.job.name, first_line(r.error)) for r in failed[:MOST_NAMED])
        more = f", the first {MOST_NAMED} of them" if len(failed) > MOST_NAMED else ""
        hint = "the same call again does what is left: finished jobs are passed over; this error's `results` has all of theirs"
        error = cls(f"{len(failed)} of {len(results)} jobs failed{more}", where=where, hint=hint)
        error.results = tuple(results)
        return error


def first_line(error: Exception | None) -> str:
    """What an error says in short."""
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__
