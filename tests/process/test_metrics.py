"""What `/metrics` of a real server counts is what its clients have seen, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.process.box import Server, running
from tests.process.load import Request, client, completion, send

FAKE = {"num_blocks": 512, "block_tokens": 8, "mean_output_tokens": 1_000_000, "step_s": 0.005}
ENDS = ("stop", "length", "abort", "error")


class Scrape:
    """One answer of `/metrics`."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all series of that name and these labels, of which there has to be one."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, (name, labels)
        return sum(found)

    @property
    def ends(self) -> tuple[float, ...]:
        """In the order of ENDS."""
        return tuple(self("vllm:request_success_total", finished_reason=one) for one in ENDS)


async def scraped(server: Server) -> Scrape:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{server.url}/metrics") as response,
    ):
        assert response.status == 200
        return Scrape(await response.text())


async def leaves(server: Server, request: Request, num_events: int) -> None:
    """Read so many events and close the connection."""
    async with client() as session:
        await send(session, server.url, request, leave_after=num_events)


def check_counts(seen: Scrape, answered: list[Request], num_aborted: int) -> None:
    """The counts of requests that were answered to their end, besides aborted ones."""
    num_tokens = sum(one.num_tokens for one in answered)
    choices = [choice for one in answered for choice in one.choices]
    num_stop = sum(choice.finish_reason == "stop" for choice in choices)
    assert seen.ends == (num_stop, len(choices) - num_stop, num_aborted, 0)
    assert seen("vllm:request_generation_tokens_sum") == num_tokens
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert seen(f"vllm:{name}_count") == len(choices)
    assert seen("vllm:request_prompt_tokens_sum") == sum(
        len(choice.prompt_token_ids or ()) for choice in choices
    )


async def test_counts_before_during_and_after(tmp_path: Path) -> None:
    with running(tmp_path, FAKE, max_num_queued_reqs=1, prefill=1, decode=1) as server:
        seen = await scraped(server)
        assert (seen.ends, seen("vllm:generation_tokens_total")) == ((0, 0, 0, 0), 0)
        assert (seen("tinfer:workers_up"), seen("tinfer:healthy")) == (2, 1)
        requests = [
            completion([1, 2, 3] * 20, max_tokens=800),
            completion([7] * 30, max_tokens=700, n=2, num_choices=2, stream=False),
        ]
        asked = asyncio.create_task(server.answer(*requests))
        await server.until_phase(decoding=3, prefilling=0, handoff=0, queued=0)
        seen = await scraped(server)
        assert (seen("vllm:num_requests_running"), seen("vllm:num_requests_waiting")) == (3, 0)
        assert seen("vllm:time_to_first_token_seconds_count") == 3
        assert (seen.ends, seen("tinfer:requests_accepted_total")) == ((0, 0, 0, 0), 3)
        assert 0 < seen("vllm:kv_cache_usage_perc") < 1
        await asked
        left = completion([9] * 10, max_tokens=2000)
        await leaves(server, left, num_events=5)
        await server.idle()
        seen = await scraped(server)
        check_counts(seen, requests, num_aborted=1)
        assert seen("vllm:time_to_first_token_seconds_count") == 4
        num_first = seen("vllm:time_to_first_token_seconds_count")
        num_tokens = seen("vllm:generation_tokens_total")
        assert seen("vllm:inter_token_latency_seconds_count") == num_tokens - num_first
        assert num_tokens >= 2200 + left.num_tokens
        assert seen("vllm:request_params_n_sum") == 1 + 2 + 1
        assert seen("tinfer:handoffs_total", outcome="installed") == 4
        assert seen("tinfer:handoff_seconds_count") == 4
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert seen(f"vllm:{gauge}") == 0
        assert seen("tinfer:worker_kv_held_bytes") == 0
        server.stop()


async def test_a_refusal_and_a_death(tmp_path: Path) -> None:
    slow = {**FAKE, "prefill_token_s": 0.003}
    options = {"max_num_queued_reqs": 1, "prefill": 1, "decode": 1, "route": "split"}
    with running(tmp_path, slow, **options) as server:
        crowd = [completion([one] * 200, max_tokens=3) for one in range(1, 13)]
        await server.answer(*crowd)
        refused = [one for one in crowd if one.status == 429]
        answered = [one for one in crowd if one.status == 200]
        assert refused and answered
        seen = await scraped(server)
        check_counts(seen, answered, num_aborted=0)
        num = len(refused)
        assert seen("tinfer:requests_refused_total", reason="queue-full") == num
        assert seen("vllm:admission_rejections_total", reason="max_num_queued_reqs") == num
        assert seen("tinfer:requests_accepted_total") == len(answered)

        request = completion([5] * 10, max_tokens=800, seed=3)
        asked = asyncio.create_task(server.answer(request))
        await server.until_phase(decoding=1)
        steps_before = (await scraped(server))("tinfer:worker_steps_total", worker="decode-0")
        await server.signal("decode-0", signal.SIGKILL)
        await asked
        request.check_answered(server.settings)
        await server.until_worker("decode-0", "ready", generation=2)
        await server.idle()
        seen = await scraped(server)
        check_counts(seen, [*answered, request], num_aborted=0)
        assert seen("vllm:generation_tokens_total") == sum(
            one.num_tokens for one in [*answered, request]
        )
        assert seen("tinfer:requests_resumed_total") == 1
        assert seen("tinfer:requests_failed_total") == 0
        died = {"worker": "decode-0", "cause": "signal"}
        assert seen("tinfer:worker_deaths_total", **died) == 1
        assert seen("tinfer:worker_deaths_total") == 1
        assert seen("tinfer:worker_restarts_total", worker="decode-0") == 1
        assert seen("tinfer:worker_generation", worker="decode-0") == 2
        assert seen("tinfer:worker_steps_total", worker="decode-0") >= steps_before
        server.stop()


async def test_the_log_has_a_line_for_each(tmp_path: Path) -> None:
    options = {"log_level": "info", "log_format": "json", "prefill": 1, "decode": 1}
    with running(tmp_path, {**FAKE, "step_s": 0}, **options) as server:
        request = completion([5] * 10, max_tokens=7, ignore_eos=True, request_id="mine")
        await server.answer(request)
        await server.idle()
        server.stop()
        lines = [one for one in server.process.output.splitlines() if one.startswith("{")]
    found = [json.loads(line) for line in lines]
    (line,) = [one for one in found if one["message"] == "POST /v1/completions 200"]
    assert (line["logger"], line["request_id"], line["route"]) == ("tinfer.access", "mine", "split")
    assert (line["prompt_tokens"], line["output_tokens"]) == (10, 7)
    assert (line["finish_reason"], line["restarts"]) == ("length", 0)
    assert 0 < line["ttft_s"] <= line["duration_s"]
