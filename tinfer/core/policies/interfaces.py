"""What a scheduling policy is asked, one small interface per decision.

Policies read requests and workers and never write them. Candidates always come sorted by
`worker_id`, so that no answer depends on the order in which workers are listed; a policy that draws
at random gets its own seeded generator when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.policies.flips import Flip
from tinfer.core.requests import Request
from tinfer.core.types import Route
from tinfer.core.worker import Worker

Admits = Callable[[Worker], bool]


class PrefillOrder(Protocol):
    """The queue of requests that wait for a first worker, and in which order they leave it.

    `in_order` yields those that may start now, the one to start first at first. It removes none,
    and it is not used any further once the queue has changed.
    """

    def __len__(self) -> int: ...

    def add(self, request: Request, now_s: float) -> None: ...

    def discard(self, request: Request) -> None: ...

    def in_order(self, now_s: float) -> Iterator[Request]: ...

    def listed(self, now_s: float) -> Iterator[Request]:
        """All that wait, as they would start if nothing else came; changes nothing."""
        ...


class WorkerChoice(Protocol):
    """Which of the workers that could take a request gets it; None keeps the request waiting.

    There is at least one candidate.
    """

    def choose(
        self, request: Request, candidates: Sequence[Worker], now_s: float
    ) -> Worker | None: ...


class ReaderChoice(Protocol):
    """Which of the workers that could decode a request gets it, of those that admit it; None where
    none does. There is at least one candidate."""

    def choose(
        self, request: Request, candidates: Sequence[Worker], admits: Admits = ...
    ) -> Worker | None: ...


class DecodeAdmission(Protocol):
    """Whether a worker has room for a request that is to decode there now."""

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool: ...


class BudgetPolicy(Protocol):
    """How many prompt tokens a step of that worker may have; None: what the engine takes."""

    def budget(self, worker: Worker) -> int | None: ...


class FlipPolicy(Protocol):
    """Which worker changes its role now, if any; asked again and again. At most one at a time."""

    def flip(self, fleet: Fleet, demand: Demand, now_s: float) -> Flip | None: ...


class PreemptionPolicy(Protocol):
    """Which of `candidates`, workers that may hand off to `worker`, computes again what a request
    lost on `worker`; None: `worker` itself. `again` is that prompt: all that the request had.
    """

    def source(
        self, again: Request, worker: Worker, candidates: Sequence[Worker]
    ) -> Worker | None: ...


class Placement(NamedTuple):
    """Where a request starts. `split`: its prefill alone, and whole otherwise."""

    route: Route
    worker: Worker


class Placer(Protocol):
    """Route and first worker of a request that could start now; None keeps it waiting.

    `ahead_tokens` are of prompts that were asked about before in this round and wait on.
    `num_tried` is how many requests of its queue may be asked about: one where the order is strict.
    """

    num_tried: int

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None: ...
