"""Whatever is asked for, a workload keeps to it; whatever is logged can be read and replayed."""

from __future__ import annotations

import io
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinfer.workloads import (
    WORKLOADS,
    Limits,
    LogRecord,
    Request,
    Segment,
    WorkloadSpec,
    encode_record,
    from_log,
    make,
    prompt_token_ids,
    read_log,
    summarise,
    write_log,
)
from tinfer.workloads.replay import fitted

AT_ONCE = st.fixed_dictionaries({"at_once": st.booleans()})
PACED = st.fixed_dictionaries(
    {
        "rate_rps": st.floats(0.01, 1000.0),
        "burstiness": st.none() | st.floats(0.1, 10.0),
        "exact_rate": st.booleans(),
    }
)
LENGTHS = st.fixed_dictionaries(
    {
        "length_scale": st.floats(0.01, 2.0),
        "max_prompt_tokens": st.none() | st.integers(1, 4000),
        "max_output_tokens": st.none() | st.integers(1, 1000),
    }
)
SPECS = st.builds(
    lambda name, num, seed, paced, lengths: msgspec.convert(
        {"name": name, "num_requests": num, "seed": seed, **paced, **lengths}, WorkloadSpec
    ),
    st.sampled_from(sorted(WORKLOADS)),
    st.integers(1, 60),
    st.integers(0, 2**64),
    AT_ONCE | PACED,
    LENGTHS,
)
NAMES = st.text(max_size=12)
SEGMENTS = st.lists(st.builds(Segment, NAMES, st.integers(1, 50)), min_size=1, max_size=5)
LIMITS = st.builds(Limits, st.floats(0.01, 3.0), st.none() | st.integers(1, 99))
SECONDS = st.floats(0.0, 1e6)
COUNTS = st.integers(0, 10**6)
RECORDS = st.builds(
    LogRecord,
    request_id=NAMES,
    arrival_s=SECONDS,
    prompt_tokens=COUNTS,
    max_output_tokens=st.integers(1, 10**6),
    output_tokens=COUNTS,
    task=NAMES,
    after=st.none() | NAMES,
    segments=st.none() | st.just(()) | SEGMENTS.map(tuple),
    error=st.none() | NAMES,
    ttft_s=st.none() | SECONDS,
    itl_s=st.none() | st.lists(SECONDS, max_size=4).map(tuple),
    workers=st.lists(NAMES, max_size=3).map(tuple),
    predicted_output_tokens=st.none() | SECONDS,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(SPECS)
def test_a_workload_keeps_to_its_spec(spec: WorkloadSpec) -> None:
    requests = make(spec)
    assert requests == make(spec)
    assert len(requests) == len({each.request_id for each in requests}) == spec.num_requests
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(requests))
    for request in requests:
        assert request.arrival_s >= 0.0
        assert request.task in WORKLOADS[spec.name].tasks
        assert all(segment.num_tokens >= 1 for segment in request.segments)
        assert 1 <= request.prompt_tokens <= (spec.max_prompt_tokens or request.prompt_tokens)
        assert 1 <= request.output_tokens <= (spec.max_output_tokens or request.output_tokens)


@settings(max_examples=40, deadline=None)
@given(SPECS, st.integers(0, 2**64))
def test_another_seed_is_another_workload(spec: WorkloadSpec, seed: int) -> None:
    other = msgspec.structs.replace(spec, seed=seed)
    shared = {part for each in make(spec) for part in each.segments} & {
        part for each in make(other) for part in each.segments
    }
    assert bool(shared) == (seed == spec.seed)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(set(WORKLOADS) - {"chat"})),
    st.floats(0.01, 1000.0),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_an_exact_rate_is_met(name: str, rate_rps: float, num: int, seed: int) -> None:
    spec = WorkloadSpec(name=name, num_requests=num, rate_rps=rate_rps, seed=seed)
    assert make(spec)[-1].arrival_s == pytest.approx(num / rate_rps, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["Mixed", "summarise", "chat"]), st.floats(0.1, 100.0), st.integers(0, 99))
def test_a_rate_left_to_chance_is_about_the_one_asked_for(
    name: str, rate_rps: float, seed: int
) -> None:
    options = {"think_s": 0.0, "answer_s_per_token": 0.0} if name == "chat" else {}
    spec = WorkloadSpec(
        name=name,
        num_requests=3000,
        rate_rps=rate_rps,
        seed=seed,
        exact_rate=False,
        options=options,
    )
    assert summarise(make(spec)).rate_rps == pytest.approx(rate_rps, rel=0.2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.none() | st.integers(1, 500),
    st.integers(1, 200_000),
    st.integers(0, 1000),
)
def test_a_turns_prompt_is_a_prefix_of_the_next_turns(
    seed: int, most: int | None, num_ids: int, first_id: int
) -> None:
    spec = WorkloadSpec(
        name="chat", num_requests=12, seed=seed, max_prompt_tokens=most, length_scale=0.1
    )
    requests = make(spec)
    ids = {
        each.request_id: prompt_token_ids(each, first_id + num_ids, first_id) for each in requests
    }
    for request in requests:
        own = ids[request.request_id]
        assert len(own) == request.prompt_tokens
        assert first_id <= min(own) and max(own) < first_id + num_ids
        if request.after is not None:
            earlier = ids[request.after]
            assert own[: len(earlier)] == earlier and len(own) > len(earlier)


@settings(max_examples=60, deadline=None)
@given(SEGMENTS, SEGMENTS, st.integers(1, 50))
def test_a_segments_tokens_do_not_depend_on_its_place(
    before: list[Segment], after: list[Segment], num_tokens: int
) -> None:
    def ids(*segments: Segment) -> list[int]:
        return prompt_token_ids(Request("r", 0.0, "t", segments, 1), 2**31)

    one = Segment("one", num_tokens)
    assert ids(*before, one, *after) == ids(*before) + ids(one) + ids(*after)
    assert ids(Segment("one", num_tokens + 3))[:num_tokens] == ids(one)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=5), st.dictionaries(NAMES, JSON, max_size=3))
def test_a_log_is_read_as_it_was_written(
    records: list[LogRecord], unknown: dict[str, object]
) -> None:
    file = io.BytesIO()
    write_log(file, records)
    assert read_log(io.BytesIO(file.getvalue())) == records
    extended = [
        msgspec.json.encode({f"new {key}": value for key, value in unknown.items()} | keys) + b"\n"
        for keys in map(msgspec.json.decode, map(encode_record, records))
    ]
    assert read_log(io.BytesIO(b"".join(extended))) == records


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=5, unique_by=lambda record: record.request_id), LIMITS)
def test_every_log_can_be_replayed(records: list[LogRecord], limits: Limits) -> None:
    replayed = from_log(records, limits=limits)
    assert {each.request_id for each in replayed} == {each.request_id for each in records}
    assert [each.arrival_s for each in replayed[:1]] == [0.0] * bool(replayed)
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(replayed))
    for request in replayed:
        assert 1 <= request.prompt_tokens <= (limits.max_prompt_tokens or request.prompt_tokens)


@settings(max_examples=60, deadline=None)
@given(SEGMENTS, SEGMENTS, LIMITS)
def test_limits_keep_shared_prefixes_shared(
    shared: list[Segment], more: list[Segment], limits: Limits
) -> None:
    short, long = fitted(shared, limits), fitted([*shared, *more], limits)
    assert long[: len(short)] == short
