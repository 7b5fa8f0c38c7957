"""What a seeded draw of vLLM's CPU sampler adds to the score of one token more than to another's.

The sampler takes the largest sum of score and noise, and the noise follows from the request's seed,
the place in the answer and the token. It is asked of the very operation that draws: the lead of one
token is the score that another needs to win against it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# Noise of the Gumbel distribution: beyond this it has never been seen.
MOST_NATS = 64.0
NUM_HALVINGS = 30


def load_sampler() -> None:
    """Load vLLM's operations without vLLM."""
    if hasattr(torch.ops._C, "fused_gumbel_argmax"):
        return
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vLLM is not installed"
    torch.ops.load_library(str(Path(spec.origin).parent / "_C.abi3.so"))  # type: ignore[no-untyped-call]


def noise_lead(seed: int, at: int, token: int, other: int) -> float:
    """In nats, at the place `at` of an answer; its first token has place 0."""
    load_sampler()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(at + 1):  # one draw per token
        step = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
    low, high = -MOST_NATS, MOST_NATS
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        scores = torch.full((1, max(token, other) + 1), float("-inf"))
        scores[0, token], scores[0, other] = 0.0, middle
        wins = int(torch.ops._C.fused_gumbel_argmax(scores, step)[0]) == other
        low, high = (low, middle) if wins else (middle, high)
    return (low + high) / 2
