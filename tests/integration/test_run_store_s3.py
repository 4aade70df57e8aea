"""The S3 run store against a strict server: lost answers, faults, fencing, secrets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from headrace.api.verify import verify
from headrace.connectors import retries, run_store, storage
from headrace.connectors.run_store import S3RunStore, open_store
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.connectors.sources.parquet import ParquetSource
from headrace.core.errors import DataError, DestinationError, TransientError
from headrace.core.receipts import OutputFile
from headrace.testing.check_sink import SCHEMA, Session, a_batch, a_split, check_per_input, check_sink
from headrace.testing.check_source import read_all
from headrace.testing.s3 import CONTROL, Faults, S3Server

STAGED = "_headrace/run-00000/staging/1/x"


@pytest.fixture(scope="module", autouse=True)
def arrow_signal_pipe() -> None:
    """Arrow's CSV reader opens a pipe for Ctrl-C at its first use and keeps it for the life of the process."""
    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture
def store(strict: S3Server, tmp_path: Path) -> S3RunStore:
    found = open_store("s3://b/out", scratch=str(tmp_path / "scratch"), probe=True)
    assert isinstance(found, S3RunStore)
    assert found.conditional
    return found


def staged(store: S3RunStore, data: bytes, final: str, name: str = STAGED) -> OutputFile:
    path = store.begin(name)
    Path(path).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    store.stage(name, path, digest)
    assert not os.path.exists(path)
    return OutputFile(final, 1, len(data), digest, name)


@pytest.mark.parametrize("sink", [ParquetSink, CsvSink, JsonSink])
@pytest.mark.parametrize("rates", [{}, {"503": 0.05, "500": 0.03, "429": 0.02, "reset": 0.05, "lost": 0.05}])
def test_sinks(strict: S3Server, sink: type, rates: dict[str, float]) -> None:
    strict.faults = Faults(1, rates)

    def run(prefix: str, check: Any) -> None:
        def files() -> list[str]:
            return [key.removeprefix(f"{prefix}/") for key in strict.objects("b", f"{prefix}/")]

        def read(name: str) -> list[dict[str, Any]]:
            data = strict.objects("b")[f"{prefix}/{name}"]
            if name.endswith(".parquet"):
                return pq.read_table(io.BytesIO(data)).to_pylist()
            if name.endswith(".csv"):
                return pyarrow.csv.read_csv(io.BytesIO(data)).to_pylist()
            return [json.loads(line) for line in data.splitlines()]

        check(lambda **options: sink(f"s3://b/{prefix}", **options), files=files, read=read)

    run("packed", check_sink)
    run("per-input", check_per_input)
    assert bool(rates) == any(strict.injected.values())
    assert not [p for p in os.listdir(tempfile.gettempdir()) if p.startswith("headrace-staging-") and _ours(p)]


def _ours(name: str) -> bool:
    """A scratch directory that nobody holds any more is a leak."""
    import fcntl

    try:
        descriptor = os.open(os.path.join(tempfile.gettempdir(), name), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["500", "503", "429", "reset", "lost"])
def test_create_survives_an_unknown_outcome(strict: S3Server, store: S3RunStore, kind: str) -> None:
    strict.faults.once(kind, "PUT /b/out/log/0")
    assert store.create("log/0", b"mine")
    assert store.read("log/0") == b"mine"
    strict.faults.once(kind, "PUT /b/out/log/0")
    strict.faults.once(kind, "(GET|HEAD) /b/out/log/0", times=2)
    assert not store.create("log/0", b"another's")
    assert store.read("log/0") == b"mine"
    assert store.create("log/0", b"mine"), "the same bytes are the same creation, whenever its answer was lost"


def test_of_many_creations_one_takes_effect(strict: S3Server, store: S3RunStore) -> None:
    strict.faults = Faults(3, {"503": 0.1, "lost": 0.2, "reset": 0.1})
    with ThreadPoolExecutor(8) as pool:
        for index in range(4):
            won = list(pool.map(lambda n, index=index: store.create(f"log/{index}", f"writer {n}".encode()), range(8)))
            assert won.count(True) == 1
            assert store.read(f"log/{index}") == f"writer {won.index(True)}".encode()


def test_a_store_that_ignores_conditions_is_found_out(strict: S3Server) -> None:
    strict.ignore_conditions = True
    store = open_store("s3://b/out", probe=True)
    assert not store.conditional
    assert not strict.objects("b"), "the probe leaves nothing"
    assert store.create("x", b"1")
    assert store.create("x", b"1")
    assert not store.create("x", b"2")
    assert store.read("x") == b"1"


