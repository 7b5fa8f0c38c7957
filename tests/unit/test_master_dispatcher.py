"""The dispatcher: messages to events, actions to messages, and to each client what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.master_box import LEASE_TTL_S, STATS, D, DispatcherBox, P, Reader, read
from tinfer.core import events
from tinfer.core.sampling import SamplingSpec, TokenLogprobs
from tinfer.errors import EngineFailed, InvalidRequest, NoWorker, Overloaded
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation
from tinfer.worker.fake_model import prompt_bytes


@pytest.fixture
def box() -> DispatcherBox:
    return DispatcherBox()


def position(token: int) -> TokenLogprobs:
    return TokenLogprobs([token], [-1.0], [1], ["x"])


# --- the way of one request ----------------------------------------------------------------------


async def test_a_split_request_from_arrival_to_its_end(box: DispatcherBox) -> None:
    stream = box.submit(seed=3)
    prompt, sampling = prompt_bytes(range(20)), SamplingSpec(max_tokens=8, seed=3)
    assert box.told() == [(P, wire.Start("r", "prefill", prompt, sampling))]
    source = box.prefilled()
    start = wire.Start(
        "r", "decode", prompt, sampling, source, forced_tokens=prompt_bytes([17]), cached_tokens=16
    )
    assert box.told() == [(D, start)]
    box.pulled()
    assert box.told() == [(P, wire.Wake())]
    box.step(D, [17], 1, "ab", 2, cached_tokens=16)
    box.step(D, [18], 2, "c", 3)
    box.step(D, [19], 3, "d", 4, finish_reason="length")
    box.lease_ended(0)
    assert (await read(stream)).total == {
        "text": "abcd",
        "token_ids": [17, 18, 19],
        "logprobs": [],
        "prompt_logprobs": None,
        "finish": ["length"],
        "stop_reason": None,
        "cached_tokens": 16,
    }
    assert box.told() == []
    box.assert_over(1)


async def test_the_first_token_is_there_before_any_decode(box: DispatcherBox) -> None:
    stream = box.submit()
    box.prefilled()
    delta = await anext(aiter(stream))
    assert (delta.text, delta.token_ids, delta.cached_tokens) == ("ab", [17], 16)


async def test_a_whole_request_stays_on_one_worker() -> None:
    box = DispatcherBox(route="whole")
    stream = box.submit()
    ((worker, start),) = box.told()
    assert isinstance(start, wire.Start) and start.kind == "whole"
    box.step(worker, [5], 1, "a", 1)
    box.step(worker, [6, 7], 3, "bc", 3, finish_reason="stop", stop_reason="c")
    reader = await read(stream)
    assert (reader.total["text"], reader.total["token_ids"]) == ("abc", [5, 6, 7])
    assert reader.total["stop_reason"] == "c"
    box.assert_over(1)


async def test_an_end_with_the_first_token_hands_nothing_off(box: DispatcherBox) -> None:
    stream = box.submit()
    box.told()
    box.step(P, [17], 1, "ab", 2, finish_reason="stop", stop_reason=17)
    assert (await read(stream)).total["text"] == "ab"
    assert box.told() == []
    box.assert_over(1)


async def test_a_stop_string_in_the_first_token_releases_what_is_held(box: DispatcherBox) -> None:
    stream = box.submit()
    box.told()
    source = wire.Source("p", 0, wire.LeaseId(4, 1), 20, 2, b"")
    box.step(P, [17], 1, "a", 1, finish_reason="stop", stop_reason="b", source=source)
    assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(4, 1)))]
    box.lease_ended(4)
    assert (await read(stream)).total["finish"] == ["stop"]
    box.assert_over(1)


# --- what of an output is new --------------------------------------------------------------------


@given(
    text=st.text(min_size=1, max_size=12),
    num_tokens=st.integers(1, 6),
    held_back=st.integers(0, 12),
    data=st.data(),
)
async def test_text_is_matched_by_length_whatever_each_side_holds_back(
    text: str, num_tokens: int, held_back: int, data: st.DataObject
) -> None:
    """Prefill releases some prefix with the first token, decode starts again from nothing and
    releases as it likes: its first delta may be shorter than prefill's, or longer."""
    box = DispatcherBox()
    stream = box.submit(logprobs=1)
    tokens = list(range(100, 100 + num_tokens))
    released = min(held_back, len(text))
    source = wire.Source("p", 0, wire.LeaseId(0, 1), 20, 2, b"")
    first: dict[str, Any] = {"source": source, "logprobs": [position(100)], "cached_tokens": 3}
    box.step(P, tokens[:1], 1, text[:released], released, **first)
    box.pulled()
    lengths = sorted(
        data.draw(st.lists(st.integers(0, len(text)), min_size=num_tokens, max_size=num_tokens))
    )
    lengths[-1] = len(text)
    reader = Reader(stream)
    done = 0
    while done < num_tokens:  # several tokens may come in one step
        end = data.draw(st.integers(done + 1, num_tokens))
        start_len = lengths[done - 1] if done else 0
        box.step(
            D,
            tokens[done:end],
            end,
            text[start_len : lengths[end - 1]],
            lengths[end - 1],
            logprobs=[position(token) for token in tokens[done:end]],
            finish_reason="stop" if end == num_tokens else None,
        )
        done = end
    await reader.run()
    assert reader.total["text"] == text
    assert reader.total["token_ids"] == tokens
    assert reader.total["logprobs"] == [position(token) for token in tokens]
    assert reader.total["cached_tokens"] == 3
    box.lease_ended(0)
    box.assert_over(1)


