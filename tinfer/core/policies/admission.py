"""When a decode worker takes a request over: the paper's three modes and ours.

A mode is a gate on what a request will need; blocks are still allocated as it grows. Every mode
leaves an empty worker open to a request larger than all of it: the engine has the last word.
"""

from __future__ import annotations

import math

from tinfer.core.requests import Request
from tinfer.core.worker import Worker


class Greedy:
    """Admit while a seat is free and the blocks for the prompt and one more token are: as vLLM."""

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool:
        return worker.has_seat and _fits(request.prompt_tokens + 1, worker)


class ReserveStatic:
    """Admit while what the request will use at least, prompt and predicted answer, is free now.

    The lower end of the prediction counts, as in the paper (arXiv 2401.11181, section 3.4).
    """

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool:
        needed_tokens = request.prompt_tokens + request.lengths.low
        return worker.has_seat and _fits(needed_tokens, worker)


class ReserveDynamic:
    """Admit while memory is left for the request when the resident that ends first has ended.

    By then every resident has grown by as much as that one had left, by the lower ends of the
    predictions, and the one that has ended is gone; the new one has its prompt and has grown alike.
    """

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool:
        if not worker.has_seat:
            return False
        if not worker.requests:
            return True
        # It has to fit now as well: blocks for its prompt are taken at once.
        if not _fits(request.prompt_tokens + 1, worker):
            return False
        used_tokens, first_ends, shortest_tokens = 0, math.inf, 0
        for one in worker.requests.values():
            if one.parked_tokens is not None:
                continue
            generated = worker.generated_tokens(one)
            tokens = one.prompt_tokens + generated
            used_tokens += tokens
            left = one.lengths.points[0] - generated
            if left < 1:
                left = 1
            if left < first_ends:
                first_ends, shortest_tokens = left, tokens
        if first_ends == math.inf:
            return True
        grown_tokens = int(first_ends) * (worker.num_seqs - 1)
        then_tokens = used_tokens - shortest_tokens + grown_tokens
        mine_tokens = request.prompt_tokens + min(int(first_ends), request.lengths.low)
        return then_tokens + mine_tokens <= worker.capacity_tokens


class Peak:
    """Admit while the KV in use will rarely exceed what there is, at its highest from now on.

    How rarely is `SchedulerConfig.overflow_z`, in standard deviations above the expected peak that
    have to fit: 0.52 bounds the probability of an overflow at the peak to about 30 %. An overflow
    costs one request its blocks, waiting costs all that wait: in the simulator's figure 18 less
    caution than 5 % ends answers sooner, and few requests are ever preempted.
    """

    def admits(self, request: Request, worker: Worker, now_s: float) -> bool:
        if not worker.has_seat:
            return False
        if not worker.most_kv_tokens:
            return True  # nobody is there, or nobody who has blocks
        most_tokens = request.prompt_tokens + request.lengths.points[-1]
        if worker.most_kv_tokens + most_tokens + worker.capacity.block_tokens < (
            worker.capacity_tokens
        ):
            return True  # even if every answer were as long as it can be
        return worker.peak_with(request).rare <= worker.capacity_tokens


def _fits(tokens: int, worker: Worker) -> bool:
    """Whether blocks for so many tokens are free now, or the worker holds nothing at all."""
    num_blocks = -(-tokens // worker.capacity.block_tokens)
    num_used = worker.num_used_blocks + worker.num_held_blocks
    return num_used + num_blocks <= worker.capacity.num_blocks or num_used == 0
