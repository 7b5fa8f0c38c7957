"""The scheduler: every event of the cluster goes in, what is to be done about it comes out.

It is the only writer of scheduling state, and pure: no clock, no I/O, no randomness of its own, so
that the live loop and the simulator share it and a recorded event log replays to the same actions.
Its invariants: every accepted request ends exactly once, and the death of its worker is no end
while another is up or to come; blocks are given up only on word that their reader has stopped; no
action addresses an incarnation that is not live. `LifecycleError` or `LedgerError` out of
`on_event` means that one of them would break; events named below as late are explained by a race.
"""

from __future__ import annotations

from itertools import chain, islice

from tinfer.core import events as ev
from tinfer.core import explain
from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.handoffs import Handoffs
from tinfer.core.ledger import Lease, LeaseState, Ledger
from tinfer.core.lengths import certain
from tinfer.core.losses import Losses
from tinfer.core.policies.flips import Flip, why_not_flip
from tinfer.core.policies.interfaces import Placement
from tinfer.core.policies.orders import Fcfs, ageing_tokens_per_s
from tinfer.core.policies.registry import build_policies
from tinfer.core.preemption import Preemptions
from tinfer.core.promises import Promises, QueueView
from tinfer.core.requests import Request, RequestTable, wish_of
from tinfer.core.types import (
    LedgerSnapshot,
    Phase,
    Route,
    SchedulerConfig,
    WaitingSnapshot,
    WorkerSnapshot,
)
from tinfer.core.worker import Worker

# How long what arrived counts as what is asked for.
DEMAND_MEMORY_S = 30.0


