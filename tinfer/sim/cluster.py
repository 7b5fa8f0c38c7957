"""tinfer itself, simulated: the core's scheduler in front of simulated workers.

What the live master does with messages is done here with an engine's outputs: they become the same
events, and the actions that come back go to the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from msgspec.structs import replace

from tinfer.core import events as ev
from tinfer.core.scheduler import Scheduler
from tinfer.predict.asked import End
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Job, Kind, Output, Ticket, What, num_tokens
from tinfer.sim.results import SimRun, result_of
from tinfer.sim.spec import Learner, SimSpec
from tinfer.sim.world import SimulationError, World

GENERATION = 0


def simulate(spec: SimSpec) -> SimRun:
    """One run to its end: every request answered, or failed by the scheduler.

    Raises `SimulationError` where a request is never answered, is answered twice, or the
    scheduler's accounts are open when all is over; `ValueError` for a spec that makes no sense.
    """
    if not spec.workers:
        raise ValueError("there is no worker")
    workers = sorted(spec.workers, key=lambda worker: worker.worker_id)
    engines = [
        # Who is not told of preemptions cannot answer them.
        SimEngine(worker.engine, worker.worker_id, place, spec.seed, parks=spec.post_steps)
        for place, worker in enumerate(workers)
    ]
    world = World(engines, spec.requests, spec.message_s, spec.tick_s)
    cluster = Cluster(spec, world)
    world.run(cluster)
    cluster.check_closed()
    return result_of(world)


class Cluster:
    """Drives the scheduler of one run."""

    def __init__(self, spec: SimSpec, world: World) -> None:
        self._spec = spec
        self._world = world
        self._scheduler = Scheduler(spec.scheduler)
        predictor = spec.predictor
        self._learner = predictor if isinstance(predictor, Learner) else None
        self._tickets = {ticket.request.request_id: ticket for ticket in world.tickets}
        self._reported = [0] * len(world.engines)
        for worker in sorted(spec.workers, key=lambda worker: worker.worker_id):
            capacity, role = worker.engine.capacity, worker.role
            self._post(ev.WorkerExpected(worker.worker_id, role), 0.0)
            self._post(ev.WorkerUp(worker.worker_id, GENERATION, role, capacity), 0.0)

    # --- what happens -------------------------------------------------------------------------

    def arrived(self, ticket: Ticket, now_s: float) -> None:
        self._post_steps(now_s)
        request = ticket.request
        arrived = ev.Arrived(
            request.request_id,
            prompt_tokens=request.prompt_tokens,
            max_output_tokens=request.max_output_tokens,
            route=request.route,
            lengths=self._spec.predictor.predict(request),
            block_hashes=request.block_hashes,
        )
        self._post(arrived, now_s)

    def left(self, ticket: Ticket, now_s: float) -> None:
        self._post_steps(now_s)
        self._end(ticket, now_s, "cancelled")
        self._post(ev.Cancelled(ticket.request.request_id), now_s)

    def ticked(self, now_s: float) -> None:
        self._post_steps(now_s)
        self._post(ev.Tick(), now_s)

    def heard(self, outputs: Sequence[Output], now_s: float) -> None:
        self._post_steps(now_s)
        for output in outputs:
            self._post(self._event_of(output, now_s), now_s)

    def _event_of(self, output: Output, now_s: float) -> ev.Event:
        rid, worker_id, ticket = output.job.id, output.worker_id, output.job.ticket
        match output.what:
            case What.FIRST_TOKEN:
                ticket.prefilled_s = now_s
                return ev.FirstToken(rid, worker_id, GENERATION)
            case What.PREFILLED:
                ticket.prefilled_s = now_s
                assert output.lease is not None
                return ev.Prefilled(rid, worker_id, GENERATION, output.lease, output.num_blocks)
            case What.PULLED:
                # What is pulled after a preemption is no hand-off.
                if output.job.kind is Kind.DECODE and ticket.pulled_s is None:
                    ticket.pulled_s = now_s
                return ev.Pulled(rid, worker_id, GENERATION, ok=True)
            case What.LEASE_ENDED:
                assert output.lease is not None
                return ev.LeaseEnded(output.lease)
            case What.FINISHED:
                if not ticket.is_over:
                    self._end(ticket, now_s)
                return ev.WorkerFinished(rid, worker_id, GENERATION, answered=True)
            case What.ABORTED:
                return ev.WorkerFinished(rid, worker_id, GENERATION, answered=False)
            case What.REFUSED:
                if not ticket.is_over:
                    self._end(ticket, now_s, "refused")
                return ev.WorkerFinished(rid, worker_id, GENERATION, answered=False, refused=True)
            case _:
                assert_never(output.what)

    def _end(self, ticket: Ticket, now_s: float, error: str | None = None) -> None:
        """The request is over for its client; who predicts lengths is told then, as on a server."""
        self._world.end(ticket, now_s, error)
        if self._learner is None:
            return
        request = ticket.request
        if error is None:
            # An answer as long as it may be was cut, as far as anybody can tell.
            is_cut = request.output_tokens >= request.max_output_tokens
            end = End.LENGTH if is_cut else End.STOP
            self._learner.observe(request, request.output_tokens, end)
        else:
            end = End.ABORT if error == "cancelled" else End.ERROR
            self._learner.observe(request, num_tokens(ticket), end)

    # --- the scheduler ------------------------------------------------------------------------

    def _post_steps(self, now_s: float) -> None:
        """What the engines have computed that the scheduler does not know of."""
        if not self._spec.post_steps:
            return
        seen_s = self._world.seen_s
        for place, engine in enumerate(self._world.engines):
            report = engine.report(seen_s)
            if report.num_steps != self._reported[place] or engine.has_preempted:
                self._reported[place] = report.num_steps
                stepped = ev.Stepped(
                    engine.worker_id,
                    GENERATION,
                    *report,
                    progress=engine.take_progress(),
                    preempted=engine.take_preempted(),
                )
                self._post(stepped, now_s)

    def _post(self, event: ev.Event, now_s: float) -> None:
        for action in self._scheduler.on_event(event, now_s):
            self._carry_out(action, now_s)

    def _carry_out(self, action: ev.Action, now_s: float) -> None:
        at_s = now_s + self._world.message_s
        engine_of = self._world.engine_of
        match action:
            case ev.StartPrefill(rid, worker_id):
                self._start(rid, engine_of[worker_id], Kind.PREFILL, now_s)
            case ev.StartWhole(rid, worker_id):
                self._start(rid, engine_of[worker_id], Kind.WHOLE, now_s)
            case ev.StartDecode(rid, worker_id, _, lease):
                ticket = self._tickets[rid]
                ticket.workers.append(worker_id)
                engine_of[worker_id].start(at_s, Job(ticket, Kind.DECODE, lease))
            case ev.StartReprefill(prefill_id, rid, worker_id):
                self._reprefill(prefill_id, self._tickets[rid], engine_of[worker_id], now_s)
            case ev.Resume(rid, worker_id, _, lease_or_none):
                engine_of[worker_id].resume(at_s, rid, lease_or_none)
            case ev.AbortOn(rid, worker_id):
                engine_of[worker_id].abort(at_s, rid)
            case ev.SetBudget(worker_id, _, prefill_tokens):
                engine_of[worker_id].set_budget(at_s, prefill_tokens)
            case ev.ReleaseLease(lease):
                engine_of[lease.worker_id].end_lease(at_s, lease)
            case ev.RoleChanged():
                pass  # a label of the scheduler's own: engines know of no roles
            case ev.RoleRefused():
                raise SimulationError("a role was refused, and nobody asks for one here")
            case ev.Drained():
                raise SimulationError("a worker has drained, and none is to be stopped here")
            case ev.ExtendLease():
                raise SimulationError("a lease was extended, and no simulated lease runs out")
            case ev.Fail(rid, cause):
                self._end(self._tickets[rid], now_s, cause)
            case _:
                assert_never(action)

    def _start(self, request_id: str, engine: SimEngine, kind: Kind, now_s: float) -> None:
        ticket = self._tickets[request_id]
        ticket.route = "split" if kind is Kind.PREFILL else "whole"
        ticket.workers.append(engine.worker_id)
        ticket.started_s = now_s
        engine.start(now_s + self._world.message_s, Job(ticket, kind))

    def _reprefill(self, prefill_id: str, ticket: Ticket, engine: SimEngine, now_s: float) -> None:
        """Compute what a request has so far once more, as a prompt whose client nobody is."""
        request = ticket.request
        job = self._world.engine_of[ticket.workers[-1]].parked(request.request_id)
        if job is None:
            raise SimulationError(f"{request.request_id} is prefilled again and has its blocks")
        # Its own answer is of two tokens: a prefill with none to come is not held.
        again = replace(
            request,
            prompt_tokens=request.prompt_tokens + job.num_emitted,
            output_tokens=2,
            max_output_tokens=2,
        )
        reprefills = self._world.reprefills
        reprefill = Ticket(len(reprefills), again, is_over=True)
        reprefill.workers.append(engine.worker_id)
        reprefill.started_s = now_s
        reprefills.append(reprefill)
        engine.start(now_s + self._world.message_s, Job(reprefill, Kind.PREFILL, id=prefill_id))

    def check_closed(self) -> None:
        """Raises `SimulationError` unless all accounts are zero."""
        ledger = self._scheduler.ledger_snapshot()
        if not ledger.is_zero:
            raise SimulationError(f"the scheduler's accounts are open at the end: {ledger}")
