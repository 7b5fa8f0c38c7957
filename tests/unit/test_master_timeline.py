"""The figures of an answer: every moment is one at which the dispatcher learned of something."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.master_box import D, DispatcherBox, P, read
from tinfer.api.trace import Predicted, Trace
from tinfer.core.types import Route
from tinfer.master.streams import RequestStream
from tinfer.master.timeline import Timeline
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation


class SteppedClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_s(self) -> float:
        return self.at_s


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


def box_with(clock: SteppedClock, roles: str = "p d", **config: Any) -> DispatcherBox:
    box = DispatcherBox(roles, **config)
    box.dispatcher._clock = clock
    return box


async def trace_of(stream: RequestStream) -> Trace:
    """The trace of an answer that has ended: on its last delta, and on that alone."""
    *before, last = (await read(stream)).deltas
    assert [delta.trace for delta in before] == [None] * len(before)
    assert last.trace is not None
    return last.trace


async def test_a_split_request(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.submit()
    clock.at_s += 2.0
    box.prefilled()
    clock.at_s += 0.25
    box.say(D, wire.PullDone("r", True, "", 4096, 0.125, 0.2))
    clock.at_s += 4.0
    box.step(D, [17, 18, 19], 3, "abcd", 4)
    clock.at_s += 3.75
    box.step(D, [20, 21], 5, "e", 5, finish_reason="stop")
    assert await trace_of(stream) == Trace(
        request_id="r",
        route="split",
        prefill_worker="p",
        decode_worker="d",
        prompt_tokens=20,
        cached_tokens=16,
        output_tokens=5,
        queue_s=0.0,
        prefill_s=2.0,
        ttft_s=2.0,
        handoff_s=0.25,
        copy_s=0.125,
        handoff_bytes=4096,
        recomputed=False,
        decode_s=8.0,
        tpot_s=2.0,
        restarts=0,
        e2el_s=10.0,
        prediction=Predicted("", 8.0, 8.0, 8.0),
    )


async def test_the_time_in_the_queue(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.to_queued()
    clock.at_s += 3.0
    box.prefilled("before", 1)
    clock.at_s += 0.5
    box.prefilled()
    clock.at_s += 1.0
    box.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")
    trace = await trace_of(stream)
    assert (trace.queue_s, trace.prefill_s, trace.ttft_s) == (3.0, 0.5, 3.5)
    assert (trace.handoff_s, trace.e2el_s) == (None, 4.5), "no word of the pull has come"


async def test_a_hand_off_that_waits_for_a_seat(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.to_waiting()
    clock.at_s += 5.0
    box.step(D, [17], 1, "ab", 2, "f1", finish_reason="length")
    clock.at_s += 1.0
    box.pulled()
    box.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")
    trace = await trace_of(stream)
    assert (trace.ttft_s, trace.handoff_s, trace.decode_s) == (0.0, 6.0, 6.0)


async def test_a_failed_hand_off(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.submit()
    box.prefilled()
    clock.at_s += 1.0
    box.pulled(ok=False)
    box.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")
    trace = await trace_of(stream)
    assert trace.recomputed
    assert (trace.handoff_s, trace.copy_s, trace.handoff_bytes) == (None, None, None)


@pytest.mark.parametrize("asked", [Route.SPLIT, Route.WHOLE])
async def test_an_answer_of_one_token(clock: SteppedClock, asked: Route) -> None:
    """It has no gap between tokens; a split request that ends so never saw a decode worker."""
    box = box_with(clock, route=asked.value)
    stream = box.submit()
    ((worker, _),) = box.told()
    clock.at_s += 2.0
    box.step(worker, [17], 1, "ab", 2, finish_reason="stop")
    trace = await trace_of(stream)
    split = asked is Route.SPLIT
    assert (trace.route, trace.prefill_worker) == (asked.value, worker.worker_id)
    assert trace.decode_worker == (None if split else worker.worker_id)
    assert (trace.ttft_s, trace.decode_s, trace.tpot_s, trace.e2el_s) == (2.0, 0.0, None, 2.0)


async def test_a_whole_request(clock: SteppedClock) -> None:
    box = box_with(clock, "b", route="whole")
    stream = box.submit()
    clock.at_s += 1.0
    box.step(Incarnation("b", 0), [17], 1, "ab", 2)
    clock.at_s += 1.0
    box.step(Incarnation("b", 0), [18], 2, "c", 3, finish_reason="length")
    trace = await trace_of(stream)
    assert (trace.route, trace.prefill_worker, trace.decode_worker) == ("whole", "b", "b")
    assert (trace.ttft_s, trace.tpot_s, trace.e2el_s) == (1.0, 1.0, 2.0)
    assert (trace.handoff_s, trace.recomputed) == (None, False)


async def test_an_answer_without_a_token(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.submit()
    clock.at_s += 2.0
    box.step(P, [], 0, finish_reason="stop")
    trace = await trace_of(stream)
    assert (trace.output_tokens, trace.ttft_s, trace.decode_s, trace.e2el_s) == (0, None, None, 2.0)


async def test_a_slow_reader_gets_the_trace_with_what_has_merged(clock: SteppedClock) -> None:
    box = box_with(clock)
    stream = box.to_decoding()
    box.step(D, [17, 18], 2, "abc", 3)
    box.step(D, [19], 3, "d", 4, finish_reason="length")
    (delta,) = (await read(stream)).deltas
    assert delta.trace is not None and delta.trace.output_tokens == 3


def test_figures_are_rounded_to_microseconds(clock: SteppedClock) -> None:
    from tinfer.master.timeline import Timeline

    timeline = Timeline(1.0)
    timeline.started("whole", "b", 1.0 + 1 / 3)
    timeline.has_token(2.0)
    trace = timeline.trace("r", 1, 0, 4, 2.0 + 1 / 7)
    assert (trace.queue_s, trace.prefill_s) == (0.333333, 0.666667)
    assert (trace.decode_s, trace.tpot_s, trace.e2el_s) == (0.142857, 0.047619, 1.142857)
    assert msgspec.json.decode(msgspec.json.encode(trace), type=Trace) == trace


@pytest.mark.parametrize("route", [Route.SPLIT, Route.WHOLE])
def test_what_is_pulled_after_a_preemption_is_no_hand_off(route: Route) -> None:
    timeline = Timeline(100.0)
    timeline.started("prefill" if route is Route.SPLIT else "whole", "p", 100.0)
    timeline.has_token(100.0)
    if route is Route.SPLIT:
        timeline.started("decode", "d", 100.0)
        timeline.pulled(wire.PullDone("r", True, "", 64, 0.25, 0.3), 101.0)
    timeline.pulled(wire.PullDone("r", False, "its worker died", 0, 0.0, 0.0), 150.0)
    trace = timeline.trace("r", 20, 0, 9, 160.0)
    hand_off = (1.0, 64, False) if route is Route.SPLIT else (None, None, False)
    assert (trace.handoff_s, trace.handoff_bytes, trace.recomputed) == hand_off
