"""How full a worker's KV cache will get, from what is known of its residents' answers.

Time is counted in the worker's steps, in which every resident that decodes gains one token. A
resident that has `held` tokens of KV at step `now` and ends at step `e` holds `held + (c - now)` at
every step `c` from now to before `e`. With equally likely ends per resident, the KV in use at a
step has a mean and, residents being independent, a variance; both change only where an end may
lie, so one pass over the ends, latest first, finds the peak of any quantile in O(n log n). This is
the rule of Past-Future scheduling (LightLLM), with distributions in place of one guess each;
the paper's reserve-dynamic looks at one future moment only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Ends per resident that the pass looks at: a distribution enters with its quartiles' middles.
NUM_ENDS = 4
# Moments kept of a pass, to add one more resident to without another pass.
NUM_MOMENTS = 24


class Resident(NamedTuple):
    """`held_tokens` of KV now, and equally likely numbers of steps until its end, ascending."""

    held_tokens: int
    remaining: Sequence[float]


class Moment(NamedTuple):
    """KV tokens in use `after` steps from now: mean and variance."""

    after: float
    mean: float
    variance: float

    def quantile(self, z: float) -> float:
        """The use that is exceeded as rarely as `z` standard deviations are."""
        return self.mean + z * math.sqrt(max(0.0, self.variance))


class Projection:
    """The moments of one worker's residents as they are now; never changed."""

    __slots__ = ("moments",)

    def __init__(self, residents: Iterable[Resident]) -> None:
        self.moments = _thinned(_moments(residents))

    def peak_tokens(self, z: float = 0.0, after_steps: float = 0.0) -> float:
        """The highest use from `after_steps` on, at that many standard deviations."""
        return max(
            (one.quantile(z) for one in self.moments if one.after >= after_steps), default=0.0
        )

    def peak_with(self, more: Resident, z: float = 0.0, after_steps: float = 0.0) -> float:
        """The same with one more resident, which starts now."""
        ends = _few(more.remaining)
        weight = 1.0 / len(ends)
        highest = 0.0
        for moment in self.moments:
            if moment.after < after_steps:
                continue
            alive = weight * sum(end > moment.after for end in ends)
            held = more.held_tokens + moment.after
            mean = moment.mean + alive * held
            variance = moment.variance + alive * (1.0 - alive) * held * held
            highest = max(highest, mean + z * math.sqrt(max(0.0, variance)))
        # Its own ends are moments too: what is in use there is what was at the last one before.
        for place, end in enumerate(ends):
            after = max(0.0, end - 1.0)
            first_of_equals = place == 0 or ends[place - 1] != end
            if after >= after_steps and first_of_equals:
                alive = weight * (len(ends) - place)
                held = more.held_tokens + after
                before = self._at(after)
                mean = before.mean + alive * held
                variance = before.variance + alive * (1.0 - alive) * held * held
                highest = max(highest, mean + z * math.sqrt(max(0.0, variance)))
        return highest

    def _at(self, after: float) -> Moment:
        """The first kept moment at or after that one: from moment to moment use only grows."""
        for moment in self.moments:
            if moment.after >= after:
                return moment
        return Moment(after, 0.0, 0.0)


def _few(remaining: Sequence[float]) -> Sequence[float]:
    """At most `NUM_ENDS` of equally likely values, the middle of each equal part."""
    num = len(remaining)
    if num <= NUM_ENDS:
        return remaining
    return [remaining[(2 * i + 1) * num // (2 * NUM_ENDS)] for i in range(NUM_ENDS)]


def _moments(residents: Iterable[Resident]) -> list[Moment]:
    """Every moment at which the use can be highest, by time: right before each end, and now."""
    ends: list[tuple[float, int, int]] = []
    held: list[int] = []
    shares: list[float] = []
    for place, (held_tokens, remaining) in enumerate(residents):
        few = _few(remaining)
        held.append(held_tokens)
        shares.append(1.0 / len(few))
        ends += [(end, place, held_tokens) for end in few]
    ends.sort(reverse=True)
    alive = [0.0] * len(held)
    # Sums over residents of S, S h, and of S (1 - S) times 1, h and h^2, S being who is alive.
    s0 = s1 = q0 = q1 = q2 = 0.0
    moments: list[Moment] = []
    for number, (end, place, h) in enumerate(ends):
        share, before = shares[place], alive[place]
        after = before + share
        alive[place] = after
        s0 += share
        s1 += share * h
        spread = after * (1.0 - after) - before * (1.0 - before)
        q0 += spread
        q1 += spread * h
        q2 += spread * h * h
        if number + 1 < len(ends) and ends[number + 1][0] == end:
            continue  # what ends together is alive together
        c = max(0.0, end - 1.0)
        moments.append(Moment(c, s1 + c * s0, q2 + 2.0 * c * q1 + c * c * q0))
    moments.append(Moment(0.0, float(sum(held)), 0.0))
    moments.reverse()
    return moments


def _thinned(moments: list[Moment]) -> list[Moment]:
    """At most about `NUM_MOMENTS`: of every run of neighbours the one with the highest mean."""
    if len(moments) <= NUM_MOMENTS:
        return moments
    stride = -(-len(moments) // NUM_MOMENTS)
    return [
        max(moments[i : i + stride], key=lambda one: one.mean)
        for i in range(0, len(moments), stride)
    ]
