"""What a trace shows: every phase of a request where it was, and never more than the rings hold."""

from __future__ import annotations

import pytest

from tests.unit.master_box import D, P, read
from tests.unit.trace_box import Box
from tinfer.api.service import Generation
from tinfer.core import events
from tinfer.core.sampling import SamplingSpec
from tinfer.core.types import Role
from tinfer.errors import NoWorker, RequestNotFound
from tinfer.master.timeline import MAX_MARKS, MAX_MARKS_WITH_CHUNKS, Timeline
from tinfer.master.tracing.chrome import Lanes
from tinfer.master.tracing.recorder import Recorder, record_of
from tinfer.master.tracing.slices import slices_of
from tinfer.master.tracing.steps import StepRing
from tinfer.master.tracing.steps import read as read_steps
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

MASTER, PREFILL, DECODE = "master", "p (prefill)", "d (decode)"


@pytest.fixture
def box() -> Box:
    return Box()


async def test_the_phases_of_a_split_request(box: Box) -> None:
    stream = box.to_queued()
    box.after(3.0)
    box.prefilled("before", 1)
    box.after(0.5)
    box.say(P, wire.Step([], wire.WorkerStats(), progress=[("r", 12)]))
    box.after(0.5)
    box.prefilled()
    box.after(0.25)
    box.say(D, wire.PullDone("r", True, "", 4096, 0.125, 0.2))
    box.after(4.0)
    box.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")
    trace = (await read(stream)).deltas[-1].trace
    assert trace is not None
    seen = box.seen()
    assert seen.shown() == [
        ("queued", MASTER, 0.0, 3.0),
        ("prefill", PREFILL, 3.0, 4.0),
        ("chunk", PREFILL, 3.0, 3.5),
        ("chunk", PREFILL, 3.5, 4.0),
        ("hand-off", PREFILL, 4.0, 4.25),
        ("pull", DECODE, 4.0, 4.25),
        ("copy", DECODE, 4.125, 4.25),
        ("decode", DECODE, 4.25, 8.25),
    ]
    for name, told_s in (
        ("queued", trace.queue_s),
        ("prefill", trace.prefill_s),
        ("hand-off", trace.handoff_s),
        ("copy", trace.copy_s),
    ):
        assert seen.seconds_of(name) == told_s
    assert seen.seconds_of("hand-off") + seen.seconds_of("decode") == trace.decode_s
    assert seen.instants() == [("first token", PREFILL)]
    assert len([one for one in seen.events if one["ph"] == "s"]) == 2, "to prefill, to the pull"
    about = seen.slices("decode")[0]["args"]
    assert (about["prompt_tokens"], about["cached_tokens"], about["output_tokens"]) == (20, 16, 2)
    assert (about["sequence"], about["end"]) == ("r", "stop")


async def test_a_whole_request_and_one_that_still_runs() -> None:
    box = Box("b", route="whole")
    both = Incarnation("b", 0)
    box.submit()
    box.after(1.0)
    box.step(both, [17], 1, "ab", 2)
    box.after(1.0)
    running = box.seen()
    assert running.slices("decode")[0]["args"]["end"] == "running"
    box.step(both, [18], 2, "c", 3, finish_reason="length")
    box.after(9.0)
    shown = [("queued", MASTER, 0.0, 0.0), ("prefill", "b (both)", 0.0, 1.0)]
    shown.append(("decode", "b (both)", 1.0, 2.0))
    assert box.seen().shown() == running.shown() == shown


@pytest.mark.parametrize("route", ["split", "whole"])
async def test_a_first_token_that_is_the_last_is_handed_to_nobody(route: str) -> None:
    box = Box(route=route)
    box.submit()
    ((worker, _),) = box.told()
    box.after(2.0)
    box.step(worker, [17], 1, "ab", 2, finish_reason="stop")
    names = [name for name, *_ in box.seen().shown()]
    assert names == ["queued", "prefill"] + (["decode"] if route == "whole" else [])


async def test_a_hand_off_that_fails_is_computed_again(box: Box) -> None:
    box.submit()
    box.prefilled()
    box.after(1.0)
    box.pulled(ok=False)
    box.after(2.0)
    box.step(D, [17], 1, "ab", 2)
    box.after(1.0)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    seen = box.seen()
    assert seen.shown()[-3:] == [
        ("pull", DECODE, 0.0, 1.0),
        ("prefill", DECODE, 1.0, 3.0),
        ("decode", DECODE, 3.0, 4.0),
    ]
    assert [one["args"].get("recomputed") for one in seen.slices("prefill")] == [None, True]


async def test_a_preemption() -> None:
    box = Box(preemption="elsewhere")
    box.to_decoding()
    box.lease_ended(0)
    box.step(D, [17], 1, "ab", 2)
    box.after(1.0)
    box.say(D, wire.Step([], wire.WorkerStats(), preempted=["r"]))
    box.after(1.0)
    source = wire.Source("p", 0, wire.LeaseId(5, 1), 21, 2, b"")
    box.step(P, [99], 1, "x", 1, "r~0", source=source)
    box.after(1.0)
    box.pulled()
    box.after(1.0)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    seen = box.seen()
    assert seen.shown()[-6:] == [
        ("decode", DECODE, 0.0, 1.0),
        ("preempted", DECODE, 1.0, 2.0),
        ("reprefill", PREFILL, 1.0, 2.0),
        ("pull", DECODE, 2.0, 3.0),
        ("copy", DECODE, 3.0, 3.0),
        ("decode", DECODE, 3.0, 4.0),
    ]
    assert seen.instants()[1:] == [("preempted", DECODE), ("resumed", DECODE)]


