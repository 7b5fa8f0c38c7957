"""What 100 % load is: the highest Poisson rate at which the queue of the better replica arm is
bounded. Pure: `judge` looks at one probe, `RateSearch` says which rate to probe next.

A probe offers Poisson arrivals for some seconds. Its queue is bounded if both hold:

- over the second half of the arrivals the backlog (requests sent and not ended) grows, by its
  least squares line, by at most `GROWTH_SHARE` of the offered rate: nine tenths are kept up with;
- after the last arrival everything is answered within `DRAIN_UNLOADED` times the longest unloaded
  time of its classes (what the last one may take at the loose SLO's TPOT) and `DRAIN_SHARE` of the
  arrivals' time.

Short probes are noisy, so all probes of one workload draw the same arrivals, stretched, and the
same lengths: what one rate passes and the next fails is the rate, not the draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

GROWTH_SHARE = 0.1
DRAIN_UNLOADED = 4.0
DRAIN_SHARE = 0.1
# Neighbouring rates of the search end up this close.
TOLERANCE = 1.08
MAX_PROBES = 12
_NUM_LOOKS = 100


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
    num_failed: int,
    longest_unloaded_s: float,
) -> Verdict:
    """The verdict on a probe whose i-th request was sent and ended then.

    A request that was cut off because it did not end has its end where it was cut, and counts among
    `num_failed`. Failures alone make a probe unbounded: a refusal is a queue that was full.
    """
    sent, end = np.sort(sent_s), np.sort(end_s)
    last_s = float(sent[-1])
    drain_s = float(end[-1]) - last_s
    allowed_s = max_drain_s(last_s, longest_unloaded_s)
    looks_s = np.linspace(last_s / 2, last_s, _NUM_LOOKS)
    backlog = np.searchsorted(sent, looks_s, "right") - np.searchsorted(end, looks_s, "right")
    growth_rps = float(np.polyfit(looks_s, backlog, 1)[0]) if last_s > 0 else 0.0
    offered_rps = len(sent) / last_s if last_s > 0 else 0.0
    bounded = num_failed == 0 and drain_s <= allowed_s and growth_rps <= GROWTH_SHARE * offered_rps
    return Verdict(bounded, growth_rps, drain_s, allowed_s, num_failed)


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
