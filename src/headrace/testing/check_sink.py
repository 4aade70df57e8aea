"""A conformance kit for sinks: what contracts/sink.py promises, as assertions that a plug-in's author can run.

    from headrace.testing.check_sink import check_sink
    check_sink(lambda **options: MySink(path, **options), files=list_names, read=read_rows)

`make(outputs=..., fresh=...)` returns a new sink on one and the same destination, empty at first. `Session` does by hand what a
driver does with a sink: log, publish, finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import pyarrow as pa

from headrace.commit.names import log_name, run_name, staging_folder
from headrace.commit.records import Claim, Finished, Listed, Record, Segment, Settled, encode
from headrace.contracts.run_store import RunStore
from headrace.contracts.sink import Sink
from headrace.core.errors import DataError, DestinationError
from headrace.core.receipts import LineageRun, OutputFile, Receipt, Tally
from headrace.core.splits import Fragment, Split

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])
SPLITS = 1000  # that a session's log says are listed

Make = Callable[..., Sink]
Files = Callable[[], list[str]]
Read = Callable[[str], list[dict[str, Any]]]


class Session:
    """One session of one run, whose splits this test writes itself."""

    def __init__(
        self, sink: Sink, number: int = 0, epoch: int = 1, schema: pa.Schema | None = SCHEMA, *, holds: bool = False
    ) -> None:
        sink.check(schema)
        store = sink.store()
        assert store is not None, "a sink without a store has nothing to check"
        self.store: RunStore = store
        self.run = run_name(number)
        self.sink = self.bound = sink.bind(self.run, epoch, schema)  # a driver keeps it, whatever workers have copies of
        self.schema = schema
        self.holds = holds
        self.files: list[OutputFile] = []
        self.rows = 0
        self._epoch = epoch
        self._next = sum(1 for _ in store.names(f"_headrace/{self.run}/log"))
        listed = () if self._next else (Listed(0, SPLITS, "0" * 64, True),)
        self._append(Claim(epoch, self._nonce, "here", 1, 0.0, 0.0), *listed)

    @property
    def _nonce(self) -> str:
        return f"nonce-{self._epoch}"

    def _append(self, *records: Record) -> None:
        segment = Segment(self._next, self._epoch, self._nonce, records)
        assert self.store.create(log_name(self.run, self._next), encode(segment)), "the log has gone on without us"
        self._next += 1

    def stage(self, split: Split, batches: Sequence[pa.RecordBatch], attempt: int = 0) -> Receipt:
        """As a worker: nothing of it is logged yet."""
        writer = self.sink.open(split, attempt)
        for batch in batches:
            writer.write(batch)
        return writer.close()

    def log(self, *receipts: Receipt) -> None:
        files = [f for r in receipts for f in r.outputs]
        assert not self.store.sync([f for f in files if f.staged]), "a staged file can't be made durable"
        settled = (
            Settled(r.split, r.split_id, r.attempt, Tally(rows_in=r.rows, written=r.rows), r.outputs, r.rows) for r in receipts
        )
        self._append(*settled)
        self.files += files
        self.rows += sum(r.rows for r in receipts)

    def settle(self, *receipts: Receipt) -> None:
        """As the committer: log, then publish."""
        self.log(*receipts)
        if not self.holds:
            self.store.publish([f for r in receipts for f in r.outputs])

    def write(self, split: Split, batches: Sequence[pa.RecordBatch], attempt: int = 0) -> list[str]:
        """Stage and settle a split; the names of its files."""
        receipt = self.stage(split, batches, attempt)
        self.settle(receipt)
        return [f.name for f in receipt.outputs]

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        tally = {"rows_in": self.rows, "written": self.rows}
        summary = {"tally": tally, **(summary or {})}
        self._append(Finished(summary))
        self.sink.finish(self.files, summary, self.schema)


def check_sink(make: Make, *, files: Files, read: Read) -> None:
    """Check a sink. files: names of all files below the destination. read: the rows of one of them, by name."""
    _check_end(make, files, read, _check_packed(make, files, read))
    _check_misfits(make, files)
    _check_no_rows(make, files, read)
    _check_side_files(make, files)


def check_per_input(make: Make, *, files: Files, read: Read) -> None:
    """As check_sink, on another empty destination: outputs named after inputs."""
    splits = [a_split(0, "a/x.parquet"), a_split(1, "b/x.parquet")]
    session = Session(make(outputs="per_input", fresh=False))
    names = [n for s in splits for n in session.write(s, [a_batch(s.index * 10, 3)])]
    assert len(set(names)) == 2, "outputs of two inputs share a name"
    assert [n.rpartition(".")[0] for n in names] == ["a/x", "b/x"], "an output is named after its input"
    third = session.write(a_split(2, "c.parquet"), [])
    assert len(third) == 1, "per_input: an input without rows has an (empty) output too"
    assert read(third[0]) == [], "the empty output is not empty"
    session.finish()
    fresh = Session(make(outputs="per_input", fresh=True), 1, holds=True)
    fresh.write(splits[0], [a_batch(70, 1)])
    assert [r["id"] for r in read(names[0])] == [0, 1, 2], "a fresh run must leave the finished output until it is complete"
    fresh.finish()
    assert [r["id"] for r in read(names[0])] == [70], "finish() puts the new output in place"
    assert visible(files) == {names[0]}, "outputs that the new run does not have are gone"
    outside = _raised(DestinationError, lambda: fresh.sink.open(a_split(3, "../out.parquet"), 0))
    assert outside is not None, "an output may not leave the destination"


def a_batch(start: int, rows: int) -> pa.RecordBatch:
    ids = range(start, start + rows)
    return pa.record_batch([pa.array(ids, pa.int64()), pa.array([f"n{i}" for i in ids])], schema=SCHEMA)


def a_split(index: int, name: str = "") -> Split:
    name = name or f"in{index}.parquet"
    return Split(index, (Fragment(f"/data/{name}", 100, "v1", name=name),), 100)


def visible(files: Files) -> set[str]:
    """Names that a reader of the destination sees: those not under _ or . names."""
    return {f for f in files() if not any(part[:1] in ("_", ".") for part in f.split("/"))}


def _raised(kind: type[Exception], action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except kind as e:
        return e
    return None


def _staged(files: Files, number: int) -> set[str]:
    return {f for f in files() if f.startswith(staging_folder(run_name(number)) + "/")}


def _check_packed(make: Make, files: Files, read: Read) -> list[OutputFile]:
    """Returns the files that the log names in the end."""
    sink = make(outputs="packed", fresh=False)
    assert isinstance(sink, Sink), "it lacks an attribute or method of the Sink contract"
    assert sink.describe(), "describe() is empty"
    sink.check(SCHEMA)
    assert not files(), "check() leaves something behind"
    session = Session(sink)
    session.sink = cloudpickle.loads(cloudpickle.dumps(session.sink))
    writer = session.sink.open(a_split(0), 0)
    writer.write(a_batch(0, 5))
    writer.write(a_batch(5, 5))
    receipt = writer.close()
    assert receipt.rows == 10, "the receipt counts rows"
    (output,) = receipt.outputs
    assert output.staged in files(), "the receipt's staged file is not there"
    assert len(output.digest) == 64, "a staged file has a SHA-256"
    assert not visible(files), "a file is visible before it is published"
    session.settle(receipt)
    assert visible(files) == {output.name}, "it is published under the receipt's name"
    assert read(output.name) == a_batch(0, 10).to_pylist(), "the file holds other rows"
    session.store.publish(receipt.outputs)
    assert not _staged(files, 0), "what is published is not staged any more"
    aborted = session.sink.open(a_split(1), 0)
    aborted.write(a_batch(10, 5))
    aborted.abort()
    aborted.abort()
    assert not _staged(files, 0), "abort() leaves nothing"
    first = session.stage(a_split(2), [a_batch(20, 5)])
    second = session.stage(a_split(2), [a_batch(20, 5)], attempt=1)
    assert first.outputs[0].name == second.outputs[0].name, "a second attempt has the same name"
    assert first.outputs[0].staged != second.outputs[0].staged, "attempts are staged apart"
    session.settle(second)
    assert not session.stage(a_split(3), []).outputs, "packed: a split without rows writes nothing"
    logged = session.stage(a_split(4), [a_batch(40, 5)])
    session.log(logged)
    session.sink.release()
    assert _staged(files, 0) == {logged.outputs[0].staged}, "release() removes what the log does not name, and only that"
    return session.files


def _check_end(make: Make, files: Files, read: Read, earlier: Sequence[OutputFile]) -> None:
    """Goes on with what the session before has left: two published splits, and one that is only logged."""
    session = Session(make(outputs="packed", fresh=False), epoch=2)
    session.files = list(earlier)
    session.rows = sum(f.rows for f in earlier)
    done = session.write(a_split(5), [a_batch(100, 2)])
    session.finish({"colour": "green"})
    kept = visible(files)
    assert kept == {f.name for f in session.files}, "finish() shows what the log names, and only that"
    assert {"_SUCCESS", "_manifest.json"} <= set(files()), "finish() leaves a manifest and _SUCCESS"
    assert not _staged(files, 0), "finish() removes what is staged"
    before = sorted(files())
    session.sink.finish(session.files, {"colour": "green"}, SCHEMA)
    assert sorted(files()) == before, "finish() can be called again"
    fresh = Session(make(outputs="packed", fresh=True), 1, holds=True)
    (new,) = fresh.write(a_split(0), [a_batch(200, 2)])
    assert visible(files) == kept, "a held run shows nothing"
    assert read(done[0]) == a_batch(100, 2).to_pylist(), "fresh keeps the old output until the new one is complete"
    assert "_SUCCESS" in files(), "the old output is still complete"
    fresh.finish()
    assert visible(files) == {new}, "finish() removes what it replaces"
    assert read(new) == a_batch(200, 2).to_pylist(), "the new output holds other rows"


def _check_misfits(make: Make, files: Files) -> None:
    """The first batch fixes the file's schema."""
    session = Session(make(outputs="packed", fresh=True), 2, schema=None, holds=True)
    writer = session.sink.open(a_split(0), 0)
    writer.write(a_batch(0, 2))
    narrower = pa.record_batch([pa.array(["n2"]), pa.array([2], pa.int32())], names=["name", "id"])
    writer.write(narrower)
    text = pa.record_batch([pa.array(["x"]), pa.array(["y"])], names=["id", "name"])
    misfit = _raised(DataError, lambda: writer.write(text))
    assert misfit is not None, "text in a column of numbers must be refused"
    assert "id" in str(misfit), "the error names the column"
    writer.abort()
    session.sink.release()
    assert not _staged(files, 2), "abort() and release() leave nothing"


