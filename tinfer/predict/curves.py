"""Survival curves of answer lengths on logarithmic bins, from answers of which some were cut short.

Bin b holds the lengths above `EDGES[b]` up to `EDGES[b + 1]`: single lengths at first, then eight
bins per doubling, so that powers of two, which clients like as `max_tokens`, are edges. An answer
that ended is an end in its bin; one that was cut tells only that it outlives the bins before, and
of the bin it was cut in the share that it got through. A curve is Kaplan and Meier's (1958), kept
as its hazards: in each bin, ends over those that were there to end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinfer.core.lengths import Lengths

BINS_PER_DOUBLING = 8
NUM_DOUBLINGS = 20
_POWERS = {
    round(2 ** (k / BINS_PER_DOUBLING)) for k in range(NUM_DOUBLINGS * BINS_PER_DOUBLING + 1)
}
EDGES: tuple[int, ...] = (0, *sorted(_POWERS))
NUM_BINS = len(EDGES) - 1
# Equally likely lengths that a curve is told as: as many as the prior has.
NUM_POINTS = 16

# Less than that is taken for 0: on the way to it numbers get so small that processors are slow.
NOTHING = np.float32(1e-9)

Row = NDArray[np.floating[Any]]
_EDGES = np.array(EDGES, dtype=np.float64)
# The third decimal of a token is no token more.
_ROUNDING = 1e-3
_RANKS = (np.arange(NUM_POINTS) + 0.5) / NUM_POINTS


class Seen(NamedTuple):
    """What is known of one answer: the bin, whether it ended there, and the share of the bin that
    it was there for (all of it, for one that ended)."""

    place: int
    ended: bool
    share: float


def ended_at(tokens: int) -> Seen:
    """An answer that ended by itself with its `tokens`th token, at least 1."""
    return Seen(min(bisect_left(EDGES, tokens) - 1, NUM_BINS - 1), True, 1.0)


def cut_at(tokens: int) -> Seen:
    """An answer that had `tokens`, at least 1, and was going on."""
    place = bisect_right(EDGES, tokens) - 1
    if place >= NUM_BINS:
        return Seen(NUM_BINS - 1, False, 1.0)
    low, high = EDGES[place], EDGES[place + 1]
    return Seen(place, False, (tokens - low) / (high - low))


def count(counts: Row, seen: Seen, fading: np.float32) -> None:
    """Add an answer to what ended in each bin and what was there to end, [2, NUM_BINS], after all
    that was counted before has faded by that factor."""
    counts *= fading
    counts[counts < NOTHING] = 0.0
    ends, there = counts
    there[: seen.place] += 1.0
    there[seen.place] += seen.share
    if seen.ended:
        ends[seen.place] += 1.0


def counts_of(places: NDArray[np.intp], ended: Row, shares: Row, weights: Row) -> tuple[Row, Row]:
    """The same two rows, of several answers with weights at once."""
    ends: Row = np.bincount(places, weights * ended, NUM_BINS).astype(np.float32)
    own: Row = np.bincount(places, weights * shares, NUM_BINS).astype(np.float32)
    all_of_bin: Row = np.bincount(places, weights, NUM_BINS).astype(np.float32)
    later = all_of_bin[::-1].cumsum()[::-1] - all_of_bin
    return ends, later + own


def refined(parent: Row, ends: Row, there: Row, parent_answers: float) -> Row:
    """Hazards from own counts and from the parent's, as if of so many answers that were there in
    every bin. Where nothing was seen, as beyond the longest bound of its requests, a curve goes on
    as its parent does. All are [NUM_BINS]."""
    hazards: Row = (ends + parent_answers * parent) / (there + parent_answers)
    return hazards


def lognormal(mu: float, sigma: float) -> Row:
    """The hazards of a lognormal distribution of lengths, [NUM_BINS]."""
    scale = sigma * math.sqrt(2.0)
    reaches = [1.0, *(0.5 * math.erfc((math.log(edge) - mu) / scale) for edge in EDGES[1:])]
    hazards = [1.0 - after / before for before, after in pairwise(reaches)]
    return np.array(hazards, dtype=np.float32)


def survival(hazards: Row) -> Row:
    """The chance that an answer is longer than each of EDGES, [NUM_BINS + 1]: from 1, falling."""
    left = np.ones(NUM_BINS + 1)
    # What fades is rounded, so that a hazard of 1 may be a little more.
    np.cumprod(np.maximum(1.0 - hazards, 0.0), out=left[1:])
    return left


def lengths_of(hazards: Row, max_tokens: int) -> Lengths:
    """A curve as equally likely lengths of an answer that is cut at `max_tokens`, at least 1."""
    # Between two edges an end is as likely anywhere.
    points = np.interp(_RANKS, 1.0 - survival(hazards), _EDGES).tolist()
    return Lengths(tuple(min(max_tokens, max(1, math.ceil(one - _ROUNDING))) for one in points))
