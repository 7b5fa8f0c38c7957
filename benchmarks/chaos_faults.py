"""Kills, hangs and pauses workers of a running server while a request is in a chosen phase.

A *kill* is a SIGKILL; a *hang* a SIGSTOP that only the server's hang detection ends; a *pause* a
SIGSTOP that SIGCONT ends before that. All of it happens on one thread, which also follows the event
log, so that little time passes between what is seen and what is done about it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from benchmarks.chaos_follow import PHASES, Death, Followed, LogFollower, Phase
from tinfer.wire.links import Incarnation

Kind = Literal["kill", "hang", "pause"]
Aim = Phase | Literal["starting"]
AIMS: tuple[Aim, ...] = (*PHASES, "starting")
# The following is a look at a file: so long between two looks where nothing was new.
POLL_S = 0.001
# Between two questions to the server.
ASK_S = 0.02
# A phase in which no request comes to be within this time is given up for another one.
AIM_DEADLINE_S = 1.5
SEEN_DEADLINE_S = 20.0
# Up to so long after the phase has begun, so that not only its first moment is hit.
MAX_DELAY_S = 0.02


class Plan(Struct, frozen=True):
    """How one server is to be struck: `num_deaths` kills and hangs, and pauses between them.

    `every_s` is the mean time between two; `hang_timeout_s` is the server's. With `pins`, copies
    are too short to be met: a reader is held until it has one to make, and struck as it goes on.
    """

    num_deaths: int
    every_s: float
    hang_timeout_s: float
    pins: bool = False
    hang_share: float = 0.15
    pause_share: float = 0.1
    aims: tuple[Aim, ...] = AIMS


class Fault(Struct):
    """One fault. `phase` is where its request was as it struck, by the server's clock."""

    kind: Kind
    aim: Aim
    worker: Incarnation
    at_s: float
    phase: Aim
    request_id: str | None = None


class Strike(Struct, frozen=True):
    """What is struck; `request` is None where a worker that starts is."""

    worker: Incarnation
    request: Followed | None


