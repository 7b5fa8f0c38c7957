"""One server under load while its workers are struck, and the account of it afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from msgspec import Struct

from benchmarks.chaos_clients import Asked, Crowd, Load, Verdict, judged
from benchmarks.chaos_faults import Fault, Injector, Plan, deaths_of
from benchmarks.chaos_follow import Death
from tests.e2e.remains import Remains
from tests.process.box import Server, until

# After the last fault: for clients to get their answers, for workers to come back (the back-off
# doubles with each death), for the ledger to be zero.
ANSWER_DEADLINE_S = 120.0
RECOVERY_DEADLINE_S = 120.0
GONE_DEADLINE_S = 5.0
MAX_EXAMPLES = 10


class Storm(Struct):
    """What came of it. `problems` is empty if all went as promised."""

    seconds: float
    faults: list[Fault]
    deaths: list[Death]
    asked: list[Asked]
    num_refused: int
    num_missed: dict[str, int]
    problems: list[str]

    @property
    def num_cancelled(self) -> int:
        return sum(one.cancelled for one in self.asked)


async def storm(
    server: Server,
    load: Load,
    plan: Plan,
    log: Path,
    num_clients: int,
    seed: int,
    tolerated: Collection[Verdict] = (),
) -> Storm:
    """Load and faults until the plan is carried out; then everything has to be as it was. Answers
    of the `tolerated` verdicts are no problem, and for the caller to explain."""
    started_s = time.monotonic()
    num_descriptors = await server.num_descriptors()
    num_processes = len(server.process.family())
    injector = Injector(server.url, log, plan, seed)
    ended: list[Asked] = []
    crowd = Crowd(server.url, load, num_clients, seed, ended.append)
    asking = asyncio.create_task(crowd.run())
    injector.start()
    await asyncio.to_thread(injector.join)
    crowd.stop()
    problems = []
    try:
        await asyncio.wait_for(asking, ANSWER_DEADLINE_S)
    except TimeoutError:
        problems.append(f"clients still wait {ANSWER_DEADLINE_S:g} s after the last fault")
    problems += await _unrest(server, num_descriptors, num_processes)
    injector.end()
    for one in ended:
        one.verdict = judged(one, load)
    problems += injector.problems + _unserved(injector)
    problems += [_described(one) for one in ended if one.verdict not in ("right", *tolerated)]
    return Storm(
        seconds=time.monotonic() - started_s,
        faults=injector.faults,
        deaths=deaths_of(injector),
        asked=ended,
        num_refused=crowd.num_refused,
        num_missed=dict(injector.num_missed),
        problems=problems[:MAX_EXAMPLES],
    )


def _described(one: Asked) -> str:
    body = {name: value for name, value in one.body.items() if name not in ("prompt", "messages")}
    status = f"status {one.status}, error {one.error}"
    return (
        f"{one.verdict}: {one.request_id} ({one.kind}, {body}), {one.num_tokens} tokens, {status}"
    )


async def _unrest(server: Server, num_descriptors: int, num_processes: int) -> list[str]:
    """What is not as it was once nothing is left to do."""
    looks: dict[str, Any] = {
        "workers that did not come back": _workers_down,
        "open accounts": _open_accounts,
    }
    problems = []
    for what, look in looks.items():
        problems += await _waited(what, lambda look=look: look(server))

    async def descriptors() -> list[str]:
        number = server.master.num_fds()
        return [f"{number} instead of {num_descriptors}"] if number > num_descriptors else []

    async def processes() -> list[str]:
        number = len(server.process.family())
        return [f"{number} instead of {num_processes}"] if number != num_processes else []

    problems += await _waited("descriptors", descriptors)
    return problems + await _waited("processes", processes)


async def _waited(what: str, look: Any) -> list[str]:
    try:
        await until(look, lambda found: not found, RECOVERY_DEADLINE_S)
    except AssertionError as error:
        return [f"{what}: {error}"]
    return []


async def _workers_down(server: Server) -> list[str]:
    workers = (await server.state())["workers"]
    return [f"{one['id']} is {one['state']}" for one in workers if one["state"] != "ready"]


async def _open_accounts(server: Server) -> list[str]:
    ledger = await server.ledger()
    return [] if ledger["idle"] else [str(ledger)]


def _unserved(injector: Injector) -> list[str]:
    """Requests that were failed although a worker was up to serve them."""
    failed = [one for one in injector.follower.failures if one[1] != "no-worker" or one[2]]
    problems = [f"{name} failed ({cause}) with {up} up" for name, cause, up in failed]
    lost = [
        f"{loss.request_id} was never started again after {death.worker} died"
        for death in injector.follower.deaths.values()
        for loss in death.losses
        if loss.goes_on == "nowhere" and loss.request_id in injector.follower.requests
    ]
    return problems + lost


def left_by(server: Server) -> list[str]:
    """Stop the server as a person would; what is left of it."""
    remains = Remains.of(server.process)
    code = server.process.interrupt()
    left = remains.left(GONE_DEADLINE_S)
    return [*([f"exit code {code}"] if code else []), *left]
