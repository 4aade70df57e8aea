"""What all sinks of files share: names, generations, staging, publishing, the end of a run.

A subclass gives `name`, `extension`, `_encoder` and, where types can be refused, `_refuse`. Rules:
- packed outputs are part-<generation>-<split index>; a run over leftovers, or a fresh one, takes the next generation and
  removes older ones in `finish`, never before. per_input outputs are named after their input; where a finished run's outputs
  would be replaced they wait in _headrace/next until `finish`.
- only names of our own pattern, or listed as "files" by the manifest found in `prepare`, are ever deleted.
"""

from __future__ import annotations

import copy
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import unquote, urlparse

import pyarrow as pa

from headrace.connectors import storage
from headrace.connectors.blocks import conform
from headrace.connectors.listing import output_stem
from headrace.connectors.sinks.destination import PRIVATE, Destination, destination, quietly
from headrace.core.errors import DataError, DestinationError, PlanError
from headrace.core.options import Outputs
from headrace.core.receipts import OutputFile, Receipt
from headrace.core.splits import Split

_PART = re.compile(r"part-(\d{2,})-\d{6,}\.(parquet|csv|jsonl)")
_OUTPUTS = (".parquet", ".csv", ".jsonl")
_NEXT = f"{PRIVATE}/next"


class Encoder(Protocol):
    """A file in the making. Nothing is readable before `close`."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


class FileSink(ABC):
    """A directory (or S3 prefix) of files of one format.

    outputs: "packed", one file a split, or "per_input", one file an input. fresh: replace the output of a finished run, which
    stays until the new one is complete.
    """

    name: str = ""
    extension: ClassVar[str] = ""

    def __init__(self, path: str | os.PathLike[str], *, outputs: Outputs = "packed", fresh: bool = False) -> None:
        if outputs not in ("packed", "per_input"):
            raise PlanError(f"outputs={outputs!r} is unknown", hint='use "packed" or "per_input"')
        self.path = _normalise(path)
        self.per_input = outputs == "per_input"
        self.fresh = fresh
        self._token = ""
        self._generation = 0
        self._replaced: tuple[str, ...] = ()  # per_input names of the run that this one replaces
        self._schema: pa.Schema | None = None
        self._hold = False  # publish to _headrace/next until finish

    # -- in the driver

    def prepare(self, schema: pa.Schema | None) -> Self:
        if schema is not None:
            self._refuse(schema)
        there = destination(self.path)
        there.check()
        finished = there.read("_SUCCESS") is not None
        if finished and not self.fresh:
            quietly(there.clean, "none")
            raise DestinationError(
                "the destination holds the complete output of an earlier run",
                where=(("destination", self.path),),
                hint="nothing is left to do; fresh=True writes it anew, another path keeps both",
            )
        out = copy.copy(self)
        out._schema = schema
        out._token = secrets.token_hex(6)
        generations = [int(m[1]) for name in there.names() if (m := _PART.fullmatch(name))]
        out._generation = max(generations, default=-1) + 1
        out._replaced = _files_of(there.read("_manifest.json"))
        out._hold = self.per_input and finished
        there.claim(out._token, out)
        for name in list(there.names(_NEXT)):
            there.delete(name)  # a fresh run that never finished
        return out

    def finish(self, summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        there = destination(self.path)
        if self._hold:
            there.delete("_SUCCESS")  # from here to the end the output is a mixture, and must not look complete
        written = self._promote(there)
        self._write_empty_files(there, summary.get("files", ()), schema)
        manifest = {
            **summary,
            "schema": None if schema is None else schema.to_string(show_schema_metadata=False),
            "format": self.name,
            "outputs": "per_input" if self.per_input else "packed",
            "generation": self._generation,
        }
        there.write("_manifest.json", _readable(manifest))
        there.write("_SUCCESS", b"")
        self._remove_older(there, keep=written)
        there.clean(self._token)

    def abandon(self) -> None:
        there = destination(self.path)
        if self._hold:
            for name in _listed(there, _NEXT):
                quietly(there.delete, name)
        quietly(there.clean, self._token)

    def describe(self) -> str:
        return f"{self.name} to {self.path}, {'one output per input' if self.per_input else 'packed'}"

    # -- in workers

    def open(self, split: Split, attempt: int) -> FileSplitWriter:
        if not self._token:
            raise PlanError("the sink is not prepared", hint="use the sink that prepare() returned")
        return FileSplitWriter(self, split, attempt)

    def output_name(self, split: Split) -> str:
        """Where the split's rows go, relative to the destination."""
        if not self.per_input:
            return f"part-{self._generation:02d}-{split.index:06d}{self.extension}"
        given = split.fragments[0].name
        name = PurePosixPath(output_stem(given) + self.extension)
        if not given or name.is_absolute() or ".." in name.parts or name.parts[0] == PRIVATE:
            raise DestinationError(f"an output can't be named after the input {given!r}", where=(("split", split.label),))
        if _is_same(f"{self.path}/{name}", split.fragments[0].uri):
            where = (("input", split.fragments[0].uri), ("destination", self.path))
            raise DestinationError("the output would replace its own input", where=where, hint="write to another directory")
        return str(name)

    @property
    def typical_output(self) -> str:
        """The path of an output; for telling whether the outputs would be input as well."""
        return f"{self.path}/part-00-000000{self.extension}"

    @abstractmethod
    def _encoder(self, path: str, schema: pa.Schema, sample: pa.RecordBatch | None) -> Encoder:
        """Begin a file. sample: its first batch, None for an empty file."""
        ...

    def _refuse(self, schema: pa.Schema) -> None:
        """Raise PlanError for a type that the format can't hold."""
        return

    # -- ends

    def _promote(self, there: Destination) -> set[str]:
        moved: set[str] = set()
        if self._hold:
            for name in _listed(there, _NEXT):
                final = name.removeprefix(f"{_NEXT}/")
                there.move(name, final)
                moved.add(final)
        return moved

    def _is_mine(self, name: str) -> bool:
        m = _PART.fullmatch(name)
        return m is not None and int(m[1]) == self._generation

    def _write_empty_files(self, there: Destination, files: Sequence[Mapping[str, Any]], schema: pa.Schema | None) -> None:
        """Outputs of no rows: those that waited for a schema, or the one file of a packed run without rows."""
        names = [str(f["name"]) for f in files if not f["bytes"]]
        if not self.per_input and not any(self._is_mine(n) for n in there.names()):
            names = [f"part-{self._generation:02d}-000000{self.extension}"]
        if not names:
            return
        if schema is None:
            filled = next((str(f["name"]) for f in files if f["rows"]), None)
            schema = pa.schema([]) if filled is None else self._written_schema(f"{self.path}/{filled}")
        for name in names:
            staged = os.path.join(there.staging(self._token), f"empty{self.extension}")
            self._encoder(staged, schema, None).close()
            there.publish(staged, name, replace=True)

    def _written_schema(self, path: str) -> pa.Schema:
        """The schema of an output file; formats that keep none in an empty file need not tell."""
        return pa.schema([])

    def _remove_older(self, there: Destination, keep: set[str]) -> None:
        for name in list(there.names()):
            m = _PART.fullmatch(name)
            if m is not None and (self.per_input or int(m[1]) < self._generation):
                there.delete(name)
        for name in self._replaced:
            gone = not self.per_input or (self._hold and name not in keep)
            if gone and not self._is_mine(name) and PurePosixPath(name).suffix in _OUTPUTS:
                there.delete(name)


