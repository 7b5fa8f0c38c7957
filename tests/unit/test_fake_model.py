"""The fake engine's answers: tokens, text and ends are the same on every route."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_box import ROOMY, TINY, Kind, boxed, spec_of
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import Output, PullDone
from tinfer.worker.fake_model import expected_answer
from tinfer.worker.fake_settings import settings_of

stops = st.lists(st.text("abdeg ik", min_size=1, max_size=3), max_size=2)
samplings = st.builds(
    SamplingSpec,
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 3),
    seed=st.none() | st.integers(-5, 5),
    stop=stops,
    include_stop_str_in_output=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, 60), max_size=20),
    ignore_eos=st.booleans(),
    skip_special_tokens=st.booleans(),
    logprobs=st.none() | st.integers(0, 2),
)
prompts = st.lists(st.integers(0, 70), min_size=1, max_size=40)
kinds: st.SearchStrategy[Kind] = st.sampled_from(["whole", "prefill"])


@st.composite
def requests(draw: st.DrawFn) -> tuple[Kind, list[int], SamplingSpec]:
    """A request; half of them stop at a piece of text that they do come to."""
    prompt, sampling = draw(prompts), draw(samplings)
    if draw(st.booleans()):
        free = msgspec.structs.replace(sampling, stop=[])
        text = expected_answer(prompt, free, settings_of(spec_of({"vocab_size": 64, **TINY})))[1]
        start = draw(st.integers(0, len(text)))
        stop = text[start : start + draw(st.integers(1, 9))]
        sampling = msgspec.structs.replace(sampling, stop=[stop] if stop else [])
    return draw(kinds), prompt, sampling


@settings(max_examples=150)
@given(
    st.lists(requests(), min_size=1, max_size=8),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1 << 32),
)
def test_any_interleaving_gives_the_expected_answers(
    work: list[tuple[Kind, list[int], SamplingSpec]],
    chunk: int,
    fail_pull_rate: float,
    seed: int,
) -> None:
    rng = random.Random(seed)
    with boxed(chunk=chunk, vocab_size=64, fail_pull_rate=fail_pull_rate, **TINY) as box:
        pending = list(enumerate(work))
        while pending or any(engine.has_requests() for engine in box.engines):
            move = rng.random()
            if pending and move < 0.3:
                number, (kind, prompt, sampling) = pending.pop(0)
                box.start(str(number), kind, prompt, sampling)
            elif move < 0.33 and box.clients:
                gone = rng.choice(list(box.clients))
                client = box.clients.pop(gone)
                box.p.abort([gone])
                box.d.abort([gone, "nobody"])
                if client.source is not None:
                    box.p.release_lease(client.source.lease)
            else:
                box.step(rng.choice(box.engines), handoff=True)
        for client in box.clients.values():
            assert client.answer == box.expected(client)
            asked = client.sampling.logprobs is not None
            assert len(client.logprobs) == (len(client.token_ids) if asked else 0)
        box.assert_zero()
        assert len(box.seen(PullDone)) == box.d.stats().num_pulls


@settings(max_examples=60)
@given(prompts, samplings, st.integers(1, 39))
def test_emitted_tokens_as_prompt_continue_the_answer(
    prompt: list[int], sampling: SamplingSpec, cut: int
) -> None:
    plain = msgspec.structs.replace(sampling, min_tokens=0, stop=[])
    known = settings_of(spec_of({"vocab_size": 64, **TINY}))
    token_ids, text, *end = expected_answer(prompt, plain, known)
    cut = min(cut, len(token_ids) - 1)
    head = msgspec.structs.replace(plain, max_tokens=cut)
    tail = msgspec.structs.replace(plain, max_tokens=plain.max_tokens - cut)
    before = expected_answer(prompt, head, known)[1] if cut else ""
    more, after, *same_end = expected_answer(prompt + token_ids[:cut], tail, known)
    assert (token_ids[:cut] + more, before + after, same_end) == (token_ids, text, end)


def test_preemption_and_chunks_do_happen_and_change_nothing() -> None:
    with boxed(chunk=6, **TINY) as box:
        for number in range(6):
            prompt = list(range(number, number + 18))
            box.start(f"w{number}", "whole", prompt, SamplingSpec(max_tokens=30, ignore_eos=True))
        box.drain()
        stats = box.d.stats()
        assert stats.num_preemptions > 0
        assert box.finished == [f"w{number}" for number in range(6)], "first come, first served"
        assert stats.num_computed_prompt_tokens > 6 * 18
        for client in box.clients.values():
            assert client.answer == box.expected(client)
        box.assert_zero()


def test_max_model_len_ends_an_answer() -> None:
    with boxed(max_model_len=20, **TINY) as box:
        box.start("r", "whole", list(range(17)), SamplingSpec(max_tokens=99, ignore_eos=True))
        box.drain()
        assert len(box.clients["r"].token_ids) == 3
        assert box.clients["r"].end == ("length", None)


def answers(**sampling: Any) -> list[tuple[list[int], str, str, int | str | None]]:
    """The answers to some prompts, of an unbounded length unless said otherwise."""
    spec = SamplingSpec(**{"max_tokens": 60, "ignore_eos": True, **sampling})
    known = settings_of(spec_of(ROOMY))
    return [expected_answer([n, n + 1, n * n], spec, known) for n in range(40)]


@pytest.mark.parametrize("shown", [False, True])
def test_stop_strings_cut_the_text_where_they_first_end(shown: bool) -> None:
    stop = ["a", " t"]
    num_stopped = 0
    for free, cut in zip(
        answers(), answers(stop=stop, include_stop_str_in_output=shown), strict=True
    ):
        text = free[1]
        ends = [text.index(s) + len(s) for s in stop if s in text]
        if not ends:
            assert cut == free
            continue
        num_stopped += 1
        _, got, reason, found = cut
        assert reason == "stop"
        assert isinstance(found, str)
        assert got == text[: min(ends) if shown else min(ends) - len(found)]
    assert num_stopped > 20


@pytest.mark.parametrize("route", ["whole", "prefill"])
def test_text_that_may_become_a_stop_string_is_held_back(route: Kind) -> None:
    """Each stop string is a piece of the free answer's text, over several tokens."""
    with boxed(**ROOMY) as box:
        wanted = {}
        for number, (_, text, _, _) in enumerate(answers()):
            stop = text[number % 3 : number % 3 + 7]
            sampling = SamplingSpec(max_tokens=60, ignore_eos=True, stop=[stop])
            box.start(str(number), route, [number, number + 1, number * number], sampling)
            wanted[str(number)] = (text[: text.index(stop)], ("stop", stop))
        box.drain(handoff=True)
        assert {name: (c.text, c.end) for name, c in box.clients.items()} == wanted
        box.assert_zero()


