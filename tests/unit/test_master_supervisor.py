"""The supervisor where the reports of the import process and of a worker race each other."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.wire.samples import TO_MASTER
from tinfer.config import load
from tinfer.core.types import Role
from tinfer.master import supervisor as module
from tinfer.master.placement import Placement
from tinfer.master.rundir import RunDirectory
from tinfer.master.supervisor import Cause, Life, Supervisor, WorkerSlot
from tinfer.wire.control import CannotFork, Exited, Forked, Imported, WorkerSpec
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import Ready

(READY,) = [message for message in TO_MASTER if isinstance(message, Ready)]
FIRST = Incarnation("prefill-0", 1)


class Orders:
    """Stands in for the import process."""

    def __init__(self, *_: object) -> None:
        self.specs: list[WorkerSpec] = []
        self.num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1

    def fork(self, spec: WorkerSpec) -> None:
        self.specs.append(spec)

    async def close(self, _timeout_s: float) -> None:
        return


class Fleet:
    """A supervisor of one worker, whose process is a sleeping one."""

    def __init__(self) -> None:
        config = load({"engine": "fake", "prefill": 1, "decode": 0})
        self.run_dir = RunDirectory()
        self.up: list[Incarnation] = []
        self.down: list[Incarnation] = []
        self.given_up: list[str] = []
        self.lost = asyncio.Event()
        self.supervisor = Supervisor(
            config,
            [Placement(worker_id="prefill-0", role=Role.PREFILL, device="cpu")],
            self.run_dir,
            "/m",
            lambda slot: self.up.append(slot.incarnation),
            self._on_down,
            lambda slot: self.given_up.append(slot.reason),
            lambda: None,
        )
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        self.supervisor.start_imports()
        self.supervisor.start_workers("shm")

    @property
    def slot(self) -> WorkerSlot:
        return self.supervisor.slots["prefill-0"]

    def forked(self, generation: int = 1) -> None:
        report = Forked("prefill-0", generation, self.process.pid, forked=True)
        self.supervisor._control(report)

    def _on_down(self, dead: Incarnation) -> None:
        self.down.append(dead)
        self.lost.set()

    async def until_down(self) -> None:
        async with asyncio.timeout(10):
            await self.lost.wait()

    async def close(self) -> None:
        self.process.kill()
        self.process.wait()
        await self.supervisor.stop(lambda _worker: None)
        self.run_dir.remove()


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(module, "ZygoteLink", Orders)
    fleet = Fleet()
    yield fleet
    await fleet.close()


@pytest.mark.parametrize("ready_first", [False, True])
async def test_ready_and_forked_may_come_in_either_order(fleet: Fleet, ready_first: bool) -> None:
    """They come over two sockets; either way the worker serves, and its death is seen."""
    if ready_first:
        fleet.supervisor.worker_ready(FIRST, READY)
    fleet.forked()
    if not ready_first:
        fleet.supervisor.worker_ready(FIRST, READY)
    assert fleet.process.poll() is None
    assert (fleet.slot.life, fleet.slot.pid) == (Life.READY, fleet.process.pid)
    assert fleet.up == [FIRST]
    fleet.process.kill()
    await fleet.until_down()
    assert fleet.down == [FIRST]


async def test_a_worker_of_an_order_that_was_given_up_is_ended(fleet: Fleet) -> None:
    fleet.forked(generation=0)
    assert fleet.process.wait(10) == -9
    assert (fleet.slot.life, fleet.slot.pid) == (Life.STARTING, None)
    assert fleet.down == []


@pytest.mark.parametrize("has_imported", [False, True])
async def test_an_import_process_that_does_not_come_to_an_order_is_replaced(
    fleet: Fleet, has_imported: bool
) -> None:
    """One whose first imports take too long is not started over: the next would be as slow."""
    orders = fleet.supervisor._zygote
    assert isinstance(orders, Orders)
    if has_imported:
        fleet.supervisor._control(Imported(1.0))
    fleet.supervisor._start_too_slow(fleet.slot)
    assert orders.num_kills == has_imported
    assert fleet.slot.life is Life.DEAD


@pytest.mark.parametrize(
    ("status", "said", "cause"),
    [
        (-9, None, "signal"),
        (3, None, "exit"),
        (3, "fault", "fault"),
        (-9, "hung", "hung"),
        (-9, "nonsense", "nonsense"),
    ],
)
async def test_a_death_counts_under_its_cause(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, status: int, said: str | None, cause: Cause
) -> None:
    supervisor, counted = fleet.supervisor, asyncio.Event()
    # Here the worker is a child of this process, and would be reaped with its real status.
    monkeypatch.setattr(supervisor, "_reap_orphan", lambda slot: None)
    fleet.forked()
    supervisor.worker_ready(FIRST, READY)
    if said == "fault":
        supervisor.worker_failed(FIRST, "out of memory")
    elif said is not None:
        supervisor.end_worker(fleet.slot, "for a reason", cause)
    fleet.process.kill()
    await fleet.until_down()
    supervisor._control(Exited(fleet.process.pid, status))
    assert supervisor.deaths == {}, "the cause may still come"
    supervisor._on_change = counted.set
    async with asyncio.timeout(10):
        await counted.wait()
    assert supervisor.deaths == {("prefill-0", cause): 1}
    assert fleet.slot.num_restarts == 1


@pytest.mark.parametrize("generation", [0, 1])
async def test_a_worker_that_cannot_be_forked_is_given_up(fleet: Fleet, generation: int) -> None:
    """What is wrong with its specification stays so; an order of before does not count."""
    fleet.supervisor._control(CannotFork("prefill-0", generation, "--engine-arg x: no such"))
    if generation == 0:
        assert (fleet.slot.life, fleet.given_up) == (Life.STARTING, [])
        return
    assert (fleet.slot.life, fleet.given_up) == (Life.GIVEN_UP, ["--engine-arg x: no such"])
    error = fleet.supervisor.cannot_start(fleet.slot)
    assert error.message == "worker prefill-0 (CPU) cannot start: --engine-arg x: no such"
    assert fleet.up == fleet.down == []
