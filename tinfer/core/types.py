"""The nouns of scheduling: phases, routes, roles, leases, and what the core knows of a worker."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct

from tinfer.core.costs import CostModel


class Phase(enum.Enum):
    """Where a request is; the legal moves are `lifecycle.LEGAL`."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDOFF = "handoff"
    DECODING = "decoding"
    FINISHED = "finished"


class Route(enum.Enum):
    """SPLIT: prefill and decode on two workers. WHOLE: one worker does both."""

    SPLIT = "split"
    WHOLE = "whole"


class Role(enum.Enum):
    """A label that only the scheduler keeps; every engine can do both phases.

    WHOLE is a worker whose KV blocks fit no other's: it neither hands off nor takes over.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    WHOLE = "whole"

    @property
    def prefills(self) -> bool:
        return self in (Role.PREFILL, Role.BOTH)

    @property
    def decodes(self) -> bool:
        return self in (Role.DECODE, Role.BOTH)


class LeaseKey(Struct, frozen=True):
    """A lease, unique over workers and their incarnations."""

    worker_id: str
    worker_generation: int
    slot: int
    lease_generation: int


class Capacity(Struct, frozen=True):
    """What one worker can hold: KV blocks of `block_tokens` tokens, sequences, tokens per step."""

    num_blocks: int
    block_tokens: int
    max_num_seqs: int
    chunk_tokens: int


class SchedulerConfig(Struct, frozen=True, kw_only=True):
    """Which policy of each kind decides, by its registered name, and what they go by.

    `route` "auto" decides per request. `prefill_sched_batch` is for the paper's orders; `ageing`
    and `ttft_deadline_s` for `srpt`. `dispatch` says when a split request's decode worker is
    settled: with its first chunk (the paper) or when its prefill is done. `preemption` says where a
    request that lost its blocks has them computed again. A step in which something decodes may take
    `itl_slack` times longer for prompts, and as much again for every one that waits
    (`prefill_budget` "slack"). `overflow_z` is the standard deviations that `peak` leaves room for.
    `max_request_restarts` bounds how often in a row a request is begun again without a token more
    than before. Requests whose predicted times miss `slo_ttft_s` or `slo_tpot_s` are refused.
    `seed` is of whatever draws at random.
    """

    route: str = "auto"
    prefill_order: str = "srpt"
    prefill_sched_batch: Annotated[int, Meta(ge=1)] = 16
    ageing: Annotated[float, Meta(gt=0)] = 0.002
    ttft_deadline_s: Annotated[float, Meta(gt=0)] | None = None
    prefill_choice: str = "earliest-finish"
    whole_choice: str = "earliest-finish"
    decode_choice: str = "projected"
    decode_admission: str = "peak"
    dispatch: str = "first-token"
    preemption: str = "auto"
    prefill_budget: str = "slack"
    itl_slack: Annotated[float, Meta(gt=0)] = 4.0
    flip: str = "off"
    overflow_z: Annotated[float, Meta(ge=0)] = 0.52
    max_num_queued_reqs: Annotated[int, Meta(ge=1)] = 1024
    max_num_queued_tokens: Annotated[int, Meta(ge=1)] | None = None
    slo_ttft_s: Annotated[float, Meta(gt=0)] | None = None
    slo_tpot_s: Annotated[float, Meta(gt=0)] | None = None
    max_request_restarts: Annotated[int, Meta(ge=0)] = 3
    costs: CostModel = CostModel()
    seed: int = 0


class WorkerSnapshot(Struct, frozen=True, kw_only=True):
    """What the scheduler believes of one live incarnation.

    `num_preempted` requests lost their blocks here, for `num_reprefilled` of which another worker
    computed them again. `peak_kv_share` is the expected highest use of its KV from now on;
    `slowness` how long its steps take, as a multiple of what the cost model says; `prefill_share`
    of its time lately.
    """

    worker_id: str
    generation: int
    role: Role
    flips_to: Role | None
    is_draining: bool
    budget_tokens: int | None
    outstanding_prefill_tokens: int
    num_seqs: int
    num_decoding: int
    num_projected_blocks: int
    num_held_blocks: int
    num_used_blocks: int
    peak_kv_share: float
    num_steps: int
    num_preempted: int
    num_reprefilled: int
    slowness: float
    prefill_share: float


class WaitingSnapshot(Struct, frozen=True, kw_only=True):
    """A request that waits, and why."""

    request_id: str
    phase: str
    waited_s: float
    prompt_tokens: int
    expected_output_tokens: float
    reason: str


class LedgerSnapshot(Struct, frozen=True):
    """The open accounts, as counts. `held_blocks` is by live worker; `zombies` are requests that
    are over for the client while a worker has not yet said that it stopped."""

    open_requests: int
    requests_by_phase: dict[str, int]
    leases: int
    held_blocks: dict[str, int]
    pulls: int
    zombies: int

    @property
    def is_zero(self) -> bool:
        """Whether every account is closed, as it must be when the server is idle."""
        counts = (self.open_requests, self.leases, self.pulls, self.zombies)
        by_key = (*self.requests_by_phase.values(), *self.held_blocks.values())
        return not any(counts) and not any(by_key)
