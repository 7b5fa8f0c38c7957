"""Requests as the scheduler knows them, from arrival until no worker computes them any more.

A request is *open* until its client is answered. One that was cancelled while a worker computes it
becomes a *zombie*: over for the client, still counted on that worker until the worker says that it
stopped, so that no seat or token budget is given away twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinfer.core.events import Remainder
from tinfer.core.lengths import Lengths
from tinfer.core.lifecycle import LifecycleError, move
from tinfer.core.outlook import few
from tinfer.core.types import LeaseKey, Phase, Route

if TYPE_CHECKING:
    from tinfer.core.worker import Worker


@dataclass(slots=True, eq=False)
class Request:
    """One request. Only the scheduler writes it; policies read it.

    Of those that wait for a first worker, the lower `priority` goes first. `wish` is the route
    asked for, None where the policy decides when it starts; `route` the one really taken. `at` is
    the incarnation that computes it: `num_blocks` are counted there for its prompt, of which
    `prefill_tokens` are still to be computed; `stays` is false where it leaves with its prefill.
    Once it decodes, it has one output token at step `first_step` of that worker, and one more with
    each further step. `target` is the decode worker that it is meant for, where that is settled
    before its prefill ends. One that lost its blocks has a `reprefill`, a prefill that `serves` it,
    while that is computed; it is parked meanwhile with `parked_tokens` of its answer, and nothing
    of it counts but its seat.
    """

    id: str
    prompt_tokens: int
    max_output_tokens: int
    arrival_seq: int
    arrived_s: float
    wish: Route | None
    lengths: Lengths
    block_hashes: tuple[int, ...] = ()
    priority: int = 0
    phase: Phase = Phase.QUEUED
    route: Route | None = None
    at: Worker | None = None
    prefill_tokens: int = 0
    num_blocks: int = 0
    stays: bool = False
    first_step: int | None = None
    target: Worker | None = None
    # Asked for at every decision: the expected length of its answer, and a few likely ones.
    expected_tokens: float = field(init=False)
    likely_tokens: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        self.expected_tokens = self.lengths.mean_remaining()
        self.likely_tokens = few(self.lengths.remaining())

    lease: LeaseKey | None = None
    serves: Request | None = None
    reprefill: Request | None = None
    parked_tokens: int | None = None
    # How often in a row its worker died before it had a token more, and the tokens it had by then.
    num_fruitless: int = 0
    num_emitted: int = 0
    # Of those, the ones that now are prompt.
    num_moved: int = 0

    def lost(self, left: Remainder | None) -> None:
        """Its worker is dead: it is to begin again, as what is left of it."""
        num_emitted = self.num_emitted if left is None else left.num_emitted
        self.num_fruitless = 0 if num_emitted > self.num_emitted else self.num_fruitless + 1
        self.num_emitted = num_emitted
        if left is not None and left.max_output_tokens != self.max_output_tokens:
            self._move(left)
        self.begin_again()

    def begin_again(self) -> None:
        """Forget how far it was; no worker has it."""
        self.route = self.target = self.lease = self.first_step = None
        self.stays = False

    def _move(self, left: Remainder) -> None:
        """Count a part of what was emitted as prompt."""
        num_more = self.max_output_tokens - left.max_output_tokens
        num_here = self.num_emitted - self.num_moved
        points = self.lengths.survivors(num_here) or (num_here + 1,)
        self.lengths = Lengths(tuple(one - num_more for one in points))
        self.num_moved += num_more
        self.prompt_tokens, self.max_output_tokens = left.prompt_tokens, left.max_output_tokens
        self.__post_init__()


def wish_of(wish: Route | None, max_output_tokens: int) -> Route | None:
    """The route to ask for: one token is all prefill, so there is nothing to hand off."""
    return Route.WHOLE if wish is Route.SPLIT and max_output_tokens == 1 else wish


class RequestTable:
    """Every open request and every zombie by id, with the number of open ones per phase."""

    def __init__(self) -> None:
        self._open: dict[str, Request] = {}
        self._zombies: dict[str, Request] = {}
        self._num_by_phase: dict[Phase, int] = {
            phase: 0 for phase in Phase if phase is not Phase.FINISHED
        }
        # Prompt tokens of those that wait for a first worker.
        self.num_queued_tokens = 0

    def add(self, request: Request) -> None:
        """Open a request, which is queued. Raises `LifecycleError` if its id is in use."""
        if request.id in self._open or request.id in self._zombies:
            raise LifecycleError(f"{request.id}: arrived twice")
        self._open[request.id] = request
        self._num_by_phase[request.phase] += 1
        self.num_queued_tokens += request.prompt_tokens

    def get(self, request_id: str) -> Request | None:
        """The open request of that id."""
        return self._open.get(request_id)

    def at(self, request_id: str, worker: Worker) -> Request | None:
        """The open request or zombie of that id, if this very incarnation computes it."""
        request = self._open.get(request_id) or self._zombies.get(request_id)
        return request if request is not None and request.at is worker else None

    def is_zombie(self, request: Request) -> bool:
        """Whether the request is over for its client and not yet for its worker."""
        return request.id in self._zombies

    def move(self, request: Request, phase: Phase) -> None:
        """Change an open request's phase; FINISHED closes it. Raises `LifecycleError`."""
        before = request.phase
        move(request, phase)
        self._num_by_phase[before] -= 1
        if Phase.QUEUED in (before, phase):
            self.num_queued_tokens += request.prompt_tokens * (1 if phase is Phase.QUEUED else -1)
        if phase is Phase.FINISHED:
            del self._open[request.id]
        else:
            self._num_by_phase[phase] += 1

    def bereave(self, request: Request) -> None:
        """Close an open request that a worker still computes: it becomes a zombie."""
        self.move(request, Phase.FINISHED)
        self._zombies[request.id] = request

    def add_zombie(self, request: Request) -> None:
        """Enter what a worker computes and no client waits for. Its id is one of ours."""
        self._zombies[request.id] = request

    def bury(self, request: Request) -> None:
        """The worker has stopped computing this zombie."""
        del self._zombies[request.id]

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_zombies(self) -> int:
        return len(self._zombies)

    def num_by_phase(self) -> dict[str, int]:
        """Open requests per phase, zeros included."""
        return {phase.value: num for phase, num in self._num_by_phase.items()}
