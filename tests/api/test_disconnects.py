"""A client that leaves, on a real socket: every sequence it started is cancelled at once."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.api.conftest import Server, send
from tinfer.api.connection import connections
from tinfer.api.service import Delta

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "n": 4},
}


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("abort", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize(
    ("stream", "first"),
    [(False, []), (False, [Delta("a", [97])]), (True, []), (True, [Delta("a", [97])])],
    ids=["whole-waiting", "whole-begun", "stream-waiting", "stream-begun"],
)
async def test_leaving_cancels_everything(
    server: Server, path: str, stream: bool, first: list[Delta], abort: bool
) -> None:
    never = asyncio.Event()
    server.service.script = lambda index: [*first, never]
    reader, writer = await send(server, path, {**BODIES[path], "stream": stream})
    streams = await server.service.started(4)
    if stream and first:
        await reader.readuntil(b"data: ")
    if abort:
        writer.transport.abort()
    else:
        writer.close()
    await asyncio.gather(*(s.cancelled.wait() for s in streams))
    assert len(streams) == 4


async def test_leaving_a_single_sequence(server: Server) -> None:
    never = asyncio.Event()
    for stream in (False, True):
        server.service.script = lambda index: [Delta("a", [97]), never]
        _, writer = await send(server, "/v1/completions", {"prompt": "a", "stream": stream})
        (started,) = await server.service.started(1)
        writer.close()
        await started.cancelled.wait()
        assert not started.finished


async def test_a_client_that_does_not_read_holds_back_its_stream(server: Server) -> None:
    taken = 0

    class Endless(list[Any]):
        def __iter__(self) -> Any:
            nonlocal taken
            while True:
                taken += 1
                yield Delta("x" * 65536, [97])

    server.service.script = lambda index: Endless()
    _, writer = await send(server, "/v1/completions", {"prompt": "a", "stream": True})
    (only,) = await server.service.started(1)
    before = -1
    while before != taken:
        before = taken
        for _ in range(200):
            await asyncio.sleep(0)
    assert taken < 1000
    writer.transport.abort()
    await only.cancelled.wait()


async def test_a_client_that_leaves_amid_an_answer_is_no_error_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def gone(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise ConnectionResetError("Cannot write to closing transport")

    app = web.Application()
    app.router.add_get("/", gone)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(connections(runner, 5.0), "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    try:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.get(f"http://{host}:{port}/") as response:
                    await response.read()
    finally:
        listening.close()
        await runner.cleanup()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
