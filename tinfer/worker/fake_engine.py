"""An engine without a model, for tests of the master's scale, speed and behaviour under chaos.

It computes nothing and is small and up in milliseconds, but what matters to a master is real: a
scheduler that batches, chunks, preempts and waits like vLLM's, leases in shared memory, blocks that
other processes map and copy, and steps that take modelled time. Its answers are seeded nonsense
that depends only on the prompt (`fake_model`), so a test can tell a wrong answer from a right one,
and a block that was wrong, stale or half written gives a wrong one.
"""

from __future__ import annotations

import logging
import os
import random
import time

import msgspec

from tinfer.wire.control import WorkerSpec
from tinfer.wire.messages import (
    MAX_TOKEN_ID,
    Aborted,
    LeaseId,
    LeasesEnded,
    LeasesOverdue,
    Output,
    PullDone,
    Ready,
    Source,
    Start,
    WorkerStats,
)
from tinfer.worker.adapter import EngineRefusal, Notice, Report
from tinfer.worker.fake_kv import FakeExport, FakeKV, Holdings
from tinfer.worker.fake_model import (
    DIGEST_BYTES,
    TOKEN_BYTES,
    Answer,
    FakeModel,
    FinishReason,
    token_ids_of,
)
from tinfer.worker.fake_pull import PullResult, Pulls
from tinfer.worker.fake_scheduler import FakeRequest, FakeScheduler, Scheduled
from tinfer.worker.fake_settings import limits_of, settings_of
from tinfer.worker.fake_timer import AlarmFd, Pace, sleep_until

log = logging.getLogger(__name__)

EXIT_CHAOS = 86


