"""A canned server on a loopback socket, with a client; leaked streams fail the test that leaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import pytest

from tests.api.canned import CannedService, write_model_dir
from tests.api.parsed import Speaker, write_marked_model_dir
from tinfer.api.connection import connections
from tinfer.api.limits import KEEP_ALIVE_S
from tinfer.api.options import ApiOptions
from tinfer.api.parsing import Parsers
from tinfer.api.render import Renderer
from tinfer.api.server import create_app, create_runner
from tinfer.api.service import ModelCard

OPTIONS = ApiOptions(version="1.2.3", system_fingerprint="fp")


class Server:
    """The canned service behind the real application, and how to talk to it."""

    def __init__(self, url: str, service: CannedService, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.service = service
        self.session = session

    async def post(self, path: str, **body: Any) -> tuple[int, Any, Any]:
        """Status, JSON body and headers."""
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json(), response.headers

    async def raw(self, head: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own on which these bytes were sent."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode("latin-1"))
        await writer.drain()
        return reader, writer

    async def complete(self, **body: Any) -> Any:
        status, said, _ = await self.post("/v1/completions", **{"prompt": "ab", **body})
        assert status == 200, said
        return said

    async def chat(self, **body: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
        status, said, _ = await self.post("/v1/chat/completions", **body)
        assert status == 200, said
        return said

    async def stream(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream; the end mark is checked and left out."""
        async with self.session.post(self.url + path, json={"stream": True, **body}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            text = (await response.read()).decode()
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [msgspec.json.decode(event.removeprefix("data: ")) for event in events[:-2]]

    async def refused(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and error object of a request that must fail without reaching the service."""
        status, said, _ = await self.post(path, **body)
        assert said.keys() == {"error"}
        assert said["error"].keys() == {"message", "type", "param", "code"}
        assert said["error"]["code"] == status
        return status, said["error"]


async def send(
    server: Server,
    path: str,
    body: dict[str, Any],
    version: str = "HTTP/1.1",
    extra: bytes = b"",
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """POST on a connection of its own, for tests of what happens to it; `extra`: more headers."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = msgspec.json.encode(body)
    head = f"POST {path} {version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + extra + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    await writer.drain()
    return reader, writer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(request: pytest.FixtureRequest) -> ApiOptions:
    """`OPTIONS`, changed by the fields of an `indirect` parameter."""
    return msgspec.structs.replace(OPTIONS, **getattr(request, "param", {}))


@pytest.fixture
async def server(model_dir: Path, options: ApiOptions) -> AsyncIterator[Server]:
    async with canned_server(model_dir, options) as server:
        yield server


@contextlib.asynccontextmanager
async def canned_server(
    model_dir: Path, options: ApiOptions, parsers: Parsers | None = None
) -> AsyncIterator[Server]:
    """A server for as long as the block; it has released every stream at its end."""
    service = CannedService()
    renderer = await Renderer.load(model_dir)
    app = create_app(service, renderer, options, parsers)
    runner = create_runner(app, shutdown_timeout_s=1.0)
    await runner.setup()
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(connections(runner, KEEP_ALIVE_S), "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(f"http://{host}:{port}", service, session)
    finally:
        listening.close()
        await runner.cleanup()
    assert service.all_released()


class Serve(Protocol):
    def __call__(
        self, tool_call: str | None = "hermes", reasoning: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Server]: ...


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return Speaker(write_marked_model_dir(tmp_path_factory.mktemp("marked")))


@pytest.fixture
def serve(speaker: Speaker) -> Serve:
    """Servers with parsers, whose model has a token for every mark."""

    @contextlib.asynccontextmanager
    async def serving(
        tool_call: str | None = "hermes", reasoning: str | None = None, **options: Any
    ) -> AsyncIterator[Server]:
        parsers = await speaker.parsers(tool_call, reasoning)
        chosen = msgspec.structs.replace(OPTIONS, **options)
        async with canned_server(speaker.model_dir, chosen, parsers) as server:
            server.service.model = ModelCard(("tiny",), "/models/tiny", 1000, 300, 7)
            yield server

    return serving
