"""Streams: the chunks of vLLM, the same answer as without streaming, and how they fail."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.api.canned import say, token
from tests.api.conftest import Server
from tinfer.api.service import Delta
from tinfer.errors import InvalidRequest, NoWorker, Overloaded, WorkerLost

COMPLETIONS: tuple[str, Any] = ("/v1/completions", {"prompt": "ab"})
CHATS: tuple[str, Any] = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
BOTH = pytest.mark.parametrize(("path", "body"), [COMPLETIONS, CHATS])


async def test_completion_chunks(server: Server) -> None:
    events = await server.stream("/v1/completions", prompt="ab", return_token_ids=True)
    head = {k: events[0][k] for k in ("id", "created")}
    shared = {**head, "object": "text_completion", "model": "tiny"}
    empty = {"index": 0, "logprobs": None, "stop_reason": None}
    prompt = server.service.generations[0].prompt_token_ids
    assert events == [
        {
            **shared,
            "choices": [
                {
                    **empty,
                    "text": "Hel",
                    "finish_reason": None,
                    "prompt_token_ids": prompt,
                    "token_ids": [72, 101, 108],
                }
            ],
        },
        {
            **shared,
            "choices": [
                {
                    **empty,
                    "text": "lo",
                    "finish_reason": "stop",
                    "prompt_token_ids": None,
                    "token_ids": [108, 111],
                }
            ],
            "system_fingerprint": "fp",
        },
    ]


async def test_chat_chunks(server: Server) -> None:
    events = await server.stream(CHATS[0], **CHATS[1])
    head = {k: events[0][k] for k in ("id", "created")}
    shared = {**head, "object": "chat.completion.chunk", "model": "tiny"}
    empty = {"index": 0, "logprobs": None}
    assert events == [
        {
            **shared,
            "choices": [
                {**empty, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            ],
            "prompt_token_ids": None,
            "prompt_text": None,
        },
        {
            **shared,
            "choices": [
                {**empty, "delta": {"content": "Hel"}, "finish_reason": None, "token_ids": None}
            ],
        },
        {
            **shared,
            "choices": [
                {
                    **empty,
                    "delta": {"content": "lo"},
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "token_ids": None,
                }
            ],
            "system_fingerprint": "fp",
        },
    ]


@BOTH
async def test_usage_at_the_end(server: Server, path: str, body: dict[str, Any]) -> None:
    events = await server.stream(path, **body, stream_options={"include_usage": True})
    assert all("usage" not in e and "system_fingerprint" not in e for e in events[:-1])
    prompt = len(server.service.generations[0].prompt_token_ids)
    assert events[-1]["choices"] == []
    assert events[-1]["system_fingerprint"] == "fp"
    assert events[-1]["usage"] == {
        "prompt_tokens": prompt,
        "total_tokens": prompt + 5,
        "completion_tokens": 5,
    }


@BOTH
async def test_usage_all_along(server: Server, path: str, body: dict[str, Any]) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    events = await server.stream(path, **body, stream_options=usage)
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == [0] * (len(events) - 3) + [3, 5, 5]
    only = await server.stream(path, **body, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in e for e in only)


def busy(index: int) -> list[Any]:
    """Several deltas, one without text yet, logprobs throughout."""
    text = f"a{index}\u00e9\n\ndata: z"
    deltas = [Delta(c, [ord(c)], [token(c, top=1)]) for c in text]
    deltas.insert(2, Delta("", [33], [token("!")]))
    deltas[0].prompt_logprobs = [None, *[token("p")] * 2]
    deltas[-1].finish_reason = "length"
    deltas[-1].stop_reason = index
    return list(deltas)


def gathered(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream of completions, put together."""
    whole: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            seen = whole.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": {}})
            seen["text"] += choice["text"]
            seen["token_ids"] += choice["token_ids"]
            for name, values in choice["logprobs"].items():
                seen["logprobs"].setdefault(name, []).extend(values)
            seen["finish_reason"] = choice["finish_reason"]
            seen["stop_reason"] = choice["stop_reason"]
    return whole


