"""`/v1/responses`, whole and streamed: what is repeated, items and events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.canned import say, token
from tests.api.conftest import Serve, Server
from tests.api.parsed import Speaker
from tests.api.responding import NOW, events_of, joined, nameless, names, respond
from tinfer.api.service import Delta

LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TWO_CALLS = (
    'Sure.<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    f"{CALL}"
)
THOUGHT = "<think>Hm, 好.</think>"


async def test_a_whole_response(server: Server) -> None:
    said = await respond(server, max_output_tokens=9, metadata={"a": "b"}, user="me", store=True)
    (item,) = said.pop("output")
    assert item["id"].startswith("msg_")
    assert nameless(item) == {
        **{"type": "message", "role": "assistant", "status": "completed"},
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": None}],
    }
    assert said["id"].startswith("resp_") and said["created_at"] > 0
    prompt = "<user>hi<assistant>"
    assert said["usage"] == {
        **{"input_tokens": len(prompt), "output_tokens": 5, "total_tokens": len(prompt) + 5},
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    repeated = {
        **{"object": "response", "status": "completed", "model": "tiny", "error": None},
        **{"incomplete_details": None, "instructions": None, "max_output_tokens": 9},
        **{"temperature": 1.0, "top_p": 1.0, "tools": [], "tool_choice": "none", "text": None},
        **{"parallel_tool_calls": True, "metadata": {"a": "b"}, "user": "me", "top_logprobs": None},
        **{"truncation": "disabled", "background": False, "service_tier": "auto"},
        **{"previous_response_id": None, "reasoning": None},
    }
    assert {name: said[name] for name in repeated} == repeated
    assert server.service.generations[0].sampling.max_tokens == 9


async def test_what_is_asked_is_repeated(server: Server) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be brief.",
        "tools": [NOW],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "service_tier": "flex",
        "max_tool_calls": 3,
        **{"temperature": 0.5, "top_p": 0.25, "presence_penalty": 1.0, "frequency_penalty": -1.0},
    }
    said = await respond(server, **asked)
    (tool,) = said.pop("tools")
    assert tool == {**NOW, "description": None, "parameters": None, "strict": None}
    assert {name: said[name] for name in asked if name != "tools"} == {
        name: value for name, value in asked.items() if name != "tools"
    }


async def test_fields_reach_the_sampling(server: Server) -> None:
    server.service.script = lambda _: say("A", logprobs=[token("A", top=1)])
    await respond(
        server,
        **{"temperature": 0.5, "top_k": 3, "seed": 4, "stop": ["x"], "min_p": 0.1, "priority": 7},
        **{"repetition_penalty": 1.5, "ignore_eos": True, "logit_bias": {"5": 1}, **LOGPROBS},
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        tinfer={"expected_output_tokens": 12},
    )
    (generation,) = server.service.generations
    spec = generation.sampling
    assert (spec.temperature, spec.top_k, spec.seed, spec.stop) == (0.5, 3, 4, ["x"])
    assert (spec.min_p, spec.repetition_penalty, spec.ignore_eos) == (0.1, 1.5, True)
    assert (spec.logit_bias, spec.logprobs) == ({5: 1.0}, 1)
    assert spec.structured is not None and spec.structured.json == '{"type":"object"}'
    assert (generation.hints.priority, generation.hints.expected_output_tokens) == (7, 12)


@pytest.mark.parametrize(
    ("form", "json_object"), [({"type": "text"}, None), ({"type": "json_object"}, True)]
)
async def test_forms_without_a_schema(
    server: Server, form: dict[str, str], json_object: bool | None
) -> None:
    await respond(server, text={"format": form})
    structured = server.service.generations[0].sampling.structured
    assert (structured and structured.json_object) is json_object


async def test_a_streamed_response(server: Server) -> None:
    events = await events_of(server)
    assert names(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    created, last = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert joined(events, "output_text") == events[-4]["text"] == "Hello"
    item_ids = {event["item_id"] for event in events if "item_id" in event}
    assert item_ids == {last["output"][0]["id"]} == {events[2]["item"]["id"]}
    assert last["output"][0] == events[-2]["item"]
    whole = await respond(server)
    timeless = {"created_at": 0}
    assert nameless(last) | timeless == nameless(whole) | timeless


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off(server: Server, stream: bool) -> None:
    server.service.script = lambda _: say("Hel", "lo", reason="length")
    if stream:
        events = await events_of(server)
        assert events[-1]["type"] == "response.incomplete"
        said = events[-1]["response"]
        assert events[-2]["item"]["status"] == "incomplete"
    else:
        said = await respond(server)
    assert said["status"] == "incomplete"
    assert said["incomplete_details"] == {"reason": "max_output_tokens"}
    assert said["output"][0]["status"] == "incomplete"
    assert said["output"][0]["content"][0]["text"] == "Hello"


async def test_an_answer_without_text_has_no_item(server: Server) -> None:
    server.service.script = lambda _: [Delta("", [257], finish_reason="stop")]
    assert (await respond(server))["output"] == []
    events = await events_of(server)
    assert names(events) == ["created", "in_progress", "completed"]
    assert events[-1]["response"]["usage"]["output_tokens"] == 1


async def test_logprobs_go_with_the_text(server: Server) -> None:
    """A token without text of its own waits for the next text, or for the end."""
    half, end = token("x", token_id=1, top=1), token("e", token_id=257, top=1)
    server.service.script = lambda _: [
        Delta("", [1], [half]),
        Delta("好", [2], [token("好", token_id=2, top=1)]),
        Delta("", [257], [end], finish_reason="stop"),
    ]
    whole = (await respond(server, **LOGPROBS))["output"][0]["content"][0]["logprobs"]
    events = await events_of(server, **LOGPROBS)
    (delta,) = [event for event in events if event["type"].endswith("text.delta")]
    (done,) = [event for event in events if event["type"].endswith("text.done")]
    assert [one["token"] for one in whole] == ["x", "好", "e"]
    assert delta["logprobs"] == whole[:2] and done["logprobs"] == whole
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole
    assert len(whole[0]["top_logprobs"]) == 1
    assert events[-1]["response"]["top_logprobs"] == 1


# --- parsers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 1000])
async def test_calls_are_items(serve: Serve, speaker: Speaker, step: int) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(TWO_CALLS, step=step)
        whole = await respond(server, tools=[WEATHER, NOW])
        events = await events_of(server, tools=[WEATHER, NOW])
        alone = await respond(server, tools=[WEATHER, NOW], parallel_tool_calls=False)
        streamed = await events_of(server, tools=[WEATHER, NOW], parallel_tool_calls=False)
    message, weather, now = whole["output"]
    assert message["content"][0]["text"] == "Sure."
    assert (weather["type"], weather["name"], weather["status"]) == (
        *("function_call", "weather", "completed"),
    )
    assert json.loads(weather["arguments"]) == {"city": "Köln"}
    assert weather["id"].startswith("fc_") and weather["call_id"]
    assert weather["call_id"] != now["call_id"]
    assert nameless(events[-1]["response"]["output"]) == nameless(whole["output"])
    assert names(events)[2:] == [
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert joined(events, "function_call_arguments") == weather["arguments"] + now["arguments"]
    dones = [event for event in events if event["type"].endswith("item.done")]
    assert [event["output_index"] for event in dones] == [0, 1, 2]
    assert [item["type"] for item in alone["output"]] == ["message", "function_call"]
    assert nameless(streamed[-1]["response"]["output"]) == nameless(alone["output"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "now"}])
async def test_a_tool_that_must_be_called_becomes_a_grammar(
    serve: Serve, speaker: Speaker, choice: Any
) -> None:
    async with serve() as server:
        server.service.script = lambda _: speaker.say(CALL)
        said = await respond(server, tools=[WEATHER, NOW], tool_choice=choice)
    assert said["tool_choice"] == choice
    assert [item["type"] for item in said["output"]] == ["function_call"]
    structured = server.service.generations[0].sampling.structured
    assert structured is not None and structured.structural_tag is not None
    assert ("weather" in structured.structural_tag) == (choice == "required")


@pytest.mark.parametrize("step", [1, 4, 1000])
async def test_reasoning_is_an_item(serve: Serve, speaker: Speaker, step: int) -> None:
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say(f"{THOUGHT}Yes.", step=step)
        whole = await respond(server, reasoning={"effort": "high"})
        events = await events_of(server)
    thought, message = whole["output"]
    assert nameless(thought) == {
        **{"type": "reasoning", "summary": [], "encrypted_content": None, "status": "completed"},
        "content": [{"type": "reasoning_text", "text": "Hm, 好."}],
    }
    assert thought["id"].startswith("rs_")
    assert message["content"][0]["text"] == "Yes."
    assert names(events)[2:8] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
    ]
    assert joined(events, "reasoning_text") == "Hm, 好."
    assert nameless(events[-1]["response"]["output"]) == nameless(whole["output"])


async def test_reasoning_tokens_are_counted(serve: Serve, speaker: Speaker) -> None:
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say("<think>Hm.</think>Yes.")
        whole = await respond(server)
        events = await events_of(server)
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": len("Hm.")}
    assert events[-1]["response"]["usage"] == whole["usage"]


async def test_reasoning_can_be_hidden_with_its_tokens(serve: Serve, speaker: Speaker) -> None:
    ask: dict[str, Any] = {"include_reasoning": False, **LOGPROBS}
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say(f"{THOUGHT}Yes.", logprobs=True)
        whole = await respond(server, **ask)
        events = await events_of(server, **ask)
    assert "Hm" not in json.dumps([whole, events])
    for said in (whole, events[-1]["response"]):
        (item,) = said["output"]
        assert item["content"][0]["text"] == "Yes." and item["content"][0]["logprobs"] is None


async def test_the_template_is_told(serve: Serve, speaker: Speaker) -> None:
    asked = {"chat_template_kwargs": {"x": 1}, "reasoning": {"effort": "none"}}
    async with serve(None, "deepseek_r1") as server:
        server.service.script = lambda _: speaker.say("{}")
        await respond(server, **asked, text={"format": {"type": "json_object"}})
    structured = server.service.generations[0].sampling.structured
    assert structured is not None and structured.template_kwargs is not None
    told = json.loads(structured.template_kwargs)
    assert told == {
        **{"x": 1, "reasoning_effort": "none", "enable_thinking": False},
        **{"add_generation_prompt": True, "continue_final_message": False},
    }
