"""`Client`: several threads, a loop that runs already, Ctrl-C, and what closing leaves behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from tests.api.wayward import DONE, Wayward, hang, piece, say, stream, usage, wayward
from tinfer.client import Client, ConnectionFailed, NotFound, StreamBroken

GOOD = {"choices": [{"index": 0, "text": "Hello"}]}
CHAT = {"choices": [{"index": 0, "message": {"content": "Hello"}}]}


@pytest.fixture
def server() -> Iterator[Wayward]:
    """A server in a thread of its own, so that the client may block the main one."""
    made: concurrent.futures.Future[tuple[Wayward, asyncio.Event]] = concurrent.futures.Future()

    async def live() -> None:
        async with wayward() as server:
            stop = asyncio.Event()
            made.set_result((server, stop))
            await stop.wait()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ended = pool.submit(asyncio.run, live())
        server, stop = made.result()
        yield server
        server.loop.call_soon_threadsafe(stop.set)
        ended.result()


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tinfer-client"]


def wait_left(server: Wayward, number: int) -> None:
    """Until the server has seen the client of this request hang up."""
    asyncio.run_coroutine_threadsafe(server.seen[number].left.wait(), server.loop).result()


def test_closing_leaves_no_thread(server: Wayward) -> None:
    server.does(say(GOOD), say(CHAT), say({"a": 1}))
    client = Client(server.url)
    assert client_threads() == [], "a client that was never used has none"
    with client:
        assert client.completions("a").text == client.chat("a").text == "Hello"
        assert bytes(client.post("/v1/later", {}).body) == b'{"a":1}'
        assert len(client_threads()) == 1
    assert client_threads() == []
    client.close()
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        client.chat("a")
    Client(server.url).close()


def test_errors_are_those_of_the_async_client(server: Wayward) -> None:
    server.does(say({"error": {"message": "no model"}}, 404))
    with Client(server.url) as client:
        with pytest.raises(NotFound, match="no model"):
            client.chat("a", model="b")
        with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
            client.chat("a", max_token=3)  # type: ignore[call-arg]


def test_a_stream(server: Wayward) -> None:
    server.does(stream(piece("Hel"), piece("lo", finish_reason="stop"), usage(2), DONE))
    with Client(server.url) as client:
        with client.stream_completions("a") as opened:
            assert [chunk.text for chunk in opened] == ["Hel", "lo", ""]
            assert list(opened) == []
        assert (opened.text, opened.finish_reason, opened.id) == ("Hello", "stop", "c")
        assert opened.usage is not None and opened.usage.completion_tokens == 2
        assert opened.ttft_s is not None and opened.e2el_s is not None
        assert opened.tpot_s == opened.e2el_s - opened.ttft_s == opened.itl_s[0]


def test_a_broken_stream(server: Wayward) -> None:
    seen = asyncio.Event()
    server.does(stream(piece("Hel"), seen, None))
    with Client(server.url) as client, client.stream_completions("a") as opened:
        assert next(opened).text == "Hel"
        server.loop.call_soon_threadsafe(seen.set)
        with pytest.raises(StreamBroken) as broken:
            next(opened)
        assert broken.value.text == "Hel"


def test_leaving_a_stream_hangs_up(server: Wayward) -> None:
    never = asyncio.Event()
    server.does(stream(piece("a"), never), say(GOOD))
    with Client(server.url) as client:
        with client.stream_completions("a") as opened:
            for _ in opened:
                break
        wait_left(server, 0)
        assert client.completions("a").text == "Hello"


def test_threads_share_a_client(server: Wayward) -> None:
    """None is answered before all are there, so they run side by side."""
    num_requests = 8
    all_there = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        if len(server.seen) == num_requests:
            all_there.set()
        await all_there.wait()
        return web.json_response(GOOD)

    server.does(*[act] * num_requests)
    with Client(server.url) as client, concurrent.futures.ThreadPoolExecutor(num_requests) as pool:
        answers = [pool.submit(client.completions, "a") for _ in range(num_requests)]
        assert [answer.result().text for answer in answers] == ["Hello"] * num_requests
        assert len(client_threads()) == 1


async def test_inside_a_running_loop(server: Wayward) -> None:
    """As in a notebook."""
    server.does(say(GOOD))
    with Client(server.url) as client:
        assert client.completions("a").text == "Hello"


def test_closing_ends_calls_of_other_threads(server: Wayward) -> None:
    server.does(hang)
    client = Client(server.url)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.completions, "a")
        while not server.seen:
            assert not call.done()
        client.close()
        with pytest.raises(ConnectionFailed):
            call.result()
    assert client_threads() == []


async def interrupt(request: web.Request) -> web.StreamResponse:
    """Press Ctrl-C while the client waits for this answer."""
    os.kill(os.getpid(), signal.SIGINT)
    return await hang(request)


def test_ctrl_c_cancels_the_request_and_not_the_client(server: Wayward) -> None:
    server.does(interrupt, interrupt, say(GOOD))
    with Client(server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            client.completions("a")
        wait_left(server, 0)
        with pytest.raises(KeyboardInterrupt), client.stream_completions("a"):
            raise AssertionError("entered")
        wait_left(server, 1)
        assert client.completions("a").text == "Hello"
    assert client_threads() == []


def test_ctrl_c_inside_a_stream(server: Wayward) -> None:
    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(piece("a"))
        await asyncio.to_thread(first.wait)
        os.kill(os.getpid(), signal.SIGINT)
        return await hang(request)

    first = threading.Event()
    server.does(act)
    with Client(server.url) as client:
        with contextlib.suppress(KeyboardInterrupt), client.stream_completions("a") as opened:
            assert next(opened).text == "a"
            first.set()
            next(opened)
            raise AssertionError("not interrupted")
        assert opened.text == "a"
        wait_left(server, 0)
    assert client_threads() == []
