"""Workers die at random moments of every phase: every request is answered, once, as if none had."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos_clients import FakeLoad
from benchmarks.chaos_faults import Plan
from benchmarks.chaos_figures import figures_of
from benchmarks.chaos_storm import Storm, storm
from tests.process.box import Server, running
from tests.process.load import completion, random_prompt, random_request
from tinfer.workloads import read_log

# Everything takes long enough to die in: the start, a prefill chunk, a pull, a decode step.
SLOW = {
    "num_blocks": 128,
    "block_tokens": 8,
    "start_s": 0.05,
    "step_s": 0.002,
    "prefill_token_s": 0.00005,
    "pull_block_s": 0.0005,
    "jitter": 0.5,
    "mean_output_tokens": 30,
    "fail_pull_rate": 0.05,
}
OPTIONS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "lease_ttl": 0.1,
    "max_worker_restarts": 1000,
}
# So many deaths on so few workers hit one request several times in a row, by chance.
STORM = {**OPTIONS, "max_request_restarts": 50, "hang_timeout": 0.8}
NUM_CLIENTS = 24
LONGEST_PROMPT, LONGEST_ANSWER = 150, 200
# The restart's back-off doubles with each death, so few deaths of many workers take least time.
NUM_DEATHS = 14
FULL_ROUNDS = 12


async def check_storm(server: Server, log: Path, seed: int, num_deaths: int) -> Storm:
    """One storm; everything is right while it goes on and when it is over."""
    plan = Plan(num_deaths, every_s=0.3, hang_timeout_s=0.8)
    load = FakeLoad(server.settings, LONGEST_PROMPT, LONGEST_ANSWER)
    done = await storm(server, load, plan, log, NUM_CLIENTS, seed)
    assert done.problems == []
    assert {request.verdict for request in done.asked} == {"right"}
    rng = random.Random(seed)
    after = [random_request(rng, 100, server.settings) for _ in range(40)]
    for request in await server.answer(*after):
        request.check_answered(server.settings)
    await server.idle()
    return done


@pytest.mark.timeout(120)
async def test_no_request_is_lost(tmp_path: Path) -> None:
    log, lines = tmp_path / "events", tmp_path / "requests"
    logs = {"event_log": log, "request_log": lines}
    with running(tmp_path, SLOW, prefill=3, decode=3, **logs, **STORM) as server:
        done = await check_storm(server, log, seed=1, num_deaths=NUM_DEATHS)
        figures = figures_of([done])
        assert figures["kills"] == NUM_DEATHS
        assert figures["requests"] > 3 * NUM_DEATHS
        assert figures["cancelled"] > 0
        assert {"exact", "fast", "from the start"} <= figures["streams_hit"].keys()
        state = await server.state()
        assert state["num_restarts"] > 0
        server.stop()
    # Whatever became of its workers and its client, each is in the log once.
    records = read_log(lines)
    assert len(records) == len({one.request_id for one in records}) == state["num_finished"]
    assert {one.finish_reason for one in records} == {"stop", "length", "abort"}


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 100 + FULL_ROUNDS))
async def test_no_request_is_lost_in_many_storms(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shape = {"prefill": rng.randint(1, 4), "decode": rng.randint(1, 4)}
    options = {**STORM, "route": rng.choice(["split", "auto", "whole"])}
    log = tmp_path / "events"
    with running(tmp_path, SLOW, **shape, event_log=log, **options) as server:
        await check_storm(server, log, seed, num_deaths=max(14, 3 * sum(shape.values())))
        server.stop()


async def test_the_import_process_dies_under_load(tmp_path: Path) -> None:
    """No worker and no request is hurt; workers that die afterwards still come back."""
    with running(tmp_path, SLOW, prefill=1, decode=1, **OPTIONS) as server:
        rng = random.Random(3)
        requests = [
            completion(random_prompt(rng, 60), max_tokens=60, ignore_eos=True) for _ in range(20)
        ]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until(lambda state: state["requests_by_phase"]["decoding"] > 0)
        (zygote,) = [p for p in server.master.children() if "tinfer.worker" in p.cmdline()]
        zygote.kill()
        for request in await answers:
            request.check_answered(server.settings)
        for worker_id in ("prefill-0", "decode-0"):
            await server.signal(worker_id, signal.SIGKILL)
            await server.until_worker(worker_id, "ready", generation=2)
        request = completion([1, 2, 3])
        await server.answer(request)
        request.check_answered(server.settings)
        await server.idle(num_finished=21)
        server.stop()


async def test_a_worker_that_is_stopped_and_then_killed(tmp_path: Path) -> None:
    """While it stands nobody else waits; when it dies the other one takes what it had."""
    with running(tmp_path, SLOW, prefill=1, decode=2, **OPTIONS) as server:
        pids = {name: worker["pid"] for name, worker in (await server.workers()).items()}
        os.kill(pids["decode-0"], signal.SIGSTOP)
        requests = [completion([n + 1] * 20, max_tokens=30, ignore_eos=True) for n in range(12)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until(
            lambda state: (
                state["num_finished"] > 0
                and state["requests_by_phase"]["handoff"] + state["num_finished"] == len(requests)
                and state["workers"][2]["scheduled"]["num_seqs"] == 0
            )
        )
        assert psutil.pid_exists(pids["decode-0"])
        os.kill(pids["decode-0"], signal.SIGKILL)
        await answers
        for request in requests:
            request.check_answered(server.settings)
        # From the blocks that the prefill worker still holds: nothing is computed twice.
        assert (await server.state())["num_restarts"] == 0
        await server.until_worker("decode-0", "ready", generation=2)
        await server.idle(num_finished=len(requests))


async def test_a_worker_that_hangs_is_killed_and_its_requests_go_on(tmp_path: Path) -> None:
    options = {**OPTIONS, "hang_timeout": 0.8}
    with running(tmp_path, SLOW, prefill=1, decode=2, **options) as server:
        requests = [completion([n + 1] * 20, max_tokens=60, ignore_eos=True) for n in range(12)]
        answers = asyncio.create_task(server.answer(*requests))
        await server.until(
            lambda state: all(
                (one["scheduled"] or {"num_decoding": 0})["num_decoding"]
                for one in state["workers"][1:]
            )
        )
        await server.signal("decode-0", signal.SIGSTOP)
        await answers
        for request in requests:
            request.check_answered(server.settings)
        await server.until_worker("decode-0", "ready", generation=2)
        state = await server.state()
        assert state["num_restarts"] > 0
        assert [one["restarts"] for one in state["workers"]] == [0, 1, 0]
        await server.idle(num_finished=len(requests))
        server.stop()


async def test_a_request_that_kills_is_found_out_and_takes_no_other_with_it(
    tmp_path: Path,
) -> None:
    settings = {**SLOW, "poison_prompt_tokens": 200}
    with running(tmp_path, settings, prefill=2, decode=2, **OPTIONS) as server:
        rng = random.Random(4)
        others = [
            completion(random_prompt(rng, 60), max_tokens=30, ignore_eos=True) for _ in range(40)
        ]
        poison = completion(list(range(1, 201)), max_tokens=5)
        await server.answer(*others[:20], poison, *others[20:])
        assert poison.error is not None and poison.error["code"] == 500
        assert poison.error["message"].startswith("4 workers in a row died")
        for request in others:
            request.check_answered(server.settings)
        restarts = [worker["restarts"] for worker in (await server.state())["workers"]]
        assert sum(restarts) == 4
        for worker_id, num in zip(await server.workers(), restarts, strict=True):
            await server.until_worker(worker_id, "ready", generation=1 + num)
        await server.idle(num_finished=len(others) + 1)
        server.stop()
