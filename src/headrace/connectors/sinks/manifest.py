"""The manifest of a finished destination, `_manifest.json`: how it is written, and how any file of that name is read.

Invariant: reading executes nothing and trusts nothing: what is not as it should be is left out or told, never raised.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from headrace.core.receipts import OutputFile

VERSION = 1
LISTS = ("files", "quarantine", "lineage")


def encode_manifest(head: Mapping[str, Any], files: Sequence[OutputFile], summary: Mapping[str, Any]) -> bytes:
    """head: what the sink says; it wins over the summary's keys. files: of all kinds, in split order."""
    kinds = {"output": "files", "quarantine": "quarantine", "lineage": "lineage"}
    lists: dict[str, list[dict[str, Any]]] = {name: [] for name in LISTS}
    for f in files:
        lists[kinds[f.kind]].append({"name": f.name, "rows": f.rows, "bytes": f.bytes, "digest": f.digest})
    body = {"version": VERSION, "headrace": _release(), **head}
    body |= {k: v for k, v in summary.items() if k not in body and k not in lists}
    return _readable({**body, **lists})


def read_manifest(data: bytes | None) -> dict[str, Any] | None:
    """The manifest; None when there is none that can be read."""
    if data is None:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", body) if isinstance(body, dict) else None


def listed_names(body: Mapping[str, Any] | None, key: str = "files") -> tuple[str, ...]:
    """Names under a key (plain, or in objects with a "name"), those that stay inside of the destination only."""
    listed = (body or {}).get(key)
    if not isinstance(listed, list):
        return ()
    found = (f.get("name") if isinstance(f, dict) else f for f in cast("list[Any]", listed))
    return tuple(n for n in found if isinstance(n, str) and is_inside(n))


def is_inside(name: str) -> bool:
    """Does the name stay inside of the destination, and apart from what a run keeps for itself?"""
    parts = name.split("/")
    return all(p not in ("", ".", "..") and p.isprintable() for p in parts) and parts[0] != "_headrace"


def plain(value: Any) -> Any:
    """As JSON has it: NaN and infinities are null, unknown types text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in cast("Sequence[Any]", value)]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _readable(body: Mapping[str, Any]) -> bytes:
    """JSON with a line for each key, and for each file: json's own indentation is ten times slower on many files."""
    lines: list[str] = []
    for key, value in body.items():
        if key in LISTS and value:
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(plain(value), allow_nan=False)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _release() -> str:
    try:
        return importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
