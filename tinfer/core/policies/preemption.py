"""Where a request whose blocks were lost has them computed again: where it was, or elsewhere.

Where it was, its tokens are computed in chunks beside all that decodes there, as far as that
worker's prefill budget lets them. Elsewhere they are a prefill like any other, and move.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.core.policies.auto import start_of
from tinfer.core.policies.prefill import finish_s
from tinfer.core.requests import Request
from tinfer.core.worker import Worker


class Here:
    """Where it was: what vLLM does."""

    def source(self, again: Request, worker: Worker, candidates: Sequence[Worker]) -> Worker | None:
        return None


class Elsewhere:
    """On the worker that has it computed first, wherever there is one."""

    def source(self, again: Request, worker: Worker, candidates: Sequence[Worker]) -> Worker | None:
        return min(candidates, key=lambda one: (finish_s(again, one), one.id), default=None)


class Cheapest:
    """Where it delays the request and its neighbours least, the move counted.

    Both ways are priced as `auto` prices them. What a prefix cache still has of the prompt is saved
    work on either side.
    """

    def source(self, again: Request, worker: Worker, candidates: Sequence[Worker]) -> Worker | None:
        costs_s = {one.id: start_of(again, one).cost_s for one in (worker, *candidates)}
        best = min(candidates, key=lambda one: (costs_s[one.id], one.id), default=None)
        if best is None:
            return None
        moving_s = best.costs.handoff_total_s(again.prompt_tokens)
        return best if costs_s[best.id] + moving_s < costs_s[worker.id] else None
