"""`/tokenize` and `/detokenize`: vLLM's bodies for both forms, its refusals, and one way of
tokenising for these and for what is generated from."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.api.canned import BOS, VOCAB_SIZE
from tests.api.conftest import Server
from tinfer.api.fields import IGNORED_HEADER

HI = [{"role": "user", "content": "hi"}]
# The byte tokenizer's vocabulary: what is printable stands for itself.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NAMES = {" ": "\u0120", "\n": "\u010a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def ids(text: str) -> list[int]:
    """The tokens of an ASCII text, one per character."""
    return [ALPHABET.index(NAMES.get(char, char)) for char in text]


A, PROMPT_OF_HI = ids("a"), ids("<user>hi<assistant>")


async def said(server: Server, path: str, **body: Any) -> Any:
    status, answer, _ = await server.post(path, **body)
    assert status == 200, answer
    assert server.service.generations == []
    return answer


async def test_a_prompt(server: Server) -> None:
    answer = await said(server, "/tokenize", prompt="a b")
    assert answer == {
        "count": 4,
        "max_model_len": 100,
        "tokens": [BOS, *ids("a b")],
        "token_strs": None,
    }
    assert list(answer) == ["count", "max_model_len", "tokens", "token_strs"]


async def test_token_strings_are_those_of_the_vocabulary(server: Server) -> None:
    answer = await said(server, "/tokenize", model="tiny", prompt="a b", return_token_strs=True)
    assert answer["token_strs"] == ["<s>", "a", NAMES[" "], "b"]


@pytest.mark.parametrize(("special", "tokens"), [(None, [BOS, *A]), (True, [BOS, *A]), (False, A)])
async def test_special_tokens_of_a_prompt(
    server: Server, special: bool | None, tokens: list[int]
) -> None:
    answer = await said(server, "/tokenize", prompt="a", add_special_tokens=special)
    assert answer["tokens"] == tokens


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, PROMPT_OF_HI),
        ({"add_generation_prompt": True}, PROMPT_OF_HI),
        ({"add_generation_prompt": False}, ids("<user>hi")),
        ({"add_special_tokens": True}, [BOS, *PROMPT_OF_HI]),
        ({"chat_template_kwargs": {"shout": "!"}}, [*PROMPT_OF_HI, *ids("!")]),
        ({"tools": []}, PROMPT_OF_HI),
    ],
)
async def test_a_chat(server: Server, more: dict[str, Any], tokens: list[int]) -> None:
    answer = await said(server, "/tokenize", messages=HI, **more)
    assert (answer["tokens"], answer["count"]) == (tokens, len(tokens))


async def test_a_chat_that_goes_on_with_its_last_message(server: Server) -> None:
    answer = await said(
        server,
        "/tokenize",
        messages=[*HI, {"role": "assistant", "content": "yo"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert answer["tokens"] == ids("<user>hi\n<assistant>yo")


async def test_a_chat_has_the_tokens_that_an_answer_is_generated_from(server: Server) -> None:
    answer = await said(server, "/tokenize", messages=HI)
    chat = await server.chat(return_token_ids=True)
    assert answer["tokens"] == chat["prompt_token_ids"]


async def test_nothing_is_too_long_to_be_counted(server: Server) -> None:
    text = "x" * 1000
    assert (await said(server, "/tokenize", prompt=text))["count"] == 1001
    chat = [{"role": "user", "content": text}]
    assert (await said(server, "/tokenize", messages=chat))["count"] == 1017


@pytest.mark.parametrize(
    "options", [{"trust_request_chat_template": True}], indirect=True, ids=["trusting"]
)
async def test_tools_reach_the_template_as_in_vllm(server: Server) -> None:
    body = {"messages": HI, "chat_template": "{{ tools | tojson }}"}
    rare = {**TOOL, "defer_loading": True}
    answer = await said(server, "/tokenize", **body, tools=[TOOL, rare])
    assert answer["tokens"] == ids(
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": '
        '{"type": "object"}}}, {"type": "function", "function": {"name": "f", "description": null, '
        '"parameters": {"type": "object"}, "defer_loading": true}, "defer_loading": true}]'
    )
    answer = await said(server, "/tokenize", **body, tools=[], chat_template_kwargs={"tools": [{}]})
    assert answer["tokens"] == ids("[{}]")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (ids("a b"), "a b"),
        ([BOS, *A], "<s>a"),
        ([VOCAB_SIZE, *A, 2**32 - 1], "a"),
    ],
)
async def test_detokenize(server: Server, tokens: list[int], text: str) -> None:
    assert await said(server, "/detokenize", tokens=tokens) == {"prompt": text}


async def test_there_and_back(server: Server) -> None:
    text = "Straße 東京 \U0001f600\n"
    tokens = (await said(server, "/tokenize", prompt=text, add_special_tokens=False))["tokens"]
    assert await said(server, "/detokenize", tokens=tokens) == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": None}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, 400,
         "continue_final_message"),
        ("/tokenize", {"messages": HI, "tools": [{"type": "function"}]}, 400,
         "tools[0].function"),
        ("/tokenize", {"messages": HI, "mm_processor_kwargs": {"a": 1}}, 400,
         "mm_processor_kwargs"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**32]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)  # fmt: skip
async def test_refused(
    server: Server, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    got, error = await server.refused(path, **body)
    assert (got, error["param"]) == (status, param)


async def test_unknown_fields_are_named_in_a_header(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        status, _, headers = await server.post(path, **body, surprise=1)
        assert (status, headers[IGNORED_HEADER]) == (200, "surprise")
