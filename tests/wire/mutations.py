"""Broken frames: what a wire decoder may meet that nobody meant to send.

Everything follows from one `random.Random`, so a case can be made again from its seed and number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

# The first byte of every msgpack format, and lengths that promise what is not there.
_MARKERS = (
    *(0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC5, 0xC6),
    *(0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xCC, 0xCD, 0xCE, 0xCF, 0xD0, 0xD1, 0xD2, 0xD3, 0xD4, 0xD5),
    *(0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xE0, 0xFF),
)
_PROMISES = (b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")  # 4-byte lengths of all long formats
_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -0.0),
    *(float("inf"), float("nan"), "", "x", "\x00", "漢" * 40, b"", b"\xff" * 9, [], {}),
    *([[]], [0] * 50, {"type": "Stop"}, {"a": {"b": [None]}}, "Start", "r-1", "p-0"),
)
MAX_RANDOM_BYTES = 96

Mutation = Callable[[random.Random, Sequence[bytes]], bytes]


def random_bytes(rng: random.Random, _frames: Sequence[bytes]) -> bytes:
    return rng.randbytes(rng.randrange(MAX_RANDOM_BYTES))


def changed_bytes(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """One to four bytes of a good frame replaced, half of the time by a marker of msgpack."""
    frame = bytearray(rng.choice(frames))
    for _ in range(rng.randint(1, 4)):
        if frame:
            value = rng.choice(_MARKERS) if rng.random() < 0.5 else rng.randrange(256)
            frame[rng.randrange(len(frame))] = value
    return bytes(frame)


def flipped_bit(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    frame = bytearray(rng.choice(frames))
    if frame:
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    return bytes(frame)


def truncated(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    frame = rng.choice(frames)
    return frame[: rng.randrange(len(frame) + 1)]


def spliced(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """The head of one frame and the tail of another, or bytes put into one."""
    head, tail = rng.choice(frames), rng.choice(frames)
    middle = rng.randbytes(rng.randrange(4))
    cut = head[: rng.randrange(len(head) + 1)] + middle
    return cut + tail[rng.randrange(len(tail) + 1) :]


def oversized(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """A good beginning that promises gigabytes."""
    frame = rng.choice(frames)
    at = rng.randrange(len(frame) + 1)
    promise = rng.choice(_PROMISES) + rng.randrange(2**16, 2**32).to_bytes(4, "big")
    return frame[:at] + promise + frame[at : at + rng.randrange(8)]


def nested(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """Lists or maps in each other, far deeper than any message."""
    frame = rng.choice(frames)
    inner = rng.choice((b"\x91", b"\x81\xa1a", b"\x81\xa4type"))
    return frame[: rng.randrange(len(frame) + 1)] + inner * rng.choice((40, 400, 4000))


def wrong_value(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """A good message with a field of a strange value, left out, added or renamed."""
    message = msgspec.msgpack.decode(rng.choice(frames))
    holder = message
    while isinstance(holder, dict) and holder and rng.random() < 0.7:
        inner = [value for value in holder.values() if isinstance(value, dict) and value]
        if not inner:
            break
        holder = rng.choice(inner)
    if not isinstance(holder, dict) or not holder:
        return msgspec.msgpack.encode(rng.choice(_STRANGE))
    name = rng.choice(list(holder))
    match rng.randrange(5):
        case 0:
            del holder[name]
        case 1:
            holder[rng.choice(("surprise", "type", ""))] = rng.choice(_STRANGE)
        case 2:
            holder[name] = [holder[name]]
        case _:
            holder[name] = rng.choice(_STRANGE)
    return msgspec.msgpack.encode(message)


def other_tag(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    """The body of one message under the tag of another, or under none that exists."""
    message, other = (msgspec.msgpack.decode(rng.choice(frames)) for _ in range(2))
    if isinstance(message, dict):
        tag = other.get("type") if isinstance(other, dict) else None
        message["type"] = rng.choice((tag, "start", "", "Unknown", None, 3))
    return msgspec.msgpack.encode(message)


def untouched(rng: random.Random, frames: Sequence[bytes]) -> bytes:
    return rng.choice(frames)


# Of any bytes.
BYTE_MUTATIONS: tuple[Mutation, ...] = (
    random_bytes,
    changed_bytes,
    flipped_bit,
    truncated,
    spliced,
    oversized,
    nested,
    untouched,
)
# Of msgpack.
MUTATIONS: tuple[Mutation, ...] = (*BYTE_MUTATIONS, wrong_value, other_tag)


def broken(
    rng: random.Random, frames: Sequence[bytes], mutations: Sequence[Mutation] = MUTATIONS
) -> tuple[str, bytes]:
    """One case: the name of what was done, and the bytes."""
    mutation = rng.choice(mutations)
    return mutation.__name__, mutation(rng, frames)
