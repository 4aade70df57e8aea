"""Carried columns that are copied as they are stored in the input: what comes out is what encoding them would have given."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors import parquet_splice
from headrace.connectors.sinks import parquet_copy
from headrace.core.errors import DataError, UserCodeError
from headrace.plan import rules

from .conftest import ENGINES, outputs

Options = dict[str, Any]
ROWS = 6000  # of a row group: with their bytes enough to be kept


def table_of(rows: int, seed: int = 0) -> pa.Table:
    """Columns of many kinds; each row group of ROWS rows is more than a mebibyte."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, rows * 250, np.uint8).tobytes()
    start = seed * 1_000_000
    words = pa.array([None if i % 11 == 0 else f"word{i % 97}" for i in range(rows)])
    columns: dict[str, pa.Array] = {
        "id": pa.array(range(start, start + rows), pa.int64()),
        "x": pa.array(rng.random(rows), pa.float32()),
        "noise": pa.FixedSizeBinaryArray.from_buffers(pa.binary(250), rows, [None, pa.py_buffer(noise)]),
        "word": words,
        "kind": words.dictionary_encode(),
        "at": pa.array(rng.integers(0, 1 << 40, rows), pa.timestamp("us", "UTC")),
        "list": pa.array([[i] * (i % 4) if i % 5 else None for i in range(rows)], pa.list_(pa.int32())),
        "deep": pa.array([{"a": i, "b": [{"c": str(i)}] * (i % 3)} if i % 7 else None for i in range(rows)]),
        "map": pa.array([[("k", i)] if i % 3 else [] for i in range(rows)], pa.map_(pa.string(), pa.int64())),
    }
    fields = [
        pa.field(n, c.type, metadata={"PARQUET:field_id": "7", "unit": "m"} if n == "x" else None) for n, c in columns.items()
    ]
    fields.append(pa.field("must", pa.int16(), nullable=False))
    return pa.Table.from_arrays([*columns.values(), pa.array(np.arange(rows) % 100, pa.int16())], schema=pa.schema(fields))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of several row groups, gzipped, as pyarrow's writer never does here by itself."""
    folder = tmp_path_factory.mktemp("tables")
    for i in range(2):
        pq.write_table(table_of(2 * ROWS + 100, i), folder / f"{i}.parquet", row_group_size=ROWS, compression="gzip")
    return folder


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something as if there was no copying."""

    def run(action: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(rules, "carry_stored", lambda plan, at_end, notes, *, leave: (plan, None))
            return action()

    return run


def read(folder: Path) -> pa.Table:
    """All output with its schemas, metadata included."""
    found = [pq.read_table(folder / name) for name in sorted(outputs(folder))]
    assert all(t.schema.equals(found[0].schema, check_metadata=True) for t in found)
    return pa.concat_tables(found)


def aside(folder: Path) -> pa.Table:
    files = sorted((folder / "_headrace").rglob("quarantine/*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).sort_by("id")


def same(a: Path, b: Path) -> bool:
    one, two = read(a), read(b)
    assert sorted(outputs(a)) == sorted(outputs(b))
    return one.schema.equals(two.schema, check_metadata=True) and one.equals(two)


def copied(folder: Path, column: str = "noise") -> list[int]:
    """Rows of the row groups whose column was copied: it is compressed as in the input."""
    found: list[int] = []
    for name in sorted(outputs(folder)):
        metadata = pq.read_metadata(folder / name)
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            codecs = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
            if codecs[column] == "GZIP":
                found.append(group.num_rows)
    return found


@pytest.mark.on_ray
def test_output_is_the_same_as_encoded(tables: Path, tmp_path: Path, quiet: Options, plainly: Any) -> None:
    ds = hr.read_parquet(tables).predict(lambda x: x * 2, input="x", output="y").rename({"word": "term"}).drop("kind")
    ds = ds.evaluate(mean=hr.metrics.Mean("y"))
    run = ds.write_parquet(tmp_path / "out", **quiet)
    twin = plainly(lambda: ds.write_parquet(tmp_path / "plain", **quiet))
    assert copied(tmp_path / "out") == [ROWS] * 4
    assert copied(tmp_path / "plain") == []
    assert same(tmp_path / "out", tmp_path / "plain")
    assert run.tally == twin.tally
    assert dict(run.metrics) == dict(twin.metrics)
    assert hr.verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine in ("inline", "processes")])
def test_nothing_but_copies(tables: Path, tmp_path: Path, quiet: Options, plainly: Any) -> None:
    ds = hr.read_parquet(tables)
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    plainly(lambda: ds.write_parquet(tmp_path / "plain", outputs="per_input", **quiet))
    assert copied(tmp_path / "out") == [ROWS] * 4
    assert same(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("on_error", "engine"), [("skip", "inline"), *(("quarantine", engine) for engine in ENGINES if engine != "ray")]
)
def test_row_groups_with_rows_missing_are_encoded(
    tables: Path, tmp_path: Path, engine: str, plainly: Any, on_error: Any
) -> None:
    quiet: Options = {"engine": engine, "progress": "quiet", "cpus": 2}

    def fails(row: dict[str, Any]) -> Any:
        if np.isin(row["id"], [5, ROWS - 1, 1_000_000 + ROWS]).any():
            raise ValueError("no")
        return row["x"]

    ds = hr.read_parquet(tables).predict(fails, input=["id", "x"], output="y")
    run = ds.write_parquet(tmp_path / "out", on_error=on_error, **quiet)
    twin = plainly(lambda: ds.write_parquet(tmp_path / "plain", on_error=on_error, **quiet))
    assert run.tally == twin.tally
    assert run.tally.bad == 3
    assert same(tmp_path / "out", tmp_path / "plain")
    assert copied(tmp_path / "out") == [ROWS] * 2
    if on_error == "quarantine":
        assert aside(tmp_path / "out").equals(aside(tmp_path / "plain"))
        assert aside(tmp_path / "out")["id"].to_pylist() == [5, ROWS - 1, 1_000_000 + ROWS]


def test_a_failed_run_goes_on(tables: Path, tmp_path: Path) -> None:
    quiet: Options = {"engine": "threads", "progress": "quiet", "cpus": 2}
    marker = tmp_path / "marker"
    path = str(marker)

    def score(batch: dict[str, Any]) -> Any:
        if 1_000_000 in batch["id"] and os.path.exists(path):
            raise ValueError("not now")
        return batch["x"] * 2

    ds = hr.read_parquet(tables).predict(score, input=["id", "x"], output="y")
    ds.write_parquet(tmp_path / "clean", outputs="per_input", **quiet)
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    marker.unlink()
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")
    assert [(tmp_path / "out" / n).read_bytes() for n in outputs(tmp_path / "out")] == [
        (tmp_path / "clean" / n).read_bytes() for n in outputs(tmp_path / "clean")
    ]
    assert copied(tmp_path / "out") == [ROWS] * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: ds.filter(pc.field("id") != 3).predict(lambda x: x, input="x", output="y"),
        lambda ds: ds.predict(lambda x: x, input="x", output="y").filter(lambda row: row["id"] % 1000 != 3),
        lambda ds: ds.map_batches(lambda batch: {"id": batch["id"], "x": batch["x"]}),
        lambda ds: ds.limit(7000),
    ],
)
def test_other_plans_are_as_they_were(tables: Path, tmp_path: Path, plainly: Any, change: Any) -> None:
    ds = change(hr.read_parquet(tables).select("id", "x", "noise"))
    assert "encoded" not in ds.explain(engine="inline")
    ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet")
    plainly(lambda: ds.write_parquet(tmp_path / "plain", engine="inline", progress="quiet"))
    assert same(tmp_path / "out", tmp_path / "plain")


def inline(tmp_path: Path, plainly: Any, ds: Any) -> None:
    """Written twice; the outputs are the same."""
    ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet")
    plainly(lambda: ds.write_parquet(tmp_path / "plain", engine="inline", progress="quiet"))
    assert same(tmp_path / "out", tmp_path / "plain")


def test_a_replaced_column_is_encoded(tables: Path, tmp_path: Path, plainly: Any) -> None:
    inline(tmp_path, plainly, hr.read_parquet(tables).predict(lambda x: x * 2, input="x", output="x"))
    assert copied(tmp_path / "out") == [ROWS] * 4
    assert copied(tmp_path / "out", "x") == []


def test_files_that_differ_are_read(tmp_path: Path, plainly: Any) -> None:
    """Other types, other storage, small row groups: in files beside ones that can be copied."""
    folder = tmp_path / "in"
    folder.mkdir()
    table = table_of(ROWS).select(["id", "x", "noise", "at"])
    naive = table.set_column(3, "at", table["at"].cast(pa.timestamp("us")))
    pq.write_table(naive, folder / "0.parquet", compression="gzip")
    narrow = naive.set_column(0, "id", naive["id"].cast(pa.int32()))
    pq.write_table(narrow, folder / "1.parquet", compression="gzip")
    pq.write_table(naive, folder / "2.parquet", compression="gzip", row_group_size=1000)
    nanos = naive.set_column(3, "at", naive["at"].cast(pa.timestamp("ns")))
    pq.write_table(nanos.slice(0, 0), folder / "3.parquet", compression="gzip")
    pq.write_table(naive.select(["noise", "at", "x", "id"]), folder / "4.parquet", compression="gzip", data_page_version="2.0")
    inline(tmp_path, plainly, hr.read_parquet(folder).predict(lambda x: x * 2, input="x", output="y"))
    assert copied(tmp_path / "out") == [ROWS] * 2


def test_times_of_twelve_bytes_are_encoded_beside_copies(tmp_path: Path, plainly: Any) -> None:
    table = table_of(ROWS).select(["id", "x", "noise", "at"])
    pq.write_table(table, tmp_path / "in.parquet", compression="gzip", use_deprecated_int96_timestamps=True)
    inline(tmp_path, plainly, hr.read_parquet(tmp_path / "in.parquet").predict(lambda x: x * 2, input="x", output="y"))
    assert copied(tmp_path / "out") == [ROWS]
    assert copied(tmp_path / "out", "at") == []


def test_new_columns_may_change_their_type(tables: Path, tmp_path: Path, plainly: Any) -> None:
    def drifting(batch: dict[str, Any]) -> Any:
        first = int(batch["id"][0])
        if first < 3000:
            return [None] * len(batch["id"])
        return batch["id"] if first < ROWS + 3000 else batch["x"].astype(np.float64)

    ds = hr.read_parquet(tables).select("id", "x", "noise")
    inline(tmp_path, plainly, ds.predict(drifting, input=["id", "x"], output="y", batch_size=1000))


def test_a_compression_that_is_asked_for(tables: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(tables).predict(lambda x: x * 2, input="x", output="y")
    ds.write_parquet(tmp_path / "out", compression="zstd", engine="inline", progress="quiet")
    assert copied(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["header", "payload"])
def test_a_broken_chunk_is_no_copy(tmp_path: Path, place: str) -> None:
    """Nobody reads the column; what is wrong with it is found all the same."""
    path = tmp_path / "in.parquet"
    pq.write_table(table_of(ROWS).select(["x", "noise"]), path, compression="gzip")
    chunk = pq.read_metadata(path).row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o)
    if place == "payload":
        start += chunk.total_compressed_size // 2
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    ds = hr.read_parquet(path).predict(lambda x: x * 2, input="x", output="y")
    with pytest.raises(DataError, match="broken Parquet data"):
        ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet")


def test_explain_says_so(tables: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(tables).predict(lambda x: x * 2, input="x", output="y")
    run = ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet")
    assert "10 of 11 columns are copied encoded" in str(run)
    assert "9 of them are only checked" in str(run)


def test_new_columns_too_wide_to_wait(tables: Path, tmp_path: Path, plainly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_copy, "HELD_BYTES", 10_000)
    inline(tmp_path, plainly, hr.read_parquet(tables).predict(lambda x: x * 2, input="x", output="y"))
    assert copied(tmp_path / "out") == []


def test_one_file_twice(tables: Path, tmp_path: Path, plainly: Any) -> None:
    twice = [str(tables / "1.parquet"), str(tables / "0.parquet"), str(tables / "0.parquet")]
    inline(tmp_path, plainly, hr.read_parquet(twice).predict(lambda x: x * 2, input="x", output="y"))
    assert set(copied(tmp_path / "out")) == {ROWS}


def test_large_chunks_pass_in_pieces(tmp_path: Path) -> None:
    """Nothing of the size of a chunk is in memory."""
    path = tmp_path / "in.parquet"
    rows = 10_000
    noise = np.random.default_rng(0).integers(0, 256, rows * 4000, np.uint8).tobytes()
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4000), rows, [None, pa.py_buffer(noise)])
    pq.write_table(pa.table({"x": pa.array(range(rows)), "noise": column}), path, compression="none")
    ds = hr.read_parquet(path).predict(lambda x: x * 2, input="x", output="y")
    tracemalloc.start()
    try:
        ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * parquet_splice.PIECE_BYTES < len(noise) / 2
    assert read(tmp_path / "out")["noise"].combine_chunks().equals(pa.chunked_array([column]).combine_chunks())
