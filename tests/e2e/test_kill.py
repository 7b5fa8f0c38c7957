"""A worker or the import process is killed or stopped while requests run; every answer is whole.

One server for all tests, with one prefill and two decode workers; the last test ends it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.following import (
    Follower,
    Outcome,
    all_ready,
    client_session,
    until_state,
    worker,
)
from tests.e2e.remains import Remains
from tests.e2e.serving import ServeProcess, serving_a_module, until_idle
from tests.leaks import LeakBaseline
from tests.random_model import EXACT

LEASE_TTL_S = 1.0
# From 0.5 ms each: eight that begin one after the other have to be under way at once.
LONGEST_TOKENS = 2500
# Long enough to be in the middle of, short enough to wait for.
LONG_TOKENS = 1000
# Many chunks, so that a kill meets some of them.
HUGE_TOKENS = 10_000
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def fragile(
    tmp_path_factory: pytest.TempPathFactory, random_model_dir: str, leak_baseline: LeakBaseline
) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("fragile")
    shape = ("--prefill", "1", "--decode", "2", "--route", "split", "--lease-ttl", str(LEASE_TTL_S))
    names = ("--served-model-name", "tiny", "--log-dir", str(folder))
    with serving_a_module(
        leak_baseline, folder, random_model_dir, *names, *shape, *EXACT
    ) as process:
        yield process


@pytest.fixture
async def session(fragile: ServeProcess) -> AsyncIterator[aiohttp.ClientSession]:
    async with client_session() as made:
        await until_state(fragile.url, all_ready)
        yield made


def _prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(num_tokens)]


def _long(seed: int, **extra: Any) -> dict[str, Any]:
    shared = {"max_tokens": LONG_TOKENS, "ignore_eos": True}
    return {"prompt": _prompt(seed, 300), **shared, **extra}


def _short(seed: int) -> dict[str, Any]:
    return {"prompt": _prompt(seed, 700), "max_tokens": 24}


async def _answers(
    session: aiohttp.ClientSession, url: str, bodies: list[dict[str, Any]]
) -> list[Outcome]:
    """All at once; each has to be whole."""
    followers = [Follower(session, url, body) for body in bodies]
    outcomes = [await follower for follower in followers]
    for outcome in outcomes:
        assert (outcome.status, outcome.error, outcome.ended) == (200, None, True)
    return outcomes


def _check_long(outcome: Outcome, num_tokens: int = LONG_TOKENS) -> None:
    """It is all there, once."""
    assert (outcome.status, outcome.error, outcome.finish_reason) == (200, None, "length")
    assert len(outcome.token_ids) == num_tokens


async def test_decode_worker_is_killed(
    fragile: ServeProcess, session: aiohttp.ClientSession
) -> None:
    url = fragile.url
    probes = [_short(seed) for seed in range(6)]
    before = await _answers(session, url, probes)
    # One after the other, so that each decode worker gets some of them.
    streamed = [True, False] * 4
    running = []
    for seed, stream in enumerate(streamed):
        running.append(
            Follower(session, url, _long(seed, stream=stream, max_tokens=LONGEST_TOKENS))
        )
        state = await until_state(url, lambda s: s["requests_by_phase"]["decoding"] == len(running))
    decoders = [w for w in state["workers"] if w["role"] == "decode"]
    victim = max(decoders, key=lambda w: w["scheduled"]["num_seqs"])
    name, num_struck = victim["id"], victim["scheduled"]["num_seqs"]
    assert num_struck >= 4
    os.kill(victim["pid"], signal.SIGKILL)
    # Once the death is seen, the other decode worker serves new requests.
    await until_state(url, lambda s: not (all_ready(s) and worker(s, name)["pid"] == victim["pid"]))
    assert [o.answer for o in await _answers(session, url, probes)] == [o.answer for o in before]
    for follower in running:
        _check_long(await follower, LONGEST_TOKENS)
    state = await until_state(url, all_ready)
    assert state["num_restarts"] == num_struck
    reborn = worker(state, name)
    assert (reborn["generation"], reborn["restarts"]) == (victim["generation"] + 1, 1)
    assert reborn["pid"] != victim["pid"]
    # Once it pulls from the prefill worker's memory, which it had to map anew.
    # So many at once that one decode worker does not take all of them.
    assert [o.answer for o in await _answers(session, url, probes * 4)] == [
        o.answer for o in before * 4
    ]
    pulled = worker(await until_state(url, lambda s: _idle(s)), name)
    assert pulled["engine"]["num_pulls"] > 0 and pulled["engine"]["num_failed_pulls"] == 0
    await until_idle(url)


def _idle(state: dict[str, Any]) -> bool:
    return not any(state["requests_by_phase"].values())


async def test_prefill_worker_is_killed_in_mid_prefill(
    fragile: ServeProcess, session: aiohttp.ClientSession
) -> None:
    url = fragile.url
    probes = [_short(seed) for seed in range(10, 14)]
    before = await _answers(session, url, probes)
    decoding = Follower(session, url, _long(20))
    await decoding.first_token.wait()
    await until_state(url, lambda s: s["requests_by_phase"]["decoding"] == 1)
    huge = {"prompt": _prompt(21, HUGE_TOKENS), "max_tokens": 8}
    struck = [Follower(session, url, {**huge, "stream": stream}) for stream in (True, False)]
    state = await until_state(url, lambda s: s["requests_by_phase"]["prefilling"] >= 1)
    victim = worker(state, "prefill-0")
    os.kill(victim["pid"], signal.SIGKILL)

    for outcome in [await follower for follower in struck]:
        assert (outcome.status, outcome.error, len(outcome.token_ids)) == (200, None, 8)
    after = await until_state(url, all_ready)
    assert after["num_restarts"] > state["num_restarts"], "the kill came too late"
    assert [o.answer for o in await _answers(session, url, probes)] == [o.answer for o in before]
    _check_long(await decoding)

    state = await until_state(url, all_ready)
    assert worker(state, "prefill-0")["generation"] == victim["generation"] + 1
    pulls = _num_pulls(state)
    assert [o.answer for o in await _answers(session, url, probes)] == [o.answer for o in before]
    state = await until_state(url, _idle)
    assert _num_pulls(state) > pulls, "nothing was pulled from the new incarnation"
    await until_idle(url)


def _num_pulls(state: dict[str, Any]) -> int:
    engines = [w["engine"] or {} for w in state["workers"] if w["role"] == "decode"]
    return sum(engine.get("num_pulls", 0) for engine in engines)


async def test_readers_are_stopped_for_longer_than_a_lease(
    fragile: ServeProcess, session: aiohttp.ClientSession
) -> None:
    """Their leases pass their deadline several times: each is extended and no block is freed."""
    url = fragile.url
    state = await until_state(url, all_ready)
    readers = [w["pid"] for w in state["workers"] if w["role"] == "decode"]
    failed_pulls = _num_failed_pulls(state)
    bodies: list[dict[str, Any]] = []
    waiting: list[Follower] = []
    for pid in readers:
        os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 3.5 * LEASE_TTL_S
        while time.monotonic() < end:
            # Each new prefill brings its worker's figures; every lease so far is among them.
            bodies.append(_short(100 + len(bodies)))
            waiting.append(Follower(session, url, bodies[-1]))
            await waiting[-1].first_token.wait()
            state = await until_state(
                url, lambda s: s["requests_by_phase"]["handoff"] == len(waiting)
            )
            assert worker(state, "prefill-0")["engine"]["num_open_leases"] == len(waiting)
    finally:
        for pid in readers:
            os.kill(pid, signal.SIGCONT)
    outcomes = [await follower for follower in waiting]
    state = await until_state(url, _idle)
    assert _num_failed_pulls(state) == failed_pulls
    assert [o.answer for o in outcomes] == [o.answer for o in await _answers(session, url, bodies)]
    await until_idle(url)


def _num_failed_pulls(state: dict[str, Any]) -> int:
    return sum((w["engine"] or {}).get("num_failed_pulls", 0) for w in state["workers"])


async def test_import_process_is_killed(
    fragile: ServeProcess, session: aiohttp.ClientSession
) -> None:
    """No worker notices; a worker that dies later is started by the import process's successor."""
    url = fragile.url
    running = [Follower(session, url, _long(seed)) for seed in range(4)]
    for follower in running:
        await follower.first_token.wait()
    state = await until_state(url, all_ready)
    old = _import_process(fragile, state)
    os.kill(old, signal.SIGKILL)
    for follower in running:
        _check_long(await follower)
    after = await until_state(url, lambda s: _idle(s) and all_ready(s))
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in state["workers"]]

    victim = worker(state, "decode-1")
    os.kill(victim["pid"], signal.SIGKILL)
    state = await until_state(
        url, lambda s: all_ready(s) and worker(s, "decode-1")["pid"] != victim["pid"]
    )
    assert worker(state, "decode-1")["generation"] == victim["generation"] + 1
    assert _import_process(fragile, state) != old
    await _answers(session, url, [_short(seed) for seed in range(8)])
    assert all(process.status() != psutil.STATUS_ZOMBIE for process in fragile.family())
    await until_idle(url)


def _import_process(server: ServeProcess, state: dict[str, Any]) -> int:
    """The only process of the family that is neither the master nor a worker."""
    workers = {w["pid"] for w in state["workers"]}
    pid: int
    (pid,) = {process.pid for process in server.family()} - workers - {server.process.pid}
    return pid


async def test_one_signal_drains(fragile: ServeProcess, session: aiohttp.ClientSession) -> None:
    """What runs is finished, what is new is refused, and nothing is left. Ends the server."""
    url = fragile.url
    remains = Remains.of(fragile)
    running = [Follower(session, url, _long(seed, stream=seed > 0)) for seed in range(3)]
    await until_state(url, lambda s: s["requests_by_phase"]["decoding"] == 3)
    fragile.process.send_signal(signal.SIGINT)
    await until_state(url, lambda s: s["status"] == "draining")
    async with session.get(f"{url}/health") as response:
        assert (response.status, await response.text()) == (503, "draining")
    refused = await Follower(session, url, _short(0))
    assert refused.status == 503 and refused.error is not None
    for follower in running:
        _check_long(await follower)
    assert await asyncio.to_thread(fragile.wait_end) == 0
    assert remains.left(5.0) == []