class FileSplitWriter:
    """The output of one attempt at one split. The first batch fixes the file's schema; later ones are cast to it."""

    def __init__(self, sink: FileSink, split: Split, attempt: int) -> None:
        self._sink = sink
        self._split = split
        self._attempt = attempt
        self._name = sink.output_name(split)
        self._there = destination(sink.path)
        folder = self._there.staging(sink._token)
        self._staged = os.path.join(folder, f"{split.index:06d}-{attempt}{sink.extension}")
        self._encoder: Encoder | None = None
        self._schema: pa.Schema | None = None
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        where = (("output", self._name),)
        if self._schema is None:
            try:
                self._sink._refuse(batch.schema)
            except PlanError as e:
                raise DataError(e.message, where=(*where, *e.where), hint=e.hint) from e
            self._begin(batch.schema.remove_metadata(), batch)
        assert self._schema is not None
        assert self._encoder is not None
        batch = conform(batch, self._schema, where)
        try:
            self._encoder.write(batch)
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise DataError(f"the rows can't be written as {self._sink.name}: {e}", where=where) from e
        except OSError as e:
            raise DestinationError(f"can't write: {e}", where=(("file", self._staged),), hint="is the disk full?") from e
        self._rows += batch.num_rows

    def close(self) -> Receipt:
        if self._encoder is None:
            if not self._sink.per_input:
                return Receipt(self._split.index, self._split.id, self._attempt)
            if self._sink._schema is None:
                output = OutputFile(self._name, 0, 0)
                return Receipt(self._split.index, self._split.id, self._attempt, (output,), 0)
            self._begin(self._sink._schema, None)
        assert self._encoder is not None
        try:
            self._encoder.close()
            size = os.path.getsize(self._staged)
            name = f"{_NEXT}/{self._name}" if self._sink._hold else self._name
            self._there.publish(self._staged, name, replace=self._sink.per_input)
        except OSError as e:
            self.abort()
            where = (("file", f"{self._sink.path}/{self._name}"),)
            raise DestinationError(f"can't write: {e}", where=where, hint="is the disk full, or the path not ours?") from e
        self._encoder = None
        output = OutputFile(self._name, self._rows, size)
        return Receipt(self._split.index, self._split.id, self._attempt, (output,), self._rows)

    def abort(self) -> None:
        if self._encoder is not None:
            quietly(_close_broken, self._encoder)
            self._encoder = None
        quietly(_unlink, self._staged)

    def _begin(self, schema: pa.Schema, sample: pa.RecordBatch | None) -> None:
        self._schema = schema
        try:
            self._encoder = self._sink._encoder(self._staged, schema, sample)
        except OSError as e:
            raise DestinationError(f"can't write: {e}", where=(("file", self._staged),)) from e


