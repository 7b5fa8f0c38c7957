"""What a scrape shows of requests: each counted once, under its own end, with its own times."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.master_box import STATS, D, P
from tests.unit.metrics_box import MeteredBox
from tinfer.api.service import Generation
from tinfer.core.lengths import Lengths
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import InvalidRequest, NoWorker, Overloaded, TinferError
from tinfer.predict.asked import Asked
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation

ENDS = ("stop", "length", "abort", "error")


class Says:
    """Predicts the same of every answer."""

    def __init__(self, *points: int) -> None:
        self.lengths = Lengths(points)

    def predict(self, asked: Asked) -> Lengths:
        return self.lengths


@pytest.fixture
def box() -> MeteredBox:
    return MeteredBox()


def ends(box: MeteredBox) -> tuple[float, ...]:
    """Ends by reason, in the order of ENDS."""
    name = "vllm:request_success_total"
    return tuple(box.value(name, finished_reason=reason) for reason in ENDS)


def answer(box: MeteredBox, num_tokens: int, reason: str = "stop") -> None:
    """A whole request of so many tokens, from arrival to its end."""
    box.submit(max_tokens=1000)
    box.prefilled()
    box.pulled()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, list(range(1, num_tokens)), num_tokens, "c", 3, finish_reason=reason)
    box.lease_ended(0)


async def test_the_times_of_a_split_request(box: MeteredBox) -> None:
    box.clock.at_s = 1.0
    box.submit()
    box.clock.at_s = 1.5
    box.prefilled()
    box.clock.at_s = 1.75
    box.say(D, wire.PullDone("r", True, "", 640, 0.125, 0.2))
    box.clock.at_s = 1.9
    box.step(D, [17], 1, "ab", 2)  # the first token once more: nothing new
    box.clock.at_s = 2.0
    box.step(D, [18], 2, "c", 3)
    box.clock.at_s = 2.25
    box.step(D, [19], 3, "d", 4, finish_reason="length")
    for name, expected in {
        "vllm:time_to_first_token_seconds": (1, 0.5),
        "vllm:inter_token_latency_seconds": (2, 0.75),
        "vllm:request_time_per_output_token_seconds": (1, 0.375),
        "vllm:e2e_request_latency_seconds": (1, 1.25),
        "vllm:request_queue_time_seconds": (1, 0.0),
        "vllm:request_inference_time_seconds": (1, 1.25),
        "vllm:request_prefill_time_seconds": (1, 0.5),
        "vllm:request_decode_time_seconds": (1, 0.75),
        "tinfer:handoff_seconds": (1, 0.25),
        "tinfer:handoff_copy_seconds": (1, 0.125),
    }.items():
        assert box.histogram(name) == expected, name
    assert box.within("vllm:inter_token_latency_seconds", "0.2") == 0
    assert box.within("vllm:inter_token_latency_seconds", "0.3") == 1
    assert box.within("vllm:inter_token_latency_seconds", "0.5") == 2
    assert box.value("tinfer:handoff_bytes_total") == 640
    assert box.value("tinfer:handoffs_total", outcome="installed") == 1
    assert box.value("tinfer:requests_routed_total", route="split") == 1


async def test_the_tokens_of_a_split_request(box: MeteredBox) -> None:
    box.dispatcher.block_tokens = 16
    answer(box, 3)
    assert box.value("vllm:generation_tokens_total") == 3
    assert box.value("vllm:prompt_tokens_total") == 20
    assert box.value("vllm:prompt_tokens_cached_total") == 16
    assert box.value("vllm:prompt_tokens_by_source_total", source="local_compute") == 4
    assert box.value("vllm:prefix_cache_queries_total") == 20
    assert box.value("vllm:prefix_cache_hits_total") == 16
    assert box.histogram("vllm:request_prompt_tokens") == (1, 20)
    assert box.histogram("vllm:request_generation_tokens") == (1, 3)
    assert box.histogram("vllm:request_prefill_kv_computed_tokens") == (1, 4)
    assert box.histogram("vllm:request_params_max_tokens") == (1, 1000)
    assert ends(box) == (1, 0, 0, 0)


async def test_a_prompt_that_has_to_be_computed_whole_looks_nothing_up(box: MeteredBox) -> None:
    box.dispatcher.block_tokens = 16
    box.submit(prompt_logprobs=1)
    box.prefilled()
    assert box.value("vllm:prefix_cache_queries_total") == 0
    assert box.value("vllm:prompt_tokens_total") == 20


async def test_buckets_of_tokens_end_with_the_length_of_the_model(box: MeteredBox) -> None:
    answer(box, 3)
    name = "vllm:request_params_max_tokens"  # 1000, where the model takes 100
    assert (box.within(name, "100.0"), box.within(name, "+Inf")) == (0, 1)
    missing = {"model_name": "m", "engine": "0", "le": "200.0"}
    assert box.registry.get_sample_value(f"{name}_bucket", missing) is None


async def test_a_client_that_leaves_is_an_abort_and_gets_no_more(box: MeteredBox) -> None:
    stream = box.to_decoding()
    stream.cancel()
    stream.cancel()
    box.step(D, [17, 18], 2, "abc", 3)
    box.step(D, [19], 3, "d", 4, finish_reason="length")
    assert ends(box) == (0, 0, 1, 0)
    assert box.value("vllm:generation_tokens_total") == 1
    assert box.histogram("vllm:time_to_first_token_seconds")[0] == 1
    assert box.histogram("vllm:inter_token_latency_seconds")[0] == 0
    assert box.histogram("vllm:e2e_request_latency_seconds")[0] == 0


async def test_one_that_leaves_before_its_first_token_has_none(box: MeteredBox) -> None:
    box.submit().cancel()
    box.prefilled()
    assert box.histogram("vllm:time_to_first_token_seconds")[0] == 0
    assert (ends(box), box.value("vllm:prompt_tokens_total")) == ((0, 0, 1, 0), 0)


async def test_each_failure_has_its_own_reason(box: MeteredBox) -> None:
    def failed() -> dict[str, float]:
        reasons = ("engine", "refused", "worker-lost", "no-worker", "stopping")
        return {
            reason: number
            for reason in reasons
            if (number := box.value("tinfer:requests_failed_total", reason=reason))
        }

    box.submit("a")
    box.step(P, [], 0, request_id="a", finish_reason="error")
    assert failed() == {"engine": 1}
    box.submit("b")
    box.say(P, wire.Refused("b", "too long", client_fault=True))
    assert failed() == {"engine": 1, "refused": 1}
    box.submit("c")
    box.submit("d").cancel()
    box.dispatcher.fail_all(NoWorker("the server is stopping"))
    assert failed() == {"engine": 1, "refused": 1, "stopping": 1}
    assert ends(box) == (0, 0, 1, 3)


async def test_a_request_that_kills_workers_is_lost() -> None:
    box = MeteredBox(max_request_restarts=1)
    box.submit()
    for worker in (P, D):
        box.down(worker)
    assert box.value("tinfer:requests_failed_total", reason="worker-lost") == 1
    assert box.value("tinfer:requests_resumed_total", form="fresh") == 1
    assert ends(box) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("options", "waits", "limit"),
    [
        ({"max_num_queued_reqs": 1}, 1, "max_num_queued_reqs"),
        ({"max_num_queued_tokens": 30}, 1, "max_num_queued_tokens"),
    ],
)
async def test_a_refusal_for_a_full_queue(options: dict[str, Any], waits: int, limit: str) -> None:
    box = MeteredBox(**options)
    box.to_queued()
    with pytest.raises(Overloaded):
        box.submit("more")
    assert box.value("tinfer:requests_refused_total", reason="queue-full") == 1
    assert box.value("vllm:admission_rejections_total", reason=limit) == 1
    assert box.value("tinfer:requests_accepted_total") == 2
    assert box.value("vllm:num_requests_waiting_by_reason", reason="capacity") == waits
    assert sum(ends(box)) == 0


async def test_a_refusal_without_a_worker() -> None:
    box = MeteredBox(roles="")
    with pytest.raises(NoWorker):
        box.submit()
    assert box.value("tinfer:requests_refused_total", reason="no-worker") == 1
    assert box.value("tinfer:requests_accepted_total") == 0


async def test_answers_to_one_prompt_are_one_n(box: MeteredBox) -> None:
    for child in range(3):
        generation = Generation([1], SamplingSpec(max_tokens=2), n=3, child=child)
        box.dispatcher.submit(f"r{child}", generation)
    assert box.histogram("vllm:request_params_n") == (1, 3)
    assert box.value("tinfer:requests_accepted_total") == 3


# --- what goes on elsewhere ----------------------------------------------------------------------


def resumed(box: MeteredBox) -> dict[str, float]:
    forms = ("blocks", "replay", "prompt", "fresh")
    name = "tinfer:requests_resumed_total"
    return {form: number for form in forms if (number := box.value(name, form=form))}


async def test_blocks_that_are_still_held_are_pulled_by_another(box: MeteredBox) -> None:
    box.up(Incarnation("d1", 0))
    box.submit()
    box.prefilled()
    box.down(D)
    assert resumed(box) == {"blocks": 1}


@pytest.mark.parametrize(
    ("num_emitted", "sampling", "form"),
    [(3, {}, "replay"), (20, {}, "prompt"), (20, {"seed": 1}, "replay")],
)
async def test_what_was_emitted_is_prompt_or_forced(
    num_emitted: int, sampling: dict[str, Any], form: str
) -> None:
    box = MeteredBox(roles="b b1", route="whole")
    box.submit(max_tokens=40, **sampling)
    ((worker, _),) = box.told()
    box.clock.at_s = 1.0
    box.step(worker, [5] * num_emitted, num_emitted, "x" * num_emitted, num_emitted)
    box.down(worker)
    assert resumed(box) == {form: 1}
    ((other, start),) = box.told()
    assert isinstance(start, wire.Start)
    num_forced = len(start.forced_tokens) // 4
    box.clock.at_s = 3.0
    box.step(other, [5] * num_forced, num_forced, "x" * num_forced, num_forced)
    num = num_forced + 1
    box.step(other, [6], num, "y", num, finish_reason="stop")
    assert box.value("vllm:generation_tokens_total") == num_emitted + 1, "a token counts once"
    assert box.histogram("vllm:inter_token_latency_seconds") == (1, 2.0)
    assert box.histogram("vllm:time_to_first_token_seconds") == (1, 1.0)
    assert box.value("tinfer:requests_routed_total", route="whole") == 1


async def test_a_copy_that_fails_is_no_hand_off_in_time(box: MeteredBox) -> None:
    box.submit()
    box.prefilled()
    box.pulled(ok=False)
    assert box.value("tinfer:handoffs_total", outcome="recomputed") == 1
    assert box.histogram("tinfer:handoff_seconds")[0] == 0


async def test_preemptions_per_request(box: MeteredBox) -> None:
    box.to_decoding()
    box.say(D, wire.Step([], STATS, preempted=["r", "unknown"]))
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    assert box.histogram("vllm:request_num_preemptions") == (1, 1)


# --- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "outcome"), [(2, "below"), (14, "within"), (55, "within"), (90, "above")]
)
async def test_a_length_against_what_was_predicted(tokens: int, outcome: str) -> None:
    box = MeteredBox(predictor=Says(10, 20, 30, 40, 50, 60))
    answer(box, tokens)
    assert box.value("tinfer:length_predictions_total", outcome=outcome) == 1
    assert box.histogram("tinfer:length_error_tokens") == (1, abs(35 - tokens))
    assert box.value("tinfer:predicted_output_tokens_total") == 35


async def test_only_answers_are_compared() -> None:
    box = MeteredBox(predictor=Says(10, 20))
    box.submit().cancel()
    assert box.histogram("tinfer:length_error_tokens")[0] == 0
    answer_cut = SamplingSpec(max_tokens=5)
    box.dispatcher.submit("s", Generation([1], answer_cut))
    box.step(P, [1, 2, 3, 4, 5], 5, "x", 1, "s", finish_reason="length")
    # Cut at five tokens, all that was predicted is five.
    assert box.value("tinfer:length_predictions_total", outcome="within") == 1
    assert box.histogram("tinfer:length_error_tokens") == (1, 0)


def test_nothing_is_raised_for_nothing(box: MeteredBox) -> None:
    """Every series of a server that has done nothing is there, at zero or as it is."""
    found = [sample for family in box.registry.collect() for sample in family.samples]
    own = [s for s in found if not s.name.startswith("process_")]
    assert all(isinstance(s.value, int | float) for s in own)
    assert {s.name for s in own if s.name.endswith("_total") and s.value} == set()


@pytest.mark.parametrize("error", [InvalidRequest("x"), NoWorker("y")])
async def test_a_failure_after_the_end_is_none(box: MeteredBox, error: TinferError) -> None:
    stream = box.submit()
    stream.cancel()
    box.dispatcher.fail_all(error)
    assert ends(box) == (0, 0, 1, 0)
