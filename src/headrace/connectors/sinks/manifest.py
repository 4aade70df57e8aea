"""The manifest of a finished destination, `_manifest.json`: how it is written, and how any file of that name is read.

Invariants: reading executes nothing and trusts nothing: what is not as it should be is left out or told, never raised. Only
`read_manifest` holds more than a piece of it: ten million files make it 1.5 GB.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, cast

from msgspec import Struct

from headrace.core.receipts import FileKind, OutputFile

VERSION = 1
LISTS: dict[str, FileKind] = {"files": "output", "quarantine": "quarantine", "lineage": "lineage"}

_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make one for each value
_PIECE_CHARS = 1 << 18  # at least, in a piece of what is written
_VALUE_CHARS = 64 << 20  # at most, in one value (an item of a list, or all of what is no list): no run writes larger ones


def encode_manifest(
    head: Mapping[str, Any],
    replaced: Iterable[str],
    files: Iterable[OutputFile],
    kinds: Collection[FileKind],
    summary: Mapping[str, Any],
) -> Iterator[bytes]:
    """In pieces. JSON with a line for each key, and for each file.

    head: what the sink says; it wins over the summary's keys. replaced: names. files: in split order, iterated for each of the
    kinds that there are among them.
    """
    yield from _pieces(_text(head, replaced, files, kinds, summary))


def _text(
    head: Mapping[str, Any],
    replaced: Iterable[str],
    files: Iterable[OutputFile],
    kinds: Collection[FileKind],
    summary: Mapping[str, Any],
) -> Iterator[str]:
    first = {"version": VERSION, "headrace": _release(), **head}
    between = "{\n"
    for key, value in first.items():
        yield f"{between} {_quoted(key)}: {_json(value)}"
        between = ",\n"
    yield ',\n "replaced": ['
    between = ""
    for name in replaced:
        yield f"{between}{_quoted(name)}"
        between = ", "
    yield "]"
    for key, value in summary.items():
        if key not in first and key not in LISTS and key != "replaced":
            yield f",\n {_quoted(key)}: {_json(value)}"
    for key, kind in LISTS.items():
        yield f',\n "{key}": ['
        between = "\n  "
        for f in files if kind in kinds else ():
            if f.kind == kind:  # as json.dumps would, in a third of the time
                item = f'{{"name": {_quoted(f.name)}, "rows": {f.rows}, "bytes": {f.bytes}, "digest": {_quoted(f.digest)}}}'
                yield between + item
                between = ",\n  "
        yield "\n ]" if kind in kinds else "]"
    yield "\n}\n"


def _pieces(text: Iterable[str]) -> Iterator[bytes]:
    waiting: list[str] = []
    size = 0
    for part in text:
        waiting.append(part)
        size += len(part)
        if size >= _PIECE_CHARS:
            yield "".join(waiting).encode()
            waiting.clear()
            size = 0
    yield "".join(waiting).encode()


def _json(value: Any) -> str:
    if value is None or type(value) is int:
        return "null" if value is None else str(value)
    return _quoted(value) if type(value) is str else _encode(plain(value))


def read_manifest(data: bytes | None) -> dict[str, Any] | None:
    """The manifest; None when there is none that can be read."""
    if data is None:
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", body) if isinstance(body, dict) else None


class Outline(Struct, frozen=True):
    """Whose a manifest is; run, generation: as they stand there, whatever they are."""

    run: Any
    generation: Any


def outline(chunks: Iterable[bytes]) -> Outline | None:
    """Of the manifest with these bytes, which are read to their end; None when there is none that can be read."""
    values: dict[str, Any] = {}
    try:
        for key, is_item, value in _walk(chunks):
            if not is_item and key in ("run", "generation"):
                values[key] = value
    except (ValueError, RecursionError):
        return None
    return Outline(values.get("run"), values.get("generation"))


def names_in(chunks: Iterable[bytes], key: str) -> Iterator[str]:
    """Names in a list of a manifest (plain, or in objects with a "name"), those that stay inside of the destination only."""
    try:
        for found, is_item, value in _walk(chunks):
            if is_item and found == key:
                name: object = cast("dict[str, Any]", value).get("name") if isinstance(value, dict) else value
                if isinstance(name, str) and is_inside(name):
                    yield name
    except (ValueError, RecursionError):
        return


def value_in(chunks: Iterable[bytes], key: str) -> Any:
    """What a JSON object with these bytes says under the key (the first one of that name); None for nothing, and for a list.

    Reads no further than there: what follows may be anything.
    """
    try:
        return next((value for found, is_item, value in _walk(chunks) if found == key and not is_item), None)
    except (ValueError, RecursionError):
        return None


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


def _walk(chunks: Iterable[bytes]) -> Iterator[tuple[str, bool, Any]]:
    """(key, False, value) of a JSON object, but of lists: (key, True, item), one by one. Raises ValueError, RecursionError."""
    text = _Text(chunks)
    text.expect("{")
    if text.peek() == "}":
        return text.end()
    while True:
        key = text.value()
        if not isinstance(key, str):
            raise ValueError("a key that is no string")
        text.expect(":")
        if text.peek() == "[":
            text.expect("[")
            more = text.peek() != "]"
            while more:
                yield key, True, text.value()
                more = text.peek() == ","
                if more:
                    text.expect(",")
            text.expect("]")
        else:
            yield key, False, text.value()
        if text.peek() == "}":
            return text.end()
        text.expect(",")


class _Text:
    """JSON, taken value by value from chunks of UTF-8."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if (char := self._text[self._at]) not in " \t\r\n":
                    return char
                self._at += 1
            if not self._more():
                return ""

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise ValueError(f"no {char!r} where one is due")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, at = self._decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > _VALUE_CHARS or not self._more():
                    raise
                continue
            size = at - self._at
            if len(self._text) - at < 4 and self._more():
                continue  # a number may go on: 1, 1.5, 1.5e+7
            self._at += size
            return value

    def end(self) -> None:
        self.expect("}")
        if self.peek():
            raise ValueError("something follows the object")

    def _more(self) -> bool:
        """Take at least as much as is left, so that no value is looked at too often; False at the end. What is behind goes."""
        kept = self._text[self._at :]
        pieces = [kept]
        wanted = max(1, len(kept))
        while wanted > 0:
            data = next(self._chunks, None)
            pieces.append(self._bytes.decode(b"" if data is None else data, final=data is None))
            wanted -= len(pieces[-1])
            if data is None:
                break
        self._text, self._at = "".join(pieces), 0
        return len(self._text) > len(kept)


def _release() -> str:
    import headrace  # what the packaging knows takes 10 ms to ask

    return headrace.__version__
