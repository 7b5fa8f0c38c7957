"""The stream between the dispatcher and one client: what is pushed is read, once, in order."""

from __future__ import annotations

import asyncio
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.master_box import Reader, total
from tinfer.api.service import Delta
from tinfer.core.sampling import TokenLogprobs
from tinfer.errors import EngineFailed, TinferError, WorkerLost
from tinfer.master.streams import RequestStream


def new_stream(cancelled: list[str] | None = None) -> RequestStream:
    return RequestStream("r", ([] if cancelled is None else cancelled).append)


async def turn() -> None:
    """Let every other task run until it waits."""
    for _ in range(3):
        await asyncio.sleep(0)


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """An answer as the dispatcher pushes it, with logprobs or without."""
    texts = draw(st.lists(st.text(max_size=3), min_size=1, max_size=8))
    with_logprobs = draw(st.booleans())
    deltas = []
    for number, text in enumerate(texts):
        tokens = [number * 10 + n for n in range(draw(st.integers(0, 2)))]
        logprobs = [TokenLogprobs([token], [-0.5], [1], ["x"]) for token in tokens]
        deltas.append(
            Delta(text, tokens, logprobs if with_logprobs else None, cached_tokens=number)
        )
    deltas[0].prompt_logprobs = [None] if draw(st.booleans()) else None
    deltas[-1].finish_reason = draw(st.sampled_from(["stop", "length", "abort"]))
    deltas[-1].stop_reason = draw(st.sampled_from([None, 3, "x"]))
    return deltas


@given(answers())
async def test_what_merged_can_be_taken_apart_at_its_seams(answer: list[Delta]) -> None:
    steps = [(delta.text, list(delta.token_ids)) for delta in answer]
    stream = new_stream()
    for delta in answer:
        stream.push(delta)
    (merged,) = [delta async for delta in stream]
    begins = [(0, 0), *(merged.seams or ())]
    ends = [*begins[1:], (len(merged.text), len(merged.token_ids))]
    assert steps == [
        (merged.text[char:end_char], merged.token_ids[token:end_token])
        for (char, token), (end_char, end_token) in zip(begins, ends, strict=True)
    ]


@given(answers(), st.data())
async def test_any_interleaving_adds_up_to_the_same(
    answer: list[Delta], data: st.DataObject
) -> None:
    expected = total(copy.deepcopy(answer))
    stream = new_stream()
    reader = Reader(stream)
    task = asyncio.create_task(reader.run())
    for delta in answer:
        if data.draw(st.booleans()):
            await turn()
        stream.push(delta)
        stream_is_over = delta.finish_reason is not None
        assert stream.ended == stream_is_over
    stream.push(Delta("late", [99], finish_reason="stop"))
    stream.fail(EngineFailed("late"))
    await task
    assert reader.total == expected
    assert len(reader.total["finish"]) == 1
    assert reader.deltas[-1].finish_reason is not None
    assert reader.error is None


@given(answers(), st.data())
async def test_a_sink_that_takes_some_and_a_reader_have_all_in_order(
    answer: list[Delta], data: st.DataObject
) -> None:
    expected = total(copy.deepcopy(answer))
    stream = new_stream()
    reader = Reader(stream)
    taken: list[Delta] = []

    def sink(delta: Delta) -> bool:
        assert delta.finish_reason is None, "the last delta is the reader's"
        if data.draw(st.booleans()):
            taken.append(delta)
            reader.deltas.append(delta)
            return True
        return False

    stream.write_through(sink)
    task = asyncio.create_task(reader.run())
    for delta in answer:
        if data.draw(st.booleans()):
            await turn()
        stream.push(delta)
    await task
    assert reader.total == expected
    assert reader.error is None


async def test_a_sink_is_offered_nothing_past_what_waits_nor_after_the_end() -> None:
    stream = new_stream()
    offered: list[str] = []

    def sink(delta: Delta) -> bool:
        offered.append(delta.text)
        return delta.text != "b"

    stream.write_through(sink)
    for text in "abc":
        stream.push(Delta(text, [1]))
    assert offered == ["a", "b"]  # c goes behind b, which waits for the reader
    reader = Reader(stream)
    task = asyncio.create_task(reader.run())
    await turn()
    stream.push(Delta("d", [1]))
    stream.cancel()
    stream.push(Delta("e", [1]))
    await task
    assert (offered, [delta.text for delta in reader.deltas]) == (["a", "b", "d"], ["bc"])


