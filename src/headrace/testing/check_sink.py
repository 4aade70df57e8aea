"""A conformance kit for sinks: what contracts/sink.py promises, as assertions that a plug-in's author can run.

    from headrace.testing.check_sink import check_sink
    check_sink(lambda **options: MySink(path, **options), files=list_names, read=read_rows)

`make(outputs=..., fresh=...)` returns a new sink on one and the same destination, empty at first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle
import pyarrow as pa

from headrace.contracts.sink import Sink
from headrace.core.errors import DataError, DestinationError
from headrace.core.receipts import Receipt
from headrace.core.splits import Fragment, Split

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])

Make = Callable[..., Sink]
Files = Callable[[], list[str]]
Read = Callable[[str], list[dict[str, Any]]]


def check_sink(make: Make, *, files: Files, read: Read) -> None:
    """Check a sink. files: names of all files below the destination. read: the rows of one of them, by name."""
    _check_packed(make, files, read)
    _check_finished(make, files, read)
    _check_misfits(make, files)
    _check_no_rows(make, files, read)


def check_per_input(make: Make, *, files: Files, read: Read) -> None:
    """As check_sink, on another empty destination: outputs named after inputs."""
    splits = [_split(0, "a/x.parquet"), _split(1, "b/x.parquet")]
    sink = make(outputs="per_input", fresh=False).prepare(SCHEMA)
    receipts = [_write(sink, s, [_batch(s.index * 10, 3)]) for s in splits]
    names = [o.name for r in receipts for o in r.outputs]
    assert len(set(names)) == 2, "outputs of two inputs share a name"
    assert [n.rpartition(".")[0] for n in names] == ["a/x", "b/x"], "an output is named after its input"
    third = sink.open(_split(2, "c.parquet"), 0).close()
    assert len(third.outputs) == 1, "per_input: an input without rows has an (empty) output too"
    assert read(third.outputs[0].name) == [], "the empty output is not empty"
    _write(sink, splits[0], [_batch(50, 1)], attempt=1)
    assert [r["id"] for r in read(names[0])] == [50], "another attempt replaces the output of an unfinished run"
    sink.finish({}, SCHEMA)
    fresh = make(outputs="per_input", fresh=True).prepare(SCHEMA)
    _write(fresh, splits[0], [_batch(70, 1)])
    assert [r["id"] for r in read(names[0])] == [50], "a fresh run must leave the finished output until it is complete"
    fresh.finish({}, SCHEMA)
    assert [r["id"] for r in read(names[0])] == [70], "finish() puts the new output in place"
    outside = _raised(DestinationError, lambda: fresh.open(_split(3, "../out.parquet"), 0))
    assert outside is not None, "an output may not leave the destination"


def _raised(kind: type[Exception], action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except kind as e:
        return e
    return None


def _batch(start: int, rows: int) -> pa.RecordBatch:
    ids = range(start, start + rows)
    return pa.record_batch([pa.array(ids, pa.int64()), pa.array([f"n{i}" for i in ids])], schema=SCHEMA)


def _split(index: int, name: str = "") -> Split:
    name = name or f"in{index}.parquet"
    return Split(index, (Fragment(f"/data/{name}", 100, "v1", name=name),), 100)


def _write(sink: Sink, split: Split, batches: list[pa.RecordBatch], attempt: int = 0) -> Receipt:
    writer = sink.open(split, attempt)
    for batch in batches:
        writer.write(batch)
    return writer.close()


def _visible(files: Files) -> set[str]:
    """Names that a reader of the destination sees: those not under _ or . names."""
    return {f for f in files() if not any(part[:1] in ("_", ".") for part in f.split("/"))}


def _check_packed(make: Make, files: Files, read: Read) -> None:
    sink = make(outputs="packed", fresh=False)
    assert isinstance(sink, Sink), "it lacks an attribute or method of the Sink contract"
    assert sink.describe(), "describe() is empty"
    sink = cloudpickle.loads(cloudpickle.dumps(sink.prepare(SCHEMA)))
    writer = sink.open(_split(0), 0)
    writer.write(_batch(0, 5))
    assert not _visible(files), "a file is visible before close()"
    writer.write(_batch(5, 5))
    receipt = writer.close()
    assert receipt.rows == 10, "the receipt counts rows"
    (output,) = receipt.outputs
    assert _visible(files) == {output.name}, "close() publishes exactly one file"
    assert read(output.name) == _batch(0, 10).to_pylist(), "the file holds other rows"
    aborted = sink.open(_split(1), 0)
    aborted.write(_batch(10, 5))
    aborted.abort()
    aborted.abort()
    assert _visible(files) == {output.name}, "abort() leaves nothing"
    second = _write(sink, _split(2), [_batch(20, 5)])
    again = _write(sink, _split(2), [_batch(20, 5)], attempt=1)
    assert second.outputs[0].name == again.outputs[0].name, "a second attempt has the same name"
    assert not sink.open(_split(3), 0).close().outputs, "packed: a split without rows writes nothing"
    sink.abandon()
    assert {output.name, second.outputs[0].name} == set(files()), "abandon() keeps what is published and nothing else"


def _check_finished(make: Make, files: Files, read: Read) -> None:
    """Begins with the leftovers of an unfinished run."""
    leftovers = _visible(files)
    sink = make(outputs="packed", fresh=False).prepare(SCHEMA)
    done = _write(sink, _split(0), [_batch(100, 2)]).outputs[0].name
    assert leftovers <= _visible(files), "nothing is removed before the new output is complete"
    sink.finish({"rows": 2}, SCHEMA)
    assert set(files()) == {done, "_SUCCESS", "_manifest.json"}, f"finish() left {files()}"
    refusal = _raised(DestinationError, lambda: make(outputs="packed", fresh=False).prepare(SCHEMA))
    assert refusal is not None, "a finished destination must be refused"
    assert "fresh=True" in str(refusal), "the refusal must say how to go on"
    assert set(files()) == {done, "_SUCCESS", "_manifest.json"}, "a refusal must leave no trace"
    fresh = make(outputs="packed", fresh=True).prepare(SCHEMA)
    new = _write(fresh, _split(0), [_batch(200, 2)]).outputs[0].name
    assert read(done) == _batch(100, 2).to_pylist(), "fresh keeps the old output until the new one is complete"
    assert "_SUCCESS" in files(), "the old output is still complete"
    fresh.finish({"rows": 2}, SCHEMA)
    assert set(files()) == {new, "_SUCCESS", "_manifest.json"}, "finish() removes what it replaces, and only that"
    assert read(new) == _batch(200, 2).to_pylist(), "the new output holds other rows"


def _check_misfits(make: Make, files: Files) -> None:
    """The first batch fixes the file's schema."""
    sink = make(outputs="packed", fresh=True).prepare(None)
    before = set(files())
    writer = sink.open(_split(0), 0)
    writer.write(_batch(0, 2))
    narrower = pa.record_batch([pa.array(["n2"]), pa.array([2], pa.int32())], names=["name", "id"])
    writer.write(narrower)
    text = pa.record_batch([pa.array(["x"]), pa.array(["y"])], names=["id", "name"])
    misfit = _raised(DataError, lambda: writer.write(text))
    assert misfit is not None, "text in a column of numbers must be refused"
    assert "id" in str(misfit), "the error names the column"
    writer.abort()
    sink.abandon()
    assert set(files()) == before, "abort() and abandon() leave nothing"


def _check_no_rows(make: Make, files: Files, read: Read) -> None:
    sink = make(outputs="packed", fresh=True).prepare(SCHEMA)
    sink.finish({"rows": 0}, SCHEMA)
    (name,) = _visible(files)
    assert read(name) == [], "without rows one empty, readable file is left"
