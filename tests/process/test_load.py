"""Thousands of requests of every shape, over several workers, under pressure: all answers right."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import get_json
from tests.process.box import running, until
from tests.process.load import client, completion, random_request, send

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


async def test_the_ledger_tells_what_the_processes_hold(tmp_path: Path) -> None:
    """The numbers are the system's own, and streams that are over have given all of theirs back."""
    with running(tmp_path, {"step_s": 0.01, "mean_output_tokens": 10_000}) as server:
        await server.num_descriptors()
        before = (await get_json(f"{server.url}/debug/ledger"))["holds"]
        assert before["processes"].keys() == {"master", "prefill-0", "decode-0"}
        answers = asyncio.create_task(
            server.answer(*(completion([n], max_tokens=400) for n in range(20)))
        )
        await server.until_phase(decoding=20)
        during = (await get_json(f"{server.url}/debug/ledger"))["holds"]
        assert during["processes"]["master"]["fds"] >= before["processes"]["master"]["fds"] + 20
        assert during["tasks"] >= before["tasks"] + 20
        assert during["shared_memory_files"] == 0
        shown_bytes = during["processes"]["master"]["rss_bytes"]
        assert abs(shown_bytes - server.master.memory_info().rss) < 64 << 20
        answers.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answers
        await server.idle()

        async def held() -> dict[str, Any]:
            return dict((await get_json(f"{server.url}/debug/ledger"))["holds"])

        await until(held, lambda now: now["tasks"] <= before["tasks"])
        await server.signal("decode-0", signal.SIGKILL)
        await server.until_worker("decode-0", "ready", generation=2)
        after = await held()
        assert after["processes"].keys() == before["processes"].keys()
        server.stop()
