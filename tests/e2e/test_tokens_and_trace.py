"""Tokens and traces of a real server: both say what the engines really had and did."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from tests.e2e.serving import ServeProcess, events, until_idle
from tests.unit.trace_box import Seen
from tinfer.api.trace import TRACE_HEADER

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count to 9: ä"}]
ASKED: dict[str, Any] = {"messages": CHAT, "temperature": 0.0, "ignore_eos": True}
ASKED_PROMPT: dict[str, Any] = {
    "prompt": "one two three " * 20,
    "max_tokens": 6,
    "ignore_eos": True,
    "seed": 5,
}


async def post(url: str, path: str, body: dict[str, Any], trace: str = "1") -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(headers={TRACE_HEADER: trace}) as session,
        session.post(url + path, json=body) as response,
    ):
        said: dict[str, Any] = await response.json()
        assert response.status == 200, said
        return said


async def test_tokens_are_those_that_the_engine_gets(server: ServeProcess, model_dir: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    told = await post(server.url, "/tokenize", {"messages": CHAT, "return_token_strs": True})
    asked = {**ASKED, "max_tokens": 1, "return_token_ids": True}
    answer = await post(server.url, "/v1/chat/completions", asked)
    assert told["tokens"] == answer["prompt_token_ids"]
    assert told["count"] == answer["usage"]["prompt_tokens"] == len(told["tokens"])
    assert told["token_strs"] == tokenizer.convert_ids_to_tokens(told["tokens"])
    text = await post(server.url, "/detokenize", {"tokens": told["tokens"]})
    assert text["prompt"] == tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def check(trace: dict[str, Any], output_tokens: int) -> None:
    """The figures of a split answer add up, whatever they are."""
    assert (trace["route"], trace["recomputed"]) == ("split", False)
    assert (trace["prefill_worker"], trace["decode_worker"]) == ("prefill-0", "decode-0")
    assert trace["output_tokens"] == output_tokens
    assert trace["ttft_s"] == pytest.approx(trace["queue_s"] + trace["prefill_s"], abs=1e-5)
    assert trace["e2el_s"] == pytest.approx(trace["ttft_s"] + trace["decode_s"], abs=1e-5)
    assert trace["decode_s"] == pytest.approx(trace["tpot_s"] * (output_tokens - 1), abs=1e-4)
    assert 0 < trace["copy_s"] < trace["handoff_s"] < trace["decode_s"]
    assert trace["handoff_bytes"] > 0


async def check_shown(url: str, trace: dict[str, Any]) -> None:
    """The slices of the same answer, and the steps that computed it."""
    async with aiohttp.ClientSession() as session:
        asked = {"request_id": trace["request_id"]}
        async with session.get(f"{url}/debug/trace", params=asked) as response:
            alone = Seen((await response.json())["traceEvents"])
        async with session.get(f"{url}/debug/trace") as response:
            everything = Seen((await response.json())["traceEvents"])
    for name, figure in (
        ("queued", "queue_s"),
        ("prefill", "prefill_s"),
        ("hand-off", "handoff_s"),
    ):
        assert alone.seconds_of(name) == pytest.approx(trace[figure], abs=1e-5)
    decoded_s = alone.seconds_of("hand-off") + alone.seconds_of("decode")
    assert decoded_s == pytest.approx(trace["decode_s"], abs=1e-5)
    steps = {
        (one["name"], everything.places[one["pid"]])
        for one in everything.events
        if one.get("cat") == "step"
    }
    assert {("prefill step", "prefill-0 (prefill)"), ("decode step", "decode-0 (decode)")} <= steps


async def test_a_trace_of_a_split_answer(server: ServeProcess) -> None:
    asked = {**ASKED, "max_tokens": 12, "stream": True}
    async with (
        aiohttp.ClientSession(headers={TRACE_HEADER: "1"}) as session,
        session.post(f"{server.url}/v1/chat/completions", json=asked) as response,
    ):
        seen = [event async for event in events(response)]
    (trace,) = [event["tinfer"] for event in seen if "tinfer" in event]
    assert seen[-1]["tinfer"] == trace
    check(trace, output_tokens=12)
    body = await post(server.url, "/v1/completions", {**ASKED_PROMPT, "n": 2})
    for one in body["tinfer"]["answers"]:
        check(one, output_tokens=6)
    again = await post(server.url, "/v1/completions", ASKED_PROMPT, trace="0")
    assert "tinfer" not in again
    await check_shown(server.url, trace)
    await until_idle(server.url)


async def test_a_trace_of_a_whole_answer(whole_server: ServeProcess) -> None:
    body = await post(whole_server.url, "/v1/completions", ASKED_PROMPT)
    trace = body["tinfer"]
    assert trace["route"] == "whole"
    assert trace["prefill_worker"] == trace["decode_worker"]
    assert (trace["handoff_s"], trace["copy_s"], trace["handoff_bytes"]) == (None, None, None)
    assert trace["output_tokens"] == body["usage"]["completion_tokens"] == 6