def test_stop_tokens_end_after_min_tokens() -> None:
    stop_token_ids = list(range(100, 200))
    ended = answers(stop_token_ids=stop_token_ids, min_tokens=4)
    stopped = [answer for answer in ended if answer[2] == "stop"]
    assert len(stopped) > 30
    for token_ids, _, _, found in stopped:
        assert found == token_ids[-1]
        assert found in stop_token_ids
        assert len(token_ids) > 4
        assert not set(token_ids[:-1]) & set(stop_token_ids)


def test_answers_end_by_themselves_at_about_the_mean_length() -> None:
    spec = SamplingSpec(max_tokens=500)
    known = settings_of(spec_of(ROOMY))
    lengths = [len(expected_answer([n], spec, known)[0]) for n in range(400)]
    assert 9 < sum(lengths) / len(lengths) < 15
    assert len(set(lengths)) > 20


def test_text_comes_in_awkward_pieces() -> None:
    with boxed(**ROOMY) as box:
        sampling = SamplingSpec(max_tokens=200, ignore_eos=True)
        box.start("r", "whole", [1, 2, 3], sampling)
        pieces = []
        while box.d.has_requests():
            pieces += [output.text for output in box.d.step()]
        assert "" in pieces
        assert any(len(piece) > 3 for piece in pieces)
        assert "".join(pieces) == expected_answer([1, 2, 3], sampling, box.settings)[1]


def test_seeds_and_prompts_change_the_answer() -> None:
    known = settings_of(spec_of(ROOMY))
    spec = SamplingSpec(max_tokens=30, ignore_eos=True, seed=1)
    other = msgspec.structs.replace(spec, seed=2)
    first = expected_answer([1, 2, 3], spec, known)
    assert expected_answer([1, 2, 3], spec, known) == first
    assert expected_answer([1, 2, 3], other, known)[0] != first[0]
    assert expected_answer([1, 2, 4], spec, known)[0] != first[0]
    reseeded = msgspec.structs.replace(known, seed=9)
    assert expected_answer([1, 2, 3], spec, reseeded)[0] != first[0]


def test_logprobs_name_the_sampled_token_first() -> None:
    with boxed(**ROOMY) as box:
        sampling = SamplingSpec(max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        box.start("r", "whole", [4, 5, 6], sampling)
        outputs: list[Output] = []
        while box.d.has_requests():
            outputs += box.d.step()
        assert [output.logprobs[0].token_ids[0] for output in outputs if output.logprobs] == [
            output.token_ids[0] for output in outputs
        ]
        first = outputs[0].prompt_logprobs
        assert first is not None
        assert first[0] is None
        assert [known.token_ids for known in first[1:] if known] == [[5], [6]]
        assert outputs[1].prompt_logprobs is None
