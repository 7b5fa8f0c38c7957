"""Requests whose worker died, from then on until they are started again or given up.

They begin again as what is left of them, and go before all that has not been started yet: someone
reads their answer already, or has waited for it. What kills its workers is told from what was
beside it: a request is given up when it has lost too many in a row without one token more, and
those that may be to blame run one at a time (`Worker.is_open_to`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tinfer.core import events as ev
from tinfer.core.handoffs import Handoffs
from tinfer.core.ledger import Lease, LeaseState, Ledger
from tinfer.core.policies.orders import Fcfs
from tinfer.core.requests import Request, RequestTable, wish_of
from tinfer.core.types import Phase, Route
from tinfer.core.worker import Worker


class Losses:
    """Writes the tables of the scheduler that owns it; methods return what is to be done."""

    def __init__(
        self,
        wishes: Iterable[Route | None],
        max_restarts: int,
        requests: RequestTable,
        ledger: Ledger,
        handoffs: Handoffs,
    ) -> None:
        self.queues: dict[Route | None, Fcfs] = {wish: Fcfs() for wish in wishes}
        self._max_restarts = max_restarts
        self._requests = requests
        self._ledger = ledger
        self._handoffs = handoffs

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def discard(self, request: Request) -> None:
        """It does not wait here, or no longer."""
        self.queues[request.wish].discard(request)

    def lose(
        self, request: Request, worker: Worker, left: Mapping[str, ev.Remainder]
    ) -> list[ev.Action]:
        """Begin again what a dead worker had, unless too many have died with it."""
        request.lost(left.get(request.id))
        num_dead = request.num_fruitless
        if num_dead <= self._max_restarts:
            self._queue(request)
            return []
        message = (
            f"{num_dead} workers in a row died while they computed this request, "
            f"the last of them {worker.id}"
        )
        self._requests.move(request, Phase.FINISHED)
        return [ev.Fail(request.id, "worker-lost", message)]

    def reader_died(self, lease: Lease, worker: Worker) -> list[ev.Action]:
        """Have another worker read what the dead one did not finish, if anyone waits for it."""
        if lease.state is LeaseState.RELEASED:
            return []
        request = self._requests.get(lease.request_id or "")
        is_handed_over = request is not None and request.phase is Phase.HANDOFF
        if request is None or request.at is not worker or not is_handed_over:
            return [ev.ReleaseLease(self._ledger.release(lease))]
        self._ledger.stop_pull(request.id)
        worker.remove(request)
        self._handoffs.wait_again(lease, request)
        return []

    def lease_ended(self, lease: Lease) -> None:
        """Its blocks are gone. Where it was offered again, the dead reader had all that it needed,
        and the owner has seen that: nobody can read it any more."""
        if lease.is_offered_again and lease.state is LeaseState.WAITING:
            self._again(self._handoffs.take(lease))

    def restart_stranded(self) -> list[ev.Action]:
        """Begin again what waits for a kind of worker that will not come."""
        actions: list[ev.Action] = []
        for request in self._handoffs.stranded():
            actions += self._handoffs.withdraw(request)
            self._again(request)
        return actions

    def _again(self, request: Request) -> None:
        request.begin_again()
        self._queue(request)

    def _queue(self, request: Request) -> None:
        request.wish = wish_of(request.wish, request.max_output_tokens)
        self._requests.move(request, Phase.QUEUED)
        self.queues[request.wish].add(request, 0.0)
