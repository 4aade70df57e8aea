"""VLLM against a stand-in for the `vllm` package with the signatures of its release 0.33. The real engine is not tested."""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import AsyncIterator
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import TransientError


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class EngineDeadError(Exception):
    pass


class Engines:
    """What the stand-in has seen."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.came = 0
        self.later = 0  # a row that ends with 0 is answered after so many more, or when all of `rows` came
        self.rows = 0
        self.kills = 0
        self.aborted = 0
        self.open = 0


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    seen = Engines()

    class SamplingParams(SimpleNamespace):
        pass

    class AsyncEngineArgs(SimpleNamespace):
        pass

    class Tokenizer:
        def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
            assert not tokenize
            assert add_generation_prompt
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    class AsyncLLM:
        def __init__(self, args: Any) -> None:
            self.args = args
            self.loop = asyncio.get_running_loop()
            self.news = asyncio.Condition()
            self.errored = False
            self.ids: set[str] = set()
            self.closed = False
            seen.made.append(self)

        @classmethod
        def from_engine_args(cls, engine_args: Any, start_engine_loop: bool = True) -> AsyncLLM:
            return cls(engine_args)

        def get_tokenizer(self) -> Tokenizer:
            return Tokenizer()

        def shutdown(self, timeout: float | None = None) -> None:
            self.closed = True

        async def generate(
            self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0
        ) -> AsyncIterator[SimpleNamespace]:
            assert asyncio.get_running_loop() is self.loop
            assert sampling_params.output_kind is RequestOutputKind.FINAL_ONLY
            assert request_id not in self.ids
            self.ids.add(request_id)
            mine = seen.came = seen.came + 1
            seen.open += 1
            try:
                async with self.news:
                    self.news.notify_all()
                    if seen.later and prompt.endswith("0"):
                        await self.news.wait_for(lambda: seen.came >= min(mine + seen.later, seen.rows))
                if seen.kills and prompt.endswith("77"):
                    seen.kills -= 1
                    self.errored = True
                if self.errored:
                    raise EngineDeadError("EngineCore encountered an issue")
                if prompt == "13":
                    raise ValueError("the prompt is longer than the model's context")
                text = prompt.upper()
                ids = list(range(len(text)))
                answer = SimpleNamespace(index=0, text=text, token_ids=ids, finish_reason="length")
                yield SimpleNamespace(request_id=request_id, prompt_token_ids=[1, 2], outputs=[answer], finished=True)
            finally:
                seen.open -= 1

    package: Any = types.ModuleType("vllm")
    package.__path__ = []
    package.__spec__ = ModuleSpec("vllm", None, is_package=True)
    params: Any = types.ModuleType("vllm.sampling_params")
    params.RequestOutputKind = RequestOutputKind
    params.StructuredOutputsParams = SimpleNamespace
    package.AsyncEngineArgs, package.AsyncLLMEngine, package.SamplingParams = AsyncEngineArgs, AsyncLLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return seen


def numbers(rows: int) -> pa.Table:
    return pa.table({"x": np.arange(rows)})


@pytest.mark.parametrize("engine", ["inline", "threads"])
def test_rows_join_and_leave_one_by_one(tmp_path: Path, engines: Engines, engine: Any) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        pq.write_table(numbers(600).slice(i * 100, 100), source / f"{i}.parquet")
    engines.later, engines.rows = 50, 600
    model = hr.models.VLLM("/models/m", prompt="row {x}", max_tokens=9, engine={"dtype": "auto"}, concurrency=32)
    ds = hr.read_parquet(str(source)).predict(model, input=["x"], output="y")
    ds.write_parquet(str(tmp_path / "out"), engine=engine, progress="quiet", cpus=2)
    found = pq.read_table(tmp_path / "out")
    assert found["y"].to_pylist() == [f"ROW {x}" for x in range(600)]
    (made,) = engines.made
    assert made.closed
    assert vars(made.args) == {"model": "/models/m", "dtype": "auto"}
    assert engines.open == 0


def test_columns_and_chat(engines: Engines) -> None:
    model = hr.models.VLLM("/models/m", kind="chat", prompt="{x}", system="be brief", schema=None, sampling={"top_p": 0.5})
    rows = hr.from_arrow(numbers(2)).predict(model, input=["x"]).take(2, engine="inline", progress="quiet")
    text = "<SYSTEM>BE BRIEF<USER>1<ASSISTANT>"
    assert rows[1] == {"x": 1, "answer": text, "finish_reason": "length", "prompt_tokens": 2, "completion_tokens": len(text)}


def test_a_row_that_is_refused_fails_alone(engines: Engines) -> None:
    ds = hr.from_arrow(numbers(20)).predict(hr.models.VLLM("m", prompt="{x}"), input=["x"], output="y")
    rows = ds.take(20, engine="threads", progress="quiet", on_error="skip")
    assert [r["x"] for r in rows] == [x for x in range(20) if x != 13]
    with pytest.raises(hr.UserCodeError, match="longer than the model's context"):
        ds.take(20, engine="threads", progress="quiet")
    assert engines.open == 0


def test_an_engine_that_dies_is_started_again(engines: Engines) -> None:
    engines.kills = 1
    ds = hr.from_arrow(pa.table({"x": np.arange(70, 80)})).predict(hr.models.VLLM("m", prompt="{x}"), input=["x"], output="y")
    rows = ds.take(10, engine="threads", progress="quiet", on_error="skip")
    assert [r["y"] for r in rows] == [str(x) for x in range(70, 80)]
    assert len(engines.made) == 2
    assert all(made.closed for made in engines.made)
    engines.kills = 1000
    with pytest.raises(TransientError, match="the engine died"):
        ds.take(10, engine="threads", progress="quiet", on_error="skip")


def test_what_is_missing_is_refused_before_the_run(engines: Engines) -> None:
    ds = hr.from_arrow(numbers(1)).predict(hr.models.VLLM("m", prompt="{y}"), input=["x"], output="y")
    with pytest.raises(hr.PlanError, match=r"uses \{y\}, which is no input"):
        ds.take(1, engine="inline", progress="quiet")
    assert hr.models.VLLM("/a/b/llama/").name == "VLLM(llama)"
