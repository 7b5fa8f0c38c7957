"""A whole measurement against a scripted server: what is asked of it, and what is reported."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.api.wayward import (
    DONE,
    Act,
    Wayward,
    hang,
    piece,
    refuse,
    say,
    stream,
    usage,
    wayward,
)
from tinfer.bench import metrics
from tinfer.bench.app import measure
from tinfer.bench.interruption import Interrupted
from tinfer.bench.options import BenchOptions
from tinfer.bench.records import BenchRecord
from tinfer.errors import StartError
from tinfer.workloads import LogRecord

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
GOOD = stream(piece("x"), piece("y", finish_reason="length"), usage(2), DONE)


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


def models(owner: str = "vllm", **more: Any) -> Act:
    return say({"data": [{"id": "m", "owned_by": owner, **more}]})


def options(server: Wayward, **changed: Any) -> BenchOptions:
    plain: dict[str, Any] = {
        "input_len": 4,
        "output_len": 2,
        "num_prompts": 2,
        "request_rate": math.inf,
        "burstiness": 1.0,
        "vocab_size": 500,
    }
    return BenchOptions(base_url=server.url, **{**plain, **changed})


async def measured(server: Wayward, **changed: Any) -> dict[str, Any]:
    return await measure(options(server, **changed), asyncio.Event())


async def test_every_key_of_the_result_is_a_flag_or_explained(server: Wayward) -> None:
    server.does(models(), GOOD, GOOD)
    result = await measured(server)
    told = DOCUMENT.split("### The result\n")[1].split("\n### ")[0] + str(metrics.__doc__)
    explained = {*re.findall(r"`(\w+)`", told), *BenchOptions.__struct_fields__}
    statistics = {key for key in result if key.endswith("_ms") and "goodput" not in key}
    assert result.keys() - statistics - explained == set()


async def test_what_is_sent_to_a_plain_server(server: Wayward) -> None:
    server.does(models(), GOOD, GOOD)
    result = await measured(server)
    _, first, second = server.seen
    prompts = [first.body.pop("prompt"), second.body.pop("prompt")]
    assert first.body == second.body
    assert first.body == {
        "model": "m",
        "max_tokens": 2,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert prompts[0] != prompts[1]
    assert all(len(prompt) == 4 and all(5 <= i < 450 for i in prompt) for prompt in prompts)
    assert "X-Tinfer-Trace" not in first.headers
    assert (result["completed"], result["total_output_tokens"]) == (2, 4)
    assert (result["vocab_size"], result["vocab_size_source"]) == (500, "option")
    assert (result["model_id"], result["is_tinfer"], result["trace"]) == ("m", False, False)
    assert "records" not in result
    msgspec.json.encode(result)


@pytest.mark.parametrize(
    ("owner", "trace", "asked"),
    [("tinfer", None, True), ("tinfer", False, False), ("vllm", True, True)],
)
async def test_traces_are_asked_for_where_the_server_is_tinfer(
    server: Wayward, owner: str, trace: bool | None, asked: bool
) -> None:
    server.does(models(owner), GOOD)
    result = await measured(server, trace=trace, num_prompts=1, headers={"X-Mine": "1"})
    seen = server.seen[1].headers
    assert ("X-Tinfer-Trace" in seen, seen["X-Mine"], result["trace"]) == (asked, "1", asked)


async def test_the_same_seed_asks_the_same_and_another_salt_asks_otherwise(server: Wayward) -> None:
    server.does(*[models(), GOOD] * 4)
    changes: list[dict[str, Any]] = [{}, {}, {"seed": 1}, {"salt": "s"}]
    for changed in changes:
        await measured(server, num_prompts=1, temperature=0.5, **changed)
    first, again, seeded, salted = (seen.body for seen in server.seen[1::2])
    assert first == again and first["temperature"] == 0.5
    assert len({str(body["prompt"]) for body in (first, seeded, salted)}) == 3


async def test_warm_ups_come_first_and_leave_nothing_to_be_found(server: Wayward) -> None:
    server.does(models(), *[GOOD] * 5)
    result = await measured(server, num_warmups=3, max_concurrency=1)
    prompts = [seen.body["prompt"] for seen in server.seen[1:]]
    assert len({prompt[0] for prompt in prompts} | {str(prompt) for prompt in prompts}) > 5
    assert all(len(prompt) == 4 for prompt in prompts)
    assert result["completed"] == 2


async def test_a_failed_warm_up_ends_it(server: Wayward) -> None:
    server.does(models(), refuse(400, "no such token", "BadRequestError"))
    with pytest.raises(StartError, match="1 of 1 warm-up requests failed: no such token"):
        await measured(server, num_warmups=1)


async def test_what_the_model_cannot_hold_is_not_sent(server: Wayward) -> None:
    server.does(models(max_model_len=5))
    with pytest.raises(StartError, match="2 of 2 requests are too long: the longest has 6 tokens"):
        await measured(server)


async def test_a_rate_spreads_arrivals_up_to_its_last_one(server: Wayward) -> None:
    server.does(models(), *[GOOD] * 4)
    changed: dict[str, Any] = {"num_prompts": 4, "request_rate": 80.0, "save_detailed": True}
    result = await measured(server, **changed)
    due_s = [record.arrival_s for record in result["records"]]
    assert due_s == sorted(due_s) and due_s[0] > 0
    assert due_s[-1] == pytest.approx(4 / 80.0)
    assert result["offered_rate"] == pytest.approx(80.0)
    server.does(models(), *[GOOD] * 4)
    even = await measured(server, burstiness=math.inf, **changed)
    due_s = [record.arrival_s for record in even["records"]]
    assert due_s == pytest.approx([0.0125, 0.025, 0.0375, 0.05])
    assert even["burstiness"] == "inf"


async def test_records_are_lines_of_the_request_log(server: Wayward) -> None:
    trace = {"route": "split", "prefill_worker": "p", "decode_worker": "d", "handoff_s": 0.5}
    traced = stream(
        piece("x"),
        b'data: {"choices":[{"finish_reason":"length"}],"tinfer":%b}\n\n'
        % msgspec.json.encode(trace),
        usage(2),
        DONE,
    )
    server.does(models("tinfer"), traced, refuse(429, "later", "TooManyRequestsError"))
    result = await measured(server, max_concurrency=1, save_detailed=True)
    good, bad = result["records"]
    assert (good.finish_reason, good.error, good.status) == ("length", None, 200)
    assert (good.route, good.workers, good.handoff_s) == ("split", ("p", "d"), 0.5)
    assert good.trace == trace
    assert (good.prompt_tokens, good.max_output_tokens, good.output_tokens) == (2, 2, 2)
    assert 0 < good.ttft_s <= good.e2el_s
    assert sum(good.itl_s) == pytest.approx(good.e2el_s - good.ttft_s, abs=1e-5)
    assert (bad.finish_reason, bad.error, bad.status) == ("error", "later", 429)
    assert (bad.ttft_s, bad.e2el_s, bad.output_tokens, bad.workers) == (None, None, 0, ())
    for record in (good, bad):
        line = msgspec.json.encode(record)
        assert msgspec.json.decode(line, type=BenchRecord) == record
        assert msgspec.json.decode(line, type=LogRecord).request_id == record.request_id


async def test_a_stop_while_the_server_is_looked_for(server: Wayward) -> None:
    server.does(hang)
    stop = asyncio.Event()
    task = asyncio.create_task(measure(options(server), stop))
    seen = await server.arrived.get()
    stop.set()
    with pytest.raises(Interrupted):
        await task
    await seen.left.wait()


async def test_a_stop_during_the_warm_up_sends_nothing_more(server: Wayward) -> None:
    server.does(models(), hang)
    stop = asyncio.Event()
    task = asyncio.create_task(measure(options(server, num_warmups=1), stop))
    for _ in range(2):
        await server.arrived.get()
    stop.set()
    result = await task
    assert (result["interrupted"], result["num_not_sent"], result["completed"]) == (True, 2, 0)


async def test_a_cut_answer_is_an_aborted_record(server: Wayward) -> None:
    server.does(models(), stream(piece("x"), asyncio.Event()))
    stop = asyncio.Event()
    task = asyncio.create_task(measure(options(server, num_prompts=1, save_detailed=True), stop))
    for _ in range(2):
        await server.arrived.get()
    stop.set()
    (record,) = (await task)["records"]
    assert (record.finish_reason, record.e2el_s, record.error) == ("abort", None, None)