@pytest.mark.parametrize("echo", [False, True])
async def test_streamed_completions_equal_whole_ones(server: Server, echo: bool) -> None:
    server.service.script = lambda index: busy(index % 4)
    body: dict[str, Any] = {
        "prompt": ["ab", "cd"],
        "n": 2,
        "echo": echo,
        "logprobs": 1,
        "return_token_ids": True,
    }
    streamed = gathered(await server.stream("/v1/completions", **body))
    whole = (await server.complete(**body))["choices"]
    assert sorted(streamed) == [0, 1, 2, 3]
    for choice in whole:
        assert streamed[choice["index"]] == {k: choice[k] for k in streamed[0]}


async def test_streamed_chats_equal_whole_ones(server: Server) -> None:
    server.service.script = lambda index: busy(index % 2)
    body: dict[str, Any] = {**CHATS[1], "n": 2, "logprobs": True, "top_logprobs": 2}
    events = await server.stream(CHATS[0], **body)
    whole = (await server.chat(**body))["choices"]
    assert [e["choices"][0]["delta"].get("role") for e in events[:2]] == ["assistant"] * 2
    for choice in whole:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"]
        logprobs = [entry for c in mine[1:] for entry in c["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]


MIDWAY = [
    (WorkerLost("the worker died"), "the worker died", "InternalServerError", 500),
    (NoWorker("gone"), "gone", "ServiceUnavailableError", 503),
    (InvalidRequest("bad grammar", "structured_outputs"), "bad grammar", "BadRequestError", 400),
]


@BOTH
@pytest.mark.parametrize(("error", "message", "kind", "code"), MIDWAY)
async def test_a_failure_midway_is_the_last_event(
    server: Server, path: str, body: dict[str, Any], error: Any, message: str, kind: str, code: int
) -> None:
    server.service.script = lambda index: [Delta("a", [97]), error]
    events = await server.stream(path, **body, stream_options={"include_usage": True})
    last = events[-1]["error"]
    assert (last["message"], last["type"], last["code"]) == (message, kind, code)
    assert last["param"] == getattr(error, "param", None)
    assert any(c["choices"][0].get("finish_reason") is None for c in events[:-1])


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    for error, _, kind, code in MIDWAY:
        server.service.script = lambda index, error=error: [error]  # type: ignore[misc]
        status, said = await server.refused(path, **body, stream=stream)
        assert (status, said["type"]) == (code, kind)


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_at_the_door(
    server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    server.service.script = lambda index: Overloaded("full", retry_after_s=2.5)
    status, said, headers = await server.post(path, **body, stream=stream)
    assert (status, headers["Retry-After"]) == (429, "3")
    assert said["error"]["type"] == "TooManyRequestsError"


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_of_one_sequence_cancels_the_others(server: Server, stream: bool) -> None:
    server.service.script = lambda index: (
        Overloaded("full") if index == 2 else [Delta("a", [97])] * 3
    )
    status, _ = await server.refused("/v1/completions", prompt="a", n=4, stream=stream)
    assert status == 429
    assert [s.cancelled.is_set() for s in server.service.streams] == [True, True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        [Delta("a", [97], finish_reason="error")],
        [Delta("a", [97], [token("a")])],
        [Delta("a", [97], finish_reason="stop")],
        [RuntimeError("secret path /etc")],
    ],
    ids=["error", "no finish reason", "no logprobs", "unexpected"],
)
async def test_a_broken_engine_is_a_500(server: Server, script: list[Any], stream: bool) -> None:
    server.service.script = lambda index: script
    async with server.session.post(
        server.url + "/v1/completions",
        json={"prompt": "a", "logprobs": 0, "stream": stream},
    ) as response:
        text = await response.text()
    last = [e.removeprefix("data: ") for e in text.split("\n\n") if "[DONE]" not in e and e][-1]
    error = msgspec.json.decode(last)["error"]
    assert (error["code"], error["type"]) == (500, "InternalServerError")
    assert "secret" not in text


async def test_failure_of_one_child_cancels_the_others(server: Server) -> None:
    server.service.script = lambda index: (
        [Delta("a", [97]), WorkerLost("died")] if index == 1 else say("x")
    )
    events = await server.stream("/v1/completions", prompt="a", n=3)
    assert events[-1]["error"]["message"] == "died"
    assert all(s.cancelled.is_set() for s in server.service.streams)


@pytest.mark.parametrize("options", [{"force_include_usage": True}], indirect=True)
async def test_usage_can_be_forced(server: Server) -> None:
    events = await server.stream("/v1/completions", prompt="a")
    assert all("usage" in e for e in events)
