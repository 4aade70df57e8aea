"""Models behind any server that speaks OpenAI's HTTP API: OpenAI itself, vLLM, TGI, SGLang, llama.cpp, Ollama, proxies.

    hr.models.OpenAI("http://localhost:8000/v1", "llama-3", prompt="Summarise: {text}", max_tokens=100)

Requests are kept in flight and tried again as `http.py` says. https://platform.openai.com/docs/api-reference

Invariant: a row's answer has its own token counts, so that sums over rows are sums over the run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import DataError, PlanError
from headrace.core.extras import require
from headrace.models.base import check_choice
from headrace.models.http import RequestStream, Row, Settings, shown, to_json

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["chat", "completion", "embedding"]
_PATHS = {"chat": "chat/completions", "completion": "completions", "embedding": "embeddings"}
EMBEDDING_ROWS = 64  # inputs a request
COUNTS = ("finish_reason", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class OpenAI:
    """A chat, completion or embedding model behind an OpenAI-compatible server.

    base_url: up to and with "/v1". prompt: a template over the input columns, "Translate: {text}", or a function of a row that
    gives a str; None: the only input column. messages: instead, for chat: a function of a row that gives the list of messages,
    or a list whose texts are templates. system: a message before the prompt.
    max_tokens, temperature, top_p, stop, seed, response_format, and whatever else in `extra`: sent as they are.
    schema: a JSON schema that the answer must follow (`response_format` of that kind); then the answer's keys are columns.
    max_tokens_name: newer models of OpenAI's want "max_completion_tokens".
    concurrency, timeout, retries, headers: see Endpoint; concurrency=None finds out. batch_size: of embeddings, inputs a
    request.
    api_key_env: read in the worker; None for a server without keys.

    Output columns: the text (under the first name in `output` that is none of the following, "answer" without `output`), and,
    where `output` names them or is left out, finish_reason (str), prompt_tokens and completion_tokens (int64). With `schema`,
    the object's keys instead of the text. An embedding is a float32 tensor column ("embedding" without `output`); servers tell
    no token counts per input, so it has none.

    A row that the server refuses (400: too long, filtered) or whose answer breaks the schema fails alone. 401, 403 and 404 end
    the run.
    """

    base_url: str = field(repr=False)
    model: str
    prompt: str | Callable[[Row], str] | None = None
    messages: Sequence[Mapping[str, Any]] | Callable[[Row], Sequence[Mapping[str, Any]]] | None = None
    system: str | None = None
    kind: Kind = "chat"
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    schema: Mapping[str, Any] | None = None
    dimensions: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    max_tokens_name: str = "max_tokens"
    batch_size: int = EMBEDDING_ROWS
    concurrency: int | None = 64
    timeout: float = 600.0
    retries: int = 6
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    api_key_env: str | None = None

    devices = ("cpu",)
    streams = True
    batch_format = "pyarrow"

    @property
    def name(self) -> str:
        """Such as "OpenAI(llama-3)"."""
        return f"OpenAI({self.model})"

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Raises PlanError. Asks the server nothing."""
        require("openai", self.name)
        check_choice(self.name, "kind", self.kind, tuple(_PATHS))
        if self.messages is not None and (self.kind != "chat" or self.prompt is not None):
            raise PlanError(f'{self.name}: messages are for kind="chat", instead of prompt', hint="give one of the two")
        if self.prompt is None and self.messages is None and len(inputs) > 1:
            raise PlanError(f"{self.name} has {len(inputs)} input columns and no prompt", hint='give prompt="... {column} ..."')
        names = tuple(schema.names) if schema is not None and not inputs else inputs
        for missing in sorted(self._fields() - set(names)) if names else ():
            raise PlanError(f"{self.name}: the prompt uses {{{missing}}}, which is no input", hint="name it in input=[...]")
        if self.batch_size < 1:
            raise PlanError(f"{self.name}: batch_size is {self.batch_size!r}", hint="use a number of at least 1")
        self._settings().check(self.name)

    def meaning(self) -> Mapping[str, Any]:
        """The model, its parameters and the prompt; the url without credentials. Not how fast or with whose key it is asked."""
        body = self._parameters()
        prompt = {"prompt": self.prompt, "messages": self.messages, "system": self.system}
        return {"url": shown(self.base_url), "kind": self.kind, **prompt, **body}

    def load(self, place: Place) -> Any:
        return _Embeddings(self, place.inputs) if self.kind == "embedding" else _Generation(self, place.inputs)

    def _settings(self) -> Settings:
        return Settings(
            self.base_url,
            self.headers,
            self.api_key_env,
            concurrency=self.concurrency,
            timeout_s=self.timeout,
            retries=self.retries,
        )

    def _url(self) -> str:
        parts = urlsplit(self.base_url)
        path = f"{parts.path.rstrip('/')}/{_PATHS[self.kind]}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def _parameters(self) -> dict[str, Any]:
        """The body but for the row."""
        formats = self.response_format
        if self.schema is not None:
            formats = {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.schema, "strict": True}}
        said = {
            "model": self.model,
            self.max_tokens_name: self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": self.seed,
            "response_format": formats,
            "dimensions": self.dimensions,
        }
        return {name: value for name, value in said.items() if value is not None} | dict(self.extra)

    def _fields(self) -> set[str]:
        """Columns that templates name."""
        texts = [self.prompt] if isinstance(self.prompt, str) else []
        if self.messages is not None and not callable(self.messages):
            texts += [m["content"] for m in self.messages if isinstance(m.get("content"), str)]
        return template_fields(texts)


