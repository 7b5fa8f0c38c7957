"""The simulated engine says and does at every time what a plain engine does that takes one step
after the other: rows of steps in closed form, counted blocks and all."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Collection
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.sim.box import SPEC
from tests.sim.reference import Kind as RefKind
from tests.sim.reference import Reference, Seq
from tinfer.core.types import LeaseKey
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Job, Kind, Ticket, What
from tinfer.sim.spec import EngineSpec, SimRequest

# Every constant and time is a sum of powers of two, so both engines count exactly the same; what
# is copied or held ends between the times at which messages come.
COSTS = replace(
    SPEC.costs,
    kv_token_s=2**-6,
    prefill_context_s=2**-8,
    handoff_s=0.5 + 2**-10,
    handoff_token_s=2**-4,
)
HOLD_S = 2.0 + 2**-9
PARKED_S = 1.0 + 2**-11
LEASE = LeaseKey("p", 0, 0, 0)


class Message(NamedTuple):
    at_s: float
    what: str
    request: SimRequest | None = None
    kind: RefKind = "whole"
    tokens: int | None = None


# How those that lose their blocks go on, by how many have before: with a pull (true) or without;
# None: by themselves.
Resumes = list[bool] | None


SPECS = st.builds(
    EngineSpec,
    costs=st.just(COSTS),
    num_blocks=st.integers(6, 24),
    block_tokens=st.sampled_from([2, 3, 4]),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(5, 9),
    prefill_order=st.sampled_from(["fcfs", "srpt"]),
    pads_chunks=st.booleans(),
    prefill_tax=st.sampled_from([0.0, 0.5]),
    prefix_caching=st.booleans(),
    victim=st.sampled_from(["newest", "least-progress"]),
    watermark=st.sampled_from([0.0, 0.2]),
)
KINDS: tuple[RefKind, ...] = ("whole", "whole", "prefill", "decode")
TIMES = st.integers(0, 160).map(lambda number: number / 4)


@st.composite
def histories(draw: st.DrawFn, block_tokens: int) -> list[Message]:
    """Requests that come, some of which are aborted, and budgets that change; by time."""
    messages = []
    for number in range(draw(st.integers(1, 8))):
        prompt, at_s = draw(st.integers(1, 20)), draw(TIMES)
        num_shared = draw(st.integers(0, prompt // block_tokens))
        family = draw(st.integers(1, 2))
        asked = SimRequest(
            request_id=f"r{number}",
            arrival_s=0.0,
            prompt_tokens=prompt,
            output_tokens=draw(st.integers(1, 25)),
            max_output_tokens=25,
            block_hashes=tuple(range(100 * family, 100 * family + num_shared)),
        )
        kind: RefKind = draw(st.sampled_from(KINDS))
        messages.append(Message(at_s, "start", asked, kind))
        if draw(st.integers(0, 4)) == 0:
            messages.append(Message(at_s + draw(TIMES) / 4, "abort", asked))
    for at_s in draw(st.lists(TIMES, max_size=3)):
        tokens = draw(st.sampled_from([None, 0, 1, 3]))
        messages.append(Message(at_s, "budget", tokens=tokens))
    messages.append(Message(60.0, "budget", tokens=None))
    return sorted(messages, key=lambda message: message.at_s)


class Seen(NamedTuple):
    """All that can be seen of a run from outside, and when the reference's steps began."""

    events: list[tuple[float, str, str]]
    tokens_s: dict[str, list[float]]
    cached_tokens: dict[str, int]
    num_preemptions: dict[str, int]
    totals: tuple[int, float, int, int]
    reports: dict[float, tuple[int, float, int, int]]
    begun_s: set[float]


def by_reference(
    spec: EngineSpec, messages: list[Message], looked_s: Collection[float], resumes: Resumes
) -> Seen:
    """`looked_s`: at which times to tell what was known then."""
    engine = Reference(spec, parks=resumes is not None)
    seqs: dict[str, Seq] = {}
    waiting: list[tuple[float, int, Any]] = [(m.at_s, i, m) for i, m in enumerate(messages)]
    num_heard = num_resumed = 0
    while True:
        for name in engine.lost[num_resumed:]:
            if resumes is not None:
                resume = (name, resumes[num_resumed % len(resumes)])
                at_s = engine.now_s + PARKED_S
                heapq.heappush(waiting, (at_s, 10_000 + num_resumed, resume))
            num_resumed += 1
        for at_s, what, request_id in engine.events[num_heard:]:
            if what == "prefilled":
                heapq.heappush(waiting, (at_s + HOLD_S, len(waiting) + 1000, request_id))
        num_heard = len(engine.events)
        message_s = waiting[0][0] if waiting else math.inf
        if min(message_s, engine.next_pull_s()) > engine.now_s:
            if not engine.step() and len(engine.lost) == num_resumed:
                if (next_s := min(message_s, engine.next_pull_s())) == math.inf:
                    break
                engine.now_s = next_s
        elif engine.next_pull_s() < message_s:
            engine.end_pull()
        else:
            tell_reference(engine, seqs, heapq.heappop(waiting)[2])
    assert len(engine.free) == spec.num_blocks
    num_known = {name: int(seq.kind == "decode") for name, seq in seqs.items()}
    return Seen(
        sorted(engine.events),
        {name: seq.tokens_s[num_known[name] :] for name, seq in seqs.items()},
        {name: seq.cached_tokens or 0 for name, seq in seqs.items()},
        {name: seq.num_preemptions for name, seq in seqs.items()},
        (engine.num_steps, engine.busy_s, engine.num_prefill_tokens, len(engine.free)),
        {
            at_s: engine.history[bisect_left(engine.history, at_s, key=begin) - 1][1]
            for at_s in looked_s
        },
        {at_s for at_s, _ in engine.history},
    )


