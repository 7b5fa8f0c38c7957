"""Workers that change their role while requests run: what it costs, and that no stream notices.

    python -m benchmarks.flips --seed 1 --json flips_vllm.json

The built-in model on real vLLM, in float32, where every answer is the same however it is computed:
two prefill workers and two decode workers. `--clients` clients ask, leave, and read slowly as under
`benchmarks.chaos`; every answer is compared token for token with the one of a server at rest.
Meanwhile, `--flips` times, a worker drawn at random is asked for its other role (`POST
/debug/role`).

The result has `flips`, one per change: `worker`, `role`, `num_seqs` on it when it was asked,
`drain_s` from the request until it counts as of the new role (it hands over or finishes what it
has, and takes nothing new meanwhile), and `label_us`, the turn of the scheduler in which the label
changes, as it takes when the event log is replayed; `drain_ms` and `label_us`, their percentiles;
`num_kept` (asked of the last worker of a role, which keeps it); `requests`, `verdicts` and
`problems` as those of `benchmarks.chaos`, open accounts at the end among them.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
from msgspec import Struct

from benchmarks.chaos import running
from benchmarks.chaos_clients import Asked, Crowd, judged
from benchmarks.chaos_vllm import PoolLoad
from benchmarks.result import heading, unwind_on_sigterm, write
from tests.process.box import Server
from tinfer.core import events as ev
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import SchedulerConfig
from tinfer.master.event_log import Entry

POOL_SIZE = 42
FLAGS = (
    *("--prefill", "2", "--decode", "2", "--cpu-threads", "1", "--dtype", "float32"),
    *("--max-num-seqs", "6", "--chunk-size", "256", "--no-enable-prefix-caching"),
)
OTHER = {"prefill": "decode", "decode": "prefill"}
ANSWER_DEADLINE_S = 120.0
FLIP_DEADLINE_S = 60.0
LOOK_EVERY_S = 0.02


class Wish(Struct):
    """A role that was asked for; `is_kept` where it was refused."""

    worker: str
    role: str
    num_seqs: int
    is_kept: bool = False


class Flips:
    """Asks for roles, one after the other."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._rng = random.Random(f"flips/{seed}")
        self.wishes: list[Wish] = []

    async def run(self, num_flips: int, every_s: float) -> None:
        """Returns after the last change. Raises `AssertionError` for one that does not come."""
        async with aiohttp.ClientSession() as session:
            while sum(not wish.is_kept for wish in self.wishes) < num_flips:
                await asyncio.sleep(self._rng.expovariate(1.0 / every_s))
                await self._one(session)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        workers = await self._server.workers()
        worker = workers[self._rng.choice(sorted(workers))]
        wish = Wish(worker["id"], OTHER[worker["role"]], worker["scheduled"]["num_seqs"])
        self.wishes.append(wish)
        body = {"worker": wish.worker, "role": wish.role}
        async with session.post(f"{self._server.url}/debug/role", json=body) as answer:
            wish.is_kept = answer.status == 400
            assert wish.is_kept or answer.status == 202, await answer.text()
        deadline_s = time.monotonic() + FLIP_DEADLINE_S
        while not wish.is_kept:
            if (await self._server.workers())[wish.worker]["role"] == wish.role:
                return
            assert time.monotonic() < deadline_s, f"{wish} has not come"
            await asyncio.sleep(LOOK_EVERY_S)


def changes(log: Path) -> list[tuple[str, str, float, float]]:
    """Worker, role, seconds of the drain and of the turn of the scheduler, of every change in an
    event log. The turns are those of a replay."""
    entries: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
    found, asked_s = [], dict[str, float]()
    with log.open("rb") as file:
        scheduler = Scheduler(msgspec.json.decode(file.readline(), type=SchedulerConfig))
        for line in file:
            now_s, event, _ = entries.decode(line)
            if isinstance(event, ev.RoleAsked):
                asked_s.setdefault(event.worker_id, now_s)
            begun_s = time.perf_counter()
            actions = scheduler.on_event(event, now_s)
            turn_s = time.perf_counter() - begun_s
            for action in actions:
                if isinstance(action, ev.RoleRefused):
                    asked_s.pop(action.worker_id, None)
                if isinstance(action, ev.RoleChanged):
                    drain_s = now_s - asked_s.pop(action.worker_id)
                    found.append((action.worker_id, action.role.value, drain_s, turn_s))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest."""
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(values), 3)}


def account(
    wishes: Sequence[Wish], made: Sequence[tuple[str, str, float, float]], asked: Sequence[Asked]
) -> dict[str, Any]:
    """What the result says. Raises `ValueError` where the event log has other changes."""
    wanted = [wish for wish in wishes if not wish.is_kept]
    if [(wish.worker, wish.role) for wish in wanted] != [(one[0], one[1]) for one in made]:
        raise ValueError("the event log has other changes of role than were asked for")
    return {
        "drain_ms": spread([1e3 * drain_s for _, _, drain_s, _ in made]),
        "label_us": spread([1e6 * turn_s for *_, turn_s in made]),
        "num_kept": len(wishes) - len(wanted),
        "requests": len(asked),
        "verdicts": dict(Counter(one.verdict for one in asked)),
        "flips": [
            {
                "worker": wish.worker,
                "role": wish.role,
                "num_seqs": wish.num_seqs,
                "drain_s": round(drain_s, 4),
                "label_us": round(1e6 * turn_s, 1),
            }
            for wish, (_, _, drain_s, turn_s) in zip(wanted, made, strict=True)
        ],
    }


async def flipped(
    server: Server, arguments: argparse.Namespace
) -> tuple[list[Wish], list[Asked], list[str]]:
    """All changes under load; then everything has to be as it was."""
    pool = PoolLoad(POOL_SIZE, arguments.seed)
    await pool.ask_all(server.url)
    ended: list[Asked] = []
    crowd = Crowd(server.url, pool, arguments.clients, arguments.seed, ended.append)
    asking = asyncio.create_task(crowd.run())
    flips = Flips(server, arguments.seed)
    await flips.run(arguments.flips, arguments.every)
    crowd.stop()
    await asyncio.wait_for(asking, ANSWER_DEADLINE_S)
    problems = []
    try:
        await server.until_phase(queued=0, prefilling=0, handoff=0, decoding=0)
        ledger = await server.ledger()
        if not ledger["idle"]:
            problems.append(f"open accounts: {ledger}")
    except AssertionError as error:
        problems.append(f"open accounts: {error}")
    for one in ended:
        one.verdict = judged(one, pool)
        if one.verdict != "right":
            problems.append(f"{one.verdict}: {one.request_id} ({one.kind})")
    if crowd.num_refused:
        problems.append(f"{crowd.num_refused} requests were refused")
    return flips.wishes, ended, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--every", type=float, default=1.0, help="mean seconds before the next one")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=argparse.FileType("w"), help="write the result here")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="f") as folder:
        with running(FLAGS, Path(folder)) as (server, log):
            wishes, asked, problems = asyncio.run(flipped(server, arguments))
        found = account(wishes, changes(log), asked)
    names = ("flips", "every", "clients", "seed")
    options = {name: getattr(arguments, name) for name in names}
    write({**heading("flips"), "options": options, **found, "problems": problems}, arguments.json)
    for name in ("drain_ms", "label_us", "num_kept", "requests", "verdicts"):
        print(f"{name}: {found[name]}")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
