"""How long prompts and answers are: distributions given by a few quantiles, and what fits a box.

Each constant says where its figures come from and what is ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from tinfer.workloads.draws import LEAST_RANK, STANDARD_NORMAL


class Lengths(Struct, frozen=True):
    """A distribution of token counts through `knots` (rank, tokens), clamped to `low`..`high`.

    Between knots, and beyond the outer ones, the logarithm of the length is linear in the normal
    quantile of the rank: two knots make a lognormal, more bend it to match a measured median, p90
    and p99 together. `ranks` keeps only that part of the distribution: (0, 0.5) is the lower half.
    """

    knots: tuple[tuple[float, int], ...]
    low: int
    high: int
    ranks: tuple[float, float] = (0.0, 1.0)

    def at(self, rank: float) -> float:
        """Length, in tokens and not rounded, at `rank` in [0, 1) of the kept part."""
        first, last = self.ranks
        z = STANDARD_NORMAL.inv_cdf(max(first + rank * (last - first), LEAST_RANK))
        points = [(STANDARD_NORMAL.inv_cdf(at), math.log(tokens)) for at, tokens in self.knots]
        right = next((i for i in range(1, len(points)) if z < points[i][0]), len(points) - 1)
        (z0, y0), (z1, y1) = points[right - 1], points[right]
        y = y0 + (y1 - y0) * (z - z0) / (z1 - z0)
        return math.exp(min(max(y, math.log(self.low)), math.log(self.high)))

    def draw(self, rng: random.Random) -> float:
        """One length in tokens, not rounded; takes one `random()` from the stream."""
        return self.at(rng.random())


class Limits(Struct, frozen=True):
    """What makes a workload fit a small model: a factor on all lengths, then two clamps.

    A clamp moves a length, not the request's task: a "HPLD" request stays one.
    """

    length_scale: Annotated[float, Meta(gt=0.0)] = 1.0
    max_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None

    def prompt(self, tokens: float) -> int:
        """A prompt's length, scaled, rounded and clamped to 1..`max_prompt_tokens`."""
        return _fit(tokens * self.length_scale, self.max_prompt_tokens)

    def output(self, tokens: float) -> int:
        """An answer's length, scaled, rounded and clamped to 1..`max_output_tokens`."""
        return _fit(tokens * self.length_scale, self.max_output_tokens)

    def room(self, tokens: int, before: Iterable[tuple[str, int]]) -> int:
        """How many of `tokens` still fit into the prompt behind the segments `before`."""
        if self.max_prompt_tokens is None:
            return tokens
        return min(tokens, self.max_prompt_tokens - sum(num for _, num in before))


def _fit(tokens: float, most: int | None) -> int:
    fitted = max(1, round(tokens))
    return fitted if most is None else min(fitted, most)


# The paper (arXiv 2401.11181) draws from ShareGPT and calls a prompt heavy above 512 tokens and an
# answer heavy above 128, the median of ShareGPT's answers. The median of its light prompts is 18.
# It prints no distributions. Here answers are one lognormal of median 128, cut there, and heavy
# prompts the upper half of one of median 512. The spreads and the longest answer are ours: with
# them a model of its vLLM baseline (a step takes 27 ms + 0.25 ms per prefill token + 0.645 ms per
# decoding sequence + 1 us per token of KV, at most 16 sequences) needs 23, 177, 14 and 72 s for
# LPLD, LPHD (128 requests), HPLD and HPHD (32), where the plots show 22, 181, 13 and 69.
LIGHT_PROMPT = Lengths(knots=((0.5, 18), (0.9, 65)), low=1, high=512)
HEAVY_PROMPT = Lengths(knots=((0.5, 512), (0.9, 855)), low=513, high=1536, ranks=(0.5, 1.0))
ANSWER = Lengths(knots=((0.5, 128), (0.9, 650)), low=1, high=1280)
LIGHT_DECODE = Lengths(knots=ANSWER.knots, low=1, high=128, ranks=(0.0, 0.5))
HEAVY_DECODE = Lengths(knots=ANSWER.knots, low=129, high=1280, ranks=(0.5, 1.0))

# Azure LLM inference traces of 2023, as published with Vidur: p50, p90 and p99 as measured. The
# p10 is set so that the mean of the logarithms is the measured one (code: prompts 7.00, answers
# 2.79; conversation: 6.63 and 5.02). A plain lognormal with these and the measured deviations
# (1.36, 0.85; 0.99, 0.86) would miss the medians and put the p99 of code's prompts at 26 000.
AZURE_CODE_PROMPT = Lengths(
    knots=((0.1, 180), (0.5, 1469), (0.9, 5188), (0.99, 7436)), low=1, high=7437
)
AZURE_CODE_OUTPUT = Lengths(knots=((0.1, 6), (0.5, 13), (0.9, 55), (0.99, 251)), low=1, high=2000)
AZURE_CONVERSATION_PROMPT = Lengths(
    knots=((0.1, 160), (0.5, 1020), (0.9, 2734), (0.99, 4142)), low=1, high=14000
)
# Two modes; the knot at 0.7 is the second one, set so that the mean is the measured 211.
AZURE_CONVERSATION_OUTPUT = Lengths(
    knots=((0.1, 50), (0.5, 129), (0.7, 330), (0.9, 424), (0.99, 601)), low=1, high=1000
)

# arXiv summarisation cut at 4K tokens, as published with Vidur; the prompts' p10 is ours.
ARXIV_PROMPT = Lengths(
    knots=((0.1, 1635), (0.5, 2730), (0.9, 3702), (0.99, 3933)), low=1, high=4096
)
ARXIV_OUTPUT = Lengths(knots=((0.1, 77), (0.5, 167), (0.9, 372), (0.99, 3271)), low=1, high=4096)
# The same, uncut: medians and p90s as Sarathi-Serve gives them.
LONG_ARXIV_PROMPT = Lengths(knots=((0.5, 7059), (0.9, 12985)), low=1, high=32768)
LONG_ARXIV_OUTPUT = Lengths(knots=((0.5, 208), (0.9, 371)), low=1, high=4096)

# BurstGPT: medians and p95s; the lognormals through them also have the published means (611, 123).
BURSTGPT_PROMPT = Lengths(knots=((0.5, 251), (0.95, 2461)), low=1, high=8192)
BURSTGPT_OUTPUT = Lengths(knots=((0.5, 34), (0.95, 460)), low=1, high=4096)
