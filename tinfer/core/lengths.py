"""How long an answer will be, as a distribution: what every decision about decode consumes.

A predictor (outside the core) makes one per request; the core conditions it on what has come so
far, which costs nothing and is most of what a predictor that looks again could add.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

from msgspec import Struct

# An answer that has outlived its whole prediction goes on by a tenth of what it is. Source: the
# Past-Future rule as LightLLM has it, which expects 1.1 times the generated tokens.
OVERRUN_SHARE = 0.1
# The paper (arXiv 2401.11181, section 5.1) calls an answer heavy above the median of ShareGPT's.
HEAVY_TOKENS = 128
NUM_BUCKET_POINTS = 8


class Lengths(Struct, frozen=True, dict=True):
    """Equally likely lengths of one answer, in output tokens, ascending, at least one.

    A point is a certainty; a range is a bucket of the paper's classifier. All methods take what has
    been generated so far and are about answers at least that long.
    """

    points: tuple[int, ...]

    def survivors(self, generated_tokens: int = 0) -> tuple[int, ...]:
        """The lengths that are still possible; empty where the answer has outlived them all."""
        return self.points[bisect_right(self.points, generated_tokens) :]

    def mean_remaining(self, generated_tokens: int = 0) -> float:
        """Expected tokens still to come; never below 1."""
        left = self.survivors(generated_tokens)
        if not left:
            return max(1.0, OVERRUN_SHARE * generated_tokens)
        return sum(left) / len(left) - generated_tokens

    def remaining(self, generated_tokens: int = 0) -> tuple[float, ...]:
        """Equally likely numbers of tokens still to come, ascending, at least one."""
        left = self.survivors(generated_tokens)
        if not left:
            return (max(1.0, OVERRUN_SHARE * generated_tokens),)
        return tuple(float(one - generated_tokens) for one in left)

    def share_over(self, tokens: int, generated_tokens: int = 0) -> float:
        """Probability that the answer is longer than `tokens`."""
        left = self.survivors(generated_tokens)
        if not left:
            return float(generated_tokens >= tokens)
        return (len(left) - bisect_right(left, tokens)) / len(left)

    def quantile(self, rank: float) -> float:
        """The length that a share of `rank` is below: each point is in the middle of its share, and
        between two of them it is linear."""
        place = min(len(self.points) - 1.0, max(0.0, rank * len(self.points) - 0.5))
        below = int(place)
        above = min(below + 1, len(self.points) - 1)
        low, high = self.points[below], self.points[above]
        return low + (place - below) * (high - low)

    @property
    def low(self) -> int:
        """The lower end, which is what the paper's reserve modes count with."""
        return self.points[0]

    @cached_property
    def is_heavy(self) -> bool:
        """Whether it is likelier than not a heavy decode, as the paper sorts them."""
        return self.share_over(HEAVY_TOKENS) > 0.5

    def up_to(self, max_tokens: int) -> Lengths:
        """The same, for an answer that is cut at `max_tokens`."""
        if self.points[-1] <= max_tokens:
            return self
        return Lengths(tuple(min(one, max_tokens) for one in self.points))


def certain(tokens: int) -> Lengths:
    """An answer of that length."""
    return Lengths((max(1, tokens),))


def bucket(low_tokens: int, high_tokens: int) -> Lengths:
    """Any length from `low_tokens`, at least 1, to below `high_tokens` alike."""
    low = max(1, low_tokens)
    width = max(1, high_tokens - low)
    num = min(NUM_BUCKET_POINTS, width)
    return Lengths(tuple(low + width * i // num for i in range(num)))
