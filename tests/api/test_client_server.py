"""Both clients against tinfer's own HTTP API: answers, errors, and requests that are left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

import tinfer
from tests.api.canned import say
from tests.api.conftest import Server
from tinfer.api.trace import TRACE_HEADER, Trace
from tinfer.client import AsyncClient, BadRequest, NotFound, Overloaded, StreamBroken, aio
from tinfer.errors import NoWorker, WorkerLost
from tinfer.errors import Overloaded as Full


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, max_retries=0) as made:
        yield made


async def test_whole_answers(server: Server, client: AsyncClient) -> None:
    done = await client.completions("ab", return_token_ids=True, n=2)
    assert [choice.text for choice in done.choices] == ["Hello", "Hello"]
    assert done.token_ids == [72, 101, 108, 108, 111]
    assert done.choices[0].prompt_token_ids == server.service.generations[0].prompt_token_ids
    chat = await client.chat("hi", max_tokens=9, stop=["x"], seed=1)
    assert (chat.text, chat.message.role, chat.finish_reason) == ("Hello", "assistant", "stop")
    assert chat.usage is not None and chat.usage.completion_tokens == 5
    again = await client.chat([{"role": "user", "content": "hi"}, chat_entry(chat.message.content)])
    assert again.text == "Hello"


def chat_entry(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


async def test_streams(client: AsyncClient) -> None:
    async with client.stream_completions("ab", return_token_ids=True) as done:
        assert [chunk.text async for chunk in done] == ["Hel", "lo", ""]
    assert (done.text, done.finish_reason, len(done.token_ids)) == ("Hello", "stop", 5)
    async with client.stream_chat("hi") as chat:
        assert "".join([chunk.text async for chunk in chat]) == "Hello"
    assert chat.usage is not None and chat.usage.completion_tokens == 5


async def test_errors(server: Server, client: AsyncClient) -> None:
    with pytest.raises(BadRequest) as bad:
        await client.completions("a", temperature=3.0)
    assert bad.value.param == "temperature"
    with pytest.raises(NotFound, match="does not exist"):
        await client.chat("a", model="other")
    server.service.script = lambda index: Full("queue full", retry_after_s=3.0)
    with pytest.raises(Overloaded) as full:
        await client.chat("a")
    assert (full.value.retry_after_s, full.value.type) == (3.0, "TooManyRequestsError")


async def test_a_failure_midway(server: Server, client: AsyncClient) -> None:
    script: list[Any] = [*say("Hel", reason=None), WorkerLost("worker 1 died")]  # type: ignore[arg-type]
    server.service.script = lambda index: script
    async with client.stream_completions("a") as opened:
        with pytest.raises(StreamBroken, match="worker 1 died") as broken:
            async for _ in opened:
                pass
    assert (broken.value.text, broken.value.code) == ("Hel", 500)


async def test_no_worker_is_tried_again(server: Server) -> None:
    server.service.script = lambda index: say("Hello")
    refusals = [NoWorker("no worker is up")]
    usual = server.service.submit

    def submit(generation: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return usual(generation)

    server.service.submit = submit  # type: ignore[method-assign]
    async with AsyncClient(server.url, backoff_s=0.0) as client:
        assert (await client.completions("a")).text == "Hello"


@pytest.mark.parametrize("cancel", [False, True], ids=["break", "cancel"])
async def test_leaving_a_stream_cancels_the_request(
    server: Server, client: AsyncClient, cancel: bool
) -> None:
    never, first = asyncio.Event(), asyncio.Event()
    server.service.script = lambda index: [*say("a", reason=None), never]  # type: ignore[arg-type]

    async def use() -> None:
        async with client.stream_chat("hi", n=2) as opened:
            async for _ in opened:
                first.set()
                if not cancel:
                    break

    task = asyncio.create_task(use())
    await first.wait()
    if cancel:
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() == cancel
    streams = server.service.streams
    await asyncio.gather(*(stream.cancelled.wait() for stream in streams))
    assert len(streams) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelling_a_waiting_request(
    server: Server, client: AsyncClient, streamed: bool
) -> None:
    never = asyncio.Event()
    server.service.script = lambda index: [never]

    async def use() -> None:
        if streamed:
            async with client.stream_chat("hi"):
                pass
        else:
            await client.chat("hi")

    task = asyncio.create_task(use())
    (started,) = await server.service.started(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await started.cancelled.wait()


async def test_the_sync_client(server: Server) -> None:
    never = asyncio.Event()
    server.service.script = lambda index: (
        say("Hel", "lo") if index < 3 else [*say("a", reason=None), never]  # type: ignore[arg-type]
    )

    def use() -> None:
        with tinfer.Client(server.url) as client:
            assert client.health().ok
            assert client.completions("a").text == client.chat("a").text == "Hello"
            with client.stream_chat("a") as opened:
                assert [chunk.text for chunk in opened][-2:] == ["lo", ""]
            assert opened.usage is not None and opened.usage.completion_tokens == 5
            assert [model.id for model in client.models()] == ["tiny", "org/tiny"]
            assert client.ledger() == {"open_requests": 0}
            assert "canned_state 2.0\n" in client.metrics()
            with client.stream_completions("a") as left:
                assert next(left).text == "a"

    await asyncio.to_thread(use)
    await server.service.streams[3].cancelled.wait()


async def test_tokens_and_text(client: AsyncClient) -> None:
    plain = await client.tokenize("ab", add_special_tokens=False, return_token_strs=True)
    assert (plain.count, plain.max_model_len, plain.token_strs) == (2, 100, ["a", "b"])
    assert await client.detokenize(plain.tokens) == "ab"
    assert (await client.tokenize("ab")).count == 3, "and the token that begins a prompt"
    chat = await client.tokenize([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert await client.detokenize(chat.tokens) == "<user>a<assistant>"
    with pytest.raises(BadRequest):
        await client.tokenize("a", extra={"messages": []})


async def test_the_trace_of_an_answer(server: Server, client: AsyncClient) -> None:
    def trace(index: int) -> Trace:
        said: dict[str, Any] = dict.fromkeys(Trace.__struct_fields__)
        return Trace(**said | {"request_id": f"r{index}", "route": "split"})

    server.service.script = lambda index: say("Hel", "lo", trace=trace(index))
    assert aio.TRACE_HEADER == TRACE_HEADER
    async with AsyncClient(server.url, trace=True) as curious:
        whole = await curious.chat("hi")
        assert whole.tinfer is not None and whole.tinfer["route"] == "split"
        async with curious.stream_chat("hi", n=2) as opened:
            assert opened.tinfer is None
            async for _ in opened:
                pass
    assert [opened.answers[i].tinfer["request_id"] for i in (0, 1)] == ["r1", "r2"]  # type: ignore[index]
    assert opened.tinfer == opened.answers[0].tinfer
    assert (await client.chat("hi")).tinfer is None, "shown to nobody who does not ask"
