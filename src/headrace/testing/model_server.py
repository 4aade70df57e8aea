"""A model server of one's own for tests: answers what the test says, and remembers who asked what, and how many at once.

Counters instead of clocks: a request can be held until so many others have come (`ModelServer.hold`), so that a client that
waits for it before it goes on never gets an answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. number: how many came before it. active: requests under way, itself among them."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: bytes
    active: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Reply:
    """body: bytes as they are, anything else as JSON. reset: the connection is cut instead."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    reset: bool = False


RESET = Reply(reset=True)


class ModelServer:
    """A context manager: a server on this machine, in a thread of its own. answer: what to reply, in the server's event loop.

    asked: all requests, in the order in which they came. most_active: the most that were under way at once.
    """

    def __init__(self, answer: Callable[[ModelServer, Asked], Awaitable[Reply]]) -> None:
        self.asked: list[Asked] = []
        self.most_active = 0
        self.active = 0
        self.url = ""
        self._answer = answer
        self._news: asyncio.Condition | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._main, name="model-server", daemon=True)

    async def hold(self, asked: Asked, later: int) -> None:
        """Until `later` requests have come after this one."""
        assert self._news is not None
        async with self._news:
            await self._news.wait_for(lambda: len(self.asked) > asked.number + later)

    def __enter__(self) -> ModelServer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        from aiohttp import web

        self._news, self._stop = asyncio.Condition(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("POST", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: Any) -> Any:
        from aiohttp import web

        assert self._news is not None
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            body = await request.read()
            asked = Asked(len(self.asked), request.path, dict(request.headers), body, self.active)
            async with self._news:
                self.asked.append(asked)
                self._news.notify_all()
            reply = await self._answer(self, asked)
        finally:
            self.active -= 1
        if reply.reset:
            request.transport.abort()
            return web.Response()
        if isinstance(reply.body, bytes):
            return web.Response(body=reply.body, status=reply.status, headers=reply.headers)
        return web.json_response(reply.body, status=reply.status, headers=reply.headers)
