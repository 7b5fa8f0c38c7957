"""Traffic for predictors: requests whose answers follow from who asks, seeded."""

from __future__ import annotations

import math
import random
from array import array
from statistics import median

from tinfer.core.lengths import Lengths
from tinfer.predict.asked import Asked, End
from tinfer.predict.features import features_of_tokens
from tinfer.predict.online import OnlinePredictor

Answer = tuple[Asked, int]
# Of a tenant's answers; the logarithm's standard deviation is SPREAD.
MEDIANS = (12, 40, 130, 420)
SPREAD = 0.3
SYSTEM_TOKENS = 40


def ask(number: int, head: int = 0, prompt: int = 30, most: int = 4096, seed: int = 0) -> Asked:
    """A prompt of `prompt` tokens of its own behind the system prompt of tenant `head`."""
    rng = random.Random(f"prompt {seed} {number}")
    own = [rng.randrange(30_000) for _ in range(prompt)]
    system = [head * SYSTEM_TOKENS + i for i in range(SYSTEM_TOKENS)]
    tokens = array("i", system + own)
    features = features_of_tokens(tokens.tobytes(), "m")
    return Asked(f"r{number}", len(tokens), most, features=features)


def traffic(num: int, seed: int = 0, most: int = 4096) -> list[Answer]:
    """Requests of the tenants of MEDIANS in turn, at random, and the true lengths."""
    rng = random.Random(f"traffic {seed}")
    answers = []
    for number in range(num):
        tenant = rng.randrange(len(MEDIANS))
        tokens = rng.lognormvariate(math.log(MEDIANS[tenant]), SPREAD)
        answers.append((ask(number, tenant, most=most, seed=seed), max(1, round(tokens))))
    return answers


def serve(predictor: OnlinePredictor, asked: Asked, tokens: int) -> None:
    """An answer that would be `tokens` long ends there, or at its bound."""
    is_cut = tokens > asked.max_output_tokens
    end = End.LENGTH if is_cut else End.STOP
    predictor.observe(asked, min(tokens, asked.max_output_tokens), end)


def middle(lengths: Lengths) -> float:
    return float(median(lengths.points))