@pytest.mark.parametrize("kind", ["503", "reset", "lost"])
@pytest.mark.parametrize("match", ["HEAD /b/out/part", "PUT /b/out/part", "POST /b/"])
def test_publish_is_redone(strict: S3Server, store: S3RunStore, kind: str, match: str) -> None:
    file = staged(store, b"rows", "part-00-000000.csv")
    strict.faults.once(kind, match)
    store.publish([file])
    store.publish([file])
    assert strict.objects("b") == {"out/part-00-000000.csv": b"rows"}
    assert sum(strict.injected.values()) == 1


def test_publish_after_a_crash_before_the_staged_object_went(strict: S3Server, store: S3RunStore) -> None:
    file = staged(store, b"rows", "a/b.csv")
    obstore.copy(storage.s3_store("b"), f"out/{STAGED}", "out/a/b.csv")
    store.publish([file])
    assert strict.objects("b") == {"out/a/b.csv": b"rows"}


def test_publish_never_overwrites_unless_told(strict: S3Server, store: S3RunStore) -> None:
    store.write("a.csv", b"other")
    file = staged(store, b"rows!", "a.csv")
    with pytest.raises(DestinationError, match="is taken"):
        store.publish([file])
    assert store.read("a.csv") == b"other"
    assert store.read(STAGED) == b"rows!", "what could not be published is kept"
    store.publish([file], {"a.csv"})
    assert strict.objects("b") == {"out/a.csv": b"rows!"}
    strict.buckets["b"].clear()
    with pytest.raises(DestinationError, match="neither published nor staged"):
        store.publish([file])


def test_a_zombie_publishes_nothing_else(store: S3RunStore) -> None:
    """The staged object is gone and another run's output has the name."""
    file = staged(store, b"old rows", "a.csv")
    store.publish([file])
    newer = staged(store, b"new rows", "a.csv")
    store.publish([newer], {"a.csv"})
    with pytest.raises(DestinationError, match="is taken"):
        store.publish([file])
    assert store.read("a.csv") == b"new rows"


