"""What a fake engine does with a request that lost its blocks: it waits, and goes on by computing
them again or with those of another engine, which are checked like any that are pulled."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_box import TINY, Box, Client, Kind, boxed, spec_of
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import Aborted, LeasesEnded, PullDone, Source
from tinfer.worker.fake_model import DIGEST_BYTES, Answer, FakeModel, prompt_bytes
from tinfer.worker.fake_settings import settings_of

KINDS: tuple[Kind, ...] = ("whole", "prefill")
# Two requests of 8 and 20 tokens need 7 blocks each in the end.
TIGHT = {"num_blocks": 8, "block_tokens": 4, "mean_output_tokens": 12}


def start_two(box: Box) -> None:
    for name in ("old", "young"):
        prompt = list(range(len(name), len(name) + 8))
        box.start(name, "whole", prompt, SamplingSpec(max_tokens=20, ignore_eos=True))


def losing(box: Box) -> Client:
    """`young` has lost its blocks and waits; `old` is answered."""
    box.goes_on = lambda: "later"
    start_two(box)
    box.drain()
    assert box.finished == ["old"]
    assert box.d.stats().num_preemptions == 1
    return box.clients["young"]


def prefilled_again(box: Box, client: Client) -> Source:
    """Where the prefill worker holds all that a request has."""
    box.reprefill("again", client)
    sources: list[Source] = []
    while not sources:
        sources = [output.source for output in box.p.step() if output.source is not None]
    return sources[0]


def test_who_lost_its_blocks_waits_and_asks_for_no_steps() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        assert 0 < len(client.token_ids) < 20
        stats = box.d.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 1, 0)
        assert not box.d.has_requests()
        assert box.d.step() == []
        box.d.resume("young", None)
        box.drain()
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_it_goes_on_with_what_another_engine_has_computed() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        num_tokens = 8 + len(client.token_ids)
        num_computed = box.d.stats().num_computed_prompt_tokens
        source = prefilled_again(box, client)
        assert source.num_tokens == num_tokens
        box.d.resume("young", source)
        box.drain()
        assert client.answer == box.expected(client)
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (True, -(-num_tokens // 4) * DIGEST_BYTES)
        (ended,) = box.seen(LeasesEnded)
        assert ended.leases == [source.lease]
        stats = box.d.stats()
        # The last token is computed again, like a prompt's after a pull: it decodes.
        assert stats.num_computed_prompt_tokens == num_computed
        assert stats.num_recomputed_pulled_tokens == 0
        box.assert_zero()


@pytest.mark.parametrize("fail_pull_rate", [0.0, 1.0])
def test_many_go_on_with_what_another_engine_has_computed(fail_pull_rate: float) -> None:
    with boxed(chunk=6, fail_pull_rate=fail_pull_rate, **TINY) as box:
        box.goes_on = lambda: "helped"
        for number in range(6):
            prompt = list(range(number, number + 18))
            box.start(f"w{number}", "whole", prompt, SamplingSpec(max_tokens=30, ignore_eos=True))
        box.drain()
        assert box.num_helped > 0
        assert len(box.seen(PullDone)) == box.d.stats().num_pulls == box.num_helped
        assert all(pulled.ok == (fail_pull_rate == 0.0) for pulled in box.seen(PullDone))
        for client in box.clients.values():
            assert client.answer == box.expected(client)
        box.assert_zero()


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 20), st.integers(15, 40)),
        min_size=4,
        max_size=8,
    ),
    st.integers(4, 24),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1 << 32),
)
def test_any_interleaving_gives_the_expected_answers(
    work: list[tuple[Kind, int, int]], chunk: int, fail_pull_rate: float, seed: int
) -> None:
    """Under pressure, with clients that leave while their request waits, is computed again
    elsewhere or is pulled."""
    rng = random.Random(seed)
    with boxed(chunk=chunk, fail_pull_rate=fail_pull_rate, **TINY) as box:
        box.goes_on = lambda: rng.choice(["here", "helped", "helped"])
        for number, (kind, prompt_tokens, max_tokens) in enumerate(work):
            sampling = SamplingSpec(max_tokens=max_tokens, ignore_eos=True, seed=number)
            box.start(str(number), kind, list(range(number, number + prompt_tokens)), sampling)
        while any(engine.has_requests() for engine in box.engines):
            box.step(rng.choice(box.engines), handoff=True)
            if box.clients and rng.random() < 0.005:
                gone = rng.choice(list(box.clients))
                client = box.clients.pop(gone)
                box.p.abort([gone])
                box.d.abort([gone])
                if client.source is not None:
                    box.p.release_lease(client.source.lease)
        for client in box.clients.values():
            assert client.answer == box.expected(client)
        box.assert_zero()
        assert len(box.seen(PullDone)) == box.d.stats().num_pulls


def test_wrong_blocks_of_an_answer_are_found() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        num_tokens = len(client.token_ids)
        source = prefilled_again(box, client)
        box.spoil(source)
        box.d.resume("young", source)
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.reason) == (
            False,
            "the blocks under a valid lease are not the request's",
        )
        right = box.expected(client)
        assert client.token_ids[:num_tokens] == right[0][:num_tokens]
        assert client.token_ids[num_tokens:] != right[0][num_tokens:]
        box.assert_zero()


@pytest.mark.parametrize("more", [-1, 1])
def test_of_a_source_of_another_length_whole_blocks_are_pulled(more: int) -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        source = prefilled_again(box, client)
        num_tokens = min(source.num_tokens, source.num_tokens + more)
        box.d.resume("young", msgspec.structs.replace(source, num_tokens=source.num_tokens + more))
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (True, num_tokens // 4 * DIGEST_BYTES)
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_a_source_of_less_than_a_block_is_let_go_of_and_all_is_computed_again() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        source = prefilled_again(box, client)
        box.d.resume("young", msgspec.structs.replace(source, num_tokens=3))
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (False, 0)
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_who_waits_can_be_aborted_and_a_late_source_is_let_go_of() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        source = prefilled_again(box, client)
        box.d.abort(["young"])
        assert box.d.take_notices() == [Aborted(["young"])]
        assert box.d.stats().num_waiting == 0
        box.d.resume("young", source)
        box.d.resume("young", None)
        box.drain()
        assert box.seen(PullDone) == []
        box.assert_zero()


def test_an_abort_before_the_pull_lets_go_of_the_source() -> None:
    with boxed(**TIGHT) as box:
        client = losing(box)
        box.d.resume("young", prefilled_again(box, client))
        box.d.abort(["young"])
        box.drain()
        box.assert_zero()


def test_word_to_one_that_does_not_wait_lets_go_of_its_source() -> None:
    with boxed(**TIGHT) as box:
        box.prefill()
        source = box.clients["r"].source
        assert source is not None
        start_two(box)
        box.step(box.d)
        box.d.resume("old", source)
        box.drain()
        assert box.seen(PullDone) == []
        assert box.clients["old"].answer == box.expected(box.clients["old"])
        box.assert_zero()


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(0, 30), st.integers(1, 9)
)
def test_a_block_is_the_same_whether_its_tokens_came_as_prompt_or_as_answer(
    prompt: list[int], num_tokens: int, block_tokens: int
) -> None:
    model = FakeModel(settings_of(spec_of({"block_tokens": block_tokens})))
    sampling = SamplingSpec(max_tokens=40, ignore_eos=True, seed=3)
    answer = Answer(model, prompt_bytes(prompt), sampling)
    before = answer.digests
    emitted = [answer.advance() for _ in range(num_tokens)]
    again = Answer(model, prompt_bytes(prompt + emitted), SamplingSpec(max_tokens=1))
    assert answer.digests == again.digests
    assert len(again.digests) == -(-(len(prompt) + num_tokens) // block_tokens)
    num_whole = len(prompt) // block_tokens
    assert answer.digests[:num_whole] == before[:num_whole]
