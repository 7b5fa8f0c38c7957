"""`/v1/responses`: what is refused, what fails midway, what is too long."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.api.canned import say
from tests.api.conftest import OPTIONS, Server, canned_server
from tests.api.parsed import Broken, Speaker
from tests.api.responding import NOW, PATH, events_of, joined, names, respond
from tinfer.api.service import Delta
from tinfer.errors import EngineFailed, Overloaded

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"input": "x" * 200}, "input"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 1000}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [NOW]}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"reasoning": {"effort": "utter"}}, "reasoning.effort"),
    ({"include": ["all"]}, "include[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata"),
    ({"tinfer": {"deadline_ms": 0}}, "tinfer.deadline_ms"),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED)
async def test_wrong_requests_name_the_field(
    server: Server, asked: dict[str, Any], param: str
) -> None:
    status, error = await server.refused(PATH, **{"input": "hi", **asked})
    assert status == 400
    assert error["param"] is not None and error["param"].startswith(param), error
    assert server.service.generations == []


async def test_what_has_another_name_here_is_told(server: Server) -> None:
    _, error = await server.refused(PATH, input="hi", max_tokens=3)
    assert "max_output_tokens" in error["message"]
    _, error = await server.refused(PATH, input="hi", max_output_tokens=1000)
    assert "completion" not in error["message"]


@pytest.mark.parametrize("call", [("GET", ""), ("DELETE", ""), ("POST", "/cancel")])
async def test_nothing_is_stored(server: Server, call: tuple[str, str]) -> None:
    said = await respond(server, store=True)
    method, action = call
    url = f"{server.url}{PATH}/{said['id']}{action}"
    async with server.session.request(method, url) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["param"]) == (404, "NotFoundError", "response_id")
    assert "stores none" in error["message"]


async def test_unknown_fields_are_named(server: Server) -> None:
    status, _, headers = await server.post(PATH, input="hi", surprise=1, stream_options={})
    assert (status, headers["X-Tinfer-Ignored"]) == (200, "surprise")


async def test_a_refusal_has_its_own_status(server: Server) -> None:
    server.service.script = lambda _: Overloaded("full")
    for stream in (False, True):
        status, error = await server.refused(PATH, input="hi", stream=stream)
        assert (status, error["type"]) == (429, "TooManyRequestsError")


async def test_a_stream_that_fails_midway_says_so(server: Server) -> None:
    server.service.script = lambda _: [Delta("Hel", [1, 2, 3]), EngineFailed("the worker broke")]
    events = await events_of(server)
    assert names(events)[-2:] == ["output_text.delta", "failed"]
    said = events[-1]["response"]
    assert (said["status"], said["error"]) == (
        "failed",
        {
            **{"code": "server_error", "message": "the worker broke"},
            **{"type": "InternalServerError", "param": None},
        },
    )
    (item,) = said["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hel")
    assert said["usage"]["output_tokens"] == 3
    status, error = await server.refused(PATH, input="hi")
    assert (status, error["message"]) == (500, "the worker broke")


@pytest.mark.parametrize("pieces", [("!",), ("a", "!", "b")])
async def test_a_parser_that_breaks_ends_its_own_answer_only(
    speaker: Speaker, pieces: tuple[str, ...]
) -> None:
    async with canned_server(speaker.model_dir, OPTIONS, Broken()) as server:
        server.service.script = lambda _: say(*pieces)
        events = await events_of(server)
        assert names(events)[:2] == ["created", "in_progress"]
        assert events[-1]["type"] == "response.failed"
        assert "the parser broke" in events[-1]["response"]["error"]["message"]
        assert joined(events, "output_text") == "".join(pieces).partition("!")[0]
        status, error = await server.refused(PATH, input="hi")
        assert (status, error["param"]) == (500, None)


async def test_a_deadline_ends_a_stream(server: Server) -> None:
    never = asyncio.Event()
    server.service.script = lambda _: [Delta("Hel", [1, 2, 3]), never]
    events = await events_of(server, tinfer={"deadline_ms": 200})
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["type"] == "GatewayTimeoutError"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_noticed(server: Server, stream: bool) -> None:
    never = asyncio.Event()
    server.service.script = lambda _: [Delta("Hel", [1, 2, 3]), never]
    body = {"input": "hi", "stream": stream}
    async with asyncio.timeout(20):
        task = asyncio.create_task(server.post(PATH, **body))
        (started,) = await server.service.started(1)
        task.cancel()
        await started.cancelled.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_an_own_id_is_in_the_id(server: Server) -> None:
    said = await respond(server, request_id="mine")
    assert said["id"] == "resp_mine"


# --- truncation -----------------------------------------------------------------------------------


def turns(count: int, chars: int) -> list[dict[str, str]]:
    """Questions and answers in turn, the last one a question."""
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": str(i) * chars}
        for i in range(count)
    ]


async def test_the_oldest_turns_give_way(server: Server) -> None:
    asked = {"instructions": "Brief.", "input": turns(9, 10), "max_output_tokens": 19}
    status, error = await server.refused(PATH, **asked)
    assert (status, error["param"]) == (400, "input")
    said = await respond(server, **asked, truncation="auto")
    assert said["truncation"] == "auto"
    (generation,) = server.service.generations
    prompt = generation.prompt_text
    kept = "<system>Brief.\n<user>6666666666\n<assistant>7777777777\n<user>8888888888<assistant>"
    assert prompt == kept
    assert generation.sampling.max_tokens == 19


async def test_what_fits_is_left_as_it_is(server: Server) -> None:
    await respond(server, input=turns(3, 2), truncation="auto")
    prompt = server.service.generations[0].prompt_text
    assert prompt == "<user>00\n<assistant>11\n<user>22<assistant>"


@pytest.mark.parametrize("given", ["x" * 200, turns(5, 200)])
async def test_a_last_turn_that_is_too_long_is_refused(server: Server, given: Any) -> None:
    status, error = await server.refused(PATH, input=given, truncation="auto")
    assert (status, error["param"]) == (400, "input")
