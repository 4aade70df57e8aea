"""why(): where a row of the output came from, and what made it, out of the run's own records.

Reads the run log, the plan and the lineage that lie beside the output. They may have been written by anybody: texts are decoded
strictly and shown without control characters, nothing is executed, and no name leads out of the destination.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.commit.names import MANIFEST, PRIVATE, generation_of, log_name, plan_name, run_name
from headrace.commit.records import Claim, Finished, Settled, decode
from headrace.contracts.run_store import RunStore
from headrace.core.errors import DestinationError, HeadraceError, PlanError
from headrace.core.paths import absolute
from headrace.core.receipts import LineageRun, OutputFile
from headrace.core.redact import redact
from headrace.plan.fingerprint import models_of

if TYPE_CHECKING:
    import pyarrow as pa

MOST_PLACES = 20
_NOTES = ("_source_uri", "_source_row", "_rows", "_stage", "_exception", "_traceback", "_attempt")


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [row, row + rows) of input object `uri`, 0-based; row -1 when not known. exact: those very rows, not just from
    among them.
    """

    uri: str
    row: int
    rows: int = 1
    exact: bool = True

    def __str__(self) -> str:
        uri = _clean(self.uri)
        if self.row < 0:
            return uri
        if self.exact and self.rows == 1:
            return f"row {self.row} of {uri}"
        return f"{'' if self.exact else 'among '}rows {self.row}-{self.row + self.rows - 1} of {uri}"


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a row came from. file: relative to the destination; row: within it, None for all of it.

    session: which of the run's drivers committed it, 1 for the first; session_began_s, committed_s: seconds since 1970, the
    latter only where the file system tells. models: step -> version or digest. stage, exception, traceback: of a row that was
    set aside.
    """

    destination: str
    file: str
    row: int | None
    run: str
    split: int
    attempt: int
    session: int
    session_began_s: float
    committed_s: float | None = None
    sources: tuple[Place, ...] = ()
    models: dict[str, str] = field(default_factory=dict[str, str])
    stage: str = ""
    exception: str = ""
    traceback: str = ""
    note: str = ""

    @property
    def source_uri(self) -> str | None:
        """The input object that the row came from; None when it may be one of several."""
        uris = {place.uri for place in self.sources}
        return uris.pop() if len(uris) == 1 else None

    @property
    def source_row(self) -> int | None:
        """The row of that object, 0-based; None when it is only known to be among some."""
        place = self.sources[0] if len(self.sources) == 1 else None
        return place.row if place is not None and place.exact and place.rows == 1 and place.row >= 0 else None

    def __str__(self) -> str:
        began = f"session {self.session}, which began {_at(self.session_began_s)}"
        lines = [f"{_clean(self.file)}" + ("" if self.row is None else f", row {self.row}")]
        lines += [f"  from: {place}" for place in self.sources[:MOST_PLACES]] or ["  from: not recorded"]
        if len(self.sources) > MOST_PLACES:
            lines.append(f"  from: {len(self.sources) - MOST_PLACES} more places")
        if self.stage or self.exception:
            lines.append(f"  set aside by: {_clean(self.stage)}")
            lines.append(f"  because: {_clean(self.exception)}")
            lines += [f"    {_clean(line)}" for line in self.traceback.rstrip().splitlines()]
        lines += [f"  model: {_clean(step)}: {_clean(version)}" for step, version in self.models.items()]
        lines.append(f"  made by: {self.run}, split {self.split}, attempt {self.attempt}, {began}")
        if self.committed_s is not None:
            lines.append(f"  committed: {_at(self.committed_s)}")
        lines.append(f"  in: {_clean(redact(self.destination))}")
        if self.note:
            lines.append(f"  note: {self.note}")
        return "\n".join(lines)


def why(path: str | os.PathLike[str], row: int | None = None, *, file: str | None = None, quarantined: bool = False) -> Trace:
    """Where a row of a run's output came from. `print` the answer.

    path: the destination, and row counts over all of its files, sorted by name; or one output file, and row counts within it
    (None: all of it). A quarantine file (in _headrace/<run>/quarantine) is such a file, too. file: name of a file in the
    destination, instead of its whole path. quarantined: with a destination, row counts over the rows that were set aside. Rows
    count from 0.

    Of an unfinished run the files committed so far are known. Raises DestinationError for a place without records of a run or
    with damaged ones, and for a file that is none of the run's; PlanError for a row that is not there.
    """
    if row is not None and (isinstance(row, bool) or row < 0):
        raise PlanError(f"row is {row!r}", hint="rows count from 0")
    store, name = _destination(os.fspath(path))
    if file is not None:
        name = f"{name}/{file}" if name else file
    if not name and row is None:
        raise PlanError("which row?", hint="give its number, or the path of one output file")
    kind = "quarantine" if quarantined or name.startswith(f"{PRIVATE}/") else "output"
    log = _find_log(store, name, kind)
    found, at = _find_file(log, name, row, kind, store.root)
    record = _record(store, log.run, found)
    base = _base(store, log, found, record)
    if kind == "quarantine":
        return _set_aside(store, log, found, at, base)
    runs = record.lineage or _lineage_file(store, record)
    offset = sum(f.rows for f in record.files[: _index(record, found.file.name)] if f.kind == "output")
    first, rows = (offset, found.file.rows) if at is None else (offset + at, 1)
    return Trace(**base, row=at, sources=tuple(_places(runs, first, rows)))


# ---------------------------------------------------------------- places


def _destination(path: str) -> tuple[RunStore, str]:
    """The store of the destination that a path lies in, and the path's name there, "" for the destination itself."""
    from headrace.connectors.run_store import open_store
    from headrace.connectors.storage import is_remote

    remote = is_remote(path)
    root = path.rstrip("/") if remote else absolute(path)
    least = len("s3://") if remote else 1
    name = ""
    while len(root) > least and "/" in root[least:] + "/":
        if root.rpartition("/")[2] != PRIVATE:
            store = open_store(root)
            if next(iter(store.names(PRIVATE)), None) is not None:
                return store, name
        root, _, base = root.rpartition("/")
        name = f"{base}/{name}" if name else base
    raise DestinationError(
        "there is no output of Headrace",
        where=(("path", path),),
        hint="give the output directory, or a file in it",
    )


