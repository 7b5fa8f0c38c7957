"""Intervals by a hierarchical bootstrap, paired across arms. Pure and seeded.

A resample draws repetitions with replacement, and within each drawn repetition its requests with
replacement: both what differs between runs and what differs between requests is in the interval.
The same draw weighs all arms, since request i of repetition r is the same request in each: what the
draw of lengths and arrivals does to both sides cancels in their ratio. An interval holds the middle
95 % of what the resamples give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import Struct

CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


class Estimate(Struct, frozen=True):
    """A figure and its interval; the bounds are None where resamples gave nothing."""

    value: float
    low: float | None
    high: float | None


class Weights(Struct, frozen=True):
    """How often each repetition and each request is in each resample.

    `repetitions` [num_resamples, num_repetitions]; `requests` [num_resamples, requests of all
    repetitions one after the other]. Row 0 is what was measured, everything once.
    """

    repetitions: Floats
    requests: Floats


def draw(requests_per_repetition: Sequence[int], num_resamples: int, seed: int) -> Weights:
    """Weights for runs of so many requests each."""
    rng = np.random.default_rng(seed)
    num = len(requests_per_repetition)
    repetitions = np.ones((num_resamples + 1, num))
    repetitions[1:] = rng.multinomial(num, np.full(num, 1.0 / num), size=num_resamples)
    columns = []
    for place, num_requests in enumerate(requests_per_repetition):
        weights = np.ones((num_resamples + 1, num_requests))
        # A repetition that is drawn twice has its requests drawn twice, each time anew.
        draws = (repetitions[1:, place] * num_requests).astype(np.int64)
        weights[1:] = rng.multinomial(draws, np.full(num_requests, 1.0 / num_requests))
        columns.append(weights)
    return Weights(repetitions, np.concatenate(columns, axis=1))


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """For each row of weights, over the values that are not NaN; NaN where none has weight."""
    known = ~np.isnan(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights[:, known] @ values[known]) / total, dtype=np.float64)


def weighted_percentile(
    values: Floats, weights: Floats, owner: npt.NDArray[np.int64], percent: float
) -> Floats:
    """For each row of whole-number weights, the percentile of the values so often repeated.

    Value i has the weight of column `owner[i]`; NaN values are left out. Interpolates linearly as
    `numpy.percentile` does. NaN where nothing has weight.
    """
    known = ~np.isnan(values)
    order = np.argsort(values[known], kind="stable")
    ordered, owners = values[known][order], owner[known][order]
    result = np.full(len(weights), np.nan)
    for row, weight in enumerate(weights):
        reached = np.cumsum(weight[owners])
        if not len(reached) or reached[-1] < 1:
            continue
        at = (reached[-1] - 1) * percent / 100.0
        low, high = np.searchsorted(reached, (math.floor(at), math.ceil(at)), "right")
        result[row] = ordered[low] + (ordered[high] - ordered[low]) * (at - math.floor(at))
    return result


def estimate(resampled: Floats) -> Estimate | None:
    """From the figures of all rows of `Weights`; None where the measured one is none."""
    value = float(resampled[0])
    if not math.isfinite(value):
        return None
    known = resampled[1:][np.isfinite(resampled[1:])]
    if not len(known):
        return Estimate(value, None, None)
    tail = 100.0 * (1.0 - CONFIDENCE) / 2.0
    low, high = np.percentile(known, (tail, 100.0 - tail))
    return Estimate(value, float(low), float(high))


def meets(interval: Estimate, target: float, higher_is_better: bool) -> bool:
    """Whether the end of the interval that is nearer to failing meets the target."""
    near = interval.low if higher_is_better else interval.high
    if near is None:
        return False
    return near >= target if higher_is_better else near <= target