def _close_broken(encoder: Encoder) -> None:
    try:
        encoder.close()
    except (pa.ArrowException, ValueError):
        return


def _unlink(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)


def _is_same(path: str, other: str) -> bool:
    if path == other:
        return True
    try:
        return not storage.is_remote(path) and os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return False


def _listed(there: Destination, folder: str) -> list[str]:
    return sorted(there.names(folder))


def _normalise(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if storage.is_remote(text):
        return text.rstrip("/")
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise PlanError(f"can't write to {text!r}: unknown scheme", hint="use a local path, file:// or s3://")
    return os.path.abspath(os.path.expanduser(text))


def _readable(manifest: Mapping[str, Any]) -> bytes:
    """JSON with a line for each key, and for each file: json's own indentation is ten times slower on many files."""
    lines: list[str] = []
    for key, value in manifest.items():
        if key == "files" and value:
            items = ",\n  ".join(json.dumps(item, default=str) for item in value)
            lines.append(f' "files": [\n  {items}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, default=str)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _files_of(manifest: bytes | None) -> tuple[str, ...]:
    """Output names that an earlier manifest lists under "files" (names, or objects with a "name"), safe ones only."""
    if manifest is None:
        return ()
    try:
        listed = json.loads(manifest).get("files") or []
    except (ValueError, AttributeError):
        return ()
    names = [f.get("name") if isinstance(f, dict) else f for f in listed if isinstance(f, dict | str)]
    return tuple(n for n in names if isinstance(n, str) and n and n[0] != "/" and ".." not in n.split("/"))
