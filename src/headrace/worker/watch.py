"""Watch: says what user code is about to be given, and looks twice at rows that have killed a worker before.

The breadcrumb of a batch names where its rows came from. When a worker died on them, the split's next attempt gets a Suspect:
batches that overlap it are run row by row, each with the digest of its content in the crumb, so that the next death names
the row. A row whose digest is condemned is never run again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa

from headrace.contracts.substrate import Crumb
from headrace.core.errors import WorkerDied
from headrace.core.refs import Origin, Segment
from headrace.core.steps import Doing, Suspect
from headrace.core.tensors import numpy_to_array
from headrace.worker.bad_rows import Failure
from headrace.worker.batching import Piece

SAMPLE_BYTES = 16 << 20
T = TypeVar("T")


class Halt:
    """The crumb of a worker that nobody can kill, nor will find dead: once the run has stopped, no more user code begins.

    over: set by another thread. `write` raises WorkerDied then.
    """

    def __init__(self) -> None:
        self.over = False

    def write(self, doing: Doing) -> None:
        if self.over:
            raise WorkerDied(f"the run was stopped before {doing.name}")

    def clear(self) -> None: ...

    def each(self, doing: Doing, rows: Iterable[T]) -> Iterator[T]:
        """The rows, as long as the run goes on."""
        for row in rows:
            if self.over:
                self.write(doing)
            yield row


class Watch:
    """Of one cursor or one Apply. tolerant: rows that fail are set aside rather than end the run."""

    def __init__(self, crumb: Crumb | None = None, suspects: Sequence[Suspect] = (), tolerant: bool = False) -> None:
        self.tolerant = tolerant
        self._crumb = crumb
        self._suspects = suspects

    def enter(self, op: int, name: str, origin: Origin) -> None:
        """Operator `op` is about to be given a batch of these rows."""
        if self._crumb is not None:
            self._crumb.write(Doing(op, name, origin.segments))

    def enter_rows(self, op: int, name: str, origin: Origin, rows: Sequence[T]) -> Iterator[T]:
        """As `enter`; the rows, to be given one after the other."""
        self.enter(op, name, origin)
        return self._crumb.each(Doing(op, name), rows) if isinstance(self._crumb, Halt) else iter(rows)

    def doubts(self, op: int, origin: Origin) -> bool:
        """Must these rows be run one at a time?"""
        return bool(self._suspects) and any(s.op == op and _overlap(s.segments, origin.segments) for s in self._suspects)

    def condemned(self, op: int, name: str, row: Piece) -> Failure | None:
        """Operator `op` is about to be given this row alone; not None: it must not be. row: what the operator itself reads.

        Raises WorkerDied for such a row when rows that fail end the run.
        """
        sample = row_bytes(row.batch)
        digest = row_digest(sample)
        reasons = dict(pair for s in self._suspects if s.op == op for pair in s.condemned)
        if digest in reasons:
            if not self.tolerant:
                at = row.origin.locate(0)
                where = ("row", f"{at[1]} of {at[0]}") if at else ("rows", f"among {row.origin.label}")
                raise WorkerDied(f"{name} ends its worker: {reasons[digest]}", where=(("stage", name), where))
            return Failure(f"WorkerDied: {reasons[digest]}")
        if self._crumb is not None:
            self._crumb.write(Doing(op, name, row.origin.segments, digest, sample if len(sample) <= SAMPLE_BYTES else b""))
        return None


NOBODY = Watch()


def row_bytes(batch: pa.RecordBatch) -> bytes:
    """One row as an Arrow IPC stream that is a function of names, types and values alone."""
    if batch.num_columns:
        fresh = batch.take(numpy_to_array(np.zeros(1, np.int64)))  # a slice may share bytes of bitmaps with its neighbours
        arrays = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in fresh.columns]
        batch = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def row_digest(sample: bytes) -> str:
    return hashlib.blake2b(sample, digest_size=16).hexdigest()


def _overlap(a: Sequence[Segment], b: Sequence[Segment]) -> bool:
    """Do they share a row? Rows of unknown origin may be any."""
    if not a or not b:
        return True
    ranges: dict[str, list[Segment]] = {}
    for s in a:
        ranges.setdefault(s.uri, []).append(s)
    return any(s.row < t.row + t.rows and t.row < s.row + s.rows for t in b for s in ranges.get(t.uri, ()))
