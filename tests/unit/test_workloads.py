"""The catalogue against the figures it claims, on lists long enough for chance to be small."""

from __future__ import annotations

import functools
import hashlib

import msgspec
import pytest

from tinfer.workloads import (
    WORKLOADS,
    Request,
    Segment,
    WorkloadSpec,
    WorkloadSummary,
    make,
    prompt_token_ids,
    summarise,
)

PAPER = ("LPLD", "LPHD", "HPLD", "HPHD", "Mixed")

# Measured p50, p90, p99 and mean of prompts and of answers; None where no source gives one.
MEASURED: dict[str, tuple[tuple[float | None, ...], tuple[float | None, ...]]] = {
    "azure-code": ((1469, 5188, 7436, 2048), (13, 55, 251, 28)),
    "azure-conversation": ((1020, 2734, 4142, 1155), (129, 424, 601, 211)),
    "summarise": ((2730, 3702, 3933, None), (167, 372, 3271, 291)),
    "summarise-long": ((7059, 12985, None, None), (208, 371, None, None)),
    "burst": ((251, None, None, 611), (34, None, None, 123)),
    "burst-on-off": ((251, None, None, 611), (34, None, None, 123)),
}
# What one and the same list is on every machine and Python version; a change here is a new
# workload under an old name, so results before and after it cannot be compared.
GOLDEN = {
    "LPLD": "6ab3db1900085f37",
    "LPHD": "4883d6a625db3605",
    "HPLD": "58ff23e5ac67b369",
    "HPHD": "e64204d261cbfbd1",
    "Mixed": "48b90df9d12782ac",
    "azure-code": "e85c38f8d155d92e",
    "azure-conversation": "8fd5deb1e2a2059c",
    "burst": "f391e20ffcf1460b",
    "burst-on-off": "570fc87bdb9f7014",
    "summarise": "b9335e8524256e8e",
    "summarise-long": "2c804a59bfb4ef1e",
    "multi-tenant": "7ad42152d29667fd",
    "chat": "76136978b640f409",
}


@functools.cache
def large(name: str) -> WorkloadSummary:
    return summarise(make(WorkloadSpec(name=name, num_requests=10_000)))


def few(name: str, **fields: object) -> list[Request]:
    return make(msgspec.convert({"name": name, "num_requests": 300, **fields}, WorkloadSpec))


@pytest.mark.parametrize("name", MEASURED)
def test_lengths_have_the_measured_figures(name: str) -> None:
    summary = large(name)
    for drawn, measured in zip(
        (summary.prompt_tokens, summary.output_tokens), MEASURED[name], strict=True
    ):
        for value, wanted in zip(
            (drawn.p50, drawn.p90, drawn.p99, drawn.mean), measured, strict=True
        ):
            assert wanted is None or value == pytest.approx(wanted, rel=0.10)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_classes_keep_to_its_thresholds(name: str) -> None:
    for request in few(name):
        prefill, decode = request.task[:2], request.task[2:]
        assert name in ("Mixed", request.task)
        assert (request.prompt_tokens > 512) == (prefill == "HP")
        assert (request.output_tokens > 128) == (decode == "HD")
        assert request.arrival_s == 0.0


def test_light_prompts_and_all_answers_have_the_papers_medians() -> None:
    assert large("LPLD").prompt_tokens.p50 == pytest.approx(18, abs=1)
    assert large("Mixed").output_tokens.p50 == pytest.approx(128, rel=0.05)


def test_mixed_has_its_four_classes_in_equal_parts() -> None:
    assert set(large("Mixed").num_per_task) == {"LPLD", "LPHD", "HPLD", "HPHD"}
    for num in large("Mixed").num_per_task.values():
        assert num == pytest.approx(2500, rel=0.06)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_keeps_to_its_entry(name: str) -> None:
    workload, summary = WORKLOADS[name], large(name)
    assert set(summary.num_per_task) == set(workload.tasks)
    if workload.own_rate_rps is None:
        assert summary.rate_rps is None
    else:
        # Conversations start at the rate asked for and the last ones fade out.
        tolerance = 0.10 if name == "chat" else 1e-6
        assert summary.rate_rps == pytest.approx(workload.own_rate_rps, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "cv"), [("burst", 3.0), ("burst-on-off", 3.0), ("summarise", 1.0)]
)
def test_gaps_vary_as_described(name: str, cv: float) -> None:
    assert large(name).interarrival_cv == pytest.approx(cv, rel=0.10)


def test_the_papers_classes_arrive_as_a_poisson_process_where_a_rate_is_given() -> None:
    summary = summarise(make(WorkloadSpec(name="Mixed", num_requests=10_000, rate_rps=4.0)))
    assert summary.rate_rps == pytest.approx(4.0)
    assert summary.interarrival_cv == pytest.approx(1.0, rel=0.05)


def test_burstiness_replaces_the_workloads_own_arrivals() -> None:
    spec = WorkloadSpec(name="azure-code", num_requests=5000, burstiness=4.0)
    summary = summarise(make(spec))
    assert summary.rate_rps == pytest.approx(2.57)
    assert summary.interarrival_cv == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", WORKLOADS)
def test_at_once_means_at_zero(name: str) -> None:
    assert {request.arrival_s for request in few(name, at_once=True) if request.turn == 0} == {0.0}


@pytest.mark.parametrize("name", WORKLOADS)
def test_another_rate_changes_no_length(name: str) -> None:
    slow, fast = few(name, rate_rps=1.0), few(name, rate_rps=5.0)
    assert [each.request_id for each in slow] != [] and slow != fast
    assert {each.request_id: each.segments for each in slow} == {
        each.request_id: each.segments for each in fast
    }


