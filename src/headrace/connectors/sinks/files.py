"""What all sinks of files share: names, generations, staging, the end of a run.

A subclass gives `name`, `extension`, `_encoder` and, where types can be refused, `_refuse`. Rules:
- writers stage only, under _headrace/<run>/staging/, in names that begin with the epoch; final names are given by
  RunStore.publish, after the run log;
- packed outputs are part-<generation>-<split index>, per_input outputs are named after their input; the generation is the run's
  number;
- `finish` is redone by a later session after a crash anywhere in it: the new output is whole before the manifest names it, and
  nothing older is removed before that;
- only names of our own pattern with a lower generation, names that the manifest of the replaced run lists or the log of
  an earlier run holds, and what lies below _headrace are ever removed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
import re
import secrets
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
from msgspec import Struct
from msgspec.structs import replace

from headrace.commit.names import (
    MANIFEST,
    PRIVATE,
    SUCCESS,
    check_file,
    complete_name,
    generation_of,
    lineage_name,
    log_folder,
    log_name,
    quarantine_name,
    run_name,
    staged_epoch,
    staging_folder,
)
from headrace.commit.records import decode
from headrace.commit.state import LogState
from headrace.connectors import storage
from headrace.connectors.listing import output_stem
from headrace.connectors.name_set import NameList, NameSet
from headrace.connectors.redact import redact
from headrace.connectors.run_store import (
    LocalRunStore,
    S3RunStore,
    digest_of,
    disk_error,
    forget_folders,
    open_store,
    quietly,
    write_whole,
)
from headrace.connectors.sinks import claims
from headrace.connectors.sinks.manifest import encode_manifest, names_in, outline
from headrace.connectors.spool import FileSpool
from headrace.core.errors import DataError, DestinationError, InternalError, PlanError, SchemaConflict
from headrace.core.lineage import LineageColumns
from headrace.core.options import Outputs
from headrace.core.paths import absolute
from headrace.core.receipts import FileKind, LineageRun, OutputFile, Receipt
from headrace.core.schemas import Conflict, bring, unify
from headrace.core.splits import Split
from headrace.core.tensors import numpy_to_array, texts_to_array

_DRIFT_HINT = "return one type for every row, None where there is no value; declare it (schema=) to have it checked row by row"
LINEAGE_IN_RECEIPT = 64  # runs; more are a file: the log is read whole by every session

SMALL_BYTES = 1 << 20  # files up to about this size are encoded in memory: one write, and a digest without reading them again

GROUP_FILES = 1000  # published at once: S3 deletes so many in one request
_PART = re.compile(r"part-(\d{2,9})-\d{6,}\.(parquet|csv|jsonl)")
_OUTPUTS = (".parquet", ".csv", ".jsonl")
_LINEAGE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("rows", pa.int64()),
        ("uri", pa.dictionary(pa.int32(), pa.string())),
        ("source_row", pa.int64()),
        ("source_rows", pa.int64()),
        ("exact", pa.bool_()),
    ]
)
# Numbers that mostly grow by a little: a third of the time and a tenth of the bytes that dictionaries would take.
_LINEAGE_STORED: dict[str, Any] = {
    "use_dictionary": ["uri"],
    "column_encoding": dict.fromkeys(("row", "rows", "source_row", "source_rows"), "DELTA_BINARY_PACKED"),
    "write_statistics": False,
}

_staged = itertools.count()  # keeps apart what one thread sets aside


class Written(Struct, frozen=True):
    """A whole file. digest: SHA-256."""

    bytes: int
    digest: str


class Part(Struct, frozen=True):
    """A whole local file of some of an output's rows. schema: its own, whose columns are the output's first ones."""

    path: str
    schema: pa.Schema
    rows: int


class Encoder(Protocol):
    """A file in the making. Nothing is readable before `close`."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> Written | None:
        """None: the bytes went by unseen, and have to be read for their digest."""
        ...


