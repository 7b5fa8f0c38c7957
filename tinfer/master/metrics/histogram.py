"""Histograms as plain lists: an observation is a bisection and an addition, whatever is served.

`prometheus_client`'s own take a lock and look up children per observation, which at one observation
per token would be a good part of what a token costs the master.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

# Source of the buckets: vLLM 0.32, vllm/v1/metrics/buckets.py, so that panels and alerts made for
# vLLM read the same series.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
NUM_ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0)
NUM_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
# vLLM cuts this series at the model's length, as `Counts.up_to` does.
TOKENS = tuple(float(digit * 10**power) for power in range(8) for digit in (1, 2, 5))
# Ours: a hand-off takes from a fraction of a millisecond to the wait for a seat.
HANDOFF_S = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)


class Counts(NamedTuple):
    """A histogram at one moment. `counts[i]` values are at most `bounds[i]` and above the bound
    before it; the last count, one more than there are bounds, is of values above all."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float

    def up_to(self, bound: float) -> Counts:
        """The same without the bounds above that one; what they count lies above all then."""
        kept = [one for one in self.bounds if one <= bound]
        beyond = sum(self.counts[len(kept) :])
        return Counts(kept, (*self.counts[: len(kept)], beyond), self.total)


class Histogram:
    """Values by bucket, and their sum. `bounds` ascend; a value equal to one is within it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def now(self) -> Counts:
        """What has been counted so far."""
        return Counts(self.bounds, tuple(self.counts), self.total)
