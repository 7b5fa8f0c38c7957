"""One vLLM engine in small: what a step computes, when it ends, and what comes of it.

Between two steps the engine takes what has reached it; a message that comes during a step waits for
its end. What it must see before a step begins is up to whoever drives it: `advance` stops between
steps and `plan` begins the next one. Its invariant: every job that was started ends here once, by
an output, and every block is free, held by a job or held under a lease.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tinfer.core.types import LeaseKey
from tinfer.sim.admission import Queues
from tinfer.sim.batch import DecodeBatch, Stretch
from tinfer.sim.blocks import BlockPool
from tinfer.sim.jobs import Job, Kind, Output, What
from tinfer.sim.pace import Pace
from tinfer.sim.preempted import Preempted
from tinfer.sim.spec import EngineSpec
from tinfer.sim.steplog import StepLog


class Report(NamedTuple):
    """What an engine could tell at some moment: totals since its start, and its free blocks."""

    num_steps: int
    busy_s: float
    num_prefill_tokens: int
    num_free_blocks: int


class SimEngine:
    """An engine called `worker_id`; `place` is its number in the pieces of tickets.

    `next_s` is when something happens next unless a message comes first, infinity for never.
    `needs_plan` says that it stands between two steps: nothing goes on until `plan` is called.
    `reads` are the copies that have begun, as leases and when each copy ends: whoever drives the
    engine takes them out and tells the leases' owners. With `parks` a preempted job waits, without
    blocks or a seat, for `resume`; else it computes its blocks again by itself.
    """

    def __init__(
        self,
        spec: EngineSpec,
        worker_id: str = "e",
        place: int = 0,
        seed: int = 0,
        parks: bool = False,
    ) -> None:
        self.spec = spec
        self.worker_id = worker_id
        self.place = place
        self.now_s = 0.0
        self.next_s = math.inf
        self.needs_plan = True
        self.pool = BlockPool(spec.num_blocks, spec.block_tokens, spec.prefix_caching)
        self.batch = DecodeBatch(spec.block_tokens)
        self.queues = Queues(spec, self.pool)
        self.log = StepLog()
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.busy_s = 0.0
        self.budget_tokens: int | None = None
        # Tokens that jobs outside the batch still cost: prompts without a first token, and answers.
        self._owed_tokens = 0
        # In order of admission: what decodes and what has a part of its prompt.
        self._running: dict[Job, None] = {}
        self._num_entered = 0
        self._jobs: dict[str, Job] = {}
        self._leases: dict[LeaseKey, Job] = {}
        self._num_leases = 0
        self._inbox: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._num_messages = 0
        self._stretch: Stretch | None = None
        self._taken_blocks = 0
        self._outputs: list[Output] = []
        self.reads: list[tuple[LeaseKey, float]] = []
        self._preempted = Preempted(parks)
        self._pace = Pace(spec, f"tinfer sim noise {seed} {worker_id}")

    # --- messages -----------------------------------------------------------------------------

    def start(self, at_s: float, job: Job) -> None:
        """Compute this job; it is refused if it can never fit."""
        owed = job.output_tokens if job.kind is Kind.DECODE else job.most_tokens + 1
        self._owed_tokens += owed
        self._post(at_s, self._receive_start, job)

    def abort(self, at_s: float, request_id: str) -> None:
        """Stop a job; what has just ended, or never came, is ignored."""
        self._post(at_s, self._receive_abort, request_id)

    def resume(self, at_s: float, request_id: str, lease: LeaseKey | None) -> None:
        """Let a preempted job go on: by a copy of the blocks under that lease, or (None) by
        computing them again. Where it does not wait for this any more, the lease counts as read."""
        self._post(at_s, self._receive_resume, (request_id, lease))

    def end_lease(self, at_s: float, lease: LeaseKey) -> None:
        """The reader has stopped, or none will come; the second word on a lease is ignored."""
        self._post(at_s, self._receive_end_of_lease, lease)

    def set_budget(self, at_s: float, prefill_tokens: int | None) -> None:
        """Compute at most so many prompt tokens per step from then on; None: no bound of its own.
        Decodes and pulls are never held back by it."""
        self._post(at_s, self._receive_budget, prefill_tokens)

    def _post(self, at_s: float, handler: Callable[[Any], None], about: Any) -> None:
        """`at_s` is never before what `advance` has reached."""
        heapq.heappush(self._inbox, (at_s, self._num_messages, handler, about))
        self._num_messages += 1
        if self._stretch is None:
            self.next_s = min(self.next_s, max(at_s, self.now_s))
        elif at_s < self.next_s:
            self._cut(self._stretch)

    def _cut(self, stretch: Stretch) -> None:
        if self._inbox and self._inbox[0][0] < stretch.end_s(stretch.num_steps):
            stretch.cut(self._inbox[0][0])
        self.next_s = stretch.end_s(stretch.num_steps)

    # --- time ---------------------------------------------------------------------------------

    def advance(self, until_s: float) -> list[Output]:
        """Go on to that time and return what happened, in order.

        Steps that end by then are over; none begins at that very time, so that everything that
        happens then is seen first.
        """
        while self.next_s <= until_s:
            self._reach(self.next_s)
            if self.now_s == until_s:
                break
            self._begin()
        outputs, self._outputs = self._outputs, []
        return outputs

    def plan(self) -> None:
        """Take what has come, and begin the next step if there is anything to compute."""
        if not self.needs_plan:
            return
        self._receive()
        if self._outputs:  # they are to be heard before the next step begins
            self.next_s = self.now_s
        else:
            self._begin()

    def report(self, at_s: float) -> Report:
        """The totals at a time between `now_s` and `next_s`."""
        stretch = self._stretch
        num = 0 if stretch is None else stretch.num_by(at_s)
        if stretch is None or num == 0:
            tokens = self.num_prefill_tokens
            return Report(self.num_steps, self.busy_s, tokens, self.pool.num_free)
        num_ahead = min(num + 1, stretch.num_steps)
        num_taken = self.batch.blocks_for(num_ahead) - self._taken_blocks
        return Report(
            self.num_steps + num,
            self.busy_s + stretch.end_s(num) - stretch.start_s,
            self.num_prefill_tokens,
            self.pool.num_free - num_taken,
        )

    def outstanding_tokens(self, at_s: float) -> int:
        """Tokens that all jobs here still cost: prompts until their first token, then answers."""
        stretch = self._stretch
        decodes = stretch is not None and stretch.num_decodes > 0
        num = stretch.num_by(at_s) if stretch is not None and decodes else 0
        return self._owed_tokens + self.batch.outstanding_tokens(num)

    @property
    def num_open_leases(self) -> int:
        return len(self._leases)

    @property
    def is_idle(self) -> bool:
        """Whether no job and no lease is here."""
        return not self._jobs and not self._leases

    def parked(self, request_id: str) -> Job | None:
        """The job of that id, if it lost its blocks and waits for `resume`."""
        return self._preempted.waiting.get(request_id)

    @property
    def num_preemptions(self) -> int:
        return self._preempted.num

    @property
    def has_preempted(self) -> bool:
        """Whether `take_preempted` has anything to tell."""
        return self._preempted.has_news

    @property
    def has_news(self) -> bool:
        """Whether that has, or `take_progress`."""
        progress = (job.computed > job.reported for job in self.queues.prefilling)
        return self._preempted.has_news or any(progress)

    def take_progress(self) -> tuple[tuple[str, int], ...]:
        """Unfinished prompts of which a chunk was computed since the last call, and how far."""
        progress = []
        for job in self.queues.prefilling:
            if job.computed > job.reported:
                job.reported = job.computed
                progress.append((job.id, min(job.computed, job.prompt_tokens)))
        return tuple(progress)

    def take_preempted(self) -> tuple[str, ...]:
        """Requests that lost their blocks in the steps since the last call."""
        return self._preempted.take()

    def _reach(self, at_s: float) -> None:
        self.now_s = at_s
        self.needs_plan = True
        if self._stretch is not None:
            stretch, self._stretch = self._stretch, None
            self._step_done(stretch)
        self._preempted.step_over()
        self._receive()

    def _receive(self) -> None:
        while self._inbox and self._inbox[0][0] <= self.now_s:
            _, _, handler, about = heapq.heappop(self._inbox)
            handler(about)

    # --- what comes in ------------------------------------------------------------------------

    def _receive_start(self, job: Job) -> None:
        if self.pool.blocks_for(job.most_tokens) > self.spec.num_blocks:
            self._owed_tokens -= self._owed(job)
            return self._say(What.REFUSED, job)
        self._jobs[job.id] = job
        self.queues.add(job)

    def _receive_abort(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is None:
            return
        self._say(What.ABORTED, job)
        if job.entry >= 0:
            self._leave_batch(job)
        self._owed_tokens -= self._owed(job)
        if job in self.queues.pulling:
            job.is_aborted = True  # what is being copied cannot be freed yet
            return
        if job.lease is not None:
            self.reads.append((job.lease, self.now_s))
        self._preempted.waiting.pop(request_id, None)
        self._running.pop(job, None)
        self.queues.remove(job)
        self._free(job)

    def _receive_resume(self, about: tuple[str, LeaseKey | None]) -> None:
        request_id, lease = about
        job = self._preempted.waiting.pop(request_id, None)
        if job is not None:
            job.lease = lease
            self.queues.add_first(job)
        elif lease is not None:
            self.reads.append((lease, self.now_s))

    def _receive_end_of_lease(self, lease: LeaseKey) -> None:
        job = self._leases.pop(lease, None)
        if job is not None:
            self._free(job)
            self._say(What.LEASE_ENDED, job, lease=lease)

    def _receive_budget(self, prefill_tokens: int | None) -> None:
        self.budget_tokens = prefill_tokens

    def _receive_end_of_pull(self, job: Job) -> None:
        self.queues.pulling.discard(job)
        self._say(What.PULLED, job)
        if job.is_aborted:  # nothing of what was copied is findable
            num_blocks = self.pool.blocks_for(job.computed)
            return self.pool.release(job, num_blocks, job.num_registered * self.spec.block_tokens)
        # The last token is computed again: its step samples the next one.
        num_blocks = self.pool.blocks_for(job.computed)
        job.computed -= 1
        num_kept = self.pool.blocks_for(job.computed)
        self.pool.give(num_blocks - num_kept)
        self.pool.register(job, num_kept * self.spec.block_tokens)
        self.queues.ready.append(job)

    # --- a step -------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.needs_plan = False
        self._stretch = self._schedule()
        if self._stretch is not None:
            self._cut(self._stretch)
        elif self._preempted.must_be_heard:
            self.next_s = self.now_s
        else:
            self.next_s = self._inbox[0][0] if self._inbox else math.inf

    def _schedule(self) -> Stretch | None:
        """The next steps, or None when there is nothing to compute."""
        if not self.spec.chunked_prefill:
            most_tokens = self.spec.max_num_batched_tokens
            prompts = self.queues.admit_whole(most_tokens, self._num_seats, bool(self._running))
            if prompts:
                self._enter_prompts(prompts)
                return self._pace.mixed(self.now_s, self.num_steps, prompts, None)
        self._join_ready()
        has_chunks, has_preempted = self._fit_running()
        # Nobody is let in beside a preemption, unless that left nothing to compute.
        is_closed = has_preempted and (has_chunks or self.batch.num > 0)
        num_seats = self._num_seats if self.spec.chunked_prefill and not is_closed else 0
        chunks, pulls = self.queues.fill(self._prompt_tokens(), num_seats, bool(self._running))
        self._enter_prompts(chunks)
        for job, missing_tokens in pulls:
            self._begin_pull(job, missing_tokens)
        if chunks:
            return self._pace.mixed(self.now_s, self.num_steps, chunks, self.batch)
        if not self.batch.num:
            return None
        # After a preemption the next step may let somebody in, and so may another order.
        may_let_in = has_preempted or (self._num_seats > 0 and self.queues.may_reorder())
        num_steps = 1 if may_let_in else self._num_steps_alike()
        return self._pace.decodes(self.now_s, self.num_steps, num_steps, self.batch)

    @property
    def _num_seats(self) -> int:
        num_taken = len(self._running) + len(self.queues.pulling) + len(self.queues.ready)
        return self.spec.max_num_seqs - num_taken

    def _prompt_tokens(self) -> int:
        """How many prompt tokens a step may compute beside what decodes."""
        left = self.spec.max_num_batched_tokens - self.batch.num
        return left if self.budget_tokens is None else min(left, self.budget_tokens)

    def _num_steps_alike(self) -> int:
        """For how many steps the batch goes on as it is: until one finishes or blocks run out."""
        num_blocks = self.pool.num_free + self._taken_blocks
        return self.batch.steps_within(num_blocks, self.batch.steps_to_finish())

    def _join_ready(self) -> None:
        for job in self.queues.ready:
            self._enter(job)
            if not job.has_begun:  # the last token of its prompt is a chunk of its own
                self.queues.prefilling.append(job)
                continue
            self._owed_tokens -= self._owed(job)
            self.batch.join(job)
        self.queues.ready.clear()

    def _fit_running(self) -> tuple[bool, bool]:
        """Take the blocks that the next step of all that decodes needs; preempt while they, or
        those for the prompts that run, are missing. Returns whether the step could have chunks of
        these, and whether anybody was preempted."""
        has_preempted = False
        while True:
            chunks = self.queues.running_chunks(self._prompt_tokens())
            num_for_decodes = self.batch.blocks_for(1)
            if num_for_decodes + self.queues.new_blocks(chunks) <= self.pool.num_free:
                break
            self._preempt(self._choose_victim())
            has_preempted = True
        self._taken_blocks = num_for_decodes
        self.pool.take(num_for_decodes)
        return bool(chunks), has_preempted

    def _choose_victim(self) -> Job:
        if self.spec.victim == "newest":
            return next(reversed(self._running))
        return min(self._running, key=self._progress)

    def _progress(self, job: Job) -> tuple[int, int]:
        generated = self.batch.generated(job) if job.entry >= 0 else job.generated
        return generated, -job.arrival

    def _preempt(self, job: Job) -> None:
        if job.entry >= 0:
            self._leave_batch(job)
        else:
            self.queues.prefilling.remove(job)
        del self._running[job]
        self._free(job)
        job.reported = 0
        self._preempted.add(job)
        if not self._preempted.parks:
            self.queues.add_first(job)

    def _enter_prompts(self, chunks: list[tuple[Job, int]]) -> None:
        """Run those of a step's prompts that were let in with it."""
        for job, _ in chunks:
            if job in self._running:
                continue
            if not job.was_admitted:
                job.ticket.cached_tokens = job.computed
                job.was_admitted = True
            self._enter(job)

    def _enter(self, job: Job) -> None:
        self._num_entered += 1
        job.rank = self._num_entered
        self._running[job] = None

    def _begin_pull(self, job: Job, missing_tokens: int) -> None:
        assert job.lease is not None, f"{job.id}: a pull without a lease"
        job.was_admitted = True
        until_s = self.now_s + self.spec.costs.handoff_total_s(missing_tokens)
        self.reads.append((job.lease, until_s))
        job.lease = None
        self._post(until_s, self._receive_end_of_pull, job)

    # --- what comes of it ---------------------------------------------------------------------

    def _step_done(self, stretch: Stretch) -> None:
        num_steps = stretch.num_steps
        self.num_steps += num_steps
        self.busy_s += self.now_s - stretch.start_s
        if stretch.num_decodes:
            self.pool.take(self.batch.blocks_for(num_steps) - self._taken_blocks)
            self.log.add(stretch)
            for job in sorted(self.batch.advance(num_steps), key=_rank):
                self._add_piece(job)
                self._finish(job)
        for job, num_tokens in stretch.chunks:
            self.num_prefill_tokens += num_tokens
            job.computed += num_tokens
            if job.computed == job.target:
                self._prompt_done(job)

    def _prompt_done(self, job: Job) -> None:
        """All tokens up to here are computed, so the step has sampled one more."""
        self.queues.prefilling.remove(job)
        self._owed_tokens -= self._owed(job)
        job.generated += 1
        if job.generated > job.num_known:
            job.ticket.pieces.append(self.now_s)
        if job.kind is Kind.PREFILL and job.ticket.request.output_tokens > 1:
            self._hold(job)
        elif job.generated == job.output_tokens:
            self._finish(job)
        else:
            if job.generated == 1 and job.kind is Kind.WHOLE:
                self._say(What.FIRST_TOKEN, job)
            self.batch.join(job)

    def _hold(self, job: Job) -> None:
        """Keep the blocks of a prefilled prompt for its reader."""
        lease = LeaseKey(self.worker_id, 0, self._num_leases, self._num_leases)
        self._num_leases += 1
        self._leases[lease] = job
        del self._running[job], self._jobs[job.id]
        num_blocks = self.pool.blocks_for(job.computed)
        self._say(What.PREFILLED, job, lease=lease, num_blocks=num_blocks)

    def _finish(self, job: Job) -> None:
        del self._running[job], self._jobs[job.id]
        self._free(job)
        self._say(What.FINISHED, job)

    def _leave_batch(self, job: Job) -> None:
        self.batch.leave(job)
        self._add_piece(job)
        self._owed_tokens += self._owed(job)

    def _add_piece(self, job: Job) -> None:
        """Note the tokens that a job got while it was in the batch, but those the client has."""
        end = self.batch.num_steps
        num_new = end - job.joined_step
        num_known = max(0, job.num_known - (job.generated - num_new))
        if num_new > num_known:
            job.ticket.pieces.append((self.place, job.joined_step + num_known, end))

    def _owed(self, job: Job) -> int:
        """What a job outside the batch still costs."""
        left = job.output_tokens - job.generated
        if job.kind is Kind.DECODE or job.generated:
            return left
        return left + job.prompt_tokens

    def _free(self, job: Job) -> None:
        """Free the blocks of a job that computes no more; a later one starts anew."""
        self.pool.release(job, self.pool.blocks_for(job.computed), job.computed)
        job.computed = 0

    def _say(
        self, what: What, job: Job, lease: LeaseKey | None = None, num_blocks: int = 0
    ) -> None:
        said = Output(what, self.now_s, self.worker_id, job, lease, num_blocks)
        self._outputs.append(said)


def _rank(job: Job) -> int:
    return job.rank
