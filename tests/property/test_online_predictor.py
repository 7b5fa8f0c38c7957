"""Whatever was observed, a prediction is a distribution: survival only falls, quantiles only rise,
and no answer is longer than it may be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinfer.predict.asked import Asked, End, Features
from tinfer.predict.curves import NUM_BINS, survival
from tinfer.predict.features import features_of_segments, features_of_tokens
from tinfer.predict.online import OnlinePredictor, OnlineSettings
from tinfer.predict.online_state import restore, to_bytes

SETTINGS = OnlineSettings(num_rungs=12, num_recent=5, forget_after=8)
prompts = st.binary(max_size=1600).map(lambda data: data[: len(data) // 4 * 4])
features = (
    st.just(Features())
    | prompts.map(features_of_tokens)
    | st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 300)), max_size=4).map(
        features_of_segments
    )
)
requests = st.builds(
    Asked,
    st.just("r"),
    st.integers(1, 200_000),
    st.integers(1, 3_000_000),
    runs_to_bound=st.booleans(),
    features=features,
)
observations = st.lists(
    st.tuples(requests, st.integers(0, 3_000_000), st.sampled_from(End)), max_size=40
)


@given(observations, requests)
def test_predictions_are_distributions(seen: list[tuple[Asked, int, End]], asked: Asked) -> None:
    predictor = OnlinePredictor(SETTINGS)
    for request, tokens, end in seen:
        predictor.observe(request, tokens, end)
    left = survival(predictor.curve(asked))
    assert left.shape == (NUM_BINS + 1,)
    assert left[0] == 1.0
    assert np.isfinite(left).all()
    assert (left >= 0.0).all()
    assert (np.diff(left) <= 0.0).all()
    points = predictor.predict(asked).points
    assert list(points) == sorted(points)
    assert 1 <= points[0] <= points[-1] <= asked.max_output_tokens
    again = OnlinePredictor(SETTINGS)
    restore(again, to_bytes(predictor))
    assert again.predict(asked).points == points


@given(st.integers(1, 3_000_000), st.integers(1, 100))
def test_what_is_always_so_is_told_to_the_bin(tokens: int, num: int) -> None:
    predictor = OnlinePredictor(OnlineSettings(parent_answers=1e-3))
    asked = Asked("r", 5, 1 << 20)
    for _ in range(num):
        predictor.observe(asked, tokens, End.STOP)
    told = predictor.predict(asked).points
    expected = min(tokens, 1 << 20)
    assert expected * 0.9 - 1 <= told[1] <= told[-2] <= expected * 1.1 + 1
