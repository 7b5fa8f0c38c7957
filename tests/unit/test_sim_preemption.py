"""What lost its blocks and waits to be told how it goes on, against step sequences worked out by
hand: a step takes 1 s, 1/8 s per prompt token and 1/4 s per decoding sequence, a copy 1/2 s; blocks
have 2 tokens, a step has 4."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, Lone, request
from tinfer.core.types import LeaseKey
from tinfer.sim.jobs import Job, Kind, Ticket, What
from tinfer.sim.spec import EngineSpec

LEASE = LeaseKey("q", 0, 7, 1)
FOUR = replace(SPEC, num_blocks=4)


def two(spec: EngineSpec = FOUR, until_s: float = 20.0) -> Lone:
    """`a` is answered at 7.0; `b`, with 3 tokens of 5, has lost its blocks to it at 4.5."""
    lone = Lone(spec, parks=True)
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=2, out=5)
    lone.run(until_s)
    return lone


# --- waiting -------------------------------------------------------------------------------------


def test_who_lost_its_blocks_waits_without_any() -> None:
    lone = two()
    assert lone.tokens_s("a") == [1.5, 3.0, 4.5, 5.75, 7.0]
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5]
    assert (lone.num_free, lone.engine.next_s) == (4, math.inf)
    assert not lone.engine.is_idle
    assert lone.engine.outstanding_tokens(20.0) == 2
    job = lone.engine.parked("b")
    assert job is not None and job.num_emitted == 3
    assert lone.engine.parked("a") is None
    assert (lone.tickets["b"].num_preemptions, lone.engine.num_preemptions) == (1, 1)


def test_it_is_told_of_with_the_end_of_the_step_that_took_its_blocks() -> None:
    lone = two(until_s=5.0)
    assert lone.engine.now_s == 4.5 and lone.engine.parked("b") is not None
    assert not lone.engine.has_news and lone.engine.take_preempted() == ()
    lone.run(until_s=5.75)
    assert lone.engine.has_news and lone.engine.has_preempted
    assert lone.engine.take_preempted() == ("b",)
    assert not lone.engine.has_news and lone.engine.take_preempted() == ()


def test_it_is_told_of_at_once_where_no_step_comes() -> None:
    lone = Lone(FOUR, parks=True)
    lone.start("held", prompt=4, out=2, kind=Kind.PREFILL)
    lone.start("a", prompt=2, out=6)
    lone.run()
    # Two of four blocks are under a lease; a prompt of 2 and a token fill the others at 5.25.
    assert lone.tokens_s("a") == [2.75, 4.0, 5.25]
    assert (lone.engine.now_s, lone.engine.next_s) == (5.25, math.inf)
    assert lone.engine.take_preempted() == ("a",)


def test_it_takes_no_seat() -> None:
    lone = Lone(replace(FOUR, max_num_seqs=2), parks=True)
    for name, at_s in (("a", 0.0), ("b", 0.0), ("c", 4.0)):
        lone.start(name, prompt=1 if name == "c" else 2, out=1 if name == "c" else 5, at_s=at_s)
    lone.run()
    # Nobody is let in beside the preemption at 4.5; in the step after it c is.
    assert lone.tokens_s("c") == [5.75 + 1.375]
    assert len(lone.tokens_s("b")) == 3


# --- going on ------------------------------------------------------------------------------------


def test_without_a_lease_it_computes_all_its_tokens_again() -> None:
    lone = two()
    lone.engine.resume(20.0, "b", None)
    lone.run()
    # Five tokens in chunks of 4 and 1, whose step samples the next one; then the last one.
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 22.625, 23.875]
    assert lone.said(What.FINISHED) == [("a", 7.0), ("b", 23.875)]
    assert lone.said(What.FIRST_TOKEN) == [("a", 1.5), ("b", 1.5)]
    assert lone.num_free == 4 and lone.engine.is_idle
    assert lone.engine.outstanding_tokens(99.0) == 0
    assert lone.engine.num_prefill_tokens == 4 + 5


def test_told_at_once_it_does_what_it_would_have_done_by_itself() -> None:
    lone = two(until_s=5.75)
    lone.engine.resume(5.75, "b", None)
    lone.run()
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 9.625, 10.875]


def test_with_a_lease_it_pulls_all_its_tokens_and_goes_on() -> None:
    lone = two()
    lone.engine.resume(20.0, "b", LEASE)
    lone.run(until_s=20.25)
    assert lone.num_free == 1  # five tokens
    assert lone.reads == [(LEASE, 20.5)]
    lone.run()
    assert lone.said(What.PULLED) == [("b", 20.5)]
    # The last token is computed again: that step samples the fourth.
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 21.75, 23.0]
    assert lone.engine.num_prefill_tokens == 4
    assert lone.num_free == 4 and lone.engine.is_idle
    assert lone.engine.outstanding_tokens(99.0) == 0


def test_what_still_lies_here_is_not_copied() -> None:
    costs = replace(SPEC.costs, handoff_token_s=0.25)
    lone = two(replace(FOUR, prefix_caching=True, costs=costs))
    lone.engine.resume(20.0, "b", LEASE)
    lone.run()
    # One block of its two is as it was, the other one was taken: 5 - 2 tokens.
    assert lone.said(What.PULLED) == [("b", 20.0 + 0.5 + 3 * 0.25)]
    assert lone.num_free == 4 and lone.engine.is_idle


def test_it_may_lose_its_blocks_again_and_again() -> None:
    lone = Lone(FOUR, parks=True)
    lone.start("a", prompt=2, out=6)
    lone.start("b", prompt=2, out=6)
    at_s = 0.0
    while not lone.engine.is_idle or at_s == 0.0:
        at_s += 1.0
        lone.run(until_s=at_s)
        for name in lone.engine.take_preempted():
            pulls = lone.tickets[name].num_preemptions % 2 == 0
            lone.engine.resume(at_s, name, LEASE if pulls else None)
    assert [len(lone.tokens_s(name)) for name in "ab"] == [6, 6]
    assert lone.num_free == 4
    assert lone.engine.outstanding_tokens(99.0) == 0


def test_who_goes_on_with_a_pull_is_before_other_pulls() -> None:
    lone = two()
    lone.start("x", prompt=2, out=4, at_s=20.0)
    lone.start("c", prompt=6, out=2, at_s=20.25, kind=Kind.DECODE)
    lone.engine.resume(20.5, "b", LEASE)
    lone.run()
    # Either needs three blocks; x keeps more than one until 25.0, and b is answered at 28.0.
    assert lone.tokens_s("x")[-1] == 25.0
    assert lone.said(What.PULLED) == [("b", 25.5), ("c", 28.5)]


@pytest.mark.parametrize(("watermark", "pulled_s"), [(0.0, 21.625), (0.25, 22.875)])
def test_a_pull_that_goes_on_leaves_the_watermark_free(watermark: float, pulled_s: float) -> None:
    lone = two(replace(FOUR, watermark=watermark))
    lone.start("x", prompt=1, out=2, at_s=20.0)
    lone.engine.resume(20.5, "b", LEASE)
    lone.run()
    # Its three blocks are all that is free beside x, which is answered at 22.375.
    assert lone.reads == [(LEASE, pulled_s)]


# --- before the first token ----------------------------------------------------------------------


def losing(kind: Kind) -> Lone:
    """`long`, of 5 prompt tokens, has computed 4 of them and lost them to one that decodes."""
    lone = Lone(replace(SPEC, num_blocks=5, victim="least-progress"), parks=True)
    lone.start("long", prompt=5, out=3, kind=kind)
    lone.run(until_s=1.0)
    lone.engine.set_budget(1.0, 0)
    lone.start("b", prompt=3, out=6, at_s=1.0, kind=Kind.DECODE)
    lone.run(until_s=30.0)
    lone.engine.set_budget(30.0, None)
    assert lone.engine.take_preempted() == ("long",)
    assert lone.engine.outstanding_tokens(30.0) == 5 + (1 if kind is Kind.PREFILL else 3)
    return lone


def test_a_first_token_after_a_pull_is_told_of() -> None:
    lone = losing(Kind.WHOLE)
    lone.engine.resume(30.0, "long", LEASE)
    lone.run()
    # The last token of its prompt is a chunk of one.
    assert lone.said(What.FIRST_TOKEN) == [("long", 30.5 + 1.125)]
    assert lone.tokens_s("long") == [31.625, 32.875, 34.125]
    assert lone.num_free == 5 and lone.engine.is_idle
    assert lone.engine.outstanding_tokens(99.0) == 0


def test_a_prefill_after_a_pull_is_held() -> None:
    lone = losing(Kind.PREFILL)
    lone.engine.resume(30.0, "long", LEASE)
    lone.run()
    assert lone.said(What.PREFILLED) == [("long", 31.625)]
    assert lone.tokens_s("long") == [31.625]
    assert (lone.engine.num_open_leases, lone.num_free) == (1, 2)
    assert lone.engine.outstanding_tokens(99.0) == 0


@pytest.mark.parametrize(("lease", "tokens_s"), [(None, [22.625, 23.875]), (LEASE, [23.0, 24.25])])
def test_a_token_that_the_client_has_from_elsewhere_is_not_given_twice(
    lease: LeaseKey | None, tokens_s: list[float]
) -> None:
    lone = Lone(FOUR, parks=True)
    lone.start("old", prompt=4, out=5)
    lone.start("late", prompt=3, out=3, kind=Kind.DECODE)
    lone.run(until_s=20.0)
    # It has pulled, and loses its blocks to `old` before its own first step.
    assert lone.engine.take_preempted() == ("late",)
    job = lone.engine.parked("late")
    assert job is not None and (job.generated, job.num_emitted) == (0, 1)
    lone.engine.resume(20.0, "late", lease)
    lone.run()
    assert lone.tokens_s("late") == tokens_s
    assert lone.num_free == 4 and lone.engine.is_idle


# --- ends ----------------------------------------------------------------------------------------


def test_who_waits_can_be_aborted_and_a_late_word_lets_go_of_its_source() -> None:
    lone = two()
    lone.engine.abort(20.0, "b")
    lone.engine.resume(21.0, "b", LEASE)
    lone.engine.resume(22.0, "b", None)
    lone.run()
    assert lone.said(What.ABORTED) == [("b", 20.0)]
    assert lone.engine.is_idle and lone.num_free == 4
    assert lone.engine.outstanding_tokens(99.0) == 0
    assert lone.reads == [(LEASE, 21.0)]


def test_word_to_one_that_does_not_wait_lets_go_of_its_source() -> None:
    lone = Lone(parks=True)
    lone.start("a", prompt=4, out=3)
    lone.engine.resume(1.0, "a", LEASE)
    lone.run()
    assert lone.reads == [(LEASE, 1.5)]
    assert lone.tokens_s("a") == [1.5, 2.75, 4.0]


@pytest.mark.parametrize(("at_s", "until_s"), [(20.0, 20.0), (20.25, 20.5)])
def test_a_pull_that_goes_on_can_be_aborted_before_and_while_it_copies(
    at_s: float, until_s: float
) -> None:
    lone = two()
    lone.engine.resume(20.0, "b", LEASE)
    lone.engine.abort(at_s, "b")
    lone.run()
    assert lone.said(What.ABORTED) == [("b", at_s)]
    assert lone.reads == [(LEASE, until_s)]
    assert lone.engine.is_idle and lone.num_free == 4
    assert lone.engine.outstanding_tokens(99.0) == 0


# --- the other engine ----------------------------------------------------------------------------


def test_a_prefill_of_prompt_and_answer_has_a_name_of_its_own() -> None:
    lone = Lone(parks=True)
    asked = replace(request("b", prompt=2 + 3), output_tokens=2)
    again = Ticket(0, asked, is_over=True)
    lone.engine.start(0.0, Job(again, Kind.PREFILL, id="b again"))
    lone.run()
    (held,) = [one for one in lone.outputs if one.what is What.PREFILLED]
    assert (held.job.id, held.at_s, held.num_blocks) == ("b again", 1.5 + 1.125, 3)
    lone.engine.abort(3.0, "b")  # that is another one
    lone.engine.abort(3.0, "b again")  # and this one is over
    assert held.lease is not None
    lone.engine.end_lease(4.0, held.lease)
    lone.run()
    assert lone.said(What.ABORTED) == []
    assert lone.said(What.LEASE_ENDED) == [("b again", 4.0)]
    assert lone.engine.is_idle and lone.num_free == 100


def test_it_finds_what_the_prompt_has_left_where_it_was_computed_first() -> None:
    lone = Lone(replace(SPEC, prefix_caching=True))
    lone.start("b", prompt=8, out=6, kind=Kind.PREFILL)
    lone.run()
    (held,) = [one for one in lone.outputs if one.what is What.PREFILLED]
    assert held.lease is not None
    lone.engine.end_lease(5.0, held.lease)
    again = Ticket(0, request("b", prompt=8 + 3, out=2), is_over=True)
    lone.engine.start(6.0, Job(again, Kind.PREFILL, id="b again"))
    lone.run()
    # Four blocks of the prompt are there: three tokens are left.
    assert lone.said(What.PREFILLED)[1] == ("b again", 6.0 + 1.375)
    assert again.cached_tokens == 8
