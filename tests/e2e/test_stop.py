"""The master dies, or is told twice to stop: whatever was going on, nothing of it is left."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.following import Follower, client_session, until_state
from tests.e2e.remains import Remains
from tests.e2e.serving import START_DEADLINE_S, ServeProcess, serving

# How long everything may take to go after a SIGKILL of the master.
GONE_DEADLINE_S = 5.0
NUM_ENDLESS_TOKENS = 30000
ENDLESS: dict[str, Any] = {
    "prompt": "once upon a time",
    "max_tokens": NUM_ENDLESS_TOKENS,
    "ignore_eos": True,
}
pytestmark = pytest.mark.timeout(240)


async def test_master_is_killed_while_it_serves(model_dir: str, tmp_path: Path) -> None:
    with serving(tmp_path, model_dir, "--served-model-name", "tiny") as server:
        async with client_session() as session:
            running = [Follower(session, server.url, ENDLESS) for _ in range(4)]
            for follower in running:
                await follower.first_token.wait()
            remains = Remains.of(server)
            assert len(remains.processes) == 4 and remains.memory_files
            server.kill()
            assert remains.left(GONE_DEADLINE_S) == []
            broken = await asyncio.gather(*(f.task for f in running), return_exceptions=True)
    for follower, end in zip(running, broken, strict=True):
        assert isinstance(end, aiohttp.ClientError), "the connection is not seen to break"
        assert not follower.outcome.ended


def test_master_is_killed_while_it_imports(model_dir: str, tmp_path: Path) -> None:
    server = ServeProcess(tmp_path, model_dir)
    try:
        server.wait_progress("importing the engine")
        zygote = _wait_for_family(server, 2)
        assert "--control" in zygote[1].cmdline()
        _wait_for_library(zygote[1])
        remains = Remains.of(server)
        server.kill()
        assert remains.left(GONE_DEADLINE_S) == []
    finally:
        server.stop()


def test_master_is_killed_while_workers_start(model_dir: str, tmp_path: Path) -> None:
    server = ServeProcess(tmp_path, model_dir)
    try:
        _wait_for_family(server, 4)
        remains = Remains.of(server)
        server.kill()
        assert "is ready" not in server.output
        assert remains.left(GONE_DEADLINE_S) == []
    finally:
        server.stop()


def _wait_for_family(server: ServeProcess, num_processes: int) -> list[psutil.Process]:
    deadline = time.monotonic() + START_DEADLINE_S
    while len(family := server.family()) < num_processes:
        assert server.process.poll() is None and time.monotonic() < deadline, server.output
        time.sleep(0.005)
    return family


def _wait_for_library(process: psutil.Process) -> None:
    """Until torch is being loaded, which is where an import spends its longest calls."""
    deadline = time.monotonic() + START_DEADLINE_S
    while not any("libtorch" in mapped.path for mapped in process.memory_maps()):
        assert time.monotonic() < deadline
        time.sleep(0.005)


async def test_second_signal_stops_at_once(model_dir: str, tmp_path: Path) -> None:
    """SIGTERM counts like Ctrl-C; requests that are cut off are told so."""
    with serving(tmp_path, model_dir, "--served-model-name", "tiny") as server:
        async with client_session() as session:
            running = [
                Follower(session, server.url, {**ENDLESS, "stream": stream})
                for stream in (True, True, False)
            ]
            await until_state(server.url, lambda s: s["requests_by_phase"]["decoding"] == 3)
            remains = Remains.of(server)
            server.process.send_signal(signal.SIGTERM)
            await until_state(server.url, lambda s: s["status"] == "draining")
            assert not any(follower.outcome.ended for follower in running)
            server.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(server.wait_end) == 0
            assert remains.left(GONE_DEADLINE_S) == []
            outcomes = [await follower for follower in running]
    assert [outcome.status for outcome in outcomes] == [200, 200, 503]
    for outcome in outcomes:
        assert outcome.error is not None and "stopping" in outcome.error["message"]
        assert outcome.finish_reason is None and outcome.ended
        assert len(outcome.token_ids) < NUM_ENDLESS_TOKENS
