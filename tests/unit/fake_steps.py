"""The fake scheduler alone, stepped by hand; every step is checked against the rules of budgets."""

from __future__ import annotations

from typing import Literal

from tests.unit.fake_box import spec_of
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import LeaseId, Source, Start
from tinfer.worker.adapter import Report
from tinfer.worker.fake_kv import FakeKV
from tinfer.worker.fake_model import Answer, FakeModel, prompt_bytes
from tinfer.worker.fake_scheduler import FakeRequest, FakeScheduler, Scheduled
from tinfer.worker.fake_settings import FakeLimits, settings_of

BLOCK_TOKENS = 4


class Stepper:
    """A scheduler whose steps compute at once; pulls end when they are told to, and so do the waits
    of those that were preempted."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        tokens: int = 16,
        order: Literal["fcfs", "srpt"] = "fcfs",
    ) -> None:
        self.kv = FakeKV(num_blocks)
        self.limits = FakeLimits(max_num_seqs, tokens)
        self.scheduler = FakeScheduler(self.kv, BLOCK_TOKENS, self.limits, order)
        fake = {"num_blocks": num_blocks, "block_tokens": BLOCK_TOKENS}
        self._model = FakeModel(settings_of(spec_of(fake)))
        self.pulling: list[FakeRequest] = []
        self.report = Report([], [])

    def add(
        self, name: str, prompt_tokens: int, max_tokens: int, pulled: bool = False
    ) -> FakeRequest:
        sampling = SamplingSpec(max_tokens=max_tokens, ignore_eos=True)
        prompt = prompt_bytes([len(name)] * prompt_tokens)
        start = Start(name, "decode" if pulled else "whole", prompt, sampling)
        request = FakeRequest(start, Answer(self._model, prompt, sampling))
        if pulled:
            self._offer(request)
        self.scheduler.add(request)
        return request

    def resume(self, name: str, pulled: bool = False) -> None:
        """A preempted request goes on, with a pull of all its tokens or without."""
        request = self.scheduler.parked[name]
        if pulled:
            self._offer(request)
        else:
            assert not request.offer(None, BLOCK_TOKENS)
        self.scheduler.resume(request)

    def _offer(self, request: FakeRequest) -> None:
        num_blocks = -(-request.num_tokens // BLOCK_TOKENS)
        source = Source("p", 0, LeaseId(0, 1), request.num_tokens, num_blocks, b"")
        assert request.offer(source, BLOCK_TOKENS)

    def end_pull(self, request: FakeRequest, ok: bool = True) -> None:
        self.pulling.remove(request)
        self.scheduler.pull_ended(request, request.num_tokens - 1 if ok else 0)

    def step(self) -> dict[str, int]:
        """One step; the tokens that each request got in it."""
        scheduler = self.scheduler
        before = list(scheduler.running)
        owed = [r for r in [*before, *scheduler.ready] if r.needs_one_token]
        step, pulls = scheduler.schedule()
        preempted = scheduler.take_report().preempted
        self._check_budget(step)
        if not preempted and len(scheduler.running) < self.limits.max_num_seqs:
            scheduled = [request for request, _ in step]
            assert all(request in scheduled for request in owed), "who needs one token waits"
            self._check_pulls()
        self._check_victims(before, preempted)
        self.pulling += [request for request, _ in pulls]
        tokens = {request.start.request_id: num_tokens for request, num_tokens in step}
        self._compute(step, preempted)
        return tokens

    def _check_budget(self, step: Scheduled) -> None:
        """Nothing here trusts the scheduler's own sums."""
        prompt_tokens = sum(n for request, n in step if not request.needs_one_token)
        budget = self.scheduler.prefill_budget
        assert budget is None or prompt_tokens <= budget
        assert sum(n for _, n in step) <= self.limits.max_num_batched_tokens
        assert all(n > 0 for _, n in step)
        assert step.num_prompt_tokens == prompt_tokens
        assert step.num_decoding == sum(request.needs_one_token for request, _ in step)

    def _check_pulls(self) -> None:
        """With seats left, a pull still waits only for blocks: its own, or, since blocks go by
        order of arrival, those of the first that the budget does let in."""
        waiting = list(self.scheduler.waiting)
        if self.scheduler.prefill_budget == 0:
            waiting = [request for request in waiting if request.source is not None]
        first_pull = next((request for request in waiting if request.source is not None), None)
        if first_pull is not None:
            ahead = waiting[: waiting.index(first_pull) + 1]
            lacking = [-(-self._wanted(r) // BLOCK_TOKENS) - len(r.blocks) for r in ahead]
            free = self.kv.num_blocks - self.kv.num_used
            assert max(lacking) > free, "a pull waits for the budget"

    def _wanted(self, request: FakeRequest) -> int:
        """Tokens that need blocks before the request gets in."""
        if request.source is not None:
            return request.num_pulled
        budget = self.scheduler.prefill_budget
        tokens = self.limits.max_num_batched_tokens if budget is None else budget
        return request.num_computed + min(request.num_left, tokens)

    def _check_victims(self, before: list[FakeRequest], preempted: list[str]) -> None:
        """Each victim has less of its answer than all that go on, or as much and is younger."""
        victims = [r for r in before if r.start.request_id in preempted]
        assert len(victims) == len(preempted)
        for victim in victims:
            for other in self.scheduler.running:
                assert (victim.answer.num_tokens, -victim.number) < (
                    other.answer.num_tokens,
                    -other.number,
                )

    def _compute(self, step: Scheduled, preempted: list[str]) -> None:
        progress = []
        for request, num_tokens in step:
            end = request.num_computed + num_tokens
            self.scheduler.computed(request, end)
            if request.num_left:
                progress.append((request.start.request_id, min(end, request.prompt_tokens)))
                continue
            request.answer.advance()
            request.num_tokens += 1
            if request.answer.finish_reason is not None:
                self.scheduler.finish(request, keep_blocks=False)
        assert self.scheduler.take_report() == Report(progress, [])
        self.report = Report(progress, preempted)

    def drain(self) -> int:
        """Step until nothing is left, and say how many steps that took."""
        for num_steps in range(10_000):
            if not self.scheduler.has_requests():
                return num_steps
            for request in list(self.pulling):
                self.end_pull(request)
            self.step()
            for name in self.report.preempted:
                self.resume(name, pulled=num_steps % 2 == 0)
        raise AssertionError("the scheduler does not come to an end")

    def close(self) -> None:
        self.kv.close()
