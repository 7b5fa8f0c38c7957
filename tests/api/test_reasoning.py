"""Reasoning told from the answer by vLLM's own parsers; parsers that break; what is echoed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.canned import say, token
from tests.api.conftest import OPTIONS, Serve, Server, canned_server
from tests.api.parsed import TOOLS, USER, Broken, Speaker, reassembled, whole
from tinfer.chat.answer import Answer
from tinfer.chat.asking import Asker, Wishes
from tinfer.chat.conversation import Conversation

CHATS = "/v1/chat/completions"
THOUGHT = "<think>Hm, 好.</think>"
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize(
    ("reasoning", "text"),
    [
        ("qwen3", f"{THOUGHT}The answer."),
        ("qwen3", THOUGHT),
        ("qwen3", f"{THOUGHT}{CALL}"),
        ("deepseek_r1", f"{THOUGHT}The answer."),
        ("deepseek_r1", f"{THOUGHT}Well. {CALL}"),
    ],
)
async def test_reasoning_has_a_field_of_its_own(
    serve: Serve, speaker: Speaker, reasoning: str, text: str, step: int
) -> None:
    async with serve("hermes", reasoning) as server:
        server.service.script = lambda _: speaker.say(text, step=step)
        said = whole(await server.chat(tools=TOOLS))
        streamed = reassembled(await server.stream(CHATS, messages=USER, tools=TOOLS))
    assert said["reasoning"] == streamed["reasoning"] == "Hm, 好."
    assert said["content"].strip() == streamed["content"].strip()
    assert "<" not in said["content"]
    assert said["calls"] == streamed["calls"] == ([("now", "{}")] if CALL in text else [])


async def test_a_chat_in_the_terminal_has_it_apart(serve: Serve, speaker: Speaker) -> None:
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say(f"{THOUGHT}The answer.", step=1)
        answer, shown, thought = Answer("hi"), list[str](), list[str]()
        asker = Asker(server.url, None, Wishes(), shown.append)
        await asker.fill(answer, Conversation(), shown.append, thought.append)
    assert answer.reasoning == "".join(thought) == "Hm, 好."
    assert answer.text == "".join(shown) and answer.text.strip() == "The answer."


async def test_reasoning_tokens_are_counted(serve: Serve, speaker: Speaker) -> None:
    want = {"reasoning_tokens": len("Hm.")}
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say("<think>Hm.</think>Yes.")
        said = await server.chat()
        assert said["usage"]["completion_tokens_details"] == want
        ask: dict[str, Any] = {"messages": USER, "stream_options": {"include_usage": True}}
        events = await server.stream(CHATS, **ask)
        assert events[-1]["usage"]["completion_tokens_details"] == want
        ask["stream_options"]["continuous_usage_stats"] = True
        events = await server.stream(CHATS, **ask)
    counts = [e["usage"]["completion_tokens_details"]["reasoning_tokens"] for e in events]
    assert counts == sorted(counts) and counts[-1] == want["reasoning_tokens"] > counts[1]


async def test_reasoning_can_be_hidden_with_its_tokens(serve: Serve, speaker: Speaker) -> None:
    ask: dict[str, Any] = {
        **{"include_reasoning": False, "logprobs": True, "return_token_ids": True},
        "structured_outputs": {"regex": "a+"},
    }
    async with serve(None, "qwen3") as server:
        server.service.script = lambda _: speaker.say(f"{THOUGHT}Yes.", logprobs=True)
        said = await server.chat(**ask)
        events = await server.stream(CHATS, messages=USER, **ask)
    (choice,) = said["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("Yes.", None)
    assert choice["logprobs"] is choice["token_ids"] is None
    assert (reassembled(events)["content"], reassembled(events)["reasoning"]) == ("Yes.", "")
    assert "Hm" not in json.dumps(events)
    # Nobody is to see it, so there is to be none.
    structured = server.service.generations[0].sampling.structured
    assert structured is not None and structured.reasoning_ended is True


@pytest.mark.parametrize(
    ("prompt", "ended"), [("hi", False), ("<think>a</think>hi", True), ("<think>hi", False)]
)
async def test_a_grammar_begins_where_reasoning_ends(
    serve: Serve, speaker: Speaker, prompt: str, ended: bool
) -> None:
    kwargs = {"enable_thinking": True, "x": [1]}
    async with serve(None, "deepseek_r1", default_chat_template_kwargs={"y": 2}) as server:
        server.service.script = lambda _: speaker.say(f"{THOUGHT}[]")
        said = await server.chat(
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_object"},
            chat_template_kwargs=kwargs,
        )
    assert whole(said)["content"] == "[]"
    structured = server.service.generations[0].sampling.structured
    assert structured is not None and structured.json_object is True
    assert structured.reasoning_ended is ended
    assert structured.template_kwargs is not None
    told = json.loads(structured.template_kwargs)
    assert told == {
        **{"y": 2, "enable_thinking": True, "x": [1]},
        **{"add_generation_prompt": True, "continue_final_message": False},
    }


async def test_tools_and_reasoning_need_a_parser_each(serve: Serve) -> None:
    async with serve(None, "qwen3") as server:
        status, error = await server.refused(CHATS, messages=USER, tools=TOOLS)
        assert (status, error["param"]) == (400, "tool_choice")


# --- parsers that break ---------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [("a", "!", "b"), ("a", "b!"), ("!",), ("!", "")])
async def test_a_parser_that_breaks_ends_its_own_answer_only(
    speaker: Speaker, pieces: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async with canned_server(speaker.model_dir, OPTIONS, Broken()) as server:
        server.service.script = lambda _: say(*pieces)
        events = await server.stream(CHATS, messages=USER)
        assert events[-1]["error"]["code"] == 500
        assert [e["choices"][0]["delta"] for e in events[:-1]][1:] == [
            {"content": "a"} for piece in pieces[:1] if piece == "a"
        ]
        assert "the parser broke" in events[-1]["error"]["message"]
        assert "secret" not in json.dumps(events)
        status, error = await server.refused(CHATS, messages=USER)
        assert (status, error["param"]) == (500, None)
        # Told with its traceback once per answer.
        assert [r.exc_info is not None for r in caplog.records if "parser" in r.message] == [
            True
        ] * 2
        server.service.script = lambda _: say("fine")
        assert whole(await server.chat())["content"] == "fine"


# --- echo -----------------------------------------------------------------------------------------

STORY = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "Once"}, "upon"]}]


@pytest.mark.parametrize(
    ("messages", "echoed"), [(STORY, "Once\nupon"), (USER, ""), (STORY[1:], "Once\nupon")]
)
async def test_the_last_words_of_the_same_role_are_echoed(
    server: Server, messages: list[dict[str, Any]], echoed: str
) -> None:
    server.service.script = lambda i: say(f" a{i}", prompt_logprobs=[None, token("p")])
    ask: dict[str, Any] = {"messages": messages, "echo": True, "n": 2}
    ask |= {"add_generation_prompt": False, "continue_final_message": len(messages) > 1}
    if messages is USER:
        ask |= {"add_generation_prompt": True}
    said = await server.chat(**ask)
    assert [whole(said, i)["content"] for i in (0, 1)] == [f"{echoed} a0", f"{echoed} a1"]
    # As many of the prompt as were asked of the answer, as in vLLM.
    assert said["prompt_logprobs"][0] is None
    assert [g.sampling.prompt_logprobs for g in server.service.generations] == [0, 0]
    events = await server.stream(CHATS, **ask)
    assert [reassembled(events, i)["content"] for i in (0, 1)] == [f"{echoed} a2", f"{echoed} a3"]
    assert server.service.generations[-1].sampling.prompt_logprobs is None
