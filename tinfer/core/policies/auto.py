"""Split or whole, and where: the way that costs least, the request itself and its neighbours.

Costs are delays as shares of what a request would take alone, since that is what service levels are
set by and what a user notices: a short prompt that waits for a long one is worse off than the long
one that waits for it. Of a way to compute a request counted are

- its own time to first token: what is ahead of it where it prefills, its own prefill, in steps
  with all that decodes there;
- its own time per token: a step of the batch it joins, and how often prompts will interrupt that
  batch, by what arrives lately and where it gathers;
- what its prefill takes from those that decode where it is computed: each waits for it once, which
  costs the more the shorter its answer is;
- what its decode takes from those it decodes with: each step of theirs gets longer.

Any worker may do anything: where one kind of work is all there is, every worker does it, as
replicas would. Roles only say where prompts gather, as far as those workers keep up with them.
Without that, two workers that decode alike would go on to share the prompts alike, since each
request for itself has no reason to begin keeping one of them free; with it, what prompts would
interrupt decodes elsewhere, and so prompts cost least where nothing decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.policies.decode import crowding
from tinfer.core.policies.interfaces import DecodeAdmission, Placement
from tinfer.core.requests import Request
from tinfer.core.types import Role, Route
from tinfer.core.worker import Worker

# How much of its bound a request's delay uses up; the loose service level of our own comparisons
# has TTFT within 5 and TPOT within 4 times what a request takes alone.
TTFT_WEIGHT = 1.0 / 5.0
TPOT_WEIGHT = 1.0 / 4.0
# Of a prefill worker's time, what prompts may take before others take some of them too.
FULL_SHARE = 0.85


class Way(NamedTuple):
    """One way to compute a request."""

    cost: float
    placement: Placement


class AutoPlacer:
    """Takes the cheapest way, or waits for the worker with which it starts."""

    num_tried = 2

    def __init__(self, admission: DecodeAdmission, demand: Demand) -> None:
        self._admission = admission
        self._demand = demand

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None:
        if not any(worker.takes(request) for worker in fleet.workers):
            return None
        idle = alone(request, fleet.workers[0])
        ahead_tokens //= max(1, fleet.num_taking)
        starts = {
            worker.id: prefill_cost(request, worker, ahead_tokens, idle) for worker in fleet.workers
        }
        if request.max_output_tokens == 1:
            worker = min(fleet.workers, key=lambda one: (starts[one.id], one.id))
            return Placement(Route.WHOLE, worker) if worker.takes(request) else None
        takers_share, others_share = self._prefill_shares(fleet, now_s)
        decodes = {
            one.id: decode_cost(
                request, one, takers_share if one.role is Role.PREFILL else others_share, idle
            )
            for one in fleet.workers
        }
        best = self._best_whole(request, fleet, starts, decodes, now_s)
        best = self._best_split(request, fleet, starts, decodes, idle, best)
        if best is None or not best.placement.worker.takes(request):
            return None
        return best.placement

    def _best_whole(
        self,
        request: Request,
        fleet: Fleet,
        starts: Mapping[str, float],
        decodes: Mapping[str, float],
        now_s: float,
    ) -> Way | None:
        """On one worker. How full its cache gets only adds to a cost, so it is looked at last."""
        best: Way | None = None
        costs = [(starts[one.id] + decodes[one.id], one.id, one) for one in fleet.open_to_whole()]
        for least, _, worker in sorted(costs):
            if best is not None and best.cost <= least:
                break
            if not self._admission.admits(request, worker, now_s):
                continue
            cost = least + TPOT_WEIGHT * crowding(request, worker)
            if best is None or cost < best.cost:
                best = Way(cost, Placement(Route.WHOLE, worker))
        return best

    def _best_split(
        self,
        request: Request,
        fleet: Fleet,
        starts: Mapping[str, float],
        decodes: Mapping[str, float],
        idle: Alone,
        best: Way | None,
    ) -> Way | None:
        """On two, or `best` where that costs no more and so moves nothing for nothing.

        What the first worker costs does not depend on the second, but for who may read it.
        """
        for role in dict.fromkeys(source.role for source in fleet.split_sources):
            sources = [one for one in fleet.split_sources if one.role is role]
            source = min(sources, key=lambda one: (starts[one.id], one.id))
            moving_s = source.costs.handoff_total_s(request.prompt_tokens)
            moved = TPOT_WEIGHT * (moving_s / (request.expected_tokens * idle.step_s))
            start = starts[source.id]
            readers = [
                (decodes[one.id], one.id, one) for one in fleet.readers(role) if one is not source
            ]
            for least, _, reader in sorted(readers):
                if best is not None and best.cost <= start + least + moved:
                    break
                cost = start + (least + TPOT_WEIGHT * crowding(request, reader)) + moved
                if best is None or cost < best.cost:
                    best = Way(cost, Placement(Route.SPLIT, source))
        return best

    def _prefill_shares(self, fleet: Fleet, now_s: float) -> tuple[float, float]:
        """What prompts will take of a prefill worker's time and of another's, if they gather on
        prefill workers, or without any of those on all.

        What those cannot take, at `FULL_SHARE` of their time, the others share.
        """
        _, prompt_rate, _ = self._demand.rates(now_s)
        takers = [one for one in fleet.workers if one.role is Role.PREFILL] or fleet.workers
        num_takers, num_others = len(takers), len(fleet.workers) - len(takers)
        wanted = sum([one.costs.prefill_token_s * one.pace for one in takers]) / num_takers
        wanted *= prompt_rate
        taken = min(FULL_SHARE, wanted / num_takers)
        if not num_others:
            return taken, taken
        return taken, min(FULL_SHARE, max(0.0, wanted - taken * num_takers) / num_others)


class Alone(NamedTuple):
    """What a request would take on an idle worker: its prefill, and a step of its decode."""

    prefill_s: float
    step_s: float


def alone(request: Request, worker: Worker) -> Alone:
    """By the cost model, which is the same for all workers."""
    costs = worker.costs
    return Alone(
        costs.prefill_s(request.prompt_tokens, worker.capacity.chunk_tokens),
        costs.decode_step_s(1, request.prompt_tokens),
    )


def prefill_cost(request: Request, worker: Worker, ahead_tokens: int, idle: Alone) -> float:
    """Of computing the prompt there, behind `ahead_tokens` that wait for a worker like it."""
    num_new = worker.uncached_tokens(request)
    before_tokens, num_longer = worker.around(num_new)
    own_s = worker.prefill_s(num_new + before_tokens + ahead_tokens)
    taken_s = worker.costs.prefill_token_s * num_new * worker.pace
    # One token of an answer of L tokens, late by a second, makes each of them late by 1 / L.
    stalled = taken_s * worker.sum_inverse_lengths / idle.step_s
    delayed = 0.0
    if num_longer:  # they wait for it, and it for the step under way
        own_s += worker.prefill_s(worker.step_prefill_tokens) / 2.0
        delayed = num_longer * taken_s / (2.0 * idle.prefill_s)
    return TTFT_WEIGHT * (own_s / idle.prefill_s + delayed) + TPOT_WEIGHT * stalled


def decode_cost(request: Request, worker: Worker, prefill_share: float, idle: Alone) -> float:
    """Of generating the answer there."""
    costs = worker.costs
    added_s = costs.decode_seq_s + costs.kv_token_s * request.prompt_tokens
    # A share u of the time goes to prefills: a step that takes s takes s / (1 - u) with them.
    mine_s = (worker.coming_step_s + added_s) / (1.0 - prefill_share)
    together = min(1.0, request.expected_tokens * worker.mean_inverse_length)
    theirs_s = worker.num_decoding * together * added_s
    return TPOT_WEIGHT * (mine_s + theirs_s) * worker.pace / idle.step_s
