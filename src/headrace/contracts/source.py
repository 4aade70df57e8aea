"""Source: where rows come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from msgspec import Struct

from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin
from headrace.core.splits import Division, Split

if TYPE_CHECKING:
    import pyarrow as pa


class BadRange(Struct, frozen=True):
    """A part of the input that can't be read: a row group, a line, a file.

    rows: how many rows it holds, 0 when nobody can tell. row: the first of them in the object, -1 when unknown. error: says
    file, and row group or byte offset.
    """

    uri: str
    row: int
    rows: int
    error: DataError


OnBad = Callable[[BadRange], None]


@runtime_checkable
class Source(Protocol):
    """Immutable and picklable (cloudpickle). `open` runs in workers, the rest in the driver.

    name: "parquet", "csv", ... remote: reads wait for a network, so a thread reads one block ahead.
    """

    name: str
    remote: bool

    def schema(self) -> pa.Schema:
        """The schema of every block that `open` yields. Reads the first object, or where that is broken the first of the next
        few that is not; or as many as a request's time allows, chosen by the listing alone.

        Raises DataError when there is no input or none of those can be understood.
        """
        ...

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        """Splits in input order, indexes 0, 1, ...; lazy, in memory that does not grow with the listing.

        per_input: one split per input object, whole. Otherwise small objects are packed and large ones divided.
        """
        ...

    def project(self, columns: tuple[str, ...]) -> Source:
        """The same source reading only `columns` (names of its schema; may be empty: only row counts then)."""
        ...

    def prune(self, predicate: Any) -> tuple[Source, bool]:
        """(source, exact): a source that applies the pyarrow expression while reading. exact: all rows that it
        yields satisfy it; otherwise it only skips ranges that can't match, and a filter must follow. A source that
        can't do anything returns (self, False).
        """
        ...

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        """Blocks of the split, in order. Memory held is bounded by the block, not by the file or row group.

        on_bad: called for each range that can't be read; reading goes on after it. None: the first one is raised.
        InputChanged and trouble with the storage are raised all the same.

        A generator: closing it releases everything. Raises DataError (with file and row group or offset) for broken
        input, InputChanged when an object is not the version that was planned.
        """
        ...

    def count(self) -> int | None:
        """Rows in all, when metadata alone tells, else None. Ignores nothing: must equal what `open` yields."""
        ...

    def describe(self) -> str:
        """One line for explain(): format, place, columns and predicate in force. No secrets."""
        ...


@runtime_checkable
class LeavingSource(Source, Protocol):
    def leave(self, columns: frozenset[str]) -> Source:
        """The same source, whose blocks may lack these columns, those of a split all or none: its sink takes them from the
        input. The schema still names them.
        """
        ...


@runtime_checkable
class RemarkingSource(Source, Protocol):
    def take_remarks(self) -> tuple[tuple[str, str], ...]:
        """What people should know of what was read in this process and was not told yet: (about, a line). Of lines about the
        same, a run tells the first. Thread-safe.
        """
        ...


@runtime_checkable
class CheckedSource(Source, Protocol):
    def check_columns(self) -> None:
        """Asked before an action begins, of the source as it will be read. Raises PlanError for a column in its schema, or that
        its predicate reads, that can't be read.
        """
        ...


@runtime_checkable
class DividingSource(Source, Protocol):
    def divided(self, division: Division) -> Source:
        """The same source, whose splits (not those of `per_input`) hold at most about so many bytes each, where its format
        allows it.
        """
        ...

    def row_bytes(self) -> float:
        """Of a row as it is stored, by a look at the first inputs; 0.0 where they don't tell."""
        ...


@runtime_checkable
class ListedSource(Source, Protocol):
    def snapshot(self) -> Source:
        """The same source for one action, whose steps may share what they listed; used in the driver's process only."""
        ...
