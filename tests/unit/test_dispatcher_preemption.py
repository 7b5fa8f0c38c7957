"""The dispatcher when a decode worker has lost a request's blocks, and what may cross its way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.master_box import STATS, D, DispatcherBox, P, read
from tinfer.master.loop import NO_ANSWER
from tinfer.master.streams import RequestStream
from tinfer.wire import messages as wire
from tinfer.worker.fake_model import prompt_bytes

AGAIN = "r~0"
LEASE = wire.LeaseId(5, 1)
SOURCE = wire.Source("p", 0, LEASE, 22, 2, b"")


@pytest.fixture
def box() -> DispatcherBox:
    return DispatcherBox(preemption="elsewhere")


def lost(box: DispatcherBox) -> RequestStream:
    """`r` has emitted two tokens and lost its blocks; a prefill of both is under way."""
    stream = box.to_decoding()
    box.lease_ended(0)
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "c", 3)
    box.told()
    box.say(D, wire.Step([], STATS, preempted=["r"]))
    tokens = prompt_bytes([*range(20), 17, 18])
    assert box.told() == [(P, wire.Start(AGAIN, "prefill", tokens, NO_ANSWER))]
    return stream


def computed(box: DispatcherBox, **more: Any) -> None:
    """The prefill worker has computed them, and a token that nobody waits for."""
    box.step(P, [99], 1, "x", 1, AGAIN, source=SOURCE, **more)


def assert_over(box: DispatcherBox, num_finished: int = 1) -> None:
    assert box.dispatcher._reprefills == {}
    box.assert_over(num_finished)


async def ended(box: DispatcherBox, stream: RequestStream) -> None:
    """`r` goes on with its third token, which is its last."""
    box.step(D, [19], 3, "d", 4, finish_reason="length")
    reader = await read(stream)
    assert (reader.total["text"], reader.total["token_ids"]) == ("abcd", [17, 18, 19])
    assert reader.total["finish"] == ["length"]
    assert_over(box)


async def test_it_goes_on_with_what_the_other_worker_holds(box: DispatcherBox) -> None:
    stream = lost(box)
    computed(box)
    assert box.told() == [(D, wire.Resume("r", SOURCE))]
    box.pulled()
    assert box.told() == [(P, wire.Wake())]
    box.lease_ended(5)
    await ended(box, stream)


async def test_it_computes_itself_what_the_other_worker_does_not(box: DispatcherBox) -> None:
    stream = lost(box)
    box.say(P, wire.Refused(AGAIN, "too long", client_fault=True))
    assert box.told() == [(D, wire.Resume("r"))]
    await ended(box, stream)


async def test_a_prefill_that_fails_is_no_failure_of_the_answer(box: DispatcherBox) -> None:
    stream = lost(box)
    box.step(P, [], 0, "", 0, AGAIN, finish_reason="error")
    assert box.told() == [(D, wire.Resume("r"))]
    await ended(box, stream)


async def test_a_prefill_whose_worker_dies_is_forgotten(box: DispatcherBox) -> None:
    stream = lost(box)
    box.down(P)
    assert box.told() == [(D, wire.Resume("r"))]
    await ended(box, stream)


@pytest.mark.parametrize("more", [{}, {"finish_reason": "stop"}], ids=["held", "stopped"])
async def test_who_has_left_is_prefilled_for_nobody(
    box: DispatcherBox, more: dict[str, Any]
) -> None:
    stream = lost(box)
    stream.cancel()
    assert box.told() == [(D, wire.Abort(["r"])), (P, wire.Abort([AGAIN]))]
    computed(box, **more)
    assert box.told() == [(P, wire.ReleaseLease(LEASE))]
    box.say(P, wire.Aborted([AGAIN]))
    box.say(D, wire.Aborted(["r"]))
    box.lease_ended(5)
    assert_over(box)


async def test_when_the_worker_that_lost_it_dies_its_prefill_is_ended(box: DispatcherBox) -> None:
    stream = lost(box)
    box.down(D)
    abort, (to, again) = box.told()
    assert abort == (P, wire.Abort([AGAIN]))
    assert to == P and isinstance(again, wire.Start) and again.kind == "whole"
    computed(box)
    assert box.told() == [(P, wire.ReleaseLease(LEASE))]
    box.lease_ended(5)
    stream.cancel()
    box.say(P, wire.Aborted(["r"]))
    assert_over(box)


async def test_when_it_dies_as_it_pulls_the_blocks_are_let_go(box: DispatcherBox) -> None:
    stream = lost(box)
    computed(box)
    box.told()
    box.down(D)
    release, (to, again) = box.told()
    assert release == (P, wire.ReleaseLease(LEASE))
    assert to == P and isinstance(again, wire.Start) and again.kind == "whole"
    box.lease_ended(5)
    stream.cancel()
    box.say(P, wire.Aborted(["r"]))
    assert_over(box)
