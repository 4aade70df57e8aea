"""Sink: where rows go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from headrace.core.receipts import Receipt
from headrace.core.splits import Split

if TYPE_CHECKING:
    import pyarrow as pa


class SplitWriter(Protocol):
    """The output of one attempt at one split. Lives in one worker; nothing is visible under a final name before close."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Append. Raises DataError when the batch does not fit the file's schema, naming the column."""
        ...

    def close(self) -> Receipt:
        """Finish the staged file and publish it under its final name, atomically."""
        ...

    def abort(self) -> None:
        """Remove whatever was staged. Never raises for what is already gone."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Immutable after `prepare`, picklable. `open` runs in workers, the rest in the driver.

    per_input: outputs are named after inputs, one each; otherwise part-<generation>-<split index>.
    """

    name: str
    per_input: bool

    def prepare(self, schema: pa.Schema | None) -> Sink:
        """Check the destination and fix this run's names; called once, before any work. Returns the sink to use.

        schema: of the rows to come, None when not known before the run; a sink that can't write a type refuses here
        (PlanError, naming the column). Raises DestinationError when the destination holds a finished run or can't be written.
        """
        ...

    def open(self, split: Split, attempt: int) -> SplitWriter:
        """A writer for the split. If no batch is ever written it publishes nothing (packed) or an empty file (per_input);
        with no schema to give that file, its receipt names it with 0 bytes and `finish` makes it.
        """
        ...

    def finish(self, summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        """After the last receipt: write `_manifest.json` (the summary) and `_SUCCESS`, remove what this run replaces.

        summary["files"]: the receipts' outputs as dicts; those of no bytes were left for now, when a schema may be known.
        schema: of the rows, None when only a written file tells; without any row, one empty, readable file is left.
        """
        ...

    def abandon(self) -> None:
        """After a failed run: remove staged files. Published files stay. Never raises."""
        ...

    def describe(self) -> str:
        """One line for explain(). No secrets."""
        ...
