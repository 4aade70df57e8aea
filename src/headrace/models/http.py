"""What adapters of models behind HTTP share: connections, keys, retries, errors.

What a request looks like and what its answer says is a subclass's. Here is no format and no vendor.

Invariants: a request that is tried again is the same request; no secret (headers, keys, user and query of the url) is in any
error.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from headrace.core.errors import DataError, PlanError, TransientError
from headrace.core.redact import HIDDEN, redact
from headrace.models.in_flight import InFlight, Row

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
THROTTLED = frozenset({429, 529})  # the server asks for fewer requests: no fault of the row's
CONFIGURATION = frozenset({401, 403, 404, 405, 407, 410})  # no row will fare better
MOST_THROTTLED = 30  # answers of THROTTLED to one request: with BACKOFF_MOST_S about ten minutes
BACKOFF_S, BACKOFF_MOST_S = 0.25, 30.0  # of "full jitter": aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
RETRY_AFTER_MOST_S = 300.0
TEXT_CHARS = 300  # of a server's own words in an error


class Rejected(Exception):
    """The server will not answer these rows, whatever is tried."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is spoken to.

    concurrency: requests under way; None: found out. retries: further attempts at a request whose failure may pass. timeout_s:
    of one attempt. api_key_env: an environment variable, read where the model runs; its value goes, after `scheme`, into
    `api_key_header`.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    api_key_env: str | None = None
    api_key_header: str = "Authorization"
    scheme: str = "Bearer"
    concurrency: int | None = None
    timeout_s: float = 60.0
    retries: int = 6

    def check(self, name: str) -> None:
        """Raises PlanError for what can't work."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PlanError(f"{name}: {shown(self.url)!r} is no url", hint='such as "http://localhost:8000/v1"')
        checks = (("concurrency", self.concurrency or 1, 1), ("timeout", self.timeout_s, 1e-3), ("retries", self.retries, 0))
        for what, value, least in checks:
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise PlanError(f"{name}: {what} is {value!r}", hint=f"use a number of at least {least:g}")
        self.key(name)

    def key(self, name: str) -> str:
        """The api key, "" for none. Raises PlanError when the variable is not set."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "")
        if not key:
            hint = "set it where the run starts: workers inherit it"
            raise PlanError(f"{name}: the environment variable {self.api_key_env} is not set", hint=hint)
        return key


