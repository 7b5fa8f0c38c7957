"""Workers die under answers of every kind: each goes on, token by token as if nothing had happened.

In 32-bit floats, so that a prompt computed at once and the same tokens computed one by one do not
round differently enough to matter.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tests.e2e.following import Follower, Outcome, all_ready, client_session, until_state, worker
from tests.e2e.serving import ServeProcess, serving_a_module, until_idle
from tests.leaks import LeakBaseline

pytestmark = pytest.mark.timeout(300)
NUM_TOKENS = 400
End = Callable[[aiohttp.ClientSession, str, dict[str, Any]], Awaitable[None]]
# `fast` begins again with what was emitted as prompt, the others step by step.
KINDS: dict[str, dict[str, Any]] = {
    "fast": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "penalised": {"presence_penalty": 0.8, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "grammar": {"structured_outputs": {"regex": "([a-z]{1,7} ){300}"}},
    "stop": {"stop": ["never said, and long enough to hold text back"]},
    "logprobs": {"logprobs": 2},
    "min-tokens": {"min_tokens": NUM_TOKENS},
}


@pytest.fixture(scope="module")
def mortal(
    tmp_path_factory: pytest.TempPathFactory, random_model_dir: str, leak_baseline: LeakBaseline
) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("mortal")
    shape = ("--prefill", "1", "--decode", "2", "--route", "split", "--dtype", "float32")
    names = ("--served-model-name", "tiny", "--log-dir", str(folder), "--cpu-threads", "1")
    with serving_a_module(leak_baseline, folder, random_model_dir, *names, *shape) as process:
        yield process


@pytest.fixture
async def session(mortal: ServeProcess) -> AsyncIterator[aiohttp.ClientSession]:
    async with client_session() as made:
        await until_state(mortal.url, all_ready)
        yield made


def _bodies() -> list[dict[str, Any]]:
    rng = random.Random(5)
    prompt = [rng.randrange(256) for _ in range(200)]
    shared = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return [{**shared, **extra} for extra in KINDS.values()]


def _check_equal(found: list[Outcome], expected: list[Outcome]) -> None:
    for kind, one, other in zip(KINDS, found, expected, strict=True):
        assert (one.status, one.error, one.ended) == (200, None, True), (kind, one)
        assert one.answer == other.answer, kind


async def _until_tokens(followers: list[Follower], num: int) -> None:
    for follower in followers:
        while len(follower.outcome.token_ids) < num and not follower.outcome.ended:
            await follower.progress()


async def _until_seen_dead(url: str, dead: dict[str, Any]) -> None:
    await until_state(url, lambda s: worker(s, dead["id"])["pid"] != dead["pid"])


async def _kill(session: aiohttp.ClientSession, url: str, busiest: dict[str, Any]) -> None:
    os.kill(busiest["pid"], signal.SIGKILL)


async def _restart_now(session: aiohttp.ClientSession, url: str, busiest: dict[str, Any]) -> None:
    """Without any time to finish what it has."""
    wish = {"worker": busiest["id"], "timeout_s": 0}
    async with session.post(f"{url}/admin/restart", json=wish) as answer:
        assert answer.status == 202, await answer.text()


@pytest.mark.parametrize(
    ("end", "num_rounds"), [(_kill, 3), pytest.param(_restart_now, 3, marks=pytest.mark.full)]
)
async def test_every_kind_of_answer_goes_on(
    mortal: ServeProcess, session: aiohttp.ClientSession, end: End, num_rounds: int
) -> None:
    url = mortal.url
    undisturbed = [await Follower(session, url, body) for body in _bodies()]
    for outcome in undisturbed:
        assert len(outcome.token_ids) > 300, outcome
    running = [Follower(session, url, body) for body in _bodies()]
    num_restarts = (await until_state(url, all_ready))["num_restarts"]
    for round_number in range(num_rounds):
        await _until_tokens(running, 60 * (round_number + 1))
        state = await until_state(url, all_ready)
        busiest = max(state["workers"], key=lambda one: one["scheduled"]["num_decoding"])
        assert busiest["scheduled"]["num_decoding"] > 1, state
        await end(session, url, busiest)
        await _until_seen_dead(url, busiest)
        state = await until_state(url, all_ready)
        assert state["num_restarts"] > num_restarts
        num_restarts = state["num_restarts"]
    _check_equal([await follower for follower in running], undisturbed)
    await until_idle(url)


async def test_who_is_killed_again_and_again_is_refused_and_others_are_not(
    mortal: ServeProcess, session: aiohttp.ClientSession
) -> None:
    """A prompt that never gets through: its worker is killed whenever it is being computed."""
    url = mortal.url
    rng = random.Random(6)
    huge = {"prompt": [rng.randrange(256) for _ in range(30000)], "max_tokens": 4}
    body = _bodies()[0]
    expected = await Follower(session, url, body)
    deadly = Follower(session, url, huge)
    other = Follower(session, url, body)
    while not deadly.outcome.ended:
        state = await until_state(url, lambda s: True)
        for one in state["workers"]:
            scheduled = one["scheduled"] or {"outstanding_prefill_tokens": 0}
            if one["state"] == "ready" and scheduled["outstanding_prefill_tokens"] > 5000:
                os.kill(one["pid"], signal.SIGKILL)
                await _until_seen_dead(url, one)
        await asyncio.sleep(0.01)
    outcome = await deadly
    assert outcome.status == 500 and outcome.error is not None
    assert outcome.error["message"].startswith("4 workers in a row died")
    assert (await other).answer == expected.answer
    await until_state(url, all_ready)
    assert (await Follower(session, url, body)).answer == expected.answer
    await until_idle(url)
