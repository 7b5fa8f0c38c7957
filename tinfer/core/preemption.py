"""Requests that lost their blocks, from the word of it until they have been told how to go on.

One that is to have its blocks computed elsewhere waits where it was, and a prefill of all that it
had so far runs for it: to the worker a request like any other, to the table a zombie, since no
client waits for it. Its blocks are read by the one that it serves. Invariant: every preemption is
answered by one `Resume`, unless the request is over or its worker is dead.
"""

from __future__ import annotations

from tinfer.core import events as ev
from tinfer.core.fleet import Fleet, can_hand_off
from tinfer.core.ledger import Ledger
from tinfer.core.lengths import certain
from tinfer.core.policies.interfaces import PreemptionPolicy
from tinfer.core.requests import Request, RequestTable
from tinfer.core.types import Phase, Route
from tinfer.core.worker import Worker


class Preemptions:
    """Writes the tables of the scheduler that owns it; every method returns what is to be done."""

    def __init__(
        self, policy: PreemptionPolicy, fleet: Fleet, requests: RequestTable, ledger: Ledger
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._requests = requests
        self._ledger = ledger
        self._num_reprefills = 0

    def lost(self, request: Request, worker: Worker) -> list[ev.Action]:
        """The request waits on that worker, without its blocks."""
        if request.phase is not Phase.DECODING or request.reprefill is not None:
            return [_go_on(request, worker)]
        again = self._reprefill_of(request, worker)
        candidates = [
            one
            for one in self._fleet.split_sources
            if one is not worker and one.has_seat and can_hand_off(one.role, worker.role)
        ]
        source = self._policy.source(again, worker, candidates) if candidates else None
        if source is None:
            return [_go_on(request, worker)]
        self._num_reprefills += 1
        worker.num_reprefilled += 1
        request.reprefill = again
        worker.park(request)
        self._requests.add_zombie(again)
        source.place(again, prefill_tokens=source.uncached_tokens(again))
        source.prefixes.use(again.block_hashes)
        return [ev.StartReprefill(again.id, request.id, source.id, source.generation)]

    def prefilled(self, again: Request, event: ev.Prefilled, source: Worker) -> list[ev.Action]:
        """The blocks are there, held under a lease."""
        request = self._done(again, source)
        reader = request and request.at
        if not request or not reader:
            unread = self._ledger.open(event.lease, source, event.num_blocks, None)
            return [ev.ReleaseLease(self._ledger.release(unread))]
        lease = self._ledger.open(event.lease, source, event.num_blocks, request.id)
        self._ledger.start_read(lease, reader)
        self._ledger.start_pull(request.id)
        reader.prefixes.use(request.block_hashes)
        return [ev.Resume(request.id, reader.id, reader.generation, lease.key)]

    def failed(self, again: Request, source: Worker) -> list[ev.Action]:
        """That worker computes it no longer and has no blocks to show."""
        request = self._done(again, source)
        return [_go_on(request, request.at)] if request and request.at else []

    def over(self, request: Request) -> list[ev.Action]:
        """Nobody waits for the request any more, so nobody does for its prefill."""
        again, request.reprefill = request.reprefill, None
        if again is None or again.at is None:
            return []
        return [ev.AbortOn(again.id, again.at.id, again.at.generation)]

    def _reprefill_of(self, request: Request, worker: Worker) -> Request:
        """All that the request had, as a prompt."""
        return Request(
            id=f"{request.id}~{self._num_reprefills}",
            prompt_tokens=request.prompt_tokens + worker.generated_tokens(request),
            max_output_tokens=1,
            arrival_seq=request.arrival_seq,
            arrived_s=request.arrived_s,
            wish=None,
            lengths=certain(1),
            block_hashes=request.block_hashes,
            phase=Phase.FINISHED,
            route=Route.SPLIT,
            serves=request,
        )

    def _done(self, again: Request, source: Worker) -> Request | None:
        """Take it off that worker; returns the request that still waits for it."""
        source.remove(again)
        self._requests.bury(again)
        request = again.serves
        if request is None or request.reprefill is not again:
            return None
        request.reprefill = None
        assert request.at is not None, f"{request.id} is parked nowhere"
        request.at.unpark(request)
        return request


def _go_on(request: Request, worker: Worker) -> ev.Resume:
    return ev.Resume(request.id, worker.id, worker.generation)
