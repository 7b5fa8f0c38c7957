"""Tool calls in chats, found by vLLM's own parsers in what a model would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.api.conftest import OPTIONS, Serve, Server, canned_server
from tests.api.described import Document
from tests.api.parsed import (
    NOW,
    TOOLS,
    USER,
    WEATHER,
    Speaker,
    reassembled,
    whole,
    write_marked_model_dir,
)
from tinfer.api.limits import MAX_GRAMMAR_BYTES
from tinfer.api.openapi import document
from tinfer.api.render import Renderer
from tinfer.api.server import ENDPOINTS
from tinfer.api.vllm_parsers import ParserNames, load_parsers
from tinfer.client import AsyncClient
from tinfer.errors import StartError

CHATS = "/v1/chat/completions"
ARGUMENTS = '{"city": "Köln \\"x\\"", "days": 2}'
ONE = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO = (
    'Sure.\n<tool_call>\n{"name": "weather", "arguments": {"city": "A"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
NAMED = {"type": "function", "function": {"name": "now"}}
FUNCTION = {"name": "weather", "arguments": {"city": "A"}}


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", "plain words, 好"),
        ("hermes", ONE),
        ("hermes", TWO),
        ("llama3_json", "plain words"),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}'),
        ("pythonic", '[weather(city="Köln", days=2), now()]'),
        ("qwen3_xml", "plain words"),
        (
            "qwen3_xml",
            "ok <tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
async def test_a_stream_adds_up_to_the_whole_answer(
    serve: Serve, speaker: Speaker, parser: str, text: str, step: int
) -> None:
    async with serve(parser) as server:
        server.service.script = lambda _: speaker.say(text, step=step)
        said = whole(await server.chat(tools=TOOLS))
        events = await server.stream(CHATS, messages=USER, tools=TOOLS)
    streamed = reassembled(events)
    # A stream cannot take back a blank before the first call.
    assert streamed | {"content": ""} == said | {"content": ""}
    assert streamed["content"].strip() == said["content"].strip()
    assert bool(said["calls"]) == ("plain" not in text)
    assert said["finish_reason"] == ("tool_calls" if said["calls"] else "stop")


async def test_a_call_is_as_vllm_writes_it(serve: Serve, speaker: Speaker) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(ONE)
        (choice,) = (await server.chat(tools=TOOLS, tool_choice="auto"))["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("chatcmpl-tool-")
    function = {"name": "weather", "arguments": ARGUMENTS}
    assert call == {"type": "function", "function": function}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    (generation,) = server.service.generations
    assert generation.sampling.structured is None
    # The marks are special tokens of some models.
    assert generation.sampling.skip_special_tokens is False


async def test_a_stream_says_nothing_where_the_parser_waits(serve: Serve, speaker: Speaker) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(ONE)
        events = await server.stream(CHATS, messages=USER, tools=TOOLS)
        deltas = [event["choices"][0]["delta"] for event in events]
        assert len(events) < len(speaker.ids(ONE))
        assert deltas[0] == {"content": "", "role": "assistant"}
        name = deltas[1]["tool_calls"][0]
        assert (name["index"], name["type"], name["function"]["name"]) == (0, "function", "weather")
        # With token ids every token has to come all the same.
        ids = await server.stream(CHATS, messages=USER, tools=TOOLS, return_token_ids=True)
    told = [i for event in ids for i in event["choices"][0].get("token_ids") or ()]
    assert told == speaker.ids(ONE)


@pytest.mark.parametrize(
    ("choice", "text", "reason"),
    [("required", ONE, "tool_calls"), (NAMED, TWO, "stop")],
)
async def test_a_tool_that_must_be_called_becomes_a_grammar(
    serve: Serve, speaker: Speaker, choice: Any, text: str, reason: str
) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(text)
        said = await server.chat(tools=TOOLS, tool_choice=choice)
        events = await server.stream(CHATS, messages=USER, tools=TOOLS, tool_choice=choice)
    for generation in server.service.generations:
        structured = generation.sampling.structured
        assert structured is not None and structured.structural_tag is not None
        tag = json.loads(structured.structural_tag)
        assert tag["type"] == "structural_tag"
        assert ("weather" in structured.structural_tag) == (choice == "required")
    assert said["choices"][0]["finish_reason"] == reassembled(events)["finish_reason"] == reason
    assert said["choices"][0]["message"]["content"] == ("" if choice == "required" else "Sure.\n")
    assert reassembled(events)["calls"] == whole(said)["calls"]


@pytest.mark.parametrize(
    ("choice", "text", "reason"),
    [
        ("required", '[{"name": "now", "parameters": {"zone": "好"}}]', "tool_calls"),
        (NAMED, '{"zone": "好"}', "stop"),
    ],
)
async def test_calls_that_have_no_form_of_their_own_are_json(
    serve: Serve, speaker: Speaker, choice: Any, text: str, reason: str
) -> None:
    async with serve("pythonic") as server:
        server.service.script = lambda _: speaker.say(text)
        said = whole(await server.chat(tools=TOOLS, tool_choice=choice))
        events = await server.stream(CHATS, messages=USER, tools=TOOLS, tool_choice=choice)
    assert said == reassembled(events)
    assert said["calls"] == [("now", '{"zone": "好"}')] and said["finish_reason"] == reason
    for generation in server.service.generations:
        structured = generation.sampling.structured
        assert structured is not None and structured.json is not None
        schema = json.loads(structured.json)
        assert schema["type"] == ("array" if choice == "required" else "object")


async def test_ids_of_kimi_models_count_the_calls_of_the_chat(tmp_path: Path) -> None:
    kimi = Speaker(write_marked_model_dir(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k2"}')
    past = {"id": "x", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    ask: dict[str, Any] = {
        "messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [past]}],
        **{"tools": TOOLS, "tool_choice": "required"},
    }
    text = '[{"name": "now", "parameters": {}}, {"name": "now", "parameters": {}}]'
    parsers = await kimi.parsers("pythonic")
    async with canned_server(tmp_path, OPTIONS, parsers) as server:
        server.service.script = lambda _: kimi.say(text)
        said = await server.chat(**ask)
        events = await server.stream(CHATS, **ask)
    calls = said["choices"][0]["message"]["tool_calls"]
    assert [call["id"] for call in calls] == ["functions.now:1", "functions.now:2"]
    pieces = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", ())]
    assert [c["id"] for c in pieces if "id" in c] == ["functions.now:1", "functions.now:2"]


async def test_no_choice_leaves_the_text_alone(serve: Serve, speaker: Speaker) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(ONE)
        said = await server.chat(tools=TOOLS, tool_choice="none")
        events = await server.stream(CHATS, messages=USER)
    for one in (whole(said), reassembled(events)):
        assert (one["content"], one["calls"], one["finish_reason"]) == (ONE, [], "stop")


async def test_one_call_at_a_time_on_request(serve: Serve, speaker: Speaker) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(TWO)
        ask: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
        said = whole(await server.chat(**ask))
        streamed = reassembled(await server.stream(CHATS, messages=USER, **ask))
    assert said["calls"] == streamed["calls"] == [("weather", '{"city": "A"}')]


async def test_every_answer_has_a_parser_of_its_own(serve: Serve, speaker: Speaker) -> None:
    texts = [ONE, "no tool", TWO]
    async with serve() as server:
        server.service.script = lambda i: speaker.say(texts[i % 3], logprobs=True)
        ask: dict[str, Any] = {"tools": TOOLS, "n": 3, "logprobs": True, "top_logprobs": 0}
        said = await server.chat(**ask)
        events = await server.stream(CHATS, messages=USER, **ask)
    for i, text in enumerate(texts):
        assert whole(said, i)["calls"] == reassembled(events, i)["calls"]
        assert len(whole(said, i)["calls"]) == text.count("<tool_call>")
        # Every token has its logprobs, those that became part of a call too.
        assert len(said["choices"][i]["logprobs"]["content"]) == len(speaker.ids(text))
        mine = [c for event in events for c in event["choices"] if c["index"] == i]
        told = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert len(told) == len(speaker.ids(text))


async def test_tools_and_past_calls_reach_the_template(serve: Serve, speaker: Speaker) -> None:
    call = {"id": "c", "type": "function", "function": {**FUNCTION, "arguments": '{"city": "B"}'}}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c"},
    ]
    async with serve(exclude_tools_when_tool_choice_none=True) as server:
        ask: dict[str, Any] = {"messages": USER + history, "return_prompt_text": True}
        said = await server.chat(**ask, tools=TOOLS)
        assert said["prompt_text"] == (
            "[weather][now]<user>hi<assistant>weatherB<tool>rain<assistant>"
        )
        hidden = await server.chat(**ask, tools=TOOLS, tool_choice="none")
        assert hidden["prompt_text"].startswith("<user>")
    async with serve() as server:
        shown = await server.chat(**ask, tools=TOOLS, tool_choice="none")
        assert shown["prompt_text"].startswith("[weather]")


SCHEMA = {"json": {"type": "object"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "code"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [{"function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"function": {}}}, "tool_choice.function.name"),
    ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": NAMED, "structured_outputs": SCHEMA}, "structured_outputs"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    ({"echo": 1}, "echo"),
]


@pytest.mark.parametrize(("asked", "param"), REFUSED)
async def test_what_makes_no_sense_is_refused(
    serve: Serve, asked: dict[str, Any], param: str
) -> None:
    async with serve() as server:
        status, error = await server.refused(CHATS, messages=USER, **asked)
        assert (status, error["param"]) == (400, param)
        assert server.service.generations == []


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"x": {"enum": ["y" * MAX_GRAMMAR_BYTES]}}},
        deep(45),
        {"type": 5},
        {"type": "object", "properties": 5},
    ],
)
async def test_a_grammar_of_tools_keeps_to_the_limits(
    serve: Serve, parameters: dict[str, Any]
) -> None:
    function = {"name": "f", "strict": True, "parameters": parameters}
    ask: dict[str, Any] = {"tools": [{"function": function}], "tool_choice": "required"}
    async with serve() as server:
        async with server.session.post(server.url + CHATS, json={"messages": USER, **ask}) as got:
            said = await got.json()
        # What is a grammar or not, a worker says; here nothing may break.
        assert got.status in (200, 400)
        if got.status == 400:
            assert said["error"]["param"] == "tools"
        assert (await server.chat())["choices"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [("auto", '"auto"'), ("required", '"required"'), (NAMED, 'function "now"'), (None, '"auto"')],
)
async def test_without_a_parser_tools_cannot_be_called(
    server: Server, choice: Any, words: str
) -> None:
    ask = {"messages": USER, "tools": TOOLS, "tool_choice": choice}
    status, error = await server.refused(CHATS, **ask)
    assert (status, error["param"]) == (400, "tool_choice")
    assert words in error["message"] and "--tool-call-parser" in error["message"]


async def test_tools_that_are_not_called_need_no_parser(server: Server) -> None:
    assert (await server.chat(tools=[NOW], tool_choice="none"))["choices"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (ParserNames("nope"), "--tool-call-parser nope: vLLM"),
        (ParserNames(None, "nope"), "--reasoning-parser nope: vLLM"),
        (ParserNames(None, "mistral"), "--reasoning-parser mistral cannot be used"),
    ],
)
async def test_a_parser_that_cannot_be_had_ends_the_start(
    speaker: Speaker, names: ParserNames, words: str
) -> None:
    renderer = await Renderer.load(speaker.model_dir)
    with pytest.raises(StartError) as caught:
        load_parsers(names, renderer.tokenizer, speaker.model_dir)
    renderer.close()
    assert caught.value.message.startswith(words) and "\n" not in caught.value.message
    assert names.tool_call is None or "hermes" in caught.value.message


async def test_harmony_is_refused(speaker: Speaker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    renderer = await Renderer.load(speaker.model_dir)
    with pytest.raises(StartError, match="harmony"):
        load_parsers(ParserNames("hermes"), renderer.tokenizer, tmp_path)
    renderer.close()


async def test_answers_are_as_the_document_says(serve: Serve, speaker: Speaker) -> None:
    described = Document(document(ENDPOINTS, "1"))
    async with serve("hermes", "qwen3") as server:
        server.service.script = lambda _: speaker.say(f"<think>Hm.</think>{TWO}")
        for stream in (False, True):
            ask = {"messages": USER, "tools": TOOLS, "stream": stream}
            assert described.takes("POST", CHATS, ask)
            async with server.session.post(server.url + CHATS, json=ask) as response:
                said = await response.read()
            assert b'"name":"weather"' in said and b'"reasoning":"H' in said
            described.check(("POST", CHATS), response.status, response.headers, said)
    assert not described.takes("POST", CHATS, {"messages": USER, "tools": [{}]})


async def test_the_client_has_calls_and_reasoning(serve: Serve, speaker: Speaker) -> None:
    async with serve("hermes", "qwen3") as server, AsyncClient(server.url) as client:
        server.service.script = lambda _: speaker.say(f"<think>Hm.</think>{TWO}")
        said = await client.chat("hi", tools=TOOLS, tool_choice="auto")
        async with client.stream_chat("hi", tools=TOOLS) as stream:
            async for _ in stream:
                pass
        call = said.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "A"}')
        assert [c.function for c in stream.tool_calls] == [c.function for c in said.tool_calls]
        assert all(c.id and c.type == "function" for c in stream.tool_calls)
        assert said.reasoning == stream.reasoning == "Hm."
        assert said.usage is not None and said.usage.completion_tokens_details is not None
        assert said.usage.completion_tokens_details.reasoning_tokens == 3
        assert stream.finish_reason == said.finish_reason == "tool_calls"
        # What the model said goes back as it came, with what its tool found.
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        history = [*USER, msgspec.to_builtins(said.message), result]
        again = await client.chat(history, tools=TOOLS, return_prompt_text=True)
        assert again.prompt_text is not None
        assert "weatherA" in again.prompt_text
        assert again.prompt_text.endswith("<tool>rain<assistant>")
