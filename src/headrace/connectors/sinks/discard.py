"""DiscardSink: keeps no rows, only counts them. Behind `count()` and `run()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headrace.core.receipts import Receipt
from headrace.core.splits import Split

if TYPE_CHECKING:
    import pyarrow as pa


class DiscardSink:
    """Publishes nothing; each receipt says how many rows came."""

    name = "nothing"
    per_input = False

    def prepare(self, schema: pa.Schema | None) -> DiscardSink:
        return self

    def open(self, split: Split, attempt: int) -> _Counter:
        return _Counter(split, attempt)

    def finish(self, summary: Mapping[str, Any], schema: pa.Schema | None) -> None:
        pass

    def abandon(self) -> None:
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

    def close(self) -> Receipt:
        return Receipt(self._split.index, self._split.id, self._attempt, (), self._rows)

    def abort(self) -> None:
        pass
