"""Which decode worker takes a prefilled request over."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tinfer.core.policies.interfaces import Admits
from tinfer.core.requests import Request
from tinfer.core.worker import Worker


def anywhere(worker: Worker) -> bool:
    return True


class LeastKv:
    """The worker with the smallest part of its KV blocks spoken for, then the fewest sequences."""

    def choose(
        self, request: Request, candidates: Sequence[Worker], admits: Admits = anywhere
    ) -> Worker | None:
        return min(filter(admits, candidates), key=_kv_load, default=None)


class PowerOfTwo:
    """The paper's dispatcher: of two random workers the one with the lowest heavy:light ratio.

    The two are drawn from the alpha set, the workers with room for what the request will use at
    least; the rest are the beta set (arXiv 2401.11181, section 3.3.4). The paper does not say what
    happens when alpha is empty: here the two come from beta then, since the request has to go
    somewhere and waits there for room. Ratios that are equal go by KV in use.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"power of two {seed}")

    def choose(
        self, request: Request, candidates: Sequence[Worker], admits: Admits = anywhere
    ) -> Worker | None:
        admitted = [worker for worker in candidates if admits(worker)]
        if not admitted:
            return None
        needed_tokens = request.prompt_tokens + request.lengths.low
        alpha = [worker for worker in admitted if needed_tokens <= worker.free_tokens]
        drawn_from = alpha or admitted
        drawn = self._rng.sample(drawn_from, min(2, len(drawn_from)))
        return min(drawn, key=lambda worker: (heavy_to_light(worker), *_kv_load(worker)))


class Projected:
    """The worker on which the request costs least, of all: exact state needs no sampling.

    Cost is what it adds to time per token, its own and its neighbours', as a share of a step; and
    how full the worker's KV will be at its peak, which counts the more the closer it is to full:
    what overflows is computed twice.
    """

    def choose(
        self, request: Request, candidates: Sequence[Worker], admits: Admits = anywhere
    ) -> Worker | None:
        """How full a cache gets takes longest to say and only adds: it is looked at last."""
        best: tuple[float, str, Worker] | None = None
        for least, _, worker in sorted(
            (step_cost(request, one), one.id, one) for one in candidates
        ):
            if best is not None and best[0] < least:
                break
            if admits(worker):
                cost = (least + crowding(request, worker), worker.id, worker)
                best = cost if best is None else min(best, cost)
        return None if best is None else best[2]


def step_cost(request: Request, worker: Worker) -> float:
    """In steps of one sequence alone: its own step there, and what it adds to its neighbours'."""
    costs = worker.costs
    added_s = costs.decode_seq_s + costs.kv_token_s * request.prompt_tokens
    both_s = worker.coming_step_s + added_s + worker.num_decoding * added_s
    alone_s = costs.decode_step_s(1, request.prompt_tokens)
    return both_s * worker.pace / alone_s


def crowding(request: Request, worker: Worker) -> float:
    """What a KV cache that will be full costs, in steps of one sequence alone.

    Nothing while its expected peak with the request stays under half; from there it rises, to as
    much as ten neighbours' steps at full: what overflows is computed twice.
    """
    capacity_tokens = max(1, worker.capacity_tokens)
    if worker.most_kv_tokens + request.prompt_tokens + request.lengths.points[-1] < (
        capacity_tokens // 2
    ):
        return 0.0  # even if every answer were as long as it can be
    over = worker.peak_with(request).expected / capacity_tokens - 0.5
    return 40.0 * over * over if over > 0.0 else 0.0


def heavy_to_light(worker: Worker) -> float:
    """Heavy decodes per light one among the requests placed there."""
    num_heavy = sum(one.lengths.is_heavy for one in worker.requests.values())
    return num_heavy / max(1, worker.num_seqs - num_heavy)


def _kv_load(worker: Worker) -> tuple[float, int, str]:
    part = worker.num_projected_blocks / max(1, worker.capacity.num_blocks)
    return (part, worker.num_seqs, worker.id)
