"""The sequences of an engine that decode, as a whole: many steps ahead without touching each.

Every sequence grows by one token with every decode step, so what it has follows from when it
joined; what is kept is only when the next one finishes, how much KV all of them read, and at which
steps how many of them need a new block. A step's time grows linearly with the step, so the ends of
a row of steps are a parabola.
"""

from __future__ import annotations

import bisect
import heapq
import math

from tinfer.sim.jobs import Job


class Stretch:
    """A row of `num_steps` steps that begins at `start_s`: the first takes `first_s`, each one
    after it `more_s` longer than the one before. `ends_s` are the ends where noise bends them."""

    __slots__ = ("chunks", "ends_s", "first_s", "more_s", "num_decodes", "num_steps", "start_s")

    def __init__(
        self,
        start_s: float,
        first_s: float,
        more_s: float,
        num_steps: int,
        num_decodes: int,
        chunks: list[tuple[Job, int]],
        ends_s: list[float] | None = None,
    ) -> None:
        self.start_s = start_s
        self.first_s = first_s
        self.more_s = more_s
        self.num_steps = num_steps
        self.num_decodes = num_decodes
        self.chunks = chunks
        self.ends_s = ends_s

    def end_s(self, num_steps: int) -> float:
        """When the first `num_steps` >= 1 steps are over."""
        if self.ends_s is not None:
            return self.ends_s[num_steps - 1]
        bend_s = self.more_s * (num_steps * (num_steps - 1) // 2)
        return self.start_s + (num_steps * self.first_s + bend_s)

    def num_by(self, at_s: float) -> int:
        """How many steps are over at that time."""
        if self.ends_s is not None:
            return min(bisect.bisect_right(self.ends_s, at_s), self.num_steps)
        most = self.num_steps
        if at_s >= self.end_s(most):
            return most
        num = min(self._estimate(at_s - self.start_s), most)
        while num and self.end_s(num) > at_s:
            num -= 1
        while num < most and self.end_s(num + 1) <= at_s:
            num += 1
        return num

    def _estimate(self, spent_s: float) -> int:
        """About how many steps that is: the root of the parabola."""
        if spent_s <= 0.0:
            return 0
        half = self.more_s / 2.0
        slope = self.first_s - half
        return int(2.0 * spent_s / (slope + math.sqrt(slope * slope + 4.0 * half * spent_s)))

    def cut(self, at_s: float) -> None:
        """End with the step that is under way at that time, or ends then."""
        num = self.num_by(at_s)
        if num == 0 or self.end_s(num) < at_s:
            num += 1
        self.num_steps = min(num, self.num_steps)


class DecodeBatch:
    """Sequences that get one token per decode step; `num_steps` counts those steps.

    Blocks are counted as if each sequence had just those that its computed tokens fill.
    """

    def __init__(self, block_tokens: int) -> None:
        self.num = 0
        self.num_steps = 0
        self.kv_tokens = 0
        self._block_tokens = block_tokens
        self._ends: list[tuple[int, int, Job]] = []
        self._num_joined = 0
        self._sum_ends = 0
        # How many sequences need a block at the steps whose number is -index modulo block_tokens.
        self._crossing = [0] * block_tokens

    def join(self, job: Job) -> None:
        """Take in a job that has more tokens to generate."""
        end = self.num_steps + job.output_tokens - job.generated
        job.entry = self._num_joined
        job.joined_step = self.num_steps
        self._num_joined += 1
        heapq.heappush(self._ends, (end, job.entry, job))
        self._count(job, 1, end)

    def leave(self, job: Job) -> None:
        """Let go of a job; its `computed` and `generated` are right again."""
        self._count(job, -1, job.joined_step + job.output_tokens - job.generated)
        num_new = self.num_steps - job.joined_step
        job.computed += num_new
        job.generated += num_new
        job.entry = -1

    def generated(self, job: Job) -> int:
        """What a job in here has by now."""
        return job.generated + self.num_steps - job.joined_step

    def advance(self, num_steps: int) -> list[Job]:
        """Do so many steps, and return those that have all their tokens."""
        self.num_steps += num_steps
        self.kv_tokens += num_steps * self.num
        finished = []
        while self._ends and self._ends[0][0] <= self.num_steps:
            _, entry, job = heapq.heappop(self._ends)
            if job.entry == entry:
                self.leave(job)
                finished.append(job)
        return finished

    def steps_to_finish(self) -> int:
        """Steps until the first one has all its tokens; there is at least one in here."""
        while self._ends[0][2].entry != self._ends[0][1]:
            heapq.heappop(self._ends)
        return self._ends[0][0] - self.num_steps

    def blocks_for(self, num_steps: int) -> int:
        """Blocks that the next steps need beyond those that the sequences fill now."""
        rounds, rest = divmod(num_steps, self._block_tokens)
        return rounds * self.num + sum(self._needs(rest))

    def steps_within(self, num_blocks: int, most: int) -> int:
        """For how many steps, at most `most`, so many blocks are enough."""
        if self.blocks_for(most) <= num_blocks:
            return most
        rounds, left = divmod(num_blocks, self.num)
        num_steps = rounds * self._block_tokens
        for needed in self._needs(self._block_tokens):
            left -= needed
            if left < 0:
                break
            num_steps += 1
        return num_steps

    def outstanding_tokens(self, num_steps: int) -> int:
        """Tokens still to come when so many steps more are done."""
        return self._sum_ends - self.num * (self.num_steps + num_steps)

    def _needs(self, num_steps: int) -> list[int]:
        size, start = self._block_tokens, -self.num_steps
        return [self._crossing[(start - step) % size] for step in range(num_steps)]

    def _count(self, job: Job, sign: int, end: int) -> None:
        self.num += sign
        self._sum_ends += sign * end
        # Its tokens at step 0, had it been here then.
        offset = job.computed - job.joined_step
        self.kv_tokens += sign * (offset + self.num_steps)
        self._crossing[offset % self._block_tokens] += sign
