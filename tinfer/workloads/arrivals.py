"""Arrival processes: endless, never-decreasing times in seconds from the start of the run.

Each is a function of a random stream and its parameters and keeps no other state. Rates are mean
requests per second over a long time. Processes with phases measure these in requests, not in
seconds: asking for another rate plays the same trace slower or faster.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from tinfer.workloads import draws


def at_once() -> Iterator[float]:
    """Everything at t = 0."""
    return itertools.repeat(0.0)


def poisson(rng: random.Random, rate_rps: float) -> Iterator[float]:
    """Independent exponential gaps: coefficient of variation 1."""
    now_s = 0.0
    while True:
        now_s += draws.exponential(rng, 1.0 / rate_rps)
        yield now_s


def gamma(rng: random.Random, rate_rps: float, burstiness: float) -> Iterator[float]:
    """Independent gamma gaps of shape `burstiness`, as `vllm bench serve --burstiness`.

    Their coefficient of variation is 1 / sqrt(burstiness): under 1 is bursty, 1 is `poisson` (the
    very same times), over 1 is more even, infinity gives equal gaps.
    """
    if burstiness == 1.0:
        yield from poisson(rng, rate_rps)
    now_s = 0.0
    while True:
        even = burstiness == math.inf
        now_s += (1.0 if even else draws.gamma(rng, burstiness) / burstiness) / rate_rps
        yield now_s


def burstiness_of(cv: float) -> float:
    """The gamma shape whose gaps have this coefficient of variation; cv 0: infinity."""
    return math.inf if cv == 0.0 else cv**-2


def mmpp(
    rng: random.Random, rates_rps: tuple[float, float], mean_stays_s: tuple[float, float]
) -> Iterator[float]:
    """Poisson arrivals whose rate switches between two values, for exponential times.

    A rate of 0 is a silent phase. The first phase is drawn by the share of time each one has.
    """
    phase = draws.pick(rng, mean_stays_s)
    now_s = 0.0
    until_s = draws.exponential(rng, mean_stays_s[phase])
    while True:
        rate_rps = rates_rps[phase]
        next_s = now_s + draws.exponential(rng, 1.0 / rate_rps) if rate_rps > 0.0 else math.inf
        if next_s < until_s:
            now_s = next_s
            yield now_s
        else:
            now_s = until_s
            phase = 1 - phase
            until_s += draws.exponential(rng, mean_stays_s[phase])


def on_off(rng: random.Random, rate_rps: float, cv: float, on_share: float) -> Iterator[float]:
    """A two-state MMPP with one silent phase whose gaps have the coefficient of variation `cv` > 1.

    `on_share` in (0, 1) is the share of time that is not silent; a busy phase then holds
    (cv^2 - 1) / (2 (1 - on_share)^2) requests on average.
    Source: cv^2 = 1 + 2 L r1 / (r1 + r2)^2 for an interrupted Poisson process of rate L that
    falls silent with rate r1 and wakes with rate r2 (Kuczura 1973), solved for r1 and r2.
    """
    on_rate_rps = rate_rps / on_share
    switching = 2.0 * on_rate_rps * (1.0 - on_share) / (cv * cv - 1.0)
    stays_s = (1.0 / (switching * (1.0 - on_share)), 1.0 / (switching * on_share))
    return mmpp(rng, (on_rate_rps, 0.0), stays_s)


def swelling(
    rng: random.Random, rate_rps: float, burstiness: float, depth: float, period_requests: float
) -> Iterator[float]:
    """Gamma gaps under a rate that swells and ebbs as a sine from a random phase.

    The rate goes from (1 - depth) to (1 + depth) times the mean, 0 <= depth < 1, once in the time
    of `period_requests` requests. It is held from one arrival to the next, which is exact enough
    while a period has many requests.
    """
    turn_s = 2.0 * math.pi * rate_rps / period_requests
    phase = 2.0 * math.pi * rng.random()
    now_s = last_s = 0.0
    for next_s in gamma(rng, rate_rps, burstiness):
        now_s += (next_s - last_s) / (1.0 + depth * math.sin(turn_s * now_s + phase))
        last_s = next_s
        yield now_s


def take(times_s: Iterator[float], num: int, rate_rps: float | None = None) -> list[float]:
    """The first `num` times; with `rate_rps`, stretched so that the last is at num / rate_rps.

    The stretch keeps the shape and takes out the chance in the mean rate of a short run, so that
    "75 % load" is that in every repetition. Source: `vllm bench serve` does the same.
    """
    taken = list(itertools.islice(times_s, num))
    if rate_rps is None or not taken or taken[-1] == 0.0:
        return taken
    stretch = num / rate_rps / taken[-1]
    return [time_s * stretch for time_s in taken]
