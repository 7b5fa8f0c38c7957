"""Workers drained and restarted on request while a server is under load: no stream notices."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.serving import wait_gone
from tests.process.box import Server, running
from tests.process.load import Request, completion, random_prompt

STEADY = {"step_s": 0.002, "mean_output_tokens": 1_000_000}
SLOW = {"step_s": 0.02, "mean_output_tokens": 1_000_000}


async def ask(server: Server, action: str, **body: object) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/admin/{action}", json=body) as answer,
    ):
        return answer.status, await answer.json()


def streams(seed: int, num: int, max_tokens: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        completion(random_prompt(rng, 200), max_tokens=max_tokens, stream=True, ignore_eos=True)
        for _ in range(num)
    ]


def command(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinfer", *arguments, "--url", server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_every_worker_is_rolled_under_load_and_no_stream_moves(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=2, decode=2) as server:
        requests = streams(1, 200, 80)
        answers = asyncio.create_task(server.answer(*requests, num_connections=16))
        for worker in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            status, body = await ask(server, "restart", worker=worker, timeout_s=60)
            assert (status, body) == (202, {"worker": worker, "timeout_s": 60})
            await server.until_worker(worker, "ready", generation=2)
        for request in await answers:
            request.check_answered(server.settings)
        state = await server.state()
        assert state["num_restarts"] == 0, "each finished where it was"
        await server.idle(num_finished=200)
        server.stop()


async def test_what_a_worker_has_when_its_time_is_up_goes_on_elsewhere(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=2) as server:
        requests = streams(2, 8, 300)
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(decoding=8)
        assert (await ask(server, "drain", worker="decode-0", timeout_s=0.0))[0] == 202
        await server.until_worker("decode-0", "stopped")
        for request in await answers:
            request.check_answered(server.settings)
        workers = await server.workers()
        assert (workers["decode-0"]["pid"], workers["decode-0"]["reason"]) == (None, "")
        assert (await server.state())["num_restarts"] > 0
        await server.answer(*(again := streams(3, 4, 10)))
        for request in again:
            request.check_answered(server.settings)
        assert (await ask(server, "restart", worker="decode-0"))[0] == 202
        await server.until_worker("decode-0", "ready", generation=2)
        await server.idle(num_finished=12)
        server.stop()


async def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1) as server:
        for action, body, why in (
            ("drain", {"worker": "nobody"}, "there is no worker 'nobody'"),
            ("restart", {"worker": "nobody"}, "there is no worker 'nobody'"),
            ("drain", {"worker": "decode-0", "timeout_s": -1}, "timeout_s"),
            ("drain", {"worker": "decode-0", "timeout_s": "soon"}, "timeout_s"),
            ("drain", {}, "worker"),
        ):
            status, answer = await ask(server, action, **body)
            assert status == 400 and why in answer["error"]["message"], answer
        assert (await ask(server, "drain", worker="prefill-0"))[0] == 202
        await server.until_worker("prefill-0", "stopped")
        status, answer = await ask(server, "drain", worker="decode-0")
        assert status == 400
        assert answer["error"]["message"] == "worker decode-0 is the last one that serves"
        await server.answer(*(requests := streams(4, 4, 10)))
        for request in requests:  # the one that is left does all of it
            request.check_answered(server.settings)
        await server.idle()
        server.stop()


async def test_a_worker_that_dies_while_it_drains_has_left(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=2) as server:
        requests = streams(5, 8, 200)
        answers = asyncio.create_task(server.answer(*requests))
        await server.until_phase(decoding=8)
        assert (await ask(server, "drain", worker="decode-0", timeout_s=600))[0] == 202
        await server.until_worker("decode-0", "draining")
        await server.signal("decode-0", signal.SIGKILL)
        await server.until_worker("decode-0", "stopped")
        for request in await answers:
            request.check_answered(server.settings)
        await server.idle(num_finished=8)
        server.stop()


async def test_the_commands(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=1) as server:
        done = await asyncio.to_thread(command, server, "drain", "decode-0", "--timeout", "5")
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "decode-0: stopped"), done
        assert done.stdout.startswith("decode-0 is stopped after ")
        done = await asyncio.to_thread(command, server, "restart", "decode-0", "--json", "-")
        assert done.returncode == 0, done
        told = json.loads(done.stdout)
        assert (told["action"], told["state"], told["generation"]) == ("restart", "ready", 2)
        assert (told["num_requests"], told["num_moved"], told["reason"]) == (0, 0, "")
        for arguments, why in (
            (("drain", "nobody"), "tinfer: there is no worker 'nobody'"),
            (("drain", "decode-0", "--timeout", "-1"), "Invalid value for '--timeout'"),
        ):
            done = await asyncio.to_thread(command, server, *arguments)
            assert (done.returncode, why in done.stderr) == (2, True), done
        await server.idle()
        server.stop()
    done = await asyncio.to_thread(command, server, "drain", "decode-0")
    assert done.returncode == 2 and "nothing answers at" in done.stderr


async def test_the_commands_show_their_key(tmp_path: Path) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=1, api_key="secret") as server:
        done = await asyncio.to_thread(command, server, "drain", "decode-0")
        assert done.returncode == 2 and "key" in done.stderr, done
        done = await asyncio.to_thread(
            command, server, "restart", "decode-0", "--api-key", "secret"
        )
        assert done.returncode == 0, done
        assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
async def test_a_stop_while_a_worker_drains_leaves_nothing(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    with running(tmp_path, SLOW, prefill=1, decode=2) as server:
        answers = asyncio.create_task(server.answer(*streams(6, 4, 100)))
        await server.until_phase(decoding=4)
        assert (await ask(server, "restart", worker="decode-0", timeout_s=600))[0] == 202
        await server.until_worker("decode-0", "draining")
        family, run_dir = server.process.family(), server.process.run_dir()
        for number in signals:
            server.master.send_signal(number)
        assert await asyncio.to_thread(server.process.wait_end) == 0
        await answers
        assert wait_gone(family) == []
        assert not run_dir.exists()
