"""Conversations of several turns: every prompt holds the whole conversation before it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from tinfer.workloads import arrivals, draws
from tinfer.workloads.lengths import ANSWER, LIGHT_PROMPT, Limits
from tinfer.workloads.requests import Request, Segment
from tinfer.workloads.spec import WorkloadSpec, on_the_grid
from tinfer.workloads.tenants import system_prompt

TASK = "chat"


class Turn(NamedTuple):
    """One question of a session: `after_s` seconds behind the session's first."""

    after_s: float
    segments: tuple[Segment, ...]
    output_tokens: int


class Session(NamedTuple):
    """A conversation before it is known when it starts."""

    name: str
    tenant: str
    turns: tuple[Turn, ...]


def chat(spec: WorkloadSpec, options: Mapping[str, float]) -> list[Request]:
    """Whole sessions until `num_requests` turns are together; only the last may be cut short.

    Sessions start as a Poisson process (or as `burstiness` says) of rate `rate_rps` over the turns
    of a mean session; the rate of requests is lower while the first sessions grow and the last
    ones fade. Each belongs to one of `num_tenants` tenants, drawn with weights 1 / rank^`zipf`,
    whose system prompt it starts with. The number of turns is geometric with mean `mean_turns`, at
    most `max_turns`, and a session ends early when its next prompt would exceed
    `max_prompt_tokens`. The next question comes after the answer, taken to last
    `answer_s_per_token` per token, and an exponential time of thought of mean `think_s`.
    With `at_once` all sessions start at 0; their later turns come later all the same.
    Questions and answers are the paper's: light prompts, and all of ShareGPT's answers.
    """
    sessions = _sessions(spec, options)
    rate_rps = None if spec.rate_rps is None else spec.rate_rps * len(sessions) / spec.num_requests
    starts_s = spec.arrive(arrivals.poisson, len(sessions), rate_rps)
    return [
        request
        for session, start_s in zip(sessions, starts_s, strict=True)
        for request in _requests(session, start_s)
    ]


def _sessions(spec: WorkloadSpec, options: Mapping[str, float]) -> list[Session]:
    """Sessions of `num_requests` turns in total."""
    shares = draws.zipf_weights(int(options["num_tenants"]), options["zipf"])
    system_tokens = options["system_prompt_tokens"]
    systems = [
        system_prompt(f"{spec.name}-{spec.seed}-t{tenant:03d}", system_tokens, spec.limits)
        for tenant in range(len(shares))
    ]
    sessions: list[Session] = []
    missing = spec.num_requests
    while missing > 0:
        index = len(sessions)
        rng = spec.stream(f"session {index}")
        tenant = draws.pick(rng, shares)
        name = f"{spec.name}-{spec.seed}-s{index:05d}"
        turns = _turns(name, rng, systems[tenant], spec.limits, options)[:missing]
        sessions.append(Session(name, f"tenant-{tenant:03d}", tuple(turns)))
        missing -= len(turns)
    return sessions


def _turns(
    name: str,
    rng: random.Random,
    system: tuple[Segment, ...],
    limits: Limits,
    options: Mapping[str, float],
) -> list[Turn]:
    """The turns of one session, at least one."""
    turns: list[Turn] = []
    before = system
    after_s = 0.0
    while len(turns) < int(options["max_turns"]):
        wanted = limits.prompt(LIGHT_PROMPT.draw(rng))
        asked = limits.room(wanted, before)
        if turns and asked < wanted:
            break
        segments = (*before, Segment(f"{name}-q{len(turns)}", asked))
        answered = limits.output(ANSWER.draw(rng))
        turns.append(Turn(after_s, segments, answered))
        before = (*segments, Segment(f"{name}-a{len(turns) - 1}", answered))
        after_s += answered * options["answer_s_per_token"]
        after_s += draws.exponential(rng, options["think_s"])
        if rng.random() * options["mean_turns"] < 1.0:
            break
    return turns


def _requests(session: Session, start_s: float) -> list[Request]:
    ids = [f"{session.name}-{turn}" for turn in range(len(session.turns))]
    return [
        Request(
            request_id=ids[number],
            arrival_s=on_the_grid(start_s + turn.after_s),
            task=TASK,
            segments=turn.segments,
            output_tokens=turn.output_tokens,
            tenant=session.tenant,
            session=session.name,
            turn=number,
            after=ids[number - 1] if number else None,
        )
        for number, turn in enumerate(session.turns)
    ]
