"""Thousands of requests of every shape, over several workers, under pressure: all answers right."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.process.box import running
from tests.process.load import client, random_request, send

NUM_REQUESTS = 2000
# Blocks for a handful of requests per worker, and small chunks: preemption, waiting hand-offs and
# chunked prompts all happen, all the time.
TIGHT = {
    "num_blocks": 64,
    "block_tokens": 8,
    "step_s": 0.0005,
    "pull_block_s": 0.00005,
    "jitter": 0.5,
    "mean_output_tokens": 24,
    "fail_pull_rate": 0.02,
    "seed": 5,
}
OPTIONS = {"max_num_seqs": 32, "max_num_batched_tokens": 64, "lease_ttl": 0.2}
LONGEST_PROMPT = 160


@pytest.mark.parametrize(
    ("route", "num_requests"),
    [("split", NUM_REQUESTS), ("auto", NUM_REQUESTS // 2), ("whole", NUM_REQUESTS // 5)],
)
async def test_every_answer_is_right(tmp_path: Path, route: str, num_requests: int) -> None:
    with running(tmp_path, TIGHT, prefill=2, decode=2, route=route, **OPTIONS) as server:
        rng = random.Random(20261121)
        requests = [
            random_request(rng, LONGEST_PROMPT, server.settings) for _ in range(num_requests)
        ]
        num_before = await server.num_descriptors()
        async with client(num_connections=128) as session:
            await asyncio.gather(*(send(session, server.url, request) for request in requests))
        for request in requests:
            request.check_answered(server.settings)
        await server.idle(num_finished=sum(len(request.choices) for request in requests))
        await server.num_descriptors(expected=num_before)
        workers = await server.workers()
        engines = [worker["engine"] for worker in workers.values()]
        assert all(engine["num_computed_prompt_tokens"] for engine in engines)
        assert sum(engine["num_preemptions"] for engine in engines) > 0
        num_pulls = sum(engine["num_pulls"] for engine in engines)
        if route == "split":
            assert num_pulls > num_requests // 2
        elif route == "auto":
            assert num_pulls > 0
        else:  # only what was preempted and prefilled elsewhere
            views = [worker["scheduled"] for worker in workers.values()]
            assert num_pulls <= sum(view["num_reprefilled"] for view in views)
        assert all(worker["generation"] == 1 for worker in workers.values())
        server.stop()
