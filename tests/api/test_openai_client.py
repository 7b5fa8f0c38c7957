"""The stock `openai` client, sync and async, against the canned server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from tests.api.canned import say, token
from tests.api.conftest import Server
from tinfer.errors import Overloaded

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    url = server.url + "/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


async def test_async(server: Server, client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=5)
    assert chat.choices[0].message.content == "Hello"
    assert chat.usage is not None and chat.usage.completion_tokens == 5
    done = await client.completions.create(model="tiny", prompt=["a", "b"], n=2)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert [m.id async for m in client.models.list()] == ["tiny", "org/tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_async_streams(server: Server, client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in chat]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5
    done = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in done]) == "Hello"


async def test_logprobs(server: Server, client: openai.AsyncOpenAI) -> None:
    server.service.script = lambda index: say("A", logprobs=[token("A", top=1)])
    chat = await client.chat.completions.create(
        model="tiny", messages=HI, logprobs=True, top_logprobs=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [t.token for t in logprobs.content[0].top_logprobs] == ["A", "t0"]


async def test_errors(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="tiny", prompt="a", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="a")
    server.service.script = lambda index: Overloaded("full")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="tiny", prompt="a")


async def test_a_stream_that_is_left_is_cancelled(
    server: Server, client: openai.AsyncOpenAI
) -> None:
    never = asyncio.Event()
    server.service.script = lambda index: [*say("a", reason=None), never]  # type: ignore[arg-type]
    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    await anext(aiter(stream))
    await stream.close()
    await server.service.streams[0].cancelled.wait()


async def test_sync(server: Server) -> None:
    def use() -> tuple[str | None, str, str]:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            chat = client.chat.completions.create(model="tiny", messages=HI)
            text = client.completions.create(model="tiny", prompt="a").choices[0].text
            with client.chat.completions.create(model="tiny", messages=HI, stream=True) as chunks:
                streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
            return chat.choices[0].message.content, text, streamed

    assert await asyncio.to_thread(use) == ("Hello", "Hello", "Hello")