def begin(entry: tuple[float, object]) -> float:
    return entry[0]


def tell_reference(
    engine: Reference, seqs: dict[str, Seq], message: Message | str | tuple[str, bool]
) -> None:
    if isinstance(message, str):
        engine.end_lease(message)
    elif not isinstance(message, Message):
        engine.resume(*message)
    elif message.what == "budget":
        engine.budget = message.tokens
    elif message.request is not None and message.what == "abort":
        engine.abort(message.request.request_id)
    elif message.request is not None:
        seq = seqs[message.request.request_id] = Seq(message.request, message.kind)
        engine.start(seq)


def by_simulation(
    spec: EngineSpec, messages: list[Message], knows_all: bool, resumes: Resumes
) -> Seen:
    """`knows_all`: messages are posted before anything runs; else each just when it comes."""
    engine = SimEngine(spec, parks=resumes is not None)
    num_resumed = 0
    tickets: dict[str, Ticket] = {}
    events: list[tuple[float, str, str]] = []
    reports: dict[float, tuple[int, float, int, int]] = {}
    coming = list(messages)
    while True:
        while coming and (knows_all or coming[0].at_s <= engine.now_s):
            tell_engine(engine, tickets, coming.pop(0))
        engine.plan()
        while coming and coming[0].at_s <= engine.next_s:
            message = coming.pop(0)
            if message.at_s < engine.next_s:
                reports[message.at_s] = engine.report(message.at_s)
            tell_engine(engine, tickets, message)
        if engine.next_s == math.inf and not coming:
            break
        for output in engine.advance(engine.next_s):
            events.append((output.at_s, output.what.value, output.job.id))
            if output.what is What.PREFILLED and output.lease is not None:
                engine.end_lease(output.at_s + HOLD_S, output.lease)
        for name in engine.take_preempted():
            if resumes is not None:
                lease = LEASE if resumes[num_resumed % len(resumes)] else None
                engine.resume(engine.now_s + PARKED_S, name, lease)
            num_resumed += 1
    assert engine.is_idle
    ends_s = engine.log.ends_s().tolist()
    tokens_s: dict[str, list[float]] = {}
    for name, ticket in tickets.items():
        tokens_s[name] = []
        for piece in ticket.pieces:
            tokens_s[name] += [piece] if isinstance(piece, float) else ends_s[piece[1] : piece[2]]
    return Seen(
        sorted(events),
        tokens_s,
        {name: ticket.cached_tokens for name, ticket in tickets.items()},
        {name: ticket.num_preemptions for name, ticket in tickets.items()},
        engine.report(math.inf),
        reports,
        set(),
    )


def tell_engine(engine: SimEngine, tickets: dict[str, Ticket], message: Message) -> None:
    if message.what == "budget":
        engine.set_budget(message.at_s, message.tokens)
    elif message.request is not None and message.what == "abort":
        engine.abort(message.at_s, message.request.request_id)
    elif message.request is not None:
        ticket = Ticket(len(tickets), message.request)
        tickets[message.request.request_id] = ticket
        lease = LEASE if message.kind == "decode" else None
        engine.start(message.at_s, Job(ticket, Kind(message.kind), lease))


@settings(max_examples=300)
@given(
    data=st.data(),
    spec=SPECS,
    knows_all=st.booleans(),
    resumes=st.none() | st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_it_does_what_a_plain_engine_does(
    data: st.DataObject, spec: EngineSpec, knows_all: bool, resumes: Resumes
) -> None:
    messages = data.draw(histories(spec.block_tokens))
    seen = by_simulation(spec, messages, knows_all, resumes)
    expected = by_reference(spec, messages, seen.reports, resumes)
    # At the very end of a step both answers are right: it is over, or what it gave is not seen yet.
    for at_s in expected.begun_s & seen.reports.keys():
        del seen.reports[at_s], expected.reports[at_s]
    assert seen == expected._replace(begun_s=set())
