"""What a predictor keeps of a prompt: hashes and counts, from which no text can be read.

`head` stands for the beginning, which a tenant's system prompt makes the same for all its requests;
`signature` for the n-grams near the end, where the question is: two prompts have about as large a
share of equal slots as of n-grams in common (min-hash: Broder, 1997).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinfer.predict.asked import Features
from tinfer.predict.hashes import hashed, head_of

NUM_SLOTS = 32
SIGNATURE_BYTES = 2 * NUM_SLOTS
TAIL_TOKENS = 128
GRAM_TOKENS = 3
# Tokens of a segment that is known by its seed alone, for each of which stands one n-gram.
PIECE_TOKENS = 8


def _constants(purpose: str, num: int) -> NDArray[np.uint64]:
    words = [hashlib.blake2b(f"{purpose} {i}".encode(), digest_size=8).digest() for i in range(num)]
    return np.array([int.from_bytes(word, "little") for word in words], dtype=np.uint64)


_MASKS = _constants("mask", NUM_SLOTS)[:, None]
_FACTORS = (_constants("factor", NUM_SLOTS) | np.uint64(1))[:, None]
_GRAM_FACTORS = _constants("gram", GRAM_TOKENS) | np.uint64(1)
_TOP_BITS = np.uint64(48)
_HALF = np.uint64(32)


def features_of_tokens(prompt: bytes, model: str = "") -> Features:
    """Of a prompt as int32 token ids, for the model of that name."""
    model_hash = hashed(model.encode())
    head = head_of(prompt)
    ids = np.frombuffer(prompt, dtype=np.int32)[-TAIL_TOKENS:].astype(np.uint64)
    num_grams = len(ids) - GRAM_TOKENS + 1
    if num_grams < 1:
        return Features(model_hash, head)
    grams = np.full(num_grams, model_hash, dtype=np.uint64)
    for place, factor in enumerate(_GRAM_FACTORS):
        grams += (ids[place : place + num_grams] + np.uint64(1)) * factor
        grams ^= grams >> _HALF
    return Features(model_hash, head, _signature(grams))


def features_of_segments(segments: Sequence[tuple[str, int]], tenant: str = "") -> Features:
    """Of a prompt whose tokens are known as rows of (seed, number of tokens): equal rows are equal
    tokens. A tenant that is named, and not the first row, is what its requests have in common."""
    if not segments:
        return Features(head=hashed(f"tenant {tenant}".encode()) if tenant else 0)
    head = f"tenant {tenant}" if tenant else f"head {segments[0][0]}"
    pieces: list[int] = []
    missing = TAIL_TOKENS
    for seed, num_tokens in reversed(segments):
        first = max(0, num_tokens - missing) // PIECE_TOKENS
        last = -(-num_tokens // PIECE_TOKENS)
        pieces += (hashed(f"{seed} {piece}".encode()) for piece in range(first, last))
        missing -= num_tokens
        if missing <= 0:
            break
    return Features(0, hashed(head.encode()), _signature(np.array(pieces, dtype=np.uint64)))


def slots_of(signature: bytes) -> NDArray[np.uint16]:
    """The slots, [NUM_SLOTS]."""
    return np.frombuffer(signature, dtype="<u2")


def _signature(grams: NDArray[np.uint64]) -> bytes:
    """The least of each slot's own hashes of the n-grams, as 16 bits."""
    least = ((grams ^ _MASKS) * _FACTORS).min(axis=1)
    slots: bytes = (least >> _TOP_BITS).astype("<u2").tobytes()
    return slots
