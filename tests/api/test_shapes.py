"""Whole responses: every field of `vllm serve` 0.32, and the requests that reach the service."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.canned import BOS, say, token
from tests.api.conftest import Server
from tinfer.api.service import Delta

NO_DETAILS = {"prompt_tokens_details": None, "completion_tokens_details": None}
# What vLLM sends in every whole response and no parameter of ours fills.
CONSTANT: dict[str, Any] = {
    "service_tier": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": None,
}


async def test_completion(server: Server) -> None:
    said = await server.complete()
    assert said.pop("id").startswith("cmpl-") and isinstance(said.pop("created"), int)
    assert said == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": "Hello",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5, **NO_DETAILS},
        "system_fingerprint": "fp",
        **CONSTANT,
    }
    (generation,) = server.service.generations
    assert generation.prompt_token_ids[0] == BOS
    assert generation.sampling.max_tokens == 16


async def test_chat(server: Server) -> None:
    said = await server.chat()
    assert said.pop("id").startswith("chatcmpl-") and isinstance(said.pop("created"), int)
    assert said == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "usage": {"prompt_tokens": 19, "total_tokens": 24, "completion_tokens": 5, **NO_DETAILS},
        "system_fingerprint": "fp",
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        **CONSTANT,
    }
    (generation,) = server.service.generations
    assert generation.sampling.max_tokens == 100 - 19


async def test_prompts_times_n_in_index_order(server: Server) -> None:
    server.service.script = lambda index: say(f"answer {index}", stop_reason=index)
    said = await server.complete(prompt=["a", "bc"], n=2, seed=40, max_tokens=7)
    assert [(c["index"], c["text"], c["stop_reason"]) for c in said["choices"]] == [
        (i, f"answer {i}", i) for i in range(4)
    ]
    assert [len(g.prompt_token_ids) for g in server.service.generations] == [2, 2, 3, 3]
    assert [g.sampling.seed for g in server.service.generations] == [40, 41, 40, 41]
    assert said["usage"]["prompt_tokens"] == 5
    assert said["usage"]["completion_tokens"] == 4 * len("answer 0")


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("ab", [[BOS, 64 + 1, 64 + 2]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_kinds_of_prompts(server: Server, prompt: Any, want: list[list[int]]) -> None:
    await server.complete(prompt=prompt)
    got = [g.prompt_token_ids for g in server.service.generations]
    assert [len(ids) for ids in got] == [len(ids) for ids in want]
    if not isinstance(prompt, str):
        assert got == want


async def test_special_tokens_can_be_left_out(server: Server) -> None:
    await server.complete(add_special_tokens=False)
    assert BOS not in server.service.generations[0].prompt_token_ids


async def test_token_ids_on_request(server: Server) -> None:
    (choice,) = (await server.complete(return_token_ids=True))["choices"]
    assert choice["token_ids"] == [ord(c) for c in "Hello"]
    assert choice["prompt_token_ids"] == server.service.generations[0].prompt_token_ids
    said = await server.chat(return_token_ids=True, return_prompt_text=True)
    assert said["choices"][0]["token_ids"] == [ord(c) for c in "Hello"]
    assert said["prompt_token_ids"] == server.service.generations[1].prompt_token_ids
    assert said["prompt_text"] == "<user>hi<assistant>"


def with_logprobs(index: int) -> list[Any]:
    prompt = [None, token("p", token_id=112)]
    first = Delta("A", [65], [token("A", top=2)], prompt_logprobs=prompt)
    return [first, Delta("BC", [66, 67], [token("B"), token("C")], finish_reason="length")]


async def test_completion_logprobs(server: Server) -> None:
    server.service.script = with_logprobs
    (choice,) = (await server.complete(prompt=[1, 2], logprobs=2, prompt_logprobs=0))["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["A", "B", "C"],
        "top_logprobs": [{"A": -0.5, "t0": -0.1, "t1": -1.1}, {"B": -0.5}, {"C": -0.5}],
    }
    assert choice["prompt_logprobs"] == [
        None,
        {"112": {"logprob": -0.5, "rank": 2, "decoded_token": "p"}},
    ]
    sampling = server.service.generations[0].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 0)


async def test_chat_logprobs(server: Server) -> None:
    server.service.script = with_logprobs
    said = await server.chat(logprobs=True, top_logprobs=1, prompt_logprobs=0)
    content = said["choices"][0]["logprobs"]["content"]
    shown = {"token": "A", "logprob": -0.5, "bytes": [65]}
    assert content[0] == {**shown, "top_logprobs": [shown]}
    assert len(content) == 3 and len(said["prompt_logprobs"]) == 2
    assert server.service.generations[0].sampling.logprobs == 1


async def test_echo_repeats_the_prompt(server: Server) -> None:
    server.service.script = with_logprobs
    (choice,) = (await server.complete(prompt="p", echo=True, logprobs=0))["choices"]
    assert choice["text"] == "pABC"
    assert choice["logprobs"]["tokens"] == ["<s>", "p", "A", "B", "C"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 3, 4, 5, 6]
    assert server.service.generations[0].sampling.prompt_logprobs == 0


async def test_echo_of_nothing_but_the_prompt(server: Server) -> None:
    server.service.script = with_logprobs
    body = {"prompt": [1, 2], "echo": True, "max_tokens": 0, "logprobs": 0}
    (choice,) = (await server.complete(**body))["choices"]
    assert choice["text"] == await _decoded([1, 2])
    assert len(choice["logprobs"]["tokens"]) == 2
    assert server.service.generations[0].sampling.max_tokens == 1
    events = await server.stream("/v1/completions", **body)
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
    assert sum(len(e["choices"][0]["logprobs"]["tokens"]) for e in events) == 2


async def _decoded(token_ids: list[int]) -> str:
    """The byte alphabet puts the printable characters first, `!` at 0."""
    return "".join(chr(ord("!") + i) for i in token_ids)


@pytest.mark.parametrize("options", [{"enable_prompt_tokens_details": True}], indirect=True)
async def test_cached_tokens_count_each_prompt_once(server: Server) -> None:
    server.service.script = lambda index: say("x", cached_tokens=(index // 2 + 1) * 10)
    said = await server.complete(prompt=["a", "b"], n=2)
    assert said["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 30,
        "created_cache_tokens": None,
        "multimodal_tokens": None,
    }
    events = await server.stream(
        "/v1/completions", prompt="a", stream_options={"include_usage": True}
    )
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 30}


async def test_ids_of_the_client(server: Server) -> None:
    assert (await server.complete(request_id="mine"))["id"] == "cmpl-mine"
    headers = {"X-Request-Id": "theirs"}
    body = {"prompt": "a", "request_id": "mine"}
    async with server.session.post(
        server.url + "/v1/completions", json=body, headers=headers
    ) as response:
        assert (await response.json())["id"] == "cmpl-theirs"


async def test_any_served_name_is_the_first_in_answers(server: Server) -> None:
    for name in ("tiny", "org/tiny", "", None):
        assert (await server.complete(model=name))["model"] == "tiny"


async def test_role_of_a_continued_message(server: Server) -> None:
    said = await server.chat(
        messages=[{"role": "user", "content": "hi"}, {"role": "bard", "content": "O, "}],
        add_generation_prompt=False,
        continue_final_message=True,
        return_prompt_text=True,
    )
    assert said["choices"][0]["message"]["role"] == "bard"
    assert said["prompt_text"] == "<user>hi\n<bard>O, "


@pytest.mark.parametrize(
    "options", [{"default_chat_template_kwargs": {"shout": "!"}}], indirect=True
)
async def test_template_kwargs_of_the_server_and_the_request(server: Server) -> None:
    said = await server.chat(return_prompt_text=True)
    assert said["prompt_text"].endswith("<assistant>!")
    said = await server.chat(return_prompt_text=True, chat_template_kwargs={"shout": "?"})
    assert said["prompt_text"].endswith("<assistant>?")


async def test_max_completion_tokens_wins(server: Server) -> None:
    await server.chat(max_tokens=3, max_completion_tokens=4)
    assert server.service.generations[0].sampling.max_tokens == 4


async def test_models(server: Server) -> None:
    async with server.session.get(server.url + "/v1/models") as response:
        listed = await response.json()
    assert [m["id"] for m in listed["data"]] == ["tiny", "org/tiny"]
    async with server.session.get(server.url + "/v1/models/org/tiny") as response:
        card = await response.json()
    (permission,) = card.pop("permission")
    assert permission["object"] == "model_permission"
    assert card == {
        "id": "org/tiny",
        "object": "model",
        "created": 7,
        "owned_by": "tinfer",
        "root": "/models/tiny",
        "parent": None,
        "max_model_len": 100,
    }


async def test_health_and_reports(server: Server) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        async with server.session.request(method, server.url + path) as response:
            assert (response.status, await response.text()) == (200, "")
    server.service.health = (False, "draining")
    async with server.session.get(server.url + "/health") as response:
        assert (response.status, await response.text()) == (503, "draining")
    for path, want in (
        ("/version", {"version": "1.2.3"}),
        ("/debug/ledger", {"open_requests": 0}),
        ("/debug/state", {"workers": []}),
    ):
        async with server.session.get(server.url + path) as response:
            assert await response.json() == want
