"""A request on its way: as its client sees it, and as one engine computes it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tinfer.core.types import LeaseKey
from tinfer.sim.spec import SimRequest

# A row of an answer's tokens: the moment of one, or the decode steps of an engine that gave one
# token each, as (place of the engine, first step, step behind the last).
Piece = float | tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request from arrival to its end, as far as its client and its trace go.

    `pieces` say when its tokens came, on the engines' clock; a message later the client has them.
    `started_s` is when it was first sent to an engine, the other times are of what came of it.
    What is computed again for another engine has a ticket of its own, over from the start.
    """

    place: int
    request: SimRequest
    pieces: list[Piece] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    route: str | None = None
    started_s: float | None = None
    prefilled_s: float | None = None
    pulled_s: float | None = None
    last_token_s: float | None = None
    error: str | None = None
    has_arrived: bool = False
    is_over: bool = False
    cached_tokens: int = 0
    num_preemptions: int = 0


def num_tokens(ticket: Ticket) -> int:
    """Tokens of its answer that an engine has told of; of one that still decodes, not the last."""
    return sum(1 if isinstance(one, float) else one[2] - one[1] for one in ticket.pieces)


class Kind(enum.Enum):
    """PREFILL: up to the first token, then the blocks are held. WHOLE: all of it. DECODE: pull the
    prompt's blocks, give the first token once more (the client has it already) and go on."""

    PREFILL = "prefill"
    WHOLE = "whole"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class Job:
    """One request on one engine; only that engine writes it once it was started.

    `id` is the request's, but for a reprefill, which has one of its own. `computed` are the tokens
    whose KV is here, `generated` the ones sampled here. While the job decodes both are kept by the
    batch. `refs` are the hashed blocks it shares; `lease` is what it is still to read. `arrival`
    counts what came; `rank` orders what waits, and later what runs; `entry` is the batch's.
    """

    ticket: Ticket
    kind: Kind
    lease: LeaseKey | None = None
    id: str = ""
    computed: int = 0
    generated: int = 0
    refs: list[int] = field(default_factory=list)
    num_registered: int = 0
    arrival: int = 0
    rank: int = 0
    entry: int = -1
    joined_step: int = 0
    reported: int = 0
    was_admitted: bool = False
    is_aborted: bool = False
    prompt_tokens: int = field(init=False)
    output_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        request = self.ticket.request
        self.prompt_tokens = request.prompt_tokens
        self.output_tokens = 1 if self.kind is Kind.PREFILL else request.output_tokens
        self.id = self.id or request.request_id

    @property
    def request_id(self) -> str:
        """Of the request whose tokens these are."""
        return self.ticket.request.request_id

    @property
    def target(self) -> int:
        """Tokens whose KV must be here before the next token can be sampled."""
        return self.prompt_tokens + self.generated

    @property
    def num_known(self) -> int:
        """How many of the tokens sampled here the client has from elsewhere."""
        return 1 if self.kind is Kind.DECODE else 0

    @property
    def num_emitted(self) -> int:
        """Tokens of its answer that the client has, while it waits after a preemption."""
        return max(self.num_known, self.generated)

    @property
    def has_begun(self) -> bool:
        """Whether its next token is one like any other: the first one is told of, and a prefill
        ends with it."""
        return self.kind is Kind.DECODE or self.generated > 0

    @property
    def most_tokens(self) -> int:
        """KV that the job can grow to: the last token's is never computed."""
        return self.prompt_tokens + self.output_tokens - 1


class What(enum.Enum):
    """What an engine says of a job or a lease.

    FIRST_TOKEN: the prompt is done and the job goes on here. PREFILLED: it is done and the blocks
    are held under `lease`. FINISHED, ABORTED, REFUSED: the job is over here. PULLED: the copy has
    stopped. LEASE_ENDED: the blocks are free.
    """

    FIRST_TOKEN = "first-token"
    PREFILLED = "prefilled"
    FINISHED = "finished"
    ABORTED = "aborted"
    REFUSED = "refused"
    PULLED = "pulled"
    LEASE_ENDED = "lease-ended"


@dataclass(slots=True, eq=False)
class Output:
    """One thing that happened on an engine at `at_s`."""

    what: What
    at_s: float
    worker_id: str
    job: Job
    lease: LeaseKey | None = None
    num_blocks: int = 0
