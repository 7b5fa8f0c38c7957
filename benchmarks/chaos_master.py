"""The master is killed (SIGKILL), whatever goes on: how long until nothing of its server is left.

Looked for are processes, by a mark in their environment, everything in a runtime and temporary
directory of the server's own (sockets, run directory), and its names in /dev/shm.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from benchmarks.chaos_clients import Crowd, Load
from tests.e2e.following import until_state
from tests.e2e.remains import SHM
from tests.e2e.serving import START_DEADLINE_S, ServeProcess
from tests.leaks import CACHES

MARK = "TINFER_CHAOS"
GONE_DEADLINE_S = 5.0
LOOK_S = 0.005
NUM_CLIENTS = 12
LOAD_S = 1.0

Scenario = Literal["launching", "importing", "starting", "idle", "loaded", "stopped"]
# What goes on as the master is killed. launching: a random moment of its first second; importing:
# the import process is up; starting: the workers are; stopped: loaded, and all workers stand still.
SCENARIOS: tuple[Scenario, ...] = (
    *("launching", "importing", "starting"),
    *("idle", "loaded", "stopped"),
)


class Gone(Struct):
    """`seconds` from the kill until nothing was left; `left` is what was there at the deadline."""

    scenario: str
    seconds: float
    num_processes: int
    left: list[str]


class Marked:
    """A server all of whose traces can be told from those of others."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        self._mark = secrets.token_hex(8)
        # Short: Unix sockets below it have 108 bytes for their whole path.
        self._place = folder / secrets.token_hex(2)
        self._place.mkdir()
        environment = {MARK: self._mark, "XDG_RUNTIME_DIR": str(self._place)}
        environment["TMPDIR"] = str(self._place)
        self.process = ServeProcess(folder, *flags, environment=environment)
        self._run_names: set[str] = set()

    def pids(self) -> list[int]:
        """Its processes, also those that have lost their parents; not those that only wait for
        somebody to reap them."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and wanted in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
            except OSError:  # gone meanwhile, or another user's
                continue
        return found

    def left(self) -> list[str]:
        """What is still there of a server whose master was killed."""
        found = [str(path) for path in self._place.iterdir() if not _is_cache(path)]
        found += [str(path) for path in SHM.iterdir() if self._is_segment(path.name)]
        return found + [f"process {pid}" for pid in self.pids()]

    def _is_segment(self, name: str) -> bool:
        return name.removeprefix("sem.").partition(".")[0] in self._run_names

    def wait_gone(self, deadline_s: float) -> list[str]:
        """What is still there at the deadline; returns as soon as nothing is."""
        while (left := self.left()) and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        return left

    def kill(self) -> None:
        self._run_names = {path.name for path in self._place.iterdir() if not _is_cache(path)}
        self.process.process.send_signal(signal.SIGKILL)


def _is_cache(path: Path) -> bool:
    return path.name.startswith(CACHES)


async def killed(
    scenario: Scenario, flags: Sequence[str], load: Load, folder: Path, seed: int
) -> Gone:
    """Start a server, bring it to where the scenario says, kill its master, and look."""
    rng = random.Random(f"{scenario}/{seed}")
    server = Marked(folder, flags)
    try:
        crowd = await _brought(scenario, server, load, rng)
        num_processes = len(server.pids())
        server.kill()
        killed_s = time.monotonic()
        await asyncio.to_thread(server.process.process.wait, GONE_DEADLINE_S)
        left = await asyncio.to_thread(server.wait_gone, killed_s + GONE_DEADLINE_S)
        gone = Gone(scenario, round(time.monotonic() - killed_s, 3), num_processes, left)
        if crowd is not None:
            await crowd
        return gone
    finally:
        server.process.stop()


async def _brought(
    scenario: Scenario, server: Marked, load: Load, rng: random.Random
) -> asyncio.Task[None] | None:
    process = server.process
    if scenario == "launching":
        await asyncio.sleep(rng.random())
        return None
    if scenario == "importing":
        await asyncio.to_thread(process.wait_progress, "importing the engine")
        await asyncio.sleep(0.3 * rng.random())
        return None
    if scenario == "starting":
        await _until_processes(server, 3)
        return None
    await asyncio.to_thread(process.wait_ready)
    if scenario == "idle":
        return None
    crowd = Crowd(process.url, load, NUM_CLIENTS, rng.randrange(1000), on_end=lambda one: None)
    asking = asyncio.create_task(crowd.run())
    await until_state(process.url, lambda state: state["requests_by_phase"]["decoding"] > 0)
    await asyncio.sleep(LOAD_S * rng.random())
    if scenario == "stopped":
        state = await until_state(process.url, lambda state: True)
        for worker in state["workers"]:
            os.kill(worker["pid"], signal.SIGSTOP)
    crowd.stop()
    return asking


async def _until_processes(server: Marked, number: int) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while len(server.pids()) < number:
        assert time.monotonic() < deadline_s, server.process.output
        await asyncio.sleep(LOOK_S)
