"""Sources and sinks on S3, against a local server."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors import footers, packing, storage
from headrace.connectors.listing import Listing
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.images import ImageSource
from headrace.connectors.sources.parquet import LOOKED_AT_REMOTE, ParquetSource
from headrace.contracts.source import BadRange
from headrace.core.errors import DataError, DestinationError, InputChanged
from headrace.core.options import BlockLimits
from headrace.testing.check_sink import Session, check_per_input, check_sink
from headrace.testing.check_source import check_source, read_all
from headrace.testing.s3 import Faults, S3Server


@pytest.fixture(scope="module", autouse=True)
def arrow_signal_pipe() -> None:
    """Arrow's CSV reader opens a pipe for Ctrl-C at its first use and keeps it for the life of the process."""
    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))


def table(start: int, rows: int) -> pa.Table:
    ids = range(start, start + rows)
    return pa.table({"id": pa.array(ids, pa.int64()), "name": [f"name {i}" for i in ids]})


def put(bucket: str, key: str, data: bytes) -> None:
    obstore.put(storage.s3_store(bucket), key, data)


def parquet(t: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(t, out, **options)
    return out.getvalue()


def test_parquet_whole_objects(bucket: str) -> None:
    for n in range(3):
        put(bucket, f"data/part={n}/f.parquet", parquet(table(n * 100, 100)))
    put(bucket, "data/_SUCCESS", b"")
    put(bucket, "data/_old/f.parquet", b"junk")
    source = ParquetSource(f"s3://{bucket}/data")
    assert source.remote
    got = check_source(source, rows=300, predicate=pc.field("id") >= 150)
    assert got["id"].to_pylist() == list(range(300))


def test_parquet_by_ranges(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WHOLE_S3_BYTES", 1000)
    monkeypatch.setattr(storage, "FOOTER_BYTES", 3000)
    monkeypatch.setattr(storage, "REQUEST_BYTES", 2000)
    put(bucket, "a.parquet", parquet(table(0, 3000), row_group_size=500))
    check_source(ParquetSource(f"s3://{bucket}/a.parquet"), rows=3000, predicate=pc.field("id") == 2777)
    monkeypatch.setattr("headrace.connectors.sources.parquet.S3_AHEAD_BYTES", 0)
    check_source(ParquetSource(f"s3://{bucket}/a.parquet"), rows=3000)


def test_csv_and_images(bucket: str) -> None:
    out = io.BytesIO()
    pyarrow.csv.write_csv(table(0, 50), out)
    put(bucket, "in/a.csv", out.getvalue())
    for n in range(40):
        put(bucket, f"in/{n:02d}.png", bytes([n]))
    check_source(CsvSource(f"s3://{bucket}/in/"), rows=50)
    got = check_source(ImageSource(f"s3://{bucket}/in/"), rows=40)
    assert got["bytes"].to_pylist() == [bytes([n]) for n in range(40)]


def test_listing_is_streamed_and_globs_match(bucket: str) -> None:
    for key in ("a/x1.parquet", "a/x2.parquet", "a/deep/x3.parquet", "ab/x4.parquet"):
        put(bucket, key, b"")

    def names(pattern: str) -> list[str]:
        return [o.uri.rpartition("/")[2] for o in Listing.of(f"s3://{bucket}/{pattern}", (".parquet",)).objects()]

    assert names("a/*.parquet") == ["x1.parquet", "x2.parquet"]
    assert names("a/**/*.parquet") == ["x3.parquet", "x1.parquet", "x2.parquet"]
    assert names("a*/x?.parquet") == ["x1.parquet", "x2.parquet", "x4.parquet"]
    assert names("a") == ["x3.parquet", "x1.parquet", "x2.parquet"]
    with pytest.raises(DataError, match="no object matches"):
        names("zz*")
    with pytest.raises(DataError, match="no object to read"):
        names("nothing/")


def test_a_changed_object_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FOOTER_BYTES", 1000)
    for whole in (0, 1 << 20):
        monkeypatch.setattr(storage, "WHOLE_S3_BYTES", whole)
        put(bucket, "a.parquet", parquet(table(0, 100)))
        source = ParquetSource(f"s3://{bucket}/a.parquet")
        source.schema()
        (split,) = source.splits(per_input=False)
        put(bucket, "a.parquet", parquet(table(5, 100)))
        with pytest.raises(InputChanged):
            list(source.open(split, BlockLimits()))


def test_an_object_that_is_gone_has_changed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    monkeypatch.setattr(storage, "FOOTER_BYTES", 1000)
    for whole in (0, 1 << 20):
        monkeypatch.setattr(storage, "WHOLE_S3_BYTES", whole)
        put(bucket, "a.parquet", parquet(table(0, 100)))
        source = ParquetSource(f"s3://{bucket}/a.parquet")
        source.schema()
        (split,) = source.splits(per_input=False)
        obstore.delete(storage.s3_store(bucket), "a.parquet")
        bad: list[BadRange] = []
        with pytest.raises(InputChanged):
            list(source.open(split, BlockLimits(), bad.append))
        assert not bad


def test_missing_bucket(bucket: str) -> None:
    with pytest.raises(DataError):
        ParquetSource("s3://no-such-bucket/x/").schema()
    with pytest.raises(DestinationError):
        ParquetSink("s3://no-such-bucket/x").check(None)


@pytest.mark.parametrize("sink", [ParquetSink, CsvSink, JsonSink])
def test_sinks(bucket: str, sink: type) -> None:
    store = storage.s3_store(bucket)

    def run(prefix: str, check: Any) -> None:
        def files() -> list[str]:
            return [o["path"].removeprefix(f"{prefix}/") for page in obstore.list(store, prefix) for o in page]

        def read(name: str) -> list[dict[str, Any]]:
            data = bytes(obstore.get(store, f"{prefix}/{name}").bytes())
            if name.endswith(".parquet"):
                return pq.read_table(io.BytesIO(data)).to_pylist()
            if name.endswith(".csv"):
                return pyarrow.csv.read_csv(io.BytesIO(data)).to_pylist()
            return [json.loads(line) for line in data.splitlines()]

        check(lambda **options: sink(f"s3://{bucket}/{prefix}", **options), files=files, read=read)

    run("packed", check_sink)
    run("per-input", check_per_input)


def test_large_outputs_go_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.core.splits import Fragment, Split

    monkeypatch.setattr(storage, "REQUEST_BYTES", 1000)
    session = Session(ParquetSink(f"s3://{bucket}/out"))
    for attempt in range(2):
        receipt = session.stage(Split(0, (Fragment("x", 1, "v", name="x"),), 1), table(0, 1000).to_batches(), attempt)
    session.settle(receipt)
    session.schema = table(0, 1).schema
    session.finish()
    assert read_all(ParquetSource(f"s3://{bucket}/out")).equals(table(0, 1000))


class Asked(Faults):
    """No faults: what was asked, in order, as "METHOD /bucket/key" and the range of bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.ranges: list[tuple[str, tuple[int, int] | None]] = []
        real = storage._fetch

        def fetch(uri: str, version: str, span: tuple[int, int] | None) -> pa.Buffer:
            self.ranges.append((uri, span))
            return real(uri, version, span)

        monkeypatch.setattr(storage, "_fetch", fetch)

    def draw(self, request: str) -> str:
        self.requests.append(request)
        return ""


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 60 kB are large ones, read a row group of 5 kB at a time."""
    monkeypatch.setattr(storage, "WHOLE_S3_BYTES", 1000)
    monkeypatch.setattr(storage, "FOOTER_BYTES", 4000)
    monkeypatch.setattr(packing, "DIVIDE_OVER_BYTES", 10_000)
    monkeypatch.setattr(packing, "DIVIDE_BYTES", 15_000)


@pytest.mark.parametrize("engine", ["inline", "threads", "auto"])
def test_a_run_asks_for_nothing_twice(
    strict: S3Server, small_ranges: None, engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for n in range(3):
        put("b", f"in/{n}.parquet", parquet(table(n * 3000, 3000), row_group_size=300, compression="none"))
    strict.faults = asked = Asked(monkeypatch)
    source = hr.read_parquet("s3://b/in")
    options: Any = {"engine": engine, "cpus": 2, "progress": "quiet"}
    done = source.map_batches(lambda batch: batch).write_parquet(tmp_path / "out", **options)
    assert done.rows == 9000
    assert sorted(pq.read_table(tmp_path / "out")["id"].to_pylist()) == list(range(9000))
    listings = [r for r in asked.requests if "list-type" in r]
    assert len(listings) == 1
    assert len([r for r in asked.requests if r.startswith("HEAD")]) == 1
    assert max(Counter(asked.ranges).values()) == 1
    # Two actions are two listings: the second sees what is there then.
    put("b", "in/3.parquet", parquet(table(9000, 10)))
    assert source.map_batches(lambda batch: batch).write_parquet(tmp_path / "again", **options).rows == 9010


@pytest.mark.parametrize("paths", ["s3://b/in", "s3://b/in/*", "s3://b/**/*.parquet", "a list"])
def test_the_types_of_several_objects_are_asked_for_at_once(
    strict: S3Server, monkeypatch: pytest.MonkeyPatch, paths: str
) -> None:
    names = [f"in/{n:02d}.parquet" for n in range(20)]
    for n, name in enumerate(names):
        rows = table(n * 300, 300)
        put("b", name, parquet(rows.append_column("new", rows["id"]) if n == 19 else rows))
    strict.faults = asked = Asked(monkeypatch)
    monkeypatch.setattr(footers, "remembered", footers.Footers())
    meeting = threading.Barrier(1 if "**" in paths else LOOKED_AT_REMOTE, timeout=20)
    fetch = storage._fetch

    def together(uri: str, version: str, span: tuple[int, int] | None) -> pa.Buffer:
        meeting.wait()
        return fetch(uri, version, span)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_fetch", together)
        source = ParquetSource([f"s3://b/{name}" for name in names] if paths == "a list" else paths)
        schema = source.schema()
    assert len(asked.ranges) == meeting.parties
    assert len([r for r in asked.requests if "list-type" in r]) == (0 if paths == "a list" else 1)
    if meeting.parties > 1:  # patterns of several levels are not looked through for the last object
        assert schema.names[-1] == "new"
        assert read_all(source)["new"].null_count == 19 * 300


def test_row_groups_are_on_their_way_before_they_are_read(
    strict: S3Server, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("b", "a.parquet", parquet(table(0, 3000), row_group_size=1000, compression="none"))
    asked = Asked(monkeypatch)
    (split, *_) = splits = list(ParquetSource("s3://b/a.parquet").splits(per_input=True))
    assert len(splits) == 1
    blocks = ParquetSource("s3://b/a.parquet").open(split, BlockLimits(max_rows=100))
    seen: list[int] = []
    rows = 0
    for batch, _ in blocks:
        rows += batch.num_rows
        seen.append(len(asked.ranges) if rows % 1000 in (100, 900) else 0)
    assert rows == 3000
    first, later = [n for n in seen if n][:2]
    assert later > first, "the second row group was asked for while the first was read"
    assert max(Counter(asked.ranges).values()) == 1


def test_an_object_changed_behind_a_remembered_footer_is_told(
    strict: S3Server, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("b", "a.parquet", parquet(table(0, 3000), row_group_size=1000, compression="none"))
    source = ParquetSource("s3://b/a.parquet")
    splits = list(source.splits(per_input=False))
    put("b", "a.parquet", parquet(table(7, 3000), row_group_size=1000, compression="none"))
    for split in splits:
        with pytest.raises(InputChanged):
            list(source.open(split, BlockLimits()))
    again = [pa.Table.from_batches([b for b, _ in source.open(s, BlockLimits())]) for s in source.splits(per_input=False)]
    assert pa.concat_tables(again)["id"].to_pylist() == list(range(7, 3007))


def test_an_object_that_may_be_read_but_not_listed(strict: S3Server) -> None:
    put("b", "model", b"bytes")
    strict.faults.once("500", "list-type", times=100)
    (found,) = Listing.of("s3://b/model", ()).objects()
    assert found.size == 5


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_what_the_storage_refuses_is_no_bad_row(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: Any
) -> None:
    for i in range(4):
        put(bucket, f"in/{i}.parquet", parquet(table(i * 10, 10)))
    get = obstore.get

    def expired(store: Any, key: str, **options: Any) -> Any:
        if key >= "in/2":
            raise obstore.exceptions.PermissionDeniedError("status 403: <Code>ExpiredToken</Code>")
        return get(store, key, **options)

    monkeypatch.setattr(obstore, "get", expired)
    ds = hr.read_parquet(f"s3://{bucket}/in")
    with pytest.raises(hr.StorageRefused, match="access denied"):
        ds.write_parquet(tmp_path / "out", engine="inline", progress="quiet", on_error=on_error)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_large_gaps_between_few_bytes_are_not_fetched() -> None:
    mib = 1 << 20
    far = [(i * mib, i * mib + 1000) for i in range(100)]
    assert storage.coalesce(far) == far
    near = [(i * 60_000, i * 60_000 + 1000) for i in range(100)]
    assert storage.coalesce(near) == [(0, 99 * 60_000 + 1000)]
    assert storage.coalesce([(0, mib), (mib + 500_000, 3 * mib)]) == [(0, 3 * mib)]


def test_small_objects_of_a_split_are_fetched_side_by_side(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(40):
        put(bucket, f"in/{i:02d}.parquet", parquet(table(i * 10, 10)))
    get, lock, gate = obstore.get, threading.Lock(), threading.Event()
    asked: list[str] = []

    def slow(store: Any, key: str, **options: Any) -> Any:
        with lock:
            asked.append(key)
            if len(asked) >= 10:
                gate.set()
        assert gate.wait(20), "one after the other"
        return get(store, key, **options)

    source = ParquetSource(f"s3://{bucket}/in")
    source.schema()
    monkeypatch.setattr(obstore, "get", slow)
    got = read_all(source)
    assert got["id"].to_pylist() == list(range(400))
    assert sorted(asked) == [f"in/{i:02d}.parquet" for i in range(40)], "each once"
    assert not storage._coming


def test_small_objects_are_fetched_once_where_a_filter_looks_at_statistics(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        put(bucket, f"in/{i:02d}.parquet", parquet(table(i * 100, 100), row_group_size=10))
    monkeypatch.setattr(footers, "remembered", footers.Footers())
    source, _ = ParquetSource(f"s3://{bucket}/in").prune(pc.field("id") >= 445)
    monkeypatch.setattr(footers, "remembered", footers.Footers())
    asked = Asked(monkeypatch)
    assert read_all(source)["id"].to_pylist() == list(range(445, 500))
    assert asked.ranges == [(f"s3://{bucket}/in/{i:02d}.parquet", None) for i in range(5)]


def test_counting_fetches_no_more_than_footers(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        put(bucket, f"in/{i:02d}.parquet", parquet(table(i * 50_000, 50_000), compression="none"))
    monkeypatch.setattr(footers, "remembered", footers.Footers())
    asked = Asked(monkeypatch)
    assert ParquetSource(f"s3://{bucket}/in").count() == 150_000
    assert len(asked.ranges) == 3
    assert all(span is not None and span[1] - span[0] == storage.FOOTER_BYTES for _, span in asked.ranges)


def test_an_object_that_is_listed_several_times_is_fetched_as_often(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        put(bucket, f"{i}.parquet", parquet(table(i * 10, 10)))
    source = ParquetSource([f"s3://{bucket}/{i}.parquet" for i in (0, 1, 0, 0, 2, 1)])
    source.schema()
    asked = Asked(monkeypatch)
    got = read_all(source)["id"].to_pylist()
    assert got[::10] == [0, 10, 0, 0, 20, 10]
    assert Counter(uri[-9] for uri, _ in asked.ranges) == {"0": 3, "1": 2, "2": 1}
    assert not storage._coming


def test_what_was_fetched_ahead_and_not_wanted_is_let_go(bucket: str) -> None:
    for i in range(40):
        put(bucket, f"in/{i:02d}.parquet", parquet(table(i * 10, 10)))
    source = ParquetSource(f"s3://{bucket}/in")
    (split,) = list(source.splits(per_input=False))[:1]
    blocks = source.open(split, BlockLimits(target_bytes=1))
    next(blocks)
    blocks.close()
    assert not storage._coming
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-get")]
