"""DiscardSink: keeps no rows, only counts them. Behind `count()` and `run()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.core.errors import DestinationError
from headrace.core.receipts import LineageRun, OutputFile, Receipt
from headrace.core.splits import Split

if TYPE_CHECKING:
    import pyarrow as pa


class DiscardSink:
    """Keeps nothing; each receipt says how many rows came. Nothing resumes."""

    name = "nothing"
    per_input = False
    fresh = False

    def check(self, schema: pa.Schema | None) -> None:
        pass

    def store(self) -> None:
        return None

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> DiscardSink:
        return self

    def open(self, split: Split, attempt: int) -> _Counter:
        return _Counter(split, attempt)

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        raise DestinationError("there is no place to set rows aside in", hint='write the rows, or use on_error="skip"')

    def finish(self, files: Sequence[OutputFile], summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        pass

    def release(self) -> None:
        pass

    def describe(self) -> str:
        return "nothing (rows are counted)"


class _Counter:
    def __init__(self, split: Split, attempt: int) -> None:
        self._split = split
        self._attempt = attempt
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._rows += batch.num_rows

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        return Receipt(self._split.index, self._split.id, self._attempt, (), self._rows)

    def abort(self) -> None:
        pass
