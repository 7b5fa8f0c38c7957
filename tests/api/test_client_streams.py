"""`AsyncClient` and streams: what they add up to, how they break, and what leaving them does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.api.wayward import (
    DONE,
    Wayward,
    event,
    hang,
    piece,
    refuse,
    reset,
    say,
    status,
    stream,
    usage,
    wayward,
)
from tinfer.client import (
    AsyncClient,
    AsyncStream,
    CompletionChunk,
    ConnectionFailed,
    NotFound,
    Overloaded,
    RequestTimeout,
    StreamBroken,
    TinferClientError,
    UnexpectedAnswer,
)

SOON_S = 0.25
HELLO = (piece("Hel"), piece("lo", finish_reason="stop"), usage(2), DONE)


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


@pytest.fixture
async def client(server: Wayward) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, backoff_s=0.0) as made:
        yield made


async def read(opened: AsyncStream[CompletionChunk]) -> list[str]:
    async with opened as entered:
        return [chunk.text async for chunk in entered]


async def test_a_stream_and_what_it_adds_up_to(server: Wayward, client: AsyncClient) -> None:
    server.does(stream(*HELLO), stream(*HELLO))
    async with client.stream_completions("a", max_tokens=2) as opened:
        assert [chunk.text async for chunk in opened] == ["Hel", "lo", ""]
    assert (opened.text, opened.finish_reason, opened.id, opened.model) == (
        "Hello",
        "stop",
        "c",
        "m",
    )
    assert opened.usage is not None and opened.usage.completion_tokens == 2
    assert opened.ttft_s is not None and opened.e2el_s is not None and opened.tpot_s is not None
    assert 0 < opened.ttft_s <= opened.e2el_s and len(opened.itl_s) == 1
    assert opened.tpot_s == opened.e2el_s - opened.ttft_s
    with pytest.raises(StopAsyncIteration):
        await anext(opened)
    await read(client.stream_completions("b"))
    first, second = server.seen
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert first.body == {"prompt": "a", "max_tokens": 2, **asked}
    assert first.connection is second.connection, "an ended stream gives its connection back"


async def test_a_chat_stream(server: Wayward, client: AsyncClient) -> None:
    server.does(
        stream(
            event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
            event(choices=[{"index": 0, "delta": {"content": "Hi"}, "token_ids": [7], "x": 1}]),
            event(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}], tinfer={"a": 1}),
            DONE,
        )
    )
    async with client.stream_chat([{"role": "user", "content": "a"}]) as opened:
        chunks = [chunk async for chunk in opened]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert (opened.text, opened.token_ids, opened.finish_reason) == ("Hi", [7], "length")
    assert (opened.tinfer, opened.usage, opened.tpot_s) == ({"a": 1}, None, None)
    assert opened.itl_s == []


async def test_several_answers(server: Wayward, client: AsyncClient) -> None:
    server.does(
        stream(
            piece("b1", 1),
            piece("a1", 0) + piece("b2", 1, finish_reason="stop"),
            piece("a2", 0, finish_reason="length") + usage(4) + DONE,
        )
    )
    async with client.stream_completions(["a", "b"]) as opened:
        assert [chunk.text async for chunk in opened] == ["", "a1", "", "a2", ""]
    assert {index: a.text for index, a in opened.answers.items()} == {0: "a1a2", 1: "b1b2"}
    assert [opened.answers[i].finish_reason for i in (0, 1)] == ["length", "stop"]
    assert opened.tpot_s is None


async def test_pieces_cut_anywhere(server: Wayward, client: AsyncClient) -> None:
    whole = b": hello\r\n\r\n" + piece("a \u00e9\U0001f642") + piece("b") + usage(2) + DONE
    server.does(stream(*(whole[i : i + 1] for i in range(len(whole)))))
    texts = await read(client.stream_completions("a"))
    assert texts == ["a \u00e9\U0001f642", "b", ""]


@pytest.mark.parametrize(
    "failure",
    [reset, status(502), refuse(429, "full", "TooManyRequestsError", Retry_After="0")],
    ids=["reset", "502", "429"],
)
async def test_a_stream_that_has_not_begun_is_repeated(
    server: Wayward, client: AsyncClient, failure: Any
) -> None:
    server.does(failure, failure, stream(*HELLO))
    assert await read(client.stream_completions("a")) == ["Hel", "lo", ""]
    assert len(server.seen) == 3


ERROR = event(error={"message": "worker lost", "type": "InternalServerError", "code": 500})


@pytest.mark.parametrize(
    ("pieces", "text", "message"),
    [
        ([piece("Hel"), None], "Hel", "the connection broke"),
        ([None], "", "the connection broke"),
        ([piece("Hel")], "Hel", "without its end mark"),
        ([piece("Hel") + piece("lo")[:-1]], "Hel", "without its end mark"),
        ([piece("Hel"), ERROR, DONE], "Hel", "worker lost"),
        ([piece("Hel") + ERROR + DONE], "Hel", "worker lost"),
        ([ERROR, DONE], "", "worker lost"),
        ([piece("Hel"), b"data: {}\n\n"], "Hel", "cannot be read"),
        ([piece("Hel"), b"data: nonsense\n\n"], "Hel", "cannot be read"),
        ([piece("Hel"), b"data: \xff\n\n"], "Hel", "cannot be read"),
    ],
    ids=[
        *("reset", "reset at once", "no end", "half an event", "error event"),
        *("error in one piece", "error at once", "no chunk", "no JSON", "no UTF-8"),
    ],
)
async def test_a_stream_that_has_begun_is_never_repeated(
    server: Wayward, client: AsyncClient, pieces: list[bytes | None], text: str, message: str
) -> None:
    first_seen = asyncio.Event()
    server.does(stream(*pieces[:1], first_seen, *pieces[1:]))
    seen = []
    async with client.stream_completions("a") as opened:
        with pytest.raises(StreamBroken, match=message) as broken:
            async for chunk in opened:
                seen.append(chunk.text)
                first_seen.set()
        with pytest.raises(StopAsyncIteration):
            await anext(opened)
    assert "".join(seen) == text == broken.value.text == opened.text
    if message == "worker lost":
        assert (broken.value.type, broken.value.code) == ("InternalServerError", 500)
    assert len(server.seen) == 1
    server.does(stream(*HELLO))
    assert "".join(await read(client.stream_completions("a"))) == "Hello", "the client goes on"


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (refuse(404, "no model", "NotFoundError"), NotFound),
        (refuse(429, "full", "TooManyRequestsError", Retry_After="999"), Overloaded),
        (say({"choices": []}), UnexpectedAnswer),
        (status(200, "<html>"), UnexpectedAnswer),
    ],
    ids=["404", "429", "JSON", "HTML"],
)
async def test_refusals_are_raised_on_entering(
    server: Wayward, client: AsyncClient, act: Any, kind: type[TinferClientError]
) -> None:
    server.does(act)
    with pytest.raises(kind) as raised:
        async with client.stream_completions("a"):
            raise AssertionError("entered")
    assert type(raised.value) is kind


async def test_leaving_hangs_up(server: Wayward, client: AsyncClient) -> None:
    never = asyncio.Event()
    server.does(*[stream(piece("a"), never)] * 3)
    async with client.stream_completions("a") as opened:
        async for _ in opened:
            break
        assert not server.seen[0].left.is_set()
    await server.seen[0].left.wait()
    with pytest.raises(ZeroDivisionError):
        async with client.stream_completions("a"):
            raise ZeroDivisionError
    await server.seen[1].left.wait()
    async with client.stream_completions("a") as opened:
        opened.close()
        await server.seen[2].left.wait()
        with pytest.raises(StopAsyncIteration):
            await anext(opened)


@pytest.mark.parametrize("begun", [False, True])
async def test_cancelling_hangs_up(server: Wayward, client: AsyncClient, begun: bool) -> None:
    never, first = asyncio.Event(), asyncio.Event()
    server.does(stream(piece("a"), never) if begun else hang)

    async def use() -> None:
        async with client.stream_completions("a") as opened:
            async for _ in opened:
                first.set()

    task = asyncio.create_task(use())
    seen = await server.arrived.get()
    if begun:
        await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await seen.left.wait()


@pytest.mark.parametrize(
    ("limits", "act", "limit", "text"),
    [
        ({"first_token_timeout_s": SOON_S}, hang, "first token", ""),
        ({"first_token_timeout_s": SOON_S}, [], "first token", ""),
        ({"first_token_timeout_s": SOON_S}, [b": wait\n\n"], "first token", ""),
        ({"token_gap_timeout_s": SOON_S}, [piece("a")], "between tokens", "a"),
        ({"token_gap_timeout_s": SOON_S}, [piece("a") + piece("b")], "between tokens", "ab"),
        ({"timeout_s": SOON_S}, [piece("a")], "total", "a"),
        ({"timeout_s": SOON_S, "first_token_timeout_s": 60.0}, hang, "total", ""),
    ],
)
async def test_limits(
    server: Wayward, limits: dict[str, float], act: Any, limit: str, text: str
) -> None:
    never = asyncio.Event()
    server.does(stream(*act, never) if isinstance(act, list) else act)
    async with AsyncClient(server.url, **limits) as client:  # type: ignore[arg-type]
        with pytest.raises(RequestTimeout) as late:
            await read(client.stream_completions("a"))
        assert late.value.limit == limit
        # The total limit runs from the start, so on a busy machine it may pass before the token.
        assert late.value.text == text or (limit == "total" and not late.value.text)
        await server.seen[0].left.wait()
    assert len(server.seen) == 1, "a slow server gets no second request"


async def test_the_gap_counts_from_the_moment_the_caller_asks(server: Wayward) -> None:
    more = asyncio.Event()
    server.does(stream(piece("a"), more, piece("b"), DONE))
    async with (
        AsyncClient(server.url, token_gap_timeout_s=60.0) as client,
        client.stream_completions("a") as opened,
    ):
        await anext(opened)
        # As if the caller had been busy with the first chunk for longer than the limit.
        assert opened._deadlines is not None
        opened._deadlines.start("between tokens", -1.0)
        asyncio.get_running_loop().call_soon(more.set)
        assert (await anext(opened)).text == "b"


async def test_a_server_that_leaves_an_ended_stream_open(
    server: Wayward, client: AsyncClient
) -> None:
    never = asyncio.Event()
    server.does(stream(*HELLO, never))
    assert "".join(await read(client.stream_completions("a"))) == "Hello"
    await server.seen[0].left.wait()


async def test_wrong_use(server: Wayward, client: AsyncClient) -> None:
    opened = client.stream_completions("a")
    with pytest.raises(RuntimeError, match="async with"):
        await anext(opened)
    server.does(stream(*HELLO))
    await read(opened)
    with pytest.raises(RuntimeError, match="used once"):
        await read(opened)
    with pytest.raises(TypeError, match="did you mean"):
        client.stream_chat("a", max_token=3)  # type: ignore[call-arg]


async def test_closing_the_client_breaks_a_stream(server: Wayward) -> None:
    never = asyncio.Event()
    server.does(stream(piece("a"), never))
    client = AsyncClient(server.url)
    async with client.stream_completions("a") as opened:
        await anext(opened)
        await client.close()
        with pytest.raises(StreamBroken):
            await anext(opened)
    await server.seen[0].left.wait()
    with pytest.raises(ConnectionFailed):
        await read(client.stream_completions("a"))
