"""One live incarnation of a worker, as the scheduler knows it: what is on it, what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tinfer.core.costs import CostModel
from tinfer.core.events import Stepped
from tinfer.core.outlook import KvOutlook, Peak
from tinfer.core.prefixes import PrefixIndex
from tinfer.core.requests import Request
from tinfer.core.types import Capacity, Role, Route, WorkerSnapshot

# One chunk computes while the next stands ready: the engine never starves, and all else stays in
# the master's queue, where order and cancel are exact.
NUM_OUTSTANDING_CHUNKS = 2
# For how long what a worker reports counts in what is believed of its speed and its work.
MEMORY_S = 5.0
PACE_STEP = 1.25


@dataclass(slots=True, eq=False)
class Worker:
    """One live incarnation. Only the scheduler writes it; policies read it.

    `requests` are those that compute here, zombies included: each takes a seat.
    `outstanding_prefill_tokens` are prompt tokens sent and not yet known to be computed, those of
    `prefilling`; `num_decoding` have their first token. `num_placed_blocks` is what
    the prompts of `requests` need, with one token more each, and `num_held_blocks` what open leases
    keep. `num_steps` and `busy_s` are what it said last, `slowness` is how long its steps take, a
    multiple of what `costs` make of them.
    """

    id: str
    generation: int
    role: Role
    capacity: Capacity
    costs: CostModel = field(default_factory=CostModel)
    # Standard deviations that `Peak.rare` lies above what is expected.
    overflow_z: float = 0.0
    # Prompt tokens less that a second of waiting counts as.
    ageing_tokens_per_s: float = 0.0
    requests: dict[str, Request] = field(default_factory=dict)
    outstanding_prefill_tokens: int = 0
    prefilling: dict[str, Request] = field(default_factory=dict)
    num_placed_blocks: int = 0
    num_held_blocks: int = 0
    num_decoding: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    num_prefill_tokens: int = 0
    num_preempted: int = 0
    num_reprefilled: int = 0
    # A step of all that decodes here, by the model, at speed 1; and with what is to decode here.
    step_s: float = field(init=False)
    coming_step_s: float = field(init=False)
    _num_coming: int = 0
    _coming_tokens: int = 0
    slowness: float = 1.0
    pace: float = 1.0
    # The role it takes once it has drained.
    flips_to: Role | None = None
    # Nothing starts here any more: it is to be stopped once it is idle.
    is_draining: bool = False
    # What `SetBudget` said last.
    budget_tokens: int | None = None
    prefixes: PrefixIndex = field(init=False)
    # Over what decodes: 1 / expected length of the answer.
    sum_inverse_lengths: float = 0.0
    # Of the time until `reported_s`, what went to prompts lately.
    recent_prefill_share: float = 0.0
    reported_s: float = 0.0
    # KV tokens of what decodes, at step 0: each grows by one with every step.
    _kv_at_step_0: int = 0
    # What all residents would hold if each answer were as long as it can be.
    most_kv_tokens: int = 0
    outlook: KvOutlook = field(default_factory=KvOutlook)
    _last_asked: tuple[str, int] = ("", -1)
    _last_peak: Peak = Peak(0.0, 0.0)

    def __post_init__(self) -> None:
        self.prefixes = PrefixIndex(self.capacity.num_blocks)
        self._time_step()

    @property
    def num_seqs(self) -> int:
        return len(self.requests)

    @property
    def num_projected_blocks(self) -> int:
        return self.num_placed_blocks + self.num_held_blocks

    @property
    def is_idle(self) -> bool:
        """Nothing computes here, and nobody waits for its blocks."""
        return not self.requests and not self.num_held_blocks

    @property
    def is_handing_off(self) -> bool:
        """Whether a prefill here is still to be handed over, or its blocks are still held."""
        split = any(one.route is Route.SPLIT for one in self.prefilling.values())
        return split or self.num_held_blocks > 0

    @property
    def has_seat(self) -> bool:
        return self.num_seqs < self.capacity.max_num_seqs and not self.is_draining

    def is_open_to(self, request: Request) -> bool:
        """False for a second prompt whose last worker died of it or of one beside it: they run one
        at a time, so that the one that kills is found out and takes none of the others with it."""
        if not request.num_fruitless:
            return True
        return not any(one.num_fruitless for one in self.prefilling.values())

    @property
    def takes_prefill(self) -> bool:
        """Whether a prefill sent now starts soon, rather than wait out of the master's sight."""
        limit_tokens = NUM_OUTSTANDING_CHUNKS * self.step_prefill_tokens
        return self.has_seat and self.outstanding_prefill_tokens < limit_tokens

    def takes(self, request: Request) -> bool:
        """The same for that request, which shorter ones and those that waited longer go before.

        The engine goes by tokens alone, so what bounds a long prompt's wait there is that no
        shorter one is sent any more once it has aged, by as much as it would in the queue.
        """
        if not self.has_seat or not self.is_open_to(request):
            return False
        tokens, arrived_s = self.uncached_tokens(request), request.arrived_s
        ahead_tokens = 0
        for one in self.prefilling.values():
            aged_tokens = self.ageing_tokens_per_s * (arrived_s - one.arrived_s)
            if one.prefill_tokens <= tokens + aged_tokens:
                ahead_tokens += one.prefill_tokens
        return ahead_tokens < NUM_OUTSTANDING_CHUNKS * self.step_prefill_tokens

    def around(self, tokens: int) -> tuple[int, int]:
        """Of the prompts here: outstanding tokens of those with no more left than that, and how
        many have more."""
        ahead_tokens = num_longer = 0
        for one in self.prefilling.values():
            if one.prefill_tokens <= tokens:
                ahead_tokens += one.prefill_tokens
            else:
                num_longer += 1
        return ahead_tokens, num_longer

    def blocks_for(self, request: Request) -> int:
        """KV blocks for the prompt and one more token."""
        return -(-(request.prompt_tokens + 1) // self.capacity.block_tokens)

    def place(self, request: Request, prefill_tokens: int) -> None:
        """Count a request here, with the prompt tokens that it has to compute here."""
        request.at = self
        request.prefill_tokens = prefill_tokens
        request.first_step = None
        request.num_blocks = self.blocks_for(request)
        self.requests[request.id] = request
        self.outstanding_prefill_tokens += prefill_tokens
        if prefill_tokens:
            self.prefilling[request.id] = request
        self.num_placed_blocks += request.num_blocks
        self.most_kv_tokens += self._most_kv_of(request)
        request.stays = request.route is not Route.SPLIT or not prefill_tokens
        if request.stays:
            self.outlook.add(request.id, *self.newcomer(request))
            self._comes(request, 1)

    def prefill_progress(self, request: Request, computed_tokens: int) -> None:
        """So much of the prompt is computed, and not all of it."""
        left_tokens = max(1, request.prompt_tokens - computed_tokens)
        if 0 < left_tokens < request.prefill_tokens:
            self.outstanding_prefill_tokens -= request.prefill_tokens - left_tokens
            request.prefill_tokens = left_tokens

    def prefill_done(self, request: Request) -> None:
        """The prompt is computed, the request stays."""
        self.outstanding_prefill_tokens -= request.prefill_tokens
        self.prefilling.pop(request.id, None)
        request.prefill_tokens = 0

    def decodes(self, request: Request) -> None:
        """It has its first token, and one more with every step from now on."""
        if request.first_step is None:
            self.outlook.remove(request.id)
            self._counts_as_decoding(request, self.num_steps)
            self._comes(request, -1)

    def _counts_as_decoding(self, request: Request, first_step: int) -> None:
        request.first_step = first_step
        self.num_decoding += 1
        self._kv_at_step_0 += request.prompt_tokens + 1 - first_step
        self.sum_inverse_lengths += 1.0 / request.expected_tokens
        self._time_step()
        self.outlook.add(request.id, *self._resident(request))

    def remove(self, request: Request) -> None:
        """The request no longer computes here."""
        if request.parked_tokens is None:
            self._uncount(request)
        request.parked_tokens = None
        del self.requests[request.id]
        request.at = None

    def park(self, request: Request) -> None:
        """It has lost its blocks and waits here for others: it takes a seat and no memory. Counted
        on, it could keep out those whose blocks stand in the way of the ones that it waits for."""
        request.parked_tokens = self.generated_tokens(request)
        self._uncount(request)

    def unpark(self, request: Request) -> None:
        """It goes on with the tokens that it had."""
        tokens, request.parked_tokens = request.parked_tokens, None
        assert tokens is not None, f"{request.id} is not parked"
        request.num_blocks = self.blocks_for(request)
        self.num_placed_blocks += request.num_blocks
        self.most_kv_tokens += self._most_kv_of(request)
        request.stays = True
        self._counts_as_decoding(request, self.num_steps - (tokens - 1))

    def _uncount(self, request: Request) -> None:
        if request.first_step is None and request.stays:
            self._comes(request, -1)
        self.prefill_done(request)
        self.most_kv_tokens -= self._most_kv_of(request)
        self.outlook.remove(request.id)
        if request.first_step is not None:
            self.num_decoding -= 1
            self._kv_at_step_0 -= request.prompt_tokens + 1 - request.first_step
            self.sum_inverse_lengths -= 1.0 / request.expected_tokens
            request.first_step = None
            self._time_step()
        if not self.num_decoding:  # what rounding left
            self.sum_inverse_lengths = 0.0
        self.num_placed_blocks -= request.num_blocks
        request.num_blocks = 0

    def stepped(self, event: Stepped, now_s: float) -> None:
        """Take in what it reports, and what that says of its speed and its work."""
        num_steps = event.num_steps - self.num_steps
        taken_s = event.busy_s - self.busy_s
        if num_steps > 0 and taken_s > 0:
            num_new = event.num_prefill_tokens - self.num_prefill_tokens
            prefill_s = self.costs.prefill_token_s * num_new
            expected_s = num_steps * self.step_s + prefill_s
            ratio = taken_s / max(expected_s, 1e-9)
            self.learn_slowness(
                self.slowness + min(1.0, taken_s / MEMORY_S) * (ratio - self.slowness)
            )
            # Spread over the time since the last report, of which an idle worker makes none.
            passed_s = max(now_s - self.reported_s, taken_s)
            share = prefill_s * ratio / passed_s
            weight = 1.0 - math.exp(-passed_s / MEMORY_S)
            self.recent_prefill_share += weight * (share - self.recent_prefill_share)
            self.reported_s = now_s
        self.num_preempted += len(event.preempted)
        self.num_steps, self.busy_s = event.num_steps, event.busy_s
        self.num_prefill_tokens = event.num_prefill_tokens
        self.outlook.advance(event.num_steps)
        self._time_step()

    def learn_slowness(self, slowness: float) -> None:
        """Believe that; decisions go by it in steps of a quarter, so that of two workers that are
        alike neither is shunned for what noise makes of them."""
        self.slowness = slowness
        self.pace = PACE_STEP ** round(math.log(max(slowness, 1e-6)) / math.log(PACE_STEP))

    def generated_tokens(self, request: Request) -> int:
        """Output tokens of a request here, as its worker's steps tell."""
        if request.first_step is None:
            return 0
        tokens = 1 + self.num_steps - request.first_step
        return tokens if tokens < request.max_output_tokens else request.max_output_tokens

    @property
    def mean_inverse_length(self) -> float:
        """Of what decodes here; 0 where nothing does."""
        return self.sum_inverse_lengths / self.num_decoding if self.num_decoding else 0.0

    @property
    def kv_tokens(self) -> int:
        """KV of all that decodes here."""
        return max(0, self._kv_at_step_0 + self.num_decoding * self.num_steps)

    def uncached_tokens(self, request: Request) -> int:
        """Prompt tokens that would have to be computed here; at least one always is."""
        num_hits = self.prefixes.num_hits(request.block_hashes)
        return max(1, request.prompt_tokens - num_hits * self.capacity.block_tokens)

    def prefill_s(self, tokens: int) -> float:
        """Seconds that so many prompt tokens take here, in steps with all that decodes here."""
        return self._steps_s(tokens) + self.taken_s(tokens)

    def queued_s(self, tokens: int) -> float:
        """The same of several prompts, none of which looks back far."""
        return self._steps_s(tokens) + self.costs.prefill_token_s * tokens * self.pace

    def _steps_s(self, tokens: int) -> float:
        """The steps that so many prompt tokens need, without them."""
        return -(-tokens // self.step_prefill_tokens) * self.step_s * self.pace

    def taken_s(self, tokens: int) -> float:
        """What a prompt of so many tokens takes from each that decodes here."""
        costs = self.costs
        computing_s = costs.prefill_token_s * tokens + costs.prefill_context_s * tokens**2 / 2.0
        return computing_s * self.pace

    @property
    def step_prefill_tokens(self) -> int:
        """Prompt tokens that a step here computes at most."""
        chunk_tokens = self.capacity.chunk_tokens
        return chunk_tokens if self.budget_tokens is None else min(chunk_tokens, self.budget_tokens)

    def _comes(self, request: Request, sign: int) -> None:
        self._num_coming += sign
        self._coming_tokens += sign * (request.prompt_tokens + 1)
        self._time_step()

    def _time_step(self) -> None:
        costs = self.costs
        self.step_s = costs.decode_step_s(self.num_decoding, self.kv_tokens)
        self.coming_step_s = (
            self.step_s
            + costs.decode_seq_s * self._num_coming
            + costs.kv_token_s * self._coming_tokens
        )

    @property
    def capacity_tokens(self) -> int:
        """KV that residents may have: what no lease keeps."""
        return (self.capacity.num_blocks - self.num_held_blocks) * self.capacity.block_tokens

    @property
    def num_used_blocks(self) -> int:
        """Blocks of all residents as they are now, each with its next token."""
        block_tokens = self.capacity.block_tokens
        generated = self.generated_tokens
        num_blocks = 0
        for one in self.requests.values():
            if one.parked_tokens is None:
                num_blocks += (one.prompt_tokens + generated(one)) // block_tokens + 1
        return num_blocks

    @property
    def free_tokens(self) -> int:
        """KV tokens for which there is room now, in whole blocks."""
        num_free = self.capacity.num_blocks - self.num_held_blocks - self.num_used_blocks
        return max(0, num_free) * self.capacity.block_tokens

    def _most_kv_of(self, request: Request) -> int:
        return request.prompt_tokens + request.lengths.points[-1] + self.capacity.block_tokens

    def newcomer(self, request: Request) -> tuple[int, Sequence[float]]:
        """KV tokens that the request would begin with here, half a block of it waste, and the
        equally likely numbers of steps that it would stay."""
        tokens = request.prompt_tokens + 1 + self.capacity.block_tokens // 2
        return tokens, request.likely_tokens

    def _resident(self, request: Request) -> tuple[int, Sequence[float]]:
        """The same of one that decodes here."""
        generated = self.generated_tokens(request)
        tokens, likely = self.newcomer(request)
        if generated <= 1:
            return tokens, likely
        return tokens + generated - 1, request.lengths.remaining(generated)

    def peak_with(self, request: Request) -> Peak:
        """The highest KV use to come here with that request.

        Asked for again, it is as old as the last change here, at most `outlook.BIN_STEPS` steps.
        """
        asked = (request.id, self.outlook.version)
        if asked != self._last_asked:
            self._last_asked = asked
            self._last_peak = self.fresh_peak_with(request)
        return self._last_peak

    def fresh_peak_with(self, request: Request) -> Peak:
        """The same as of now, kept nowhere: for people, who must not change what is decided."""
        return self.outlook.peak_with(*self.newcomer(request), self.overflow_z)

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=self.id,
            generation=self.generation,
            role=self.role,
            flips_to=self.flips_to,
            is_draining=self.is_draining,
            budget_tokens=self.budget_tokens,
            outstanding_prefill_tokens=self.outstanding_prefill_tokens,
            num_seqs=self.num_seqs,
            num_decoding=self.num_decoding,
            num_projected_blocks=self.num_projected_blocks,
            num_held_blocks=self.num_held_blocks,
            num_used_blocks=self.num_used_blocks,
            peak_kv_share=self.outlook.peak(0.0).expected / max(1, self.capacity_tokens),
            num_steps=self.num_steps,
            num_preempted=self.num_preempted,
            num_reprefilled=self.num_reprefilled,
            slowness=self.slowness,
            prefill_share=self.recent_prefill_share,
        )
