"""Prompts and chats as token ids, with a tokenizer of one token per byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.canned import BOS, TEMPLATE, write_model_dir
from tinfer.api import render
from tinfer.api.messages import conversation, wants_parts
from tinfer.api.render import ChatOptions, Renderer
from tinfer.api.schemas import Message
from tinfer.errors import InvalidRequest, Overloaded, StartError

PARTS_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
)
HI = [Message("user", "hi")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def renderer(model_dir: Path) -> AsyncIterator[Renderer]:
    loaded = await Renderer.load(model_dir, max_model_len=100)
    yield loaded
    loaded.close()


async def test_encode_ignores_the_truncation_of_the_file(renderer: Renderer) -> None:
    prompt = await renderer.encode("abcdefgh")
    assert prompt.token_ids[0] == BOS and len(prompt.token_ids) == 9
    assert prompt.text == "abcdefgh"
    bare = await renderer.encode("abcdefgh", add_special_tokens=False)
    assert bare.token_ids == prompt.token_ids[1:]
    assert await renderer.decode(prompt.token_ids) == "<s>abcdefgh"


async def test_text_that_cannot_fit_is_refused_unread(renderer: Renderer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await renderer.encode("x" * 10_000)
    assert caught.value.param == "prompt"


async def test_chat_is_rendered_then_tokenised_without_specials(renderer: Renderer) -> None:
    chat = [Message("system", "s"), Message("user", ["a", {"type": "text", "text": "b"}])]
    prompt = await renderer.render_chat(chat, ChatOptions())
    assert prompt.text == "<system>s\n<user>a\nb<assistant>"
    assert BOS not in prompt.token_ids
    with_bos = await renderer.render_chat(chat, ChatOptions(add_special_tokens=True))
    assert with_bos.token_ids == [BOS, *prompt.token_ids]


async def test_chat_options_reach_the_template(renderer: Renderer) -> None:
    chat = [*HI, Message("assistant", "yes, I")]
    cont = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert (await renderer.render_chat(chat, cont)).text == "<user>hi\n<assistant>yes, I"
    shout = ChatOptions(kwargs={"shout": "!", "unused": 1})
    assert (await renderer.render_chat(HI, shout)).text == "<user>hi<assistant>!"
    own = ChatOptions(template="{{ bos_token }}{{ messages[0].content }}")
    assert (await renderer.render_chat(HI, own)).text == "<s>hi"


@pytest.mark.parametrize(
    ("messages", "options", "param", "reason"),
    [
        ([], ChatOptions(), "messages", "at least one"),
        (HI, ChatOptions(template="{{ raise_exception('no thanks') }}"), "messages", "no thanks"),
        (HI, ChatOptions(template="{% if %}"), "messages", "template failed"),
        (HI, ChatOptions(template="{{ messages.__class__.__mro__ }}"), "messages", "unsafe"),
        (HI, ChatOptions(kwargs={"tokenize": True}), "chat_template_kwargs", "tokenize"),
        (
            [Message("user", ["a", {"type": "image_url", "image_url": {}}])],
            ChatOptions(),
            "messages[0].content[1].type",
            "text",
        ),
        (
            [Message("user", [{"type": "text", "text": 3}])],
            ChatOptions(),
            "messages[0].content[0]",
            "string",
        ),
    ],
)
async def test_chats_that_cannot_be_rendered(
    renderer: Renderer, messages: list[Message], options: ChatOptions, param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        await renderer.render_chat(messages, options)
    assert caught.value.param == param


async def test_a_model_without_template_can_be_given_one(tmp_path: Path) -> None:
    write_model_dir(tmp_path, template=None)
    bare = await Renderer.load(tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await bare.render_chat(HI, ChatOptions())
    bare.close()
    path = tmp_path / "t.jinja"
    path.write_text("file:{{ messages[0].content }}")
    for given, want in ((str(path), "file:hi"), ("inline:{{ messages[0].content }}", "inline:hi")):
        loaded = await Renderer.load(tmp_path, given)
        assert (await loaded.render_chat(HI, ChatOptions())).text == want
        loaded.close()
    with pytest.raises(StartError):
        await Renderer.load(tmp_path, "no-such-file")


async def test_a_directory_without_tokenizer_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="tokenizer.json"):
        await Renderer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match="cannot load"):
        await Renderer.load(tmp_path)


async def test_waiting_prompts_are_bounded(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "MAX_PENDING", 2)
    results = await asyncio.gather(
        *(renderer.encode("a") for _ in range(3)), return_exceptions=True
    )
    assert [isinstance(r, Overloaded) for r in results] == [False, False, True]
    assert len((await renderer.encode("a")).token_ids) == 2


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (TEMPLATE, False),
        (PARTS_TEMPLATE, True),
        ("{% set c = messages[0].content %}{% for p in c %}{% endfor %}", True),
        ("{% macro r(content) %}{% for p in content %}{% endfor %}{% endmacro %}", True),
        ("{% macro r(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ r(m.content) }}", True),
        ("{% macro r(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ r(m.other) }}", False),
        ("{% for m in messages %}{% for p in m.content|list %}{% endfor %}{% endfor %}", True),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", False),
        ("{% generation %}{% for p in messages[0].content %}{% endfor %}{% endgeneration %}", True),
        ("{% if %}", False),
    ],
)  # fmt: skip
def test_templates_that_walk_over_parts_are_told_apart(template: str, want: bool) -> None:
    assert wants_parts(template) is want


def test_parts_for_templates_that_want_them() -> None:
    chat = [
        Message("user", "a"),
        Message("user", ["b", {"type": "text", "text": "c"}, {"type": "text", "text": None}]),
        Message("assistant", None),
        Message("tool", [{"type": "text", "text": "d"}], tool_call_id="i"),
    ]

    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    assert conversation(chat, PARTS_TEMPLATE) == [
        {"role": "user", "content": [part("a")]},
        {"role": "user", "content": [part("b"), part("c")]},
        {"role": "assistant", "content": []},
        {"role": "tool", "content": "d", "tool_call_id": "i"},
    ]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "i", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "want"),
    [('{"x": 1}', {"x": 1}), ({"x": 1}, {"x": 1}), ("{", {}), ("[]", {}), (None, {}), ("", {})],
)
def test_past_tool_calls_have_arguments_as_objects(arguments: Any, want: dict[str, int]) -> None:
    chat = [Message("assistant", None, name="n", tool_calls=[call(arguments)], reasoning="r")]
    (said,) = conversation(chat, TEMPLATE)
    assert said["tool_calls"] == [call(want)]
    assert (said["name"], said["reasoning"], said["reasoning_content"]) == ("n", "r", "r")


@pytest.mark.parametrize("bad", [{"type": "custom", "function": {}}, {"function": 3}])
def test_other_tool_calls_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        conversation([Message("assistant", None, tool_calls=[bad])], TEMPLATE)
    assert caught.value.param == "messages[0].tool_calls"


def test_developer_messages_become_system_ones_unless_known() -> None:
    alone = [Message("developer", "d"), Message("user", "u")]
    assert [m["role"] for m in conversation(alone, TEMPLATE)] == ["system", "user"]
    scattered = [Message("system", "s"), Message("user", "u"), Message("developer", "d")]
    merged = conversation(scattered, TEMPLATE)
    assert [(m["role"], m["content"]) for m in merged] == [("system", "s\n\nd"), ("user", "u")]
    knows = TEMPLATE + "{% if messages[0].role == 'developer' %}{% endif %}"
    assert conversation(alone, knows)[0]["role"] == "developer"
