"""Answers of batch functions that leave a cursor joined are what they would be apart: rows, types, cuts and origins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.worker.fakes import BatchSource, Bench, KeepingSink, fn

from headrace.plan import nodes
from headrace.worker import joining

ROWS = 3 * nodes.AUTO_BATCH_ROWS + 100
Batch = dict[str, Any]


def block(rows: int = ROWS) -> pa.RecordBatch:
    x = np.arange(rows)
    days = pa.array(x.astype(np.int32)).cast(pa.date32())
    return pa.record_batch({"x": x, "day": days, "word": pa.array([f"w{i % 7}" for i in x]), "s": pa.array([{"a": 1}] * rows)})


def nth(change: Callable[[Batch], Any], which: int = 1) -> Callable[[Batch], Any]:
    """A function that returns what it gets and x doubled, but for one batch."""

    def function(batch: Batch) -> Any:
        plain = {"x": batch["x"], "y": batch["x"] * 2, "word": batch["word"]}
        return change(plain) if batch["x"][0] == which * nodes.AUTO_BATCH_ROWS else plain

    return function


def reusing() -> Callable[[Batch], Batch]:
    """Writes all answers to one buffer."""
    buffer = np.zeros(nodes.AUTO_BATCH_ROWS, np.float32)

    def function(batch: Batch) -> Batch:
        rows = len(batch["x"])
        buffer[:rows] = batch["x"]
        return {"y": buffer[:rows]}

    return function


FUNCTIONS: dict[str, Callable[[], Callable[[Batch], Any]]] = {
    "what it gets": lambda: dict,
    "a column more": lambda: lambda b: {**b, "y": b["x"] * 2},
    "without structs": lambda: lambda b: {"y": b["x"] / 2, "x": b["x"], "word": b["word"]},
    "another order": lambda: lambda b: {"word": b["word"], "day": b["day"], "x": b["x"]},
    "another name": lambda: lambda b: {"when": b["day"], "x": b["x"].astype(np.float32)},
    "a view": lambda: lambda b: {"x": b["x"][::-1], "word": b["word"]},
    "vectors": lambda: lambda b: {"v": np.stack([b["x"]] * 3, axis=1), "even": b["x"] % 2 == 0},
    "wide": lambda: lambda b: {"v": np.zeros((len(b["x"]), joining.NARROW_ROW_BYTES), np.int64) + b["x"][:, None], "x": b["x"]},
    "one buffer": reusing,
    "texts": lambda: lambda b: {"x": b["x"], "t": [str(v) for v in b["x"]]},
    "a frame": lambda: lambda b: pa.record_batch({"x": b["x"]}),
    "another type once": lambda: nth(lambda b: {**b, "y": b["y"].astype(np.int32)}),
    "a kept column made anew once": lambda: nth(lambda b: {**b, "x": b["x"].copy()}),
    "a made column kept once": lambda: nth(lambda b: {**b, "y": b["x"]}),
    "another order once": lambda: nth(lambda b: dict(reversed(b.items()))),
    "a column less once": lambda: nth(lambda b: {"x": b["x"]}),
    "rows less once": lambda: nth(lambda b: {name: v[::2] for name, v in b.items()}),
    "no rows once": lambda: nth(lambda b: {name: v[:0] for name, v in b.items()}, which=0),
    "rows more in the last": lambda: nth(lambda b: {name: np.repeat(v, 2) for name, v in b.items()}, which=3),
    "no answer once": lambda: nth(lambda b: iter(())),
    "a generator once": lambda: nth(lambda b: iter([{"x": b["x"][:5]}, {"x": b["x"][5:]}])),
}


def apart(function: Callable[[Batch], Any], deterministic: bool) -> tuple[list[pa.Table], list[int]]:
    """The pieces that leave towards another stage, with their types."""
    bench = Bench([nodes.MapBatches(fn(function))], source=BatchSource([block(), block(10)]), deterministic=deterministic)
    blocks = bench.run()
    tables: list[pa.Table] = []
    at = iter(bench.pieces)
    for made in blocks:
        start = 0
        while start < made.num_rows:
            rows = next(at)
            tables.append(pa.Table.from_batches([made.slice(start, rows)]))
            start += rows
    return tables, bench.pieces


@pytest.mark.parametrize("most_s", [1e9, 0.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_leaves_is_the_same(name: str, most_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "MOST_S", most_s)
    tables, pieces = apart(FUNCTIONS[name](), deterministic=False)
    wanted, cuts = apart(FUNCTIONS[name](), deterministic=True)
    assert pieces == cuts
    assert [t.schema for t in tables] == [t.schema for t in wanted]
    assert tables == wanted


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_written_and_where_it_came_from_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "MOST_S", 1e9)
    found: list[Any] = []
    for deterministic in (False, True):
        sink = KeepingSink()
        source = BatchSource([block(), block(10)])
        bench = Bench([nodes.MapBatches(fn(FUNCTIONS[name]()))], source=source, sink=sink, deterministic=deterministic)
        bench.run()
        receipt = bench.answers[-1].receipt
        assert receipt is not None
        rows = [row for batch in sink.published for row in batch.to_pylist()]
        found.append((rows, list(receipt.lineage), bench.tally))
    assert found[0] == found[1]


def test_batches_alike_are_written_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "MOST_S", 1e9)

    def written(function: Callable[[Batch], Any], *more: nodes.Op) -> list[int]:
        sink = KeepingSink()
        Bench([nodes.MapBatches(fn(function)), *more], source=BatchSource([block()]), sink=sink).run()
        return [batch.num_rows for batch in sink.published]

    batch = nodes.AUTO_BATCH_ROWS
    each = [batch, batch, batch, 100]
    assert written(nth(dict)) == [ROWS]
    assert written(nth(lambda b: {**b, "y": b["y"] / 3})) == [batch, batch, batch + 100]
    assert written(nth(dict), nodes.Limit(ROWS)) == each, "an operator sees the answers one by one"
    monkeypatch.setattr(joining, "MOST_S", 0.0)
    assert written(nth(dict)) == each
    monkeypatch.setattr(joining, "MOST_S", 1e9)
    monkeypatch.setattr(joining, "MOST_BYTES", 8 * batch + 1)
    assert written(nth(dict)) == [2 * batch, batch + 100]


def test_an_error_names_the_rows_of_its_batch() -> None:
    def fails(batch: Batch) -> Any:
        raise ValueError("no")

    with pytest.raises(Exception, match=r"rows 1024-2047 of a\.parquet"):
        Bench([nodes.MapBatches(fn(nth(fails)))], source=BatchSource([block()])).run()
