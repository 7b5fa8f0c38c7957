"""From a workload to a plan: which requests there are, and the exact bytes and time of each."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from tinfer.bench.options import RANDOM, BenchOptions
from tinfer.bench.outcome import Planned
from tinfer.bench.target import Target, TokenRange
from tinfer.errors import StartError
from tinfer.workloads import (
    WORKLOADS,
    Request,
    Segment,
    WorkloadSpec,
    arrivals,
    make,
    prompt_token_ids,
)

_WARM_UP = "warm-up"


def requests_of(options: BenchOptions) -> list[Request]:
    """The workload asked for. Raises `StartError` for one that there is not, or a bad setting."""
    if options.workload == RANDOM:
        return random_requests(options)
    if options.workload not in WORKLOADS:
        known = ", ".join([RANDOM, *WORKLOADS])
        raise StartError(f"no workload is called {options.workload}; there are: {known}")
    is_at_once = options.request_rate == math.inf
    try:
        return make(
            WorkloadSpec(
                name=options.workload,
                num_requests=options.num_prompts,
                rate_rps=None if is_at_once else options.request_rate,
                seed=options.seed,
                burstiness=options.burstiness,
                at_once=is_at_once,
                length_scale=options.length_scale or 1.0,
                max_prompt_tokens=options.max_prompt_tokens,
                max_output_tokens=options.max_output_tokens,
                options=dict(options.workload_options),
            )
        )
    except ValueError as error:
        raise StartError(f"workload {options.workload}: {error}") from error


def random_requests(options: BenchOptions) -> list[Request]:
    """Prompts that share nothing, all of one length, as `vllm bench serve --dataset-name random`.

    Arrivals are a gamma process, stretched so that the last one is at num / rate, as there.
    """
    num = options.num_prompts
    input_len, output_len = options.input_len, options.output_len
    rate_rps, burstiness = options.request_rate, options.burstiness
    if input_len is None or output_len is None or rate_rps is None or burstiness is None:
        raise ValueError("the random workload has no lengths and no rate of its own")
    times_s = [0.0] * num
    if math.isfinite(rate_rps):
        rng = random.Random(f"tinfer bench arrivals {options.seed}")
        times_s = arrivals.take(arrivals.gamma(rng, rate_rps, burstiness), num, rate_rps)
    return [
        Request(
            request_id=f"{RANDOM}-{i}",
            arrival_s=times_s[i],
            task=RANDOM,
            segments=(Segment(f"tinfer bench {options.seed} {i}", input_len),),
            output_tokens=output_len,
        )
        for i in range(num)
    ]


def check_fits(requests: Sequence[Request], target: Target) -> None:
    """Raises `StartError` where the model cannot hold a prompt and its answer."""
    if target.max_model_len is None:
        return
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    num = sum(r.prompt_tokens + r.output_tokens > target.max_model_len for r in requests)
    if num:
        raise StartError(
            f"{num} of {len(requests)} requests are too long: the longest has {longest} tokens "
            f"with its answer, and {target.model} takes {target.max_model_len}"
        )


def plan_of(
    requests: Sequence[Request], target: Target, tokens: TokenRange, options: BenchOptions
) -> list[Planned]:
    """The requests as they will be sent, in their order."""
    return [
        Planned(
            request_id=request.request_id,
            planned_s=request.arrival_s,
            body=_body(request, target, tokens, options, options.salt),
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            after=request.after if options.wait_for_turns else None,
        )
        for request in requests
    ]


def warm_ups_of(
    requests: Sequence[Request], target: Target, tokens: TokenRange, options: BenchOptions
) -> list[Planned]:
    """`num_warmups` requests at once, shaped as the first ones but with prompts of their own.

    So they leave nothing in a prefix cache that the run would find.
    """
    return [
        Planned(
            request_id=f"{_WARM_UP}-{i}",
            planned_s=0.0,
            body=_body(request, target, tokens, options, f"{options.salt} {_WARM_UP} {i}"),
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )
        for i, request in ((i, requests[i % len(requests)]) for i in range(options.num_warmups))
    ]


def _body(
    request: Request, target: Target, tokens: TokenRange, options: BenchOptions, salt: str
) -> bytes:
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": prompt_token_ids(request, tokens.vocab_size, tokens.first_id, salt),
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return msgspec.json.encode(body)
