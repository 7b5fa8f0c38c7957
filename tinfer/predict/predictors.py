"""Predictors that learn nothing: what is usual, the bound, the truth, the truth with errors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import NormalDist

from tinfer.core.lengths import Lengths, bucket, certain
from tinfer.predict.asked import Asked, Predictor

# Of the paper's classifier at its middle granularity (arXiv 2401.11181, section 4.2.2).
PAPER_ACCURACY = 0.749
PAPER_GRANULARITY_TOKENS = 200
PRIOR_MU, PRIOR_SIGMA = 5.02, 0.86
NUM_PRIOR_POINTS = 16


class Prior:
    """What answers are usually like, cut at the request's bound: for who knows no better.

    Conversations of Azure's 2023 trace: a lognormal with mu 5.02 and sigma 0.86 fits them (median
    129 tokens, 424 at p90).
    """

    def __init__(self) -> None:
        logs = NormalDist(PRIOR_MU, PRIOR_SIGMA)
        ranks = ((i + 0.5) / NUM_PRIOR_POINTS for i in range(NUM_PRIOR_POINTS))
        self._lengths = Lengths(tuple(round(math.exp(logs.inv_cdf(rank))) for rank in ranks))

    def predict(self, asked: Asked) -> Lengths:
        return self._lengths.up_to(asked.max_output_tokens)


class MaxTokens:
    """Every answer is as long as it may be: safe, and wrong for nearly all."""

    def predict(self, asked: Asked) -> Lengths:
        return certain(asked.max_output_tokens)


class Oracle:
    """The true length, or the bound where nobody knows it."""

    def predict(self, asked: Asked) -> Lengths:
        return certain(asked.output_tokens or asked.max_output_tokens)


class NoisyOracle:
    """The paper's classifier as its figures describe it: the true bucket, with that accuracy.

    A wrong answer is the bucket `d` away with probability 2^-d, above or below alike, and above
    where there is none below: the paper does not say how its classifier errs, and classes next to
    each other are the likeliest to be confused. What a request gets follows from `seed` and its id.
    """

    def __init__(
        self,
        accuracy: float = PAPER_ACCURACY,
        granularity_tokens: int = PAPER_GRANULARITY_TOKENS,
        seed: int = 0,
    ) -> None:
        if not 0.0 <= accuracy <= 1.0:
            raise ValueError(f"accuracy {accuracy} is not between 0 and 1")
        if granularity_tokens < 1:
            raise ValueError(f"buckets of {granularity_tokens} tokens")
        self._accuracy = accuracy
        self._granularity_tokens = granularity_tokens
        self._seed = seed

    def predict(self, asked: Asked) -> Lengths:
        rng = random.Random(f"noisy oracle {self._seed} {asked.request_id}")
        true_tokens = asked.output_tokens or asked.max_output_tokens
        number = true_tokens // self._granularity_tokens
        if rng.random() >= self._accuracy:
            number = self._wrong(number, rng)
        low = number * self._granularity_tokens
        return bucket(low, low + self._granularity_tokens).up_to(asked.max_output_tokens)

    def _wrong(self, number: int, rng: random.Random) -> int:
        distance = 1
        while rng.random() < 0.5:
            distance += 1
        below = number - distance
        return below if below >= 0 and rng.random() < 0.5 else number + distance


def _online() -> Predictor:
    # numpy is a tenth of a second that the others do without.
    from tinfer.predict.online import OnlinePredictor

    return OnlinePredictor()


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "prior": Prior,
    "online": _online,
    "max-tokens": MaxTokens,
    "oracle": Oracle,
    "noisy-oracle": NoisyOracle,
}
