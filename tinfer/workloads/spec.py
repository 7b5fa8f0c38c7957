"""What is asked for: a whole workload, described so briefly that it fits into a result file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Annotated

from msgspec import Meta, Struct

from tinfer.workloads import arrivals
from tinfer.workloads.lengths import Limits

ArrivalProcess = Callable[[random.Random, float], Iterator[float]]


class WorkloadSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Asks for `num_requests` requests of the workload called `name`; see `catalogue.WORKLOADS`.

    Equal specs give equal lists. Streams for arrivals and for lengths are apart: another
    `rate_rps` keeps every length, and another limit keeps every arrival (in `chat` a conversation
    that no longer fits ends earlier, so there it does not).

    `rate_rps`: mean requests per second; None takes the workload's own, which for the paper's five
    is everything at t = 0. `burstiness`: None takes the workload's own arrival process, a number
    gamma gaps of that shape instead (1 = Poisson). `at_once`: everything at t = 0, whatever the
    workload. `exact_rate` stretches arrivals so that the last of n comes at n / rate_rps.
    `length_scale`, `max_prompt_tokens`, `max_output_tokens`: see `lengths.Limits`.
    `options`: the workload's own settings by name, each with a default.
    Raises `ValueError` if the fields contradict each other or are out of range.
    """

    name: str
    num_requests: Annotated[int, Meta(ge=1)]
    rate_rps: Annotated[float, Meta(gt=0.0)] | None = None
    seed: int = 0
    burstiness: Annotated[float, Meta(gt=0.0)] | None = None
    at_once: bool = False
    exact_rate: bool = True
    length_scale: Annotated[float, Meta(gt=0.0)] = 1.0
    max_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    options: dict[str, float] = {}

    def __post_init__(self) -> None:
        at_least_one = (self.num_requests, self.max_prompt_tokens, self.max_output_tokens)
        if any(num is not None and num < 1 for num in at_least_one):
            raise ValueError("num_requests, max_prompt_tokens and max_output_tokens start at 1")
        positive = (self.rate_rps, self.burstiness, self.length_scale)
        if any(value is not None and not value > 0.0 for value in positive):
            raise ValueError("rate_rps, burstiness and length_scale must be above 0")
        if self.rate_rps == float("inf"):
            raise ValueError("an infinite rate_rps is spelled at_once=True")
        if self.at_once and not (self.rate_rps is None and self.burstiness is None):
            raise ValueError("at_once leaves no room for rate_rps or burstiness")

    @property
    def limits(self) -> Limits:
        """Scale and clamps of the lengths."""
        return Limits(self.length_scale, self.max_prompt_tokens, self.max_output_tokens)

    def stream(self, purpose: str) -> random.Random:
        """A random stream for one purpose, independent of all others."""
        return random.Random(f"tinfer workload {self.name} {self.seed} {purpose}")

    def process(self, own: ArrivalProcess) -> ArrivalProcess:
        """The arrival process asked for: the workload's `own`, or gamma gaps instead."""
        burstiness = self.burstiness
        if burstiness is None:
            return own
        return lambda rng, rate_rps: arrivals.gamma(rng, rate_rps, burstiness)

    def arrive(self, own: ArrivalProcess, num: int, rate_rps: float | None) -> list[float]:
        """`num` arrival times at `rate_rps`, all 0 where everything is to arrive at once."""
        if self.at_once or rate_rps is None:
            return arrivals.take(arrivals.at_once(), num)
        times_s = self.process(own)(self.stream("arrivals"), rate_rps)
        return arrivals.take(times_s, num, rate_rps if self.exact_rate else None)


def on_the_grid(time_s: float) -> float:
    """A time rounded to microseconds, where C libraries agree on it."""
    return round(time_s, 6)
