"""In-memory parts for the worker's tests: a source of batches, a sink that keeps them, a store that is a dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace

from headrace.contracts.source import BadRange, OnBad
from headrace.contracts.substrate import Crumb
from headrace.core.options import BlockLimits, OnError
from headrace.core.receipts import LineageRun, OutputFile, Receipt, Tally
from headrace.core.refs import BlockRef, Origin, PartRef, Segment
from headrace.core.resources import WorkerSpec
from headrace.core.splits import Fragment, Split
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance, Apply, Doing, StepDone, StepFailed
from headrace.plan import nodes
from headrace.worker.body import WorkerBody
from headrace.worker.program import Program

SPLIT = Split(0, (Fragment("a.parquet", 100, "v1"),), 100)


class ListCrumb:
    """Remembers all that was written, and how often it was cleared."""

    def __init__(self) -> None:
        self.written: list[Doing] = []
        self.cleared = 0

    def write(self, doing: Doing) -> None:
        self.written.append(doing)

    def clear(self) -> None:
        self.cleared += 1


class DictStore:
    """Blocks by part id."""

    def __init__(self) -> None:
        self.crumb: Crumb | None = None
        self.kept: dict[int, pa.RecordBatch] = {}
        self.read: list[int] = []

    def put(self, batch: pa.RecordBatch) -> PartRef:
        part = PartRef(len(self.kept), 0, batch.nbytes, tuple(batch.schema.names))
        self.kept[part.id] = batch
        return part

    def get(self, part: PartRef) -> pa.RecordBatch:
        self.read.append(part.id)
        return self.kept[part.id]


@dataclass
class BatchSource:
    """Yields the given batches for any split."""

    batches: Sequence[pa.RecordBatch]
    name: str = "memory"
    remote: bool = False
    error_after: int | None = None
    unreadable: Mapping[int, Sequence[BadRange]] = field(default_factory=dict)
    pulled: int = 0
    closed: int = 0

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        at = 0
        try:
            for i, batch in enumerate(self.batches):
                if on_bad is not None:
                    for bad in self.unreadable.get(i, ()):
                        on_bad(bad)
                if i == self.error_after:
                    raise OSError("the disk is gone")
                self.pulled += 1
                yield batch, Origin((Segment("a.parquet", at, batch.num_rows),))
                at += batch.num_rows
        finally:
            self.closed += 1

    def schema(self) -> pa.Schema:
        return self.batches[0].schema

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        yield SPLIT

    def project(self, columns: tuple[str, ...]) -> BatchSource:
        return self

    def prune(self, predicate: Any) -> tuple[BatchSource, bool]:
        return self, False

    def count(self) -> int | None:
        return None

    def describe(self) -> str:
        return "memory"


@dataclass
class KeepingWriter:
    sink: KeepingSink
    split: Split
    attempt: int
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def write(self, batch: pa.RecordBatch) -> None:
        if self.sink.full_after is not None and len(self.batches) >= self.sink.full_after:
            raise OSError("no space left")
        self.batches.append(batch)

    def close(self, lineage: Sequence[LineageRun] = ()) -> Receipt:
        self.sink.published.extend(self.batches)
        rows = sum(b.num_rows for b in self.batches)
        return Receipt(self.split.index, self.split.id, self.attempt, (OutputFile("part-0", rows, 1),), rows, tuple(lineage))

    def abort(self) -> None:
        self.sink.aborted += 1


@dataclass
class KeepingSink:
    name: str = "memory"
    per_input: bool = False
    full_after: int | None = None
    published: list[pa.RecordBatch] = field(default_factory=list)
    aborted: int = 0
    aside: list[tuple[int, int, pa.Table]] = field(default_factory=list)

    def check(self, schema: pa.Schema | None) -> None: ...

    def store(self) -> None:
        return None

    def bind(self, run: str, epoch: int, schema: pa.Schema | None) -> KeepingSink:
        return self

    def open(self, split: Split, attempt: int) -> KeepingWriter:
        return KeepingWriter(self, split, attempt)

    def set_aside(self, split: int, attempt: int, rows: pa.Table) -> OutputFile:
        self.aside.append((split, attempt, rows))
        return OutputFile(f"quarantine-{len(self.aside)}", rows.num_rows, 1, kind="quarantine")

    def finish(self, files: Sequence[OutputFile], summary: Mapping[str, Any], schema: pa.Schema | None) -> None: ...

    def release(self) -> None: ...

    def describe(self) -> str:
        return "memory"


class Bench:
    """A worker with a program of one stage over `ops`, and the steps to drive it. cut_rows: the last of them is the next
    stage's, and gets batches of so many rows.
    """

    def __init__(
        self,
        ops: Iterable[nodes.Op] = (),
        *,
        source: BatchSource | None = None,
        sink: KeepingSink | None = None,
        order: Order = Order.SOURCE,
        end: End | None = None,
        transient: tuple[str, ...] = (),
        columns_in: tuple[str, ...] | None = None,
        model: bool = False,
        device: str = "cpu",
        deterministic: bool = False,
        out_schema: pa.Schema | None = None,
        on_error: OnError = "fail",
        keep: tuple[str, ...] | None = None,
        store: DictStore | None = None,
        cut_rows: int | None = None,
    ) -> None:
        ops = tuple(ops)
        stop = len(ops) - (cut_rows is not None)
        self.store = store or DictStore()
        self.sink = sink
        end = end or (End.NEXT if sink is None or model else End.SINK)
        stage = Stage(
            *(0, "stage", "cpu", order, end, 0, stop),
            model=model,
            columns_in=columns_in,
            keep=keep,
            transient=transient,
            cut_rows=cut_rows,
        )
        program = Program(
            source or BatchSource([]),
            ops,
            (stage,),
            sink,
            deterministic=deterministic,
            out_schema=out_schema,
            on_error=on_error,
        )
        self.body = WorkerBody(program, WorkerSpec(0, "cpu", device), self.store)
        self.steps = 0
        self.answers: list[StepDone] = []

    def advance(self, cursor: int = 0, **kwargs: Any) -> StepDone | StepFailed:
        self.steps += 1
        step = Advance(self.steps, 0, 0, cursor, 0, 1, **{"credit_s": 1e9, "credit_bytes": 1 << 40, **kwargs})
        return self.body.run(step)

    def run(self, *batches: pa.RecordBatch, **kwargs: Any) -> list[pa.RecordBatch]:
        """Drive one cursor to its end, one step at a time; the output blocks. Checks the law of conservation."""
        inputs = tuple(self.block(b) for b in batches)
        given: dict[str, Any] = {"split": SPLIT, "inputs": inputs, "end": True, **kwargs}
        blocks: list[BlockRef] = []
        self.answers = []
        while True:
            done = self.advance(**given)
            if isinstance(done, StepFailed):
                raise done.error
            self.answers.append(done)
            blocks += done.outputs
            if done.finished:
                break
            assert done.more
            given = {**kwargs, "end": True}
        tally = sum((a.tally for a in self.answers), Tally())
        rows_in = tally.rows_in + sum(b.num_rows for b in batches)
        out = sum(b.rows for b in blocks) if self.sink is None else tally.written
        assert rows_in + tally.expanded == out + tally.filtered + tally.skipped + tally.quarantined + tally.cut
        self.tally = tally
        self.pieces = [rows for b in blocks for rows in b.cuts or (b.rows,)]
        return [self.batch(b) for b in blocks]

    def apply(
        self, *batches: pa.RecordBatch, cuts: tuple[int, ...] = (), owners: tuple[tuple[int, int], ...] = (), **kwargs: Any
    ) -> StepDone | StepFailed:
        blocks = tuple(replace(self.block(b, i * 1000), cuts=cuts) for i, b in enumerate(batches))
        return self.body.run(Apply(1, 0, 0, blocks, owners or tuple((i, 0) for i in range(len(blocks))), **kwargs))

    def apply_blocks(self, *blocks: BlockRef) -> StepDone | StepFailed:
        return self.body.run(Apply(1, 0, 0, blocks, ((0, 1),) * len(blocks)))

    def applied(self, *batches: pa.RecordBatch) -> list[pa.RecordBatch]:
        done = self.apply(*batches)
        if isinstance(done, StepFailed):
            raise done.error
        assert [b.rows for b in done.outputs] == [b.num_rows for b in batches]
        return [self.batch(b) for b in done.outputs]

    def block(self, batch: pa.RecordBatch, row: int = 0) -> BlockRef:
        origin = Origin((Segment("a.parquet", row, batch.num_rows),))
        return BlockRef(batch.num_rows, (self.store.put(batch),), origin)

    def batch(self, block: BlockRef) -> pa.RecordBatch:
        columns = {c: self.store.kept[p.id].column(c) for p in block.parts for c in p.columns}
        assert all(len(c) == block.rows for c in columns.values())
        return pa.record_batch(columns) if columns else self.store.kept[block.parts[0].id]


def numbers(rows: int, start: int = 0) -> pa.RecordBatch:
    """x: 0, 1, 2, ...; name: text."""
    x = np.arange(start, start + rows)
    return pa.record_batch({"x": x, "name": [f"n{i}" for i in x]})


def column(batches: Sequence[pa.RecordBatch], name: str) -> list[Any]:
    return [v for b in batches for v in b.column(name).to_pylist()]


def fn(target: Any, **kwargs: Any) -> nodes.UserFunction:
    return nodes.UserFunction(target, **kwargs)
