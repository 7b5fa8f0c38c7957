"""KV buffers: their geometry, and blocks as a busy allocator leaves them."""

from __future__ import annotations

import random
from collections import deque

from tinfer.worker.kv.geometry import Geometry, Region
from tinfer.worker.kv_bench.options import NUM_LAYERS, Layout

NUM_ALLOCATIONS = 10_000


def kv_geometry(layout: Layout, total_bytes: int, page_bytes: int) -> Geometry:
    """A buffer of `NUM_LAYERS` layers with one page per block and layer."""
    num_blocks = total_bytes // (page_bytes * NUM_LAYERS)
    strides = (page_bytes * num_blocks, page_bytes)
    if layout == "blocks-first":
        strides = (page_bytes, page_bytes * NUM_LAYERS)
    region = Region(0, NUM_LAYERS, *strides, page_bytes, 0)
    return Geometry(layout, "bf16", 16, num_blocks, total_bytes, "bench", 1, 0, (region,))


def fragmented(num_blocks: int, rng: random.Random) -> deque[int]:
    """The free list of an allocator, first in, first out as vLLM's, that has served
    `NUM_ALLOCATIONS` requests of 1 to 64 blocks and was up to 90 % full."""
    free = deque(range(num_blocks))
    held: list[list[int]] = []
    largest = max(1, min(64, num_blocks // 8))
    for _ in range(NUM_ALLOCATIONS):
        want = rng.randint(1, largest)
        while held and len(free) < max(want, num_blocks // 10):
            index = rng.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            free.extend(reversed(held.pop()))
        held.append([free.popleft() for _ in range(min(want, len(free)))])
    rng.shuffle(held)
    for blocks in held:
        free.extend(reversed(blocks))
    return free
