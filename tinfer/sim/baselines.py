"""The same engines without tinfer's scheduler: what it is compared with.

*Replicas*: N plain engines behind a balancer that knows every outstanding token, as the one of
`tinfer bench compare` does. The paper's vLLM is one replica over all devices, with 16 sequences
and without chunked prefill (see `presets`). *Static hybrid*: prompts under some length whole on a
decode worker, all others split; no queue but the engines' own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from tinfer.core.types import LeaseKey, Role, Route
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Job, Kind, Output, Ticket, What
from tinfer.sim.results import SimRun, Slo, result_of
from tinfer.sim.spec import (
    MESSAGE_S,
    EngineSpec,
    Positive,
    Seconds,
    SimRequest,
    WorkerSpec,
)
from tinfer.sim.world import World

# The service levels of `tinfer bench compare`: times the class's unloaded median.
TTFT_FACTOR = 5.0
TPOT_FACTORS = {"loose": 4.0, "tight": 2.0}
NUM_UNLOADED_PER_CLASS = 20


class ReplicasSpec(Struct, frozen=True, kw_only=True):
    """One run of plain engines, all alike, behind the balancer."""

    engine: EngineSpec
    num_replicas: Positive
    requests: tuple[SimRequest, ...]
    message_s: Seconds = MESSAGE_S
    seed: int = 0


class HybridSpec(Struct, frozen=True, kw_only=True):
    """One run of the static hybrid: a prompt of fewer than `split_from_tokens` is not split.

    Each long prompt goes to the prefill worker with the least outstanding tokens, each short one
    and each hand-off to the decode worker with the least.
    """

    workers: tuple[WorkerSpec, ...]
    requests: tuple[SimRequest, ...]
    split_from_tokens: Annotated[int, Meta(ge=0)]
    message_s: Seconds = MESSAGE_S
    seed: int = 0


def simulate_replicas(spec: ReplicasSpec) -> SimRun:
    """One run to its end. Raises `SimulationError` if that never comes."""
    engines = [
        SimEngine(spec.engine, f"replica-{place:03d}", place, spec.seed)
        for place in range(spec.num_replicas)
    ]
    world = World(engines, spec.requests, spec.message_s)
    world.run(_Replicas(world, world.engines))
    return result_of(world)


def simulate_hybrid(spec: HybridSpec) -> SimRun:
    """One run to its end. Raises `SimulationError` if that never comes, `ValueError` where prefill
    or decode workers are missing."""
    workers = sorted(spec.workers, key=lambda worker: worker.worker_id)
    engines = [
        SimEngine(worker.engine, worker.worker_id, place, spec.seed)
        for place, worker in enumerate(workers)
    ]
    world = World(engines, spec.requests, spec.message_s)
    roles = {worker.worker_id: worker.role for worker in workers}
    by_role = {
        role: [engine for engine in world.engines if roles[engine.worker_id] is role]
        for role in (Role.PREFILL, Role.DECODE)
    }
    if not all(by_role.values()):
        raise ValueError("the static hybrid needs a prefill and a decode worker")
    world.run(_Hybrid(world, by_role[Role.PREFILL], by_role[Role.DECODE], spec.split_from_tokens))
    return result_of(world)


def unloaded_slos(
    engine: EngineSpec, requests: Sequence[SimRequest], message_s: float = MESSAGE_S
) -> dict[str, dict[str, Slo]]:
    """The bounds of each class at each level, from what the class takes on one idle plain replica.

    TTFT within 5 times, TPOT within 4 (loose) or 2 times (tight) the median of the class's first
    20 requests, each computed alone. Source: `tinfer bench compare`.
    """
    by_task: defaultdict[str, list[SimRequest]] = defaultdict(list)
    for request in requests:
        if len(by_task[request.task]) < NUM_UNLOADED_PER_CLASS:
            by_task[request.task].append(replace(request, arrival_s=0.0, patience_s=None))
    alone = {
        task: [_alone(engine, request, message_s) for request in some]
        for task, some in by_task.items()
    }
    return {
        level: {task: _slo(runs, factor) for task, runs in alone.items()}
        for level, factor in TPOT_FACTORS.items()
    }


def _alone(engine: EngineSpec, request: SimRequest, message_s: float) -> SimRun:
    return simulate_replicas(
        ReplicasSpec(engine=engine, num_replicas=1, requests=(request,), message_s=message_s)
    )


def _slo(runs: Sequence[SimRun], tpot_factor: float) -> Slo:
    whole = [run.requests[0] for run in runs if run.requests[0].ok]
    ttfts_s = [one.ttft_s for one in whole if one.ttft_s is not None]
    tpots_s = [one.tpot_s for one in whole if one.tpot_s is not None]
    return Slo(
        ttft_s=TTFT_FACTOR * median(ttfts_s) if ttfts_s else None,
        tpot_s=tpot_factor * median(tpots_s) if tpots_s else None,
    )


class _Replicas:
    """Each request whole, on the engine with the least outstanding tokens."""

    def __init__(self, world: World, engines: Sequence[SimEngine]) -> None:
        self._world = world
        self._engines = engines

    def arrived(self, ticket: Ticket, now_s: float) -> None:
        self._start(ticket, Kind.WHOLE, self._engines, now_s)

    def _start(
        self, ticket: Ticket, kind: Kind, engines: Sequence[SimEngine], now_s: float
    ) -> None:
        seen_s = self._world.seen_s
        engine = min(engines, key=lambda one: (one.outstanding_tokens(seen_s), one.place))
        route = Route.SPLIT if kind is Kind.PREFILL else Route.WHOLE
        ticket.route = route.value
        ticket.started_s = now_s
        ticket.workers.append(engine.worker_id)
        engine.start(now_s + self._world.message_s, Job(ticket, kind))

    def heard(self, outputs: Sequence[Output], now_s: float) -> None:
        for output in outputs:
            self._hear(output, now_s)

    def _hear(self, output: Output, now_s: float) -> None:
        ticket = output.job.ticket
        if output.what is What.FINISHED and not ticket.is_over:
            self._world.end(ticket, now_s)
        elif output.what is What.REFUSED and not ticket.is_over:
            self._world.end(ticket, now_s, error="refused")

    def left(self, ticket: Ticket, now_s: float) -> None:
        self._world.end(ticket, now_s, error="cancelled")
        at_s = now_s + self._world.message_s
        for worker_id in ticket.workers:
            self._world.engine_of[worker_id].abort(at_s, ticket.request.request_id)

    def ticked(self, now_s: float) -> None:
        return


class _Hybrid(_Replicas):
    """Short prompts whole on a decode worker, long ones split."""

    def __init__(
        self,
        world: World,
        prefill: Sequence[SimEngine],
        decode: Sequence[SimEngine],
        split_from_tokens: int,
    ) -> None:
        super().__init__(world, decode)
        self._prefill = prefill
        self._split_from_tokens = split_from_tokens

    def arrived(self, ticket: Ticket, now_s: float) -> None:
        if ticket.request.prompt_tokens < self._split_from_tokens:
            self._start(ticket, Kind.WHOLE, self._engines, now_s)
        else:
            self._start(ticket, Kind.PREFILL, self._prefill, now_s)

    def _hear(self, output: Output, now_s: float) -> None:
        super()._hear(output, now_s)
        ticket = output.job.ticket
        if output.what is What.PREFILLED:
            ticket.prefilled_s = now_s
            self._hand_off(output, now_s)
        elif output.what is What.PULLED:
            ticket.pulled_s = now_s
        elif output.what is What.REFUSED and output.job.lease is not None:
            # It fits on no decode worker, so nobody will read what was prefilled.
            self._end_lease(output.job.lease, now_s)

    def _hand_off(self, output: Output, now_s: float) -> None:
        ticket, lease = output.job.ticket, output.lease
        assert lease is not None
        if ticket.is_over:
            return self._end_lease(lease, now_s)
        seen_s = self._world.seen_s
        engine = min(self._engines, key=lambda one: (one.outstanding_tokens(seen_s), one.place))
        ticket.workers.append(engine.worker_id)
        engine.start(now_s + self._world.message_s, Job(ticket, Kind.DECODE, lease))

    def _end_lease(self, lease: LeaseKey, now_s: float) -> None:
        owner = self._world.engine_of[lease.worker_id]
        owner.end_lease(now_s + self._world.message_s, lease)