def shown(url: str) -> str:
    """A url without user, password and secrets in its query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return redact(urlunsplit((parts.scheme, host, parts.path, parts.query, "")))


def retry_after_s(value: str | None, now_s: float | None = None) -> float:
    """What a Retry-After header asks for (RFC 9110, 10.2.3): seconds or a date. 0.0 for none."""
    if not value:
        return 0.0
    try:
        asked = float(value)
    except ValueError:
        try:
            asked = parsedate_to_datetime(value).timestamp() - (time.time() if now_s is None else now_s)
        except (TypeError, ValueError):
            return 0.0
    return min(RETRY_AFTER_MOST_S, max(0.0, asked)) if asked == asked else 0.0


def backoff_s(attempt: int, least_s: float = 0.0) -> float:
    """How long to wait before attempt `attempt` (1 for the second). Full jitter, on top of what the server asks for."""
    return least_s + random.uniform(0.0, min(BACKOFF_MOST_S, BACKOFF_S * 2 ** (attempt - 1)))


class RequestStream(InFlight):
    """A StreamModel of requests. Subclasses say what a request is (`request`) and what the answer holds (`answers`)."""

    def __init__(self, name: str, settings: Settings, batch_rows: int | None = 1) -> None:
        super().__init__(settings.concurrency, batch_rows)
        self.name = name
        self.settings = settings
        self._key = settings.key(name)
        self._session: Any = None

    # --- a subclass's ------------------------------------------------------------------------------------------------

    def request(self, rows: Sequence[Row]) -> tuple[str, str, bytes]:
        """(url, content type, body) that asks for these rows. What it raises fails them."""
        raise NotImplementedError

    def answers(self, content_type: str, body: bytes, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        """The columns of each row. What it raises fails all of them."""
        raise NotImplementedError

    def passing(self, body: bytes) -> bool:
        """Is an answer, which the server says is fine, one of trouble that passes? It is asked for again."""
        return False

    async def aclose(self) -> None:
        """Close connections. In the loop that `stream` ran in."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
            await asyncio.sleep(0)  # transports close in the next turn of the loop

    # --- requests ----------------------------------------------------------------------------------------------------

    async def ask(self, rows: Sequence[Row]) -> Sequence[Row | Exception]:
        """The answers to these rows; of a request that is refused, those to its halves. Called with a place, and keeps it."""
        try:
            url, content_type, body = self.request(rows)
            began = time.perf_counter()
            kind, answer = await self._post(url, content_type, body, len(rows))
            self.batch.answered(len(rows), time.perf_counter() - began)
            found = self.answers(kind, answer, rows)
            if len(found) != len(rows):
                raise DataError(f"{self.name} gave {len(found)} answers to {len(rows)} rows", hint="it must answer every row")
            return found
        except (TransientError, PlanError):
            raise
        except Exception as exc:
            if len(rows) == 1:
                return [exc]
            if isinstance(exc, DataError):
                return [exc] * len(rows)  # the answer makes no sense, and half of it would not
            if isinstance(exc, Rejected):
                self.batch.refused(len(rows))
        half = len(rows) // 2
        return [*await self.ask(rows[:half]), *await self.ask(rows[half:])]

    async def _post(self, url: str, content_type: str, body: bytes, rows: int) -> tuple[str, bytes]:
        """(content type, body) of the answer. Raises Rejected, TransientError when the server is not there, and PlanError for
        what would fail for all rows.
        """
        import aiohttp

        failures = throttled = 0
        while True:
            try:
                status, headers, answer = await self._try(url, content_type, body)
            except TimeoutError:
                why, wait_s, gone = f"no answer for {self.settings.timeout_s:g} s", 0.0, False
            except aiohttp.ClientConnectorError as exc:
                why, wait_s, gone = self.clean(f"can't connect: {exc}"), 0.0, True
            except aiohttp.ClientError as exc:
                why, wait_s, gone = self.clean(f"the connection broke: {type(exc).__name__}: {exc}"), 0.0, False
            except OSError as exc:
                why, wait_s, gone = self.clean(f"the connection broke: {exc}"), 0.0, False
            else:
                fine = 200 <= status < 300
                if fine and not self.passing(answer):
                    self.concurrency.answered(rows)
                    return headers.get("Content-Type", ""), answer
                why = self.refusal(status, answer)
                if status in CONFIGURATION:
                    hint = (
                        "check the key, its rights, and the url" if status in (401, 403, 407) else "check the url and the model"
                    )
                    raise PlanError(f"{self.name}: {shown(url)} answered {why}", hint=hint)
                if status not in RETRY_STATUS and not fine:
                    raise Rejected(f"{self.name} answered {why}")
                wait_s, gone = retry_after_s(headers.get("Retry-After")), status in THROTTLED
                if status in THROTTLED:
                    self.concurrency.throttled()
                    throttled += 1
                    if throttled <= MOST_THROTTLED:
                        await asyncio.sleep(backoff_s(min(throttled, 8), wait_s))
                        continue
                    failures = self.settings.retries
            failures += 1
            if failures > self.settings.retries:
                text = f"{self.name}: {shown(url)}: {why} ({failures} attempts)"
                raise TransientError(text, hint="is the server up, and large enough?") if gone else Rejected(text)
            await asyncio.sleep(backoff_s(failures, wait_s))

    async def _try(self, url: str, content_type: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        async with self._connections().post(_bare(url), data=body, headers={"Content-Type": content_type}) as response:
            return response.status, response.headers, await response.read()

    def _connections(self) -> Any:
        if self._session is None:
            import aiohttp

            headers = {**_user_header(self.settings.url), **self.settings.headers}
            if self._key:
                scheme = f"{self.settings.scheme} " if self.settings.scheme else ""
                headers[self.settings.api_key_header] = scheme + self._key
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s),
                connector=aiohttp.TCPConnector(limit=0),  # the limit is ours
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    # --- words -------------------------------------------------------------------------------------------------------

    def refusal(self, status: int, body: bytes) -> str:
        """The status, and what the server says."""
        text = body[:4096].decode("utf-8", "replace")
        try:
            said = json.loads(text)
            error = said.get("error", said) if isinstance(said, dict) else said
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except ValueError:
            pass
        text = " ".join(text.split())
        return self.clean(f"HTTP {status}" + (f": {text[:TEXT_CHARS]}" if text else ""))

    def clean(self, text: str) -> str:
        """The text without the secrets in force, which a server may repeat."""
        user = urlsplit(self.settings.url)
        for secret in (self._key, *self.settings.headers.values(), user.password, user.username):
            for part in (secret, *secret.split()[1:]) if secret else ():
                if len(part) >= 4:
                    text = text.replace(part, HIDDEN)
        return redact(text)


def _bare(url: str) -> str:
    """The url without user and password, which go into a header."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))


def _user_header(url: str) -> dict[str, str]:
    """User and password of the url, by RFC 7617."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def to_json(value: Any) -> bytes:
    """JSON of rows: arrays as lists, bytes as base64, dates in ISO 8601. Not a number and infinity have no JSON: null."""
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
