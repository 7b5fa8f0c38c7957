"""Random draws that give the same numbers on every machine and Python version.

Of the methods of `random.Random` only seeding with a text and `random()` are promised never to
change (Source: the module's documentation, "Notes on Reproducibility"), so all else is computed
from `random()` here: `expovariate`, `gauss`, `gammavariate`, `lognormvariate`, `choices`, `shuffle`
and `randrange` are not used. What is left to differ is the last bit of log, exp and sin between C
libraries; lengths are rounded to tokens and arrivals to microseconds, which hides it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from statistics import NormalDist

STANDARD_NORMAL = NormalDist()
# random() can give 0, whose normal quantile is minus infinity.
LEAST_RANK = 2.0**-53


def exponential(rng: random.Random, mean: float) -> float:
    """A draw >= 0 from the exponential distribution."""
    return -math.log(1.0 - rng.random()) * mean


def normal(rng: random.Random) -> float:
    """A draw from the standard normal distribution, by its quantile function."""
    return STANDARD_NORMAL.inv_cdf(max(rng.random(), LEAST_RANK))


def gamma(rng: random.Random, shape: float) -> float:
    """A draw from the gamma distribution of scale 1, whose mean is `shape` > 0.

    Source: G. Marsaglia, W. Tsang, "A simple method for generating gamma variables", 2000;
    a shape under 1 is drawn one higher and multiplied by U^(1/shape), as in its section 6.
    """
    if shape < 1.0:
        boost = math.log(1.0 - rng.random()) / shape
        return gamma(rng, shape + 1.0) * math.exp(boost)
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = normal(rng)
        v = (1.0 + c * x) ** 3
        if v <= 0.0:
            continue
        if math.log(1.0 - rng.random()) < 0.5 * x * x + d - d * v + d * math.log(v):
            return d * v


def pick(rng: random.Random, weights: Sequence[float]) -> int:
    """An index into `weights`, each as likely as its weight's share of the sum."""
    reached = list(itertools.accumulate(weights))
    mark = rng.random() * reached[-1]
    return next((i for i, top in enumerate(reached) if mark < top), len(weights) - 1)


def zipf_weights(num: int, exponent: float) -> list[float]:
    """Shares of the sum 1 that fall with rank as 1 / rank^exponent; exponent 0: equal shares."""
    raw = [rank**-exponent for rank in range(1, num + 1)]
    # sum() of floats is rounded in another way since Python 3.12.
    total = math.fsum(raw)
    return [weight / total for weight in raw]
