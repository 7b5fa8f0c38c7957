"""Workers of two ranks each: the split answers as one plain engine does, and no kill of whichever
process leaves anything behind.

The plain engine has one rank. In float32 the order in which the ranks' parts are added up moves a
logit by a ten-millionth, far less than lies between two tokens of this model; in bfloat16 it would
change answers.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.following import State, all_ready, until_state, worker
from tests.e2e.plain_engine import PlainEngine
from tests.e2e.remains import Remains
from tests.e2e.serving import ServeProcess, complete_all, get_json, serving_a_module, until_idle
from tests.leaks import LeakBaseline

OUTPUT_TOKENS = 16
DTYPE = "float32"
SHM = Path("/dev/shm")
# Two workers make two queues and more for their ranks.
NUM_NAMES = 4
pytestmark = pytest.mark.timeout(300)


def _arguments(folder: Path) -> tuple[str, ...]:
    names = ("--served-model-name", "tiny", "--log-dir", str(folder))
    return (*names, "--route", "split", "--dtype", DTYPE, "--tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, random_model_dir: str, leak_baseline: LeakBaseline
) -> Iterator[ServeProcess]:
    """One prefill and one decode worker of two ranks each."""
    folder = tmp_path_factory.mktemp("ranks")
    with serving_a_module(leak_baseline, folder, random_model_dir, *_arguments(folder)) as process:
        yield process


def _cases(seed: int) -> list[dict[str, Any]]:
    """Lengths at the edges of blocks and chunks, and seeds that a chunked prefill must not move."""
    rng = random.Random(seed)
    lengths = [1, 2, 127, 128, 129, 511, 512, 513, 900, *(rng.randint(1, 900) for _ in range(15))]
    greedy: list[dict[str, Any]] = [{"max_tokens": OUTPUT_TOKENS}] * len(lengths)
    seeded = [{"max_tokens": OUTPUT_TOKENS, "seed": s, "temperature": 1.0} for s in range(6)]
    prompts = [[rng.randrange(256) for _ in range(n)] for n in [*lengths, 900, 600, 550, 300, 9, 1]]
    return [
        {"prompt": prompt, "params": params}
        for prompt, params in zip(prompts, [*greedy, *seeded], strict=True)
    ]


def _one_engine(model_dir: str, cases: list[dict[str, Any]]) -> list[Any]:
    with PlainEngine(model_dir, DTYPE) as engine:
        return engine.run(cases)


def _body(case: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tiny", "prompt": case["prompt"], **case["params"]}


async def _answers(url: str, cases: list[dict[str, Any]]) -> list[tuple[list[int], str]]:
    answers = await complete_all(url, [_body(case) for case in cases])
    return [(answer.token_ids, answer.text) for (answer,) in answers]


def _ranks(state: State, worker_id: str) -> list[psutil.Process]:
    """In the order of their numbers: each was started after the one before."""
    children = psutil.Process(worker(state, worker_id)["pid"]).children()
    return sorted(children, key=lambda process: process.pid)


def _shm_names(server: ServeProcess) -> list[str]:
    return [name for name in os.listdir(SHM) if server.run_dir().name in name]


async def test_split_over_ranks_equals_one_engine_of_one_rank(
    pair: ServeProcess, random_model_dir: str
) -> None:
    cases = _cases(1)
    wanted = await asyncio.to_thread(_one_engine, random_model_dir, cases)
    got = await _answers(pair.url, cases)
    assert got == [(answer["token_ids"], answer["text"]) for (answer,) in wanted]

    await until_idle(pair.url)
    engine = worker(await get_json(f"{pair.url}/debug/state"), "decode-0")["engine"]
    assert (engine["num_pulls"], engine["num_failed_pulls"]) == (len(cases), 0)
    assert engine["num_mapped_peers"] == 1 and engine["pulled_bytes"] > 0
    # All that a decode worker computes of a pulled prompt is its last token.
    assert engine["num_computed_prompt_tokens"] == len(cases)
    assert engine["num_recomputed_pulled_tokens"] == 0


async def test_a_running_server_has_no_name_in_shared_memory(pair: ServeProcess) -> None:
    state = await until_state(pair.url, all_ready)
    assert [len(_ranks(state, name)) for name in ("prefill-0", "decode-0")] == [2, 2]
    assert _shm_names(pair) == []


@pytest.mark.parametrize("victim", ["prefill-0 rank 1", "decode-0 rank 0", "decode-0"])
async def test_a_killed_process_takes_its_worker_with_it_and_both_come_back(
    pair: ServeProcess, victim: str
) -> None:
    cases = _cases(2)[:12]
    before = await _answers(pair.url, cases)
    state = await until_state(pair.url, all_ready)
    name, _, rank = victim.partition(" rank ")
    old = worker(state, name)
    ranks = _ranks(state, name)
    killed = ranks[int(rank)] if rank else psutil.Process(old["pid"])
    killed.send_signal(signal.SIGKILL)

    state = await until_state(
        pair.url, lambda s: all_ready(s) and worker(s, name)["generation"] > old["generation"]
    )
    assert worker(state, name)["generation"] == old["generation"] + 1
    assert [rank for rank in ranks if rank.is_running()] == []
    if rank:
        reason = f"worker {name} died: rank {rank} (process {killed.pid}) was killed by SIGKILL"
        assert reason in pair.output
    assert await _answers(pair.url, cases) == before
    state = await until_state(pair.url, lambda s: not any(s["requests_by_phase"].values()))
    assert worker(state, "decode-0")["engine"]["num_failed_pulls"] == 0
    await until_idle(pair.url)
    assert _shm_names(pair) == []
    folders = {int(p.name) for p in pair.run_dir().iterdir() if re.fullmatch(r"\d+", p.name)}
    assert folders == {w["pid"] for w in state["workers"]}
    assert all(process.status() != psutil.STATUS_ZOMBIE for process in pair.family())


@pytest.mark.parametrize("when", [pytest.param("building", marks=pytest.mark.full), "serving"])
def test_a_killed_master_leaves_nothing(random_model_dir: str, tmp_path: Path, when: str) -> None:
    server = ServeProcess(tmp_path, random_model_dir, *_arguments(tmp_path))
    try:
        if when == "serving":
            server.wait_ready()
            (answer,) = asyncio.run(_answers(server.url, _cases(3)[:1]))
            assert len(answer[0]) == OUTPUT_TOKENS
        else:
            server.wait_progress("starting workers")
            _wait_for_names(server)
        run_dir = server.run_dir().name
        remains = Remains.of(server)
        assert len(remains.processes) >= (8 if when == "serving" else 4)
        server.kill()
        assert remains.left(5.0) == []
        assert [name for name in os.listdir(SHM) if run_dir in name] == []
    finally:
        server.stop()


def _wait_for_names(server: ServeProcess) -> None:
    """Return once workers have made shared memory for their ranks that still has names."""
    deadline = time.monotonic() + 60
    # They have a name for milliseconds: no look may take long.
    run_dir = server.run_dir().name
    while sum(run_dir in name for name in os.listdir(SHM)) < NUM_NAMES:
        assert server.process.poll() is None and time.monotonic() < deadline, server.output
        time.sleep(0.001)
