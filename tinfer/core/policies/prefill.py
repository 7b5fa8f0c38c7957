"""On which worker a prompt is computed."""

from __future__ import annotations

from collections.abc import Sequence

from tinfer.core.requests import Request
from tinfer.core.worker import Worker

# A decoding sequence as prefill work still to come: 64 steps, half of ShareGPT's median answer of
# 128 tokens, at 0.645 ms each, against 0.25 ms per prefill token. Source: TetriInfer (arXiv
# 2401.11181), section 5 for the median; the two costs are our linear fit to its figure 2.
DECODE_SEQ_WEIGHT_TOKENS = 165


class LeastLoaded:
    """The worker with the least work ahead of it, in prefill tokens."""

    def choose(self, request: Request, candidates: Sequence[Worker], now_s: float) -> Worker | None:
        return min(candidates, key=lambda worker: (load_tokens(worker), worker.id))


class EarliestFinish:
    """The worker that has the prompt computed first; a prefix that it has is work saved.

    The price of a hit is what it saves and no more: a worker that has the prefix and a long queue
    loses to an idle one that has not.
    """

    def choose(self, request: Request, candidates: Sequence[Worker], now_s: float) -> Worker | None:
        return min(candidates, key=lambda worker: (finish_s(request, worker), worker.id))


def load_tokens(worker: Worker) -> int:
    """Work ahead of a worker: prompt tokens outstanding, plus its decoding sequences weighed."""
    num_decoding = worker.num_seqs - len(worker.prefilling)
    return worker.outstanding_prefill_tokens + DECODE_SEQ_WEIGHT_TOKENS * num_decoding


def finish_s(request: Request, worker: Worker, ahead_tokens: int = 0) -> float:
    """Seconds until the prompt would be computed there, behind what is there and `ahead_tokens`."""
    own_s = worker.prefill_s(worker.uncached_tokens(request))
    before_tokens = worker.outstanding_prefill_tokens + ahead_tokens
    return own_s + (worker.prefill_s(before_tokens) if before_tokens else 0.0)
