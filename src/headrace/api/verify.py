"""verify: does a destination hold what its run says, all of it and nothing else? Reads everything, changes nothing.

Three witnesses are compared: the files themselves (read whole: digest, rows, columns), the manifest, and the run log.
Invariant: what lies in the destination is data, never trusted: whatever is wrong with it becomes a line of the report.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from headrace.commit.names import MANIFEST, PRIVATE, SUCCESS, generation_of
from headrace.commit.state import LogState
from headrace.connectors.redact import redact
from headrace.connectors.run_store import LocalRunStore, S3RunStore, open_store
from headrace.connectors.sinks.files import normalise
from headrace.connectors.sinks.inspect import Found, inspect
from headrace.connectors.sinks.manifest import is_inside, read_manifest
from headrace.core.errors import DataError, DestinationError, HeadraceError, TransientError
from headrace.core.receipts import COUNTS, FileKind, OutputFile, Tally
from headrace.runtime.ledger import replay

READERS = 4  # files at once, each with at most inspect.WHOLE_BYTES in memory
SHOWN = 20  # problems that a printed report names

_SUFFIXES = (".parquet", ".csv", ".jsonl")
_KINDS: dict[str, FileKind] = {"files": "output", "quarantine": "quarantine", "lineage": "lineage"}


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. Print it, or ask for `ok`.

    finished: there is a manifest and `_SUCCESS`; otherwise what the run log holds was verified. splits: settled. files, rows,
    bytes: of the outputs that were read. problems: one line each; none when all is well.
    """

    path: str
    run: str
    finished: bool
    splits: int
    files: int
    rows: int
    bytes: int
    tally: Tally
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        state = "finished" if self.finished else f"unfinished: {self.splits:,} splits committed"
        lines = [f"{self.path}  ({self.run or 'no run'}, {state})"]
        lines.append(f"  read: {self.files:,} files, {self.rows:,} rows, {self.bytes:,} bytes, from {self.splits:,} splits")
        counts = [f"{name} {n:,}" for name in COUNTS if (n := getattr(self.tally, name))]
        lines.append(f"  rows: {', '.join(counts) or 'none'}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  and {len(self.problems) - SHOWN:,} problems more")
        lines.append("  ok" if self.ok else f"  {len(self.problems):,} problems")
        return "\n".join(lines)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Read a destination again and compare files, manifest and run log.

    Every file is there, with its size, SHA-256, number of rows and columns; no other output lies beside them; rows add up;
    the log and the manifest say the same. An unfinished run is verified as far as it has come. Raises DestinationError when
    there is nothing to verify, TransientError when the storage fails for good.
    """
    store = open_store(normalise(path))
    data = store.read(MANIFEST)
    newest, notes = _newest_run(store)
    if data is None and not newest:
        where = (("destination", redact(store.root)),)
        raise DestinationError("there is nothing to verify: no manifest and no run", where=where, hint="check the path")
    check = _Check(store, [], notes)
    if data is None:
        return check.unfinished(newest)
    return check.finished(read_manifest(data), newest)


def _newest_run(store: LocalRunStore | S3RunStore) -> tuple[str, list[str]]:
    """The newest run that has a plan or a log, "" for none."""
    runs = {name.split("/")[1] for name in store.names(PRIVATE) if name.count("/") >= 2}
    known = [run for run in runs if generation_of(run) >= 0]
    return max(known, key=generation_of, default=""), []


@dataclass(slots=True)
class _Check:
    store: LocalRunStore | S3RunStore
    problems: list[str]
    notes: list[str]

    # -- a destination with a manifest

    def finished(self, body: dict[str, Any] | None, newest: str) -> Verification:
        if body is None:
            self.problems.append("_manifest.json can't be read: it is no JSON object")
            return self.unfinished(newest) if newest else self._report("", False, 0, (), {}, Tally())
        success = self.store.read(SUCCESS) is not None
        if not success:
            self.problems.append("there is no _SUCCESS: run the same command again, to put the output in place")
        if not is_whole(body.get("version")) or body["version"] > 1:
            self.problems.append(f"the manifest's version is {_short(body.get('version'))}")
        run = body.get("run")
        run = run if isinstance(run, str) and generation_of(run) >= 0 else ""
        if not run:
            self.problems.append(f"the manifest names no run, but {_short(body.get('run'))}")
        listed = self._listed(body)
        tally = self._tally(body.get("tally"))
        found = self._read(listed)
        self._check_sums(body, listed, tally)
        self._check_columns(body.get("schema"), [f for f in listed if f.kind == "output"], found)
        self._check_others(listed)
        state = self._state(run) if run else None
        if state is not None:
            self._check_log(state, listed, tally)
        if newest and run and newest != run:
            later = self._state(newest)
            if later is not None and later.finished is None and not later.replaced:
                self.notes.append(f"{newest} is to replace it, and is unfinished: {len(later.settled):,} splits committed")
        splits = len(state.settled) if state is not None else 0
        return self._report(run, success, splits, listed, found, tally)

    def _listed(self, body: Mapping[str, Any]) -> list[OutputFile]:
        out: list[OutputFile] = []
        seen: set[str] = set()
        for key, kind in _KINDS.items():
            rows = body.get(key, [])
            if not isinstance(rows, list):
                self.problems.append(f"the manifest's {key!r} is no list")
                continue
            for row in cast("list[Any]", rows):
                file = self._file(row, kind)
                if file is not None and file.name in seen:
                    self.problems.append(f"{_short(file.name)}: the manifest lists it twice")
                elif file is not None:
                    seen.add(file.name)
                    out.append(file)
        return out

    def _file(self, row: object, kind: FileKind) -> OutputFile | None:
        if not isinstance(row, dict):
            self.problems.append(f"the manifest lists {_short(row)} as a file")
            return None
        entry = cast("dict[str, Any]", row)
        name, rows, size, digest = (entry.get(k) for k in ("name", "rows", "bytes", "digest"))
        inside = isinstance(name, str) and (is_inside(name) if kind == "output" else _is_private(name))
        if not isinstance(name, str) or not inside:
            self.problems.append(f"the manifest lists a file outside of the destination: {_short(name)}")
            return None
        if not (is_whole(rows) and is_whole(size) and isinstance(digest, str)):
            self.problems.append(f"{_short(name)}: the manifest tells no rows, bytes and digest of it")
            return None
        return OutputFile(name, cast(int, rows), cast(int, size), digest, "", kind)

    def _tally(self, told: object) -> Tally:
        counts = cast("dict[str, Any]", told) if isinstance(told, dict) else {}
        names = COUNTS
        if not isinstance(told, dict) or not all(is_whole(counts.get(n, 0)) for n in names):
            self.problems.append("the manifest tells no row counts")
            return Tally()
        return Tally(**{n: counts.get(n, 0) for n in names})

    def _check_sums(self, body: Mapping[str, Any], listed: Iterable[OutputFile], tally: Tally) -> None:
        rows = sum(f.rows for f in listed if f.kind == "output")
        if body.get("rows") != rows:
            self.problems.append(f"the manifest says {_short(body.get('rows'))} rows, its files have {rows:,}")
        if tally.written != rows:
            self.problems.append(f"{tally.written:,} rows were written, the files have {rows:,}")
        if not tally.balanced:
            self.problems.append(f"rows are missing: {_law(tally)}")

    def _check_others(self, listed: Iterable[OutputFile]) -> None:
        """No other file that a reader of the destination would take for output."""
        known = {f.name for f in listed}
        others: list[str] = []
        for name in self.store.names(""):
            hidden = any(part[:1] in ("_", ".") for part in name.split("/"))
            if not hidden and name not in known and name.endswith(_SUFFIXES):
                others.append(name)
        self.problems += [f"{_short(name)}: it is not in the manifest" for name in sorted(others)]

    def _check_log(self, state: LogState, listed: Iterable[OutputFile], tally: Tally) -> None:
        if state.finished is None:
            self.problems.append(f"the log of {state.run} does not say that the run is finished")
        if state.tally != tally:
            self.problems.append(f"the log counts other rows: {_law(state.tally)}; the manifest: {_law(tally)}")
        told = {f.name: f for f in listed}
        for f in state.settled.files:
            other = told.pop(f.name, None)
            if other is None:
                self.problems.append(f"{_short(f.name)}: the log holds it, the manifest does not")
            elif f.digest and (f.digest, f.bytes, f.rows) != (other.digest, other.bytes, other.rows):
                self.problems.append(f"{_short(f.name)}: log and manifest differ about it")
        for f in told.values():
            if f.rows:  # files of no rows may be made when the run ends
                self.problems.append(f"{_short(f.name)}: the manifest lists it, the log does not hold it")

    # -- a destination without

    def unfinished(self, run: str) -> Verification:
        """Verify what the log of the run holds."""
        state = self._state(run)
        if state is None:
            return self._report(run, False, 0, (), {}, Tally())
        files = [f for f in state.settled.files if f.digest]
        found = self._read(files)
        if not state.tally.balanced:
            self.problems.append(f"rows are missing: {_law(state.tally)}")
        rows = sum(f.rows for f in files if f.kind == "output")
        if rows != state.tally.written:
            self.problems.append(f"{state.tally.written:,} rows were written, the files have {rows:,}")
        if state.finished is not None:
            self.notes.append("the run is finished, but for its manifest: run the same command again")
        return self._report(run, False, len(state.settled), files, found, state.tally)

    # -- parts

    def _state(self, run: str) -> LogState | None:
        try:
            return replay(self.store, run)
        except TransientError:
            raise
        except HeadraceError as e:
            self.problems.append(f"the log of {run} can't be used: {_line(e)}")
            return None

    def _read(self, files: Iterable[OutputFile]) -> dict[str, Found]:
        """What is in each file that is there."""
        files = list(files)
        with ThreadPoolExecutor(READERS, thread_name_prefix="headrace-verify") as pool:
            found = list(pool.map(self._inspect, files))
        out: dict[str, Found] = {}
        for file, (what, problems) in zip(files, found, strict=True):
            self.problems += problems
            if what is not None:
                out[file.name] = what
        return out

    def _inspect(self, file: OutputFile) -> tuple[Found | None, list[str]]:
        label = _short(file.name)
        try:
            found = inspect(self.store, file.name)
            if found is None and file.staged:
                found = inspect(self.store, file.staged)  # logged, and not published yet
        except TransientError:
            raise
        except (DataError, DestinationError) as e:
            return None, [f"{label}: {_line(e)}"]
        if found is None:
            return None, [f"{label}: it is missing"]
        problems: list[str] = []
        if found.bytes != file.bytes:
            problems.append(f"{label}: {found.bytes:,} bytes, not {file.bytes:,}")
        elif found.digest != file.digest:
            problems.append(f"{label}: its bytes are not those that were written (SHA-256)")
        if found.trouble:
            problems.append(f"{label}: it can't be read: {found.trouble}")
        elif found.rows != file.rows:
            problems.append(f"{label}: {found.rows:,} rows, not {file.rows:,}")
        return found, problems

    def _check_columns(self, schema: object, outputs: list[OutputFile], found: Mapping[str, Found]) -> None:
        """All outputs have the same columns, and the manifest's."""
        with_columns = [(f.name, found[f.name].columns) for f in outputs if f.name in found and found[f.name].columns]
        if not with_columns:
            return
        first = with_columns[0][1]
        for name, columns in with_columns[1:]:
            if columns != first:
                self.problems.append(f"{_short(name)}: its columns are {_short(columns)}, others have {_short(first)}")
        if not isinstance(schema, str):
            return
        told = [line for line in schema.splitlines() if not line.startswith(" ")]
        names = [c[0] for c in first]
        if len(told) != len(names) or not all(line.startswith(f"{n}: ") for line, n in zip(told, names, strict=True)):
            self.problems.append(f"the files' columns are {_short(names)}, the manifest says {_short(told)}")

    def _report(
        self,
        run: str,
        finished: bool,
        splits: int,
        files: Iterable[OutputFile],
        found: Mapping[str, Found],
        tally: Tally,
    ) -> Verification:
        read = [found[f.name] for f in files if f.kind == "output" and f.name in found]
        return Verification(
            redact(self.store.root),
            run,
            finished,
            splits,
            len(read),
            sum(f.rows for f in read),
            sum(f.bytes for f in read),
            tally,
            tuple(self.problems),
            tuple(self.notes),
        )


def is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_private(name: str) -> bool:
    head, _, rest = name.partition("/")
    return head == PRIVATE and is_inside(rest)


def _law(tally: Tally) -> str:
    parts = ((name, getattr(tally, name)) for name in COUNTS)
    return ", ".join(f"{name} {n:,}" for name, n in parts if n) or "no rows"


def _short(value: object) -> str:
    text = redact(value if isinstance(value, str) else repr(value))
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 120 else text[:117] + "..."


def _line(e: HeadraceError) -> str:
    return redact(str(e)).replace("\n", "; ")
