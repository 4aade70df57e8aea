"""A language model in the worker itself, by vLLM's asynchronous engine: rows join and leave its batch one by one.

    hr.models.VLLM("/models/llama-3", prompt="Summarise: {text}", max_tokens=100)

Written against vLLM 0.33 (`AsyncLLM.from_engine_args`, `generate`, `shutdown`); `AsyncLLMEngine` of 0.6 has the same methods.

Invariant: the engine is made in the event loop that its requests run in, and shut down there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from headrace.contracts.model import Place
from headrace.core.errors import PlanError, TransientError
from headrace.core.extras import require
from headrace.core.redact import redact
from headrace.models.base import check_choice
from headrace.models.in_flight import InFlight, Row
from headrace.models.openai import columns_of, messages_of, render, template_fields

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class VLLM:
    """A chat or completion model in the worker, one engine per device.

    model: a folder, or a name that vLLM resolves. prompt, messages, system, schema: see OpenAI. kind: "completion" gives the
    prompt as it is, "chat" puts messages through the tokenizer's chat template.
    max_tokens, temperature, and whatever else SamplingParams has in `sampling`. engine: arguments of the engine, such as
    {"max_model_len": 4096, "dtype": "bfloat16", "tensor_parallel_size": 2}; with tensor_parallel_size, start the run with one
    device: an engine takes the others itself. concurrency: rows that the engine has at once; it queues what it has no room for.

    Output columns as those of OpenAI: the text, finish_reason, prompt_tokens, completion_tokens. A row that the engine refuses
    (a prompt too long) fails alone. When the engine dies, its rows are tried again with a new one, a few times.
    """

    model: str
    prompt: str | Callable[[Row], str] | None = None
    messages: Sequence[Mapping[str, Any]] | Callable[[Row], Sequence[Mapping[str, Any]]] | None = None
    system: str | None = None
    kind: Literal["chat", "completion"] = "completion"
    max_tokens: int = 256
    temperature: float = 0.0
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schema: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    concurrency: int = 512

    devices = ("cuda", "cpu")
    streams = True
    batch_format = "pyarrow"

    @property
    def name(self) -> str:
        """Such as "VLLM(llama-3)"."""
        return f"VLLM({self.model.rstrip('/').rpartition('/')[2]})"

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Raises PlanError."""
        require("vllm", self.name)
        check_choice(self.name, "kind", self.kind, ("chat", "completion"))
        if self.messages is not None and (self.kind != "chat" or self.prompt is not None):
            raise PlanError(f'{self.name}: messages are for kind="chat", instead of prompt', hint="give one of the two")
        if self.prompt is None and self.messages is None and len(inputs) > 1:
            raise PlanError(f"{self.name} has {len(inputs)} input columns and no prompt", hint='give prompt="... {column} ..."')
        texts = [self.prompt] if isinstance(self.prompt, str) else []
        for missing in sorted(template_fields(texts) - set(inputs)) if inputs else ():
            raise PlanError(f"{self.name}: the prompt uses {{{missing}}}, which is no input", hint="name it in input=[...]")

    def meaning(self) -> Mapping[str, Any]:
        """The artifact, the prompt, and the parameters of sampling and of the engine."""
        from headrace.connectors.artifacts import identity

        prompt = {"prompt": self.prompt, "messages": self.messages, "system": self.system, "kind": self.kind}
        with contextlib.suppress(Exception):  # a name for vLLM to resolve: the name is all there is
            return {"model": identity(self.model), **prompt, **self._sampling(), "engine": dict(self.engine)}
        return {"model": self.model, **prompt, **self._sampling(), "engine": dict(self.engine)}

    def load(self, place: Place) -> Any:
        return _VLLMStream(self)

    def _sampling(self) -> dict[str, Any]:
        said = {"max_tokens": self.max_tokens, "temperature": self.temperature, **self.sampling}
        return said if self.schema is None else {**said, "schema": dict(self.schema)}


class _VLLMStream(InFlight):
    def __init__(self, adapter: VLLM) -> None:
        super().__init__(adapter.concurrency)
        self._adapter = adapter
        self._engine: Any = None
        self._tokenizer: Any = None
        self._params: Any = None
        self._ids = count()

    async def ask(self, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        (row,) = rows
        engine = await self._started()
        text = await self._prompt(row)
        final: Any = None
        try:
            async for output in engine.generate(text, self._params, f"headrace-{next(self._ids)}"):
                final = output
        except Exception as exc:
            if not _is_dead(exc, engine):
                raise
            if self._engine is engine:
                self._stop()
            text = f"{self._adapter.name}: the engine died: {redact(str(exc))}"
            raise TransientError(text, hint="look at what vLLM prints; is the device's memory large enough?") from None
        answer = final.outputs[0]
        counts = (answer.finish_reason, len(final.prompt_token_ids or ()), len(answer.token_ids))
        return [columns_of(answer.text, counts, self.outputs, self._adapter.schema is not None, self._adapter.name)]

    async def aclose(self) -> None:
        """End the engine's processes. In the loop that `stream` ran in."""
        self._stop()

    def _stop(self) -> None:
        engine, self._engine, self._tokenizer = self._engine, None, None
        if engine is not None:
            with contextlib.suppress(Exception):  # it may be dead
                engine.shutdown()

    async def _started(self) -> Any:
        """The engine; made at the first row, because it belongs to the loop. Nothing else runs in the loop until it is up."""
        if self._engine is None:
            from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams  # pyright: ignore[reportMissingImports]
            from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

            sampling = self._adapter._sampling()  # pyright: ignore[reportPrivateUsage]
            schema = sampling.pop("schema", None)
            if schema is not None:
                from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

                sampling["structured_outputs"] = StructuredOutputsParams(json=schema)
            self._params = SamplingParams(**{"output_kind": RequestOutputKind.FINAL_ONLY, **sampling})
            args = AsyncEngineArgs(model=self._adapter.model, **self._adapter.engine)
            self._engine = AsyncLLMEngine.from_engine_args(args)
        return self._engine

    async def _prompt(self, row: Row) -> str:
        if self._adapter.kind == "completion":
            return render(self._adapter.prompt, row)
        if self._tokenizer is None:
            tokenizer = self._engine.get_tokenizer()
            self._tokenizer = await tokenizer if inspect.isawaitable(tokenizer) else tokenizer
        messages = messages_of(self._adapter, row)
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _is_dead(exc: Exception, engine: Any) -> bool:
    """By name: older versions say AsyncEngineDeadError."""
    return type(exc).__name__ in ("EngineDeadError", "AsyncEngineDeadError") or bool(getattr(engine, "errored", False))
