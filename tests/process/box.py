"""A running server of the fake engine as a test sees it: its state, its workers, their deaths."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from tests.e2e.serving import ServeProcess, get_json, serving, until_idle, wait_gone
from tests.process.load import Request, client, fake_flags, send
from tinfer.worker.fake_settings import FakeSettings

DEADLINE_S = 20.0

Seen = TypeVar("Seen")


class Server:
    """One server, and the settings that its answers follow."""

    def __init__(self, process: ServeProcess, settings: FakeSettings) -> None:
        self.process = process
        self.settings = settings
        self.url = process.url
        self.family = process.family()

    @property
    def master(self) -> psutil.Process:
        return self.family[0]

    async def state(self) -> dict[str, Any]:
        return await get_json(f"{self.url}/debug/state")

    async def ledger(self) -> dict[str, Any]:
        return await get_json(f"{self.url}/debug/ledger")

    async def workers(self) -> dict[str, dict[str, Any]]:
        """What the state says of each worker, by its id."""
        return {worker["id"]: worker for worker in (await self.state())["workers"]}

    async def until(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The state once it is as wished; fails with the state if it is not in time."""

        async def look() -> dict[str, Any]:
            return await self.state()

        return await until(look, done)

    async def until_phase(self, **counts: int) -> None:
        """Wait until so many requests are in these phases."""
        await self.until(
            lambda state: all(state["requests_by_phase"][p] == n for p, n in counts.items())
        )

    async def until_worker(self, worker_id: str, state: str, generation: int = 1) -> None:
        await self.until(
            lambda seen: any(
                (w["id"], w["state"], w["generation"]) == (worker_id, state, generation)
                for w in seen["workers"]
            )
        )

    async def signal(self, worker_id: str, number: signal.Signals) -> None:
        pid = (await self.workers())[worker_id]["pid"]
        assert pid is not None
        os.kill(pid, number)

    async def answer(self, *requests: Request, num_connections: int = 0) -> list[Request]:
        """Send all of them at once and read all answers."""
        async with client(num_connections) as session:
            return await asyncio.gather(*(send(session, self.url, r) for r in requests))

    async def idle(self, num_finished: int | None = None) -> None:
        """Wait until every account is closed; all that was submitted has been forgotten."""
        await until_idle(self.url)
        if num_finished is not None:
            assert (await self.state())["num_finished"] == num_finished

    async def num_descriptors(self, expected: int | None = None) -> int:
        """Descriptors of the master with nobody connected; waits until there are no more than
        expected. libuv opens one of its own with the first connection, and keeps it."""
        await self.state()

        async def num_connected() -> int:
            found = self.master.net_connections(kind="tcp")
            return sum(one.status != psutil.CONN_LISTEN for one in found)

        async def look() -> int:
            return int(self.master.num_fds())

        if expected is None:
            await until(num_connected, lambda number: number == 0)

        return await until(look, lambda number: expected is None or number <= expected)

    def stop(self) -> None:
        """Ctrl-C, and nothing may be left."""
        family, run_dir = self.process.family(), self.process.run_dir()
        assert self.process.interrupt() == 0, self.process.output
        assert wait_gone(family) == []
        assert not run_dir.exists()


async def until(
    look: Callable[[], Awaitable[Seen]],
    done: Callable[[Seen], bool],
    deadline_s: float = DEADLINE_S,
) -> Seen:
    """What `look` sees once it is as wished; fails with the last sight if it is not in time."""
    deadline = time.monotonic() + deadline_s
    while not done(seen := await look()):
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.02)
    return seen


@contextlib.contextmanager
def running(folder: Path, fake: Mapping[str, float], **options: object) -> Iterator[Server]:
    """A ready server that is stopped at the end, however the test went.

    Every request is split unless the options say otherwise: that is the way with most to go wrong.
    """
    whole = {name: int(v) if float(v).is_integer() else v for name, v in fake.items()}
    settings = msgspec.convert(whole, FakeSettings)
    flags = fake_flags(fake, **{"log_dir": folder, "route": "split", **options})
    with serving(folder, *flags) as process:
        yield Server(process, settings)
