"""How an answer was served: shown to a client that asks by header, and to nobody else."""

from __future__ import annotations

from typing import Any

import msgspec
import openai
import pytest
from multidict import CIMultiDict

from tests.api.canned import say
from tests.api.conftest import Server
from tinfer.api.trace import TRACE_HEADER, Trace

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "a"}, CHATS: {"messages": HI}}


def trace(number: int = 0) -> Trace:
    return Trace(
        request_id=f"r{number}",
        route="split",
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=5,
        queue_s=0.001,
        prefill_s=0.02,
        ttft_s=0.021,
        handoff_s=0.004,
        copy_s=0.001,
        handoff_bytes=4096,
        recomputed=False,
        decode_s=0.4,
        tpot_s=0.1,
        restarts=0,
        e2el_s=0.421,
    )


@pytest.fixture(autouse=True)
def traced(server: Server) -> None:
    server.service.script = lambda index: say("Hel", "lo", trace=trace(index))


async def ask(server: Server, path: str, asked: str | None = "1", **more: Any) -> tuple[int, Any]:
    """Status and JSON, or the events of a stream."""
    headers = {} if asked is None else {TRACE_HEADER: asked}
    body = {**BODIES[path], **more}
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        if "stream" not in more:
            return response.status, await response.json()
        events = (await response.text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return response.status, [msgspec.json.decode(e.removeprefix("data: ")) for e in events[:-2]]


@pytest.mark.parametrize("path", BODIES)
async def test_a_whole_answer(server: Server, path: str) -> None:
    _, body = await ask(server, path)
    assert body["tinfer"] == msgspec.to_builtins(trace())


@pytest.mark.parametrize("path", BODIES)
async def test_several_answers(server: Server, path: str) -> None:
    _, body = await ask(server, path, n=2)
    assert body["tinfer"] == {"answers": msgspec.to_builtins([trace(0), trace(1)])}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_tells_where_the_answer_ends(server: Server, path: str, usage: bool) -> None:
    more: dict[str, Any] = {
        "stream_options": {"include_usage": usage, "continuous_usage_stats": usage}
    }
    _, events = await ask(server, path, stream=True, **more)
    (told,) = [event for event in events if "tinfer" in event]
    assert told["tinfer"] == msgspec.to_builtins(trace())
    assert told["choices"][0]["finish_reason"] == "stop"
    assert ("usage" in told) is usage


async def test_each_answer_of_a_stream_tells_its_own(server: Server) -> None:
    _, events = await ask(server, CHATS, stream=True, n=2)
    told = {e["choices"][0]["index"]: e["tinfer"]["request_id"] for e in events if "tinfer" in e}
    assert told == {0: "r0", 1: "r1"}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("asked", [None, "", "0", "false"])
async def test_unasked_the_answer_stays_as_it_is(
    server: Server, path: str, asked: str | None
) -> None:
    cases: list[dict[str, Any]] = [{}, {"n": 2}, {"stream": True}]
    for more in cases:
        _, told = await ask(server, path, asked, **more)
        assert "tinfer" not in msgspec.json.encode(told).decode()


async def test_an_unclear_wish_is_refused(server: Server) -> None:
    status, body = await ask(server, COMPLETIONS, "perhaps")
    assert (status, body["error"]["param"]) == (400, TRACE_HEADER)
    assert server.service.generations == []


async def test_a_service_that_keeps_no_trace_shows_none(server: Server) -> None:
    server.service.script = lambda index: say("Hello")
    cases: list[dict[str, Any]] = [{}, {"stream": True}]
    for more in cases:
        _, told = await ask(server, CHATS, **more)
        assert "tinfer" not in msgspec.json.encode(told).decode()


async def test_the_stock_client_can_ask(server: Server) -> None:
    url = server.url + "/v1"
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, default_headers={TRACE_HEADER: "1"}
    ) as client:
        chat = await client.chat.completions.create(model="tiny", messages=HI)
        assert chat.model_extra is not None and chat.model_extra["tinfer"]["ttft_s"] == 0.021
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, stream=True, extra_headers={TRACE_HEADER: "1"}
        )
        extras = [chunk.model_extra or {} async for chunk in stream]
        assert [extra["tinfer"]["route"] for extra in extras if "tinfer" in extra] == ["split"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([], None),
        ([("tracestate", "a=1")], None),
        ([("Traceparent", "00-a-b-01")], {"traceparent": "00-a-b-01"}),
        (
            [("traceparent", "00-a-b-01"), ("tracestate", "a=1"), ("tracestate", "b=2")],
            {"traceparent": "00-a-b-01", "tracestate": "a=1,b=2"},
        ),
        ([("traceparent", "00-a-b-01"), ("traceparent", "00-c-d-01")], None),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
async def test_the_clients_trace_context_goes_with_its_sequences(
    server: Server, path: str, sent: list[tuple[str, str]], kept: dict[str, str] | None
) -> None:
    body = {**BODIES[path], "n": 2}
    headers = CIMultiDict(sent)
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        assert response.status == 200
    assert [one.trace_headers for one in server.service.generations] == [kept, kept]