async def test_a_preemption_that_computes_again_itself(box: Box) -> None:
    box.to_decoding()
    box.lease_ended(0)
    box.step(D, [17], 1, "ab", 2)
    box.after(1.0)
    box.say(D, wire.Step([], wire.WorkerStats(), preempted=["r"]))
    box.after(1.0)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    again = box.seen().slices("decode")[-1]
    assert again["args"]["recomputed"] and again["dur"] == 1_000_000


async def test_a_death_while_it_decodes_and_one_while_it_pulls() -> None:
    box = Box("p d d2")
    box.submit()
    box.prefilled()
    _, (reader, _) = box.told()
    box.after(1.0)
    box.down(reader)
    other = Incarnation("d2" if reader == D else "d", 0)
    row = f"{other.worker_id} (decode)"
    box.after(1.0)
    box.say(other, wire.PullDone("r", True, "", 0, 0.0, 0.0))
    box.step(other, [17], 1, "ab", 2)
    box.after(1.0)
    box.down(other)
    box.after(1.0)
    box.step(P, [17], 1, "ab", 2)
    box.after(1.0)
    box.step(P, [18], 2, "c", 3, finish_reason="stop")
    seen = box.seen()
    assert seen.shown() == [
        ("queued", MASTER, 0.0, 0.0),
        ("prefill", PREFILL, 0.0, 0.0),
        ("hand-off", PREFILL, 0.0, 2.0),
        ("pull", f"{reader.worker_id} (decode)", 0.0, 1.0),
        ("pull", row, 1.0, 2.0),
        ("copy", row, 2.0, 2.0),
        ("decode", row, 2.0, 3.0),
        ("queued", MASTER, 3.0, 3.0),
        ("prefill", PREFILL, 3.0, 4.0),
        ("decode", PREFILL, 4.0, 5.0),
    ]
    assert [one["args"].get("worker_died") for one in seen.slices("pull")] == [True, None]
    assert seen.slices("decode")[0]["args"]["worker_died"]


async def test_who_leaves_ends_its_slices_then(box: Box) -> None:
    stream = box.to_decoding()
    box.after(1.0)
    stream.cancel()
    box.after(1.0)
    box.say(D, wire.Aborted(["r"]))
    seen = box.seen()
    assert seen.seconds_of("decode") == 1.0
    assert seen.slices("decode")[0]["args"]["end"] == "abort"


async def test_what_workers_did_is_shown_with_what_they_held(box: Box) -> None:
    box.submit()
    for number in range(1, 4):
        box.after(1.0)
        stats = wire.WorkerStats(
            num_running=1,
            num_used_blocks=number // 2,
            num_steps=2 * number,
            busy_s=0.5 * number,
            num_computed_prompt_tokens=50 if number == 1 else 51,
        )
        box.say(P, wire.Step([], stats))
    box.after(5.0)
    box.say(P, wire.Idle(wire.WorkerStats(num_steps=6, busy_s=1.5, num_computed_prompt_tokens=51)))
    seen = box.seen(None)
    steps = [one for one in seen.events if one.get("cat") == "step"]
    assert [one["dur"] for one in steps] == [500_000] * 3
    assert [one["name"] for one in steps] == ["prefill step", "prefill step", "decode step"]
    assert steps[0]["args"] == {"steps": 2, "prompt_tokens": 50, "emitting": 0}
    counters = [(one["name"], one["args"]) for one in seen.events if one["ph"] == "C"]
    assert counters == [
        ("requests", {"running": 1, "waiting": 0}),
        ("KV blocks", {"used": 0}),
        ("KV blocks", {"used": 1}),
        ("requests", {"running": 0, "waiting": 0}),
        ("KV blocks", {"used": 0}),
    ]
    late = [one for one in box.seen(None, 6.5).events if one.get("cat") == "step"]
    assert late == steps[1:], "what ended before is not shown"


async def test_what_happens_to_workers(box: Box) -> None:
    box.dispatcher.on_drained = lambda worker: None
    box.after(1.0)
    box.dispatcher.worker_event(events.DrainAsked(*D))
    box.after(1.0)
    box.down(D)
    box.after(1.0)
    box.up(Incarnation("d", 1))
    box.after(1.0)
    box.down(Incarnation("d", 1))
    box.dispatcher.recorder.role_changed("p", Role.BOTH, "asked for", 105.0)
    seen = box.seen(None)
    assert seen.instants() == [
        ("worker started", "p (both)"),
        ("worker started", DECODE),
        ("drain asked for", DECODE),
        ("worker stopped", DECODE),
        ("worker restarted", DECODE),
        ("worker died", DECODE),
        ("role changed", "p (both)"),
    ]
    assert box.seen(None, 1.5).instants() == seen.instants()[4:]


