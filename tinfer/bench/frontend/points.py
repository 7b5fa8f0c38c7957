"""What is sent in one run, and what is counted of it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from tinfer.bench.compare.arms import SERVED_NAME
from tinfer.bench.frontend.arms import UNLOADED_STEP_S, Mode
from tinfer.bench.frontend.clocks import Used
from tinfer.bench.frontend.options import PACED, FrontendOptions, Kind
from tinfer.bench.outcome import LoadRun, Outcome, Planned

# tokens: long answers. requests: answers of one token. prompts: tokens, and long prompts meanwhile.
What = Literal["tokens", "requests", "unloaded", "prompts"]
PROMPT_TOKENS = 32
MAX_OUTPUT_TOKENS = 1024
LONG_PROMPT_TOKENS = 20_000
LONG_PROMPTS_PER_S = 2.0
REQUEST_STREAMS = 64
UNLOADED_TOKENS = 40
# A guess at what one stream of the built-in model makes in a second, for how much to ask of it.
REAL_STREAM_TPS = 150.0
# Ids that are plain bytes in the built-in model's vocabulary.
_IDS = range(40, 250)


class Point(Struct, frozen=True, kw_only=True):
    """One run: `num_requests` answers of `output_tokens`, `streams` of them at a time.

    All are asked for at once at the start. `num_long` prompts come beside them, evenly spread.
    """

    what: What
    mode: Mode
    streams: int
    num_requests: int
    output_tokens: int
    num_long: int = 0


class Measured(Struct, frozen=True, kw_only=True):
    """One run as it was; `None` where a figure has no meaning.

    `events`: pieces of answers that the client read. `front_s`, `engines_s`, `client_s`: processor
    time. `added_ttft_ms`, `added_itl_p50_ms`, `added_itl_p99_ms`: beyond the engine stand-in's own
    step. `longest_lag_ms`: what no turn of the master's loop exceeded, see tinfer/master/lag.py.
    """

    arm: Kind
    point: Point
    repetition: int
    num_tokens: int
    num_events: int
    duration_s: float
    front_s: float
    engines_s: float
    client_s: float
    ttft_p50_ms: float
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    added_ttft_ms: float | None = None
    added_itl_p50_ms: float | None = None
    added_itl_p99_ms: float | None = None
    longest_lag_ms: float | None = None


def points_of(kind: Kind, mode: Mode, options: FrontendOptions) -> list[Point]:
    """The runs of one start of a server."""
    if mode == "unloaded":
        answer_s = UNLOADED_TOKENS * UNLOADED_STEP_S
        return [
            Point(
                what="unloaded",
                mode=mode,
                streams=1,
                num_requests=max(2, round(options.seconds / answer_s)),
                output_tokens=UNLOADED_TOKENS,
            )
        ]
    points = [_tokens(kind, mode, streams, options) for streams in options.streams]
    if mode == "full":
        points.append(
            Point(
                what="requests",
                mode=mode,
                streams=REQUEST_STREAMS,
                num_requests=options.num_requests,
                output_tokens=1,
            )
        )
    elif kind != "relay":
        usual = _tokens(kind, mode, REQUEST_STREAMS, options)
        num_long = max(1, round(options.seconds * LONG_PROMPTS_PER_S))
        points.append(msgspec.structs.replace(usual, what="prompts", num_long=num_long))
    return points


def _tokens(kind: Kind, mode: Mode, streams: int, options: FrontendOptions) -> Point:
    rate = options.rate
    if kind not in PACED:
        rate = min(rate, streams * REAL_STREAM_TPS)
    elif mode == "full":
        rate *= options.full_factor
    wanted = rate * options.seconds
    output_tokens = max(16, min(MAX_OUTPUT_TOKENS, round(wanted / streams)))
    return Point(
        what="tokens",
        mode=mode,
        streams=streams,
        num_requests=max(streams, math.ceil(wanted / output_tokens)),
        output_tokens=output_tokens,
    )


def plan_of(point: Point, seed: int) -> list[Planned]:
    """The requests of a run; prompts are token ids, and no two are alike."""
    rng = random.Random(f"tinfer bench frontend {seed} {point}")
    return [
        _planned(f"r{i}", 0.0, PROMPT_TOKENS, point.output_tokens, rng)
        for i in range(point.num_requests)
    ]


def long_plan_of(point: Point, seed: int) -> list[Planned]:
    """Its long prompts, by turns as token ids and as text."""
    rng = random.Random(f"tinfer bench frontend long {seed} {point}")
    plan = []
    for i in range(point.num_long):
        planned_s = (i + 0.5) / LONG_PROMPTS_PER_S
        plan.append(_planned(f"long{i}", planned_s, LONG_PROMPT_TOKENS, 2, rng, as_text=i % 2 == 1))
    return plan


def _planned(
    name: str,
    planned_s: float,
    prompt_tokens: int,
    output_tokens: int,
    rng: random.Random,
    as_text: bool = False,
) -> Planned:
    prompt: list[int] | str = rng.choices(_IDS, k=prompt_tokens)
    if as_text:
        prompt = "".join(rng.choices("abcdefghij klmnop", k=prompt_tokens))
    body = {
        "model": SERVED_NAME,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Planned(
        request_id=name,
        planned_s=planned_s,
        body=msgspec.json.encode(body),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def measured_of(
    kind: Kind,
    point: Point,
    repetition: int,
    run: LoadRun,
    used: Used,
    longest_lag_ms: float | None,
) -> Measured:
    """The figures of a run of which every answer is whole."""
    outcomes = run.outcomes
    itls_s = np.array([gap_s for one in outcomes for gap_s in one.itls_s])
    ttft_s = float(np.median([one.ttft_s for one in outcomes]))
    p50_s, p99_s = (_percentile(itls_s, rank) for rank in (50, 99))
    is_alone = point.what == "unloaded"
    return Measured(
        arm=kind,
        point=point,
        repetition=repetition,
        num_tokens=sum(one.output_tokens for one in outcomes),
        num_events=sum(len(one.chunk_s) for one in outcomes),
        duration_s=run.duration_s,
        front_s=used.front_s,
        engines_s=used.engines_s,
        client_s=run.cpu_s,
        ttft_p50_ms=1000.0 * ttft_s,
        itl_p50_ms=_ms(p50_s),
        itl_p99_ms=_ms(p99_s),
        added_ttft_ms=1000.0 * (ttft_s - UNLOADED_STEP_S) if is_alone else None,
        added_itl_p50_ms=_ms(p50_s, UNLOADED_STEP_S) if is_alone else None,
        added_itl_p99_ms=_ms(p99_s, UNLOADED_STEP_S) if is_alone else None,
        longest_lag_ms=longest_lag_ms,
    )


def first_failure(outcomes: Sequence[Outcome]) -> str | None:
    """Why an answer is not what was asked for; None where all are."""
    for one in outcomes:
        if one.error is not None:
            return one.error
        if one.output_tokens != one.asked_tokens:
            return f"an answer has {one.output_tokens} tokens instead of {one.asked_tokens}"
    return None


def _percentile(values: np.ndarray, rank: float) -> float | None:
    return float(np.percentile(values, rank)) if len(values) else None


def _ms(seconds: float | None, less_s: float = 0.0) -> float | None:
    return None if seconds is None else 1000.0 * (seconds - less_s)
