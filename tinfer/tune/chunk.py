"""The chunk size that follows from the prefill curve.

The TetriInfer paper (arXiv 2401.11181, section 3.3) sets it at the accelerator-saturate threshold:
the number of prompt tokens beyond which a step yields no more tokens per second and only takes
longer. Measured curves have no sharp knee, so the threshold here is the smallest measured size with
at least 95 % of the best throughput of any size.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tinfer.tune.points import Positive, StepPoint

SATURATED_SHARE = 0.95
MIN_CHUNK_TOKENS = 128
MAX_CHUNK_TOKENS = 8192


class Chunk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`chunk_tokens` is what to serve with: the threshold in whole KV blocks, within bounds.

    `is_saturated` is false where the largest size measured is the threshold: throughput may still
    grow beyond it.
    """

    threshold_tokens: Positive
    chunk_tokens: Positive
    best_tokens_per_s: float
    is_saturated: bool


def choose_chunk(points: Sequence[StepPoint], block_tokens: int) -> Chunk:
    """From the points of prompts alone. Raises `ValueError` where there are none."""
    alone = sorted((p for p in points if p.kind == "prefill"), key=lambda p: p.prefill_tokens)
    if not alone:
        raise ValueError("no prefill was measured")
    best = max(map(throughput, alone))
    threshold = next(p.prefill_tokens for p in alone if throughput(p) >= SATURATED_SHARE * best)
    return Chunk(
        threshold_tokens=threshold,
        chunk_tokens=in_blocks(threshold, block_tokens),
        best_tokens_per_s=best,
        is_saturated=threshold < alone[-1].prefill_tokens,
    )


def throughput(point: StepPoint) -> float:
    """Prompt tokens per second."""
    return point.prefill_tokens / point.step_s


def in_blocks(tokens: int, block_tokens: int) -> int:
    """`tokens` rounded up to whole blocks, brought within the bounds, in whole blocks too.

    A block that is larger than the upper bound is one chunk.
    """
    low = -(-MIN_CHUNK_TOKENS // block_tokens)
    high = max(1, MAX_CHUNK_TOKENS // block_tokens)
    return min(high, max(low, -(-tokens // block_tokens))) * block_tokens
