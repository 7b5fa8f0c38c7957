"""The bootstrap of `tinfer bench compare` against cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinfer.bench.compare.bootstrap import (
    Estimate,
    draw,
    estimate,
    meets,
    weighted_mean,
    weighted_percentile,
)


def test_the_first_row_is_what_was_measured() -> None:
    weights = draw([3, 2], 50, seed=1)
    assert weights.repetitions.shape == (51, 2) and weights.requests.shape == (51, 5)
    assert weights.repetitions[0].tolist() == [1, 1]
    assert weights.requests[0].tolist() == [1, 1, 1, 1, 1]


def test_a_resample_draws_as_many_repetitions_and_their_requests() -> None:
    weights = draw([4, 4, 4], 200, seed=2)
    assert set(weights.repetitions.sum(axis=1)) == {3.0}
    per_repetition = weights.requests.reshape(201, 3, 4).sum(axis=2)
    assert (per_repetition == 4 * weights.repetitions).all()
    # Some repetition is left out, and some request of one that is not.
    assert (weights.repetitions == 0).any()
    assert ((weights.requests == 0) & (np.repeat(weights.repetitions, 4, axis=1) > 0)).any()


def test_equal_seeds_draw_alike() -> None:
    first, again, other = (draw([5, 5], 20, seed) for seed in (3, 3, 4))
    assert (first.requests == again.requests).all()
    assert (first.requests != other.requests).any()


def test_mean_leaves_out_what_is_not_there() -> None:
    weights = np.array([[1.0, 1.0, 1.0], [2.0, 5.0, 0.0], [0.0, 1.0, 0.0]])
    means = weighted_mean(np.array([1.0, math.nan, 3.0]), weights)
    assert means[:2].tolist() == [2.0, 1.0] and math.isnan(means[2])


@pytest.mark.parametrize("percent", [0, 37, 50, 99, 100])
def test_percentile_is_numpys_of_the_values_repeated(percent: float) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=30)
    weights = rng.integers(0, 4, size=(5, 10)).astype(np.float64)
    owner = np.repeat(np.arange(10), 3)
    found = weighted_percentile(values, weights, owner, percent)
    for row, weight in zip(found, weights, strict=True):
        repeated = np.repeat(values, weight[owner].astype(int))
        assert row == pytest.approx(np.percentile(repeated, percent))


def test_percentile_of_nothing_is_none() -> None:
    owner = np.arange(2)
    nothing = weighted_percentile(np.array([math.nan, 1.0]), np.array([[1.0, 0.0]]), owner, 50)
    assert math.isnan(nothing[0])
    assert math.isnan(weighted_percentile(np.empty(0), np.ones((1, 0)), np.arange(0), 50)[0])


def test_what_does_not_vary_has_an_interval_of_one_point() -> None:
    weights = draw([10, 10], 300, seed=0)
    assert estimate(weighted_mean(np.full(20, 4.0), weights.requests)) == Estimate(4.0, 4.0, 4.0)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    """Of n independent values it is 2 x 1.96 sd / sqrt(n); resampling both levels widens it."""
    rng = np.random.default_rng(5)
    values = rng.normal(10.0, 1.0, size=2000)
    found = estimate(weighted_mean(values, draw([100] * 20, 1000, seed=0).requests))
    assert found is not None and found.low is not None and found.high is not None
    width = found.high - found.low
    assert 1.0 < width / (2 * 1.96 / math.sqrt(2000)) < 1.9
    assert found.low < 10.0 < found.high


def test_paired_runs_differ_less_than_their_parts() -> None:
    """Twice as slow in every request is a ratio of 2, however much the requests differ."""
    rng = np.random.default_rng(6)
    values = rng.lognormal(0.0, 2.0, size=60)
    weights = draw([20, 20, 20], 400, seed=0).requests
    one, two = weighted_mean(values, weights), weighted_mean(2 * values, weights)
    alone, ratio = estimate(two), estimate(two / one)
    assert ratio is not None and ratio.low == pytest.approx(2.0) == ratio.high
    assert alone is not None and alone.high is not None and alone.low is not None
    assert alone.high / alone.low > 1.5


def test_differences_between_repetitions_are_in_the_interval() -> None:
    values = np.repeat([1.0, 2.0, 3.0], 50)
    found = estimate(weighted_mean(values, draw([50] * 3, 500, seed=0).requests))
    assert found is not None and found.low is not None and found.high is not None
    assert found.low < 1.4 and found.high > 2.6


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_no_figure_is_no_estimate(first: float) -> None:
    assert estimate(np.array([first, 1.0])) is None


def test_resamples_without_a_figure_are_left_out() -> None:
    assert estimate(np.array([2.0, math.nan, 2.0, math.inf])) == Estimate(2.0, 2.0, 2.0)
    assert estimate(np.array([2.0, math.nan])) == Estimate(2.0, None, None)


@pytest.mark.parametrize(
    ("interval", "target", "higher_is_better", "met"),
    [
        (Estimate(1.5, 1.3, 1.8), 1.3, True, True),
        (Estimate(1.5, 1.29, 1.8), 1.3, True, False),
        (Estimate(0.5, 0.3, 0.7), 0.7, False, True),
        (Estimate(0.5, 0.3, 0.71), 0.7, False, False),
        (Estimate(9.0, None, None), 1.0, True, False),
    ],
)
def test_a_target_is_met_by_the_near_end(
    interval: Estimate, target: float, higher_is_better: bool, met: bool
) -> None:
    assert meets(interval, target, higher_is_better) is met