async def test_text_that_a_stop_string_takes_back_is_not_sent_again(box: DispatcherBox) -> None:
    """The end may say that less text counts than was released: nothing is to be added then."""
    stream = box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "", 2, finish_reason="stop", stop_reason="x")
    reader = await read(stream)
    assert (reader.total["text"], reader.total["token_ids"]) == ("ab", [17, 18])


async def test_prompt_logprobs_come_once(box: DispatcherBox) -> None:
    stream = box.submit(prompt_logprobs=0, logprobs=0)
    source = wire.Source("p", 0, wire.LeaseId(0, 1), 20, 2, b"")
    about_prompt = [None, position(1)]
    both: dict[str, Any] = {"prompt_logprobs": about_prompt, "logprobs": [position(17)]}
    box.step(P, [17], 1, "ab", 2, source=source, **both)
    box.pulled()
    box.step(D, [17], 1, "ab", 2, **both)
    box.step(D, [18], 2, "c", 3, logprobs=[position(18)], finish_reason="length")
    reader = await read(stream)
    assert [d.prompt_logprobs for d in reader.deltas if d.prompt_logprobs] == [about_prompt]
    assert reader.total["logprobs"] == [position(17), position(18)]


async def test_an_output_that_says_nothing_new_wakes_nobody(box: DispatcherBox) -> None:
    stream = box.to_decoding()
    iterator = aiter(stream)
    await anext(iterator)
    box.step(D, [17], 1, "ab", 2)
    assert stream._pending is None


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client_fault", "kind"), [(True, InvalidRequest), (False, EngineFailed)])
@pytest.mark.parametrize("where", ["prefill", "decode"])
async def test_a_refusal_is_the_clients_answer(
    box: DispatcherBox, client_fault: bool, kind: type[Exception], where: str
) -> None:
    stream = box.submit()
    if where == "decode":
        box.prefilled()
    box.told()
    worker = P if where == "prefill" else D
    box.say(worker, wire.Refused("r", "cannot", client_fault))
    if where == "decode":
        assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(0, 1)))]
        box.lease_ended(0)
    error = (await read(stream)).error
    assert isinstance(error, kind) and str(error) == "cannot"
    box.assert_over(1)


@pytest.mark.parametrize("worker", [P, D])
async def test_an_engine_error_is_the_clients_answer(
    box: DispatcherBox, worker: Incarnation
) -> None:
    stream = box.submit()
    if worker is D:
        box.prefilled()
        box.pulled()
        box.lease_ended(0)
    box.step(worker, [], 0, finish_reason="error")
    assert isinstance((await read(stream)).error, EngineFailed)
    box.assert_over(1)


async def test_a_full_queue_refuses_at_once() -> None:
    box = DispatcherBox(max_num_queued_reqs=1)
    box.to_queued()
    with pytest.raises(Overloaded) as caught:
        box.submit("one-too-many")
    assert caught.value.retry_after_s > 0
    assert set(box.live) == {"before", "r"}
    assert box.dispatcher.num_finished == 0


async def test_without_a_worker_requests_are_refused() -> None:
    box = DispatcherBox(roles="")
    with pytest.raises(NoWorker):
        box.submit()
    box.assert_over(0)


# --- cancels -------------------------------------------------------------------------------------


async def test_cancel_of_a_queued_request_tells_no_worker(box: DispatcherBox) -> None:
    stream = box.to_queued()
    box.told()
    stream.cancel()
    assert box.told() == []
    assert set(box.live) == {"before"}


async def test_cancel_of_a_waiting_hand_off_releases_the_lease(box: DispatcherBox) -> None:
    stream = box.to_waiting()
    box.told()
    stream.cancel()
    assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(0, 1)))]
    assert "r" not in box.live


