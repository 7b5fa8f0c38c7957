"""What 100 % load is: the highest Poisson rate at which the queue of the better replica arm is
bounded. Pure: `judge` looks at one probe, `RateSearch` says which rate to probe next.

A probe offers Poisson arrivals for some seconds. Its queue is bounded if both hold:

- over the second half of the arrivals the backlog (requests sent and not ended) grows, by its
  least squares line, by at most `GROWTH_SHARE` of what arrives: nine tenths are kept up with; or by
  at most `GROWTH_SIGMAS` times the square root of its mean. What is looked at is the backlog
  beyond that of a box on which every request takes so many times its unloaded time, the same
  factor for all and set so that both backlogs have the same mean: arrivals that happen to come
  closer together towards the end then look the same on both, and are no growth;
- after the last arrival everything is answered within `DRAIN_UNLOADED` times the longest unloaded
  time of its classes (what the last one may take at the loose SLO's TPOT) and `DRAIN_SHARE` of the
  arrivals' time.

Short probes are noisy, so all probes of one workload draw the same arrivals, stretched, and the
same lengths: what one rate passes and the next fails is the rate, not the draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

GROWTH_SHARE = 0.1
GROWTH_SIGMAS = 0.5
DRAIN_UNLOADED = 4.0
DRAIN_SHARE = 0.1
# Neighbouring rates of the search end up this close.
TOLERANCE = 1.08
MAX_PROBES = 12
_NUM_LOOKS = 100
_FACTORS = (1e-3, 1e3)
_NUM_HALVINGS = 50

Floats = npt.NDArray[np.float64]


class Verdict(Struct, frozen=True):
    """What one probe showed; `drain_s` counts from the last arrival."""

    bounded: bool
    growth_rps: float
    drain_s: float
    max_drain_s: float
    num_failed: int


def max_drain_s(arrivals_s: float, longest_unloaded_s: float) -> float:
    """How long the queue may take to empty after arrivals that lasted `arrivals_s`."""
    return DRAIN_UNLOADED * longest_unloaded_s + DRAIN_SHARE * arrivals_s


def judge(
    sent_s: Sequence[float],
    end_s: Sequence[float],
    alone_s: Sequence[float],
    num_failed: int,
    longest_unloaded_s: float,
) -> Verdict:
    """The verdict on a probe whose i-th request was sent and ended then, and takes `alone_s` alone.

    A request that was cut off because it did not end has its end where it was cut, and counts among
    `num_failed`. Failures alone make a probe unbounded: a refusal is a queue that was full.
    """
    sent, end = np.asarray(sent_s), np.asarray(end_s)
    last_s = float(sent.max())
    drain_s = float(end.max()) - last_s
    allowed_s = max_drain_s(last_s, longest_unloaded_s)
    looks_s = np.linspace(last_s / 2, last_s, _NUM_LOOKS)
    backlog = _backlog(looks_s, sent, end)
    beyond = backlog - _evenly_slowed(looks_s, sent, np.asarray(alone_s), float(backlog.mean()))
    growth_rps = float(np.polyfit(looks_s, beyond, 1)[0]) if last_s > 0 else 0.0
    chance = GROWTH_SIGMAS * float(backlog.mean()) ** 0.5
    allowed_growth = max(GROWTH_SHARE * len(sent) / 2, chance)
    is_kept_up = growth_rps * last_s / 2 <= allowed_growth
    bounded = num_failed == 0 and drain_s <= allowed_s and is_kept_up
    return Verdict(bounded, growth_rps, drain_s, allowed_s, num_failed)


def _backlog(looks_s: Floats, sent: Floats, end: Floats) -> Floats:
    """Requests sent and not ended at each of these times."""
    num_sent = np.searchsorted(np.sort(sent), looks_s, "right")
    num_ended = np.searchsorted(np.sort(end), looks_s, "right")
    return np.asarray(num_sent - num_ended, dtype=np.float64)


def _evenly_slowed(looks_s: Floats, sent: Floats, alone: Floats, mean: float) -> Floats:
    """The backlog of a box that slows every request by the one factor that gives this mean."""
    low, high = _FACTORS
    for _ in range(_NUM_HALVINGS):
        factor = (low * high) ** 0.5
        backlog = _backlog(looks_s, sent, sent + factor * alone)
        low, high = (factor, high) if backlog.mean() < mean else (low, factor)
    return backlog


class RateSearch:
    """Finds the highest rate that passes: doubles or halves until it is enclosed, then bisects.

    `next_rps` is the rate to probe, None when the search is over; `tell` takes the answer.
    """

    def __init__(self, first_rps: float) -> None:
        self._low: float | None = None
        self._high: float | None = None
        self._num_left = MAX_PROBES
        self.next_rps: float | None = first_rps

    @property
    def best_rps(self) -> float | None:
        """The highest rate that has passed."""
        return self._low

    def tell(self, passed: bool) -> None:
        """What came of `next_rps`."""
        rate = self.next_rps
        if rate is None:
            raise ValueError("the search is over")
        if passed:
            self._low = rate
        else:
            self._high = rate
        self._num_left -= 1
        self.next_rps = self._next() if self._num_left > 0 else None

    def _next(self) -> float | None:
        if self._high is None:
            return 2.0 * (self._low or 0.0)
        if self._low is None:
            return self._high / 2.0
        if self._high / self._low <= TOLERANCE:
            return None
        # The middle of a ratio, not of a difference.
        return float((self._low * self._high) ** 0.5)
