"""Split or whole, and where: the way that costs least, the request itself and its neighbours.

Costs are delays as shares of what a request would take alone, since that is what service levels are
set by and what a user notices: a short prompt that waits for a long one is worse off than the long
one that waits for it. Of a way to compute a request counted are

- its own time to first token: what is ahead of it where it prefills, its own prefill, in steps
  with all that decodes there;
- its own time per token: a step of the batch it joins, and how often prefills interrupt that
  batch, by what the worker's steps were spent on lately;
- what its prefill takes from those that decode where it is computed: each waits for it once, which
  costs the more the shorter its answer is;
- what its decode takes from those it decodes with: each step of theirs gets longer.

No role is asked: where one kind of work is all there is, every worker does it, as replicas would;
where both kinds are and disturb each other, prefills gather where little decodes, since that costs
less, and the requests that they would interrupt decode elsewhere for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
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
FULL_SHARE = 0.85


class Way(NamedTuple):
    """One way to compute a request; `reader` decodes it where it is split."""

    cost: float
    route: Route
    worker: Worker
    reader: Worker


class AutoPlacer:
    """Takes the cheapest way, or waits for the worker with which it starts."""

    num_tried = 8

    def __init__(self, admission: DecodeAdmission, demand: Demand) -> None:
        self._admission = admission
        self._demand = demand

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None:
        ways = self._ways(request, fleet, ahead_tokens, now_s)
        best = min(ways, key=_rank, default=None)
        if best is None or not best.worker.takes(request):
            return None
        return Placement(best.route, best.worker)

    def _ways(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Iterator[Way]:
        ends_at_once = request.max_output_tokens == 1
        shares = self._prefill_shares(fleet, now_s)
        decode_costs = {
            worker.id: 0.0 if ends_at_once else decode_cost(request, worker, shares[worker.id])
            for worker in fleet.workers
        }
        for worker in fleet.open_to_whole():
            if self._admission.admits(request, worker, now_s):
                start = prefill_cost(request, worker, ahead_tokens, fleet.num_taking)
                cost = start + decode_costs[worker.id]
                yield Way(cost, Route.WHOLE, worker, worker)
        if ends_at_once:
            return
        for source in fleet.split_sources:
            readers = fleet.readers(source.role)
            reader = min(readers, key=lambda one: (decode_costs[one.id], one.id))
            start = prefill_cost(request, source, ahead_tokens, fleet.num_taking)
            moving_s = source.costs.handoff_total_s(request.prompt_tokens)
            moved = TPOT_WEIGHT * moving_s / _answer_alone_s(request, reader)
            yield Way(start + moved + decode_costs[reader.id], Route.SPLIT, source, reader)

    def _prefill_shares(self, fleet: Fleet, now_s: float) -> dict[str, float]:
        """Of each worker's time, what prompts will take if they gather on prefill workers.

        What those cannot take, at `FULL_SHARE` of their time, the others share.
        """
        _, prompt_rate, _ = self._demand.rates(now_s)
        takers = [one for one in fleet.workers if one.role is Role.PREFILL] or fleet.workers
        others = [one for one in fleet.workers if one not in takers]
        wanted = sum(one.costs.prefill_token_s * one.slowness for one in takers) / len(takers)
        wanted *= prompt_rate
        taken = min(FULL_SHARE, wanted / len(takers))
        left = min(FULL_SHARE, max(0.0, wanted - taken * len(takers)) / max(1, len(others)))
        return {one.id: taken if one in takers else left for one in fleet.workers}


def _rank(way: Way) -> tuple[float, bool, str, str]:
    return (way.cost, way.route is Route.SPLIT, way.worker.id, way.reader.id)


def prefill_cost(request: Request, worker: Worker, ahead_tokens: int, num_taking: int) -> float:
    """Of computing the prompt there, behind its share of what waits ahead."""
    chunk_tokens = worker.capacity.chunk_tokens
    alone_s = worker.costs.prefill_s(request.prompt_tokens, chunk_tokens)
    num_new = worker.uncached_tokens(request)
    before_tokens = worker.ahead_tokens(num_new) + ahead_tokens // max(1, num_taking)
    own_s = worker.prefill_s(num_new + before_tokens)
    longer = worker.num_longer(num_new)
    if longer:  # the step under way ends first
        own_s += worker.prefill_s(worker.step_prefill_tokens) / 2.0
    taken_s = worker.costs.prefill_token_s * num_new * worker.slowness
    # One token of an answer of L tokens, late by a second, makes each of them late by 1 / L.
    stalled = taken_s * worker.sum_inverse_lengths / worker.costs.decode_step_s(1, 0)
    delayed = longer * taken_s / worker.costs.prefill_s(2 * num_new, chunk_tokens)
    return TTFT_WEIGHT * (own_s / alone_s + delayed) + TPOT_WEIGHT * stalled


def decode_cost(request: Request, worker: Worker, prefill_share: float) -> float:
    """Of generating the answer there."""
    alone_s = worker.costs.decode_step_s(1, request.prompt_tokens)
    before_s = worker.decode_step_s()
    after_s = worker.decode_step_s(1, request.prompt_tokens)
    # A share u of the time goes to prefills: a step that takes s takes s / (1 - u) with them.
    interrupted = 1.0 / (1.0 - prefill_share)
    mine = after_s * worker.slowness * interrupted / alone_s
    together = min(1.0, request.lengths.mean_remaining() * worker.mean_inverse_length)
    theirs = worker.num_decoding * together * (after_s - before_s) * worker.slowness / alone_s
    return TPOT_WEIGHT * (mine + theirs) + crowding(request, worker)


def _answer_alone_s(request: Request, worker: Worker) -> float:
    return request.lengths.mean_remaining() * worker.costs.decode_step_s(1, request.prompt_tokens)
