"""What has happened to requests and workers since the start, counted in the moment it happens.

The dispatcher calls it; one call per delivered token, all others once per request or rarer. Nothing
here is a guess: times are differences of the moments that `timeline.Timeline` notes, lengths are
those that went to the client.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Literal

from tinfer.api.service import Generation
from tinfer.api.trace import INTERVAL, Trace
from tinfer.core.lengths import Lengths
from tinfer.core.sampling import SamplingSpec
from tinfer.core.types import Role
from tinfer.master.metrics import histogram as buckets
from tinfer.master.metrics.histogram import Histogram
from tinfer.wire.messages import WorkerStats

# How a request goes on whose worker died: its blocks are still held and pulled once more; all that
# it had emitted is forced, or most of it becomes prompt; or it had emitted nothing.
ResumeForm = Literal["blocks", "replay", "prompt", "fresh"]
# Quantiles lie between tokens, answers do not: half a token is no miss.
HALF_A_TOKEN = 0.5
# What an incarnation counts for its life, summed over the lives of a worker.
TOTALS = (
    "num_steps",
    "busy_s",
    "num_computed_prompt_tokens",
    "num_recomputed_pulled_tokens",
    "num_preemptions",
    "num_pulls",
    "num_failed_pulls",
    "pulled_bytes",
    "pull_s",
)


class Tally:
    """Counts that only grow; read by the collector on the same thread."""

    def __init__(self) -> None:
        self.ttft = Histogram(buckets.TTFT_S)
        self.itl = Histogram(buckets.ITL_S)
        self.tpot = Histogram(buckets.ITL_S)
        self.e2el = Histogram(buckets.LATENCY_S)
        self.queue = Histogram(buckets.LATENCY_S)
        self.prefill = Histogram(buckets.LATENCY_S)
        self.decode = Histogram(buckets.LATENCY_S)
        self.inference = Histogram(buckets.LATENCY_S)
        self.request_prompt_tokens = Histogram(buckets.TOKENS)
        self.request_computed_tokens = Histogram(buckets.TOKENS)
        self.request_output_tokens = Histogram(buckets.TOKENS)
        self.max_tokens = Histogram(buckets.TOKENS)
        self.preemptions = Histogram(buckets.NUM_PREEMPTIONS)
        self.n = Histogram(buckets.NUM_ANSWERS)
        self.handoff = Histogram(buckets.HANDOFF_S)
        self.handoff_copy = Histogram(buckets.HANDOFF_S)
        self.length_error = Histogram(buckets.TOKENS)
        self.output_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        # Prompt tokens of requests that may be answered from a prefix cache.
        self.looked_up_tokens = 0
        self.handoff_bytes = 0
        self.predicted_tokens = 0.0
        self.num_accepted = 0
        self.refused: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.routed: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.resumed: Counter[str] = Counter()
        self.handoffs: Counter[str] = Counter()
        self.lengths: Counter[str] = Counter()
        self.role_changes: Counter[tuple[str, str]] = Counter()
        self._past: dict[str, Counter[str]] = {}

    # --- the life of a request ----------------------------------------------------------------

    def accepted(self, generation: Generation) -> None:
        """The scheduler has taken a sequence."""
        self.num_accepted += 1
        if generation.child == 0:
            self.n.observe(generation.n)

    def refuse(self, reason: str, limit: str = "") -> None:
        """A sequence is not taken; `limit` is the option that a full queue goes by."""
        self.refused[reason] += 1
        if limit:
            self.rejected[limit] += 1

    def first_token(self, ttft_s: float, sampling: SamplingSpec, prompt: int, cached: int) -> None:
        """A request has its first token; `prompt` and `cached` are tokens."""
        self.ttft.observe(ttft_s)
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        if sampling.prompt_logprobs is None:  # else all of the prompt has to be computed
            self.looked_up_tokens += prompt

    def delivered(self, num_tokens: int, gap_s: float) -> None:
        """More tokens of a request that has its first, so long after those before. The only call
        that comes with every token: what `Histogram.observe` does, without another call."""
        self.output_tokens += num_tokens
        itl = self.itl
        itl.counts[bisect_left(buckets.ITL_S, gap_s)] += 1
        itl.total += gap_s

    def handed_off(self, ok: bool, handoff_s: float | None, copy_s: float, num_bytes: int) -> None:
        """A decode worker has the blocks of a split request, or (not `ok`) computes them again."""
        self.handoffs["installed" if ok else "recomputed"] += 1
        if ok and handoff_s is not None:
            self.handoff.observe(handoff_s)
            self.handoff_copy.observe(copy_s)
            self.handoff_bytes += num_bytes

    def answered(
        self,
        finish_reason: str,
        trace: Trace,
        sampling: SamplingSpec,
        lengths: Lengths | None,
        num_preempted: int,
    ) -> None:
        """An engine has said that the answer is over."""
        self.ended[finish_reason] += 1
        if finish_reason not in ("stop", "length"):
            return
        self._took(trace)
        self.request_prompt_tokens.observe(trace.prompt_tokens)
        self.request_computed_tokens.observe(trace.prompt_tokens - trace.cached_tokens)
        self.request_output_tokens.observe(trace.output_tokens)
        self.max_tokens.observe(sampling.max_tokens)
        self.preemptions.observe(num_preempted)
        if lengths is not None and trace.output_tokens:
            self._was_predicted(lengths.up_to(sampling.max_tokens), trace.output_tokens)

    def _took(self, trace: Trace) -> None:
        self.e2el.observe(trace.e2el_s)
        if trace.queue_s is not None:
            self.queue.observe(trace.queue_s)
            self.inference.observe(trace.e2el_s - trace.queue_s)
        if trace.prefill_s is not None:
            self.prefill.observe(trace.prefill_s)
        if trace.decode_s is not None:
            self.decode.observe(trace.decode_s)
        if trace.tpot_s is not None:
            self.tpot.observe(trace.tpot_s)

    def _was_predicted(self, lengths: Lengths, tokens: int) -> None:
        low, high = lengths.interval(INTERVAL)
        if tokens < low - HALF_A_TOKEN:
            self.lengths["below"] += 1
        else:
            self.lengths["above" if tokens > high + HALF_A_TOKEN else "within"] += 1
        self.length_error.observe(abs(lengths.quantile(0.5) - tokens))
        self.predicted_tokens += lengths.mean_remaining()

    def left(self) -> None:
        """Its client is gone, or its time was up, before the answer was over."""
        self.ended["abort"] += 1

    def failed_with(self, reason: str) -> None:
        """It was accepted and ends with an error."""
        self.ended["error"] += 1
        self.failed[reason] += 1

    # --- workers ------------------------------------------------------------------------------

    def role_changed(self, worker_id: str, role: Role) -> None:
        """The scheduler counts the worker as of that role from now on."""
        self.role_changes[worker_id, role.value] += 1

    def bereaved(self, worker_id: str, stats: WorkerStats | None) -> None:
        """An incarnation is dead; `stats` is what it said last."""
        if stats is not None:
            past = self._past.setdefault(worker_id, Counter())
            for name in TOTALS:
                past[name] += getattr(stats, name)

    def worker_total(self, worker_id: str, name: str, stats: WorkerStats) -> float:
        """One of TOTALS over all lives of a worker; `stats` is of the one that serves."""
        past = self._past.get(worker_id)
        return float(getattr(stats, name) + (past[name] if past is not None else 0))
