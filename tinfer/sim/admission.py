"""What an engine has beside its batch, and who gets in next: vLLM's rules of admission.

First come, first served, with a preempted request before all others: whoever is at the head and
does not fit holds up those behind, except that a prompt which only waits for its prefill budget
does not hold up a pull.
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
        self._spec = spec
        self._pool = pool
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

    def running_chunks(self, budget: int, prompt_budget: int | None) -> list[Chunk]:
        """What a step with `budget` tokens left computes of the prompts that run."""
        left = budget if prompt_budget is None else min(budget, prompt_budget)
        chunks = []
        for job in self.prefilling:
            num_tokens = min(left, job.target - job.computed)
            if num_tokens > 0:
                chunks.append((job, num_tokens))
                left -= num_tokens
        return chunks

    def admit(
        self, chunks: list[Chunk], budget: int, prompt_budget: int | None, num_seats: int
    ) -> list[Chunk]:
        """Let in what fits into a step: prompts are added to `chunks`, and their blocks are taken.

        Returns the jobs whose pull is to begin, each with the tokens that it lacks; they are in
        `pulling`, and their blocks are taken.
        """
        num_chunked = sum(num_tokens for _, num_tokens in chunks)
        left = budget - num_chunked
        prompt_left = left if prompt_budget is None else min(left, prompt_budget - num_chunked)
        # Of prompts let in just now: what they still lack when this step is over.
        num_reserved = sum(self._lacks(job, job.computed + num) for job, num in chunks)
        pulls: list[Chunk] = []
        while num_seats > 0 and left > 0 and (self.pulls or self.prompts):
            queue = self._next_queue(prompt_left)
            if not queue:
                break
            job = queue[0]
            if queue is self.pulls:
                missing_tokens = self._take_all(job, num_reserved)
                if missing_tokens is None:
                    break
                pulls.append((job, missing_tokens))
                self.pulling.add(job)
            else:
                num_tokens = self._take_first(job, prompt_left, bool(self.prefilling or chunks))
                if num_tokens == 0:
                    break
                chunks.append((job, num_tokens))
                left -= num_tokens
                prompt_left -= num_tokens
                num_reserved += self._lacks(job, job.computed + num_tokens)
            queue.popleft()
            num_seats -= 1
        return pulls
