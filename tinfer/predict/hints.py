"""What a client says of the length of its answer, as one more sample beside what is known.

A hint takes the place of a share of the predicted lengths: an eighth for a tenant that nobody knows
yet, up to three quarters for one whose hints have been exact, nothing for one whose hints tell no
more than the prediction without them. So a wrong one costs little, and a liar is not heard for
long. Pure: no clock, no chance, bounded memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from msgspec import Struct

from tinfer.core.lengths import Lengths
from tinfer.predict.asked import Asked, End

NUM_POINTS = 16
FIRST_WEIGHT = 0.125
LARGEST_WEIGHT = 0.75
# That first weight counts as much as so many answers.
FIRST_ANSWERS = 4.0
# After so many more answers of a tenant an old one counts 1/e.
FORGET_AFTER = 64
NUM_TENANTS = 1024
# Of one answer: a factor of 20 between what was said and what came. More tells no more.
LARGEST_ERROR = 3.0


class Record(Struct):
    """Of one tenant: answers with a hint, and the sums of both errors in them, the older the less.
    An error is the logarithm of the factor between a length and the one that was said."""

    num: float = 0.0
    hinted: float = 0.0
    predicted: float = 0.0

    @property
    def weight(self) -> float:
        """The share of the predicted lengths that a hint stands for."""
        gain = 1.0 - self.hinted / self.predicted if self.predicted > 0.0 else 0.0
        earned = LARGEST_WEIGHT * max(0.0, gain)
        return (FIRST_ANSWERS * FIRST_WEIGHT + self.num * earned) / (FIRST_ANSWERS + self.num)


class Hints:
    """Blends hints in, and remembers of the latest NUM_TENANTS tenants what theirs were worth.

    A tenant is known by the beginning of its prompts (`Features.head`).
    """

    def __init__(self) -> None:
        self._records: OrderedDict[int, Record] = OrderedDict()

    def weight(self, head: int) -> float:
        """How much that tenant's next hint counts, from 0 to LARGEST_WEIGHT."""
        return self._records.get(head, Record()).weight

    def blended(self, asked: Asked, lengths: Lengths) -> Lengths:
        """The prediction with the hint of this request in it, if it has one. What is known for
        certain, as that an answer runs to its bound, is left as it is."""
        expected = _expected(asked)
        if expected is None:
            return lengths
        return with_hint(lengths, expected, self.weight(asked.features.head))

    def observe(self, asked: Asked, lengths: Lengths, output_tokens: int, end: End) -> None:
        """The answer is over; `lengths` is what was predicted without the hint.

        One that was cut says how long it was at least: only what was said to be shorter is wrong.
        """
        expected = _expected(asked)
        if expected is None or output_tokens < 1:
            return
        is_whole = end is End.STOP
        record = self._records.setdefault(asked.features.head, Record())
        self._records.move_to_end(asked.features.head)
        fading = 1.0 - 1.0 / FORGET_AFTER
        record.num = fading * record.num + 1.0
        record.hinted = fading * record.hinted + _error(expected, output_tokens, is_whole)
        middle = max(1.0, lengths.quantile(0.5))
        record.predicted = fading * record.predicted + _error(middle, output_tokens, is_whole)
        if len(self._records) > NUM_TENANTS:
            self._records.popitem(last=False)


def with_hint(lengths: Lengths, expected_tokens: int, weight: float) -> Lengths:
    """NUM_POINTS equally likely lengths, of which a share of `weight`, rounded, is the hint and the
    others have the shape of `lengths`; the very `lengths` where that share comes to none."""
    num_hints = round(NUM_POINTS * weight)
    if num_hints < 1:
        return lengths
    num = NUM_POINTS - num_hints
    kept = [round(lengths.quantile((place + 0.5) / num)) for place in range(num)]
    return Lengths(tuple(sorted(kept + [expected_tokens] * num_hints)))


def _expected(asked: Asked) -> int | None:
    """The hint of a request within its bound; None where there is none to go by."""
    if asked.expected_output_tokens is None or asked.runs_to_bound:
        return None
    return min(asked.expected_output_tokens, asked.max_output_tokens)


def _error(said: float, output_tokens: int, is_whole: bool) -> float:
    factor = math.log(output_tokens / said)
    return min(LARGEST_ERROR, abs(factor) if is_whole else max(0.0, factor))
