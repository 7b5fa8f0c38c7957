"""What pictures show is worked out by hand here; how it is drawn is looked at by a person."""

from __future__ import annotations

from typing import Any

import pytest

from tinfer.bench.figures import (
    Curve,
    Span,
    cdf,
    goodput_over_load,
    label_of,
    latency_cdfs,
    timeline,
)


def test_a_cdf_steps_up_at_each_value() -> None:
    assert cdf("a", [3.0, 1.0, 2.0, 2.0]) == Curve("a", [1.0, 2.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1])


def record(ttft_s: float | None, e2el_s: float | None, output_tokens: int = 1) -> dict[str, Any]:
    return {"ttft_s": ttft_s, "e2el_s": e2el_s, "output_tokens": output_tokens}


def test_latencies_leave_out_what_was_not_measured() -> None:
    results: list[dict[str, Any]] = [
        {"label": "a", "records": [record(0.5, 1.0, 3), record(0.25, 0.25), record(0.1, None)]},
        {"label": "b", "records": [record(0.75, 0.75)]},
        {"label": "without records"},
        {"label": "all failed", "records": [record(None, None)]},
    ]
    curves = latency_cdfs(results)
    assert list(curves) == ["TTFT", "TPOT", "E2EL"]
    assert curves["TTFT"] == [
        Curve("a", [250.0, 500.0], [0.5, 1.0]),
        Curve("b", [750.0], [1.0]),
    ]
    assert curves["TPOT"] == [Curve("a", [250.0], [1.0])]
    assert curves["E2EL"][0] == Curve("a", [250.0, 1000.0], [0.5, 1.0])
    assert latency_cdfs([{"label": "c"}]) == {}


def test_a_result_is_labelled_or_named_by_its_server() -> None:
    named = {"label": None, "model_id": "m", "base_url": "http://x"}
    assert (label_of(named), label_of({**named, "label": "two"})) == ("m at http://x", "two")


def test_goodput_is_ordered_by_load_and_repetitions_are_averaged() -> None:
    def result(label: str, offered: float | None, good: float | None) -> dict[str, Any]:
        return {"label": label, "offered_rate": offered, "request_goodput": good}

    curves = goodput_over_load(
        [
            result("a", 4.0, 3.0),
            result("b", 2.0, 1.0),
            result("a", 2.0, 2.0),
            result("a", 4.0, 1.0),
            result("a", None, 9.0),
            result("a", 8.0, None),
        ]
    )
    assert curves == [Curve("a", [2.0, 4.0], [2.0, 2.0]), Curve("b", [2.0], [1.0])]


def traced(first_token_s: float | None, **trace: Any) -> dict[str, Any]:
    """Sent a quarter of a second before its first token."""
    sent_s = None if first_token_s is None else first_token_s - 0.25
    fields = {"prefill_worker": "p", "decode_worker": "d", "prefill_s": 0.25, "handoff_s": 0.5}
    ttft_s = None if first_token_s is None else 0.25
    return {
        "sent_s": sent_s,
        "ttft_s": ttft_s,
        "trace": {**fields, "decode_s": 2.0, **trace},
    }


def test_a_split_request_is_on_both_workers() -> None:
    decode, prefill = timeline([traced(1.0)])
    assert (prefill.worker, prefill.spans) == ("p", [Span(0.75, 1.0, "prefill")])
    assert (decode.worker, decode.num_rows) == ("d", 1)
    assert decode.spans == [Span(1.0, 1.5, "hand-off"), Span(1.5, 3.0, "decode")]


def test_a_whole_request_is_on_one_worker_without_a_hand_off() -> None:
    (lane,) = timeline([traced(1.0, decode_worker="p", handoff_s=None)])
    assert lane.spans == [Span(0.75, 1.0, "prefill"), Span(1.0, 3.0, "decode")]


def test_a_request_that_ended_with_its_first_token_has_no_decode() -> None:
    (lane,) = timeline([traced(1.0, decode_worker=None, handoff_s=None, decode_s=0.0)])
    assert [span.phase for span in lane.spans] == ["prefill"]


def test_requests_without_a_trace_are_left_out() -> None:
    assert timeline([{"sent_s": 0.5, "ttft_s": 1.0, "trace": None}, {}, traced(None)]) == []


def test_spans_that_overlap_get_rows_of_their_own() -> None:
    alone: dict[str, Any] = {"decode_worker": None, "decode_s": None}
    (lane,) = timeline(traced(at_s, **alone) for at_s in (1.0, 1.125, 1.25, 1.375))
    assert [(span.start_s, span.row) for span in lane.spans] == [
        (0.75, 0),
        (0.875, 1),
        (1.0, 0),
        (1.125, 1),
    ]
    assert lane.num_rows == 2


@pytest.mark.parametrize("values", [[], [1.0]])
def test_a_cdf_ends_at_one(values: list[float]) -> None:
    assert cdf("a", values).y == [1.0] * len(values)