async def test_who_is_refused_is_shown_at_the_master(box: Box) -> None:
    box.down(P)
    box.down(D)
    with pytest.raises(NoWorker):
        box.dispatcher.submit("r", Generation([1], SamplingSpec(1), response_id="cmpl-me"))
    for name in (None, "me", "cmpl-me"):
        seen = box.seen(name)
        assert ("refused", MASTER) in seen.instants()
        (refused,) = [one for one in seen.events if one["name"] == "refused"]
        assert refused["args"] == {"request": "cmpl-me", "cause": "no-worker"}


async def test_a_request_is_found_by_each_of_its_ids(box: Box) -> None:
    for child in range(2):
        generation = Generation([1, 2], SamplingSpec(1), child=child, response_id="chatcmpl-a-b")
        box.dispatcher.submit(f"r{child}", generation)
    box.submit("other")
    for name, num in (("a-b", 2), ("chatcmpl-a-b", 2), ("r1", 1), (None, 3)):
        assert len(box.seen(name).slices("queued")) == num
    for name in ("", "b", "chatcmpl", "r"):
        with pytest.raises(RequestNotFound, match="no request"):
            box.dispatcher.lately(60.0, name)
    box.step(P, [7], 1, "x", 1, "other", finish_reason="stop")
    box.after(61.0)
    assert box.seen("other", 62.0).slices()
    with pytest.raises(RequestNotFound):
        box.dispatcher.lately(60.0, "other")
    assert {one["args"]["sequence"] for one in box.seen(None, 60.0).slices()} == {"r0", "r1"}


async def test_no_prompt_is_kept(box: Box) -> None:
    box.dispatcher.recorder = recorder = Recorder()
    generation = Generation([1, 2], SamplingSpec(8), prompt_text="the secret")
    box.dispatcher.submit("r", generation)
    box.step(P, [7], 1, "the answer", 10, finish_reason="stop")
    kept = repr(recorder._requests)
    assert "'r'" in kept and "secret" not in kept and "answer" not in kept


async def test_the_rings_are_bounded(box: Box) -> None:
    box.dispatcher.recorder = recorder = Recorder(max_requests=3, max_marks=5)
    for number in range(9):
        box.submit(f"r{number}")
        box.step(P, [7], 1, "x", 1, f"r{number}", finish_reason="stop")
    assert [one.request_id for one in recorder._requests] == ["r7", "r8"], "two moments each"
    assert recorder._num_marks == sum(len(one.marks) for one in recorder._requests) == 4
    recorder._max_marks = 100
    for number in range(9):
        box.submit(f"s{number}")
        box.step(P, [7], 1, "x", 1, f"s{number}", finish_reason="stop")
    assert [one.request_id for one in recorder._requests] == ["s6", "s7", "s8"]


def test_a_request_has_so_many_moments_and_no_more() -> None:
    timeline = Timeline(0.0)
    for number in range(1000):
        timeline.note("chunk", float(number), "p", number)
    assert len(timeline.marks) == MAX_MARKS_WITH_CHUNKS
    for number in range(1000):
        timeline.note("preempted", float(number), "p")
    assert len(timeline.marks) == MAX_MARKS
    other = Timeline(0.0)
    other.ended(1.0)
    other.note("lost", 2.0, "p")
    assert other.marks == []


def test_a_ring_of_steps_keeps_the_last_ones() -> None:
    ring = StepRing(3)
    assert ring.copy() == b""
    for number in range(1, 6):
        ring.add(1, wire.WorkerStats(num_steps=number, busy_s=float(number)), number, float(number))
        rows = list(read_steps(ring.copy()))
        for since_s in (0.5, 2.5, 4.0, 5.5):
            late = [row for row in rows if row.end_s >= since_s]
            assert list(read_steps(ring.copy(since_s))) == late
        assert [row.end_s for row in rows] == list(range(max(1, number - 2), number + 1))
        assert all((row.num_steps, row.busy_s) == (1.0, 1.0) for row in rows)
    ring.add(2, wire.WorkerStats(num_steps=2, busy_s=0.5), 1, 9.0)
    last = list(read_steps(ring.copy()))[-1]
    assert (last.num_steps, last.busy_s) == (2.0, 0.5), "another incarnation counts from zero"


def test_lanes_are_used_again_and_never_by_two_at_once() -> None:
    times = [(0.0, 4.0), (1.0, 2.0), (2.0, 3.0), (2.5, 5.0), (4.0, 6.0), (4.0, 4.0)]
    lanes = Lanes()
    assert [lanes.take(*one) for one in times] == [1, 2, 2, 3, 1, 2]
    assert lanes.num == 3


async def test_a_snapshot_does_not_change_with_what_comes_after(box: Box) -> None:
    box.to_decoding()
    (live,) = box.live.values()
    record = record_of(live)
    before = [one.name for one in slices_of(record, 100.0)]
    box.step(D, [17, 18], 2, "abc", 3, finish_reason="stop")
    assert [one.name for one in slices_of(record, 100.0)] == before
