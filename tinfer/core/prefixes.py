"""Which prompt prefixes a worker has KV blocks of, as far as what was sent there tells.

An engine drops blocks when it needs room, the longest unused first, and says nothing of it; so the
index drops in the same order and holds no more than the worker has blocks. A guess that is wrong
costs a placement that is less good, never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice


class PrefixIndex:
    """Block hashes by last use, at most `num_blocks` of them."""

    __slots__ = ("_by_use", "_num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._by_use: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._by_use)

    def num_hits(self, block_hashes: Sequence[int]) -> int:
        """How many leading blocks are there."""
        known = self._by_use
        for place, block_hash in enumerate(block_hashes):
            if block_hash not in known:
                return place
        return len(block_hashes)

    def use(self, block_hashes: Sequence[int]) -> None:
        """These blocks are computed or read now; the last of a prefix are the first to go."""
        known = self._by_use
        for block_hash in reversed(block_hashes):
            known.pop(block_hash, None)
            known[block_hash] = None
        num_over = len(known) - self._num_blocks
        if num_over > 0:
            for block_hash in list(islice(known, num_over)):
                del known[block_hash]