class _Stream(RequestStream):
    def __init__(self, adapter: OpenAI, inputs: tuple[str, ...], batch_rows: int) -> None:
        super().__init__(adapter.name, adapter._settings(), batch_rows)  # pyright: ignore[reportPrivateUsage]
        self._adapter = adapter
        self._inputs = inputs
        self._url = adapter._url()  # pyright: ignore[reportPrivateUsage]
        self._parameters = adapter._parameters()  # pyright: ignore[reportPrivateUsage]

    def passing(self, body: bytes) -> bool:
        """JSON that was cut off, and what gateways say of a server behind them that is overloaded or gone."""
        try:
            found = json.loads(body)
        except ValueError:
            return body.lstrip()[:1] in (b"{", b"")
        error = found.get("error") if isinstance(found, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return isinstance(code, int) and (code == 429 or code >= 500)

    def prompt(self, row: Row) -> str:
        return render(self._adapter.prompt, row)


class _Generation(_Stream):
    def __init__(self, adapter: OpenAI, inputs: tuple[str, ...]) -> None:
        super().__init__(adapter, inputs, 1)

    def request(self, rows: Sequence[Row]) -> tuple[str, str, bytes]:
        (row,) = rows
        asked: dict[str, Any] = (
            {"messages": messages_of(self._adapter, row)} if self._adapter.kind == "chat" else {"prompt": self.prompt(row)}
        )
        return self._url, "application/json", to_json({**self._parameters, **asked})

    def answers(self, content_type: str, body: bytes, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        found = _parsed(body, self.name)
        choices = found.get("choices")
        if not choices:
            said = self.refusal(200, body)
            raise DataError(f"{self.name} answered without choices: {said}", hint="is this an OpenAI-compatible server?")
        choice = choices[0]
        if self._adapter.kind == "chat":
            message = choice.get("message") or {}
            text = message.get("content")
            if text is None and message.get("refusal"):
                return [DataError(f"{self.name} refused: {message['refusal']}", hint="look at the row")]
        else:
            text = choice.get("text")
        usage = found.get("usage") or {}
        counts = (choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens"))
        if counts[0] == "content_filter" and not text:
            return [DataError(f"{self.name}: the answer was withheld by a content filter", hint="look at the row")]
        return [columns_of(text, counts, self.outputs, self._adapter.schema is not None, self.name)]


class _Embeddings(_Stream):
    def __init__(self, adapter: OpenAI, inputs: tuple[str, ...]) -> None:
        super().__init__(adapter, inputs, adapter.batch_size)

    def request(self, rows: Sequence[Row]) -> tuple[str, str, bytes]:
        texts = [self.prompt(row) for row in rows]
        body = {"encoding_format": "float", **self._parameters, "input": texts}
        return self._url, "application/json", to_json(body)

    def answers(self, content_type: str, body: bytes, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        found = _parsed(body, self.name).get("data") or []
        name = self.outputs[0] if self.outputs else "embedding"
        vectors: dict[int, np.ndarray] = {}
        for i, item in enumerate(found):
            vectors[int(item.get("index", i))] = _vector(item["embedding"])
        if sorted(vectors) != list(range(len(rows))):
            raise DataError(f"{self.name} gave {len(vectors)} embeddings for {len(rows)} inputs", hint="try batch_size=1")
        return [{name: vectors[i]} for i in range(len(rows))]


def _vector(value: Any) -> np.ndarray:
    if isinstance(value, str):  # encoding_format="base64": little-endian float32
        return np.frombuffer(base64.b64decode(value), dtype="<f4")
    return np.asarray(value, dtype=np.float32)


def _parsed(body: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        raise DataError(f"{name} answered what is no JSON: {body[:100]!r}", hint="is the url right?") from None
    if not isinstance(found, dict):
        raise DataError(f"{name} answered a {type(found).__name__}", hint="is this an OpenAI-compatible server?")
    return cast(dict[str, Any], found)


# --- prompts and columns: those of engines in the worker are the same ------------------------------------------------


def template_fields(texts: Sequence[str]) -> set[str]:
    """The columns that templates name."""
    fields = {name for text in texts for _, name, _, _ in Formatter().parse(text) if name is not None}
    return {name.partition(".")[0].partition("[")[0] for name in fields}


def render(prompt: str | Callable[[Row], str] | None, row: Row) -> str:
    """The prompt of a row."""
    if prompt is None:
        (value,) = row.values()
        made: Any = value
    else:
        made = prompt(row) if callable(prompt) else fill(prompt, row)
    if not isinstance(made, str):
        raise DataError(f"the prompt of a row is {type(made).__name__}, not text", hint="fill nulls, or cast to str")
    return made


def fill(template: str, row: Row) -> str:
    """The template with the row's values. Raises DataError for a null, which would read "None"."""
    for name in sorted(template_fields([template])):
        if name in row and row[name] is None:
            raise DataError(f"column {name!r} of the prompt is null in this row", hint="fill nulls, or filter such rows")
    return template.format_map(row)


def messages_of(adapter: Any, row: Row) -> list[Mapping[str, Any]]:
    """The messages of a row. adapter: has `messages`, `prompt` and `system`."""
    before: list[Mapping[str, Any]] = [{"role": "system", "content": adapter.system}] if adapter.system is not None else []
    if adapter.messages is None:
        return [*before, {"role": "user", "content": render(adapter.prompt, row)}]
    if callable(adapter.messages):
        made: Any = adapter.messages(row)
        return [*before, *made]
    filled: Any = (
        {**m, "content": fill(m["content"], row)} if isinstance(m.get("content"), str) else m for m in adapter.messages
    )
    return [*before, *filled]


def columns_of(text: Any, counts: Sequence[Any], outputs: Sequence[str], parsed: bool, name: str) -> Row:
    """The columns of an answer. counts: values of COUNTS. parsed: the text is a JSON object whose keys are columns."""
    row: Row = {n: value for n, value in zip(COUNTS, counts, strict=True) if n in outputs or not outputs}
    if not parsed:
        return {next((n for n in outputs if n not in COUNTS), "answer"): text, **row}
    try:
        values = json.loads(text)
    except (TypeError, ValueError):
        raise DataError(f"{name} answered what is no JSON: {str(text)[:100]!r}", hint="was it cut off by max_tokens?") from None
    if not isinstance(values, dict):
        raise DataError(f"{name} answered a {type(values).__name__}, not an object", hint="make the schema an object")
    return {**cast(dict[str, Any], values), **row}