@pytest.mark.parametrize("worker", [P, D])
async def test_a_cancelled_request_lives_until_its_worker_has_let_go(
    box: DispatcherBox, worker: Incarnation
) -> None:
    stream = box.submit() if worker is P else box.to_decoding()
    box.told()
    stream.cancel()
    stream.cancel()
    assert box.told() == [(worker, wire.Abort(["r"]))]
    assert box.dispatcher.num_live == 0
    box.step(worker, [1], 5, "late", 40)
    assert set(box.live) == {"r"}
    box.say(worker, wire.Aborted(["r"]))
    if worker is D:
        box.lease_ended(0)
    reader = await read(stream)
    assert (reader.deltas, reader.error) == ([], None)
    box.assert_over(1)


async def test_a_prefill_that_ends_while_it_is_aborted_leaves_nothing_held(
    box: DispatcherBox,
) -> None:
    stream = box.submit()
    stream.cancel()
    box.told()
    box.prefilled()
    assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(0, 1)))]
    box.say(P, wire.Aborted(["r"]))
    box.lease_ended(0)
    box.assert_over(1)


async def test_an_answer_that_ends_while_it_is_aborted_is_over_once(box: DispatcherBox) -> None:
    stream = box.to_decoding()
    stream.cancel()
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    box.say(D, wire.Aborted(["r"]))
    box.lease_ended(0)
    box.assert_over(1)


async def test_cancel_from_a_reader_after_the_end_is_nothing(box: DispatcherBox) -> None:
    stream = box.to_decoding()
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    box.lease_ended(0)
    box.told()
    stream.cancel()
    assert box.told() == []
    box.assert_over(1)


# --- leases --------------------------------------------------------------------------------------


async def test_an_overdue_lease_of_a_waiting_request_is_extended(box: DispatcherBox) -> None:
    box.to_waiting()
    box.told()
    box.say(P, wire.LeasesOverdue([wire.LeaseId(0, 1)]))
    assert box.told() == [(P, wire.ExtendLease(wire.LeaseId(0, 1), LEASE_TTL_S))]


async def test_an_overdue_lease_that_was_read_is_released(box: DispatcherBox) -> None:
    box.to_decoding()
    box.told()
    box.say(P, wire.LeasesOverdue([wire.LeaseId(0, 1), wire.LeaseId(9, 9)]))
    assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(0, 1)))]


# --- late and strange messages -------------------------------------------------------------------


STRANGE: list[wire.ToMaster] = [
    wire.Step([wire.Output("x", [1], 1, "a", 1)], STATS),
    wire.Step([wire.Output("x", [1], 1, "a", 1, "stop")], STATS),
    wire.Step([wire.Output("x", [], 0, "", 0, "error")], STATS),
    wire.PullDone("x", True, "", 0, 0.0, 0.0),
    wire.Aborted(["x"]),
    wire.Refused("x", "no", False),
    wire.LeasesOverdue([wire.LeaseId(5, 5)]),
    wire.Idle(STATS),
    wire.Fault("not for the dispatcher"),
]


@pytest.mark.parametrize("message", STRANGE)
async def test_a_message_about_an_unknown_request_changes_nothing(
    box: DispatcherBox, message: wire.ToMaster
) -> None:
    stream = box.submit()
    box.told()
    box.say(P, message)
    assert box.told() == []
    assert set(box.live) == {"r"}
    assert not stream.ended


async def test_a_prefill_that_nobody_knows_is_released(box: DispatcherBox) -> None:
    box.prefilled("x", slot=3)
    assert box.told() == [(P, wire.ReleaseLease(wire.LeaseId(3, 1)))]
    box.lease_ended(3)
    box.assert_over(0)


async def test_another_incarnations_word_does_not_move_a_request(box: DispatcherBox) -> None:
    """The master drops what a dead incarnation said; should one slip through, the scheduler's
    account of who computes what still stands."""
    box.submit().cancel()
    box.down(P)
    box.up(Incarnation("p", 1))
    stream = box.submit("s")
    box.told()
    box.say(P, wire.Aborted(["s"]))
    box.say(P, wire.Refused("x", "no", False))
    assert set(box.live) == {"s"}
    assert not stream.ended
    snapshot = box.scheduler.ledger_snapshot()
    assert snapshot.requests_by_phase["prefilling"] == 1


async def test_fail_all_ends_every_stream(box: DispatcherBox) -> None:
    streams = [box.submit(f"r{n}") for n in range(5)]
    box.dispatcher.fail_all(NoWorker("stopping"))
    assert box.dispatcher.num_live == 0
    for stream in streams:
        assert isinstance((await read(stream)).error, NoWorker)


async def test_given_up_workers_end_what_waited_for_them() -> None:
    box = DispatcherBox()
    queued = box.to_queued()
    box.dispatcher.worker_event(events.WorkerGone("p"))
    box.dispatcher.worker_event(events.WorkerGone("d"))
    box.down(P)
    assert not queued.ended, "the decode worker can still do it whole"
    box.down(D)
    assert isinstance((await read(queued)).error, NoWorker)
    box.assert_over(2)
