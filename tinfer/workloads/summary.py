"""The figures of a workload: what a reader, and a test, check it by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev

from msgspec import Struct

from tinfer.workloads.requests import Request, Segment


class LengthSummary(Struct, frozen=True):
    """Mean, percentiles and largest of a token count."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int


class WorkloadSummary(Struct, frozen=True):
    """The figures of one list of requests.

    `duration_s` is the last arrival; `rate_rps` is `num_requests` over it, None if all arrive at
    0. `interarrival_cv` is the standard deviation of the gaps between arrivals, from t = 0 on, over
    their mean; None where that is 0. `shared_prefix_share` is the share of all prompt tokens that
    an unbounded prefix cache, answering each request before the next arrives, would know already
    (the stand-ins of answers not before a prompt has held them).
    """

    num_requests: int
    num_per_task: dict[str, int]
    num_tenants: int
    num_sessions: int
    duration_s: float
    rate_rps: float | None
    interarrival_cv: float | None
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary
    shared_prefix_share: float


def summarise(requests: Sequence[Request]) -> WorkloadSummary:
    """Summarise requests that are in order of arrival; `ValueError` if there are none."""
    if not requests:
        raise ValueError("no requests to summarise")
    prompts = [request.prompt_tokens for request in requests]
    times_s = [request.arrival_s for request in requests]
    return WorkloadSummary(
        num_requests=len(requests),
        num_per_task=dict(Counter(request.task for request in requests)),
        num_tenants=len({request.tenant for request in requests} - {""}),
        num_sessions=len({request.session for request in requests} - {""}),
        duration_s=times_s[-1],
        rate_rps=len(requests) / times_s[-1] if times_s[-1] > 0.0 else None,
        interarrival_cv=interarrival_cv(times_s),
        prompt_tokens=_lengths(prompts),
        output_tokens=_lengths([request.output_tokens for request in requests]),
        shared_prefix_share=shared_prefix_tokens(requests) / sum(prompts),
    )


def percentile(in_order: Sequence[float], rank: float) -> float:
    """The value at `rank` percent of an ascending row, linear between neighbours (as numpy's)."""
    place = (len(in_order) - 1) * rank / 100.0
    below = math.floor(place)
    above = min(below + 1, len(in_order) - 1)
    return in_order[below] + (in_order[above] - in_order[below]) * (place - below)


def interarrival_cv(times_s: Sequence[float]) -> float | None:
    """Coefficient of variation of the gaps, the first from 0; None if all are 0."""
    gaps_s = [later - earlier for earlier, later in pairwise([0.0, *times_s])]
    mean_s = fmean(gaps_s)
    return pstdev(gaps_s) / mean_s if mean_s > 0.0 else None


def shared_prefix_tokens(requests: Sequence[Request]) -> int:
    """Prompt tokens that an earlier request in the list has had at the same place."""
    # A tree of segments: (node, segment) leads to a node, (node, seed) to the most tokens seen.
    # Behind a segment that is new, or was seen with another length, the node is new and knows none.
    nodes: dict[tuple[int, Segment], int] = {}
    longest: dict[tuple[int, str], int] = {}
    shared = 0
    for request in requests:
        node = 0
        for segment in request.segments:
            seen = longest.get((node, segment.seed), 0)
            longest[node, segment.seed] = max(seen, segment.num_tokens)
            shared += min(seen, segment.num_tokens)
            node = nodes.setdefault((node, segment), len(nodes) + 1)
    return shared


def _lengths(tokens: Sequence[int]) -> LengthSummary:
    in_order = sorted(tokens)
    p50, p90, p99 = (percentile(in_order, rank) for rank in (50, 90, 99))
    return LengthSummary(fmean(in_order), p50, p90, p99, in_order[-1])