class Processes:
    """The workers' processes by incarnation, held by descriptors so that no pid is mistaken."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pidfds: dict[Incarnation, int] = {}

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()

    def signal(self, worker: Incarnation, number: signal.Signals) -> bool:
        """False where the worker is gone already."""
        if worker not in self._pidfds:
            self._look()
        pidfd = self._pidfds.get(worker)
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def starting(self) -> list[Incarnation]:
        """Workers that have a process and are not ready."""
        return self._look()

    def _look(self) -> list[Incarnation]:
        with urllib.request.urlopen(f"{self._url}/debug/state", timeout=30) as response:
            workers = json.load(response)["workers"]
        starting = []
        for one in workers:
            who = Incarnation(one["id"], one["generation"])
            if one["pid"] is None or one["state"] not in ("ready", "starting"):
                continue
            if who not in self._pidfds:
                with contextlib.suppress(ProcessLookupError):
                    self._pidfds[who] = os.pidfd_open(one["pid"])
            if one["state"] == "starting":
                starting.append(who)
        return starting


class Injector(threading.Thread):
    """Strikes one server by a plan and a seed; `faults` is complete once it has ended.

    `problems` has what the server did not do about it: a death or a hang that was not seen.
    """

    def __init__(self, url: str, log: Path, plan: Plan, seed: int) -> None:
        super().__init__(name="faults")
        self._plan = plan
        self._rng = random.Random(f"faults/{seed}")
        self._processes = Processes(url)
        self.follower = LogFollower(log)
        self.faults: list[Fault] = []
        self.problems: list[str] = []
        self.num_missed: dict[Aim, int] = dict.fromkeys(AIMS, 0)
        self.error: BaseException | None = None
        self._is_over = threading.Event()
        self._aims: list[Aim] = []

    def run(self) -> None:
        try:
            self._strike_all()
        except BaseException as error:  # noqa: BLE001  for the thread that waits for this one
            self.error = error
        finally:
            self._processes.close()

    def end(self) -> None:
        """Read the rest of the log, once the server has nothing to do any more."""
        while self.follower.poll():
            pass
        self.follower.close()
        if self.error is not None:
            raise self.error

    def _strike_all(self) -> None:
        while sum(fault.kind != "pause" for fault in self.faults) < self._plan.num_deaths:
            self._wait(self._plan.every_s * self._rng.uniform(0.3, 1.7))
            draw = self._rng.random()
            kind: Kind = "kill"
            if draw < self._plan.hang_share:
                kind = "hang"
            elif draw < self._plan.hang_share + self._plan.pause_share:
                kind = "pause"
            self._strike_one(kind)
        self._wait_until(lambda: not self._unseen(), SEEN_DEADLINE_S)
        self.problems += [f"{one} was not seen dead" for one in self._unseen()]

    def _strike_one(self, kind: Kind) -> None:
        aim = self._next_aim(kind)
        found = self._aimed(aim)
        if found is None:
            self.num_missed[aim] += 1
            return
        # A second look: it was chosen a moment ago, and the signal is sent by what is true now.
        number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
        at_s = time.monotonic()
        if not self._processes.signal(found.worker, number):
            return
        request = found.request
        phase: Aim = "starting"
        if request is not None:
            self._wait(POLL_S)  # what was under way as it struck is in the log by then
            phase = request.phase_at(at_s)
        name = None if request is None else request.request_id
        self.faults.append(Fault(kind, aim, found.worker, at_s, phase, name))
        if kind == "pause":
            self._wait(self._plan.hang_timeout_s * self._rng.uniform(0.05, 0.6))
            self._processes.signal(found.worker, signal.SIGCONT)

    def _next_aim(self, kind: Kind) -> Aim:
        """Every phase as often as another, in random order. Hangs are looked for in ready workers
        only, and a stopped worker that starts would be one for minutes."""
        if not self._aims:
            self._aims = list(self._plan.aims)
            self._rng.shuffle(self._aims)
        aim = self._aims.pop()
        return "decoding" if aim == "starting" and kind != "kill" else aim

    # --- aiming -------------------------------------------------------------------------------

    def _aimed(self, aim: Aim) -> Strike | None:
        """A worker to strike, as soon as there is one; None if there is none in time."""
        if aim == "starting":
            return self._starting()
        if aim == "copying" and self._plan.pins:
            return self._pinned()
        found: list[Strike] = []

        def look() -> bool:
            requests = self.follower.at(aim)
            self._rng.shuffle(requests)
            for request in requests:
                worker = self._victim(aim, request)
                if worker is not None:
                    found.append(Strike(worker, request))
                    return True
            return False

        if not self._wait_until(look, AIM_DEADLINE_S):
            return None
        if aim in ("prefilling", "decoding"):  # the others are over too soon for a delay
            self._wait(MAX_DELAY_S * self._rng.random())
        return found[0]

    def _victim(self, aim: Aim, request: Followed) -> Incarnation | None:
        """Whom to strike for a request in that phase; None where nobody is fit."""
        able = self._able()
        if aim == "queued":  # nobody has it: who is about to take it, or what is before it
            workers = able
        elif aim == "copying":
            workers = [one for one in (request.worker, request.source) if one in able]
        elif aim == "handoff":
            workers = [request.source] if request.source in able else []
        else:
            workers = [request.worker] if request.worker in able else []
        return self._rng.choice(workers) if workers else None

    def _able(self) -> list[Incarnation]:
        """Workers that are up and were not struck in this life, if another is left beside the one
        that is chosen; now and then also the last one."""
        struck = set(self._unseen())
        able = sorted(one for one in self.follower.live.values() if one not in struck)
        return able if len(able) > 1 or self._rng.random() < 0.02 else []

    def _unseen(self) -> list[Incarnation]:
        """What was killed or hangs, and is not dead to the server yet. One that was killed before
        it was ever ready is not told of in the log."""
        return [
            fault.worker
            for fault in self.faults
            if fault.kind != "pause"
            and fault.phase != "starting"
            and fault.worker not in self.follower.deaths
        ]

    def _starting(self) -> Strike | None:
        known = {fault.worker for fault in self.faults}
        end_s = time.monotonic() + AIM_DEADLINE_S
        while time.monotonic() < end_s and len(self.follower.live) < self._num_workers():
            found = [one for one in self._processes.starting() if one not in known]
            if found:
                return Strike(found[0], None)
            self._wait(ASK_S)
        return None

    def _num_workers(self) -> int:
        dead = {death.worker.worker_id for death in self.follower.deaths.values()}
        return len(self.follower.live.keys() | dead)

    def _pinned(self) -> Strike | None:
        """Hold a reader until a copy waits for it, let it go, and strike a moment later."""
        readers = {one.worker for one in self.follower.at("decoding")} & set(self._able())
        if not readers:
            return None
        reader = self._rng.choice(sorted(one for one in readers if one is not None))
        if not self._processes.signal(reader, signal.SIGSTOP):
            return None
        found: list[Followed] = []

        def look() -> bool:
            found.extend(one for one in self.follower.at("copying") if one.worker == reader)
            return bool(found)

        try:
            seen = self._wait_until(look, 0.5 * self._plan.hang_timeout_s)
        finally:
            self._processes.signal(reader, signal.SIGCONT)
        if not seen:
            return None
        time.sleep(0.004 * self._rng.random())
        request = found[0]
        both = [one for one in (request.worker, request.source) if one in self._able()]
        return Strike(self._rng.choice(both), request) if both else None

    # --- time ---------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Follow the log for so long."""
        self._wait_until(lambda: False, seconds)

    def _wait_until(self, done: Callable[[], bool], deadline_s: float) -> bool:
        """Follow the log until it is so; False if it is not in time."""
        end_s = time.monotonic() + deadline_s
        while True:
            news = self.follower.poll()
            if done():
                return True
            left_s = end_s - time.monotonic()
            if left_s <= 0.0:
                return False
            if not news:
                time.sleep(min(POLL_S, left_s))


def deaths_of(injector: Injector) -> list[Death]:
    """Every death that the server has seen, in their order."""
    return sorted(injector.follower.deaths.values(), key=lambda death: death.down_s)
