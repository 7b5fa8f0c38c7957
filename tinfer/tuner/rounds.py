"""Visits points in turns: what disturbs the box for a second then disturbs one sample of many
points, which their medians bear, and not all samples of one."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

# No point is visited again once its visits took so long.
POINT_S = 6.0

Point = TypeVar("Point")
Sample = TypeVar("Sample")


class Progress(Protocol):
    """Who wants to know how far it is."""

    def stage(self, words: str, num_visits: int) -> None:
        """A stage begins; the one before has ended."""

    def visited(self) -> None:
        """A visit of the stage is over, or left out."""


async def rounds(
    progress: Progress,
    words: str,
    points: Sequence[Point],
    visit: Callable[[Point], Awaitable[list[Sample]]],
    num_rounds: int,
) -> dict[Point, list[Sample]]:
    """The samples that the visits of each point brought."""
    progress.stage(words, len(points) * num_rounds)
    samples: dict[Point, list[Sample]] = {point: [] for point in points}
    spent_s = dict.fromkeys(points, 0.0)
    for _ in range(num_rounds):
        for point in points:
            if spent_s[point] < POINT_S:
                started_s = time.monotonic()
                samples[point] += await visit(point)
                spent_s[point] += time.monotonic() - started_s
            progress.visited()
    return samples