class FileSink(ABC):
    """A directory (or S3 prefix) of files of one format.

    outputs: "packed", one file a split, or "per_input", one file an input. fresh: replace the output of a finished run, which
    stays until the new one is complete.
    """

    name: str = ""
    extension: ClassVar[str] = ""
    widens: ClassVar[bool] = False
    """Can a file that was begun take rows with more columns, or of wider types?"""

    def __init__(self, path: str | os.PathLike[str], *, outputs: Outputs = "packed", fresh: bool = False) -> None:
        if outputs not in ("packed", "per_input"):
            raise PlanError(f"outputs={outputs!r} is unknown", hint='use "packed" or "per_input"')
        self.path = normalise(path)
        self.per_input = outputs == "per_input"
        self.fresh = fresh
        self._run = ""
        self._epoch = 0
        self._home = (0, 0)  # process and thread that bound it
        self._generation = 0
        self._scratch = ""  # local directory for files on their way to S3
        self._schema: pa.Schema | None = None
        self._opened: LocalRunStore | S3RunStore | None = None
        self._types: tuple[pa.Schema, tuple[tuple[str, str], ...]] | None = None  # of the last file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_types": None}

    # -- in the driver

    def check(self, schema: pa.Schema | None) -> None:
        if schema is not None:
            self._refuse(schema)
        open_store(self.path).check()

    def store(self) -> LocalRunStore | S3RunStore:
        self._opened = open_store(self.path, probe=True)
        return self._opened

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> Self:
        if generation_of(run) < 0:
            raise DestinationError(f"{run!r} is no run's name", where=(("destination", redact(self.path)),))
        out = copy.copy(self)
        out._run, out._epoch, out._generation = run, epoch, generation_of(run)
        out._schema = schema
        out._home = (os.getpid(), threading.get_ident())
        if storage.is_remote(self.path):  # with a store of its own, that knows where scratch files are
            claims.remove_stale(tempfile.gettempdir())
            out._scratch = os.path.join(tempfile.gettempdir(), f"headrace-staging-{secrets.token_hex(6)}")
            claims.claim(out._scratch, out)
        else:
            out._opened = self._opened
            forget_folders(self.path)
        return out

    def finish(self, files: Sequence[OutputFile], summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        there = self._there
        old = outline(there.chunks(MANIFEST))
        shown = old is not None and (old.run, old.generation) == (self._run, self._generation)
        if shown:
            older = NameList()
            older.extend(names_in(there.chunks(MANIFEST), "replaced"))
        else:
            older = self._older_outputs(there, old is not None)
            self._show(there, files, summary, schema, older, old is not None)
        if there.read(SUCCESS) is None or not shown:
            there.write(SUCCESS, b"")
        for run in self._earlier(given_up=True):
            there.remove(staging_folder(run))  # before its outputs: a driver of it that still lives can publish none again
        self._remove_older(there, files, older)
        there.remove(staging_folder(self._run))
        for folder in {"/".join(name.split("/")[:2]) for name in there.names(PRIVATE) if name.startswith(f"{PRIVATE}/tmp")}:
            quietly(there.remove, folder)  # what a process that died in the middle of something has left; or a heartbeat's
        self._let_go()

    def release(self) -> None:
        quietly(self._remove_unlogged)
        quietly(self._let_go)

    def describe(self) -> str:
        return f"{self.name} to {redact(self.path)}, {'one output per input' if self.per_input else 'packed'}"

    # -- in workers

    def open(self, split: Split, attempt: int) -> FileSplitWriter:
        return FileSplitWriter(self, split, attempt)

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        staged = self._staged_name(f"{split:06d}-{attempt}-aside-{next(_staged)}.parquet")
        return self._stage_table(staged, quarantine_name(self._run, split, 0), rows, "quarantine")

    def output_name(self, split: Split) -> str:
        """Where the split's rows go, relative to the destination."""
        if not self.per_input:
            return f"part-{self._generation:02d}-{split.index:06d}{self.extension}"
        given = split.fragments[0].name
        name = output_stem(given) + self.extension
        try:
            check_file(self._run, OutputFile(name, 0, 0))
            if not given:
                raise DestinationError("it has no name")
            if any(part[:1] in ("_", ".") for part in name.split("/")):
                raise DestinationError("whoever reads the destination passes over names that begin with _ or .")
        except DestinationError as e:
            where = (("split", redact(split.label)),)
            text = f"an output can't be named after the input {given!r}: {e.message}"
            raise DestinationError(text, where=where, hint="rename the input, or write without outputs='per_input'") from e
        if _is_same(f"{self.path}/{name}", split.fragments[0].uri):
            where = (("input", redact(split.fragments[0].uri)), ("destination", redact(self.path)))
            raise DestinationError("the output would replace its own input", where=where, hint="write to another directory")
        return name

    @property
    def typical_output(self) -> str:
        """The path of an output; for telling whether the outputs would be input as well."""
        return f"{self.path}/part-00-000000{self.extension}"

    @abstractmethod
    def _encoder(self, path: str, schema: pa.Schema, sample: pa.RecordBatch | None) -> Encoder:
        """Begin a file. sample: its first batch, None for an empty file."""
        ...

    def _join(self, parts: Sequence[Part], path: str, schema: pa.Schema) -> tuple[int, Written | None]:
        """Write the rows of files of this sink as one, in their order, and remove each when it has been read: (rows, the file).

        Sinks that do not widen, or that `_joins_alone`, have it. Raises ArrowException for a value that does not fit `schema`.
        """
        raise NotImplementedError

    def _joins_alone(self, schema: pa.Schema) -> bool:
        """Does a file of this schema need `_join` even where there are no others?"""
        return False

    def _refuse(self, schema: pa.Schema) -> None:
        """Raise PlanError for a type that the format can't hold."""
        return

    def _holds(self, field: pa.Field) -> bool:
        """Can a file without rows have this column? Elsewhere it is null: there is nothing to hold."""
        try:
            self._refuse(pa.schema([field]))
        except PlanError:
            return False
        return True

    @property
    def _there(self) -> LocalRunStore | S3RunStore:
        if not self._run:
            raise PlanError("the sink is not bound to a run", hint="use the sink that bind() returned")
        if self._opened is None:
            self._opened = open_store(self.path, scratch=self._scratch)
        return self._opened

    def _types_of(self, schema: pa.Schema) -> tuple[tuple[str, str], ...]:
        """(column, type as text); files after one another are mostly of one schema."""
        last = self._types
        if last is None or not last[0].equals(schema):
            self._types = last = (schema, tuple((f.name, str(f.type)) for f in schema))
        return last[1]

    def _staged_name(self, base: str) -> str:
        # A folder a worker: creating files in one folder from several processes at once is slow on most file systems. The
        # inline engine's only worker, in the driver's thread, needs none: each new folder takes an fsync of the one above.
        worker = os.getpid(), threading.get_ident()
        if worker == self._home:
            return f"{staging_folder(self._run)}/{self._epoch}-{base}"
        return f"{staging_folder(self._run)}/{self._epoch}/{worker[0]}-{worker[1]}/{base}"

    def _stage_table(self, staged: str, name: str, rows: pa.Table, kind: Any, **options: Any) -> OutputFile:
        """Stage a Parquet file of our own. options: of pyarrow's writer."""
        import pyarrow.parquet as pq

        there = self._there
        path = there.begin(staged)
        try:
            pq.write_table(rows, path, compression="zstd", **options)
            done = Written(os.path.getsize(path), digest_of(path))
            there.stage(staged, path, done.digest)
        except OSError as e:
            quietly(there.drop, staged, path)
            raise disk_error(e, path) from e
        except BaseException:
            quietly(there.drop, staged, path)
            raise
        return OutputFile(name, rows.num_rows, done.bytes, done.digest, staged, kind)

    # -- the end of a run

    def _show(
        self,
        there: LocalRunStore | S3RunStore,
        files: Sequence[OutputFile],
        summary: Mapping[str, Any],
        schema: pa.Schema | None,
        older: NameList,
        held: bool,
    ) -> None:
        """Make this run the destination's output: everything up to its manifest."""
        if held and self.per_input:
            there.remove(SUCCESS)  # from here to the end the output is a mixture, and must not look complete
        if held:
            waiting: Iterable[OutputFile] = files
        else:  # the committer has published them, but for what a crash or a lost answer left
            staged = frozenset(there.names(staging_folder(self._run)))
            waiting = (f for f in files if f.staged in staged) if staged else ()
        for some in _groups(waiting):
            there.publish(some, older)
        whole = _Whole(files)
        if schema is not None and not whole.rows:
            schema = pa.schema([f if self._holds(f) else f.with_type(pa.null()) for f in schema])
        self._add_empty_files(there, whole, schema, older)
        head = {
            "run": self._run,
            "generation": self._generation,
            "format": self.name,
            "outputs": "per_input" if self.per_input else "packed",
            "rows": whole.rows,
            "schema": None if schema is None else schema.to_string(show_field_metadata=False, show_schema_metadata=False),
        }
        mine = NameSet(f.name for f in whole if f.kind == "output") if older else ()

        def pieces() -> Iterator[bytes]:
            return encode_manifest(head, (name for name in older if name not in mine), whole, whole.kinds, summary)

        there.write_pieces(MANIFEST, pieces)

    def _add_empty_files(
        self, there: LocalRunStore | S3RunStore, whole: _Whole, schema: pa.Schema | None, older: NameList
    ) -> None:
        """Make outputs of no rows: those that waited for a schema, or the one file of a packed run without rows."""
        if not self.per_input and "output" not in whole.kinds:
            whole.add(OutputFile(f"part-{self._generation:02d}-000000{self.extension}", 0, 0))
        if not whole.waits:
            return
        if schema is None:
            schema = pa.schema([]) if whole.filled is None else self._written_schema(there.uri(whole.filled))
        numbers = itertools.count()
        for some in _groups(f for f in whole if _waits(f)):
            made = [self._stage_empty(there, f, next(numbers), schema, whole) for f in some]
            if there.sync(made):
                raise DestinationError("empty outputs could not be made durable", where=(("destination", redact(self.path)),))
            there.publish(made, older)
        whole.waits = False

    def _stage_empty(
        self, there: LocalRunStore | S3RunStore, file: OutputFile, number: int, schema: pa.Schema, whole: _Whole
    ) -> OutputFile:
        """All of a run are alike: the first is encoded, the others are its copies."""
        staged = self._staged_name(f"empty-{number:06d}{self.extension}")
        path = there.begin(staged)
        try:
            if whole.empty is None:
                done = measured(self._encoder(path, schema, None).close(), path)
                whole.empty = (Path(path).read_bytes(), done.digest)
            else:
                write_whole(path, whole.empty[0])
        except OSError as e:
            quietly(there.drop, staged, path)
            raise disk_error(e, path) from e
        except pa.ArrowException as e:
            quietly(there.drop, staged, path)
            text = f"there are no rows, and a file of their columns can't be written as {self.name}: {e}"
            raise DataError(text, where=(("output", file.name),), hint="drop that column, or write JSON lines") from e
        data, digest = whole.empty
        there.stage(staged, path, digest)
        return replace(file, bytes=len(data), digest=digest, staged=staged)

    def _written_schema(self, path: str) -> pa.Schema:
        """The schema of an output file; formats that keep none in an empty file need not tell."""
        return pa.schema([])

    def _older_outputs(self, there: LocalRunStore | S3RunStore, held: bool) -> NameList:
        """Outputs that this run replaces: what the manifest lists, and what runs published that were given up."""
        older = NameList()
        if held:
            older.extend(n for n in names_in(there.chunks(MANIFEST), "files") if _is_output(n))
        for run in self._earlier(given_up=held):
            state, readable = _replay(there, run)
            older.extend(f.name for f in state.settled.files if f.kind == "output" and _is_output(f.name))
            if not readable:
                older.extend(name for name in there.top() if (m := _PART.fullmatch(name)) and int(m[1]) == generation_of(run))
        return older

    def _earlier(self, *, given_up: bool) -> list[str]:
        """Earlier runs. given_up: those only that were never complete; the others have cleaned up after themselves."""
        runs = [run_name(generation) for generation in range(self._generation)]
        return [run for run in runs if not given_up or self._there.read(complete_name(run)) is None]

    def _remove_older(self, there: LocalRunStore | S3RunStore, files: Sequence[OutputFile], older: NameList) -> None:
        """Only what an earlier run's manifest or log names: other files, whatever they are called, belong to somebody else."""
        mine = NameSet(f.name for f in files) if older else ()
        there.remove_all(name for name in older if name not in mine)

    def _remove_unlogged(self) -> None:
        there = self._there
        staged = (n for n in there.names(staging_folder(self._run)) if staged_epoch(self._run, n) == self._epoch)
        first = next(staged, None)
        if first is None:
            return
        state, readable = _replay(there, self._run)
        if readable and state.next:
            logged = NameSet(f.staged for f in state.settled.files)
            unlogged = (name for name in itertools.chain((first,), staged) if name not in logged)
            there.remove_all(unlogged, staging_folder(self._run))  # which a driver that has taken over may be about to use

    def _let_go(self) -> None:
        if self._scratch:
            claims.release(self._scratch)
        else:
            forget_folders(self.path)


class FileSplitWriter:
    """The output of one attempt at one split. The file's schema is what all of its batches fit into: a column that comes later
    is null before, and so on (core.schemas). Where a file can't be widened, another is begun, and `close` writes them all anew
    as one: however often columns come, a row is written twice at most.
    """

    def __init__(self, sink: FileSink, split: Split, attempt: int) -> None:
        self._sink = sink
        self._split = split
        self._attempt = attempt
        self._there = sink._there
        self._name = sink.output_name(split)
        self._where = (("output", self._name),)
        self._staged = sink._staged_name(f"{split.index:06d}-{attempt}{sink.extension}")
        self._path = ""
        self._files: list[OutputFile] = []
        self._encoder: Encoder | None = None
        self._schema: pa.Schema | None = None
        self._narrow: list[Part] = []  # earlier files, of narrower schemas
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if self._schema is None:
            try:
                self._sink._refuse(batch.schema)
            except PlanError as e:
                raise DataError(e.message, where=(*self._where, *e.where), hint=e.hint) from e
            self._begin(batch.schema.remove_metadata(), batch)
        assert self._schema is not None
        assert self._encoder is not None
        if not batch.schema.equals(self._schema):
            batch = self._fit(batch)
        try:
            self._encoder.write(batch)
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise DataError(f"the rows can't be written as {self._sink.name}: {e}", where=self._where) from e
        except OSError as e:
            self.abort()
            raise disk_error(e, self._path) from e
        self._rows += batch.num_rows

    def _fit(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch in the file's schema, which is widened if it must be. Raises SchemaConflict; then nothing has changed."""
        assert self._schema is not None
        assert self._encoder is not None
        try:
            schema = unify(self._schema, batch.schema.remove_metadata())
            fitting = bring(batch, schema)
        except Conflict as c:
            text = f"column {c.name!r} is {c.then} here, but the output was begun with {c.first}"
            raise SchemaConflict(text, where=(*self._where, ("column", c.name)), hint=_DRIFT_HINT) from None
        except pa.ArrowInvalid as e:
            raise SchemaConflict(f"the rows don't fit the output: {e}", where=self._where, hint=_DRIFT_HINT) from None
        if not schema.equals(self._schema):
            self._sink._refuse(schema)
            if not self._sink.widens:
                self._go_on(schema, fitting)
            self._schema = schema
        return fitting

    def _go_on(self, schema: pa.Schema, sample: pa.RecordBatch) -> None:
        """Begin another file, of a wider schema."""
        with self._whole_or_none():
            self._end_file()
            self._encoder = self._sink._encoder(self._path, schema, sample)

    def _end_file(self) -> None:
        """Close the file, and put it beside where the whole one will be."""
        assert self._schema is not None
        self._close_encoder()
        narrow = f"{self._path}.narrow-{len(self._narrow)}"
        os.replace(self._path, narrow)
        self._narrow.append(Part(narrow, self._schema, self._rows - sum(part.rows for part in self._narrow)))

    def _close_encoder(self) -> Written | None:
        assert self._encoder is not None
        done = self._encoder.close()
        self._encoder = None
        return done

    def _join_files(self) -> Written | None:
        """Write the rows of all files as one. Raises DataError for a value that does not fit what came later."""
        assert self._schema is not None
        self._end_file()
        try:
            rows, done = self._sink._join(self._narrow, self._path, self._schema)
        except pa.ArrowException as e:
            raise DataError(f"earlier rows don't fit what came later: {e}", where=self._where, hint=_DRIFT_HINT) from None
        if rows != self._rows:
            raise InternalError(f"{self._rows:,} rows were written, and joining their files gave {rows:,}", where=self._where)
        self._narrow = []
        return done

    @contextlib.contextmanager
    def _whole_or_none(self) -> Iterator[None]:
        """An error inside ends the attempt: none of its files stay. Raises DataError for what Arrow refuses to write."""
        try:
            yield
        except OSError as e:
            self.abort()
            raise disk_error(e, self._path) from e
        except pa.ArrowException as e:
            self.abort()
            raise DataError(f"the rows can't be written as {self._sink.name}: {e}", where=self._where) from e
        except BaseException:
            self.abort()
            raise

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        if self._encoder is None:
            if not self._sink.per_input:
                return self._receipt(())
            if self._sink._schema is None:
                self._files.append(OutputFile(self._name, 0, 0))
                return self._receipt(())
            self._begin(self._sink._schema, None)
        with self._whole_or_none():
            assert self._schema is not None
            joined = self._narrow or self._sink._joins_alone(self._schema)
            done = measured(self._join_files() if joined else self._close_encoder(), self._path)
            self._there.stage(self._staged, self._path, done.digest)
            self._files.append(OutputFile(self._name, self._rows, done.bytes, done.digest, self._staged))
            return self._receipt(lineage)

    def abort(self) -> None:
        if self._encoder is not None:
            quietly(close_broken, self._encoder)
            self._encoder = None
        for part in self._narrow:
            with contextlib.suppress(OSError):
                os.unlink(part.path)
        self._narrow = []
        if self._path:
            quietly(self._there.drop, self._staged, self._path)
        for f in self._files:
            if f.staged not in ("", self._staged):
                quietly(self._there.remove, f.staged)
        self._files = []

    def _receipt(self, lineage: Sequence[LineageRun]) -> Receipt:
        if len(lineage) > LINEAGE_IN_RECEIPT:
            self._files.append(self._stage_lineage(LineageColumns.of(lineage)))
            lineage = ()
        types = () if self._schema is None or not self._rows else self._sink._types_of(self._schema)
        return Receipt(self._split.index, self._split.id, self._attempt, tuple(self._files), self._rows, tuple(lineage), types)

    def _stage_lineage(self, lineage: LineageColumns) -> OutputFile:
        uris = pa.DictionaryArray.from_arrays(numpy_to_array(lineage.uri.astype(np.int32)), texts_to_array(lineage.uris))
        columns = [uris if f.name == "uri" else numpy_to_array(getattr(lineage, f.name)) for f in _LINEAGE_SCHEMA]
        table = pa.Table.from_arrays(columns, schema=_LINEAGE_SCHEMA)
        staged = self._sink._staged_name(f"{self._split.index:06d}-{self._attempt}-lineage.parquet")
        return self._sink._stage_table(
            staged, lineage_name(self._sink._run, self._split.index), table, "lineage", **_LINEAGE_STORED
        )

    def _begin(self, schema: pa.Schema, sample: pa.RecordBatch | None) -> None:
        self._schema = schema
        try:
            self._path = self._there.begin(self._staged)
            self._encoder = self._sink._encoder(self._path, schema, sample)
        except OSError as e:
            raise disk_error(e, self._path) from e


class _Whole:
    """All files of a run as its manifest lists them, made while they are iterated: those of `files`, and what `add` was given.

    rows: of outputs. kinds: that there are. filled: the name of an output with rows. waits: there are outputs that are yet to
    be made; empty: their (bytes, digest), once one is made.
    """

    def __init__(self, files: Sequence[OutputFile]) -> None:
        self.rows = 0
        self.kinds: set[FileKind] = set()
        self.filled: str | None = None
        self.waits = False
        self.empty: tuple[bytes, str] | None = None
        self._files = files
        self._added: list[OutputFile] = []
        for f in files:
            self._note(f)

    def add(self, file: OutputFile) -> None:
        self._added.append(file)
        self._note(file)

    def _note(self, f: OutputFile) -> None:
        self.kinds.add(f.kind)
        if f.kind == "output":
            self.rows += f.rows
            self.waits |= _waits(f)
            if f.rows and self.filled is None:
                self.filled = f.name

    def __iter__(self) -> Iterator[OutputFile]:
        made = None if self.waits else self.empty
        for f in itertools.chain(self._files, self._added):
            yield f if made is None or not _waits(f) else replace(f, bytes=len(made[0]), digest=made[1])


def _is_output(name: str) -> bool:
    """By its name."""
    return name.endswith(_OUTPUTS) and name.rpartition("/")[2] not in _OUTPUTS


def _waits(f: OutputFile) -> bool:
    """Is it an output that the end of the run makes?"""
    return f.kind == "output" and not f.staged and not f.digest


def _groups(files: Iterable[OutputFile]) -> Iterator[list[OutputFile]]:
    left = iter(files)
    while group := list(itertools.islice(left, GROUP_FILES)):
        yield group


def written(path: str, data: Any) -> Written:
    """Write a whole file at once."""
    view = memoryview(data)
    write_whole(path, view)
    return Written(view.nbytes, hashlib.sha256(view).hexdigest())


def measured(done: Written | None, path: str) -> Written:
    """What is in a file that its encoder has closed."""
    return done if done is not None else Written(os.path.getsize(path), digest_of(path))


def close_broken(encoder: Encoder) -> None:
    """Let go of what an encoder holds, whose file is not wanted."""
    try:
        encoder.close()
    except (pa.ArrowException, ValueError):
        return


def _replay(store: LocalRunStore | S3RunStore, run: str) -> tuple[LogState, bool]:
    """(what a run's log amounts to, as far as it can be read; False where that is not to its end)."""
    state = LogState(run, FileSpool())
    try:
        while (data := store.read(log_name(run, state.next))) is not None:
            state.apply(decode(run, state.next, data))
            state.deltas.clear()
    except DestinationError:
        return state, False
    return state, sum(1 for _ in store.names(log_folder(run))) <= state.next


def _is_same(path: str, other: str) -> bool:
    if path == other:
        return True
    try:
        return not storage.is_remote(path) and os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return False


def cant_hold(what: str, field: pa.Field, instead: str) -> PlanError:
    """`what`: the format's name. instead: one that can."""
    text = f"{what} can't hold column {field.name!r} of type {field.type}"
    return PlanError(text, where=(("column", field.name),), hint=f"drop({field.name!r}), or write {instead}")


def holds_intervals(t: pa.DataType) -> bool:
    """Months, days and nanoseconds (DuckDB's INTERVAL), by themselves or inside of it."""
    if isinstance(t, pa.BaseExtensionType):
        return holds_intervals(t.storage_type)
    if isinstance(t, pa.DictionaryType):
        return holds_intervals(t.value_type)
    return pa.types.is_interval(t) or any(holds_intervals(t.field(i).type) for i in range(t.num_fields))


def normalise(path: str | os.PathLike[str]) -> str:
    """A destination as an absolute path or s3://bucket/prefix."""
    text = os.fspath(path)
    if storage.is_remote(text):
        storage.split_s3(text)  # refuses credentials in it
        return text.rstrip("/")
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        hint = "use a local path, file:// or s3://"
        raise PlanError(f"can't write to {redact(text)!r}: unknown scheme", hint=hint)
    return absolute(text)
