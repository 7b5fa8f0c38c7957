"""Split requests on the way from the worker that prefilled them to the one that decodes them.

Invariant: a request that waits here is in phase HANDOFF and has one lease, which no reader was told
of or whose reader died; it leaves with the start of its decode, with its end, with its source's
death, or for another start where nobody is left to read.
"""

from __future__ import annotations

from tinfer.core import events as ev
from tinfer.core import explain
from tinfer.core.fleet import Fleet
from tinfer.core.ledger import Lease, Ledger
from tinfer.core.policies.registry import Policies
from tinfer.core.requests import Request, RequestTable
from tinfer.core.types import Phase, Role, Route, WaitingSnapshot
from tinfer.core.worker import Worker


class Handoffs:
    """Writes the tables of the scheduler that owns it; returns what is to be done."""

    def __init__(
        self, policies: Policies, fleet: Fleet, requests: RequestTable, ledger: Ledger
    ) -> None:
        self._choice = policies.decode_choice
        self._admits = policies.decode_admission.admits
        self._settles_early = policies.settles_early
        self._fleet = fleet
        self._requests = requests
        self._ledger = ledger
        # By the source's role, which decides who may read: within one of the two all wait for the
        # same workers, so strict order blocks nobody.
        self._waiting: dict[Role, dict[str, Request]] = {Role.PREFILL: {}, Role.BOTH: {}}

    def settle(self, request: Request) -> None:
        """Choose the decode worker of a split request early, if that is the mode."""
        if not self._settles_early or request.serves is not None:
            return
        if request.route is Route.SPLIT and request.at is not None:
            readers = self._fleet.readers(request.at.role)
            if readers and request.target is None:
                request.target = self._choice.choose(request, readers)

    def prefilled(self, request: Request, event: ev.Prefilled, source: Worker) -> list[ev.Action]:
        """The blocks are there, held under a lease: from now on it waits, if anyone does for it."""
        lease = self._ledger.open(event.lease, source, event.num_blocks, request.id)
        request.lease = event.lease
        self.settle(request)
        source.remove(request)
        if self._requests.is_zombie(request):
            self._requests.bury(request)
            return [ev.ReleaseLease(self._ledger.release(lease))]
        self._requests.move(request, Phase.HANDOFF)
        self._waiting[source.role][request.id] = request
        return []

    def admit(self, now_s: float) -> list[ev.Action]:
        """Give waiting requests to decode workers with room, in order of their prefill's end.

        A worker that has no room for one takes no later one either: nobody overtakes.
        """
        actions: list[ev.Action] = []
        for source, waiting in self._waiting.items():
            if not waiting:
                continue
            readers = self._fleet.readers(source)
            full: set[str] = set()
            for request in list(waiting.values()):
                open_readers = [one for one in readers if one.id not in full]
                if not open_readers:
                    break
                wanted = _wanted_readers(request, open_readers, readers)
                worker = self._choose_reader(request, wanted, now_s) if wanted else None
                if worker is None:
                    full |= {one.id for one in wanted}
                else:
                    del waiting[request.id]
                    actions.append(self._start_decode(request, worker))
        self._fleet.waiting_sources = {role for role, waiting in self._waiting.items() if waiting}
        return actions

    def withdraw(self, request: Request) -> list[ev.Action]:
        """It waits no longer, and nobody will read its blocks."""
        lease = self._lease_of(request)
        self.take(lease)
        return [ev.ReleaseLease(self._ledger.release(lease))]

    def take(self, lease: Lease) -> Request:
        """It waits no longer; what becomes of its lease is the caller's."""
        assert lease.request_id is not None, f"{lease.key} is nobody's"
        return self._waiting[lease.owner.role].pop(lease.request_id)

    def wait_again(self, lease: Lease, request: Request) -> None:
        """The worker that was to read its blocks is dead, and they are still there."""
        self._ledger.offer_again(lease)
        request.target = None
        self._waiting[lease.owner.role][request.id] = request

    def stranded(self) -> list[Request]:
        """Those that wait for a kind of worker of which none is up or to come."""
        return [
            request
            for source, waiting in self._waiting.items()
            if waiting and not self._fleet.expects_reader(source)
            for request in waiting.values()
        ]

    def waiting(self, now_s: float, limit: int) -> list[WaitingSnapshot]:
        """Up to `limit` of each source, and why each waits."""
        found: list[WaitingSnapshot] = []
        for source, waiting in self._waiting.items():
            readers = self._fleet.readers(source)
            found += explain.handed_off(waiting.values(), readers, now_s, limit)
        return found

    def _choose_reader(
        self, request: Request, readers: list[Worker], now_s: float
    ) -> Worker | None:
        return self._choice.choose(
            request, readers, lambda worker: self._admits(request, worker, now_s)
        )

    def _start_decode(self, request: Request, worker: Worker) -> ev.Action:
        lease = self._lease_of(request)
        self._ledger.start_read(lease, worker)
        self._ledger.start_pull(request.id)
        worker.place(request, prefill_tokens=0)
        return ev.StartDecode(request.id, worker.id, worker.generation, lease.key)

    def _lease_of(self, request: Request) -> Lease:
        lease = self._ledger.of_request(request.id)
        assert lease is not None, f"{request.id} waits for a reader without a lease"
        return lease


def _wanted_readers(
    request: Request, open_readers: list[Worker], readers: list[Worker]
) -> list[Worker]:
    """The one it is meant for, if that is settled and lives, else all that are open."""
    if request.target is not None and request.target in readers:
        return [request.target] if request.target in open_readers else []
    return open_readers
