"""What an engine has beside its batch, and who gets in next: vLLM's rules of admission.

First come, first served, with a preempted request before all others: whoever is at the head and
does not fit holds up those behind, except that a prompt which only waits for tokens of the step's
budget does not hold up a pull, which costs none.
"""

from __future__ import annotations

from collections import deque

from tinfer.sim.blocks import BlockPool
from tinfer.sim.jobs import Job, Kind
from tinfer.sim.spec import EngineSpec

Chunk = tuple[Job, int]


class Queues:
    """Every job is in exactly one of these, or in the batch.

    `prompts` and `pulls` wait; `pulling` are being copied; `ready` have their prompt's blocks and
    join the batch with the next step; `prefilling` run and have a part of their prompt.
    """

    def __init__(self, spec: EngineSpec, pool: BlockPool) -> None:
        self._pool = pool
        self._watermark_blocks = int(spec.watermark * spec.num_blocks)
        self.prompts: deque[Job] = deque()
        self.pulls: deque[Job] = deque()
        self.pulling: set[Job] = set()
        self.ready: deque[Job] = deque()
        self.prefilling: list[Job] = []
        self._last_rank = 0
        self._first_rank = 0

    def add(self, job: Job) -> None:
        """A job that has just come."""
        self._last_rank += 1
        job.rank = self._last_rank
        (self.pulls if job.kind is Kind.DECODE else self.prompts).append(job)

    def add_first(self, job: Job) -> None:
        """A job that lost its blocks: it computes all of them again, before anybody else."""
        self._first_rank -= 1
        job.rank = self._first_rank
        self.prompts.appendleft(job)

    def remove(self, job: Job) -> None:
        """Forget a job that may be in any of them but `pulling`."""
        for queue in (self.prompts, self.pulls, self.ready, self.prefilling):
            if job in queue:
                queue.remove(job)

    def running_chunks(self, prompt_tokens: int) -> list[Chunk]:
        """What a step for so many prompt tokens computes of the prompts that run."""
        chunks = []
        for job in self.prefilling:
            num_tokens = min(prompt_tokens, job.target - job.computed)
            if num_tokens > 0:
                chunks.append((job, num_tokens))
                prompt_tokens -= num_tokens
        return chunks

    def admit(
        self, prompt_tokens: int, num_seats: int, running: list[Chunk], beside: bool
    ) -> tuple[list[Chunk], list[Chunk]]:
        """Let in what fits into a step that has so many prompt tokens and seats left.

        `running` are the step's chunks of prompts that run; `beside` says that anything runs.
        Returns the prompts, each with the tokens of its first chunk, and those whose pull is to
        begin, each with the tokens that it lacks; blocks are taken, and `computed` is what a prefix
        cache had.
        """
        prompts: list[Chunk] = []
        pulls: list[Chunk] = []
        taken = dict(running)
        num_reserved = sum(
            self._lacks(job, job.computed + taken.get(job, 0)) for job in self.prefilling
        )
        while num_seats > 0:
            queue = self._next_queue(prompt_tokens > 0)
            if not queue:
                break
            job = queue[0]
            if queue is self.pulls:
                num_tokens = self._take_all(job, num_reserved, beside)
                if num_tokens is None:
                    break
                pulls.append((job, num_tokens))
                self.pulling.add(job)
            else:
                num_tokens = self._take_first(job, prompt_tokens, beside)
                if num_tokens is None:
                    break
                prompts.append((job, num_tokens))
                prompt_tokens -= num_tokens
                num_reserved += self._lacks(job, job.computed + num_tokens)
                beside = True
            queue.popleft()
            num_seats -= 1
        return prompts, pulls

    def admit_whole(self, prompt_tokens: int, num_seats: int, beside: bool) -> list[Chunk]:
        """Without chunks: as many whole prompts as fit, and the first one however long it is."""
        prompts: list[Chunk] = []
        while num_seats > 0 and self.prompts:
            job = self.prompts[0]
            num_new = job.target - self._pool.hits(job)[0] * self._pool.block_tokens
            if prompts and num_new > prompt_tokens:
                break
            if self._take_first(job, num_new, beside) is None:
                break
            prompts.append((self.prompts.popleft(), num_new))
            prompt_tokens -= num_new
            num_seats -= 1
            beside = True
        return prompts

    def _next_queue(self, has_tokens: bool) -> deque[Job]:
        if not has_tokens or not self.prompts:
            return self.pulls
        if self.pulls and self.pulls[0].rank < self.prompts[0].rank:
            return self.pulls
        return self.prompts

    def _take_first(self, job: Job, prompt_tokens: int, beside: bool) -> int | None:
        """Take the blocks of a prompt's first chunk, if those of all of it are free now."""
        num_hits = self._fits(job, 0, beside)
        if num_hits is None:
            return None
        self._pool.acquire(job, num_hits)
        job.computed = num_hits * self._pool.block_tokens
        num_tokens = min(prompt_tokens, job.target - job.computed)
        self._pool.take(self._pool.blocks_for(job.computed + num_tokens) - num_hits)
        # Findable from now on, even for who is let in right behind: both compute in one step.
        self._pool.register(job, job.computed + num_tokens)
        return num_tokens

    def _take_all(self, job: Job, num_reserved: int, beside: bool) -> int | None:
        """Take all blocks of a prompt, without those that prompts under way still need: a pull
        cannot be preempted. Returns the tokens that are not here yet."""
        num_hits = self._fits(job, num_reserved, beside)
        if num_hits is None:
            return None
        self._pool.acquire(job, num_hits)
        self._pool.take(self._pool.blocks_for(job.target) - num_hits)
        job.computed = job.target
        return job.target - num_hits * self._pool.block_tokens

    def _fits(self, job: Job, num_reserved: int, beside: bool) -> int | None:
        """How many of its blocks are cached, if the others fit beside what is reserved."""
        num_hits, num_idle = self._pool.hits(job)
        needed = self._pool.blocks_for(job.target) - num_hits + num_idle + num_reserved
        if beside:
            needed += self._watermark_blocks
        return num_hits if needed <= self._pool.num_free else None

    def _lacks(self, job: Job, computed_tokens: int) -> int:
        blocks_for = self._pool.blocks_for
        return blocks_for(job.target) - blocks_for(computed_tokens)
