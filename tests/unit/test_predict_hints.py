"""What a client says of its answer's length counts for little at first, for more where it was
right, and for nothing where it tells no more than the prediction without it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinfer.core.lengths import Lengths, certain
from tinfer.predict.asked import Asked, End, Features
from tinfer.predict.hints import (
    FIRST_WEIGHT,
    LARGEST_WEIGHT,
    NUM_POINTS,
    NUM_TENANTS,
    Hints,
    with_hint,
)
from tinfer.predict.predictors import Prior
from tinfer.sim.scores import QUANTILES, quantiles

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=20).map(
    lambda points: Lengths(tuple(sorted(points)))
)
WEIGHTS = st.floats(0.0, LARGEST_WEIGHT)
PRIOR = Prior().predict(Asked("r", 10, 4096))


def asked(expected: int | None = 100, head: int = 1, most: int = 4096, **more: bool) -> Asked:
    return Asked(
        "r", 10, most, features=Features(head=head), expected_output_tokens=expected, **more
    )


def served(hints: Hints, said: list[int], true: list[int], end: End = End.STOP) -> None:
    for expected, tokens in zip(said, true, strict=True):
        hints.observe(asked(expected), PRIOR, tokens, end)


@given(LENGTHS)
def test_quantiles_are_those_of_the_evaluation(lengths: Lengths) -> None:
    ours = [lengths.quantile(rank) for rank in QUANTILES]
    assert ours == pytest.approx(list(quantiles(lengths)))


@given(LENGTHS, st.integers(1, 5000), WEIGHTS)
def test_a_blend_is_a_distribution_between_both(
    lengths: Lengths, expected: int, weight: float
) -> None:
    blend = with_hint(lengths, expected, weight)
    num_hints = round(NUM_POINTS * weight)
    if not num_hints:
        assert blend is lengths
        return
    assert len(blend.points) == NUM_POINTS
    assert list(blend.points) == sorted(blend.points)
    assert min(lengths.points[0], expected) <= blend.points[0]
    assert blend.points[-1] <= max(lengths.points[-1], expected)
    assert blend.points.count(expected) >= num_hints
    others = list(blend.points)
    for _ in range(num_hints):
        others.remove(expected)
    # The rest has the shape of the prediction: it is not moved by the hint.
    assert all(lengths.points[0] <= one <= lengths.points[-1] for one in others)


def test_nobody_is_believed_or_ignored_at_first() -> None:
    hints = Hints()
    assert hints.weight(1) == FIRST_WEIGHT
    blend = hints.blended(asked(100), PRIOR)
    assert blend.points.count(100) == 2 and len(blend.points) == NUM_POINTS


def test_without_a_hint_nothing_is_changed() -> None:
    hints = Hints()
    assert hints.blended(asked(None), PRIOR) is PRIOR
    hints.observe(asked(None), PRIOR, 50, End.STOP)
    assert hints.weight(1) == FIRST_WEIGHT
    bound = certain(4096)
    assert hints.blended(asked(5, runs_to_bound=True), bound) is bound


def test_a_hint_never_goes_beyond_the_bound() -> None:
    blend = Hints().blended(asked(100_000, most=64), PRIOR.up_to(64))
    assert max(blend.points) == 64


def test_who_is_right_is_heard_and_others_with_them_are_not() -> None:
    hints, rng = Hints(), random.Random(1)
    true = [rng.randrange(5, 2000) for _ in range(60)]
    served(hints, true, true)
    assert hints.weight(1) > 0.9 * LARGEST_WEIGHT
    assert hints.weight(2) == FIRST_WEIGHT
    assert hints.blended(asked(700), PRIOR).quantile(0.5) == 700


@pytest.mark.parametrize("kind", ["always short", "always long", "another answer's"])
def test_who_is_wrong_is_not_heard_for_long(kind: str) -> None:
    hints, rng = Hints(), random.Random(2)
    true = [round(rng.lognormvariate(5.0, 0.8)) + 1 for _ in range(40)]
    others = [round(rng.lognormvariate(5.0, 0.8)) + 1 for _ in true]
    said = {"always short": [1] * 40, "always long": [90_000] * 40}.get(kind, others)
    weights = []
    for expected, tokens in zip(said, true, strict=True):
        hints.observe(asked(expected), PRIOR, tokens, End.STOP)
        weights.append(hints.weight(1))
    assert weights[-1] < 0.25 * FIRST_WEIGHT
    assert hints.blended(asked(said[0]), PRIOR) is PRIOR


def test_who_was_right_and_lies_now_loses_it_again() -> None:
    hints = Hints()
    served(hints, [300] * 50, [300] * 50)
    before = hints.weight(1)
    served(hints, [1] * 150, [300] * 150)
    assert hints.weight(1) < FIRST_WEIGHT < before


def test_an_answer_that_was_cut_only_refutes_what_was_said_to_be_shorter() -> None:
    for end in (End.LENGTH, End.ABORT, End.ERROR):
        too_short, long_enough = Hints(), Hints()
        served(too_short, [10] * 20, [2000] * 20, end)
        served(long_enough, [4000] * 20, [2000] * 20, end)
        assert too_short.weight(1) < FIRST_WEIGHT < long_enough.weight(1)
    unseen = Hints()
    served(unseen, [10] * 20, [0] * 20, End.ABORT)
    assert unseen.weight(1) == FIRST_WEIGHT


def test_memory_is_bounded_and_the_latest_tenants_are_kept() -> None:
    hints = Hints()
    for head in range(NUM_TENANTS + 50):
        hints.observe(asked(50, head=head), PRIOR, 50, End.STOP)
    assert len(hints._records) == NUM_TENANTS
    assert hints.weight(0) == FIRST_WEIGHT < hints.weight(NUM_TENANTS + 49)
