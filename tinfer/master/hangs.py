"""Finds workers that are alive and do nothing: stopped, or stuck in a step that never ends.

A worker answers a ping between two steps, so one that is late for long enough is in a step that no
prompt explains. It is killed: its death is then seen and answered like any other. What counts is
how often this process has looked, not the time that has passed: a box that was suspended, or a
master that was stopped itself, finds no worker guilty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tinfer.master.supervisor import Life, Supervisor
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import Ping

PING_EVERY_S = 1.0
# A short limit is looked at this many times before it has passed.
NUM_LOOKS = 4


class HangWatch:
    """Pings every worker that serves; `answered` is to be called with each answer."""

    def __init__(
        self,
        supervisor: Supervisor,
        send: Callable[[Incarnation, Ping], None],
        timeout_s: float,
    ) -> None:
        self._supervisor = supervisor
        self._send = send
        self._timeout_s = timeout_s
        self._every_s = min(PING_EVERY_S, timeout_s / NUM_LOOKS)
        # Looks since the ping that has no answer yet.
        self._num_looks: dict[Incarnation, int] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            self.look()

    def look(self) -> None:
        """Ping who has answered, count for who has not, and end who never will."""
        waited = self._num_looks
        self._num_looks = {}
        for slot in self._supervisor.slots.values():
            if slot.life is not Life.READY:
                continue
            who = slot.incarnation
            num = waited.get(who, 0)
            if num == 0:
                self._send(who, Ping())
            elif num * self._every_s >= self._timeout_s:
                reason = f"hung: no step ended in {self._timeout_s:g} s"
                self._supervisor.end_worker(slot, reason, "hung")
            self._num_looks[who] = num + 1

    def answered(self, who: Incarnation) -> None:
        """That worker has answered its ping."""
        self._num_looks.pop(who, None)
