"""How much longer or shorter each step of an engine takes than its cost model says."""

from __future__ import annotations

import math
import random


class Noise:
    """Independent lognormal factors of mean 1, one per step number, drawn in order from a seed.

    A step's factor depends on its number alone, not on how steps are grouped.
    """

    def __init__(self, sigma: float, seed: str) -> None:
        self._sigma = sigma
        self._rng = random.Random(seed)
        self._factors: list[float] = []
        self._first = 0

    def factors(self, first_step: int, num_steps: int) -> list[float]:
        """Those of steps `first_step` and on; `first_step` never goes back."""
        skipped = first_step - self._first
        del self._factors[:skipped]
        self._first = first_step
        while len(self._factors) < num_steps:
            drawn = math.exp(self._rng.gauss(-0.5 * self._sigma**2, self._sigma))
            self._factors.append(drawn)
        return self._factors[:num_steps]
