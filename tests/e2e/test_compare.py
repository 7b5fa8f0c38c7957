"""`tinfer bench compare` with real servers: plain vLLM beside itself, and tinfer beside it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest

from tinfer.bench.compare.arms import SERVED_NAME, Arm, servers_of
from tinfer.bench.compare.options import CompareOptions, usable_cores, with_devices
from tinfer.bench.compare.servers import Server
from tinfer.bench.compare.vllm_command import with_metadata

START_S = 180.0


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The second of two replicas of plain vLLM, which computes on the second core."""
    small = CompareOptions(kv_cache_memory_bytes=64 << 20, max_model_len=1024)
    options = with_devices(small, usable_cores())
    plan = servers_of(Arm("replicas", "replicas"), options)[1]
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    environment = with_metadata({**os.environ, "TMPDIR": str(tmp_path)}, tmp_path / "metadata")
    server = Server(plan, environment, tmp_path / "server.log")
    yield server
    server.stop()


async def test_a_replica_computes_on_its_core_and_answers_from_all(replica: Server) -> None:
    await replica.wait_ready(time.monotonic() + START_S)
    (guard,) = [one for one in psutil.Process().children() if "guard" in " ".join(one.cmdline())]
    (front,) = guard.children()
    assert replica.plan.engine_cores is not None and replica.plan.front_cores is not None
    assert front.cpu_affinity() == list(replica.plan.front_cores)
    engines = [one for one in front.children() if "resource_tracker" not in str(one.cmdline())]
    assert len(engines) == 1
    for thread in engines[0].threads():
        assert os.sched_getaffinity(thread.id) == set(replica.plan.engine_cores)
    body = {"model": SERVED_NAME, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{replica.url}/v1/completions", json=body) as response,
    ):
        answer = await response.json()
    assert answer["usage"]["completion_tokens"] == 3
    below = guard.children(recursive=True)
    await asyncio.to_thread(replica.stop)
    assert [one for one in below if one.is_running()] == []


@pytest.mark.full
@pytest.mark.timeout(600)
def test_tinfer_beside_plain_vllm(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tinfer", "bench", "compare", "--device", "cpu"),
            *("--arms", "tinfer-auto,replicas,replicas-512,paper", "--residency", "alone"),
            *("--workloads", "Mixed", "--loads", "0.5", "--repetitions", "1"),
            *("--num-requests", "8", "--full-load", "Mixed=4", "--length-scale", "0.1"),
            *("--num-unloaded", "1", "--num-warmups", "1", "--num-resamples", "100"),
            *("--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "1024"),
            *("--json", str(path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(path.read_text())["points"]
    assert set(point["num_failed"].values()) == {0} and len(point["arms"]) == 4
    ours = point["arms"]["tinfer-auto"]
    assert ours["output_throughput"]["value"]["value"] > 0
    assert ours["goodput_loose"]["value"] is not None
