"""What can happen to the scheduler, and what it can ask for: its whole interface to the world.

Events are facts, in the order in which the master learned them. Actions are requests that the
master carries out in order; none of them may fail back into the scheduler except as a later event.
"""

from __future__ import annotations

from msgspec import Struct

from tinfer.core.lengths import Lengths
from tinfer.core.types import Capacity, LeaseKey, Role, Route

# --- events ----------------------------------------------------------------------------------


class Arrived(Struct, tag=True, frozen=True):
    """A valid request. `max_output_tokens` ≥ 1 bounds the answer; `route` is the client's wish.

    `lengths` is what the predictor says of the answer, None that nothing but its bound is known.
    `block_hashes` has one hash per whole KV block of the prompt, each of the prompt up to its end:
    equal hashes are equal prefixes. Of two that wait, the one of lower `priority` starts first.
    """

    request_id: str
    prompt_tokens: int
    max_output_tokens: int
    route: Route | None = None
    lengths: Lengths | None = None
    block_hashes: tuple[int, ...] = ()
    priority: int = 0


class Cancelled(Struct, tag=True, frozen=True):
    """The client has left, or a deadline has passed; unknown or finished ids are ignored."""

    request_id: str


class WorkerExpected(Struct, tag=True, frozen=True):
    """An incarnation of this worker is to come. Said once per worker before its first `WorkerUp`;
    from then on a worker that goes down is expected back until `WorkerGone`."""

    worker_id: str
    role: Role


class WorkerUp(Struct, tag=True, frozen=True):
    """An incarnation serves from now on. A worker keeps a role that it took by `RoleChanged`,
    unless its blocks fit nobody's any more (`Role.WHOLE`)."""

    worker_id: str
    generation: int
    role: Role
    capacity: Capacity


class Remainder(Struct, frozen=True):
    """What is left of a request that has emitted tokens and would begin again: a prompt and a bound
    of the answer that may count some of those as prompt, and how many were emitted in all."""

    request_id: str
    prompt_tokens: int
    max_output_tokens: int
    num_emitted: int


class WorkerDown(Struct, tag=True, frozen=True):
    """That incarnation is seen dead: nothing of it computes, reads or holds any more.

    `remainders` are of the requests that had emitted tokens and that it computed; whatever else it
    had begins again as it was.
    """

    worker_id: str
    generation: int
    remainders: tuple[Remainder, ...] = ()


class WorkerGone(Struct, tag=True, frozen=True):
    """The supervisor has given this worker up: no further incarnation of it will come."""

    worker_id: str


class Stepped(Struct, tag=True, frozen=True):
    """What a worker has done since it last said so, which nobody else can know.

    `num_steps`, `busy_s` (spent in them) and `num_prefill_tokens` are totals of the incarnation.
    `progress` are the prompts of which a chunk was computed and that are not done, with the tokens
    computed so far; `preempted` the requests that lost their blocks: each waits there, without any,
    until `Resume` says how it goes on.
    """

    worker_id: str
    generation: int
    num_steps: int
    busy_s: float
    num_prefill_tokens: int
    num_free_blocks: int
    progress: tuple[tuple[str, int], ...] = ()
    preempted: tuple[str, ...] = ()


class FirstToken(Struct, tag=True, frozen=True):
    """The worker that prefills has sampled a token and the request goes on *on that worker*."""

    request_id: str
    worker_id: str
    generation: int


class Prefilled(Struct, tag=True, frozen=True):
    """A split request's prefill is done and its blocks are held under `lease`."""

    request_id: str
    worker_id: str
    generation: int
    lease: LeaseKey
    num_blocks: int


class Pulled(Struct, tag=True, frozen=True):
    """The decode worker has stopped reading: it has the blocks (`ok`) or recomputes the prompt."""

    request_id: str
    worker_id: str
    generation: int
    ok: bool


class WorkerFinished(Struct, tag=True, frozen=True):
    """A worker says the request is over there: answered, aborted, refused or failed.

    `answered` is false where no complete answer came (refused, aborted, engine error). `refused`
    says more: the engine never took the request, so nothing there will ever read its lease. Any
    other end leaves the lease to the reader, which marks it done once it has stopped.
    """

    request_id: str
    worker_id: str
    generation: int
    answered: bool
    refused: bool = False


class LeaseOpened(Struct, tag=True, frozen=True):
    """A worker holds blocks for a request that needs no decode (it finished with its first token,
    or was cancelled meanwhile): nobody will read them."""

    lease: LeaseKey
    num_blocks: int


