"""Predictors that learn nothing say what they are meant to say."""

from __future__ import annotations

import pytest

from tinfer.core.lengths import certain
from tinfer.predict.asked import Asked
from tinfer.predict.predictors import PREDICTORS, MaxTokens, NoisyOracle, Oracle, Prior


def asked(number: int = 0, output: int | None = 300, most: int = 4000) -> Asked:
    return Asked(f"r{number}", 10, most, output)


def test_the_bound_and_the_truth() -> None:
    assert MaxTokens().predict(asked()) == certain(4000)
    assert Oracle().predict(asked()) == certain(300)
    assert Oracle().predict(asked(output=None)) == certain(4000)
    assert sorted(PREDICTORS) == ["max-tokens", "noisy-oracle", "online", "oracle", "prior"]


def test_the_prior_is_what_answers_are_like_and_is_cut_at_the_bound() -> None:
    lengths = Prior().predict(asked())
    assert 120 <= lengths.points[len(lengths.points) // 2] <= 170
    assert 0.08 <= lengths.share_over(424) <= 0.13
    assert Prior().predict(asked(most=100)).points[-1] == 100
    assert Prior().predict(asked(most=1)).points == (1,) * len(lengths.points)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 0.749, 1.0])
def test_a_noisy_oracle_is_right_as_often_as_it_says(accuracy: float) -> None:
    oracle = NoisyOracle(accuracy, 200)
    lows = [oracle.predict(asked(number)).low for number in range(2000)]
    assert sum(low == 200 for low in lows) / 2000 == pytest.approx(accuracy, abs=0.03)
    wrong = [low for low in lows if low != 200]
    if wrong:
        near = sum(low in (1, 400) for low in wrong)
        assert near / len(wrong) > 0.4 and max(wrong) > 400


def test_what_a_request_gets_follows_from_its_id_and_the_seed() -> None:
    def lows(seed: int) -> list[int]:
        return [NoisyOracle(0.5, seed=seed).predict(asked(i)).low for i in range(50)]

    assert lows(1) == lows(1) != lows(2)


def test_a_prediction_is_within_what_the_client_allows() -> None:
    assert max(NoisyOracle(0.0).predict(asked(most=350)).points) <= 350


@pytest.mark.parametrize(("accuracy", "tokens"), [(1.5, 200), (-0.1, 200), (0.5, 0)])
def test_settings_that_cannot_be(accuracy: float, tokens: int) -> None:
    with pytest.raises(ValueError, match="accuracy|buckets"):
        NoisyOracle(accuracy, tokens)
