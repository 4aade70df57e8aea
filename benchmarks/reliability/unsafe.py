"""What "exactly once" is measured against: the same encoder straight to its final name. No log, no digest, no staging."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.receipts import OutputFile, Receipt
from headrace.core.splits import Split


class UnsafeParquet:
    """A sink that writes each split where it belongs, and hopes."""

    name = "parquet, unsafe"
    fresh = False

    def __init__(self, path: str, outputs: str) -> None:
        self.path = path
        self.per_input = outputs == "per_input"
        self._encodings = ParquetSink(path)

    def check(self, schema: pa.Schema | None) -> None:
        os.makedirs(self.path, exist_ok=True)

    def store(self) -> None:
        return None

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> UnsafeParquet:
        return self

    def open(self, split: Split, attempt: int) -> _Writer:
        name = PurePosixPath(split.fragments[0].name).stem if self.per_input else f"part-{split.index:06d}"
        return _Writer(self._encodings, split, attempt, f"{self.path}/{name}.parquet")

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        raise NotImplementedError("nothing is set aside here")

    def finish(self, files: Sequence[OutputFile], summary: Any, schema: pa.Schema | None) -> None: ...

    def release(self) -> None: ...

    def describe(self) -> str:
        return f"parquet to {self.path}, without any guarantee"


class _Writer:
    def __init__(self, encodings: ParquetSink, split: Split, attempt: int, path: str) -> None:
        self._encodings = encodings
        self._split = split
        self._attempt = attempt
        self._path = path
        self._encoder: Any = None
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if self._encoder is None:
            self._encoder = self._encodings._encoder(self._path, batch.schema, batch)
        self._encoder.write(batch)
        self._rows += batch.num_rows

    def close(self, lineage: Sequence[Any] = ()) -> Receipt:
        if self._encoder is not None:
            self._encoder.close()
        return Receipt(self._split.index, self._split.id, self._attempt, (), self._rows)

    def abort(self) -> None: ...
