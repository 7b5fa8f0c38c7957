"""Time as an injected dependency: intervals come from the monotonic clock, never from wall time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component gets its time from; tests pass their own."""

    def now_s(self) -> float:
        """Seconds on a clock that never goes back; the origin means nothing."""
        ...


class MonotonicClock:
    """The machine's monotonic clock, shared by every process of one boot."""

    def now_s(self) -> float:
        return time.monotonic()
