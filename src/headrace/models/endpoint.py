"""A model behind HTTP: SageMaker, BentoML, Ray Serve, TensorFlow Serving, KServe, or any server of one's own.

    hr.models.Endpoint("http://localhost:8501/v1/models/price:predict", payload="tf_serving")

Here are the formats of requests and answers; how requests are kept in flight and tried again is `http.py`'s.

Invariant: row i of an answer belongs to row i of its request.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import numpy as np

from headrace.contracts.model import Place
from headrace.core.errors import DataError, PlanError
from headrace.core.extras import require
from headrace.models.base import check_choice
from headrace.models.http import RequestStream, Row, Settings, plain, shown, to_json

if TYPE_CHECKING:
    import pyarrow as pa

Payload = Literal["instances", "records", "columns", "tf_serving", "kserve_v2", "jsonlines", "csv"]
_PAYLOADS = ("instances", "records", "columns", "tf_serving", "kserve_v2", "jsonlines", "csv")
_WRAPPERS = ("predictions", "outputs", "instances", "results", "result", "data")  # what servers call the list of answers
_JSON = "application/json"
_V2_TYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_V2_DTYPES = {v2: name for name, v2 in _V2_TYPES.items()}


@dataclass(frozen=True)
class Endpoint:
    """A model behind a url that is sent POST requests of rows.

    payload: "instances" and "tf_serving" {"instances": [...]}; "records" a list of objects (with batch_size=1 the object
    itself); "columns" an object of lists; "kserve_v2" {"inputs": [tensor, ...]}, a tensor per column of shape (rows, ...), of
    scalars (rows, 1); "jsonlines" a value a line; "csv" a line a row, without a header; or a function of a list of rows that
    returns a body (bytes, str, or what JSON can hold). Where there is one input column, "instances", "tf_serving" and
    "jsonlines" send its bare values.
    parse: a function (answer, rows) -> a value or a dict of columns for each row; answer: what the body's JSON holds, or its
    text. By default lists under the usual names are found by themselves, tensors of "kserve_v2" keep type and shape.
    parameters: more fields for a body that is a JSON object, such as {"signature_name": "serving_default"}; of "columns",
    {"columns_key": "inputs"} puts the lists under that key.
    batch_size: rows a request, or "auto", which finds out. concurrency: requests under way, or None, which finds out: it
    grows while that brings more rows a second, and halves when the server answers 429.
    timeout: seconds for one attempt. retries: after 5xx, resets and timeouts; 429 is waited out as long as it takes, up to 30
    times. Waits grow with full jitter and honour Retry-After.
    headers: sent as they are. api_key_env: the name of an environment variable, read in the worker, whose value is sent as
    "Bearer <value>" in api_key_header. Neither is ever shown or kept.

    A row whose request is refused (4xx, or 5xx to the end) fails alone: of a request of several, halves are asked for. 401, 403
    and 404 end the run, as does a server that is not there.
    """

    url: str = field(repr=False)
    payload: Payload | Callable[[list[Row]], Any] = "instances"
    batch_size: int | Literal["auto"] = "auto"
    concurrency: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    api_key_env: str | None = None
    api_key_header: str = "Authorization"
    timeout: float = 60.0
    retries: int = 6
    parse: Callable[[Any, list[Row]], Sequence[Any]] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])

    devices = ("cpu",)
    streams = True
    batch_format = "pyarrow"

    @property
    def name(self) -> str:
        """Such as "Endpoint(localhost:8501)"."""
        parts = urlsplit(self.url)
        return f"Endpoint({parts.netloc.rpartition('@')[2] or shown(self.url)})"

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Raises PlanError. Asks the server nothing."""
        require("endpoint", self.name)
        if not callable(self.payload):
            check_choice(self.name, "payload", self.payload, _PAYLOADS)
        size = self.batch_size
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise PlanError(f"{self.name}: batch_size is {size!r}", hint='use a number of at least 1, or "auto"')
        self._settings().check(self.name)

    def meaning(self) -> Mapping[str, Any]:
        """The url without credentials, and the formats; not how fast or with whose key it is asked."""
        return {"url": shown(self.url), "payload": self.payload, "parse": self.parse, "parameters": dict(self.parameters)}

    def load(self, place: Place) -> Any:
        return _EndpointStream(self, self._settings())

    def _settings(self) -> Settings:
        scheme = "Bearer" if self.api_key_header.lower() == "authorization" else ""
        return Settings(
            self.url,
            self.headers,
            self.api_key_env,
            self.api_key_header,
            scheme,
            self.concurrency,
            self.timeout,
            self.retries,
        )


