"""Records of the run log, and how a segment of them is written as JSON and read again.

A segment is one object of the log. Invariants: reading is strict and executes nothing: wrong types, names that leave the
destination, unknown kinds and newer versions raise DestinationError; what `encode` writes, `decode` reads back equal. No two
drivers can write the same bytes: a segment carries its driver's nonce.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from msgspec import Struct, field

from headrace.commit.names import check_file, log_name
from headrace.core.errors import DestinationError
from headrace.core.receipts import COUNTS, LineageRun, OutputFile, Tally
from headrace.core.splits import Division

VERSION = 3  # a segment says the least that can read it: 2 knows chunks in it, 3 what splits are divided to
_KINDS = ("output", "quarantine", "lineage")
_DIGEST = re.compile(r"([0-9a-f]{64})?")


class Claim(Struct, frozen=True):
    """A driver begins: from here on only segments of this epoch may follow. died: the one before may have died at work. The
    rest is for people.
    """

    epoch: int
    nonce: str
    host: str
    pid: int
    started: float
    at: float
    died: bool = False


class Listed(Struct, frozen=True):
    """Splits [first, first + count) are what the listing's chunk with this digest says. done: there are no more.

    chunk: the chunk itself; empty when it is an object of its own.
    """

    first: int
    count: int
    digest: str
    done: bool
    chunk: bytes = b""


class Divided(Struct, frozen=True):
    """What splits are divided to, in this session and in all later ones: they are what the log counts. Before any Listed."""

    division: Division


class Settled(Struct, frozen=True):
    """A split is settled: its rows are counted and its files are the output. files: final names and what was staged for them.

    taken: rows that passed each limit, by the limit's operator index.
    """

    split: int
    id: str
    attempt: int
    tally: Tally
    files: tuple[OutputFile, ...] = ()
    rows: int = 0
    taken: tuple[tuple[int, int], ...] = ()
    lineage: tuple[LineageRun, ...] = ()


class Released(Struct, frozen=True):
    """The driver has left in good order."""


class Replaced(Struct, frozen=True):
    """The run is given up for another, which is to be the output. Nobody goes on with it."""

    by: str


class Finished(Struct, frozen=True):
    """All splits are settled, and all that is not held is published. summary: what the manifest says of the run."""

    summary: Mapping[str, Any]


Record = Claim | Divided | Listed | Settled | Released | Replaced | Finished


class Segment(Struct, frozen=True):
    """Object `index` of a run's log. metrics: accumulator states of exactly the splits that it settles, by name."""

    index: int
    epoch: int
    nonce: str
    records: tuple[Record, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])


# ---------------------------------------------------------------- writing


def encode(segment: Segment) -> bytes:
    body: dict[str, Any] = {
        "version": max(map(_version, segment.records), default=1),
        "index": segment.index,
        "epoch": segment.epoch,
        "nonce": segment.nonce,
        "records": [_record_to_json(r) for r in segment.records],
    }
    if segment.metrics:
        body["metrics"] = segment.metrics
    return json.dumps(body, separators=(",", ":")).encode()


def _version(record: Record) -> int:
    if isinstance(record, Divided):
        return 3
    return 2 if isinstance(record, Listed) and record.chunk else 1


def _record_to_json(record: Record) -> dict[str, Any]:
    match record:
        case Settled():
            return _settled_to_json(record)
        case Claim(epoch, nonce, host, pid, started, at, died):
            body = {"kind": "claim", "epoch": epoch, "nonce": nonce, "host": host, "pid": pid, "started": started, "at": at}
            return {**body, "died": True} if died else body
        case Divided(division):
            return {"kind": "divided", "bytes": division.split_bytes, "by_rows": division.by_rows}
        case Listed(first, count, digest, done, chunk):
            body = {"kind": "listed", "first": first, "count": count, "digest": digest, "done": done}
            return {**body, "chunk": base64.b64encode(chunk).decode()} if chunk else body
        case Released():
            return {"kind": "released"}
        case Replaced(by):
            return {"kind": "replaced", "by": by}
        case Finished(summary):
            return {"kind": "finished", "summary": summary}


def _settled_to_json(r: Settled) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": "settled", "split": r.split, "id": r.id, "attempt": r.attempt, "rows": r.rows}
    out["tally"] = {name: n for name in COUNTS if (n := getattr(r.tally, name))}
    out["files"] = [f.to_json() for f in r.files]
    if r.taken:
        out["taken"] = r.taken
    if r.lineage:
        out["lineage"] = [(x.row, x.rows, x.uri, x.source_row, x.source_rows, int(x.exact)) for x in r.lineage]
    return out


# ---------------------------------------------------------------- reading


class DamagedLog(DestinationError):
    """A run's log does not say what a log can say: nothing can be gone on with."""


class _Bad(Exception):
    """What is wrong with a segment."""


