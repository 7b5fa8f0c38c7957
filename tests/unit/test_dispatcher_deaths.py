"""The dispatcher when workers die: what goes on where, and that the client sees nothing of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.master_box import D, DispatcherBox, P, read
from tinfer.core.sampling import SamplingSpec, StructuredSpec
from tinfer.core.types import Phase
from tinfer.errors import EngineFailed
from tinfer.master.streams import RequestStream
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation
from tinfer.worker.fake_model import prompt_bytes


@pytest.fixture
def box() -> DispatcherBox:
    return DispatcherBox()


PROMPT = prompt_bytes(range(20))


async def test_a_prefill_goes_on_elsewhere_when_its_worker_dies(box: DispatcherBox) -> None:
    stream = box.submit()
    box.told()
    box.down(P)
    assert box.told() == [(D, wire.Start("r", "whole", PROMPT, SamplingSpec(8)))]
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    assert (await read(stream)).total["text"] == "abc"
    box.assert_over(1)


async def test_a_pull_goes_on_from_the_same_blocks_when_its_reader_dies() -> None:
    box = DispatcherBox("p d d2")
    stream = box.submit()
    source = box.prefilled()
    (_, first), (reader, pull) = box.told()
    assert isinstance(first, wire.Start) and isinstance(pull, wire.Start)
    box.down(reader)
    other = Incarnation("d2" if reader == D else "d", 0)
    assert box.told() == [(other, pull)] and pull.source == source
    box.say(other, wire.PullDone("r", True, "", 0, 0.0, 0.0))
    box.step(other, [17], 1, "ab", 2)
    box.step(other, [18], 2, "c", 3, finish_reason="stop")
    box.lease_ended(0)
    reading = await read(stream)
    assert reading.total["token_ids"] == [17, 18] and reading.total["text"] == "abc"
    box.assert_over(1)


def decoding(box: DispatcherBox, num: int, **sampling: Any) -> RequestStream:
    """The decode worker has emitted tokens 17, 18, ...: `num` in all, of two characters each."""
    stream = box.submit(max_tokens=99, **sampling)
    box.prefilled()
    box.pulled()
    box.lease_ended(0)
    for number in range(1, num + 1):
        box.step(D, [16 + number], number, "ab" if number == 1 else f"<{number % 10}", 2 * number)
    box.told()
    return stream


@pytest.mark.parametrize(
    "sampling",
    [
        {"seed": 1},
        {"stop": ["x"]},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"bad_words": ["x"]},
        {"structured": StructuredSpec(regex="a*")},
    ],
    ids=lambda one: next(iter(one)),
)
async def test_what_depends_on_all_tokens_is_replayed_step_by_step(
    box: DispatcherBox, sampling: dict[str, Any]
) -> None:
    stream = decoding(box, 12, **sampling)
    box.down(D)
    forced = prompt_bytes(range(17, 29))
    spec = SamplingSpec(99, **sampling)
    assert box.told() == [(P, wire.Start("r", "whole", PROMPT, spec, forced_tokens=forced))]
    for number in range(1, 13):
        box.step(P, [16 + number], number, "??", 2 * number)
    box.step(P, [40], 13, "end", 27, finish_reason="stop")
    reading = await read(stream)
    assert reading.total["token_ids"] == [*range(17, 29), 40]
    assert reading.total["text"].endswith("<2end") and "?" not in reading.total["text"]
    box.assert_over(1)


async def test_other_answers_go_on_from_a_prefill_of_all_but_the_last_tokens(
    box: DispatcherBox,
) -> None:
    stream = decoding(box, 12)
    box.down(D)
    prompt, forced = PROMPT + prompt_bytes(range(17, 21)), prompt_bytes(range(21, 29))
    started = wire.Start("r", "whole", prompt, SamplingSpec(95), forced_tokens=forced)
    assert box.told() == [(P, started)]
    # A character of the four tokens is cut, so the text begins a little off; where the forced
    # tokens end it is where the client's ends.
    for number in range(1, 9):
        box.step(P, [20 + number], number, "?" * (3 if number == 1 else 2), 1 + 2 * number)
    box.step(P, [40], 9, "en", 19)
    box.step(P, [41], 10, "d", 20, finish_reason="length")
    reading = await read(stream)
    assert reading.total["token_ids"] == [*range(17, 29), 40, 41]
    assert reading.total["text"] == "ab<2<3<4<5<6<7<8<9<0<1<2end"
    assert reading.deltas[-1].trace is not None and reading.deltas[-1].trace.restarts == 1
    box.assert_over(1)


async def test_a_split_request_is_replayed_on_both_of_its_workers() -> None:
    box = DispatcherBox("p d d2")
    stream = box.submit(max_tokens=99)
    box.prefilled()
    (_, _), (first, _) = box.told()
    box.say(first, wire.PullDone("r", True, "", 0, 0.0, 0.0))
    box.lease_ended(0)
    for number in range(1, 13):
        box.step(first, [16 + number], number, "ab" if number == 1 else "<>", 2 * number)
    box.told()
    box.down(first)
    prompt, forced = PROMPT + prompt_bytes(range(17, 21)), prompt_bytes(range(21, 29))
    ((to, start),) = box.told()
    assert to == P
    assert start == wire.Start("r", "prefill", prompt, SamplingSpec(95), forced_tokens=forced)
    source = wire.Source("p", 0, wire.LeaseId(1, 1), 24, 2, b"")
    box.step(P, [21], 1, "??", 2, source=source)
    ((second, pull),) = box.told()
    assert isinstance(pull, wire.Start) and (pull.kind, pull.source) == ("decode", source)
    assert (pull.prompt, pull.forced_tokens) == (prompt, forced)
    for number in range(1, 9):
        box.step(second, [20 + number], number, "??", 2 * number)
    box.step(second, [40], 9, "end", 19, finish_reason="stop")
    assert (await read(stream)).total["text"].endswith("<><>end")


async def test_a_stream_that_is_replayed_twice_and_fails_in_between(box: DispatcherBox) -> None:
    stream = decoding(box, 12)
    box.down(D)
    box.step(P, [21], 1, "??", 2)
    box.up(Incarnation("d", 1))
    box.told()
    box.down(P)
    ((to, start),) = box.told()
    assert to == Incarnation("d", 1) and isinstance(start, wire.Start)
    assert start.forced_tokens == prompt_bytes(range(21, 29))
    box.step(to, [21], 1, "??", 2)
    box.step(to, [], 1, "", 2, finish_reason="error")
    reading = await read(stream)
    assert isinstance(reading.error, EngineFailed)
    assert reading.total["token_ids"] == list(range(17, 29))


async def test_the_owners_death_spares_a_request_that_is_read_already(box: DispatcherBox) -> None:
    stream = box.submit()
    box.prefilled()
    box.down(P)
    box.pulled(ok=False)
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    assert (await read(stream)).total["text"] == "abc"
    box.assert_over(1)


async def test_the_owners_death_sends_a_request_that_waits_back(box: DispatcherBox) -> None:
    stream = box.to_waiting()
    box.down(P)
    assert not stream.ended and box.scheduler.request_phase("r") is Phase.QUEUED


async def test_a_zombie_of_a_dead_worker_is_forgotten(box: DispatcherBox) -> None:
    for request_id in ("r", "s"):
        stream = box.submit(request_id)
        stream.cancel()
    assert set(box.live) == {"r", "s"}
    box.down(P)
    box.assert_over(2)


async def test_statistics_go_with_their_worker(box: DispatcherBox) -> None:
    box.say(P, wire.Idle(wire.WorkerStats(num_steps=3)))
    assert box.dispatcher.stats[P].num_steps == 3
    box.down(P)
    assert P not in box.dispatcher.stats


async def test_every_message_carries_the_latest_statistics(box: DispatcherBox) -> None:
    box.submit()
    box.prefilled()
    box.pulled()
    messages: list[wire.ToMaster] = [
        wire.Step([], wire.WorkerStats(num_steps=1)),
        wire.LeasesEnded([wire.LeaseId(0, 1)], wire.WorkerStats(num_steps=2)),
        wire.Idle(wire.WorkerStats(num_steps=3)),
    ]
    for number, message in enumerate(messages, 1):
        box.say(P, message)
        assert box.dispatcher.stats[P].num_steps == number
