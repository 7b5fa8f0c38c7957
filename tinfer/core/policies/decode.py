"""Decode: which worker takes over a prefilled request, and when it has room."""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.core.fleet import Worker
from tinfer.core.requests import Request


class LeastKvLoad:
    """The worker with the smallest part of its KV blocks spoken for, then the fewest sequences."""

    def choose(self, request: Request, candidates: Sequence[Worker], now_s: float) -> Worker | None:
        return min(candidates, key=_kv_load)


class Greedy:
    """Admit while a seat is free and the blocks for the prompt and one more token are.

    An empty worker admits even a request larger than all of it: the engine has the last word.
    """

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool:
        num_used = worker.num_projected_blocks
        fits = num_used + worker.blocks_for(request) <= worker.capacity.num_blocks
        return worker.has_seat and (fits or num_used == 0)


def _kv_load(worker: Worker) -> tuple[float, int, str]:
    part = worker.num_projected_blocks / max(1, worker.capacity.num_blocks)
    return (part, worker.num_seqs, worker.id)
