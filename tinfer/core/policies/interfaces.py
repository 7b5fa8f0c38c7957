"""What a scheduling policy is asked, one small interface per decision.

Policies read requests and workers and never write them. Candidates always come sorted by
`worker_id`, so that no answer depends on the order in which workers are listed; a policy that draws
at random gets its own seeded generator when it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tinfer.core.fleet import Fleet, Worker
from tinfer.core.requests import Request
from tinfer.core.types import Route


class RoutePolicy(Protocol):
    """Whether a request splits; asked once, at arrival, where the client has no wish."""

    def route(self, request: Request, fleet: Fleet, now_s: float) -> Route: ...


class PrefillOrder(Protocol):
    """The queue of requests that wait for a first worker, and in which order they leave it.

    `first` names the one to start next and does not remove it: it may have to wait for room.
    """

    def __len__(self) -> int: ...

    def add(self, request: Request, now_s: float) -> None: ...

    def discard(self, request: Request) -> None: ...

    def first(self, now_s: float) -> Request | None: ...


class WorkerChoice(Protocol):
    """Which of the workers that could take a request gets it; None keeps the request waiting.

    There is at least one candidate.
    """

    def choose(
        self, request: Request, candidates: Sequence[Worker], now_s: float
    ) -> Worker | None: ...


class DecodeAdmission(Protocol):
    """Whether a worker has room for a hand-off now."""

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool: ...
