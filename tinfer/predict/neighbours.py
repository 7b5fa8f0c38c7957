"""The latest prompts as hashes, and how long their answers were: those that are alike vote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinfer.predict.curves import Row, Seen, counts_of
from tinfer.predict.features import NUM_SLOTS, slots_of

# Prompts with half of their n-grams in common, if none is much more alike: of one tenant's the
# system prompt alone makes many alike, and those with the same question are to be heard.
MIN_EQUAL_SLOTS = NUM_SLOTS // 2
SLOTS_BEHIND_BEST = NUM_SLOTS // 8


class Neighbours:
    """A ring of the latest `num_kept` answers; an older one makes room for each."""

    def __init__(self, num_kept: int) -> None:
        # [NUM_SLOTS, num_kept]: a slot of all prompts is one row, which compares fast.
        self.slots: NDArray[np.uint16] = np.zeros((NUM_SLOTS, num_kept), dtype=np.uint16)
        self.places: NDArray[np.intp] = np.zeros(num_kept, dtype=np.intp)
        self.ended: Row = np.zeros(num_kept, dtype=np.float32)
        self.shares: Row = np.zeros(num_kept, dtype=np.float32)
        self.num_filled = 0
        self.next = 0

    @property
    def num_kept(self) -> int:
        return len(self.places)

    @property
    def num_bytes(self) -> int:
        """Memory of all rows, however many are filled."""
        rows = (self.slots, self.places, self.ended, self.shares)
        return sum(row.nbytes for row in rows)

    def add(self, signature: bytes, seen: Seen) -> None:
        """An answer to a prompt with that signature, which may be empty: then it is nobody's."""
        if not signature:
            return
        place = self.next
        self.slots[:, place] = slots_of(signature)
        self.places[place], self.ended[place], self.shares[place] = seen
        self.next = (place + 1) % self.num_kept
        self.num_filled = max(self.num_filled, place + 1)

    def vote(self, signature: bytes) -> tuple[Row, Row] | None:
        """Ends and those there to end, by bin, of the prompts alike; None if there is none."""
        if not signature or not self.num_filled:
            return None
        own = slots_of(signature)[:, None]
        is_equal = self.slots[:, : self.num_filled] == own
        equal = np.add.reduce(is_equal.view(np.uint8), axis=0, dtype=np.uint8)
        least = max(MIN_EQUAL_SLOTS, int(equal.max()) - SLOTS_BEHIND_BEST)
        (alike,) = np.nonzero(equal >= least)
        if not len(alike):
            return None
        weights = (equal[alike] / NUM_SLOTS).astype(np.float32)
        return counts_of(self.places[alike], self.ended[alike], self.shares[alike], weights)
