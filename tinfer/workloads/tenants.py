"""Many tenants on one server, each with its own rate, burstiness, class and system prompt.

Composed per tenant, because in production a few top clients drive the swings of the whole (Source:
ServeGen). What a tenant asks for does not depend on how many others there are, only how often.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from tinfer.workloads import arrivals, draws
from tinfer.workloads.lengths import Limits
from tinfer.workloads.requests import Request, Segment
from tinfer.workloads.single_turn import RequestClass
from tinfer.workloads.spec import WorkloadSpec, on_the_grid

# Coefficients of variation of the gaps that tenants take in turn: an even one, one near what the
# FabriX trace shows (1.17), a bursty one.
CVS = (1.0, 1.2, 3.0)


def multi_tenant(
    spec: WorkloadSpec, options: Mapping[str, float], classes: Sequence[RequestClass]
) -> list[Request]:
    """The merged streams of `num_tenants` tenants whose rates fall as 1 / rank^`zipf`.

    Tenants take `classes` and `CVS` in turn. Every prompt of a tenant starts with its system
    prompt, of `system_prompt_tokens` times 0.5 to 1.5; the class's own prompt follows and is cut
    to what still fits.
    """
    # At once there is no rate, but how often each tenant asks still follows from one.
    rate_rps = spec.rate_rps or 1.0
    shares = draws.zipf_weights(int(options["num_tenants"]), options["zipf"])
    streams = [
        _stream(spec, tenant, classes[tenant % len(classes)], rate_rps * share, options)
        for tenant, share in enumerate(shares)
    ]
    merged = heapq.merge(*streams, key=lambda request: request.arrival_s)
    chosen = list(itertools.islice(merged, spec.num_requests))
    if spec.at_once:
        return [replace(request, arrival_s=0.0) for request in chosen]
    times_s = arrivals.take(
        (request.arrival_s for request in chosen),
        len(chosen),
        rate_rps if spec.exact_rate else None,
    )
    return [
        replace(request, arrival_s=on_the_grid(time_s))
        for request, time_s in zip(chosen, times_s, strict=True)
    ]


def _stream(
    spec: WorkloadSpec,
    tenant: int,
    drawn: RequestClass,
    rate_rps: float,
    options: Mapping[str, float],
) -> Iterator[Request]:
    """One tenant's requests without end; arrivals are not rounded yet."""
    burstiness = arrivals.burstiness_of(CVS[tenant % len(CVS)])

    def own(rng: random.Random, rate_rps: float) -> Iterator[float]:
        return arrivals.gamma(rng, rate_rps, burstiness)

    times_s = spec.process(own)(spec.stream(f"tenant {tenant} arrivals"), rate_rps)
    lengths = spec.stream(f"tenant {tenant} lengths")
    name = f"{spec.name}-{spec.seed}-t{tenant:03d}"
    system_tokens = options["system_prompt_tokens"] * (0.5 + lengths.random())
    system = system_prompt(name, system_tokens, spec.limits)
    for index, time_s in enumerate(times_s):
        request_id = f"{name}-{index:06d}"
        own_tokens = spec.limits.prompt(drawn.prompt.draw(lengths))
        yield Request(
            request_id=request_id,
            arrival_s=time_s,
            task=drawn.task,
            segments=(*system, Segment(request_id, spec.limits.room(own_tokens, system))),
            output_tokens=spec.limits.output(drawn.output.draw(lengths)),
            tenant=f"tenant-{tenant:03d}",
        )


def system_prompt(owner: str, tokens: float, limits: Limits) -> tuple[Segment, ...]:
    """The shared first segment of an owner's prompts, scaled; none where `tokens` is 0.

    It takes at most half of `max_prompt_tokens`, so that the prompts still differ.
    """
    if tokens <= 0.0:
        return ()
    num_tokens = limits.prompt(tokens)
    if limits.max_prompt_tokens is not None:
        num_tokens = min(num_tokens, limits.max_prompt_tokens // 2)
    return (Segment(f"{owner}-system", num_tokens),) if num_tokens else ()