def test_tenants_have_zipf_shares_and_a_prefix_each() -> None:
    requests = few("multi-tenant", num_requests=4000, options={"num_tenants": 4, "zipf": 1.0})
    tenants = [f"tenant-{tenant:03d}" for tenant in range(4)]
    own = {tenant: [each for each in requests if each.tenant == tenant] for tenant in tenants}
    for rank, tenant in enumerate(tenants, start=1):
        # Gaps of CV 3 leave the third tenant's count to chance by some 10 %.
        assert len(own[tenant]) == pytest.approx(4000 / rank / (25 / 12), rel=0.25)
        assert len({each.task for each in own[tenant]}) == 1
        assert len({each.segments[0] for each in own[tenant]}) == 1
    assert len({each.segments[0] for each in requests}) == 4


def test_a_tenant_asks_for_the_same_whoever_else_is_there() -> None:
    few_tenants = few("multi-tenant", options={"num_tenants": 2})
    more_tenants = few("multi-tenant", options={"num_tenants": 9})
    asked = {each.request_id: (each.segments, each.output_tokens) for each in few_tenants}
    both = [each for each in more_tenants if each.request_id in asked]
    assert len(both) > 50
    assert all(asked[each.request_id] == (each.segments, each.output_tokens) for each in both)


def test_conversations_have_the_mean_number_of_turns_and_mostly_known_prompts() -> None:
    summary = large("chat")
    assert summary.num_requests / summary.num_sessions == pytest.approx(4.0, rel=0.05)
    assert summary.shared_prefix_share > 0.7
    assert large("burst").shared_prefix_share == 0.0


def test_a_later_turn_comes_after_the_answer_it_follows() -> None:
    requests = few("chat", options={"think_s": 5.0, "answer_s_per_token": 0.1})
    by_id = {request.request_id: request for request in requests}
    followers = [request for request in requests if request.after is not None]
    assert len(followers) > 100
    for request in followers:
        earlier = by_id[request.after or ""]
        assert (earlier.session, earlier.turn + 1) == (request.session, request.turn)
        assert request.arrival_s >= earlier.arrival_s + 0.1 * earlier.output_tokens - 2e-6
        question, answer = request.segments[-1], request.segments[-2]
        assert request.segments[:-2] == earlier.segments
        assert answer.num_tokens == earlier.output_tokens and question.num_tokens >= 1


def test_a_conversation_that_no_longer_fits_ends_early() -> None:
    options = {"mean_turns": 1000, "max_turns": 20}
    free, tight = few("chat", options=options), few("chat", options=options, max_prompt_tokens=600)
    assert max(request.turn for request in free) == 19
    assert max(request.turn for request in tight) < 10
    assert max(request.prompt_tokens for request in tight) <= 600 < free[-1].prompt_tokens


def test_the_scale_keeps_the_shape() -> None:
    whole, quarter = few("HPLD"), few("HPLD", length_scale=0.25)
    for large_one, small_one in zip(whole, quarter, strict=True):
        assert small_one.prompt_tokens == pytest.approx(large_one.prompt_tokens / 4, abs=0.7)
        assert small_one.output_tokens == pytest.approx(large_one.output_tokens / 4, abs=0.7)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lists_are_the_same_everywhere(name: str) -> None:
    requests = make(WorkloadSpec(name=name, num_requests=200, seed=7))
    assert hashlib.sha256(msgspec.json.encode(requests)).hexdigest()[:16] == GOLDEN[name]


def test_token_ids_are_the_same_everywhere() -> None:
    request = Request("r", 0.0, "t", (Segment("a", 3), Segment("b", 2)), output_tokens=1)
    assert prompt_token_ids(request, 32_000, first_id=10) == [8608, 7652, 24479, 10587, 1494]
    assert prompt_token_ids(request, 32_000, first_id=10, salt="x")[:2] == [11418, 24375]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "none"}, "no workload 'none'"),
        ({"options": {"cv": 2.0}}, "LPLD has no option 'cv'; it has none"),
        ({"name": "burst", "options": {"cv": -1.0}}, "cv = -1 is outside 0 to 100"),
        ({"burstiness": 0.5}, "burstiness needs a rate_rps"),
        ({"num_requests": 0}, "start at 1"),
        ({"max_prompt_tokens": 0}, "start at 1"),
        ({"length_scale": 0.0}, "must be above 0"),
        ({"rate_rps": float("nan")}, "must be above 0"),
        ({"rate_rps": float("inf")}, "at_once=True"),
        ({"rate_rps": 1.0, "at_once": True}, "leaves no room"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields: dict[str, object], complaint: str) -> None:
    asked = {"name": "LPLD", "num_requests": 10, **fields}
    with pytest.raises(ValueError, match=complaint):
        make(WorkloadSpec(**asked))  # type: ignore[arg-type]


def test_a_spec_survives_json() -> None:
    spec = WorkloadSpec(name="burst", num_requests=5, rate_rps=2.0, options={"cv": 2.0})
    assert msgspec.json.decode(msgspec.json.encode(spec), type=WorkloadSpec) == spec


@pytest.mark.parametrize(("vocab_size", "first_id"), [(10, 10), (0, 0), (10, -1)])
def test_no_ids_to_choose_from_is_an_error(vocab_size: int, first_id: int) -> None:
    request = Request("r", 0.0, "t", (Segment("a", 3),), output_tokens=1)
    with pytest.raises(ValueError, match="no token ids"):
        prompt_token_ids(request, vocab_size, first_id)