class _EndpointStream(RequestStream):
    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        super().__init__(endpoint.name, settings, None if endpoint.batch_size == "auto" else endpoint.batch_size)
        self._endpoint = endpoint

    def request(self, rows: Sequence[Row]) -> tuple[str, str, bytes]:
        content_type, body = encode(self._endpoint, list(rows))
        return self.settings.url, content_type, body

    def answers(self, content_type: str, body: bytes, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        found = decode(self._endpoint, content_type, body, list(rows), self.name)
        return [value if isinstance(value, Exception) else named(value, self.outputs) for value in found]


# --- requests --------------------------------------------------------------------------------------------------------


def encode(endpoint: Endpoint, rows: list[Row]) -> tuple[str, bytes]:
    """(content type, body) of a request for these rows."""
    payload = endpoint.payload
    if callable(payload):
        made = payload(rows)
        if isinstance(made, bytes):
            return "application/octet-stream", made
        return ("text/plain; charset=utf-8", made.encode()) if isinstance(made, str) else (_JSON, to_json(made))
    extra = dict(endpoint.parameters)
    match payload:
        case "instances" | "tf_serving":
            return _JSON, to_json({**extra, "instances": [_bare(row) for row in rows]})
        case "records":
            return _JSON, to_json(rows[0] if endpoint.batch_size == 1 else rows)
        case "columns":
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            key = extra.pop("columns_key", None)  # such as "inputs" of TensorFlow Serving's column format
            return _JSON, to_json({**extra, key: columns} if key else {**extra, **columns})
        case "kserve_v2":
            return _JSON, to_json({**extra, "inputs": [_tensor(name, [row[name] for row in rows]) for name in rows[0]]})
        case "jsonlines":
            return "application/jsonlines", b"\n".join(to_json(_bare(row)) for row in rows) + b"\n"
        case "csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([_flat(row) for row in rows])
            return "text/csv", text.getvalue().encode()


def _bare(row: Row) -> Any:
    return next(iter(row.values())) if len(row) == 1 else row


def _flat(row: Row) -> list[Any]:
    out: list[Any] = []
    for value in row.values():
        value = plain(value)
        out += np.asarray(value).ravel().tolist() if isinstance(value, list) else ["" if value is None else value]
    return out


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    """A column as a tensor of the Open Inference Protocol (KServe's "v2")."""
    if any(isinstance(v, str | bytes) for v in values):
        return {"name": name, "shape": [len(values), 1], "datatype": "BYTES", "data": values}
    if any(v is None for v in values):
        raise DataError(f"the column {name!r} is null, and a tensor has no nulls", hint="filter or fill them before")
    try:
        array = np.stack([np.asarray(v) for v in values])
        datatype = _V2_TYPES[array.dtype.name]
    except (ValueError, KeyError):
        raise DataError(f"the column {name!r} is no tensor", hint="its rows must be numbers, of one shape") from None
    shape = array.shape if array.ndim > 1 else (*array.shape, 1)
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": array.ravel()}


# --- answers ---------------------------------------------------------------------------------------------------------


def decode(endpoint: Endpoint, content_type: str, body: bytes, rows: list[Row], name: str) -> Sequence[Any]:
    """A value, or a dict of columns, for each row. Raises DataError for a body that makes no sense."""
    text = body.decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    many = len(lines) == len(rows) > 1
    try:
        found = [json.loads(line) for line in lines] if many and _is_json_lines(content_type, lines) else json.loads(text)
    except ValueError:
        if endpoint.parse is None and "csv" not in content_type and endpoint.payload != "csv":
            raise DataError(
                f"{name} answered what is no JSON: {text[:100]!r}", hint="give parse= for a format of its own"
            ) from None
        found = text if endpoint.parse is not None else _from_csv(lines, len(rows))
    if endpoint.parse is not None:
        return list(endpoint.parse(found, rows))
    if endpoint.payload == "kserve_v2":
        return _from_tensors(found, len(rows), name)
    single = endpoint.payload == "records" and endpoint.batch_size == 1
    return [_single(found)] if single else _unwrapped(found, len(rows), name)


def _is_json_lines(content_type: str, lines: Sequence[str]) -> bool:
    return "jsonlines" in content_type or "ndjson" in content_type or not lines[0].lstrip().startswith(("[\n", "{\n"))


def _from_csv(lines: Sequence[str], rows: int) -> list[Any]:
    table = [[_number(cell) for cell in line] for line in csv.reader(lines)]
    if len(table) == 1 and rows > 1:  # all on one line
        return list(table[0])
    return [line[0] if len(line) == 1 else line for line in table]


def _number(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def _single(found: Any) -> Any:
    values = _unwrapped(found, 1, "", lenient=True)
    return values[0] if len(values) == 1 else found


def _unwrapped(found: Any, rows: int, name: str, *, lenient: bool = False) -> list[Any]:
    """The list of answers in a body: bare, under a usual name, or as columns."""
    if isinstance(found, dict):
        answer = cast(dict[str, Any], found)
        for key in _WRAPPERS:
            inner = answer.get(key)
            if isinstance(inner, list):
                return cast(list[Any], inner)
            if isinstance(inner, dict):
                answer = cast(dict[str, Any], inner)
                break
        if answer and all(isinstance(v, list) and len(cast(list[Any], v)) == rows for v in answer.values()):
            return [dict(zip(answer, values, strict=True)) for values in zip(*answer.values(), strict=True)]
        if rows == 1:
            return [answer]
    elif isinstance(found, list):
        return cast(list[Any], found)
    elif rows == 1:
        return [found]
    if lenient:
        return []
    raise DataError(f"{name} answered a {type(found).__name__} without a list of answers", hint="give parse= to find them")


def _from_tensors(found: Any, rows: int, name: str) -> list[Row]:
    columns: dict[str, list[Any]] = {}
    for tensor in found.get("outputs", ()) if isinstance(found, dict) else ():
        shape = tuple(int(n) for n in tensor["shape"])
        if not shape or shape[0] != rows:
            raise DataError(f"{name} answered {rows} rows with a tensor of shape {shape}", hint="its first axis must be rows")
        dtype = _V2_DTYPES.get(tensor["datatype"])
        array = np.asarray(tensor["data"], dtype=object if dtype is None else dtype).reshape(shape)
        if len(shape) == 2 and shape[1] == 1:
            array = array[:, 0]
        if dtype is None:
            columns[tensor["name"]] = array.tolist()
        else:
            columns[tensor["name"]] = list(array) if array.ndim > 1 else array.tolist() if dtype == "bool" else list(array)
    if not columns:
        raise DataError(f"{name} answered without outputs", hint="is this a server of the Open Inference Protocol?")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def named(value: Any, outputs: Sequence[str]) -> Row:
    """A row's answer under the names of the output columns; () for the server's own, or "prediction"."""
    if isinstance(value, Mapping):
        row = dict(cast(Mapping[str, Any], value))
        if len(outputs) == 1 and len(row) == 1 and outputs[0] not in row:
            return {outputs[0]: next(iter(row.values()))}
        return row
    if len(outputs) > 1 and isinstance(value, list | tuple | np.ndarray) and len(cast(Sequence[Any], value)) == len(outputs):
        return dict(zip(outputs, cast(Sequence[Any], value), strict=True))
    return {outputs[0] if outputs else "prediction": value}
