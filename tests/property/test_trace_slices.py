"""Whatever moments a request has, its slices are a trace: they nest, and none ends before it
begins. Workers that make no sense may cause any of them in any order."""

from __future__ import annotations

import typing

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trace_box import check_trace
from tinfer.master.timeline import Mark, What
from tinfer.master.tracing.chrome import trace_events
from tinfer.master.tracing.recorder import Lately, RequestRecord
from tinfer.wire.messages import PullDone

ROLES = {"p": "prefill", "d": "decode", "e": "decode"}
PULLS = st.builds(
    PullDone,
    request_id=st.just("r"),
    ok=st.booleans(),
    reason=st.just(""),
    num_bytes=st.just(64),
    copy_s=st.floats(0, 5),
    handoff_s=st.just(0.0),
)
# How long after the one before, and what.
MOMENTS = st.tuples(
    st.floats(0, 3),
    st.sampled_from(typing.get_args(What)),
    st.sampled_from(sorted(ROLES)),
    st.integers(0, 99),
    st.none() | PULLS,
)


def record(number: int, moments: list[typing.Any], end_after_s: float | None) -> RequestRecord:
    at_s = 10.0 + number
    marks = []
    for after_s, what, worker_id, num_tokens, pull in moments:
        at_s += after_s
        marks.append(Mark(at_s, what, worker_id, num_tokens, pull))
    return RequestRecord(
        request_id=f"r{number}",
        response_id="",
        arrived_s=10.0 + number,
        ended_s=None if end_after_s is None else at_s + end_after_s,
        end=None if end_after_s is None else "stop",
        marks=tuple(marks),
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=1,
    )


@given(st.lists(st.tuples(st.lists(MOMENTS, max_size=9), st.none() | st.floats(0, 3)), max_size=4))
def test_any_moments_make_a_trace(drawn: list[tuple[list[typing.Any], float | None]]) -> None:
    records = [record(number, *one) for number, one in enumerate(drawn)]
    lately = Lately(0.0, 100.0, ROLES, {}, records, [])
    events = [one for batch in trace_events(lately, 0) for one in batch]
    check_trace(events)
    arrivals = [one for one in events if one["ph"] == "X" and one["name"] == "queued"]
    assert len(arrivals) >= len(records)
