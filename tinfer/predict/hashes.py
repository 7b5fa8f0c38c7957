"""The hashes by which prompts, tenants and models are known. Without numpy, which takes time."""

from __future__ import annotations

import hashlib

# Of a chat template, 32 tokens are past its own words and into the system prompt.
HEAD_TOKENS = 32
TOKEN_BYTES = 4
_HASH_BYTES = 8


def hashed(content: bytes) -> int:
    """64 bits of a hash; 0 for nothing."""
    if not content:
        return 0
    return int.from_bytes(hashlib.blake2b(content, digest_size=_HASH_BYTES).digest(), "little")


def head_of(prompt: bytes) -> int:
    """Of the beginning of a prompt, int32 token ids: who asks, as far as a prompt tells."""
    return hashed(prompt[: HEAD_TOKENS * TOKEN_BYTES])


def as_hex(number: int) -> str:
    """A hash as 16 hex digits, in the order in which its bytes were made; "" for 0."""
    return number.to_bytes(_HASH_BYTES, "little").hex() if number else ""


def from_hex(digits: str) -> int:
    """The way back. Raises `ValueError` for what are no hex digits."""
    return int.from_bytes(bytes.fromhex(digits), "little")
