"""The simulated engine against step sequences worked out by hand: a step takes 1 s, 1/8 s per
prompt token and 1/4 s per decoding sequence; blocks have 2 tokens, a step has 4."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from tests.sim.box import SPEC, Lone
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Kind, What
from tinfer.sim.spec import EngineSpec


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    lone = Lone()
    lone.start("a", prompt=10, out=3)
    lone.run()
    # Chunks of 4, 4 and 2 tokens, then two steps of one decode.
    assert lone.tokens_s("a") == [1.5 + 1.5 + 1.25, 5.5, 6.75]
    assert lone.said(What.FIRST_TOKEN) == [("a", 4.25)]
    assert lone.said(What.FINISHED) == [("a", 6.75)]
    assert lone.engine.is_idle and lone.num_free == SPEC.num_blocks
    assert lone.engine.report(6.75) == (5, 6.75, 10, 100)


def test_what_decodes_and_prompts_that_run_come_before_what_waits() -> None:
    lone = Lone()
    lone.start("a", prompt=4)
    lone.start("b", prompt=6)
    lone.start("c", prompt=1, out=1)
    lone.run()
    # a: 4 | a + 3 of b | a + 3 of b | b + 1 of c | b
    assert lone.tokens_s("a") == [1.5, 3.125, 4.75]
    assert lone.tokens_s("b") == [4.75, 6.125, 7.375]
    assert lone.tokens_s("c") == [6.125]
    assert lone.said(What.FIRST_TOKEN) == [("a", 1.5), ("b", 4.75)]


def test_a_context_costs_what_each_prompt_token_looks_back_at() -> None:
    costs = replace(SPEC.costs, prefill_context_s=0.125)
    lone = Lone(replace(SPEC, costs=costs))
    lone.start("a", prompt=6, out=1)
    lone.run()
    # 4 tokens see 0 to 4 others, so 8 in all; 2 more see 4 to 6: 10.
    assert lone.tokens_s("a") == [1.5 + 1.0 + 1.25 + 1.25]
    assert lone.tokens_s("a") == [costs.prefill_s(6, chunk_tokens=4)]


def test_seats_hold_back_whoever_comes_late() -> None:
    lone = Lone(replace(SPEC, max_num_seqs=1))
    lone.start("a", prompt=4, out=2)
    lone.start("b", prompt=4, out=1)
    lone.run()
    assert lone.tokens_s("a") == [1.5, 2.75]
    assert lone.tokens_s("b") == [4.25]


def test_a_message_during_a_step_acts_after_it() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=100)
    lone.run(until_s=20.0)
    lone.start("b", prompt=2, out=1, at_s=22.0)
    lone.run()
    # a decodes at 1.5, 2.75, 4.0 ... 21.5 and 22.75; b's prompt is in the step after that.
    assert lone.tokens_s("a")[16:19] == [21.5, 22.75, 24.25]
    assert lone.tokens_s("b") == [24.25]


def test_a_message_at_the_very_end_of_a_step_acts_at_once() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=3)
    lone.run(until_s=1.0)
    lone.start("b", prompt=2, out=1, at_s=2.75)
    lone.run()
    assert lone.tokens_s("b") == [2.75 + 1.5]


def test_a_report_within_a_row_of_steps_counts_those_that_are_over() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=9)
    lone.run(until_s=2.0)
    # The prompt's step, then decodes that end at 2.75, 4.0, 5.25 ...; the step under way has its
    # blocks already: 4 tokens fill two, the 5th and 6th take the third, the 7th the fourth.
    reports = {at_s: lone.engine.report(at_s) for at_s in (1.5, 2.7, 2.75, 3.9, 4.0, 5.0)}
    assert [one.num_steps for one in reports.values()] == [1, 1, 2, 2, 3, 3]
    assert [one.num_free_blocks for one in reports.values()] == [97, 97, 97, 97, 96, 96]
    assert reports[4.0].busy_s == 4.0
    assert {one.num_prefill_tokens for one in reports.values()} == {4}


def test_the_prefill_budget_holds_back_prompts_and_nothing_else() -> None:
    lone = Lone()
    lone.engine.set_budget(0.0, 1)
    lone.start("a", prompt=2, out=4)
    lone.run(until_s=0.0)
    lone.engine.set_budget(2.0, 0)
    lone.start("b", prompt=2, out=1, at_s=2.0)
    lone.start("c", prompt=4, out=2, at_s=2.0, kind=Kind.DECODE)
    lone.run(until_s=20.0)
    # One token per step; after that nothing of b, while c is pulled (0.5 s) past it and decodes.
    assert lone.tokens_s("a") == [2.25, 3.5, 5.0, 6.5]
    assert lone.said(What.PULLED) == [("c", 3.5)]
    assert lone.tokens_s("c") == [6.5]
    assert lone.tokens_s("b") == []
    assert lone.engine.next_s == math.inf
    lone.engine.set_budget(20.0, None)
    lone.run()
    assert lone.tokens_s("b") == [21.25]


def test_a_running_prompt_stops_at_a_budget_of_nothing_and_goes_on_later() -> None:
    lone = Lone()
    lone.start("a", prompt=6, out=1)
    lone.run(until_s=1.0)
    lone.engine.set_budget(1.0, 0)
    lone.engine.set_budget(5.0, 3)
    lone.run()
    assert lone.tokens_s("a") == [5.0 + 1.25]


def test_without_blocks_the_newest_gives_way_and_computes_all_again() -> None:
    lone = Lone(replace(SPEC, num_blocks=4))
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=2, out=5)
    lone.run()
    # Both prompts; three decodes of two until each would need a third block; then a alone.
    assert lone.tokens_s("a") == [1.5, 3.0, 4.5, 5.75, 7.0]
    # b: 2 prompt tokens and 3 of its own again in chunks of 4 and 1, then its last token.
    assert lone.tokens_s("b") == [1.5, 3.0, 4.5, 9.625, 10.875]
    assert lone.engine.take_preempted() == ("b",)
    assert (lone.tickets["a"].num_preemptions, lone.tickets["b"].num_preemptions) == (0, 1)
    assert lone.said(What.FIRST_TOKEN) == [("a", 1.5), ("b", 1.5)]
    assert lone.num_free == 4


@pytest.mark.parametrize(("victim", "expected"), [("newest", "b"), ("least-progress", "a")])
def test_the_victim_is_the_newest_or_the_least_progressed(victim: str, expected: str) -> None:
    spec = EngineSpec(
        costs=SPEC.costs,
        num_blocks=5,
        block_tokens=2,
        max_num_seqs=4,
        max_num_batched_tokens=4,
        prefix_caching=False,
        victim=victim,  # type: ignore[arg-type]
    )
    lone = Lone(spec)
    # a computes 4 of 5 tokens and stops there; b is admitted after it and grows until the 6th block
    # would be needed.
    lone.start("a", prompt=5, out=1)
    lone.run(until_s=1.0)
    lone.engine.set_budget(1.0, 0)
    lone.start("b", prompt=3, out=6, at_s=1.0, kind=Kind.DECODE)
    lone.run(until_s=30.0)
    assert lone.engine.take_preempted() == (expected,)


def test_of_equally_progressed_ones_the_victim_is_the_youngest() -> None:
    spec = replace(SPEC, num_blocks=6, max_num_batched_tokens=8, victim="least-progress")
    lone = Lone(spec)
    # Both decode from 1.75 on; a's third token after that and b's would each need a further block.
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=4, out=5)
    lone.run()
    assert lone.engine.take_preempted() == ("b",)


def test_what_lost_its_blocks_goes_before_what_waits() -> None:
    lone = Lone(replace(SPEC, num_blocks=4))
    lone.start("a", prompt=2, out=5)
    lone.start("b", prompt=2, out=5)
    lone.start("c", prompt=1, out=1, at_s=4.0)
    lone.run()
    # b's third token again takes all four tokens of the step that starts when a is over.
    assert lone.tokens_s("b")[3] == 9.625 + 0.125  # and c's one prompt token rides along
    assert lone.tokens_s("c") == [9.75]


def test_a_request_that_can_never_fit_is_refused() -> None:
    lone = Lone(replace(SPEC, num_blocks=4))
    lone.start("a", prompt=6, out=4)  # 9 tokens of KV
    lone.start("b", prompt=6, out=3)  # 8
    lone.run()
    assert lone.said(What.REFUSED) == [("a", 0.0)]
    assert lone.said(What.FINISHED)[0][0] == "b"
    assert lone.engine.outstanding_tokens(100.0) == 0


def test_all_of_a_prompt_must_fit_before_its_first_chunk_is_computed() -> None:
    lone = Lone(replace(SPEC, num_blocks=6))
    lone.start("a", prompt=4, out=4)  # 2 blocks, then 4
    lone.start("b", prompt=10, out=1)  # 5 blocks
    lone.run()
    assert lone.tokens_s("a") == [1.5, 2.75, 4.0, 5.25]
    assert lone.tokens_s("b") == [5.25 + 1.5 + 1.5 + 1.25]
    assert lone.engine.num_preemptions == 0


def test_the_watermark_keeps_blocks_free_of_those_who_come_beside_others() -> None:
    lone = Lone(replace(SPEC, num_blocks=6, watermark=0.4))  # 2 blocks
    lone.start("a", prompt=2, out=4)
    lone.start("b", prompt=8, out=1)  # alone 4 of 6 would fit beside the one of a
    lone.run()
    assert lone.tokens_s("b")[0] > lone.tokens_s("a")[-1]


def test_a_prefill_holds_its_blocks_until_the_lease_ends() -> None:
    lone = Lone()
    lone.start("a", prompt=5, out=7, kind=Kind.PREFILL)
    lone.run()
    (held,) = [one for one in lone.outputs if one.what is What.PREFILLED]
    assert (held.at_s, held.num_blocks) == (1.5 + 1.125, 3)
    assert lone.tokens_s("a") == [held.at_s]
    assert (lone.num_free, lone.engine.num_open_leases) == (97, 1)
    assert held.lease is not None
    lone.engine.end_lease(4.0, held.lease)
    lone.engine.end_lease(5.0, held.lease)
    lone.run()
    assert lone.said(What.LEASE_ENDED) == [("a", 4.0)]
    assert lone.num_free == 100 and lone.engine.is_idle


def test_an_answer_that_ends_with_its_first_token_is_not_held() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=1, kind=Kind.PREFILL)
    lone.run()
    assert lone.said(What.FINISHED) == [("a", 1.5)]
    assert lone.said(What.PREFILLED) == [] and lone.engine.is_idle


def test_a_pull_takes_all_blocks_copies_and_then_repeats_the_first_token() -> None:
    lone = Lone()
    lone.start("a", prompt=5, out=3, kind=Kind.DECODE)
    lone.run(until_s=0.25)
    assert lone.num_free == 97
    assert [until_s for _, until_s in lone.reads] == [0.5]
    lone.run()
    assert lone.said(What.PULLED) == [("a", 0.5)]
    # Its first token at 1.75 the client has already.
    assert lone.tokens_s("a") == [3.0, 4.25]
    assert lone.said(What.FINISHED) == [("a", 4.25)]
    assert lone.num_free == 100


def test_a_pull_holds_a_seat_and_does_not_step() -> None:
    lone = Lone(replace(SPEC, max_num_seqs=2))
    lone.start("a", prompt=4, out=3)
    lone.start("b", prompt=4, out=2, kind=Kind.DECODE)
    lone.start("c", prompt=4, out=1)
    lone.run()
    # The pull begins with a's prompt and is over when that is: then both decode, c must wait.
    assert lone.said(What.PULLED) == [("b", 1.5)]
    assert lone.tokens_s("a") == [1.5, 3.0, 4.5]
    assert lone.tokens_s("b") == [4.5]
    assert lone.tokens_s("c") == [6.0]


def test_a_pull_leaves_the_blocks_that_a_prompt_under_way_still_needs() -> None:
    lone = Lone(replace(SPEC, num_blocks=6))
    lone.start("a", prompt=8, out=1)  # 4 blocks, 2 of them with its first chunk
    lone.start("b", prompt=6, out=2, kind=Kind.DECODE)  # 3 blocks
    lone.run()
    assert lone.tokens_s("a") == [3.0]
    assert [until_s for _, until_s in lone.reads] == [3.5]


def test_every_stage_can_be_aborted() -> None:
    lone = Lone(replace(SPEC, max_num_seqs=3))
    lone.start("decodes", prompt=4, out=50)
    lone.start("prefills", prompt=40, out=2, at_s=1.5)
    lone.start("pulls", prompt=4, out=2, at_s=1.5, kind=Kind.DECODE)
    lone.start("waits", prompt=4, out=2, at_s=1.5)
    lone.start("waits to pull", prompt=4, out=2, at_s=1.5, kind=Kind.DECODE)
    lone.run(until_s=1.75)
    for name in lone.tickets:
        lone.engine.abort(1.75, name)
        lone.engine.abort(1.75, name)
    lone.run()
    # The step under way is one decode and three tokens of the prompt.
    assert sorted(lone.said(What.ABORTED)) == sorted((name, 3.125) for name in lone.tickets)
    # The copy went on until it was over, and said so.
    assert lone.said(What.PULLED) == [("pulls", 3.125)]
    assert lone.num_free == 100 and lone.engine.is_idle
    assert lone.engine.outstanding_tokens(9.0) == 0
    # A pull that never began marks what it would have read as done.
    assert [until_s for _, until_s in lone.reads] == [2.0, 3.125]


def test_an_abort_of_what_has_ended_or_never_came_is_ignored() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=1)
    lone.run()
    lone.engine.abort(9.0, "a")
    lone.engine.abort(9.0, "b")
    lone.run()
    assert lone.said(What.ABORTED) == []


def test_progress_tells_of_chunks_once() -> None:
    lone = Lone()
    lone.start("a", prompt=9, out=2)
    lone.run(until_s=1.0)
    assert lone.engine.take_progress() == ()
    lone.run(until_s=3.5)
    assert lone.engine.has_news
    assert lone.engine.take_progress() == (("a", 8),)
    assert not lone.engine.has_news
    assert lone.engine.take_progress() == ()


def test_outstanding_tokens_are_prompts_until_the_first_token_and_then_what_is_to_come() -> None:
    lone = Lone()
    lone.start("a", prompt=4, out=5)
    lone.start("b", prompt=4, out=2, at_s=0.5)
    assert lone.engine.outstanding_tokens(0.0) == 15
    lone.run(until_s=1.5)
    assert lone.engine.outstanding_tokens(1.5) == 4 + 6
    lone.run()
    assert lone.engine.outstanding_tokens(99.0) == 0


def test_whole_prompts_only_and_in_steps_of_their_own() -> None:
    spec = replace(SPEC, chunked_prefill=False, max_num_batched_tokens=8)
    lone = Lone(spec)
    lone.start("a", prompt=4, out=3)
    lone.start("b", prompt=4, out=2)
    lone.start("c", prompt=4, out=1)
    lone.start("long", prompt=20, out=1, at_s=3.0)
    lone.run()
    # a and b | c | long, beyond the budget but alone | a and b decode | a decodes
    assert lone.tokens_s("a") == [2.0, 8.5, 9.75]
    assert lone.tokens_s("b") == [2.0, 8.5]
    assert lone.tokens_s("c") == [3.5]
    assert lone.tokens_s("long") == [7.0]


def test_an_engine_with_nothing_to_do_never_wakes() -> None:
    engine = SimEngine(SPEC)
    engine.plan()
    assert engine.next_s == math.inf
    assert engine.advance(100.0) == []


def test_a_budget_below_the_seats_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least max_num_seqs"):
        EngineSpec(num_blocks=1, max_num_seqs=8, max_num_batched_tokens=7)


def test_noise_bends_times_keeps_their_mean_and_follows_the_seed() -> None:
    def ends_s(sigma: float, seed: int) -> list[float]:
        lone = Lone()
        lone.engine = SimEngine(replace(SPEC, num_blocks=2000, noise=sigma), seed=seed)
        lone.start("a", prompt=4, out=2000)
        lone.run()
        return lone.tokens_s("a")

    noisy = ends_s(0.3, seed=1)
    assert noisy == ends_s(0.3, seed=1) != ends_s(0.3, seed=2)
    assert noisy[-1] == pytest.approx(ends_s(0.0, seed=1)[-1], rel=0.03)
