"""What a workload is, what a job is, and what a peer is given and must do. Imported by everybody, so: the standard library
only.

A *workload* (`workloads/<name>.py`, a module-level WORKLOAD) makes its input and describes its pipelines as data. A *peer*
(`peers/<name>.py`, a module-level PEER and `run(job)`) translates any such pipeline into its own words. Neither knows the
other; adding one is adding one file. A *contestant* is a peer in one of its forms, written `peer` or `peer:form`.

A contestant is run as a process of its own, `<python of its environment> -m suite.program <peer> <job file>`, with
`benchmarks/` in PYTHONPATH (worker processes inherit it, so functions of `suite.workloads.*` pickle by name), with the CPU
affinity that it may use, and with
    SUITE_LOG       folder where functions, models and devices note their calls (this module does it)
    SUITE_SCRATCH   folder for whatever else it needs (spilled blocks, clusters, intermediate data); removed afterwards
    TMPDIR          the same
    AWS_*           where the source is s3://
It must leave Parquet files anywhere under `job.out`, have ended its own servers and clusters, and return (from `run`) what it
has to tell as a dict that json takes: `metrics` are checked; `first_at` (time.time()) says when the first answer was there, for
forms whose last step is not the workload's own function; `spilled_bytes`: of blocks that it moved to disk. Everything from
process start to process end is timed.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, Any]  # column -> NumPy array, of the same rows; strings and bytes are object arrays

# -- pipelines, as data


@dataclass(frozen=True)
class Column:
    """Type of a column that a step makes. dtype: as NumPy names it ("uint8", "float32", "int64"), or "string".
    shape: of one row's tensor; () for a scalar.
    """

    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Map:
    """A CPU step: `step(batch)` calls the user's function on the columns that it reads, and returns the columns that it makes,
    as many rows. All others are carried over untouched, in whatever way the engine carries best; `drops` are not needed after
    it.

    fn: of a module, called as fn({column: array}, *args). May get any number of rows, in any grouping.
    rows: a batch size at which it works well, for engines that ask for one.
    own: what it does, for an engine that has its own way: {"kind": "decode", "resize": 256, "crop": 224}.
    """

    name: str
    fn: Callable[..., dict[str, np.ndarray]]
    reads: tuple[str, ...]
    writes: Mapping[str, Column]
    args: tuple[Any, ...] = ()
    drops: tuple[str, ...] = ()
    rows: int = 1024
    own: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Arrays) -> dict[str, np.ndarray]:
        begun = time.time()
        made = self.fn({name: batch[name] for name in self.reads}, *self.args)
        note(self.name, begun, len(next(iter(made.values()))))
        return made


@dataclass(frozen=True)
class Expand:
    """A CPU step that makes any number of rows of each. `step(batch)` returns (columns, parents): the columns that it makes,
    and for each of their rows the index in the batch of the row that it came from (ascending). Carried columns are taken by
    that index.
    """

    name: str
    fn: Callable[..., tuple[dict[str, np.ndarray], np.ndarray]]
    reads: tuple[str, ...]
    writes: Mapping[str, Column]
    args: tuple[Any, ...] = ()
    drops: tuple[str, ...] = ()
    rows: int = 1
    own: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Arrays) -> tuple[dict[str, np.ndarray], np.ndarray]:
        begun = time.time()
        made, parents = self.fn({name: batch[name] for name in self.reads}, *self.args)
        note(self.name, begun, len(parents))
        return made, parents


@dataclass(frozen=True)
class Model:
    """A step with state: `loaded = model.load(threads)` once per worker, then `loaded(batch)` -> {output: array}.

    make: a class, constructed as make(*args); if it has an attribute `takes_threads`, with threads=... too (at most so many
        threads may compute in one call; all else is the constructor's).
    input: one column: the object gets its bare array; several: a dict of arrays. It returns one array of as many rows.
    writes: {output: type}. Exactly one output.
    device: it needs a device, of which there are `devices`; it may be loaded several times, but devices are what limits.
    rate: of a simulated device, rows a second of each. None: it computes on CPUs.
    own: as of Map: {"kind": "xgboost", "path": ...}, {"kind": "sklearn", "path": ...}, {"kind": "sentence-transformer", ...}.
    """

    name: str
    make: Callable[..., Callable[..., np.ndarray]]
    input: str | tuple[str, ...]
    writes: Mapping[str, Column]
    args: tuple[Any, ...] = ()
    drops: tuple[str, ...] = ()
    rows: int = 64
    device: bool = False
    devices: int = 1
    rate: float | None = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input,) if isinstance(self.input, str) else self.input

    @property
    def output(self) -> str:
        return next(iter(self.writes))

    def load(self, threads: int = 1) -> Loaded:
        return Loaded(self, threads)


class Loaded:
    """A model in a worker: {column: array} -> {output: array}; `predict` takes and returns what the user's object does."""

    def __init__(self, model: Model, threads: int = 1) -> None:
        self._model = model
        more = {"threads": threads} if getattr(model.make, "takes_threads", False) else {}
        self._object = model.make(*model.args, **more)

    def __call__(self, batch: Arrays) -> dict[str, np.ndarray]:
        wanted = self._model.input
        return {self._model.output: self.predict(batch[wanted] if isinstance(wanted, str) else {n: batch[n] for n in wanted})}

    def predict(self, given: Any) -> np.ndarray:
        begun = time.time()
        answer = self._object(given)
        note(self._model.name, begun, len(answer))
        return answer


Step = Map | Expand | Model


@dataclass(frozen=True)
class Pipeline:
    """source: a folder of Parquet files, or an s3:// prefix. steps: in order. The output has every column of the source and of
    the steps but those that steps drop.

    metrics: {"auc": ..., "logloss": ...} of (score, label) columns; a contestant reports them as `metrics`, by these names.
    per_input: every input file must have one output file, of the same name.
    """

    name: str
    source: str
    steps: tuple[Step, ...]
    metrics: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    per_input: bool = False

    @property
    def models(self) -> tuple[Model, ...]:
        return tuple(step for step in self.steps if isinstance(step, Model))

    @property
    def on_device(self) -> bool:
        return any(model.device for model in self.models)

    def files(self) -> list[str]:
        """The source's Parquet files, sorted. Local ones only."""
        return sorted(str(path) for path in Path(self.source).glob("*.parquet"))


# -- jobs


@dataclass(frozen=True)
class Job:
    """One run of one contestant. data: what Workload.make made. out: does not exist yet. cores: that may be used, which the
    affinity says too. knobs: of the peer, as it declared them. form: of the peer.
    """

    workload: str
    params: Mapping[str, Any]
    data: str
    out: str
    form: str
    cores: int
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipelines(self) -> tuple[Pipeline, ...]:
        """Those to run: one, but for workloads of many jobs."""
        return workload(self.workload).pipelines(self.data, self.params)

    @property
    def pipeline(self) -> Pipeline:
        """The only one."""
        (only,) = self.pipelines
        return only

    def out_of(self, pipeline: Pipeline) -> str:
        """Where its output goes: `out` itself when there is one, a folder of its name in it when there are several."""
        return self.out if len(self.pipelines) == 1 else f"{self.out}/{pipeline.name}"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({f.name: getattr(self, f.name) for f in fields(self)}))

    @classmethod
    def read(cls, path: str | Path) -> Job:
        return cls(**json.loads(Path(path).read_text()))


