"""What was listed, kept so that a later session can tell whether it lists the same, and say what differs.

A chunk is what one answer of the listing held: a JSON object, compressed, whose digest stands in the log; a small one is all
there. Invariants: no time and no chance goes into its bytes; no user names, passwords or signatures of uris are kept.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from msgspec import Struct

from headrace.commit.records import DamagedLog
from headrace.core.errors import InputChanged
from headrace.core.splits import Fragment, Split

_GZIP = 31  # zlib's code for the gzip format; its header then has no time in it
_LARGEST = 1 << 30  # bytes of a chunk, unpacked
_LOOK_AHEAD = 100_000  # splits on either side that are looked at to say what differs
_NAMED = 5  # how many files of a kind a message names

Part = tuple[str, str, int, int, int] | tuple[str, str, int, int, int, int]
"""A fragment: (uri, version, size in bytes, start, stop), and a 1 where its range is one of rows."""

Entry = tuple[Part, ...]
"""A split: its fragments."""


def without_secrets(uri: str) -> str:
    """The uri without user, password, query and fragment; what is no uri stays as it is."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def entry_of(split: Split) -> Entry:
    return tuple(_part_of(f) for f in split.fragments)


def _part_of(f: Fragment) -> Part:
    part = (without_secrets(f.uri), f.version, f.size_bytes, f.start, f.stop)
    return (*part, 1) if f.by_rows else part


def encode_chunk(entries: Sequence[Entry]) -> tuple[bytes, str]:
    """(bytes, their SHA-256). Uris are kept relative to what they all begin with."""
    prefix = _common_prefix([f[0] for e in entries for f in e])
    cut = len(prefix)
    rows = [[[f[0][cut:], *f[1:]] for f in e] for e in entries]
    packer = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    text = json.dumps({"version": 1, "prefix": prefix, "splits": rows}, separators=(",", ":")).encode()
    data = packer.compress(text) + packer.flush()
    return data, hashlib.sha256(data).hexdigest()


def decode_chunk(name: str, data: bytes | None, digest: str, count: int) -> list[Entry]:
    """Raises DamagedLog when it is not what the log says."""
    where = (("listing", name),)
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        problem = "is missing" if data is None else "is not what the log says"
        raise DamagedLog(f"a listing of the run {problem}", where=where, hint="fresh=True begins a new run")
    try:
        body = json.loads(zlib.decompressobj(_GZIP).decompress(data, _LARGEST))
        entries = [tuple(_fragment(body["prefix"], f) for f in e) for e in body["splits"]]
        if len(entries) != count:
            raise ValueError(f"{len(entries)} splits, not {count}")
        return entries
    except (ValueError, KeyError, TypeError, zlib.error, RecursionError) as problem:
        raise DamagedLog(f"a listing of the run can't be read: {problem}", where=where) from None


def _fragment(prefix: str, f: Any) -> Part:
    uri, version, size, start, stop, *by_rows = cast("list[Any]", f)
    if not (isinstance(uri, str) and isinstance(version, str) and all(type(n) is int for n in (size, start, stop))):
        raise ValueError("a fragment of the wrong types")
    if by_rows not in ([], [1]):
        raise ValueError("a fragment of an unknown unit")
    return (prefix + uri, version, size, start, stop, 1) if by_rows else (prefix + uri, version, size, start, stop)


def _common_prefix(uris: Sequence[str]) -> str:
    low, high = min(uris, default=""), max(uris, default="")
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return low[: low[:same].rfind("/") + 1]


class _File(Struct, frozen=True):
    version: str
    size: int


def changed(first: int, logged: Iterable[Entry], found: Iterable[Entry]) -> InputChanged:
    """The error for listings that differ from split `first` on; logged, found: what follows there."""
    before, after = _files(logged), _files(found)
    added = [uri for uri in after if uri not in before]
    removed = [uri for uri in before if uri not in after]
    other = [uri for uri in after if uri in before and before[uri] != after[uri]]
    where: list[tuple[str, str]] = [("from", f"split {first}")]
    where += [("added", uri) for uri in added[:_NAMED]]
    where += [("removed", uri) for uri in removed[:_NAMED]]
    for uri in other[:_NAMED]:
        was, now = before[uri], after[uri]
        sizes = f"{was.size} -> {now.size} bytes" if was.size != now.size else f"{was.size} bytes, written anew"
        where.append(("changed", f"{uri} ({sizes})"))
    counts = [f"{len(names)} {word}" for names, word in ((added, "added"), (removed, "removed"), (other, "changed")) if names]
    what = ", ".join(counts) or "the same files, listed or divided otherwise"
    return InputChanged(
        f"the input is not what this run began with: {what}",
        where=tuple(where),
        hint="fresh=True begins anew with the input as it is; or put the input back as it was",
    )


def _files(entries: Iterable[Entry]) -> dict[str, _File]:
    return {f[0]: _File(f[1], f[2]) for e in islice(entries, _LOOK_AHEAD) for f in e}
