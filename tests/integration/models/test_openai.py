"""OpenAI-compatible servers: chat, completions, embeddings."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.models import http
from headrace.testing.model_server import Asked, ModelServer, Reply

ENGINES = ["inline", "threads", "processes"]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; worker processes wait as usual."""
    monkeypatch.setattr(http, "BACKOFF_S", 0.001)


def said(text: str | None, reason: str = "stop", **message: Any) -> Reply:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}, "text": text}
    return Reply({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": len(text or "")}})


async def shout(server: ModelServer, asked: Asked) -> Reply:
    return said(asked.json["messages"][-1]["content"].upper())


def texts(rows: int) -> pa.Table:
    return pa.table({"id": list(range(rows)), "text": [f"row {i}" for i in range(rows)]})


def test_a_chat_with_its_counts() -> None:
    with ModelServer(shout) as server:
        model = hr.models.OpenAI(server.url + "/v1/", "m", prompt="say {text}", system="be loud", max_tokens=5, temperature=0.0)
        rows = hr.from_arrow(texts(3)).predict(model, input=["text"]).take(3, engine="threads", progress="quiet")
        names = ["said", "completion_tokens"]
        few = hr.from_arrow(texts(1)).predict(model, input=["text"], output=names).take(1, engine="inline", progress="quiet")
    assert rows[1]["answer"] == "SAY ROW 1"
    assert [rows[1][n] for n in ("finish_reason", "prompt_tokens", "completion_tokens")] == ["stop", 7, 9]
    assert few == [{"id": 0, "text": "row 0", "said": "SAY ROW 0", "completion_tokens": 9}]
    assert {a.path for a in server.asked} == {"/v1/chat/completions"}
    body = next(a.json for a in server.asked if a.json["messages"][1]["content"] == "say row 2")
    messages = [{"role": "system", "content": "be loud"}, {"role": "user", "content": "say row 2"}]
    assert body == {"model": "m", "max_tokens": 5, "temperature": 0.0, "messages": messages}


@pytest.mark.parametrize("engine", ENGINES)
def test_long_answers_hold_nobody_back(tmp_path: Path, engine: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        pq.write_table(texts(600).slice(i * 100, 100), source / f"{i}.parquet")

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        number = int(asked.json["messages"][-1]["content"].split()[-1])
        if number % 8 == 0 and number < 200:
            await server.hold(asked, min(320, 599 - asked.number))  # or until all have come, in whatever order splits do
        return await shout(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", prompt="{text}")
        run = hr.read_parquet(str(source)).predict(model, input=["text"], output="said")
        run.write_parquet(str(tmp_path / "out"), engine=engine, progress="quiet", cpus=2)
    assert pq.read_table(tmp_path / "out")["said"].to_pylist() == [f"ROW {i}" for i in range(600)]
    assert len(server.asked) == 600


def test_rows_that_are_refused_or_filtered_fail_alone() -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        match asked.json["messages"][-1]["content"]:
            case "row 1":
                return Reply({"error": {"message": "content filter", "code": "content_filter"}}, 400)
            case "row 2":
                return said(None, refusal="I can't")
            case "row 3":
                return said(None, "content_filter")
            case _:
                return await shout(server, asked)

    with ModelServer(answer) as server:
        ds = hr.from_arrow(texts(6)).predict(hr.models.OpenAI(server.url, "m"), input=["text"], output="said")
        rows = ds.take(6, engine="threads", progress="quiet", on_error="skip")
        assert [r["id"] for r in rows] == [0, 4, 5]
        with pytest.raises(hr.HeadraceError, match=r"content filter|refused|withheld"):
            ds.take(6, engine="threads", progress="quiet")


@pytest.mark.parametrize("messages", [False, True])
def test_a_null_in_a_template_is_a_bad_row(messages: bool) -> None:
    asked = {"messages": [{"role": "user", "content": "say {text}"}]} if messages else {"prompt": "say {text}"}
    with ModelServer(shout) as server:
        ds = hr.from_items([{"text": "a"}, {"text": None}]).predict(hr.models.OpenAI(server.url, "m", **asked), output="said")
        rows = ds.take(2, engine="threads", progress="quiet", on_error="skip")
        with pytest.raises(hr.HeadraceError, match="'text' of the prompt is null"):
            ds.take(2, engine="threads", progress="quiet")
    assert [r["said"] for r in rows] == ["SAY A"]
    assert all(a.json["messages"][0]["content"] == "say a" for a in server.asked)


def test_a_bad_key_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        return Reply({"error": {"message": f"Incorrect API key provided: {asked.headers['Authorization']}"}}, 401)

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", api_key_env="OPENAI_API_KEY", concurrency=4)
        ds = hr.from_arrow(texts(500)).predict(model, input=["text"], output="said")
        with pytest.raises(hr.PlanError, match="HTTP 401") as caught:
            ds.take(500, engine="threads", progress="quiet", on_error="skip")
    assert "not-a-real" not in str(caught.value) + repr(caught.value) + repr(model) + json.dumps(model.meaning())
    assert len(server.asked) < 500


def test_answers_that_follow_a_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "odd": {"type": "boolean"}}}

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        number = int(asked.json["messages"][-1]["content"].split()[-1])
        return said('{"n": 3, "od' if number == 2 else json.dumps({"n": number, "odd": number % 2 == 1}))

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", schema=schema)
        ds = hr.from_arrow(texts(4)).predict(model, input=["text"], output=["n", "odd", "finish_reason"])
        rows = ds.take(4, engine="inline", progress="quiet", on_error="skip")
    assert [(r["n"], r["odd"], r["finish_reason"]) for r in rows] == [(0, False, "stop"), (1, True, "stop"), (3, True, "stop")]
    assert server.asked[0].json["response_format"]["json_schema"]["schema"] == schema


def test_messages_by_a_function_or_of_templates() -> None:
    with ModelServer(shout) as server:
        for messages in (
            [{"role": "user", "content": "a {text}"}],
            lambda row: [{"role": "user", "content": "a " + row["text"]}],
        ):
            model = hr.models.OpenAI(server.url, "m", messages=messages)
            rows = hr.from_arrow(texts(1)).predict(model, input=["text"], output="s").take(1, engine="inline", progress="quiet")
            assert rows[0]["s"] == "A ROW 0"


def test_completions() -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        return said(asked.json["prompt"] + "!")

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", kind="completion", stop=["\n"], extra={"top_k": 3})
        rows = hr.from_arrow(texts(2)).predict(model, input=["text"], output="s").take(2, engine="inline", progress="quiet")
    assert [r["s"] for r in rows] == ["row 0!", "row 1!"]
    assert server.asked[0].path == "/completions"
    bodies = [a.json for a in server.asked]
    assert {"model": "m", "stop": ["\n"], "top_k": 3, "prompt": "row 0"} in bodies


@pytest.mark.parametrize("encoded", [False, True])
def test_embeddings_are_tensors_in_order(encoded: bool) -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        found = []
        for i, text in enumerate(asked.json["input"]):
            vector = np.array([float(text.split()[-1]), 0.5, -1.0], dtype="<f4")
            found.append({"index": i, "embedding": base64.b64encode(vector.tobytes()).decode() if encoded else vector.tolist()})
        return Reply({"data": found[::-1], "usage": {"prompt_tokens": 3}})

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", kind="embedding", batch_size=16, dimensions=3)
        ds = hr.from_arrow(texts(100)).predict(model, input=["text"], output="v")
        batches = list(ds.iter_batches(batch_size=None, batch_format="numpy", engine="threads", progress="quiet"))
    vectors = np.concatenate([b["v"] for b in batches])
    assert vectors.dtype == np.float32
    assert vectors.shape == (100, 3)
    assert vectors[:, 0].tolist() == list(range(100))
    assert len(server.asked) < 20
    assert all(a.json["dimensions"] == 3 for a in server.asked)


def test_throttling_and_breaks_lose_and_double_nothing() -> None:
    seen: set[str] = set()
    answered: list[str] = []

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        text = asked.json["messages"][-1]["content"]
        if text not in seen:
            seen.add(text)
            number = int(text.split()[-1])
            if number % 5 == 0:
                return [Reply(b"", 429, {"Retry-After": "0"}), Reply(b"", 503), Reply(reset=True)][number // 5 % 3]
        answered.append(text)
        await asyncio.sleep(0)
        return await shout(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m", concurrency=16)
        ds = hr.from_arrow(texts(200)).predict(model, input=["text"], output="s")
        rows = ds.take(200, engine="threads", progress="quiet")
    assert [r["s"] for r in rows] == [f"ROW {i}" for i in range(200)]
    assert sorted(answered) == sorted(f"row {i}" for i in range(200))


@pytest.mark.parametrize(
    ("kwargs", "inputs", "says"),
    [
        ({"kind": "speech"}, ["text"], "no kind='speech'"),
        ({}, ["id", "text"], "2 input columns and no prompt"),
        ({"prompt": "{name}"}, ["text"], "uses {name}, which is no input"),
        ({"prompt": "x", "messages": []}, ["text"], "messages are for"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, ["text"], "NO_SUCH_VARIABLE is not set"),
        ({"concurrency": -1}, ["text"], "concurrency is -1"),
    ],
)
def test_what_can_not_work_is_refused_before_the_run(kwargs: Any, inputs: list[str], says: str) -> None:
    model = hr.models.OpenAI("http://localhost:1/v1", "m", **kwargs)
    with pytest.raises(hr.PlanError, match=says):
        hr.from_arrow(texts(1)).predict(model, input=inputs, output="s").take(1, engine="inline", progress="quiet")


def test_what_it_means_is_not_how_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    one = hr.models.OpenAI("http://a:b@host/v1", "m", prompt="{x}", concurrency=1, headers={"X-Key": "secret-1"})
    other = hr.models.OpenAI("http://c:d@host/v1", "m", prompt="{x}", concurrency=9, api_key_env="K")
    assert one.meaning() == other.meaning()
    assert one.meaning() != hr.models.OpenAI("http://host/v1", "m", prompt="{x}!").meaning()


TROUBLE = [b'{"choices": [{"mess', b"", b'{"error": {"message": "upstream overloaded", "code": 503}}']


@pytest.mark.parametrize("body", TROUBLE, ids=["cut off", "empty", "an error inside"])
def test_trouble_that_says_it_is_fine_is_asked_for_again(body: bytes) -> None:
    seen: list[str] = []

    async def answer(server: ModelServer, asked: Asked) -> Reply:
        text = asked.json["messages"][-1]["content"]
        seen.append(text)
        return Reply(body) if text == "row 3" and seen.count(text) == 1 else await shout(server, asked)

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m")
        rows = hr.from_arrow(texts(6)).predict(model, input=["text"], output="s").take(6, engine="inline", progress="quiet")
    assert [row["s"] for row in rows] == [f"ROW {i}" for i in range(6)]
    assert seen.count("row 3") == 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (TROUBLE[2], r"upstream overloaded \(\d+ attempts\)"),
        (b'{"error": {"message": "no such tool", "code": 400}}', "no such tool"),
    ],
)
def test_the_words_of_an_error_inside_are_told(body: bytes, says: str) -> None:
    async def answer(server: ModelServer, asked: Asked) -> Reply:
        return Reply(body)

    with ModelServer(answer) as server:
        model = hr.models.OpenAI(server.url, "m")
        with pytest.raises(hr.HeadraceError, match=says):
            hr.from_arrow(texts(1)).predict(model, input=["text"], output="s").take(1, engine="inline", progress="quiet")
