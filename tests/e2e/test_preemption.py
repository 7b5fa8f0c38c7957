"""A decode worker of real vLLM runs out of KV, and what gave way is prefilled again elsewhere."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.following import Follower, Outcome, client_session, worker
from tests.e2e.serving import get_json, serving, until_idle

ANSWER = 200
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.9, "seed": 8, "presence_penalty": 0.8, "repetition_penalty": 1.2},
    {"structured_outputs": {"regex": "([a-f]{4}-[0-9]{4} ){80}"}},
]
NUM_REQUESTS = 12
# Room for four requests at their end, where the prompts of nine are let in.
NUM_BLOCKS, BLOCK_TOKENS = 40, 32
# Keys and values of the random model in float32: 4 layers of 2 heads of 32.
KV_TOKEN_BYTES = 4 * 2 * 2 * 32 * 4


def bodies() -> list[dict[str, Any]]:
    rng = random.Random(20261121)
    return [
        {
            "prompt": [rng.randrange(97, 123) for _ in range(100)],
            "max_tokens": ANSWER,
            "ignore_eos": True,
            **KINDS[number % len(KINDS)],
        }
        for number in range(NUM_REQUESTS)
    ]


@pytest.mark.parametrize("preemption", ["elsewhere", pytest.param("here", marks=pytest.mark.full)])
async def test_what_gave_way_goes_on_exactly(
    tmp_path: Path, random_model_dir: str, preemption: str
) -> None:
    options = [
        *("--prefill", "1", "--decode", "1", "--route", "split", "--dtype", "float32"),
        *("--decode-admission", "greedy", "--preemption", preemption),
        *("--block-size", str(BLOCK_TOKENS), "--max-model-len", "512", "--cpu-threads", "1"),
        *("--kv-cache-memory-bytes", str(NUM_BLOCKS * BLOCK_TOKENS * KV_TOKEN_BYTES)),
    ]
    names = ("--served-model-name", "tiny", "--log-dir", str(tmp_path))
    with serving(tmp_path, random_model_dir, *names, *options) as process:
        async with client_session() as session:
            expected = [await Follower(session, process.url, body) for body in bodies()]
            together: list[Outcome] = await asyncio.gather(
                *(Follower(session, process.url, body) for body in bodies())
            )
        for outcome, alone in zip(together, expected, strict=True):
            assert (outcome.status, outcome.error, outcome.ended) == (200, None, True)
            assert outcome.answer == alone.answer
        await until_idle(process.url)
        state = await get_json(f"{process.url}/debug/state")
        decode = worker(state, "decode-0")["scheduled"]
        assert decode["num_preempted"] > 0
        elsewhere = preemption == "elsewhere"
        assert (decode["num_reprefilled"] == decode["num_preempted"]) == elsewhere
        assert elsewhere or decode["num_reprefilled"] == 0
        process.stop()