async def test_an_unread_answer_is_one_delta() -> None:
    stream = new_stream()
    for n in range(1000):
        stream.push(Delta("ab", [n], [TokenLogprobs([n], [-1.0], [1], ["ab"])]))
    stream.push(Delta("", [], finish_reason="length"))
    reader = Reader(stream)
    await reader.run()
    (delta,) = reader.deltas
    assert (delta.text, delta.token_ids) == ("ab" * 1000, list(range(1000)))
    assert delta.logprobs is not None and len(delta.logprobs) == 1000


async def test_a_stalled_reader_makes_no_step_copy_the_past() -> None:
    stream = new_stream()
    first = Delta("a", [1], [TokenLogprobs([1], [-1.0], [1], ["a"])])
    token_ids, logprobs = first.token_ids, first.logprobs
    stream.push(first)
    stream.push(Delta("b", [2], [TokenLogprobs([2], [-1.0], [1], ["b"])], finish_reason="stop"))
    reader = Reader(stream)
    await reader.run()
    assert reader.deltas[0].token_ids is token_ids
    assert reader.deltas[0].logprobs is logprobs


@given(answers(), st.integers(0, 8), st.booleans())
async def test_a_failure_comes_after_what_is_pending(
    answer: list[Delta], num_pushed: int, reads_along: bool
) -> None:
    pushed = answer[:num_pushed]
    for delta in pushed:
        delta.finish_reason = None
    expected = total(copy.deepcopy(pushed))
    stream = new_stream()
    reader = Reader(stream)
    task = asyncio.create_task(reader.run())
    for delta in pushed:
        stream.push(delta)
        if reads_along:
            await turn()
    stream.fail(WorkerLost("gone"))
    stream.fail(EngineFailed("later"))
    stream.push(Delta("late", [1]))
    await task
    assert reader.total == expected
    assert isinstance(reader.error, WorkerLost)
    again = Reader(stream)
    await again.run()
    assert (again.deltas, again.error) == ([], reader.error)


async def test_reading_after_the_end_gives_nothing() -> None:
    stream = new_stream()
    stream.push(Delta("a", [1], finish_reason="stop"))
    await Reader(stream).run()
    again = Reader(stream)
    await again.run()
    assert (again.deltas, again.error) == ([], None)


@pytest.mark.parametrize("waits", [False, True])
async def test_cancel_tells_once_and_ends_the_reader(waits: bool) -> None:
    cancelled: list[str] = []
    stream = new_stream(cancelled)
    reader = Reader(stream)
    task = asyncio.create_task(reader.run())
    if waits:
        await turn()
    stream.push(Delta("a", [1]))
    for _ in range(3):
        stream.cancel()
    assert cancelled == ["r"]
    assert stream.ended
    stream.push(Delta("late", [2], finish_reason="stop"))
    stream.fail(EngineFailed("late"))
    await task
    assert (reader.deltas, reader.error) == ([], None)


@pytest.mark.parametrize("end", [Delta(finish_reason="stop"), EngineFailed("x")])
async def test_cancel_after_the_end_says_nothing(end: Delta | TinferError) -> None:
    cancelled: list[str] = []
    stream = new_stream(cancelled)
    if isinstance(end, Delta):
        stream.push(end)
    else:
        stream.fail(end)
    stream.cancel()
    assert cancelled == []


async def test_cancel_from_within_the_callback_is_no_second_one() -> None:
    calls: list[str] = []

    def cancel_again(request_id: str) -> None:
        calls.append(request_id)
        stream.cancel()

    stream = RequestStream("r", cancel_again)
    stream.cancel()
    assert calls == ["r"]


async def test_a_reader_that_is_cancelled_leaves_the_stream_as_it_is() -> None:
    stream = new_stream()
    first = asyncio.create_task(Reader(stream).run())
    await turn()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    stream.push(Delta("a", [1], finish_reason="stop"))
    reader = Reader(stream)
    await reader.run()
    assert reader.total["text"] == "a"
