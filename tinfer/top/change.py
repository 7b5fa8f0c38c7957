"""What counters and histograms have counted between two scrapes.

A counter that has fallen began again at zero, so all that it has now was counted in between: no
difference is ever negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tinfer.top.scrape import Metrics
from tinfer.top.view import Timing

_NOTHING = Metrics()


class Buckets(NamedTuple):
    """Values counted by size: `counts[i]` are at most `bounds[i]` and above the bound before it.
    `bounds` ascend, the last one is infinite; `total` is the sum of the values."""

    bounds: Sequence[float]
    counts: Sequence[float]
    total: float

    @property
    def num(self) -> float:
        """How many values there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None without values."""
        return self.total / self.num if self.num else None

    def quantile(self, share: float) -> float | None:
        """The value that this share (above 0) of all does not exceed, as if those of a bucket lay
        evenly in it; the highest finite bound for what lies above it, None without values.

        Source: Prometheus, `histogram_quantile`, so that dashboards show the same.
        """
        rank, below, lower = share * self.num, 0.0, 0.0
        if not self.num:
            return None
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count and below + count >= rank:
                reached = (rank - below) / count
                return lower if math.isinf(bound) else lower + (bound - lower) * reached
            below += count
            lower = lower if math.isinf(bound) else bound
        return lower

    def timing(self) -> Timing:
        """The figures that are shown of times."""
        p50, p99 = self.quantile(0.5), self.quantile(0.99)
        return Timing(num=round(self.num), mean_s=self.mean, p50_s=p50, p99_s=p99)


class Change:
    """From one scrape to a later one; without an earlier one, all that was ever counted."""

    def __init__(self, before: Metrics | None, now: Metrics) -> None:
        self._before = before or _NOTHING
        self._now = now

    def of(self, name: str, **labels: str) -> float:
        """By how much all counters of that name with these labels have grown."""
        before = self._before.series(name, **labels)
        now = self._now.series(name, **labels)
        return sum(_grown(before.get(key, 0.0), value) for key, value in now.items())

    def buckets(self, name: str) -> Buckets:
        """What a histogram has counted, over all its labels."""
        spelt = {float(le): le for le in self._now.by(f"{name}_bucket", "le")}
        bounds = sorted(spelt)
        counts, below = [], 0.0
        for bound in bounds:
            up_to = self.of(f"{name}_bucket", le=spelt[bound])
            counts.append(max(0.0, up_to - below))
            below = max(below, up_to)
        return Buckets(bounds, counts, self.of(f"{name}_sum"))


def _grown(before: float, now: float) -> float:
    return now - before if now >= before else now
