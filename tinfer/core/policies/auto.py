"""Split or whole, and where: the way after which everybody together is done soonest.

The cost of a way is time: by how many seconds answers end later because of it, the request's own
and its neighbours', in sum. Of a way to compute a request counted are

- its own time to first token: what is ahead of it where it prefills, its own prefill, in steps
  with all that decodes there; as far as it has to wait, that who comes after it will too; and
  that a first token which is late by the prompt's own measure is worth less;
- its own decode: steps of the batch it joins, stretched by how often prompts will interrupt them,
  by what arrives lately and where it gathers;
- what its prefill takes from those that decode where it is computed, and from the longer prompts
  that it overtakes: each waits for it once;
- what its decode takes from those it decodes with: each step of theirs gets longer;
- the move, if it is split, and a KV cache that will be full.

Any worker may do anything: where one kind of work is all there is, every worker does it, as
replicas would. Roles only say where prompts gather, as far as those workers keep up with them.
Without that, two workers that decode alike would go on to share the prompts alike, since each
request for itself has no reason to begin keeping one of them free; with it, what prompts would
interrupt decodes elsewhere, and so prompts cost least where nothing decodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.policies.decode import crowding
from tinfer.core.policies.interfaces import DecodeAdmission, Placement
from tinfer.core.requests import Request
from tinfer.core.types import Role, Route
from tinfer.core.worker import Worker

# Of a prefill worker's time, what prompts may take before others take some of them too.
FULL_SHARE = 0.85
# The same as it counts for those who wait: a queue in front of a worker with more to do than it has
# time for only ends when something starts elsewhere.
FULL_LOAD = 0.9
# Of a second's wait where a share u of the time is taken, u / (1 - u) falls on those who come
# after, if they go by order of arrival. Where the shortest goes first, only those fall behind a
# prompt that are longer: exp(-`LONGER` * its length / the mean length) of them. Like all numbers
# here but `FULL_LOAD` (of the cells with long prompts alone) the best of sweeps over 25 cells of
# `benchmarks/sim_grid.py`.
FOLLOWING_PART = 1.5
LONGER = 1.5
# A first token counts as late from 2.5 times on what the prompt takes alone, in full from 5 times:
# the loose service level of `tinfer bench compare`. As much as that part of the whole request it
# then costs: a short prompt is not made to wait for a long one where a moment each from many that
# decode, which none of them will notice, gets it through.
LATE_AT = 5.0
LATE_FROM = 2.5
LATE_PART = 0.2
# Of `crowding`, which is in steps of one sequence per token.
CROWDING_PART = 0.25


class Start(NamedTuple):
    """A prefill on some worker: `wait_s` until it begins, `own_s` until its first token, and what
    it takes from others there, in sum."""

    wait_s: float
    own_s: float
    others_s: float

    @property
    def cost_s(self) -> float:
        return self.own_s + self.others_s


class Way(NamedTuple):
    """One way to compute a request."""

    cost_s: float
    placement: Placement


class AutoPlacer:
    """Takes the cheapest way, or waits for the worker with which it starts."""

    num_tried = 2

    def __init__(self, admission: DecodeAdmission, demand: Demand, shortest_first: bool) -> None:
        self._admission = admission
        self._demand = demand
        self._shortest_first = shortest_first

    def place(
        self, request: Request, fleet: Fleet, ahead_tokens: int, now_s: float
    ) -> Placement | None:
        if not any(worker.takes(request) for worker in fleet.staying):
            return None
        ahead_tokens //= max(1, fleet.num_taking)
        request_rate, prompt_rate, _ = self._demand.rates(now_s)
        takers, others = prefill_shares(fleet, prompt_rate)
        following = FOLLOWING_PART
        if self._shortest_first:
            lengths = request.prompt_tokens * request_rate / max(1.0, prompt_rate)
            following *= math.exp(-LONGER * lengths)
        starts, decodes = {}, {}
        for one in fleet.staying:
            share = takers if one.role is Role.PREFILL else others
            load = min(FULL_LOAD, share)
            start = start_of(request, one, ahead_tokens)
            starts[one.id] = start.cost_s + following * start.wait_s * load / (1.0 - load)
            starts[one.id] += late_s(request, one, now_s - request.arrived_s + start.own_s)
            decodes[one.id] = decode_cost_s(request, one, min(FULL_SHARE, share))
        if request.max_output_tokens == 1:
            worker = min(fleet.staying, key=lambda one: (starts[one.id], one.id))
            return Placement(Route.WHOLE, worker) if worker.takes(request) else None
        best = self._best_whole(request, fleet, starts, decodes, now_s)
        best = self._best_split(request, fleet, starts, decodes, best)
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
        for least_s, _, worker in sorted(costs):
            if best is not None and best.cost_s <= least_s:
                break
            if not self._admission.admits(request, worker, now_s):
                continue
            cost_s = least_s + crowding_s(request, worker)
            if best is None or cost_s < best.cost_s:
                best = Way(cost_s, Placement(Route.WHOLE, worker))
        return best

    def _best_split(
        self,
        request: Request,
        fleet: Fleet,
        starts: Mapping[str, float],
        decodes: Mapping[str, float],
        best: Way | None,
    ) -> Way | None:
        """On two, or `best` where that costs no more and so moves nothing for nothing.

        What the first worker costs does not depend on the second, but for who may read it.
        """
        for role in dict.fromkeys(source.role for source in fleet.split_sources):
            sources = [one for one in fleet.split_sources if one.role is role]
            source = min(sources, key=lambda one: (starts[one.id], one.id))
            moving_s = source.costs.handoff_total_s(request.prompt_tokens)
            start_s = starts[source.id] + moving_s
            readers = [
                (decodes[one.id], one.id, one) for one in fleet.readers(role) if one is not source
            ]
            for least_s, _, reader in sorted(readers):
                if best is not None and best.cost_s <= start_s + least_s:
                    break
                cost_s = start_s + least_s + crowding_s(request, reader)
                if best is None or cost_s < best.cost_s:
                    best = Way(cost_s, Placement(Route.SPLIT, source))
        return best


def prefill_shares(fleet: Fleet, prompt_rate: float) -> tuple[float, float]:
    """What prompts will take of a prefill worker's time and of another's, if they gather on
    prefill workers, or without any of those on all.

    What those cannot take, at `FULL_SHARE` of their time, the others share. More than 1 is more
    than they have time for.
    """
    takers = [one for one in fleet.staying if one.role is Role.PREFILL] or fleet.staying
    num_takers, num_others = len(takers), len(fleet.staying) - len(takers)
    wanted = sum([one.costs.prefill_token_s * one.pace for one in takers]) / num_takers
    wanted *= prompt_rate
    share = wanted / num_takers
    if not num_others:
        return share, share
    return share, max(0.0, wanted - min(FULL_SHARE, share) * num_takers) / num_others


def start_of(request: Request, worker: Worker, ahead_tokens: int = 0) -> Start:
    """Computing the prompt there, behind `ahead_tokens` that wait for a worker like it."""
    num_new = worker.uncached_tokens(request)
    before_tokens, num_longer = worker.around(num_new)
    wait_s = worker.queued_s(before_tokens + ahead_tokens)
    if num_longer:  # they wait for it, and it for the step under way
        wait_s += worker.queued_s(worker.step_prefill_tokens) / 2.0
    own_s = wait_s + worker.prefill_s(num_new)
    return Start(wait_s, own_s, (num_longer + worker.num_decoding) * worker.taken_s(num_new))


def late_s(request: Request, worker: Worker, ttft_s: float) -> float:
    """What a first token after so long costs because it is late."""
    costs = worker.costs
    alone_s = costs.prefill_s(request.prompt_tokens, worker.capacity.chunk_tokens) * worker.pace
    if alone_s <= 0.0:
        return 0.0
    lateness = (ttft_s / alone_s - LATE_FROM) / (LATE_AT - LATE_FROM)
    if lateness <= 0.0:
        return 0.0
    decode_s = request.expected_tokens * costs.decode_step_s(1, request.prompt_tokens)
    return LATE_PART * min(1.0, lateness) * (alone_s + decode_s)


def decode_cost_s(request: Request, worker: Worker, prefill_share: float) -> float:
    """Of generating the answer there."""
    costs = worker.costs
    added_s = costs.decode_seq_s + costs.kv_token_s * request.prompt_tokens
    # A share u of the time goes to prefills: a step that takes s takes s / (1 - u) with them.
    step_s = (worker.coming_step_s + added_s) / (1.0 - prefill_share)
    own_tokens = their_tokens = request.expected_tokens
    if worker.num_decoding:
        their_tokens = min(own_tokens, 1.0 / worker.mean_inverse_length)
    theirs_s = worker.num_decoding * their_tokens * added_s
    return (own_tokens * step_s + theirs_s) * worker.pace


def crowding_s(request: Request, worker: Worker) -> float:
    """What a KV cache that will be full costs."""
    step_s = worker.costs.decode_step_s(1, request.prompt_tokens)
    return CROWDING_PART * crowding(request, worker) * request.expected_tokens * step_s
