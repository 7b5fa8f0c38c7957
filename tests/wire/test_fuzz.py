"""Broken frames by the thousand: every decoder rejects them or reads them, and that is all.

`benchmarks/wire_fuzz.py` does the same a million times.
"""

from __future__ import annotations

import random
import tracemalloc

import pytest

from tests.wire.channels import BINARY, BODIES, IDENTITIES, STREAM, Channel
from tests.wire.mutations import (
    BYTE_MUTATIONS,
    MUTATIONS,
    Mutation,
    broken,
    nested,
    oversized,
)

NUM_CASES = 1500
ALL = [*((channel, MUTATIONS) for channel in BINARY)] + [
    (channel, BYTE_MUTATIONS) for channel in (STREAM, IDENTITIES, *BODIES)
]


@pytest.mark.parametrize(("channel", "mutations"), ALL, ids=[one.name for one, _ in ALL])
def test_broken_frames_are_rejected_or_read(
    channel: Channel, mutations: tuple[Mutation, ...]
) -> None:
    rng = random.Random(channel.name)
    counts = {True: 0, False: 0}
    for _ in range(NUM_CASES):
        _, data = broken(rng, channel.frames, mutations)
        try:
            counts[channel.read(data) > 0] += 1
        except channel.rejections:
            counts[False] += 1
    assert min(counts.values()) > NUM_CASES // 50, "the cases are all alike"


@pytest.mark.parametrize("channel", [channel for channel, _ in ALL], ids=lambda one: one.name)
@pytest.mark.parametrize("mutation", [oversized, nested])
def test_what_a_frame_promises_is_not_set_aside(channel: Channel, mutation: Mutation) -> None:
    """Frames of some KB at most, that speak of gigabytes or of thousands of levels."""
    rng = random.Random(channel.name)
    tracemalloc.start()
    try:
        for _ in range(100):
            data = mutation(rng, channel.frames)
            tracemalloc.reset_peak()
            before_bytes = tracemalloc.get_traced_memory()[0]
            try:
                channel.read(data)
            except channel.rejections:
                pass
            peak_bytes = tracemalloc.get_traced_memory()[1] - before_bytes
            assert peak_bytes < 1 << 20, data[:64]
    finally:
        tracemalloc.stop()
