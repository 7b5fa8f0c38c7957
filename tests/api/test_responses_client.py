"""The Responses API of the stock `openai` client against the canned server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import (
    FunctionToolParam,
    Response,
    ResponseInputParam,
    ResponseStreamEvent,
)

from tests.api.canned import say, token
from tests.api.conftest import Serve, Server
from tests.api.parsed import Speaker
from tests.api.responding import events_of, respond
from tinfer.errors import EngineFailed

NOW: FunctionToolParam = {"type": "function", "name": "now", "parameters": {}, "strict": False}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connected(server) as made:
        yield made


def connected(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


async def test_whole(server: Server, client: openai.AsyncOpenAI) -> None:
    server.service.script = lambda _: say("A", logprobs=[token("A", top=1)])
    said = await client.responses.create(
        model="tiny",
        input="hi",
        instructions="Be brief.",
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert (said.output_text, said.status) == ("A", "completed")
    assert said.usage is not None and said.usage.output_tokens == 1
    (item,) = said.output
    assert item.type == "message" and item.content[0].type == "output_text"
    logprobs = item.content[0].logprobs
    assert logprobs is not None
    assert [top.token for top in logprobs[0].top_logprobs] == ["A", "t0"]


async def test_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input="hi", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Hello"
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == "Hello"


async def test_the_clients_own_reading_of_a_stream(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="tiny", input="hi") as stream:
        snapshots = [e.snapshot async for e in stream if e.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == "Hello"


class Person(pydantic.BaseModel):
    """What is to be parsed."""

    name: str
    age: int


async def test_parse(server: Server, client: openai.AsyncOpenAI) -> None:
    server.service.script = lambda _: say('{"name": "Tim", ', '"age": 7}')
    said = await client.responses.parse(model="tiny", input="hi", text_format=Person)
    assert said.output_parsed == Person(name="Tim", age=7)
    structured = server.service.generations[0].sampling.structured
    assert structured is not None and '"age"' in (structured.json or "")
    async with client.responses.stream(model="tiny", input="hi", text_format=Person) as stream:
        streamed = await stream.get_final_response()
    assert streamed.output_parsed == Person(name="Tim", age=7)


async def test_a_call_and_its_result(serve: Serve, speaker: Speaker) -> None:
    texts = [CALL, "<think>Noon.</think>It is noon."]
    async with serve("hermes", "qwen3") as server, connected(server) as client:
        server.service.script = lambda index: speaker.say(texts[index])
        asked: ResponseInputParam = [{"role": "user", "content": "What time is it?"}]
        first = await client.responses.create(model="tiny", input=asked, tools=[NOW])
        call = first.output[-1]
        assert call.type == "function_call" and (call.name, call.arguments) == ("now", "{}")
        asked += [item.model_dump(exclude_none=True) for item in first.output]  # type: ignore[misc]
        asked += [{"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}]
        async with client.responses.stream(model="tiny", input=asked, tools=[NOW]) as stream:
            second = await stream.get_final_response()
    assert second.output_text == "It is noon."
    thought = second.output[0]
    assert thought.type == "reasoning" and thought.content is not None
    assert thought.content[0].text == "Noon."
    prompt = server.service.generations[-1].prompt_text
    assert prompt is not None and "now" in prompt and "<tool>12:00" in prompt


async def test_a_streamed_call(serve: Serve, speaker: Speaker) -> None:
    async with serve() as server, connected(server) as client:
        server.service.script = lambda _: speaker.say(CALL)
        stream = await client.responses.create(model="tiny", input="hi", tools=[NOW], stream=True)
        events = [event async for event in stream]
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == "{}"
    last = events[-1]
    assert last.type == "response.completed"
    (call,) = last.response.output
    assert call.type == "function_call" and call.name == "now"


EVENT: pydantic.TypeAdapter[ResponseStreamEvent] = pydantic.TypeAdapter(ResponseStreamEvent)


async def test_bodies_and_events_are_of_the_packages_types(serve: Serve, speaker: Speaker) -> None:
    """Which the client itself does not check."""
    asked: dict[str, Any] = {
        **{"tools": [NOW], "tool_choice": {"type": "function", "name": "now"}},
        **{"metadata": {"a": "b"}, "reasoning": {"effort": "low", "summary": "auto"}},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        **{"include": ["message.output_text.logprobs"], "top_logprobs": 1},
    }
    text = f"<think>Hm.</think>Well. {CALL}"
    async with serve("hermes", "qwen3") as server:
        for reason, ask in (("stop", asked), ("length", asked), ("stop", {})):
            server.service.script = lambda _, reason=reason: speaker.say(  # type: ignore[misc]
                text, reason, logprobs=True
            )
            Response.model_validate(await respond(server, **ask))
            for event in await events_of(server, **ask):
                assert EVENT.validate_python(event).type == event["type"]
        server.service.script = lambda _: [*speaker.say("Well.")[:2], EngineFailed("broke")]
        failed = [EVENT.validate_python(event).type for event in await events_of(server)]
    assert failed[-1] == "response.failed"


async def test_errors(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
    assert bad.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model="tiny", input="hi", background=True)
    assert bad.value.param == "background"
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await ask("resp_1")


async def test_sync(server: Server) -> None:
    def use() -> tuple[str, str]:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            said = client.responses.create(model="tiny", input="hi")
            with client.responses.create(model="tiny", input="hi", stream=True) as stream:
                deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
            return said.output_text, "".join(deltas)

    assert await asyncio.to_thread(use) == ("Hello", "Hello")
