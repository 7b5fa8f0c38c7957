"""Virtual time: engines, arrivals and whoever decides about them, moment by moment.

Everything that happens on an engine at some time is heard `message_s` later, and what is then
decided acts on an engine another `message_s` later. The world goes from one moment at which
something is heard to the next; before anything is decided then, all engines stand where they were
`message_s` ago. Engines are taken by `worker_id`, so their order in a spec means nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Output, Ticket
from tinfer.sim.spec import SimRequest, check_arrival

# Time in which nothing happens but ticks, after which no tick changes anything any more: far more
# than any policy waits for (the paper's watchdog takes a minute).
SETTLED_AFTER_S = 300.0


class SimulationError(RuntimeError):
    """A run cannot be right: requests that nobody ends, or accounts that are open at the end."""


class Driver(Protocol):
    """Who decides. `world.seen_s` is the engines' time that is known at `now_s`."""

    def arrived(self, ticket: Ticket, now_s: float) -> None: ...

    def heard(self, outputs: Sequence[Output], now_s: float) -> None:
        """Engines have said this, in order; empty: some of them only got on with prompts, or took
        blocks away."""
        ...

    def left(self, ticket: Ticket, now_s: float) -> None:
        """The client of an unanswered request has gone."""
        ...

    def ticked(self, now_s: float) -> None: ...


class World:
    """Engines and requests of one run; `tickets` are in the order of `requests`.

    `reprefills` stand for prompts that are computed again with their answers so far, for another
    engine: of them only `workers`, `started_s` and `prefilled_s` mean anything.
    """

    def __init__(
        self,
        engines: Sequence[SimEngine],
        requests: Sequence[SimRequest],
        message_s: float,
        tick_s: float | None = None,
    ) -> None:
        self.engines = sorted(engines, key=lambda engine: engine.worker_id)
        self.engine_of = {engine.worker_id: engine for engine in self.engines}
        if len(self.engine_of) < len(self.engines):
            raise ValueError("two workers have the same worker_id")
        self.tickets = [Ticket(place, request) for place, request in enumerate(requests)]
        if len({request.request_id for request in requests}) < len(requests):
            raise ValueError("two requests have the same request_id")
        for request in requests:
            check_arrival(request.request_id, request.arrival_s)
        self.reprefills: list[Ticket] = []
        self.message_s = message_s
        self.seen_s = -math.inf
        self.num_open = len(self.tickets)
        self._tick_s = tick_s
        self._next_tick_s = math.inf if tick_s is None else tick_s
        # Arrivals, then departures as they become known; both in order of time, then of place.
        self._callers: list[tuple[float, int, Ticket]] = [
            (ticket.request.arrival_s, ticket.place, ticket) for ticket in self.tickets
        ]
        heapq.heapify(self._callers)

    def end(self, ticket: Ticket, now_s: float, error: str | None = None) -> None:
        """The request is over for its client. Raises `SimulationError` the second time."""
        if ticket.is_over:
            raise SimulationError(f"{ticket.request.request_id} ended twice")
        ticket.is_over = True
        ticket.error = error
        if error is None:
            ticket.last_token_s = now_s
        self.num_open -= 1

    def run(self, driver: Driver) -> None:
        """Until every request has ended and nothing goes on. Raises `SimulationError` where that
        never comes, or where an engine holds anything then."""
        idle_s = 0.0
        while True:
            self._plan()
            engine_s = min(engine.next_s for engine in self.engines)
            caller_s = self._callers[0][0] if self._callers else math.inf
            heard_s = engine_s + self.message_s
            now_s = min(heard_s, caller_s)
            if self.num_open and self._next_tick_s < now_s:
                self._tick(driver)
                if engine_s == math.inf:
                    idle_s += self._tick_s or 0.0
                if idle_s > SETTLED_AFTER_S:
                    self._skip_ticks(caller_s)
            elif now_s == math.inf:
                break
            elif heard_s <= caller_s:
                idle_s = 0.0
                self._hear(driver, engine_s, now_s)
            else:
                idle_s = 0.0
                self.seen_s = max(self.seen_s, now_s - self.message_s)
                self._call(driver, heapq.heappop(self._callers)[2], now_s)
        if self.num_open:
            self._stuck()
        for engine in self.engines:
            if not engine.is_idle or engine.pool.num_free != engine.spec.num_blocks:
                raise SimulationError(f"{engine.worker_id} holds blocks at the end")

    def _plan(self) -> None:
        for engine in self.engines:
            if engine.needs_plan:
                engine.plan()
                if engine.reads:
                    for lease, until_s in engine.reads:
                        self.engine_of[lease.worker_id].end_lease(until_s, lease)
                    engine.reads.clear()

    def _hear(self, driver: Driver, engine_s: float, now_s: float) -> None:
        self.seen_s = max(self.seen_s, engine_s)
        outputs: list[Output] = []
        has_news = False
        for engine in self.engines:
            if engine.next_s <= engine_s:
                outputs += engine.advance(engine_s)
                has_news = has_news or engine.has_news
        if outputs or has_news:
            driver.heard(outputs, now_s)

    def _call(self, driver: Driver, ticket: Ticket, now_s: float) -> None:
        """A client comes, or loses its patience."""
        request = ticket.request
        if ticket.has_arrived:
            if not ticket.is_over:
                driver.left(ticket, now_s)
            return
        ticket.has_arrived = True
        if request.patience_s is not None:
            leaves_s = now_s + request.patience_s
            heapq.heappush(self._callers, (leaves_s, ticket.place, ticket))
        driver.arrived(ticket, now_s)

    def _tick(self, driver: Driver) -> None:
        assert self._tick_s is not None
        now_s = self._next_tick_s
        self._next_tick_s += self._tick_s
        self.seen_s = max(self.seen_s, now_s - self.message_s)
        driver.ticked(now_s)

    def _skip_ticks(self, until_s: float) -> None:
        """Go on to the last tick before the next caller; who waits while none comes is stuck."""
        if until_s == math.inf:
            self._stuck()
        assert self._tick_s is not None
        num = math.floor((until_s - self._next_tick_s) / self._tick_s)
        self._next_tick_s += max(0, num) * self._tick_s

    def _stuck(self) -> None:
        waiting = [ticket.request.request_id for ticket in self.tickets if not ticket.is_over]
        raise SimulationError(
            f"{len(waiting)} requests are never answered; the first one is {waiting[0]}"
        )
