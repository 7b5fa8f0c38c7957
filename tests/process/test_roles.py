"""Roles that move while requests run: nothing is lost, and the last worker of a role keeps it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.process.box import Server, running
from tests.process.load import completion, random_prompt

STEADY = {"step_s": 0.002, "mean_output_tokens": 1_000_000}
NUM_FLIPS = 20


async def ask(server: Server, worker: str, role: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/debug/role", json={"worker": worker, "role": role}) as answer,
    ):
        return answer.status, await answer.json()


async def role_of(server: Server, worker: str) -> str:
    return str((await server.workers())[worker]["role"])


async def flip(server: Server, worker: str, role: str) -> None:
    status, body = await ask(server, worker, role)
    assert status == 202, body
    await server.until(
        lambda state: any(w["id"] == worker and w["role"] == role for w in state["workers"])
    )


async def test_roles_move_under_load_and_no_stream_is_lost(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=2, decode=2) as server:
        rng = random.Random(20261121)
        requests = [
            completion(random_prompt(rng, 400), max_tokens=60, stream=True) for _ in range(300)
        ]
        answers = asyncio.create_task(server.answer(*requests, num_connections=24))
        for number in range(NUM_FLIPS):
            worker, role = [("prefill-1", "decode"), ("prefill-1", "prefill")][number % 2]
            await flip(server, worker, role)
        for request in await answers:
            request.check_answered(server.settings)
        await server.idle(num_finished=300)
        server.stop()


async def test_the_last_of_a_role_keeps_it(tmp_path: Path) -> None:
    with running(tmp_path, STEADY, prefill=1, decode=1) as server:
        for worker, role, why in (
            ("prefill-0", "decode", "it is the only prefill worker"),
            ("decode-0", "decode", "it is a decode worker"),
            ("nobody", "decode", "there is no worker 'nobody'; there are: decode-0, prefill-0"),
        ):
            status, body = await ask(server, worker, role)
            assert status == 400
            assert why in body["error"]["message"]
        server.stop()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"worker": "prefill-0", "role": "king"}'])
async def test_a_wish_that_is_none(tmp_path: Path, body: bytes) -> None:
    with running(tmp_path, STEADY) as server:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.url}/debug/role", data=body) as answer,
        ):
            assert answer.status == 400
            assert (await answer.json())["error"]["type"] == "BadRequestError"
        server.stop()
