"""vLLM's own engine arguments reach the workers of both roles, and what they compute shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.serving import get_json, serving, until_idle

FILE = """
route = "split"
served_model_name = "tiny"
kv_cache_dtype = "bfloat16"
max_model_len = 4096

[engine_args]
max_logprobs = 30
num_gpu_blocks_override = 200
"""


async def test_they_reach_both_workers(tmp_path: Path, model_dir: str) -> None:
    """More log probabilities than vLLM allows by itself, from the prefill worker for the first
    token and the decode worker for the others; and as many blocks as were asked for."""
    file = tmp_path / "tinfer.toml"
    file.write_text(FILE)
    body: dict[str, Any] = {"model": "tiny", "prompt": "Spell planet.", "max_tokens": 4}
    body |= {"ignore_eos": True, "temperature": 0.0, "return_tokens_as_token_ids": True}
    with serving(tmp_path, model_dir, "--config", str(file), "--log-dir", str(tmp_path)) as server:
        async with aiohttp.ClientSession(server.url) as session:
            for wanted, status in ((25, 200), (31, 400)):
                asked = {**body, "logprobs": wanted}
                async with session.post("/v1/completions", json=asked) as got:
                    assert got.status == status, await got.text()
                    answer = await got.json()
                if status == 200:
                    given = answer["choices"][0]["logprobs"]["top_logprobs"]
                    assert [len(one) for one in given] == [25] * 4
        state = await get_json(f"{server.url}/debug/state")
        # vLLM keeps one of them for itself.
        assert [worker["num_blocks"] for worker in state["workers"]] == [199, 199]
        await until_idle(server.url)