def _read(store: RunStore, name: str) -> bytes | None:
    """An object of the destination; never what a link of that name leads to."""
    local = os.path.join(store.root, name)
    if "://" not in store.root and os.path.islink(local):
        raise DestinationError("a record of the run is a link", where=(("file", local),), hint="links are not followed")
    return store.read(name)


# ---------------------------------------------------------------- the log


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a settled split. index: of the log segment that says so."""

    file: OutputFile
    split: int
    index: int


@dataclass(slots=True)
class _Log:
    """What a run's log says of its files. claims: by epoch."""

    run: str
    files: list[_File] = field(default_factory=list[_File])
    claims: dict[int, Claim] = field(default_factory=dict[int, Claim])
    epochs: dict[int, int] = field(default_factory=dict[int, int])
    finished: bool = False


def _runs(store: RunStore) -> list[str]:
    """Runs by how likely their output is what people see: that of the manifest, then the newest first."""
    names = [n.split("/") for n in store.names(PRIVATE)]
    found = {generation_of(parts[1]) for parts in names if len(parts) == 3 and parts[2] == "plan.json"} - {-1}
    runs = [run_name(g) for g in sorted(found, reverse=True)]
    try:
        manifest = json.loads(_read(store, MANIFEST) or b"null")
    except (ValueError, RecursionError):
        manifest = None
    shown = manifest.get("run") if isinstance(manifest, dict) else None
    return sorted(runs, key=lambda run: run != shown)


def _find_log(store: RunStore, name: str, kind: str) -> _Log:
    """The log of the run that has a file of this name; for no name, of the run whose output is there."""
    runs = _runs(store)
    if not runs:
        raise DestinationError("no run is recorded there", where=(("destination", store.root),))
    if kind == "quarantine" and name:
        runs = [run for run in runs if name.startswith(f"{PRIVATE}/{run}/")]
    for run in runs:
        log = _load(store, run)
        if not name or any(f.file.name == name for f in log.files):
            return log
    raise DestinationError(
        f"{_clean(name)} is not a file that a run has committed",
        where=(("destination", store.root),),
        hint="give an output file, or a file in _headrace/<run>/quarantine",
    )


def _load(store: RunStore, run: str) -> _Log:
    log = _Log(run)
    seen: set[int] = set()
    for index, data in _segments(store, run):
        segment = decode(run, index, data)
        log.epochs[index] = segment.epoch
        for record in segment.records:
            match record:
                case Settled() if record.split not in seen:
                    seen.add(record.split)
                    log.files += [_File(f, record.split, index) for f in record.files]
                case Claim():
                    log.claims[record.epoch] = record
                case Finished():
                    log.finished = True
                case _:
                    pass
    return log


def _segments(store: RunStore, run: str) -> Iterator[tuple[int, bytes]]:
    index = 0
    while (data := _read(store, log_name(run, index))) is not None:
        yield index, data
        index += 1


def _find_file(log: _Log, name: str, row: int | None, kind: str, root: str) -> tuple[_File, int | None]:
    """The file that holds a row, and the row's number in it."""
    files = sorted((f for f in log.files if f.file.kind == kind), key=lambda f: f.file.name)
    if name:
        files = [f for f in files if f.file.name == name]
        if not files:
            raise DestinationError(
                f"{_clean(name)} holds no rows of the output", where=(("destination", root), ("run", log.run))
            )
        if row is None:
            return files[0], None
    at = row or 0
    for found in files:
        if at < found.file.rows:
            return found, at
        at -= found.file.rows
    rows = sum(f.file.rows for f in files)
    what = "set aside" if kind == "quarantine" else f"in {_clean(name)}" if name else "in the output"
    so_far = "" if log.finished else " so far: the run is not finished"
    text = f"there is no row {row}: there are {rows} rows {what}{so_far}"
    raise PlanError(text, where=(("run", log.run),), hint="rows count from 0")


