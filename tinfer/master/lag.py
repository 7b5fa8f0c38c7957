"""How late the loop's turns are: what every stream waits for when one of them takes long."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable

# A turn that is late by no more than a bound counts there; the last count is what lies beyond.
BOUNDS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
# While requests are live, and while nobody waits for anything. uvloop's timers go by milliseconds.
BUSY_S, IDLE_S = 0.005, 0.1


class LagMeter:
    """Counts turns of the running loop by how late they are, from `start` to `stop`.

    A timer that sets itself, not a task that sleeps: two hundred looks a second would be a tenth of
    what a master with few streams does.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.counts = [0] * (len(BOUNDS_S) + 1)
        # Of all turns; one that is early is not late.
        self.total_s = 0.0

    def start(self) -> None:
        """Look at the running loop."""
        self._look(asyncio.get_running_loop())

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        wait_s = BUSY_S if self._is_busy() else IDLE_S
        self._due_s = time.monotonic() + wait_s
        self._timer = loop.call_later(wait_s, self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self.add(time.monotonic() - self._due_s)
        self._look(loop)

    def add(self, lag_s: float) -> None:
        """Count one turn."""
        self.counts[bisect_left(BOUNDS_S, lag_s)] += 1
        self.total_s += max(0.0, lag_s)