# -- what workloads and peers declare


@dataclass(frozen=True)
class Workload:
    """make(folder, params): writes the input into an empty folder; called once for each set of `input_params`, whose values it
        depends on alone. pipelines(data, params): must be quick, and import nothing heavy: contestants' timed processes call
        it.
    params: all parameters with their values at full size. small: those that differ at small size (a second or two each).
    variants: {name: parameters that differ}: what `--variant` chooses. scaled: the parameter that --scale multiplies.
    key: columns that tell the output's rows apart. tolerance: {column: (relative, absolute)}, where contestants may differ; all
        others must be equal, with rows sorted by `key`, so that order, files and chunks don't matter. own_tolerance: for forms
        but "same" (another decoder gives other pixels).
    serve(data, params): a context in which contestants run, giving environment variables for them (a server).
    io_counts: reading and writing are a good part of the ideal, by pyarrow's defaults. start_s: of the ideal where all models
        are on simulated devices; None, or with others: as measured, of a process that only imports, loads and computes a batch.
    """

    name: str
    title: str
    make: Callable[[Path, Mapping[str, Any]], None]
    pipelines: Callable[[str, Mapping[str, Any]], tuple[Pipeline, ...]]
    params: Mapping[str, Any]
    small: Mapping[str, Any]
    input_params: tuple[str, ...]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scaled: str = "files"
    key: tuple[str, ...] = ("id",)
    tolerance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    own_tolerance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    serve: Callable[[str, Mapping[str, Any]], AbstractContextManager[dict[str, str]]] | None = None
    io_counts: bool = False
    start_s: float | None = None


