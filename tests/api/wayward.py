"""A real HTTP server that misbehaves on purpose, one scripted act per request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct, field

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]
DONE = b"data: [DONE]\n\n"


class Seen(Struct):
    """One request as the server saw it; `left` is set if its client hung up on it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    connection: object
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Wayward:
    """Performs `acts` in order, one per request; a request too many is a 418."""

    def __init__(self) -> None:
        self.url = ""
        self.loop = asyncio.get_running_loop()
        self.acts: deque[Act] = deque()
        self.seen: list[Seen] = []
        self.arrived: asyncio.Queue[Seen] = asyncio.Queue()

    def does(self, *acts: Act) -> None:
        self.acts.extend(acts)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        said = msgspec.json.decode(body) if body else None
        seen = Seen(request.method, request.path, request.headers, said, request.transport)
        self.seen.append(seen)
        self.arrived.put_nowait(seen)
        act = self.acts.popleft() if self.acts else status(418)
        try:
            return await act(request)
        except asyncio.CancelledError:
            seen.left.set()
            raise


@contextlib.asynccontextmanager
async def wayward() -> AsyncIterator[Wayward]:
    """A server on a free port; afterwards every act has been performed."""
    server = Wayward()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
        assert not server.acts, "acts that nobody asked for"
    finally:
        await runner.cleanup()


def say(body: object, status: int = 200, **headers: str) -> Act:
    """Answer with JSON; `Retry_After` becomes `Retry-After`."""

    async def act(request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response(body, status=status, headers=named)

    return act


def status(number: int, text: str = "", **headers: str) -> Act:
    """Answer with text, as a proxy would."""

    async def act(request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=number, text=text, headers=named)

    return act


def refuse(number: int, message: str, kind: str, param: str | None = None, **headers: str) -> Act:
    """Answer with an error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": param, "code": number}
    return say({"error": error}, number, **headers)


async def reset(request: web.Request) -> web.StreamResponse:
    """Break the connection without a word."""
    _abort(request)
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def hang(request: web.Request) -> web.StreamResponse:
    """Say nothing, for ever."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def half(request: web.Request) -> web.StreamResponse:
    """Break the connection in the middle of a whole answer."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices":')
    _abort(request)
    return response


def stream(*pieces: bytes | asyncio.Event | None, content_type: str = "text/event-stream") -> Act:
    """Write the pieces, wait at events, break the connection at None."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for piece in pieces:
            if piece is None:
                _abort(request)
                await asyncio.Event().wait()
            elif isinstance(piece, bytes):
                await response.write(piece)
            else:
                await piece.wait()
        await response.write_eof()
        return response

    return act


def event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def piece(text: str, index: int = 0, **fields: Any) -> bytes:
    """One chunk of a completion."""
    return event(id="c", model="m", choices=[{"index": index, "text": text, **fields}])


def usage(tokens: int) -> bytes:
    said = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
    return event(id="c", model="m", choices=[], usage=said)


def _abort(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
