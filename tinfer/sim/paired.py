"""Means and ratios over draws of a workload, with the interval that so few draws allow. Pure.

Draws are independent and few, so intervals are Student's: the mean plus or minus a quantile of t
times the standard error, in which everything that differs between draws is counted. Ratios are
paired, since both sides get the same requests, and are averaged as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from msgspec import Struct

# The 97.5 % quantile of Student's t for 1 to 30 degrees of freedom; beyond, the normal one.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.960


class Estimate(Struct, frozen=True):
    """A figure and its 95 % interval, whose ends are None where one draw is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent draws. Raises `ValueError` for none."""
    if not values:
        raise ValueError("the mean of nothing")
    mean = fmean(values)
    num = len(values)
    if num == 1:
        return Estimate(mean)
    quantile = _T[num - 2] if num - 2 < len(_T) else _NORMAL
    half = quantile * stdev(values) / math.sqrt(num)
    return Estimate(mean, mean - half, mean + half)


def ratio_of(mine: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """The mean ratio of paired draws; None where a value is not above 0 or is none."""
    pairs = list(zip(mine, theirs, strict=True))
    if not pairs or not all(_is_positive(value) for pair in pairs for value in pair):
        return None
    logs = mean_of([math.log(a / b) for a, b in pairs])
    if logs.low is None or logs.high is None:
        return Estimate(math.exp(logs.value))
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0.0
