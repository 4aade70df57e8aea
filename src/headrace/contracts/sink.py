"""Sink: where rows go. Workers stage files; the committer publishes them once the run log holds their receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headrace.contracts.run_store import RunStore
from headrace.contracts.source import Source
from headrace.core.carried import Carried
from headrace.core.receipts import LineageRun, OutputFile, Receipt
from headrace.core.refs import Origin
from headrace.core.splits import Split

if TYPE_CHECKING:
    import pyarrow as pa


class SplitWriter(Protocol):
    """The output of one attempt at one split. Lives in one worker; nothing of it is visible under a final name."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Append. Raises DataError when the batch does not fit the file's schema, naming the column."""
        ...

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        """Finish the staged file. The receipt names what is staged, with digests; the data need not be durable yet.

        lineage: where the output's rows came from; kept in the receipt, or in a staged file of its own where it is long.
        """
        ...

    def abort(self) -> None:
        """Remove whatever was staged. Never raises for what is already gone."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Immutable after `bind`, picklable. `open` and `set_aside` run in workers, the rest in the driver.

    per_input: outputs are named after inputs, one each; otherwise part-<generation>-<split index>.
    fresh: replace the output of a finished run. The order of calls: check, (store, bind), then work, then finish or release.
    """

    name: str
    per_input: bool
    fresh: bool

    def check(self, schema: pa.Schema | None) -> None:
        """Before any work: can rows of this schema (None when not known before the run) be written there?

        Raises PlanError for a type that the format can't hold, naming the column; DestinationError when the destination
        can't be written. Leaves nothing behind.
        """
        ...

    def store(self) -> RunStore | None:
        """Where the run's log lives and its files are published. None: nothing is kept (DiscardSink), and nothing resumes."""
        ...

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> Sink:
        """The sink to use in this session of the run: names and staging places are fixed. run: "run-00000"; its number is the
        generation in output names. epoch: keeps apart what different drivers stage.
        """
        ...

    def open(self, split: Split, attempt: int) -> SplitWriter:
        """A writer for the split. If no batch is ever written it stages nothing (packed) or an empty file (per_input);
        with no schema to give that file, its receipt names it with 0 bytes and `finish` makes it.
        """
        ...

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        """Stage rows that failed as a Parquet file of kind "quarantine"; its name is given when the split is settled."""
        ...

    def finish(self, files: Sequence[OutputFile], summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        """After the run log is complete and says so. Idempotent: a session that finds such a log calls it again.

        Publishes what was held back (a run that replaces an earlier one shows nothing until now), makes the files of no bytes
        (and one empty, readable file when there is none at all), writes `_manifest.json` and `_SUCCESS`, and then removes what
        this run replaces and what is staged. files: all, in split order. schema: of the rows, and of files
        without any; None when only a file with rows tells.
        """
        ...

    def release(self) -> None:
        """The session ends without finishing: remove this epoch's staged files that the log does not name. Never raises."""
        ...

    def describe(self) -> str:
        """One line for explain(). No secrets."""
        ...


class CarryingWriter(SplitWriter, Protocol):
    def write_rows(self, batch: pa.RecordBatch, origin: Origin) -> None:
        """As `write`, of rows each of which is known to come from a row of the input; in their order there. The batch may lack
        carried columns: they are those of the input's rows.
        """
        ...


@runtime_checkable
class CarryingSink(Sink, Protocol):
    """A sink that takes columns over from the input in the form in which they are stored there."""

    def carries(self, source: Source, columns: Sequence[str]) -> frozenset[str]:
        """Those of the source's columns that it would take over, for most of the input. What does not fit there after all is
        read and written like any other column.
        """
        ...

    def open_carrying(self, split: Split, attempt: int, carried: Carried, source: Source) -> CarryingWriter: ...