class LeaseEnded(Struct, tag=True, frozen=True):
    """The owner has freed the blocks of that lease."""

    lease: LeaseKey


class LeaseOverdue(Struct, tag=True, frozen=True):
    """The lease is past its deadline and its owner asks what to do."""

    lease: LeaseKey


class RoleAsked(Struct, tag=True, frozen=True):
    """A person wants that worker in that role, whatever the flip policy; answered by `RoleRefused`
    or, once it has drained, by `RoleChanged`."""

    worker_id: str
    generation: int
    role: Role


class DrainAsked(Struct, tag=True, frozen=True):
    """From now on nothing starts on that incarnation; answered by `Drained` once it is empty, which
    may be at once. Its end follows, so there is no way back."""

    worker_id: str
    generation: int


class Tick(Struct, tag=True, frozen=True):
    """Time has passed; lets policies that wait for time act."""


Event = (
    Arrived
    | Cancelled
    | WorkerExpected
    | WorkerUp
    | WorkerDown
    | WorkerGone
    | Stepped
    | FirstToken
    | Prefilled
    | Pulled
    | WorkerFinished
    | LeaseOpened
    | LeaseEnded
    | LeaseOverdue
    | RoleAsked
    | DrainAsked
    | Tick
)

# --- actions ---------------------------------------------------------------------------------


class StartPrefill(Struct, tag=True, frozen=True):
    """Compute the prompt and the first token there, then hold the blocks. A request may be started
    more than once: again only after the worker that had it was seen dead."""

    request_id: str
    worker_id: str
    generation: int


class StartWhole(Struct, tag=True, frozen=True):
    """Compute the whole request there."""

    request_id: str
    worker_id: str
    generation: int


class StartDecode(Struct, tag=True, frozen=True):
    """Pull the blocks of `lease` there and decode from the first token on."""

    request_id: str
    worker_id: str
    generation: int
    lease: LeaseKey


class StartReprefill(Struct, tag=True, frozen=True):
    """Compute there what the worker of `request_id` has lost, its prompt and all that it has
    emitted, and hold the blocks: a prefill with an id of its own, whose one token nobody gets."""

    prefill_id: str
    request_id: str
    worker_id: str
    generation: int


class Resume(Struct, tag=True, frozen=True):
    """The preempted request goes on there: with the blocks of `lease`, which it pulls, or (None) by
    computing them again. Every preemption of a request that lives on is answered by one of these.
    """

    request_id: str
    worker_id: str
    generation: int
    lease: LeaseKey | None = None


class AbortOn(Struct, tag=True, frozen=True):
    """Stop the request there; the worker answers with an end of its own."""

    request_id: str
    worker_id: str
    generation: int


class SetBudget(Struct, tag=True, frozen=True):
    """From its next step on, compute at most so many prompt tokens per step there; None: as many
    as the engine takes. Sequences that decode and pulls are never held back by it."""

    worker_id: str
    generation: int
    prefill_tokens: int | None


class RoleChanged(Struct, tag=True, frozen=True):
    """The scheduler counts that worker as of this role from now on; nothing there has to change."""

    worker_id: str
    generation: int
    role: Role
    reason: str


class RoleRefused(Struct, tag=True, frozen=True):
    """The worker keeps its role, for this reason."""

    worker_id: str
    generation: int
    reason: str


class Drained(Struct, tag=True, frozen=True):
    """Nothing computes there any more and nobody will read from it: it can be stopped."""

    worker_id: str
    generation: int


class ReleaseLease(Struct, tag=True, frozen=True):
    """Tell the owner that no reader will come, or that it is dead."""

    lease: LeaseKey


class ExtendLease(Struct, tag=True, frozen=True):
    """Tell the owner that the reader lives."""

    lease: LeaseKey


class Fail(Struct, tag=True, frozen=True):
    """Answer the client with an error; `cause` is `worker-lost` (each of several workers died with
    it), `no-worker`, `queue-full` or `slo` (it would be answered too late). `retry_after_s` is when
    it would be taken: when the queue will be half as long, at the pace at which requests have
    lately left it, or when it would be in time; 0 where nothing is known of that. `limit` is the
    option that a full queue goes by."""

    request_id: str
    cause: str
    message: str
    retry_after_s: float = 0.0
    limit: str = ""


Action = (
    StartPrefill
    | StartWhole
    | StartDecode
    | StartReprefill
    | Resume
    | AbortOn
    | SetBudget
    | RoleChanged
    | RoleRefused
    | Drained
    | ReleaseLease
    | ExtendLease
    | Fail
)