def _check_no_rows(make: Make, files: Files, read: Read) -> None:
    session = Session(make(outputs="packed", fresh=True), 3, holds=True)
    session.finish()
    (name,) = visible(files)
    assert read(name) == [], "without rows one empty, readable file is left"


def _check_side_files(make: Make, files: Files) -> None:
    """Rows that failed, and long lineages, are files beside the output."""
    session = Session(make(outputs="packed", fresh=True), 4, holds=True)
    aside = session.sink.set_aside(0, 0, pa.table({"id": [1, 2]}))
    again = session.sink.set_aside(0, 0, pa.table({"id": [3]}))
    assert (aside.kind, aside.rows) == ("quarantine", 2), "set_aside() says what it staged"
    assert {aside.staged, again.staged} == _staged(files, 4), "each call of set_aside() stages a file of its own"
    writer = session.sink.open(a_split(0), 0)
    writer.write(a_batch(0, 3))
    short = writer.close([LineageRun(0, 3, "/data/in0.parquet", 0, 3)])
    assert len(short.lineage) == 1, "a short lineage is in the receipt"
    writer = session.sink.open(a_split(1), 0)
    writer.write(a_batch(0, 3))
    long = writer.close([LineageRun(i, 1, "/data/in1.parquet", 2 * i, 1) for i in range(1000)])
    assert not long.lineage, "a long lineage would make the log long"
    assert [f.kind for f in long.outputs] == ["output", "lineage"], "a long lineage is a file of its own"
    writer.abort()
    session.settle(short)
    session.finish()
    assert not _staged(files, 4), "finish() removes what is staged"
