"""What an engine has beside its batch, and what of it the next step computes: vLLM's rules, and
another order of prompts.

First come, first served (`fcfs`): prompts that run, and then what waits, with a preempted request
before all others. By fewest tokens left (`srpt`): prompts that run and prompts that wait are one
row, so a short one that has just come takes the tokens of a long one under way; a pull waits for
the prompt whose turn it is if that came before it, and the prompt for the pull if not.

Either way who waits, has its turn and does not fit holds up all others that wait, and nothing that
runs; but a prompt which only waits for tokens of the step's budget does not hold up a pull, which
costs none.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tinfer.sim.blocks import BlockPool
from tinfer.sim.jobs import Job, Kind
from tinfer.sim.spec import EngineSpec

Chunk = tuple[Job, int]


@dataclass(slots=True)
class _Step:
    """A step while it is put together: what it has left, and the running prompts still to come.

    `num_reserved` are the blocks that prompts under way need until they are done and have not yet;
    `beside` says that anything runs.
    """

    prompt_tokens: int
    num_seats: int
    beside: bool
    rest: deque[Job]
    num_reserved: int
    chunks: list[Chunk] = field(default_factory=list)
    pulls: list[Chunk] = field(default_factory=list)


class Queues:
    """Every job is in exactly one of these, in the batch, or waits for `SimEngine.resume`.

    `prompts` and `pulls` wait; `pulling` are being copied; `ready` have the blocks that they pulled
    and run from the next step on; `prefilling` run and have a part of their prompt.
    """

    def __init__(self, spec: EngineSpec, pool: BlockPool) -> None:
        self._pool = pool
        self._watermark_blocks = int(spec.watermark * spec.num_blocks)
        self._is_srpt = spec.prefill_order == "srpt"
        # In order of `_place`.
        self.prompts: list[Job] = []
        self.pulls: deque[Job] = deque()
        self.pulling: set[Job] = set()
        self.ready: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self._last_rank = 0
        self._first_rank = 0

    def add(self, job: Job) -> None:
        """A job that has just come."""
        self._last_rank += 1
        job.arrival = job.rank = self._last_rank
        if job.kind is Kind.DECODE:
            self.pulls.append(job)
        else:
            bisect.insort(self.prompts, job, key=self._place)

    def add_first(self, job: Job) -> None:
        """A job that lost its blocks: it pulls them, or computes all of them again, before any
        other pull and, first come, first served, before anybody else."""
        self._first_rank -= 1
        job.rank = self._first_rank
        if job.lease is not None:
            self.pulls.appendleft(job)
        else:
            bisect.insort(self.prompts, job, key=self._place)

    def remove(self, job: Job) -> None:
        """Forget a job that may be in any of them but `pulling`."""
        for queue in (self.prompts, self.pulls, self.ready, self.prefilling):
            if job in queue:
                queue.remove(job)

    # --- the order ----------------------------------------------------------------------------

    def may_reorder(self) -> bool:
        """Whether who waits could change places while nothing comes, goes or is let in: blocks that
        decodes take may hold what one of them would have found."""
        if not (self._is_srpt and self._pool.caching) or len(self.prompts) < 2:
            return False
        return any(self._pool.hits(job)[1] for job in self.prompts)

    def _place(self, job: Job) -> tuple[int, int]:
        """Where a prompt waits, by all that it could have to compute."""
        return (job.target, job.arrival) if self._is_srpt else (job.rank, 0)

    def _first_prompt(self) -> Job | None:
        """Whose turn it is of the prompts that wait."""
        if self._is_srpt and self._pool.caching:
            return min(self.prompts, key=self._tokens_left, default=None)
        return self.prompts[0] if self.prompts else None

    def _tokens_left(self, job: Job) -> tuple[int, int]:
        """Of a prompt that runs or waits; ties by arrival."""
        # What runs has computed something, what waits nothing.
        computed = job.computed or self._pool.hits(job)[0] * self._pool.block_tokens
        return job.target - computed, job.arrival

    def _running_in_order(self) -> list[Job]:
        if self._is_srpt and len(self.prefilling) > 1:
            return sorted(self.prefilling, key=self._tokens_left)
        return self.prefilling

    def _goes_before(self, running: Job, waiting: Job) -> bool:
        return not self._is_srpt or self._tokens_left(running) < self._tokens_left(waiting)

    # --- a step -------------------------------------------------------------------------------

    def running_chunks(self, prompt_tokens: int) -> list[Chunk]:
        """What a step for so many prompt tokens computes of the prompts that run, if nobody is let
        in."""
        return _shared_out(self._running_in_order(), prompt_tokens)

    def new_blocks(self, chunks: list[Chunk]) -> int:
        """Blocks that these lack."""
        blocks_for = self._pool.blocks_for
        return sum(
            blocks_for(job.computed + num_tokens) - blocks_for(job.computed)
            for job, num_tokens in chunks
        )

    def fill(
        self, prompt_tokens: int, num_seats: int, beside: bool
    ) -> tuple[list[Chunk], list[Chunk]]:
        """Share out a step's prompt tokens and seats among what runs and what waits.

        There are blocks for the chunks of all that runs; `beside` says that anything does. Returns
        the step's chunks in their order, and those whose pull is to begin, each with the tokens
        that it lacks. Blocks are taken; who was let in has in `computed` what a cache had.
        """
        if not (self.prefilling or self.prompts or self.pulls):
            return [], []
        rest = deque(self._running_in_order())
        num_reserved = sum(self._lacks(job, job.computed) for job in rest)
        step = _Step(prompt_tokens, num_seats, beside, rest, num_reserved)
        while step.rest or step.num_seats > 0:
            has_room = step.num_seats > 0 and step.prompt_tokens > 0
            prompt = self._first_prompt() if has_room else None
            if step.rest and (prompt is None or self._goes_before(step.rest[0], prompt)):
                self._go_on(step, step.rest.popleft())
            elif self.pulls and (prompt is None or self.pulls[0].rank < prompt.rank):
                self._let_in_pull(step, self.pulls[0])
            elif prompt is not None:
                self._let_in_prompt(step, prompt)
            else:
                break
        return step.chunks, step.pulls

    def admit_whole(self, prompt_tokens: int, num_seats: int, beside: bool) -> list[Chunk]:
        """Without chunks: as many whole prompts as fit, and the first one however long it is."""
        prompts: list[Chunk] = []
        while num_seats > 0 and self.prompts:
            job = self.prompts[0]
            num_new = job.target - self._pool.hits(job)[0] * self._pool.block_tokens
            if prompts and num_new > prompt_tokens:
                break
            if self._take_first(job, num_new, (), beside) is None:
                break
            prompts.append((job, num_new))
            prompt_tokens -= num_new
            num_seats -= 1
            beside = True
        return prompts

    def _go_on(self, step: _Step, job: Job) -> None:
        num_tokens = min(step.prompt_tokens, job.target - job.computed)
        if num_tokens <= 0:
            return
        num_blocks = self.new_blocks([(job, num_tokens)])
        self._pool.take(num_blocks)
        self._pool.register(job, job.computed + num_tokens)
        step.num_reserved -= num_blocks
        step.prompt_tokens -= num_tokens
        step.chunks.append((job, num_tokens))

    def _let_in_prompt(self, step: _Step, job: Job) -> None:
        num_tokens = self._take_first(job, step.prompt_tokens, step.rest, step.beside)
        if num_tokens is None:
            step.num_seats = 0
            return
        step.num_reserved += self._lacks(job, job.computed + num_tokens)
        step.prompt_tokens -= num_tokens
        step.num_seats -= 1
        step.beside = True
        step.chunks.append((job, num_tokens))

    def _let_in_pull(self, step: _Step, job: Job) -> None:
        num_tokens = self._take_all(job, step.num_reserved, step.beside)
        if num_tokens is None:
            step.num_seats = 0
            return
        self.pulls.popleft()
        self.pulling.add(job)
        step.num_seats -= 1
        step.pulls.append((job, num_tokens))

    def _take_first(
        self, job: Job, prompt_tokens: int, rest: Iterable[Job], beside: bool
    ) -> int | None:
        """Take the blocks of a prompt's first chunk and let it run, if those of all of it are free
        beside what the step then still computes of `rest`."""
        num_hits, num_idle = self._pool.hits(job)
        computed = num_hits * self._pool.block_tokens
        num_tokens = min(prompt_tokens, job.target - computed)
        num_reserved = self.new_blocks(_shared_out(rest, prompt_tokens - num_tokens))
        if not self._fits(job, num_hits - num_idle, num_reserved, beside):
            return None
        self.prompts.remove(job)
        self.prefilling.append(job)
        self._pool.acquire(job, num_hits)
        job.computed = computed
        self._pool.take(self._pool.blocks_for(computed + num_tokens) - num_hits)
        # Findable from now on, even for who is let in right behind: both compute in one step.
        self._pool.register(job, computed + num_tokens)
        return num_tokens

    def _take_all(self, job: Job, num_reserved: int, beside: bool) -> int | None:
        """Take all blocks that a pull fills, without those that prompts under way still need: it
        cannot be preempted. Returns the tokens that are not here yet."""
        num_hits, num_idle = self._pool.hits(job)
        if not self._fits(job, num_hits - num_idle, num_reserved, beside):
            return None
        self._pool.acquire(job, num_hits)
        self._pool.take(self._pool.blocks_for(job.target) - num_hits)
        job.computed = job.target
        return job.target - num_hits * self._pool.block_tokens

    def _fits(self, job: Job, num_shared: int, num_reserved: int, beside: bool) -> bool:
        """Whether all its blocks, but those shared with others, are free beside the reserved."""
        needed = self._pool.blocks_for(job.target) - num_shared + num_reserved
        if beside:
            needed += self._watermark_blocks
        return needed <= self._pool.num_free

    def _lacks(self, job: Job, computed_tokens: int) -> int:
        blocks_for = self._pool.blocks_for
        return blocks_for(job.target) - blocks_for(computed_tokens)


def _shared_out(jobs: Iterable[Job], prompt_tokens: int) -> list[Chunk]:
    """What each of these gets of so many tokens, in their order."""
    chunks = []
    for job in jobs:
        num_tokens = min(prompt_tokens, job.target - job.computed)
        if num_tokens > 0:
            chunks.append((job, num_tokens))
            prompt_tokens -= num_tokens
    return chunks
