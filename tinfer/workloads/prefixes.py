"""A prompt of which only hashes are kept, as the segments that it shares with others.

Cut at the same places in every prompt, so that two prompts have equal segments up to where their
tokens differ: every 32 tokens at first, from 256 on eight times per doubling. A prompt of a million
tokens has about a hundred segments, and of what two share an eighth at most is not seen.
"""

from __future__ import annotations

import hashlib

from tinfer.workloads.requests import Segment

# As many as the online predictor takes for a prompt's beginning (tinfer/predict/features.py).
FIRST_TOKENS = 32
CUTS_PER_DOUBLING = 8
HASH_BYTES = 8
_TOKEN_BYTES = 4


def prefix_segments(prompt: bytes, own_seed: str) -> tuple[Segment, ...]:
    """Of a prompt as int32 token ids.

    A segment's seed is the hash of all tokens up to its end, as hex digits; that of what is left
    behind the last cut is `own_seed`, which no other prompt may have.
    """
    num_tokens = len(prompt) // _TOKEN_BYTES
    chain = hashlib.blake2b(digest_size=HASH_BYTES)
    segments: list[Segment] = []
    start = 0
    while (end := start + _step(start)) <= num_tokens:
        chain.update(prompt[start * _TOKEN_BYTES : end * _TOKEN_BYTES])
        segments.append(Segment(chain.hexdigest(), end - start))
        start = end
    if start < num_tokens:
        segments.append(Segment(own_seed, num_tokens - start))
    return tuple(segments)


def _step(start: int) -> int:
    """From a cut to the next one."""
    largest_power = 1 << start.bit_length() >> 1
    return max(FIRST_TOKENS, largest_power // CUTS_PER_DOUBLING)