class FakeEngine:
    """Implements `adapter.Engine`. Raises `ValueError` for settings that make no sense."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._settings = settings = settings_of(spec)
        self._limits = limits_of(spec)
        sleep_until(time.monotonic() + settings.start_s)
        # Separate generators: how often one is asked must not change what another says.
        name = f"{settings.seed}/{spec.worker_id}/{spec.generation}"
        self._pace = Pace(settings, random.Random(f"pace/{name}"))
        self._model = FakeModel(settings)
        self._kv = FakeKV(settings.num_blocks)
        self._holdings = Holdings(self._kv, spec.worker_id, spec.generation, spec.lease_ttl_s)
        self._alarm = AlarmFd()
        self._pulls: Pulls[FakeRequest] = Pulls(
            self._kv, settings, self._pace, random.Random(f"pulls/{name}"), self._alarm
        )
        self._scheduler = FakeScheduler(
            self._kv, settings.block_tokens, self._limits, spec.prefill_order
        )
        self._requests: dict[str, FakeRequest] = {}
        self._notices: list[Notice] = []
        self._ended: list[LeaseId] = []
        self._aborted: list[str] = []
        self._was_idle = True
        self._num_steps = self._num_prompt_tokens = self._num_recomputed = 0
        self._busy_s = 0.0
        self._num_pulls = self._num_failed_pulls = self._pulled_bytes = 0
        self._pull_s = 0.0

    # --- what it is ---------------------------------------------------------------------------

    def ready(self) -> Ready:
        settings = self._settings
        export = FakeExport(
            self._kv.descriptor(), self._holdings.descriptor(), settings.block_tokens
        )
        return Ready(
            pid=os.getpid(),
            max_model_len=settings.longest,
            block_tokens=settings.block_tokens,
            num_blocks=settings.num_blocks,
            kv_bytes=settings.num_blocks * DIGEST_BYTES,
            max_num_seqs=self._limits.max_num_seqs,
            chunk_tokens=self._limits.max_num_batched_tokens,
            vocab_size=settings.vocab_size,
            transport="shm",
            device="cpu",
            dtype="digest",
            engine="fake",
            export=msgspec.msgpack.encode(export),
            kv_format={"dtype": "digest", "block_tokens": str(settings.block_tokens)},
        )

    def wake_fd(self) -> int:
        return self._alarm.fd

    def clear_wake(self) -> None:
        self._alarm.clear()

    def stats(self) -> WorkerStats:
        scheduler, pulls = self._scheduler, self._pulls
        return WorkerStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_used_blocks=self._kv.num_used,
            num_free_blocks=self._kv.num_blocks - self._kv.num_used,
            num_open_leases=len(self._holdings),
            num_mapped_peers=pulls.num_mapped,
            num_stale_mappings=pulls.num_stale,
            num_steps=self._num_steps,
            busy_s=self._busy_s,
            num_computed_prompt_tokens=self._num_prompt_tokens,
            num_recomputed_pulled_tokens=self._num_recomputed,
            num_preemptions=scheduler.num_preemptions,
            num_pulls=self._num_pulls,
            num_failed_pulls=self._num_failed_pulls,
            pulled_bytes=self._pulled_bytes,
            pull_s=self._pull_s,
        )

    # --- requests -----------------------------------------------------------------------------

    def start(self, start: Start) -> None:
        try:
            self._check(start)
        except EngineRefusal:
            if start.source is not None:
                self._pulls.mark_unused(start.source)
            raise
        forced = token_ids_of(start.forced_tokens)
        answer = Answer(self._model, start.prompt, start.sampling, forced, start.kind == "prefill")
        request = FakeRequest(start, answer)
        self._offer(request, start.source)
        self._requests[start.request_id] = request
        self._scheduler.add(request)

    def resume(self, request_id: str, source: Source | None) -> None:
        request = self._scheduler.parked.get(request_id)
        if request is not None:
            self._offer(request, source)
            self._scheduler.resume(request)
        elif source is not None:
            self._pulls.mark_unused(source)

    def _offer(self, request: FakeRequest, source: Source | None) -> None:
        """Have the request pull from a source; one with nothing for it is over and failed."""
        if request.offer(source, self._settings.block_tokens) or source is None:
            return
        self._pulls.mark_unused(source)
        self._num_pulls += 1
        self._num_failed_pulls += 1
        reason = "the source has no whole block of the request"
        self._notices.append(PullDone(request.start.request_id, False, reason, 0, 0.0, 0.0))

    def _check(self, start: Start) -> None:
        if start.request_id in self._requests:
            raise EngineRefusal(f"request {start.request_id} runs already", client_fault=False)
        prompt_tokens, rest = divmod(len(start.prompt), TOKEN_BYTES)
        longest = self._settings.longest
        limit = self._settings.refuse_prompt_tokens
        if rest or not prompt_tokens:
            raise EngineRefusal(f"a prompt of {len(start.prompt)} bytes", client_fault=True)
        if prompt_tokens >= longest:
            raise EngineRefusal(
                f"{prompt_tokens} prompt tokens leave no room for an answer within the model's "
                f"{longest} tokens",
                client_fault=True,
            )
        if limit is not None and prompt_tokens > limit:
            raise EngineRefusal(
                f"{prompt_tokens} prompt tokens are more than refuse_prompt_tokens {limit}",
                client_fault=True,
            )
        if len(start.forced_tokens) % TOKEN_BYTES:
            message = f"forced tokens of {len(start.forced_tokens)} bytes"
            raise EngineRefusal(message, client_fault=False)
        if any(token > MAX_TOKEN_ID for token in token_ids_of(start.forced_tokens)):
            raise EngineRefusal("negative forced tokens", client_fault=False)
        if start.sampling.max_tokens < 1:
            raise EngineRefusal("max_tokens must be at least 1", client_fault=True)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            if request.source is not None:
                self._pulls.mark_unused(request.source)
            self._scheduler.remove(request)
            if request.is_pulling:
                self._pulls.cancel(request)
            self._aborted.append(request_id)

    # --- peers and leases ---------------------------------------------------------------------

    def add_peer(self, worker_id: str, generation: int, export: bytes) -> None:
        self._pulls.add_peer(worker_id, generation, export)

    def drop_peer(self, worker_id: str, generation: int) -> None:
        self._pulls.drop_peer(worker_id, generation)

    def release_lease(self, lease: LeaseId) -> None:
        self._holdings.release(lease)

    def extend_lease(self, lease: LeaseId, extra_s: float) -> None:
        self._holdings.extend(lease, extra_s)

    # --- steps --------------------------------------------------------------------------------

    def has_requests(self) -> bool:
        return bool(self._scheduler.has_requests() or self._holdings or self._pulls)

    def was_idle_step(self) -> bool:
        return self._was_idle

    def set_prefill_budget(self, tokens: int | None) -> None:
        assert tokens is None or tokens >= 0, f"a prefill budget of {tokens} tokens"
        self._scheduler.prefill_budget = tokens

    def take_report(self) -> Report:
        return self._scheduler.take_report()

    def step(self) -> list[Output]:
        started_s = time.monotonic()
        self._poll_leases()
        scheduled, pulls = self._scheduler.schedule()
        for request, source in pulls:
            digests = request.answer.digests[: len(request.blocks)]
            self._pulls.submit(request, source, request.blocks, digests)
        outputs: list[Output] = []
        if scheduled:
            self._compute(scheduled)
            outputs = [
                output
                for request, num_tokens in scheduled
                if (output := self._computed(request, num_tokens)) is not None
            ]
        self._pulls.advance()
        # Last, so that a pulled request is first scheduled after its `PullDone` is out.
        for result in self._pulls.take_results():
            self._pull_ended(result)
        self._was_idle = not (scheduled or self._notices or self._ended)
        if scheduled:
            self._busy_s += time.monotonic() - started_s
        return outputs

    def take_notices(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        if self._ended:
            notices.append(LeasesEnded(self._ended, self.stats()))
            self._ended = []
        if self._aborted:
            notices.append(Aborted(self._aborted))
            self._aborted = []
        return notices

    def close(self) -> None:
        self._pulls.close()
        self._holdings.close()
        self._kv.close()
        self._alarm.close()

    # --- inside a step ------------------------------------------------------------------------

    def _poll_leases(self) -> None:
        ended, overdue = self._holdings.poll()
        self._ended += ended
        if overdue:
            self._notices.append(LeasesOverdue(overdue))

    def _compute(self, scheduled: Scheduled) -> None:
        """Take the time that the step would take; pulls go on meanwhile."""
        self._num_steps += 1
        if self._num_steps == self._settings.die_after_steps:
            log.warning("die_after_steps: ends in step %d", self._num_steps)
            os._exit(EXIT_CHAOS)
        poison = self._settings.poison_prompt_tokens
        if poison is not None and any(one.prompt_tokens == poison for one, _ in scheduled):
            log.warning("poison_prompt_tokens: ends in step %d", self._num_steps)
            os._exit(EXIT_CHAOS)
        cost_s = self._pace.step_s(scheduled.num_prompt_tokens, scheduled.num_decoding)
        if not cost_s:
            return
        ends_s = self._pace.end_s(cost_s, is_first=self._was_idle)
        while True:
            self._pulls.advance()
            pull_ends_s = self._pulls.next_end_s
            if pull_ends_s is None or pull_ends_s >= ends_s:
                break
            sleep_until(pull_ends_s)
        sleep_until(ends_s)

    def _computed(self, request: FakeRequest, num_tokens: int) -> Output | None:
        """Account for a request's tokens of this step; sample if these were all it had."""
        end = request.num_computed + num_tokens
        if request.num_computed < request.prompt_tokens:
            self._scheduler.write_prompt(request, end, request.answer.digests)
        self._count_prompt(request, end)
        self._scheduler.computed(request, end)
        if request.num_left:
            return None
        answer = request.answer
        token = answer.advance()
        request.num_tokens += 1
        request.text_len += len(answer.text)
        finish = answer.finish_reason
        if finish is None and answer.num_tokens > 1 and answer.logprobs is None:
            return Output(
                request.start.request_id, [token], answer.num_tokens, answer.text, request.text_len
            )
        source = None
        if finish is not None:
            finish, source = self._finish(request, finish)
        return _rare_output(self._model, request, token, finish, source)

    def _finish(
        self, request: FakeRequest, finish: FinishReason
    ) -> tuple[FinishReason | None, Source | None]:
        """Let go of a request; a prefill whose answer goes on is held for its reader.

        As with vLLM, only the end by a token shows before the blocks are held: a stop string
        within the first token is found afterwards, and the master releases the lease.
        """
        del self._requests[request.start.request_id]
        answer = request.answer
        by_token = finish == "stop" and not isinstance(answer.stop_reason, str)
        source: Source | None = None
        if answer.continues and not by_token:
            source = self._holdings.hold(request.blocks, request.prompt_tokens)
        self._scheduler.finish(request, keep_blocks=source is not None)
        if answer.continues and finish == "length":
            # Where no lease is left the blocks are not held, and nothing can go on from them.
            return (None if source is not None else "error"), source
        return finish, source

    def _count_prompt(self, request: FakeRequest, end: int) -> None:
        """Count what is computed of a prompt or after a preemption, and of this what a pull should
        have spared: all that was pulled, but for the last token, to be sampled from."""
        start = request.num_computed
        if not (request.answer.num_tokens and request.needs_one_token):
            self._num_prompt_tokens += end - start
        spared = min(request.num_pulled, request.num_tokens - 1)
        self._num_recomputed += max(0, min(end, spared) - start)

    def _pull_ended(self, result: PullResult[FakeRequest]) -> None:
        request, failure = result.owner, result.failure
        self._num_pulls += 1
        self._num_failed_pulls += bool(failure)
        self._pulled_bytes += result.num_bytes
        self._pull_s += result.copy_s
        if failure:
            log.warning("pull of %s failed: %s", request.start.request_id, failure)
        if result.is_wrong:
            # A real engine would go on with these bytes, so this one does, and it shows.
            request.answer.spoil()
        is_loaded = not failure or result.is_wrong
        num_computed = min(request.num_pulled, request.num_tokens - 1) if is_loaded else 0
        self._scheduler.pull_ended(request, num_computed)
        self._notices.append(
            PullDone(
                request.start.request_id,
                not failure,
                failure,
                result.num_bytes,
                result.copy_s,
                result.handoff_s,
            )
        )


def _rare_output(
    model: FakeModel,
    request: FakeRequest,
    token: int,
    finish: FinishReason | None,
    source: Source | None,
) -> Output:
    """An output that says more than a token and its text: the first, the last, or with logprobs."""
    start, answer = request.start, request.answer
    is_first = answer.num_tokens == 1
    prompt_logprobs = None
    if is_first and start.kind != "decode" and start.sampling.prompt_logprobs is not None:
        prompt_logprobs = model.prompt_logprobs(start.prompt, start.sampling.prompt_logprobs)
    return Output(
        request_id=start.request_id,
        token_ids=[token],
        num_output_tokens=answer.num_tokens,
        text=answer.text,
        text_len=request.text_len,
        finish_reason=finish,
        stop_reason=answer.stop_reason if finish is not None else None,
        logprobs=None if answer.logprobs is None else [answer.logprobs],
        prompt_logprobs=prompt_logprobs,
        cached_tokens=start.cached_tokens if is_first else None,
        source=source,
    )