def _record(store: RunStore, run: str, found: _File) -> Settled:
    data = _read(store, log_name(run, found.index))
    records = decode(run, found.index, data or b"").records
    return next(r for r in records if isinstance(r, Settled) and r.split == found.split)


def _index(record: Settled, name: str) -> int:
    return next(i for i, f in enumerate(record.files) if f.name == name)


# ---------------------------------------------------------------- what is known


def _base(store: RunStore, log: _Log, found: _File, record: Settled) -> dict[str, Any]:
    epoch = log.epochs[found.index]
    claim = log.claims.get(epoch)
    note = "" if log.finished else f"the run is not finished: {len({f.split for f in log.files})} splits are committed so far"
    return {
        "destination": store.root,
        "file": found.file.name,
        "run": log.run,
        "split": record.split,
        "attempt": record.attempt,
        "session": epoch,
        "session_began_s": claim.at if claim is not None else 0.0,
        "committed_s": _modified(store, log_name(log.run, found.index)),
        "models": _models(store, log.run),
        "note": note,
    }


def _models(store: RunStore, run: str) -> dict[str, str]:
    try:
        body = json.loads(_read(store, plan_name(run)) or b"null")
        return models_of(body["plan"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _modified(store: RunStore, name: str) -> float | None:
    """When the log said so, where a file system keeps that."""
    if "://" in store.root:
        return None
    try:
        return os.lstat(os.path.join(store.root, name)).st_mtime
    except OSError:
        return None


def _places(runs: Sequence[LineageRun], first: int, rows: int) -> Iterator[Place]:
    """Where output rows [first, first + rows) of a split came from."""
    for run in runs:
        start, stop = max(first, run.row), min(first + rows, run.row + run.rows)
        if start >= stop:
            continue
        if run.exact and run.rows == run.source_rows:
            yield Place(run.uri, run.source_row + start - run.row, stop - start)
        else:
            yield Place(run.uri, run.source_row, run.source_rows, exact=run.exact and run.source_rows == 1)


def _lineage_file(store: RunStore, record: Settled) -> tuple[LineageRun, ...]:
    file = next((f for f in record.files if f.kind == "lineage"), None)
    if file is None:
        return ()
    table = _table(store, file)
    names = ("row", "rows", "uri", "source_row", "source_rows", "exact")
    columns = [_column(table, n, file, default=True if n == "exact" else None) for n in names]
    return tuple(LineageRun(*values) for values in zip(*columns, strict=True))


def _set_aside(store: RunStore, log: _Log, found: _File, at: int | None, base: dict[str, Any]) -> Trace:
    table = _table(store, found.file)
    # The rows' own columns come first and may have the same names; then ours end in more underscores.
    ours = dict(zip(_NOTES, table.schema.names[-len(_NOTES) :], strict=False))
    if any(real.rstrip("_") != name for name, real in ours.items()) or len(ours) != len(_NOTES):
        raise _damaged(found.file, "it has other columns than rows that were set aside")
    if at is None:
        return Trace(**base, row=None, note=f"{found.file.rows} rows")
    if at >= table.num_rows:
        raise _damaged(found.file, f"it has {table.num_rows} rows")
    uri, row, rows, stage, exception, traceback, attempt = (table.column(ours[n])[at].as_py() for n in _NOTES)
    place = () if not uri else (Place(str(uri), -1 if row is None else int(row), max(1, int(rows or 0))),)
    told = {"stage": str(stage or ""), "exception": str(exception or ""), "traceback": str(traceback or "")}
    return Trace(**{**base, **told, "attempt": int(attempt or 0)}, row=at, sources=place)


def _table(store: RunStore, file: OutputFile) -> pa.Table:
    """A Parquet file of the run's own records, once its digest is right. It may still wait under its staged name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read(store, file.name)
    if data is None and file.staged:
        data = _read(store, file.staged)
    if data is None or (file.digest and hashlib.sha256(data).hexdigest() != file.digest):
        raise _damaged(file, "it is missing" if data is None else "it is not the file that the run wrote")
    try:
        return pq.read_table(pa.BufferReader(data), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise _damaged(file, f"it can't be read: {problem}") from None


def _column(table: pa.Table, name: str, file: OutputFile, *, default: Any = None) -> list[Any]:
    if name in table.schema.names:
        return table.column(name).to_pylist()
    if default is None:
        raise _damaged(file, f"it has no column {name!r}")
    return [default] * table.num_rows


def _damaged(file: OutputFile, problem: str) -> HeadraceError:
    return DestinationError(f"a record of the run is damaged: {problem}", where=(("file", file.name),))


# ---------------------------------------------------------------- words


def _clean(text: str) -> str:
    """Without what would move a terminal's cursor, and without secrets."""
    return redact("".join(c if c.isprintable() else " " for c in text))


def _at(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
