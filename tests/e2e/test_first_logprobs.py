"""The first request that asks for log probabilities waits for no compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.serving import serving, until_idle


async def test_nothing_is_compiled(tmp_path: Path, model_dir: str) -> None:
    cache = tmp_path / "compiled"
    cache.mkdir()
    names = ("--served-model-name", "tiny", "--log-dir", str(tmp_path))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with serving(tmp_path, model_dir, *names, "--route", "split", environment=environment) as one:
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": "Spell planet.",
            "max_tokens": 4,
            "logprobs": 2,
        }
        body["ignore_eos"] = True
        async with aiohttp.ClientSession(one.url) as session:
            async with session.post("/v1/completions", json=body) as got:
                assert got.status == 200, await got.text()
                choice = (await got.json())["choices"][0]
        assert len(choice["logprobs"]["token_logprobs"]) == 4
        await until_idle(one.url)
    assert list(cache.rglob("*")) == []