class Scheduler:
    """Owns every request from arrival to its end. Raises `UnknownPolicy` for a config's mistake."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._max_num_queued_reqs = config.max_num_queued_reqs
        self._max_num_queued_tokens = config.max_num_queued_tokens
        self._fleet = Fleet(config.costs, config.overflow_z, ageing_tokens_per_s(config))
        self._demand = Demand(DEMAND_MEMORY_S)
        self._starts = Demand(DEMAND_MEMORY_S)
        self._policies = build_policies(config, self._fleet, self._demand)
        self._queues = self._policies.queues
        self._requests = RequestTable()
        self._ledger = Ledger()
        self._handoffs = Handoffs(self._policies, self._fleet, self._requests, self._ledger)
        self._losses = Losses(
            self._queues, config.max_request_restarts, self._requests, self._ledger, self._handoffs
        )
        self._preemptions = Preemptions(
            self._policies.preemption, self._fleet, self._requests, self._ledger
        )
        self._promises = Promises(config.slo_ttft_s, config.slo_tpot_s, self._fleet)
        self._flip_reasons: dict[str, str] = {}
        # Those that were not said to be drained yet.
        self._draining: dict[str, Worker] = {}
        self._num_arrived = 0
        self._actions: list[ev.Action] = []

    def on_event(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        """Take in one fact and return what is to be done, in order.

        `now_s` never goes back. Raises `LifecycleError` or `LedgerError` for what cannot happen.
        """
        actions: list[ev.Action] = []
        self._actions = actions
        self._apply(event, now_s)
        if not _changes_little(event):
            actions += self._losses.restart_stranded()
            actions += self._handoffs.admit(now_s)
            self._start_queued(now_s)
            self._set_budgets()
            self._promises.pace.look(self._fleet.num_queued, now_s)
            self._flip(now_s)
            self._end_drains()
        return actions

    def request_phase(self, request_id: str) -> Phase | None:
        """The phase of an open request; None once it is over, and for an unknown one."""
        request = self._requests.get(request_id)
        return None if request is None else request.phase

    def ledger_snapshot(self) -> LedgerSnapshot:
        """Every open account; all zero when idle."""
        return LedgerSnapshot(
            open_requests=self._requests.num_open,
            requests_by_phase=self._requests.num_by_phase(),
            leases=self._ledger.num_leases,
            held_blocks={worker.id: worker.num_held_blocks for worker in self._fleet.workers},
            pulls=self._ledger.num_pulls,
            zombies=self._requests.num_zombies,
        )

    def leases_by_owner(self) -> dict[tuple[str, str], int]:
        """Open leases by the owner's worker_id and their state."""
        return self._ledger.num_by_owner()

    def workers_snapshot(self) -> list[WorkerSnapshot]:
        """Every live incarnation, by `worker_id`."""
        return [worker.snapshot() for worker in self._fleet.workers]

    def waiting(self, now_s: float, limit: int = 100) -> list[WaitingSnapshot]:
        """Up to `limit` of each kind of waiting request, and why each waits."""
        found: list[WaitingSnapshot] = []
        for queue in (*self._losses.queues.values(), *self._queues.values()):
            if len(queue):
                found += explain.queued(queue.listed(now_s), self._fleet, now_s, limit)
        found += self._handoffs.waiting(now_s, limit)
        return found + explain.preempted(self._fleet, now_s)[:limit]

    def _apply(self, event: ev.Event, now_s: float) -> None:
        match event:
            case ev.Arrived():
                self._arrived(event, now_s)
            case ev.Cancelled():
                self._cancelled(event)
            case ev.Stepped():
                self._stepped(event, now_s)
            case ev.FirstToken():
                self._first_token(event)
            case ev.Prefilled():
                self._prefilled(event)
            case ev.Pulled():
                self._pulled(event)
            case ev.WorkerFinished():
                self._worker_finished(event)
            case ev.LeaseOpened():
                self._lease_opened(event)
            case ev.LeaseEnded():
                self._lease_ended(event)
            case ev.LeaseOverdue():
                self._lease_overdue(event)
            case ev.RoleAsked():
                self._role_asked(event)
            case ev.DrainAsked():
                self._drain_asked(event)
            case ev.WorkerExpected():
                self._fleet.expect(event.worker_id, event.role)
            case ev.WorkerUp():
                self._fleet.up(event)
            case ev.WorkerDown():
                self._worker_down(event)
            case ev.WorkerGone():
                self._fleet.give_up(event.worker_id)
            case ev.Tick():
                self._fleet.forget_speed()

    # --- requests ----------------------------------------------------------------------------

    def _arrived(self, event: ev.Arrived, now_s: float) -> None:
        if not self._fleet.workers:
            return self._refuse(event.request_id, "no-worker", "no worker is up")
        if limit := self._full(event.prompt_tokens):
            message = "too many requests are waiting"
            wait_s = self._half_a_queue_s(now_s)
            fail = ev.Fail(event.request_id, "queue-full", message, wait_s, limit)
            return self._actions.append(fail)
        wish = wish_of(event.route or self._policies.wish, event.max_output_tokens)
        request = Request(
            id=event.request_id,
            prompt_tokens=event.prompt_tokens,
            max_output_tokens=event.max_output_tokens,
            arrival_seq=self._num_arrived,
            arrived_s=now_s,
            wish=wish,
            lengths=(event.lengths or certain(event.max_output_tokens)).up_to(
                event.max_output_tokens
            ),
            block_hashes=event.block_hashes,
            priority=event.priority,
        )
        refusal = self._promises.broken_by(request, self._queue_view(now_s))
        if refusal is not None:
            return self._actions.append(ev.Fail(request.id, "slo", *refusal))
        self._requests.add(request)
        num_new = min(worker.uncached_tokens(request) for worker in self._fleet.workers)
        self._demand.arrived(request, num_new, now_s)
        self._num_arrived += 1
        self._queues[request.wish].add(request, now_s)

    def _full(self, prompt_tokens: int) -> str:
        """The limit of the queue that leaves no room for such a prompt, "" if it has room; one that
        is longer than all of the room is taken when nothing else waits."""
        num_queued = self._num_queued()
        if num_queued >= self._max_num_queued_reqs:
            return "max_num_queued_reqs"
        limit_tokens = self._max_num_queued_tokens
        if limit_tokens is None or not num_queued:
            return ""
        is_over = self._requests.num_queued_tokens + prompt_tokens > limit_tokens
        return "max_num_queued_tokens" if is_over else ""

    def _queue_view(self, now_s: float) -> QueueView:
        if not self._promises.are_made:
            return QueueView(0, 0, 0.0)
        unanswered = chain(
            *(queue.listed(now_s) for queue in self._queues.values()),
            *(worker.prefilling.values() for worker in self._fleet.workers),
        )
        arrived = (one.arrived_s for one in unanswered if one.serves is None)
        return QueueView(
            self._num_queued(),
            self._requests.num_queued_tokens,
            now_s - min(arrived, default=now_s),
        )

    def _half_a_queue_s(self, now_s: float) -> float:
        starts_per_s, _, _ = self._starts.rates(now_s)
        return 0.5 * self._num_queued() / starts_per_s if starts_per_s > 0.0 else 0.0

    def _cancelled(self, event: ev.Cancelled) -> None:
        request = self._requests.get(event.request_id)
        if request is None:  # late: it has just ended
            return
        if request.at is not None:
            worker = request.at
            self._actions.append(ev.AbortOn(request.id, worker.id, worker.generation))
            self._actions += self._preemptions.over(request)
            return self._requests.bereave(request)
        if request.phase is Phase.QUEUED:
            self._queues[request.wish].discard(request)
            self._losses.discard(request)
        else:
            self._actions += self._handoffs.withdraw(request)
        self._requests.move(request, Phase.FINISHED)

    def _first_token(self, event: ev.FirstToken) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        request = worker and self._requests.at(event.request_id, worker)
        if not worker or not request or request.route is not Route.WHOLE:  # late
            return
        worker.prefill_done(request)
        worker.decodes(request)
        if request.phase is Phase.PREFILLING:
            self._requests.move(request, Phase.DECODING)

    def _prefilled(self, event: ev.Prefilled) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        if worker is None:  # late: an incarnation that was seen dead
            return
        request = self._requests.at(event.request_id, worker)
        if request is None or request.route is not Route.SPLIT or request.lease is not None:
            lease = self._ledger.open(event.lease, worker, event.num_blocks, None)
            return self._release(lease)
        takes_over = self._handoffs if request.serves is None else self._preemptions
        self._actions += takes_over.prefilled(request, event, worker)

    def _pulled(self, event: ev.Pulled) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        if worker is None:  # late
            return
        # Also after the end of the request: an abort need not wait for the copy to stop.
        self._ledger.stop_read(event.request_id, worker)
        request = self._requests.at(event.request_id, worker)
        if request is None:
            return
        self._ledger.stop_pull(request.id)
        worker.decodes(request)
        worker.prefixes.use(request.block_hashes)
        if request.phase is Phase.HANDOFF:
            self._requests.move(request, Phase.DECODING)

    def _worker_finished(self, event: ev.WorkerFinished) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        request = worker and self._requests.at(event.request_id, worker)
        if not worker or not request:  # late: cancelled there after it had moved on
            return
        if request.serves is not None:
            self._actions += self._preemptions.failed(request, worker)
            return
        self._actions += self._preemptions.over(request)
        lease = self._ledger.of_request(request.id)
        if lease is not None and lease.state is LeaseState.READING and event.refused:
            self._release(lease)
        self._ledger.stop_pull(request.id)
        worker.remove(request)
        self._close(request)

    # --- leases ------------------------------------------------------------------------------

    def _lease_opened(self, event: ev.LeaseOpened) -> None:
        worker = self._fleet.get(event.lease.worker_id, event.lease.worker_generation)
        if worker is not None:
            self._release(self._ledger.open(event.lease, worker, event.num_blocks, None))

    def _lease_ended(self, event: ev.LeaseEnded) -> None:
        if self._fleet.get(event.lease.worker_id, event.lease.worker_generation) is None:
            return
        lease = self._ledger.get(event.lease)
        self._ledger.end(event.lease)
        if lease is not None:
            self._losses.lease_ended(lease)

    def _lease_overdue(self, event: ev.LeaseOverdue) -> None:
        lease = self._ledger.get(event.lease)
        if lease is None or lease.state is LeaseState.RELEASED:  # late: the answer is on its way
            return
        if lease.state is LeaseState.READ:
            return self._release(lease)
        # A dead reader's lease is RELEASED and so is one that nobody wants: this reader lives,
        # or the request still waits for one.
        self._actions.append(ev.ExtendLease(lease.key))

    # --- workers -----------------------------------------------------------------------------

    def _worker_down(self, event: ev.WorkerDown) -> None:
        worker = self._fleet.down(event.worker_id, event.generation)
        if worker is None:  # late, or it never came up
            return
        self._flip_reasons.pop(worker.id, None)
        self._draining.pop(worker.id, None)
        left = {one.request_id: one for one in event.remainders}
        for lease in self._ledger.end_all_of(worker):
            if lease.state is LeaseState.WAITING and lease.request_id is not None:
                self._actions += self._losses.lose(self._handoffs.take(lease), worker, left)
        for lease in self._ledger.read_by(worker):
            self._actions += self._losses.reader_died(lease, worker)
        for request in list(worker.requests.values()):
            if request.serves is not None:
                self._actions += self._preemptions.failed(request, worker)
                continue
            self._actions += self._preemptions.over(request)
            self._ledger.stop_pull(request.id)
            worker.remove(request)
            if self._requests.is_zombie(request):
                self._requests.bury(request)
            else:
                self._actions += self._losses.lose(request, worker, left)

    def _stepped(self, event: ev.Stepped, now_s: float) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        if worker is None:  # late
            return
        worker.stepped(event, now_s)
        self._fleet.share_speed()
        for request_id, computed_tokens in event.progress:
            request = self._requests.at(request_id, worker)
            if request is not None and request.prefill_tokens:
                worker.prefill_progress(request, computed_tokens)
                self._handoffs.settle(request)
        for request_id in event.preempted:
            request = self._requests.at(request_id, worker)
            if request is not None:
                self._actions += self._preemptions.lost(request, worker)

    def _role_asked(self, event: ev.RoleAsked) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        if worker is None:
            why: str | None = "it is not up"
        else:
            why = why_not_flip(worker, event.role, self._fleet)
        if why is not None or worker is None:
            refused = ev.RoleRefused(event.worker_id, event.generation, str(why))
            return self._actions.append(refused)
        self._begin_flip(Flip(worker, event.role, "asked for"))

    def _drain_asked(self, event: ev.DrainAsked) -> None:
        worker = self._fleet.get(event.worker_id, event.generation)
        if worker is not None and not worker.is_draining:
            self._fleet.begin_drain(worker)
            self._draining[worker.id] = worker

    def _end_drains(self) -> None:
        """Say once of each that it is empty; its death takes it out of the fleet."""
        for worker in [one for one in self._draining.values() if one.is_idle]:
            del self._draining[worker.id]
            self._actions.append(ev.Drained(worker.id, worker.generation))

    # --- placement ---------------------------------------------------------------------------

    def _start_queued(self, now_s: float) -> None:
        """Start queued requests; between the queues, the earliest arrival first."""
        if self._fleet.is_exhausted:
            self._fail_queued(now_s)
        for wish, lost in self._losses.queues.items():
            if len(lost):
                self._start_lost(wish, lost, now_s)
        open_wishes = [wish for wish, queue in self._queues.items() if len(queue)]
        while open_wishes and self._fleet.num_taking:
            wish = min(open_wishes, key=lambda one: _turn(self._head(one, now_s)))
            if not self._start_one(wish, now_s) or not len(self._queues[wish]):
                open_wishes.remove(wish)

    def _start_lost(self, wish: Route | None, queue: Fcfs, now_s: float) -> None:
        """In order of arrival; only those that have to run apart may be overtaken."""
        for request in list(queue.in_order(now_s)):
            placement = self._policies.placers[wish].place(request, self._fleet, 0, now_s)
            if placement is not None:
                queue.discard(request)
                self._start(request, placement, now_s)
            elif not request.num_fruitless:
                return

    def _head(self, wish: Route | None, now_s: float) -> Request:
        return next(self._queues[wish].in_order(now_s))

    def _start_one(self, wish: Route | None, now_s: float) -> bool:
        """Start the first request of a queue that can; says whether one could."""
        queue, placer = self._queues[wish], self._policies.placers[wish]
        ahead_tokens = 0
        for request in islice(queue.in_order(now_s), placer.num_tried):
            placement = placer.place(request, self._fleet, ahead_tokens, now_s)
            if placement is not None:
                queue.discard(request)
                self._start(request, placement, now_s)
                return True
            ahead_tokens += request.prompt_tokens
        return False

    def _start(self, request: Request, placement: Placement, now_s: float) -> None:
        route, worker = placement
        request.route = route
        num_new = worker.uncached_tokens(request)
        self._starts.arrived(request, num_new, now_s)
        self._promises.pace.started(request.prompt_tokens)
        worker.place(request, prefill_tokens=num_new)
        worker.prefixes.use(request.block_hashes)
        self._requests.move(request, Phase.PREFILLING)
        start = ev.StartPrefill if route is Route.SPLIT else ev.StartWhole
        self._actions.append(start(request.id, worker.id, worker.generation))

    def _flip(self, now_s: float) -> None:
        chosen = self._policies.flip.flip(self._fleet, self._demand, now_s)
        if chosen is not None:
            self._begin_flip(chosen)
        for worker in self._fleet.end_flips() if self._flip_reasons else ():
            reason = self._flip_reasons.pop(worker.id)
            changed = ev.RoleChanged(worker.id, worker.generation, worker.role, reason)
            self._actions.append(changed)

    def _begin_flip(self, flip: Flip) -> None:
        self._fleet.begin_flip(flip.worker, flip.role)
        self._flip_reasons[flip.worker.id] = flip.reason

    def _set_budgets(self) -> None:
        self._fleet.num_queued = self._num_queued()
        for worker in self._fleet.workers:
            tokens = self._policies.budget.budget(worker)
            if tokens != worker.budget_tokens:
                worker.budget_tokens = tokens
                self._actions.append(ev.SetBudget(worker.id, worker.generation, tokens))

    def _num_queued(self) -> int:
        return sum(map(len, self._queues.values())) + len(self._losses)

    # --- ends --------------------------------------------------------------------------------

    def _refuse(self, request_id: str, cause: str, message: str) -> None:
        self._actions.append(ev.Fail(request_id, cause, message))

    def _fail(self, request: Request, cause: str, message: str) -> None:
        self._refuse(request.id, cause, message)
        self._requests.move(request, Phase.FINISHED)

    def _fail_queued(self, now_s: float) -> None:
        for queue in (*self._losses.queues.values(), *self._queues.values()):
            while len(queue):
                request = next(queue.in_order(now_s))
                queue.discard(request)
                self._fail(request, "no-worker", "no worker is up and none will come")

    def _close(self, request: Request) -> None:
        if self._requests.is_zombie(request):
            self._requests.bury(request)
        else:
            self._requests.move(request, Phase.FINISHED)

    def _release(self, lease: Lease) -> None:
        self._actions.append(ev.ReleaseLease(self._ledger.release(lease)))


def _turn(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival_seq


def _changes_little(event: ev.Event) -> bool:
    """Whether hardly anything that waits could start because of it: steps come a hundred times a
    second from each worker, and what they change slowly is looked at again with the next `Tick`."""
    if isinstance(event, ev.Stepped):
        return not event.progress and not event.preempted
    return isinstance(event, ev.Pulled | ev.LeaseOverdue | ev.WorkerExpected)