def decode(run: str, index: int, data: bytes) -> Segment:
    """Raises DestinationError that names the log object."""
    where = (("log", log_name(run, index)),)
    try:
        body = _mapping(json.loads(data), "a segment")
        version = _int(body, "version")
        if version > VERSION:
            hint = "go on with the version of Headrace that began the run, or write to another path"
            raise DestinationError(f"the run log is of a newer version ({version})", where=where, hint=hint)
        if _int(body, "index") != index:
            raise _Bad(f"it says that it is number {body['index']}")
        records = tuple(_record(run, _mapping(r, "a record")) for r in _list(body, "records"))
        metrics = _mapping(body.get("metrics", {}), "metrics")
        return Segment(index, _int(body, "epoch"), _text(body, "nonce"), records, metrics)
    except (_Bad, ValueError, RecursionError) as problem:  # ValueError: no JSON, no UTF-8
        raise corrupt(run, index, str(problem)) from None
    except DestinationError as problem:
        raise problem.at(*where) from None


def corrupt(run: str, index: int, why: str) -> DamagedLog:
    return DamagedLog(
        f"the run log can't be used: {why}",
        where=(("log", log_name(run, index)),),
        hint="has something else written there? fresh=True begins a new run, another path keeps both",
    )


def _record(run: str, r: dict[str, Any]) -> Record:
    match _text(r, "kind"):
        case "settled":
            return _settled(run, r)
        case "claim":
            numbers = (_number(r, "started"), _number(r, "at"))
            died = "died" in r and _bool(r, "died")
            return Claim(_int(r, "epoch"), _text(r, "nonce"), _text(r, "host"), _int(r, "pid"), *numbers, died)
        case "divided":
            if not (split_bytes := _int(r, "bytes")):
                raise _Bad("splits of no bytes")
            return Divided(Division(split_bytes, _bool(r, "by_rows")))
        case "listed":
            chunk = base64.b64decode(_text(r, "chunk"), validate=True) if "chunk" in r else b""
            return Listed(_int(r, "first"), _int(r, "count"), _text(r, "digest"), _bool(r, "done"), chunk)
        case "released":
            return Released()
        case "replaced":
            return Replaced(_text(r, "by"))
        case "finished":
            return Finished(_mapping(r.get("summary"), "summary"))
        case kind:
            raise _Bad(f"a record of the unknown kind {kind!r}")


def _settled(run: str, r: dict[str, Any]) -> Settled:
    counts = _mapping(r.get("tally"), "tally")
    if unknown := counts.keys() - set(COUNTS):
        raise _Bad(f"a tally of {sorted(unknown)}")
    return Settled(
        _int(r, "split"),
        _text(r, "id"),
        _int(r, "attempt"),
        Tally(**{name: _int(counts, name) for name in counts}),
        tuple(_file(run, _mapping(f, "a file")) for f in _list(r, "files")),
        _int(r, "rows"),
        tuple((_whole(x[0]), _whole(x[1])) for x in _rows(r.get("taken", []), 2)),
        tuple(_lineage(x) for x in _rows(r.get("lineage", []), 6)),
    )


def _file(run: str, f: dict[str, Any]) -> OutputFile:
    kind = f.get("kind", "output")
    if kind not in _KINDS:
        raise _Bad(f"a file of kind {kind!r}")
    digest = _text(f, "digest")
    if not _DIGEST.fullmatch(digest):
        raise _Bad(f"{digest[:80]!r} is no SHA-256")
    staged = _text(f, "staged") if "staged" in f else ""
    file = OutputFile(_text(f, "name"), _int(f, "rows"), _int(f, "bytes"), digest, staged, kind)
    check_file(run, file)
    return file


def _lineage(x: list[Any]) -> LineageRun:
    if not isinstance(x[2], str):
        raise _Bad("a lineage without a uri")
    return LineageRun(_whole(x[0]), _whole(x[1]), x[2], _whole(x[3]), _whole(x[4]), exact=_whole(x[5]) != 0)


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise _Bad(f"{str(value)[:80]!r} where a count is due")
    return value


def _int(body: Mapping[str, Any], key: str) -> int:
    value = body.get(key)
    if type(value) is not int or value < 0:
        raise _Bad(f"{key} is {str(value)[:80]!r}")
    return value


def _number(body: Mapping[str, Any], key: str) -> float:
    value = body.get(key)
    if type(value) not in (int, float):
        raise _Bad(f"{key} is {str(value)[:80]!r}")
    return float(cast(float, value))


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if type(value) is not str:
        raise _Bad(f"{key} is {str(value)[:80]!r}")
    return value


def _bool(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if type(value) is not bool:
        raise _Bad(f"{key} is {str(value)[:80]!r}")
    return value


def _list(body: Mapping[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        raise _Bad(f"{key} is no list")
    return cast("list[Any]", value)


def _rows(value: object, width: int) -> list[list[Any]]:
    if not isinstance(value, list):
        raise _Bad("a table is no list")
    rows = cast("list[Any]", value)
    for row in rows:
        if not isinstance(row, list) or len(cast("list[Any]", row)) != width:
            raise _Bad("a table's row is of the wrong length")
    return rows


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{what} is no object")
    return cast("dict[str, Any]", value)
