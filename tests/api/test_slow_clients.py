"""Clients that send slowly, or nothing: closed in time, while answers take as long as they take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.canned import CannedService, say
from tests.api.conftest import OPTIONS, Server, send
from tinfer.api.connection import Connection, connections
from tinfer.api.render import Renderer
from tinfer.api.server import create_app, create_runner

SOON = {"body_timeout_s": 0.2}
KEEP_ALIVE_S = 0.2
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("options", [SOON], indirect=True)
@pytest.mark.parametrize("part", ["", '{"prompt":'])
async def test_a_body_that_does_not_come(server: Server, part: str) -> None:
    reader, writer = await server.raw(f"{HEAD}Content-Length: 100\r\n\r\n{part}")
    answer = await reader.readuntil(b"}}")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"RequestTimeoutError" in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("options", [SOON], indirect=True)
async def test_a_body_that_comes_byte_by_byte(server: Server) -> None:
    """Progress does not help: the deadline is that of the whole body."""
    reader, writer = await server.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n")
    answer = asyncio.create_task(reader.readline())
    while not answer.done():
        writer.write(b"1\r\n \r\n")
        await asyncio.wait({answer}, timeout=0.01)
    assert answer.result().startswith(b"HTTP/1.1 408 ")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("options", [{"max_arriving_bytes": 2000}], indirect=True)
@pytest.mark.parametrize("framing", ["Content-Length: 1500", "Transfer-Encoding: chunked"])
async def test_large_bodies_that_arrive_at_once(server: Server, framing: str) -> None:
    """The first has its place for as long as it takes, and it is free again afterwards."""
    reader, writer = await server.raw(f"{HEAD}{framing}\r\n\r\n")
    large = {"prompt": "a", "user": "x" * 900}
    while (status := (await server.post("/v1/completions", **large))[0]) == 200:
        continue  # the first head has not been read yet
    assert status == 429
    # What has no body gets through.
    async with server.session.get(server.url + "/v1/models") as response:
        assert response.status == 200
    writer.close()
    await writer.wait_closed()
    while (status := (await server.post("/v1/completions", **large))[0]) == 429:
        continue
    assert status == 200
    assert await reader.read() == b""


@pytest.mark.parametrize("options", [SOON], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_may_take_longer_than_a_body(server: Server, stream: bool) -> None:
    go_on = asyncio.Event()
    server.service.script = lambda index: [go_on, *say("Hello")]
    reader, writer = await send(
        server, "/v1/completions", {"prompt": "a", "stream": stream}, "HTTP/1.0"
    )
    await server.service.started(1)
    # Another client's body has its whole time meanwhile, so this one's is over.
    slow_reader, slow_writer = await server.raw(f"{HEAD}Content-Length: 100\r\n\r\n")
    assert (await slow_reader.readline()).startswith(b"HTTP/1.1 408 ")
    go_on.set()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.0 200 ") and b"Hello" in answer
    for one in (writer, slow_writer):
        one.close()
        await one.wait_closed()


class Impatient:
    """A server that waits only that long for the head of a request."""

    def __init__(self, url: str, service: CannedService, made: list[Connection]) -> None:
        self.server = Server(url, service, None)  # type: ignore[arg-type]
        self.made = made


@pytest.fixture
async def impatient(model_dir: Path) -> AsyncIterator[Impatient]:
    service = CannedService()
    runner = create_runner(create_app(service, await Renderer.load(model_dir), OPTIONS))
    await runner.setup()
    make, made = connections(runner, KEEP_ALIVE_S), list[Connection]()

    def connect() -> Connection:
        made.append(make())
        return made[-1]

    listening = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    yield Impatient(f"http://{host}:{port}", service, made)
    listening.close()
    await runner.cleanup()


@pytest.mark.parametrize("head", ["", "GET /hea", "GET /health HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_does_not_come(impatient: Impatient, head: str) -> None:
    reader, writer = await impatient.server.raw(head)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_a_head_that_comes_byte_by_byte(impatient: Impatient) -> None:
    reader, writer = await impatient.server.raw("GET /health HTTP/1.1\r\nHost: x\r\nX: ")
    end = asyncio.create_task(reader.read())
    while not end.done():
        writer.write(b"v")
        await asyncio.wait({end}, timeout=0.01)
    assert end.exception() is not None or end.result() == b""
    writer.close()


async def test_an_idle_connection_is_closed_after_its_answer(impatient: Impatient) -> None:
    reader, writer = await impatient.server.raw("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


async def test_an_answer_is_no_idle_time(impatient: Impatient) -> None:
    go_on = asyncio.Event()
    impatient.server.service.script = lambda index: [go_on, *say("Hello")]
    body = {"prompt": "a", "stream": True}
    reader, writer = await send(impatient.server, "/v1/completions", body, "HTTP/1.0")
    await impatient.server.service.started(1)
    other, other_writer = await impatient.server.raw("GET /hea")
    assert await other.read() == b""  # so this one's time is over, too
    go_on.set()
    assert b"Hello" in await reader.read()
    for one in (writer, other_writer):
        one.close()
        await one.wait_closed()
