"""Roles move on real vLLM while requests run: every answer is what it is without a move."""

from __future__ import annotations

import asyncio
import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.following import Follower, client_session, until_state, worker
from tests.e2e.serving import serving, until_idle

NUM_CLIENTS = 6
NUM_PROMPTS = 24


def prompts() -> list[dict[str, Any]]:
    rng = random.Random(20261121)
    return [
        {
            "prompt": [rng.randrange(256) for _ in range(rng.randrange(5, 900))],
            "max_tokens": rng.randrange(2, 120),
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(NUM_PROMPTS)
    ]


async def flip(session: aiohttp.ClientSession, url: str, name: str, role: str) -> None:
    async with session.post(f"{url}/debug/role", json={"worker": name, "role": role}) as answer:
        assert answer.status == 202, await answer.text()
    await until_state(url, lambda state: worker(state, name)["role"] == role)


async def answers_until(
    stop: asyncio.Event, session: aiohttp.ClientSession, url: str, expected: list[Any], first: int
) -> int:
    """One client after another's request, each checked; returns how many there were."""
    bodies = prompts()
    for number in itertools.count(first):
        if stop.is_set():
            return number - first
        outcome = await Follower(session, url, bodies[number % NUM_PROMPTS])
        assert (outcome.status, outcome.error, outcome.ended) == (200, None, True), outcome
        assert outcome.answer == expected[number % NUM_PROMPTS]
    raise AssertionError("count() has no end")


async def flips(tmp_path: Path, model: str, num_flips: int) -> None:
    shape = ("--prefill", "2", "--decode", "1", "--route", "split", "--dtype", "float32")
    names = ("--served-model-name", "tiny", "--log-dir", str(tmp_path))
    with serving(tmp_path, model, *names, *shape) as process:
        async with client_session() as session:
            expected = []
            for body in prompts():
                outcome = await Follower(session, process.url, body)
                expected.append(outcome.answer)
            stop = asyncio.Event()
            clients = [
                asyncio.create_task(answers_until(stop, session, process.url, expected, 5 * i))
                for i in range(NUM_CLIENTS)
            ]
            for number in range(num_flips):
                await flip(session, process.url, "prefill-1", ("decode", "prefill")[number % 2])
            stop.set()
            counts = await asyncio.gather(*clients)
            assert min(counts) >= 1
            await until_idle(process.url)
        process.stop()


@pytest.mark.parametrize(
    "names",
    [
        ("prefill-0", "decode-1"),
        pytest.param(("prefill-0", "decode-0", "decode-1"), marks=pytest.mark.full),
    ],
    ids=["one of each", "every one"],
)
async def test_workers_are_restarted_under_load(
    tmp_path: Path, random_model_dir: str, names: tuple[str, ...]
) -> None:
    """Each has time to finish what it has, so that no answer moves."""
    shown = ("--served-model-name", "tiny", "--log-dir", str(tmp_path))
    shape = ("--prefill", "1", "--decode", "2", "--route", "split", "--dtype", "float32")
    with serving(tmp_path, random_model_dir, *shown, *shape) as process:
        async with client_session() as session:
            expected = [(await Follower(session, process.url, b)).answer for b in prompts()]
            stop = asyncio.Event()
            clients = [
                asyncio.create_task(answers_until(stop, session, process.url, expected, 5 * i))
                for i in range(NUM_CLIENTS)
            ]
            for name in names:
                wish = {"worker": name, "timeout_s": 100.0}
                async with session.post(f"{process.url}/admin/restart", json=wish) as answer:
                    assert answer.status == 202, await answer.text()
                await until_state(process.url, partial(is_anew, name))
            stop.set()
            await asyncio.gather(*clients)
            await until_idle(process.url)
        process.stop()


def is_anew(name: str, state: dict[str, Any]) -> bool:
    one = worker(state, name)
    return bool(one["state"] == "ready" and one["generation"] == 2)


async def test_flips_under_load(tmp_path: Path, random_model_dir: str) -> None:
    await flips(tmp_path, random_model_dir, 4)


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_fifty_flips_under_load(tmp_path: Path, random_model_dir: str) -> None:
    await flips(tmp_path, random_model_dir, 50)
