"""A prefill and a decode worker of the built-in model on one GPU, its memory divided between them.

Needs tinfer's own environment, vLLM included; on a bare machine it skips.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

NUM_PER_TASK = 10


@pytest.mark.parametrize("transport", ["auto", "host"])
def test_two_workers_on_one_gpu_hand_off_and_answer_right(tmp_path: Path, transport: str) -> None:
    from tests.e2e.serving import serving  # what it needs may be missing where this skips

    arguments = ("--served-model-name", "tiny", "--route", "split", "--kv-transport", transport)
    with serving(tmp_path, *arguments, "--prefill", "1", "--decode", "1") as server:
        assert "2 workers share GPU" in server.output
        asyncio.run(_check(server.url))


async def _check(url: str) -> None:
    from tests.e2e.accuracy import accuracy, questions, through_server
    from tests.e2e.serving import get_json, until_idle

    examples = questions(NUM_PER_TASK)
    shares = accuracy(examples, await through_server(url, "tiny", examples))
    assert min(shares[task] for task in ("count", "repeat", "spell")) >= 0.9, shares
    await until_idle(url)
    workers = (await get_json(f"{url}/debug/state"))["workers"]
    decode = next(worker for worker in workers if worker["role"] == "decode")
    assert decode["engine"]["num_failed_pulls"] == 0
    assert decode["engine"]["num_pulls"] >= len(examples)
    assert len({worker["device"] for worker in workers}) == 1
