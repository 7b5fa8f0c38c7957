"""How full a worker's KV cache will get, from what is known of its residents' answers.

Time is counted in the worker's steps, in which every resident that decodes gains one token. A
resident that would have `offset + c` tokens of KV at step `c`, and ends at one of a few equally
likely steps, is there with a probability that only falls; the KV in use at a step has a mean and,
residents being independent, a variance. Both are kept for every `BIN_STEPS`th step to come, and
change when a resident comes, goes, or outlives one of its ends: a decision reads them and computes
none. That is the rule of Past-Future scheduling (LightLLM) with distributions in place of one guess
each; the paper's reserve-dynamic looks at one future moment only.

Between two kept steps a resident counts as being there until the later one: what is kept is never
less than what will be, and more by at most what ends in between.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from tinfer.core.lengths import OVERRUN_SHARE

BIN_STEPS = 64
# 4,096 steps ahead; what a resident may still grow beyond is added as its bins come into sight.
NUM_BINS = 64
# Ends of a resident that count: of more than so many, the middle of each equal part.
NUM_ENDS = 4
# Ends of residents that are gone are dropped once there are so many more than of those there.
NUM_GONE_ENDS = 64


class Peak(NamedTuple):
    """The highest KV use to come, in tokens: as expected, and as is rarely exceeded."""

    expected: float
    rare: float


class Resident:
    """One request in an outlook: `offset` tokens at step 0, and the steps at which it may end."""

    __slots__ = ("ends", "offset")

    def __init__(self, offset: int, ends: tuple[float, ...]) -> None:
        self.offset = offset
        self.ends = ends


class KvOutlook:
    """Of one worker: who is there, and what KV they will use. Steps only go forward."""

    def __init__(self) -> None:
        self._now = 0
        self._residents: dict[str, Resident] = {}
        self._means = [0.0] * NUM_BINS
        self._variances = [0.0] * NUM_BINS
        # When each resident outlives the next of its ends.
        self._next_ends: list[tuple[float, int, str, Resident]] = []
        self._num_put = 0
        # Changes with everything but the mere passing of steps.
        self.version = 0
        self._last_step = 0.0
        self._num_offsets = 0
        self._long: dict[str, Resident] = {}

    @property
    def tokens_now(self) -> float:
        """KV in use at this step."""
        return self._num_offsets + len(self._residents) * self._now

    def add(self, name: str, tokens: int, remaining: Sequence[float]) -> None:
        """A resident that has so much KV now and equally likely numbers of steps left."""
        ends = tuple(self._now + one for one in few(remaining))
        self._put(name, Resident(tokens - self._now, ends))

    def remove(self, name: str) -> None:
        """It is gone; nothing happens for one that is not there."""
        resident = self._residents.pop(name, None)
        if resident is not None:
            self.version += 1
            self._num_offsets -= resident.offset
            self._long.pop(name, None)
            self._count(resident, -1.0)
        if not self._residents:  # what rounding left
            self._means = [0.0] * NUM_BINS
            self._variances = [0.0] * NUM_BINS
            self._next_ends.clear()
            self._last_step = 0.0

    def advance(self, now_step: int) -> None:
        """So many steps are done."""
        while self._next_ends and self._next_ends[0][0] <= now_step:
            end, _, name, resident = heapq.heappop(self._next_ends)
            if self._residents.get(name) is resident:
                self._roll_to(int(end))
                self._outlive(name, resident, end)
        self._roll_to(now_step)

    def peak(self, z: float) -> Peak:
        """Of who is there."""
        return self.peak_with(0, (), z)

    def peak_with(self, tokens: int, remaining: Sequence[float], z: float) -> Peak:
        """Of who is there and one more, that has so much KV now."""
        now = self._now
        ends = [now + one for one in few(remaining)]
        share = 1.0 / len(ends) if ends else 0.0
        offset = tokens - now
        expected = rare = self.tokens_now + (tokens if ends else 0)
        last = max(self._last_step, ends[-1] if ends else 0.0)
        first_bin = now // BIN_STEPS + 1
        end_bin = min(first_bin + NUM_BINS, int(last // BIN_STEPS) + 2)
        # Floats only: the interpreter is slow where it has to mix them with integers.
        place, sqrt, bin_steps = first_bin % NUM_BINS, math.sqrt, float(BIN_STEPS)
        means = (self._means[place:] + self._means[:place])[: max(0, end_bin - first_bin)]
        variances = self._variances[place:] + self._variances[:place]
        step = first_bin * bin_steps
        held = offset + step
        num_there, gone_step, there, spread = len(ends), step, 0.0, 0.0
        for mean, variance in zip(means, variances, strict=False):
            if gone_step <= step:  # of a newcomer's ends, one more is past
                while num_there and ends[-num_there] <= step - bin_steps:
                    num_there -= 1
                gone_step = ends[-num_there] + bin_steps if num_there else math.inf
                there = share * num_there
                spread = there * (1.0 - there)
            mean += there * held
            variance += spread * held * held
            if mean > expected:
                expected = mean
            if variance > 0.0:
                mean += z * sqrt(variance)
            if mean > rare:
                rare = mean
            step += bin_steps
            held += bin_steps
        return Peak(expected, rare)

    def _put(self, name: str, resident: Resident) -> None:
        self.version += 1
        self._residents[name] = resident
        self._num_offsets += resident.offset
        self._count(resident, 1.0)
        last = resident.ends[-1]
        self._last_step = max(self._last_step, last)
        if last // BIN_STEPS >= self._now // BIN_STEPS + NUM_BINS:
            self._long[name] = resident
        due = next(end for end in resident.ends if end > self._now)
        self._num_put += 1
        heapq.heappush(self._next_ends, (due, self._num_put, name, resident))
        if len(self._next_ends) > 2 * len(self._residents) + NUM_GONE_ENDS:
            self._forget_gone()

    def _forget_gone(self) -> None:
        there = self._residents
        self._next_ends = [one for one in self._next_ends if there.get(one[2]) is one[3]]
        heapq.heapify(self._next_ends)

    def _outlive(self, name: str, resident: Resident, end: float) -> None:
        """It is there beyond that end: what is left of its ends is likelier now."""
        self.remove(name)
        later = tuple(one for one in resident.ends if one > end)
        if not later:
            held = resident.offset + end
            later = (end + max(1.0, OVERRUN_SHARE * held),)
        self._put(name, Resident(resident.offset, later))

    def _count(self, resident: Resident, sign: float) -> None:
        """Add a resident to, or take it out of, every bin in sight."""
        ends, num = resident.ends, len(resident.ends)
        first = self._now // BIN_STEPS + 1
        last = min(first + NUM_BINS - 1, int(ends[-1] // BIN_STEPS) + 1)
        num_there = num
        for step_bin in range(first, last + 1):
            step = step_bin * BIN_STEPS
            while num_there and ends[num - num_there] <= step - BIN_STEPS:
                num_there -= 1
            if not num_there:
                return
            self._count_in(step_bin, resident.offset + step, num_there / num, sign)

    def _count_in(self, step_bin: int, held: float, there: float, sign: float) -> None:
        place = step_bin % NUM_BINS
        self._means[place] += sign * there * held
        self._variances[place] += sign * there * (1.0 - there) * held * held

    def _roll_to(self, step: int) -> None:
        first, end = self._now // BIN_STEPS + 1, step // BIN_STEPS + 1
        # Over a gap that is longer than what is in sight, what comes into sight before the gap's
        # last part is past again at its end.
        for step_bin in range(max(first, end - NUM_BINS), end):
            self._roll(step_bin)
        self._now = max(self._now, step)

    def _roll(self, step_bin: int) -> None:
        """That bin is past: its place is taken by the one that comes into sight."""
        place = step_bin % NUM_BINS
        self.version += 1
        self._means[place] = self._variances[place] = 0.0
        new_bin = step_bin + NUM_BINS
        step = new_bin * BIN_STEPS
        for name, resident in list(self._long.items()):
            there = sum(end > step - BIN_STEPS for end in resident.ends) / len(resident.ends)
            if there:
                self._count_in(new_bin, resident.offset + step, there, 1.0)
            else:
                del self._long[name]


def few(remaining: Sequence[float]) -> Sequence[float]:
    """At most `NUM_ENDS` of equally likely values, the middle of each equal part."""
    num = len(remaining)
    if num <= NUM_ENDS:
        return remaining
    return [remaining[(2 * i + 1) * num // (2 * NUM_ENDS)] for i in range(NUM_ENDS)]
