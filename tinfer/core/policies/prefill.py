"""Prefill: in which order requests start, and on which worker."""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.core.fleet import Worker
from tinfer.core.requests import Request

# A decoding sequence as prefill work still to come: 64 steps, half of ShareGPT's median answer of
# 128 tokens, at 0.645 ms each, against 0.25 ms per prefill token. Source: TetriInfer (arXiv
# 2401.11181), section 5 for the median; the two costs are our linear fit to its figure 2.
DECODE_SEQ_WEIGHT_TOKENS = 165


class Fcfs:
    """First come, first served."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, now_s: float) -> None:
        self._requests[request.id] = request

    def discard(self, request: Request) -> None:
        self._requests.pop(request.id, None)

    def first(self, now_s: float) -> Request | None:
        return next(iter(self._requests.values()), None)


class LeastLoaded:
    """The worker with the least work ahead of it, in prefill tokens."""

    def choose(self, request: Request, candidates: Sequence[Worker], now_s: float) -> Worker | None:
        return min(candidates, key=lambda worker: (load_tokens(worker), worker.id))


def load_tokens(worker: Worker) -> int:
    """Work ahead of a worker: prompt tokens outstanding, plus its decoding sequences weighed."""
    num_decoding = worker.num_seqs - worker.num_prefilling
    return worker.outstanding_prefill_tokens + DECODE_SEQ_WEIGHT_TOKENS * num_decoding