@pytest.mark.parametrize("most", [5 << 30, 1 << 20])
def test_large_objects(strict: S3Server, store: S3RunStore, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Up in parts; what is too large for one copy goes through this machine. A part that fails is sent again."""
    monkeypatch.setattr(run_store, "COPY_MOST_BYTES", most)
    monkeypatch.setattr(run_store, "PART_BYTES", 5 << 20)
    data = os.urandom(18 << 20)
    strict.faults.once("503", "PUT .*partNumber=2")
    strict.faults.once("lost", "POST .*uploadId")
    file = staged(store, data, "large.csv")
    store.publish([file])
    store.publish([file])
    assert strict.objects("b") == {"out/large.csv": data}
    assert store.size_and_digest("large.csv") == (len(data), file.digest)


@pytest.mark.parametrize("size", [0, 1000, 18 << 20])
def test_objects_in_pieces(strict: S3Server, store: S3RunStore, size: int) -> None:
    """Written and read again without ever being whole in memory. What fails on the way is done again."""
    data = os.urandom(size)
    pieces = [data[at : at + 1_000_000] for at in range(0, size, 1_000_000)]
    strict.faults.once("503", "PUT .*partNumber=2")
    strict.faults.once("lost", "POST .*uploadId")
    store.write_pieces("large", lambda: iter(pieces))
    assert strict.objects("b") == {"out/large": data}
    strict.faults.once("503", "GET .*large")
    assert b"".join(store.chunks("large")) == data
    assert list(store.chunks("nothing")) == []


def test_an_object_that_is_replaced_while_it_is_read(store: S3RunStore) -> None:
    for _ in range(2):
        store.write("large", os.urandom(9 << 20))
        chunks = store.chunks("large")
        next(chunks)
    store.write("large", b"another")
    with pytest.raises(TransientError, match="was replaced"):
        next(chunks)


def test_odd_names(strict: S3Server, store: S3RunStore) -> None:
    names = ["a b.csv", "ä/ö.csv", "100%25.csv", "q?x=1&y.csv", "plus+#.csv"]
    files = [staged(store, name.encode(), name, f"{STAGED}-{i}") for i, name in enumerate(names)]
    store.publish(files)
    assert sorted(store.names("")) == sorted(names)
    assert strict.objects("b") == {f"out/{name}": name.encode() for name in sorted(names)}
    for bad in ("../x", "/x", "a//b", "a/./b", ""):
        with pytest.raises(DestinationError, match="inside of the destination"):
            store.create(bad, b"")
    store.remove_all(names)
    assert not strict.objects("b")


def test_names_and_remove_stay_in_their_folder(strict: S3Server, store: S3RunStore) -> None:
    for name in ("log/1", "log/0", "log2/0", "logs"):
        store.write(name, b"")
    assert list(store.names("log")) == ["log/0", "log/1"]
    store.remove("log")
    assert list(store.names("")) == ["log2/0", "logs"]
    store.remove("log")


def test_a_listing_that_breaks_off_goes_on(strict: S3Server, store: S3RunStore) -> None:
    with strict.lock:
        sample = run_store.__doc__ or ""
        from headrace.testing.s3 import Stored

        strict.buckets["b"] = {f"out/{i:05d}": Stored(sample.encode(), '"e"', {}, 0.0) for i in range(3500)}
    strict.faults.once("503", "continuation-token", times=2)
    strict.faults.once("reset", "start-after")
    assert list(store.names("")) == [f"{i:05d}" for i in range(3500)]
    assert strict.injected == {"503": 2, "reset": 1, "": 0}


def test_reading_outlasts_faults(strict: S3Server) -> None:
    table = pa.table({"id": range(5000)})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=500)
    for n in range(20):
        obstore.put(storage.s3_store("b"), f"in/{n}.parquet", out.getvalue())
    strict.faults = Faults(5, {"503": 0.1, "500": 0.05, "reset": 0.1, "lost": 0.1})
    assert read_all(ParquetSource("s3://b/in/")).num_rows == 100_000
    assert sum(strict.injected.values()) > 0


def test_trouble_that_goes_on_is_an_error_without_secrets(strict: S3Server, store: S3RunStore) -> None:
    strict.faults = Faults(0, {"503": 1.0})
    for action in (lambda: store.read("x"), lambda: store.create("x", b""), lambda: list(store.names(""))):
        with pytest.raises(TransientError, match="10 attempts") as caught:
            action()
        assert "s3://b/" in str(caught.value)
        assert caught.value.__cause__ is None
        assert not any(word in str(caught.value) for word in ("AKIA", "secret", "Signature"))


def test_no_request_hangs_for_ever(strict: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TIMEOUTS", {"connect_timeout": "1s", "read_timeout": "200ms", "timeout": "200ms"})
    monkeypatch.setenv("AWS_PROFILE", "another")  # another client than that of other tests
    strict.faults.slow_s = 1.0
    strict.faults.once("slow", "GET", times=2)
    store = open_store("s3://b/out")
    store.write("x", b"1")
    assert store.read("x") == b"1"
    assert strict.injected["slow"] == 2


def test_no_retry_for_what_stays_as_it_is(strict: S3Server, store: S3RunStore) -> None:
    before = sum(strict.requests.values())
    with pytest.raises(DataError, match="no such bucket"):
        open_store("s3://nowhere/x").read("y")
    with pytest.raises(DestinationError, match="no such bucket"):
        open_store("s3://nowhere/x").check()
    assert sum(strict.requests.values()) - before <= 3


def test_a_finished_destination_verifies(strict: S3Server) -> None:
    session = Session(ParquetSink("s3://b/out"))
    for i in range(5):
        session.write(a_split(i), [a_batch(i * 10, 10)])
    half = verify("s3://b/out")
    assert half.ok
    assert not half.finished
    session.finish()
    strict.faults = Faults(9, {"503": 0.1, "reset": 0.05})
    report = verify("s3://b/out")
    assert report.ok, report
    assert (report.finished, report.files, report.rows, report.splits) == (True, 5, 50, 5)
    strict.faults = Faults()
    store = open_store("s3://b/out")
    store.write("part-00-000002.parquet", (store.read("part-00-000002.parquet") or b"")[:-1] + b"x")
    assert "part-00-000002.parquet" in str(verify("s3://b/out"))


def test_files_made_at_the_end(strict: S3Server) -> None:
    session = Session(JsonSink("s3://b/out", outputs="per_input"), schema=None)
    session.write(a_split(0), [])
    session.write(a_split(1), [a_batch(0, 2)])
    session.schema = SCHEMA
    session.finish()
    assert strict.objects("b", "out/in0") == {"out/in0.jsonl": b""}
    assert verify("s3://b/out").ok


def test_the_server_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "headrace.testing.s3", "--bucket", "b", "--fault", "503=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        request = urllib.request.Request(f"{url}{CONTROL}", data=b'{"rates": {}}', method="POST")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer) == {"requests": {}, "injected": {}}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/b/x", data=b"1", method="PUT")) as answer:
            assert answer.status == 200
        process.terminate()


def test_retries_of_a_process_are_bounded(strict: S3Server, store: S3RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    clock = [0.0]

    def sleep(s: float) -> None:
        waits.append(s)
        clock[0] += s

    budget = retries.Budget(lambda: clock[0])
    monkeypatch.setattr(retries, "budget", budget)
    monkeypatch.setattr(retries, "POLICY", retries.Policy(attempts=100, first_s=0.0, most_s=0.0, total_s=1e9))

    def broken() -> None:
        raise ConnectionResetError

    with pytest.raises(retries.Exhausted):
        retries.call(broken, sleep=sleep, clock=lambda: clock[0])
    free = [w for w in waits if w == 0.0]
    assert len(free) == retries.BURST
    assert sum(waits) == pytest.approx((99 - retries.BURST) / retries.RATE_PER_S)
