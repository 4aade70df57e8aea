"""Endpoint against servers on this machine that are slow, refuse, throttle, and break."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.models import http
from headrace.models.in_flight import BatchSize, Concurrency
from headrace.testing.model_server import RESET, Asked, ModelServer, Reply

ENGINES = ["inline", "threads", "processes"]
ROWS = 1200


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; worker processes wait as usual."""
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)


@pytest.fixture
def files(tmp_path: Path) -> str:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(12):
        pq.write_table(pa.table({"x": np.arange(100) + i * 100}), source / f"{i:02}.parquet")
    return str(source)


def table(rows: int) -> pa.Table:
    return pa.table({"x": list(range(rows))})


async def double(server: ModelServer, asked: Asked) -> Reply:
    return Reply({"predictions": [x * 2 for x in asked.json["instances"]]})


def written(ds: Any, out: Path, engine: str, **options: Any) -> pa.Table:
    ds.write_parquet(str(out), engine=engine, progress="quiet", cpus=2, **options)
    return pq.read_table(str(out))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_row_holds_nobody_back(files: str, tmp_path: Path, engine: str) -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        (x,) = asked.json["instances"]
        if x % 8 == 0 and x < ROWS - 600:
            await server.hold(asked, min(160, ROWS - 1 - asked.number))  # or until all have come, in whatever order
        return await double(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.Endpoint(server.url, batch_size=1, concurrency=64)
        ds = hr.read_parquet(files).predict(model, input=["x"], output="y")
        found = written(ds, tmp_path / "out", engine)
    assert found["x"].to_pylist() == list(range(ROWS))
    assert found["y"].to_pylist() == [2 * x for x in range(ROWS)]
    assert len(server.asked) == ROWS
    assert 20 <= server.most_active <= 64


def test_the_engine_is_chosen_without_asking_the_server(files: str, tmp_path: Path) -> None:
    with ModelServer(double) as server:
        ds = hr.read_parquet(files).predict(hr.models.Endpoint(server.url, batch_size=1), input=["x"], output="y")
        ds.explain()
        assert not server.asked
        found = written(ds, tmp_path / "out", "auto")
    assert found["y"].to_pylist() == [2 * x for x in range(ROWS)]
    assert len(server.asked) == ROWS


@pytest.mark.parametrize("engine", ENGINES)
def test_what_may_pass_is_tried_again(files: str, tmp_path: Path, engine: str) -> None:
    seen: Counter[str] = Counter()
    answered: Counter[int] = Counter()

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        text = asked.body.decode()
        seen[text] += 1
        values = asked.json["instances"]
        if seen[text] == 1 and values[0] % 3 == 0:
            kind = values[0] // 3 % 4
            if kind == 0:
                return Reply({"error": "busy"}, 429, {"Retry-After": "0"})
            if kind == 1:
                return Reply(b"oops", 500)
            if kind == 2:
                return RESET
            await asyncio.sleep(30)
        answered.update(values)
        return await double(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.Endpoint(server.url, batch_size=10, concurrency=32, timeout=0.5)
        found = written(hr.read_parquet(files).predict(model, input=["x"], output="y"), tmp_path / "out", engine)
    assert found["y"].to_pylist() == [2 * x for x in range(ROWS)]
    assert answered == Counter(range(ROWS))


def test_rows_that_are_refused_fail_alone() -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        if 13 in asked.json["instances"]:
            return Reply({"error": {"message": "13 is unlucky"}}, 400)
        return await double(server, asked)

    with ModelServer(answer) as server:
        ds = hr.from_arrow(table(40)).predict(hr.models.Endpoint(server.url, batch_size=8), input=["x"], output="y")
        rows = ds.take(50, engine="threads", progress="quiet", on_error="skip")
        assert [r["x"] for r in rows] == [x for x in range(40) if x != 13]
        with pytest.raises(hr.UserCodeError, match="HTTP 400: 13 is unlucky") as caught:
            ds.take(50, engine="threads", progress="quiet")
    assert ("row", "13 of") in [(k, v[:5]) for k, v in caught.value.where]


def test_bad_rows_are_set_aside_with_their_reason(files: str, tmp_path: Path) -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        if any(x % 100 == 7 for x in asked.json["instances"]):
            return Reply({"detail": "no sevens"}, 422)
        return await double(server, asked)

    with ModelServer(answer) as server:
        ds = hr.read_parquet(files).predict(hr.models.Endpoint(server.url, batch_size=4), input=["x"], output="y")
        run = ds.write_parquet(str(tmp_path / "out"), engine="threads", progress="quiet", on_error="quarantine")
    assert run.rows == ROWS - 12
    aside = pa.concat_tables(pq.read_table(p) for p in (tmp_path / "out").rglob("*quarantine*/**/*.parquet"))
    assert sorted(aside["x"].to_pylist()) == [x for x in range(ROWS) if x % 100 == 7]
    assert all("no sevens" in text for text in aside["_exception"].to_pylist())


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_url_ends_the_run_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MY_KEY", "hush-hush-1234")

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        return Reply({"error": f"no: {asked.headers['Authorization']} {asked.headers['X-Tenant']}"}, status)

    with ModelServer(answer) as server:
        url = server.url.replace("://", "://me:pass-word-77@") + "/v1?key=querysecret9"
        model = hr.models.Endpoint(url, headers={"X-Tenant": "tenant-secret-5"}, api_key_env="MY_KEY", batch_size=1)
        ds = hr.from_arrow(table(400)).predict(model, input=["x"], output="y")
        with pytest.raises(hr.PlanError, match=f"HTTP {status}") as caught:
            ds.take(400, engine="threads", progress="quiet", on_error="skip")
    texts = [str(caught.value), repr(caught.value), repr(model), model.name, json.dumps(model.meaning()), repr(ds)]
    texts.append(str(ds.explain()))
    for secret in ("hush-hush", "pass-word-77", "querysecret9", "tenant-secret"):
        assert not [text for text in texts if secret in text]
    assert len(server.asked) < 400


def test_the_key_is_sent_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer(double) as server:
        model = hr.models.Endpoint(server.url, api_key_env="MY_KEY", batch_size=1)
        ds = hr.from_arrow(table(3)).predict(model, input=["x"], output="y")
        with pytest.raises(hr.PlanError, match="MY_KEY is not set"):
            ds.take(3, engine="inline", progress="quiet")
        monkeypatch.setenv("MY_KEY", "k1")
        ds.take(3, engine="inline", progress="quiet")
    assert {a.headers["Authorization"] for a in server.asked} == {"Bearer k1"}


def test_a_server_that_is_not_there_ends_the_run() -> None:
    with ModelServer(double) as server:
        url = server.url
    ds = hr.from_arrow(table(3)).predict(hr.models.Endpoint(url, retries=1), input=["x"], output="y")
    with pytest.raises(hr.HeadraceError, match="can't connect"):
        ds.take(3, engine="inline", progress="quiet", on_error="skip")


@pytest.mark.parametrize("engine", ["inline", "threads"])
def test_a_run_that_is_left_leaves_nothing_behind(engine: str) -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        (x,) = asked.json["instances"]
        if x == 5:
            await server.hold(asked, 20)
            return Reply({"error": "no"}, 400)
        if x > 10:
            await asyncio.sleep(60)
        return await double(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.Endpoint(server.url, batch_size=1, concurrency=30)
        with pytest.raises(hr.UserCodeError, match="HTTP 400"):
            hr.from_arrow(table(100)).predict(model, input=["x"], output="y").take(100, engine=engine, progress="quiet")
        assert not [t for t in threading.enumerate() if t.name == "headrace-stream"]
        gc.collect()  # a session that was not closed would warn, and warnings are errors


# --- formats ---------------------------------------------------------------------------------------------------------


def ask(answer: Any, rows: pa.Table, inputs: list[str], output: Any, **kwargs: Any) -> tuple[pa.Table, ModelServer]:
    """All rows come in one block: of rows that come one by one, a request takes those that are there in time."""

    async def reply(server: ModelServer, asked: Asked) -> Reply:
        return answer(asked)

    with ModelServer(reply) as server:
        ds = hr.from_arrow(rows).map_batches(lambda b: b, batch_format="pyarrow", batch_size=len(rows))
        ds = ds.predict(hr.models.Endpoint(server.url, **kwargs), input=inputs, output=output)
        found = pa.concat_tables(ds.iter_batches(batch_size=None, batch_format="pyarrow", engine="inline", progress="quiet"))
    return found, server


TWO = pa.table({"a": [1.5, 2.5, 3.5], "b": ["x", "y", "z"]})


@pytest.mark.parametrize(
    ("payload", "reply", "body"),
    [
        (
            "instances",
            {"predictions": [1, 2, 3]},
            {"instances": [{"a": 1.5, "b": "x"}, {"a": 2.5, "b": "y"}, {"a": 3.5, "b": "z"}]},
        ),
        ("records", [{"s": 1}, {"s": 2}, {"s": 3}], [{"a": 1.5, "b": "x"}, {"a": 2.5, "b": "y"}, {"a": 3.5, "b": "z"}]),
        ("columns", {"s": [1, 2, 3]}, {"a": [1.5, 2.5, 3.5], "b": ["x", "y", "z"]}),
        (lambda rows: {"n": len(rows)}, [1, 2, 3], {"n": 3}),
    ],
)
def test_formats_of_json(payload: Any, reply: Any, body: Any) -> None:
    found, server = ask(lambda asked: Reply(reply), TWO, ["a", "b"], "s", payload=payload, batch_size=3)
    assert found["s"].to_pylist() == [1, 2, 3]
    assert [a.json for a in server.asked] == [body]


def test_one_record_a_request() -> None:
    found, server = ask(lambda asked: Reply({"s": asked.json["a"]}), TWO, ["a", "b"], "s", payload="records", batch_size=1)
    assert found["s"].to_pylist() == [1.5, 2.5, 3.5]
    assert {"a": 1.5, "b": "x"} in [a.json for a in server.asked]


def test_csv_and_json_lines() -> None:
    found, server = ask(lambda asked: Reply(b"0.1,0.2,0.3"), TWO, ["a", "b"], "s", payload="csv", batch_size=3)
    assert found["s"].to_pylist() == [0.1, 0.2, 0.3]
    assert server.asked[0].body == b"1.5,x\n2.5,y\n3.5,z\n"
    lines = b'{"s": 1}\n{"s": 2}\n{"s": 3}\n'
    found, server = ask(lambda asked: Reply(lines), TWO, ["a"], "s", payload="jsonlines", batch_size=3)
    assert found["s"].to_pylist() == [1, 2, 3]
    assert server.asked[0].body == b"1.5\n2.5\n3.5\n"


def test_tensors_of_the_open_inference_protocol() -> None:
    rows = pa.table({"x": pa.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])})

    def answer(asked: Asked) -> Reply:
        (tensor,) = asked.json["inputs"]
        data = np.asarray(tensor["data"]).reshape(tensor["shape"])
        sums = data.reshape(3, -1).sum(1)
        outputs = [
            {"name": "sum", "shape": [3, 1], "datatype": "FP32", "data": sums.tolist()},
            {"name": "all", "shape": [3, 2], "datatype": "INT16", "data": [[1, 2], [3, 4], [5, 6]]},
        ]
        return Reply({"outputs": outputs})

    found, server = ask(answer, rows, ["x"], ["sum", "all"], payload="kserve_v2", batch_size=3)
    assert found["sum"].type == pa.float32()
    assert found["sum"].to_pylist() == [1.0, 5.0, 9.0]
    assert "int16" in str(found["all"].type)
    assert server.asked[0].json["inputs"][0]["shape"] == [3, 2]


def test_an_answer_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(hr.HeadraceError, match="gave 2 answers to 3 rows"):
        ask(lambda asked: Reply([1, 2]), TWO, ["a"], "s", batch_size=3)


def test_parse_finds_the_answers() -> None:
    found, _ = ask(lambda asked: Reply(b"7 8 9"), TWO, ["a"], "s", batch_size=3, parse=lambda text, rows: text.split())
    assert found["s"].to_pylist() == ["7", "8", "9"]


# --- finding out -----------------------------------------------------------------------------------------------------


def drive(limit: Concurrency, clock: list[float], capacity: int, answers: int) -> None:
    """A server whose throughput grows with the requests under way up to `capacity`."""

    async def run() -> None:
        for _ in range(answers):
            while limit._active < limit.limit:
                await limit.acquire()
            clock[0] += 1.0 / min(limit.limit, capacity)
            limit.answered(1)
            limit.release()

    asyncio.run(run())


def test_concurrency_grows_while_throughput_does() -> None:
    clock = [0.0]
    limit = Concurrency(None, lambda: clock[0])
    drive(limit, clock, 50, 2000)
    assert 40 <= limit.limit <= 130
    before = limit.limit
    limit.throttled()
    assert limit.limit < before
    fixed = Concurrency(7, lambda: clock[0])
    fixed.throttled()
    assert fixed.limit == 7


def test_a_throttling_server_is_left_alone() -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        if asked.active > 8:
            return Reply(b"", 429)
        await asyncio.sleep(0.001)
        return await double(server, asked)

    with ModelServer(answer) as server:
        ds = hr.from_arrow(table(2000)).predict(hr.models.Endpoint(server.url, batch_size=1), input=["x"], output="y")
        rows = ds.take(2000, engine="threads", progress="quiet")
    assert [r["y"] for r in rows] == [2 * x for x in range(2000)]


def test_batches_grow_while_that_saves_time() -> None:
    size = BatchSize(None)
    for _ in range(200):
        size.answered(size.rows, 1.0 + 0.01 * size.rows)
    assert 64 <= size.rows <= 256


def test_batches_grow_when_the_first_answers_were_quicker() -> None:
    size = BatchSize(None)
    for i in range(500):
        size.answered(size.rows, 0.01 if i < 4 else 1.0 + 0.01 * size.rows)
    assert size.rows >= 64


def test_larger_batches_that_save_nothing_are_tried_ever_more_rarely() -> None:
    size = BatchSize(None)
    asked = [size.rows for _ in range(5000) if size.answered(size.rows, 0.1 * size.rows) is None]
    assert set(asked) == {1, 2}
    assert asked[:1000].count(2) <= 24
    assert 1 <= asked[2000:].count(2) <= 16, "a server may change"


def test_a_size_that_is_refused_is_tried_ever_more_rarely() -> None:
    """Every row of a batch costs the same, so that larger ones are wanted; the server takes 5 rows at most."""

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        sizes.append(len(asked.json["instances"]))
        if sizes[-1] > 5:
            return Reply(b"too large", 413)
        await asyncio.sleep(0.005)
        return await double(server, asked)

    sizes: list[int] = []
    with ModelServer(answer) as server:
        model = hr.models.Endpoint(server.url, batch_size="auto", concurrency=2)
        ds = hr.from_arrow(table(1200)).predict(model, input=["x"], output="y")
        rows = ds.take(1200, engine="threads", progress="quiet")
    assert [r["y"] for r in rows] == [2 * x for x in range(1200)]
    assert max(sizes) <= 8, "none beyond one that is refused"
    assert sizes.count(8) <= 20


def test_a_size_that_is_refused_later_than_the_trial_stays() -> None:
    size = BatchSize(None)
    while size.rows < 16:
        size.answered(size.rows, 1.0)
    size.refused(8)
    assert size.rows == 16, "of a smaller one that was under way"
    size.refused(16)
    size.refused(16)
    size.refused(8)
    assert size.rows == 8, "the first ends the trial; a bad row may be to blame for the last"
    fixed = BatchSize(8)
    fixed.refused(8)
    assert fixed.rows == 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), (None, 0.0), ("soon", 0.0), ("Thu, 01 Jan 1970 00:01:00 GMT", 20.0), ("nan", 0.0)],
)
def test_retry_after(value: str | None, seconds: float) -> None:
    assert http.retry_after_s(value, 40.0) == seconds