@dataclass(frozen=True)
class Peer:
    """forms: {name: what it is}; the first is the default and named "same" (the same user functions for all); others are the
        peer's own way ("own"), or other ways to use it ("two-jobs").
    environment: `environments/<it>.txt`, made into `.bench/<it>/` on demand; None: the project's own.
    why_not(pipelines, form, params): why it can't express them, None when it can. One sentence, for the page.
    knobs(workload): defaults of what the peer lets one tune; `run` finds them in job.knobs, after what the search found.
    search(workload): [(knob, values to try)], in order.
    needs(): why it can't run on this machine (no Java), None when it can.
    """

    name: str
    title: str
    forms: Mapping[str, str]
    environment: str | None = None
    why_not: Callable[[Sequence[Pipeline], str, Mapping[str, Any]], str | None] = lambda pipelines, form, params: None
    knobs: Callable[[str], Mapping[str, Any]] = lambda workload: {}
    search: Callable[[str], Sequence[tuple[str, Sequence[Any]]]] = lambda workload: ()
    needs: Callable[[], str | None] = lambda: None


def workload(name: str) -> Workload:
    return import_module(f"suite.workloads.{name.replace('-', '_')}").WORKLOAD


def peer(name: str) -> Peer:
    """Its declaration. The module must import its engine inside functions: the runner, which has no such engine, imports it
    too.
    """
    return import_module(f"suite.peers.{name.replace('-', '_')}").PEER


# -- notes of calls, and simulated devices


_NOTES: dict[tuple[int, str], int] = {}
_LOCK = threading.Lock()


def note(stage: str, begun: float, rows: int) -> None:
    """`rows` were done by `stage` from `begun` until now. One line in a file of this thread; nothing without SUITE_LOG."""
    folder = os.environ.get("SUITE_LOG")
    if not folder:
        return
    ended = time.time()
    name = f"{folder}/{stage}-{os.getpid()}-{threading.get_ident()}"
    key = (os.getpid(), name)
    if key not in _NOTES:
        with _LOCK:
            _NOTES[key] = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(_NOTES[key], f"{begun} {ended} {rows}\n".encode())


class Devices:
    """`count` simulated accelerators that all processes of a run share, each doing `rate` rows a second, one call at a time.

    A device is a lock on a file in SUITE_LOG, held while it "computes" (sleeps). Any number of models may share it; whoever
    keeps it busy is as quick as it gets.
    """

    def __init__(self, rate: float, count: int = 1, name: str = "device") -> None:
        self._rate = rate
        self._name = name
        self._folder = os.environ.get("SUITE_LOG") or os.environ.get("TMPDIR") or "/tmp"
        self._files = [os.open(f"{self._folder}/.{name}-{i}", os.O_RDWR | os.O_CREAT, 0o644) for i in range(count)]
        self._locks = [threading.Lock() for _ in range(count)]  # a file's lock does not keep out threads that share the file
        self._home = self._claim() % count

    def _claim(self) -> int:
        """How many came before: models are spread over the devices in turn."""
        file = os.open(f"{self._folder}/.{self._name}-claims", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = int(os.read(file, 20) or 0)
            os.pwrite(file, str(before + 1).encode(), 0)
            return before
        finally:
            os.close(file)

    def compute(self, rows: int) -> None:
        """Return when a device has done `rows`."""
        with self._one() as which:
            begun = time.time()
            time.sleep(rows / self._rate)
            note(f"{self._name}.{which}", begun, rows)

    @contextmanager
    def _one(self) -> Iterator[int]:
        count = len(self._files)
        for i in range(count):
            which = (self._home + i) % count
            if not self._locks[which].acquire(blocking=False):
                continue
            try:
                fcntl.flock(self._files[which], fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self._locks[which].release()
        else:
            which = self._home
            self._locks[which].acquire()
            fcntl.flock(self._files[which], fcntl.LOCK_EX)
        try:
            yield which
        finally:
            fcntl.flock(self._files[which], fcntl.LOCK_UN)
            self._locks[which].release()

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)
